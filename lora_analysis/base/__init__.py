"""Base models as lazy mappings from targets to matrices, always oriented (d_out, d_in).

Conventions
-----------
One matrix at a time is read, never the whole model; of a remote file only its bytes. A matrix keeps its stored dtype;
a weight stored as (d_in, d_out), like those of transformers' ``Conv1D``, comes back as a transposed view. What a base
stores fused or in stacks of experts is taken apart where a written-out rule says how, and refused otherwise.

Values
------
``BaseWeights``, made by ``load_base``.

Where what is
-------------
``opening`` (``load_base``), ``sources`` (where weights are), ``weights`` (``BaseWeights``), ``architecture`` (which
model, how many heads), ``names`` (prefixes), ``stores`` and ``layouts`` (fused and stacked weights), ``matrices``
(from a target to a matrix), ``orientation`` (turned or not), ``vocabulary`` (resized embeddings), ``quantised`` and
``bitsandbytes`` (dequantisation), ``gguf`` (GGUF as a base), ``composite`` (pipelines, bytes read).
"""

from lora_analysis.base.opening import load_base
from lora_analysis.base.weights import BaseWeights

__all__ = ["BaseWeights", "load_base"]

"""Files of named tensors, opened lazily: safetensors, torch's own, GGUF or npz, one file or many behind an index.

Conventions
-----------
A ``Checkpoint`` is a mapping from names to tensors that reads a tensor when it is asked for and knows
every shape and dtype beforehand. Files are untrusted: headers are bounded and checked before anything is
allocated, pickles are opened with ``weights_only=True``, and the shards of an index stay in its folder.

Values
------
``Checkpoint`` (the protocol), ``SafetensorsFile``, ``StateDict``, ``GGUFFile``, ``NpzFile``, ``Shards``;
``open_checkpoint`` chooses.

References
----------
The safetensors format: https://huggingface.co/docs/safetensors.
"""

from lora_analysis.checkpoint.gguf_file import GGUFFile
from lora_analysis.checkpoint.json_files import read_json
from lora_analysis.checkpoint.npz_file import NpzFile
from lora_analysis.checkpoint.opening import Shards, open_checkpoint
from lora_analysis.checkpoint.protocol import Checkpoint, StateDict, nbytes
from lora_analysis.checkpoint.safetensors_file import SafetensorsFile

__all__ = [
    "Checkpoint",
    "GGUFFile",
    "NpzFile",
    "SafetensorsFile",
    "Shards",
    "StateDict",
    "nbytes",
    "open_checkpoint",
    "read_json",
]

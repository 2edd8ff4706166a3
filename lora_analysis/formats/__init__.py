"""On-disk formats of adapters: one file or folder each, with ``NAME``, ``TAKES``, ``matches`` and ``read``.

``TAKES`` holds what a reader uses of ``config`` (``adapter_config.json``), ``name``, ``split``, ``initial`` and
``heads``; the others are refused before it is asked (``options.refuse_others``).
``FORMATS`` is the whole list, in the order of detection. What a file is, its content decides; ``format=``
overrides it. A kind that is recognised but not read is named (``formats.unread``), never half read. ``writers``
holds what writes.
"""

from lora_analysis.formats.loading import FORMATS, load_adapter
from lora_analysis.formats.writers import save_adapter

__all__ = ["FORMATS", "load_adapter", "save_adapter"]

"""Writers of adapters, one per format: factors in, files and a list of losses out.

``WRITERS`` is the whole list. A writer gets the factors of whole matrices (``parts_of``), refuses what its format
cannot say about ΔW, and returns what it made of them. ``save_adapter`` does both, and says what is lost.
"""

from lora_analysis.formats.writers.assembly import parts_of
from lora_analysis.formats.writers.formats import WRITERS
from lora_analysis.formats.writers.parts import Part, WriteOptions, Written
from lora_analysis.formats.writers.save import save_adapter

__all__ = ["WRITERS", "Part", "WriteOptions", "Written", "parts_of", "save_adapter"]

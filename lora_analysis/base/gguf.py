"""A GGUF file as a base: found by the names that models have elsewhere, rows in their order.

Conventions
-----------
Its tensors keep GGUF's names in ``list(base)``; ``find`` and ``matrix`` know them by Hugging Face's. Rows of q and k
that the converter permuted come back in half-split order, and quantised tensors as float32. Every matrix is stored as
(d_out, d_in), those of GPT-2 too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lora_analysis.checkpoint.byte_count import ByteCount
from lora_analysis.checkpoint.gguf_file import GGUFFile
from lora_analysis.checkpoint.gguf_header import Field
from lora_analysis.checkpoint.gguf_names import Place, gguf_place, head_counts, permuted_heads, reordered
from lora_analysis.checkpoint.rotary import half_split_order
from lora_analysis.errors import BaseWeightsError

_ARCHITECTURE = "general.architecture"


class GGUFWeights:
    """A checkpoint over a GGUF file of a model.

    Parameters
    ----------
    file : GGUFFile

    Attributes
    ----------
    count : ByteCount
        Bytes of the tensors that were read, as stored.
    kinds : Counter
        How many tensors are dequantised, by GGUF's type.
    """

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self.metadata: Mapping[str, str] = file.metadata
        self.fields: Mapping[str, Field] = file.fields
        self.architecture = str(file.fields.get(_ARCHITECTURE, ""))
        self.count = ByteCount()
        self.kinds = Counter(f"GGUF {file.stored_type(name)}" for name in file if file.is_quantised(name))

    def place(self, tensor: str) -> Place | None:
        """Where the file keeps what a model calls so elsewhere."""
        if not self.architecture:
            return None
        found = gguf_place(tensor, self.architecture)
        return found if found is not None and found.tensor in self._file else None

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)

    def __contains__(self, name: object) -> bool:
        return name in self._file

    def __getitem__(self, name: str) -> Tensor:
        order = self._order(name)
        numbers = self._file[name]
        self.count.add(self._file.stored_nbytes(name))
        return numbers if order is None else numbers[order]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Part of a tensor along its first axis, such as one expert of a stack."""
        order = self._order(name)
        if order is not None:
            return self[name][start:stop]
        taken = self._file.rows(name, start, stop)
        self.count.add(self._file.stored_nbytes(name) * len(taken) // max(1, self.shape(name)[0]))
        return taken

    @property
    def bytes_total(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(self._file.stored_nbytes(name) for name in self._file)

    def _order(self, name: str) -> Tensor | None:
        """The order of a tensor's rows that a model has elsewhere; None where it is the file's own."""
        where = f"{self._file.path}: {name!r}"
        if reordered(name, self.fields):
            raise BaseWeightsError(
                f"{where}: expected heads in the model's own order, GGUF has them in another one for "
                f"{self.architecture!r}. Give the original weights."
            )
        if permuted_heads(name, self.architecture, (1, 1)) is None:
            return None
        block = re.match(r"blk\.([0-9]{1,6})\.", name)
        heads = head_counts(self._file.fields, int(block[1])) if block else None
        count = None if heads is None else permuted_heads(name, self.architecture, heads)
        if count is None:
            raise BaseWeightsError(f"{where}: expected {self.architecture}.attention.head_count, found none.")
        try:
            return half_split_order(self.shape(name)[0], count)
        except ValueError as error:
            raise BaseWeightsError(f"{where}: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._file.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which a tensor is given."""
        return self._file.dtype(name)

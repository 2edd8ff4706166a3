"""Writing llama.cpp's format of adapters: ``<tensor>.lora_a`` and ``.lora_b`` in one GGUF file, one alpha for all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_analysis.adapter import Adapter
from lora_analysis.checkpoint.gguf_names import PERMUTED_ARCHITECTURES, gguf_place, permuted_heads
from lora_analysis.checkpoint.rotary import interleaved_order
from lora_analysis.errors import UnsupportedAdapterError
from lora_analysis.formats.saving import put_in_place
from lora_analysis.formats.writers.components import require_distinct
from lora_analysis.formats.writers.folding import float32_alpha, with_one_scale
from lora_analysis.formats.writers.parts import Part, WriteOptions, Written, in_dtype
from lora_analysis.formats.writers.refusals import (
    refuse_convolutions,
    refuse_embeddings,
    refuse_magnitudes,
    require_base_names,
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What llama.cpp computes adapters in."""


def write(parts: Sequence[Part], adapter: Adapter, path: Path, options: WriteOptions) -> Written:
    """Write one ``.gguf`` file, with the tensors' names and the row order that GGUF's bases have."""
    refuse_magnitudes(adapter.source, parts, "gguf")
    refuse_embeddings(adapter.source, parts, "gguf")
    refuse_convolutions(adapter.source, parts, "gguf")
    require_base_names(adapter, parts, "gguf")
    architecture = options.architecture
    if architecture is None:
        raise UnsupportedAdapterError(
            f"{adapter.source}: gguf names tensors by the base's architecture. Pass architecture=, such as 'llama'."
        )
    alpha, folded, losses = with_one_scale(adapter.source, parts, "alpha", lambda part: part.r)
    if float32_alpha(adapter.source, "gguf", alpha) != alpha:
        losses.append("alpha is a float32: every scale is rounded by up to 6e-8 of itself.")
    folded = [
        part if {part.up.dtype, part.down.dtype} <= {*_DTYPES} else in_dtype(adapter.source, part, torch.float32)
        for part in folded
    ]
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for part in folded:
        tensor = _tensor_name(adapter.source, part, architecture)
        up = part.up[_row_order(adapter.source, part, tensor, architecture, options.heads)]
        tensors |= {f"{tensor}.lora_a": part.down, f"{tensor}.lora_b": up}
        names[part.name] = tensor.removesuffix(".weight")
    require_distinct(adapter.source, names, "gguf")
    put_in_place(path.parent, {path.name: lambda file: _write_file(file, tensors, architecture, alpha)})
    return Written(folded, names, tuple(losses))


def _tensor_name(source: str, part: Part, architecture: str) -> str:
    place = gguf_place(f"{part.name}.weight", architecture)
    if place is None or place.expert is not None or place.tensor.startswith(("token_embd", "token_types")):
        kind = "no name for it" if place is None else "another layout for it (an embedding, or one of many experts)"
        raise UnsupportedAdapterError(
            f"{source}: {part.name!r}: gguf has {kind} in the architecture {architecture!r}. Is architecture= right?"
        )
    return place.tensor


def _row_order(
    source: str, part: Part, tensor: str, architecture: str, heads: tuple[int, int] | None
) -> Tensor | slice:
    """Rows of q and k as GGUF orders them."""
    # Whether rows are permuted does not depend on how many heads there are.
    if permuted_heads(tensor, architecture, heads or (1, 1)) is None:
        return slice(None)
    if heads is None:
        raise UnsupportedAdapterError(
            f"{source}: {part.name!r}: gguf orders the rows of q and k by heads for {architecture!r} (as for "
            f"{len(PERMUTED_ARCHITECTURES)} architectures). Pass heads= with the base's query and key-value heads."
        )
    count = permuted_heads(tensor, architecture, heads) or 1
    try:
        return interleaved_order(len(part.up), count).to(part.up.device)
    except ValueError as error:
        raise UnsupportedAdapterError(f"{source}: {part.name!r}: {error} Is heads= right?") from error


def _write_file(path: Path, tensors: dict[str, Tensor], architecture: str, alpha: float) -> None:
    gguf = _library()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:  # which numpy has not
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _library() -> Any:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise UnsupportedAdapterError(
            'writing GGUF needs the library that defines it: pip install "lora-analysis[gguf]".'
        ) from error
    return gguf

"""``load_adapter``: which format a file is in, and the adapter that its reader describes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_analysis.adapter import Adapter, Contents, Origin
from lora_analysis.base import BaseWeights, load_base
from lora_analysis.checkpoint import Checkpoint
from lora_analysis.checkpoint.hub import located
from lora_analysis.checkpoint.remote import shown
from lora_analysis.errors import AdapterFormatError, CheckpointError, UnsupportedAdapterError
from lora_analysis.formats import (
    cloneofsimo,
    diffusers,
    gguf,
    kohya,
    loralib,
    lycoris,
    mlx,
    peft,
    sam_lora,
    torchtune,
    unread,
)
from lora_analysis.formats import pattern as by_pattern
from lora_analysis.formats.files import opened
from lora_analysis.formats.options import ReadOptions, Split, parse_alpha, parse_heads, parse_split, refuse_others

FORMATS = (gguf, mlx, torchtune, lycoris, diffusers, kohya, peft, loralib, sam_lora, cloneofsimo, by_pattern)
"""Every format that is read, in the order of detection."""


def load_adapter(
    source: str | os.PathLike[str],
    *,
    format: str | None = None,
    alpha: float | None = None,
    base: BaseWeights | str | os.PathLike[str] | None = None,
    split: Split | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    name: str | None = None,
    initial: Adapter | str | os.PathLike[str] | None = None,
    heads: tuple[int, int] | None = None,
    pattern: str | None = None,
) -> Adapter:
    """A trained adapter, lazily, with every tensor of its file accounted for.

    Parameters
    ----------
    source : path, hub id or URL
        A directory with ``adapter_config.json`` and weights, or a file of tensors; the same in a repository of the
        Hugging Face hub (``org/name``), which is fetched into its cache, or at another URL, where safetensors are
        read by byte range.
    format : str, optional
        Read as this format (the ``NAME`` of one of ``FORMATS``) instead of detecting it. Its rules then hold, and an
        ``adapter_config.json`` that it does not know is left out, with a note.
    alpha : float, optional
        The lora_alpha of training, where the file does not hold it or is wrong. It wins over all that the file says,
        for every module: the scale is ``alpha / r``, r being that of the module's own factors. Where the file says
        rsLoRA (peft, the header of diffusers) it is ``alpha / sqrt(r)``; PEFT's AdaLoRA divides by the r that training
        began with; mlx has no alpha, and its multiplier s is ``alpha = s·r``; blocks that kohya's ``split_qkv`` saved
        as one have ``alpha / (blocks·r)``, as in the file. Whole matrices (kohya and lycoris: a LoKr of two, a full
        difference, a Control-LoRA) keep the scale 1, with a note. PEFT's VeRA has no alpha and refuses one.
    base : BaseWeights, path, hub id or URL, optional
        The base model, where the file alone leaves something open; with it DoRA is read as its true update.

        - kohya, lycoris: which modules their underscored names mean, and kernels of factors that are unfolded;
        - loralib: which weights are fused, embeddings or convolutions;
        - peft: the layout of experts, the inputs of VeRA, kernels of LoHa and LoKr;
        - mlx, torchtune, gguf: the names of modules in it, and which are embeddings;
        - sam_lora: what its blocks are called, of which there must be as many.

        diffusers needs it for DoRA alone; cloneofsimo and pattern do not look at it.
    split : str or sequence, optional
        loralib: which slots of a fused q,k,v weight a ``MergedLinear`` adapts: ``"q,v"``, or its ``enable_lora``,
        ``[True, False, True]``. peft: ``"q,k,v"`` cuts an ordinary LoRA on a fused weight into its three blocks.
    device : str or torch.device
        Where factors are put when they are read.
    revision : str, optional
        Branch, tag or commit of a repository of the hub.
    name : str, optional
        Which adapter: of several folders in a directory, or of several in one file (peft, diffusers).
    initial : Adapter or path, optional
        peft: the factors that training started from, where they were subtracted from the base (PiSSA, OLoRA and their
        like): the update is then s·(B·A - B0·A0).
    heads : (int, int), optional
        Numbers of query and of key-value heads. torchtune, gguf: turns the rows of q and k from interleaved to
        half-split rotary order, as Hugging Face models store them. peft: how ``split`` cuts where they differ.
    pattern : str, optional
        How tensors are called, for files that no format here describes (``formats.pattern``):
        ``"down=layers.{module}.a up=layers.{module}.b"``, with ``.T`` after a name for a factor stored transposed,
        ``alpha=`` for a tensor of alphas, and ``as=`` for what the base calls a module.

    Returns
    -------
    Adapter

    Raises
    ------
    AdapterFormatError
        If the file is missing, damaged, or breaks the rules of its format.
    UnsupportedAdapterError
        If it is of a format or kind that is recognised and not read, or an option has no meaning in its format.
    ValueError, TypeError
        If an option is none.

    Notes
    -----
    A scale that nothing states is unknown (``scale`` is NaN, ``scale_source`` is ``"unknown"``), not 1:
    figures that do not depend on it are given, the others ask for ``alpha``. Formats with a default of their own have
    it: alpha = r, a scale of 1, in kohya, lycoris, diffusers, sam_lora, cloneofsimo and gguf, alpha = 8 in a
    configuration of PEFT, a multiplier of 20 in one of MLX.
    """
    if pattern is not None and format not in (None, by_pattern.NAME):
        raise ValueError(f"pattern: expected format={by_pattern.NAME!r} beside it or none, got format={format!r}.")
    number, slots, counts = parse_alpha(alpha), parse_split(split), parse_heads(heads)
    format = by_pattern.NAME if pattern is not None else format
    formats = {module.NAME: module for module in FORMATS}
    if format is not None and format not in formats:
        raise ValueError(f"format: expected one of {', '.join(formats)}, got {format!r}.")
    try:
        place = located(source, revision)
        where = shown(place) if isinstance(place, str) else str(place)
        checkpoint, config, by_folder = opened(source, place, name)
    except CheckpointError as error:
        raise AdapterFormatError(str(error)) from error
    options = ReadOptions(
        where=where,
        alpha=number,
        base=base if base is None or isinstance(base, BaseWeights) else load_base(base),
        split=slots,
        device=torch.device(device),
        name=None if by_folder else name,
        # Nothing is taken off the initial factors themselves, whatever their own configuration says.
        initial=(
            initial
            if initial is None or isinstance(initial, Adapter)
            else load_adapter(initial, device=device, initial=Adapter({}, source="nothing"))
        ),
        heads=counts,
        pattern=pattern,
    )
    chosen = formats[format] if format else _detected(checkpoint, config, where)
    refuse_others(options, chosen.TAKES, chosen.NAME)
    contents: Contents = chosen.read(checkpoint, config, options)
    if not contents.modules:
        first = next(iter(checkpoint), None)
        raise AdapterFormatError(
            f"{where}: expected LoRA factors, found none among its {len(checkpoint)} tensors (read as "
            f"{chosen.NAME!r}), of which the first is {first!r}. Pass format= to read it as another."
        )
    if config and "config" not in chosen.TAKES:
        note = f"the adapter_config.json beside the file is not looked at: {chosen.NAME!r} has none."
        contents = replace(contents, notes=(*contents.notes, note))
    _require_floating(contents, checkpoint, where)
    # Base and initial factors as they were opened: their paths may be relative, too.
    arguments = {
        "format": format,
        "alpha": alpha,
        "base": options.base,
        "split": split,
        "device": device,
        "revision": revision,
        "name": name,
        "initial": options.initial,
        "heads": heads,
        "pattern": pattern,
    }
    return Adapter.from_contents(
        contents,
        source=where,
        format=chosen.NAME,
        config=config,
        metadata=checkpoint.metadata,
        checkpoint=checkpoint,
        # Another process may be in another folder.
        origin=Origin(_reopened, (place.absolute() if isinstance(place, Path) else source, arguments, where)),
    )


def _require_floating(contents: Contents, checkpoint: Checkpoint, where: str) -> None:
    for name, module in contents.modules.items():
        for tensor in module.tensors:
            if len(checkpoint.shape(tensor)) > 1 and not checkpoint.dtype(tensor).is_floating_point:
                raise AdapterFormatError(
                    f"{where}: {name!r}: expected floating-point factors, got {checkpoint.dtype(tensor)} in {tensor!r}."
                )


def _reopened(source: str | Path, arguments: dict[str, Any], where: str) -> Adapter:
    adapter = load_adapter(source, **arguments)
    adapter.source = where
    adapter._origin = Origin(_reopened, (source, arguments, where))
    return adapter


def _detected(checkpoint: Checkpoint, config: dict[str, Any], where: str) -> Any:
    if found := unread.recognised(checkpoint, config):
        raise UnsupportedAdapterError(
            f"{where}: holds {found}; it is not read. Read are: {', '.join(f.NAME for f in FORMATS)}."
        )
    for module in FORMATS:
        if module.matches(checkpoint, config):
            return module
    first = next(iter(checkpoint), None)
    raise AdapterFormatError(
        f"{where}: no known format matches its {len(checkpoint)} tensors (first: {first!r}). "
        f"Known: {', '.join(module.NAME for module in FORMATS)}."
    )

"""On-disk formats of adapters: one file each, with ``NAME``, ``matches``, ``read`` and, where we write, ``write``.

``FORMATS`` is the whole list, in the order of detection. What a file is, its content decides; ``format=``
overrides it. A format that is recognised but not read is named (``formats.unread``), never half read.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_analysis.adapter import Adapter, Contents, Origin
from lora_analysis.base import BaseWeights, load_base
from lora_analysis.checkpoint import Checkpoint, open_checkpoint, read_json
from lora_analysis.errors import AdapterFormatError, CheckpointError, UnsupportedAdapterError
from lora_analysis.formats import loralib, peft, unread
from lora_analysis.formats.options import ReadOptions, Split, parse_split

FORMATS = (peft, loralib)
"""Every format that is read, in the order of detection."""

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


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
    source : path
        A directory with ``adapter_config.json`` and weights, or a file of tensors.
    format : str, optional
        Read as this format (one of ``FORMATS``) instead of detecting it.
    alpha : float, optional
        The lora_alpha of training, where the file does not hold it or is wrong.
    base : BaseWeights or path, optional
        The base model, where the file alone leaves something open (which layers are fused).
    split : str or sequence, optional
        Which slots of a fused q,k,v weight a loralib ``MergedLinear`` adapts: ``"q,v"``, or its
        ``enable_lora``, ``[True, False, True]``.
    device : str or torch.device
        Where factors are put when they are read.
    revision : str, optional
        Reserved for hub sources, which are not read yet.
    name : str, optional
        Which adapter, where a directory or a file holds several.
    initial : Adapter or path, optional
        The factors training started from, where they were subtracted from the base (PiSSA, OLoRA and their like):
        the update is then s·(B·A - B0·A0).
    heads : (int, int), optional
        Numbers of query and of key-value heads, to turn the rows of q and k from interleaved to half-split rotary
        order, as Hugging Face models store them (torchtune, GGUF of llama architectures).
    pattern : str, optional
        How tensors are called, for ``format="pattern"``: ``"down=layers.{module}.a up=layers.{module}.b"``, with
        ``.T`` after a name for a factor stored transposed, and ``alpha=`` for a tensor of alphas.

    Returns
    -------
    Adapter

    Raises
    ------
    AdapterFormatError
        If the file is missing, damaged, or breaks the rules of its format.
    UnsupportedAdapterError
        If it is of a format or kind that is recognised and not read.

    Notes
    -----
    A scale that nothing states is unknown (``scale`` is NaN, ``scale_source`` is ``"unknown"``), not 1:
    figures that do not depend on it are given, the others ask for ``alpha``.
    """
    if revision is not None:
        raise ValueError("revision: expected None, hub sources are not read yet. Give a local path.")
    formats = {module.NAME: module for module in FORMATS}
    if format is not None and format not in formats:
        raise ValueError(f"format: expected one of {', '.join(formats)}, got {format!r}.")
    path = Path(source)
    _require_present(os.fspath(source), path)
    by_folder = name is not None and (path / name / _CONFIG).is_file()
    weights, config_file = _files(path / str(name) if by_folder else path)
    try:
        checkpoint = open_checkpoint(weights)
        config = read_json(config_file) if config_file else {}
    except CheckpointError as error:
        raise AdapterFormatError(str(error)) from error
    options = ReadOptions(
        where=str(path),
        alpha=alpha,
        base=base if base is None or isinstance(base, BaseWeights) else load_base(base),
        split=parse_split(split),
        device=torch.device(device),
        name=None if by_folder else name,
        initial=initial if initial is None or isinstance(initial, Adapter) else load_adapter(initial, device=device),
        heads=heads,
        pattern=pattern,
    )
    chosen = formats[format] if format else _detected(checkpoint, config, str(path))
    contents: Contents = chosen.read(checkpoint, config, options)
    if not contents.modules:
        raise AdapterFormatError(
            f"{path}: expected LoRA factors, found none among its {len(checkpoint)} tensors (read as {chosen.NAME!r})."
        )
    _require_floating(contents, checkpoint, str(path))
    # By the base's modules; blocks of one weight stay in the reader's order, q before k.
    ordered = sorted(contents.modules.items(), key=lambda item: _natural(item[1].target.tensor.removesuffix(".weight")))
    contents = replace(contents, modules=dict(ordered))
    arguments = {
        "format": format,
        "alpha": alpha,
        "base": base,
        "split": split,
        "device": device,
        "revision": revision,
        "name": name,
        "initial": initial,
        "heads": heads,
        "pattern": pattern,
    }
    return Adapter.from_contents(
        contents,
        source=str(path),
        format=chosen.NAME,
        config=config,
        metadata=checkpoint.metadata,
        origin=Origin(_reopened, (str(path), arguments)),
    )


def save_adapter(adapter: Adapter, directory: str | os.PathLike[str], *, format: str = "peft") -> Path:
    """Write an adapter; what the format cannot hold exactly is refused.

    Only updates are written: biases and full tensors that ``adapter.unused`` lists are not, with a warning.

    Parameters
    ----------
    adapter : Adapter
        Low-rank updates of whole matrices with known scales.
    directory : path
        Made if absent. Files are written under temporary names and moved into place.
    format : str
        ``"peft"``.

    Returns
    -------
    Path
        The directory.

    Raises
    ------
    UnsupportedAdapterError
        If an update is no product of two factors, or acts on a slice of a weight.
    UndefinedUpdateError
        If the scale of a module is unknown.
    """
    if format != peft.NAME:
        raise ValueError(f"format: expected 'peft', the only one written so far, got {format!r}.")
    return peft.write(adapter, Path(directory))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10.

    Numbers are compared by length, then as text: names of a file may hold more digits than ``int`` accepts.
    """
    key = []
    for i, part in enumerate(re.split(r"([0-9]+)", name)):
        digits = part.lstrip("0")
        key.append((len(digits), digits) if i % 2 else (-1, part))
    return key


def _require_floating(contents: Contents, checkpoint: Checkpoint, where: str) -> None:
    for name, module in contents.modules.items():
        for tensor in module.tensors:
            if len(checkpoint.shape(tensor)) > 1 and not checkpoint.dtype(tensor).is_floating_point:
                raise AdapterFormatError(
                    f"{where}: {name!r}: expected floating-point factors, got {checkpoint.dtype(tensor)} in {tensor!r}."
                )


def _reopened(source: str, arguments: dict[str, Any]) -> Adapter:
    return load_adapter(source, **arguments)


def _require_present(source: str, path: Path) -> None:
    try:
        present = path.exists()
    except OSError:  # a name too long to be one, as signed URLs are
        present = False
    if not present:
        remote = re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|[\w-][\w.-]*/[\w.-]+\Z", source)
        hint = "; hub ids and URLs are not read yet" if remote else ""
        raise AdapterFormatError(f"{source}: no such file or directory{hint}.")


def _files(path: Path) -> tuple[Path, Path | None]:
    """The file of tensors and, if there is one, the configuration beside it."""
    if path.is_file():
        config = path.parent / _CONFIG
        return path, config if path.name in _WEIGHTS and config.is_file() else None
    if not path.is_dir():
        raise AdapterFormatError(f"{path}: expected a file or a directory.")
    config = path / _CONFIG
    for weights in _WEIGHTS:
        if (path / weights).is_file():
            return path / weights, config if config.is_file() else None
    inner = sorted(entry.parent.name for entry in path.glob(f"*/{_CONFIG}"))
    if inner:
        raise AdapterFormatError(
            f"{path}: expected one adapter, found a folder of {len(inner)} ({', '.join(inner[:4])}). "
            "Pass one of them, or its name=."
        )
    files = sorted(file for file in path.iterdir() if file.suffix in {".safetensors", ".bin", ".pt", ".pth", ".npz"})
    if not files:
        raise AdapterFormatError(f"{path}: expected {' or '.join(_WEIGHTS)}, or one file of tensors, found none.")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:3]) + (", …" if len(files) > 3 else "")
        raise AdapterFormatError(
            f"{path}: expected one file of tensors, found {len(files)} ({names}). Pass one of them."
        )
    return files[0], config if config.is_file() else None


def _detected(checkpoint: Checkpoint, config: dict[str, Any], where: str) -> Any:
    if found := unread.recognised(checkpoint, config):
        raise UnsupportedAdapterError(
            f"{where}: holds {found}; it is not read yet. Read are: {', '.join(f.NAME for f in FORMATS)}."
        )
    for module in FORMATS:
        if module.matches(checkpoint, config):
            return module
    first = next(iter(checkpoint), None)
    raise AdapterFormatError(
        f"{where}: no known format matches its {len(checkpoint)} tensors (first: {first!r}). "
        f"Known: {', '.join(module.NAME for module in FORMATS)}."
    )

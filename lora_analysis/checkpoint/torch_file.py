"""A file of torch's own, opened without executing what it holds."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora_analysis.checkpoint.diagnosis import what_is
from lora_analysis.checkpoint.protocol import StateDict, oddity
from lora_analysis.errors import CheckpointError

_NESTED_KEYS = ("state_dict", "model_state_dict", "model", "module")


LIST = {"container": "list"}
"""The metadata of a file that is a bare list of tensors, which are called by their positions in it."""


def load_torch(path: Path) -> StateDict:
    """The tensors of a torch file, mapped into memory where it is a zip archive.

    A file without names, a bare list of tensors as cloneofsimo's LoRA writes, gives ``"0"``, ``"1"``, ….
    """
    try:
        with warnings.catch_warnings():
            # torch warns about pickle protocols that its restricted reader then refuses or reads anyway, and about
            # its own use of deprecated storages for the quantised tensors that are refused below.
            for message in ("Detected pickle protocol", "TypedStorage is deprecated", "torch.quantize_per_tensor"):
                warnings.filterwarnings("ignore", message, UserWarning)
            loaded = _torch_load(path)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise CheckpointError(f"{path}: expected a torch file, got {what_is(path)}. Fetch it again.") from error
        raise CheckpointError(
            f"{path}: expected a pickle of tensors alone, got one that asks for {_refused_global(error)}; "
            "nothing was executed. Convert it to safetensors where you trust it."
        ) from error
    except MemoryError as error:
        # Its pickle may ask for any number of bytes, whatever its size.
        raise CheckpointError(
            f"{path}: expected a torch file that fits into memory, got one of {path.stat().st_size:,} bytes that asks "
            "for more than there is. Fetch it again, or convert it to safetensors where you trust it."
        ) from error
    except Exception as error:
        # What torch raises on a damaged archive depends on where the damage lies (AssertionError,
        # struct.error and BadZipFile among others), and none of it is about this program.
        raise CheckpointError(f"{path}: expected a torch file, got {what_is(path)}. Fetch it again.") from error
    if isinstance(loaded, list) and loaded and all(isinstance(value, Tensor) for value in loaded):
        numbered = {str(position): tensor for position, tensor in enumerate(loaded)}
        _require_dense(path, numbered)
        return StateDict(numbered, LIST)
    return StateDict(_named_tensors(path, loaded))


def _torch_load(path: Path) -> object:
    if zipfile.is_zipfile(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # Files older than torch 1.6 are one pickle and cannot be mapped.
    return torch.load(path, map_location="cpu", weights_only=True)


def _named_tensors(path: Path, loaded: object, levels: int = 4) -> dict[str, Tensor]:
    """The tensors of a state dict, which may lie some levels deep (a pickled dict can hold itself)."""
    if isinstance(loaded, Mapping):
        tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
        # Trainers keep scores and counters as tensors beside the state dict; those have no dimensions.
        if any(tensor.ndim for tensor in tensors.values()) and all(isinstance(name, str) for name in tensors):
            _require_dense(path, tensors)
            return tensors
        for key in _NESTED_KEYS:
            if levels > 0 and isinstance(loaded.get(key), Mapping):
                return _named_tensors(path, loaded[key], levels - 1)
        if all(isinstance(name, str) for name in tensors) and (tensors or not loaded):
            _require_dense(path, tensors)
            return tensors
    found = f"a {type(loaded).__name__}" + (" without named tensors" if isinstance(loaded, Mapping) else "")
    raise CheckpointError(f"{path}: expected a mapping of names to tensors, got {found}.")


def _require_dense(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if kind := oddity(tensor):
            raise CheckpointError(
                f"{path}: {name!r}: expected dense (strided) tensors, got one {kind}. Save it with ordinary tensors."
            )


def looks_like_torch(path: Path) -> bool:
    """Whether a file is not safetensors under a torch name."""
    with path.open("rb") as file:
        head = file.read(16)
    # A safetensors file opens with the length of its header and a brace.
    return not (len(head) > 8 and head[8:9] == b"{")


def _refused_global(error: Exception) -> str:
    """The name that a refused pickle asked for, out of torch's long message."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return repr(found[1]) if found else "other code"

"""Files of named tensors, opened lazily: safetensors or torch's own, one file or many behind an index.

Conventions
-----------
A ``Checkpoint`` is a mapping from names to tensors that reads a tensor when it is asked for and knows
every shape and dtype beforehand. Files are untrusted: headers are bounded and checked before anything is
allocated, pickles are opened with ``weights_only=True``, and the shards of an index stay in its folder.

Values
------
``Checkpoint`` (the protocol), ``SafetensorsFile``, ``StateDict``, ``Shards``; ``open_checkpoint`` chooses.

References
----------
The safetensors format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_analysis.errors import CheckpointError

_TORCH_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
_NESTED_KEYS = ("state_dict", "model_state_dict", "model", "module")
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class Checkpoint(Protocol):
    """A lazy mapping from tensor names to tensors."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """The header's own strings, as found."""

    def __iter__(self) -> Iterator[str]: ...

    def __len__(self) -> int: ...

    def __contains__(self, name: object) -> bool: ...

    def __getitem__(self, name: str) -> Tensor: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, without reading it."""


def nbytes(checkpoint: Checkpoint, name: str) -> int:
    """Size of a tensor in bytes, without reading it."""
    count = 1
    for length in checkpoint.shape(name):
        count *= length
    return count * checkpoint.dtype(name).itemsize


class SafetensorsFile:
    """A lazy checkpoint over one safetensors file.

    Raises
    ------
    CheckpointError
        If the file is truncated, is not safetensors, or its header lies about its tensors.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._handle = cast(Any, safe_open(self.path, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.path}: expected a safetensors file, got {_what_is(self.path)} "
                f"({_one_line(error)}). Fetch or copy it again."
            ) from error
        self._names = tuple(self._handle.keys())
        self._known = frozenset(self._names)

    def __reduce__(self) -> tuple[Any, ...]:
        return SafetensorsFile, (self.path,)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The ``__metadata__`` of the header."""
        return self._handle.metadata() or {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> Tensor:
        self._require(name)
        tensor: Tensor = self._handle.get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        self._require(name)
        return tuple(self._handle.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header."""
        self._require(name)
        code = self._handle.get_slice(name).get_dtype()
        if code not in _DTYPES:
            raise CheckpointError(f"{self.path}: {name!r}: expected a dtype torch knows, got {code!r}.")
        return _DTYPES[code]

    def _require(self, name: str) -> None:
        if name not in self._known:
            raise KeyError(name)


class StateDict:
    """A checkpoint that is already in memory: a state dict, or a torch file mapped into memory."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        self._tensors = dict(tensors)
        self.metadata: Mapping[str, str] = dict(metadata or {})

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._tensors[name].dtype


class Shards:
    """A checkpoint spread over files by an index, each opened when one of its tensors is asked for.

    Parameters
    ----------
    index : path
        The ``*.index.json`` with a ``weight_map`` from tensor names to file names.

    Raises
    ------
    CheckpointError
        If the index is damaged, or names a file that is absent or outside its folder.
    """

    def __init__(self, index: str | os.PathLike[str]) -> None:
        self.index = Path(index)
        content = read_json(self.index)
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise CheckpointError(f"{self.index}: expected a 'weight_map' of tensor names to file names.")
        self._files: dict[str, str] = weight_map
        for name in sorted(set(weight_map.values())):
            _require_confined(self.index, name)
            if not _is_file(self.index.parent / name):
                raise CheckpointError(f"{self.index}: expected the shard {name!r} beside it, found none.")
        self._open: dict[str, Checkpoint] = {}
        self.metadata: Mapping[str, str] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards, (self.index,)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        return self._shard(name)[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its shard's header."""
        return self._shard(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from its shard's header."""
        return self._shard(name).dtype(name)

    def _shard(self, name: str) -> Checkpoint:
        file = self._files[name]
        if file not in self._open:
            self._open[file] = open_checkpoint(self.index.parent / file)
        shard = self._open[file]
        if name not in shard:
            raise CheckpointError(f"{self.index}: expected {name!r} in {file!r}, it is not there.")
        return shard


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """A lazy checkpoint over a file: safetensors, torch (``.bin .pt .pth .ckpt``), or an index of shards.

    What a file is, its content decides; a safetensors file under a torch name still opens.

    Parameters
    ----------
    path : str or path
        A file.

    Returns
    -------
    Checkpoint

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, foreign, or a pickle that holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    if path.name.endswith(".index.json"):
        return Shards(path)
    if path.suffix in _TORCH_SUFFIXES and _looks_like_torch(path):
        return StateDict(_load_torch(path))
    return SafetensorsFile(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises
    ------
    CheckpointError
        If it is missing, damaged, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, got {_what_is(path)} ({_one_line(error)}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}.")
    return content


def _load_torch(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            # torch warns about pickle protocols that its restricted reader then refuses or reads anyway, and about
            # its own use of deprecated storages for the quantised tensors that are refused below.
            for message in ("Detected pickle protocol", "TypedStorage is deprecated", "torch.quantize_per_tensor"):
                warnings.filterwarnings("ignore", message, UserWarning)
            loaded = _torch_load(path)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise CheckpointError(f"{path}: expected a torch file, got {_what_is(path)}. Fetch it again.") from error
        raise CheckpointError(
            f"{path}: expected a pickle of tensors alone, got one that asks for {_refused_global(error)}; "
            "nothing was executed. Convert it to safetensors where you trust it."
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        # What torch raises on a damaged archive depends on where the damage lies (AssertionError,
        # struct.error and BadZipFile among others), and none of it is about this program.
        raise CheckpointError(f"{path}: expected a torch file, got {_what_is(path)}. Fetch it again.") from error
    return _named_tensors(path, loaded)


def _torch_load(path: Path) -> object:
    if zipfile.is_zipfile(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # Files older than torch 1.6 are one pickle and cannot be mapped.
    return torch.load(path, map_location="cpu", weights_only=True)


def _named_tensors(path: Path, loaded: object, levels: int = 4) -> dict[str, Tensor]:
    """The tensors of a state dict, which may lie some levels deep (a pickled dict can hold itself)."""
    if isinstance(loaded, list) and loaded and all(isinstance(value, Tensor) for value in loaded):
        raise CheckpointError(
            f"{path}: expected a mapping of names to tensors, got a list: a bare list of tensors, as cloneofsimo's "
            "LoRA writes, which is not read yet."
        )
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
        odd = {
            "nested": tensor.is_nested,
            "quantised": tensor.is_quantized,
            "without data, on device 'meta'": tensor.is_meta,
            f"of layout {tensor.layout}": tensor.layout is not torch.strided,
        }
        if kind := next((kind for kind, applies in odd.items() if applies), None):
            raise CheckpointError(
                f"{path}: {name!r}: expected dense (strided) tensors, got one {kind}. Save it with ordinary tensors."
            )


def _looks_like_torch(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(16)
    # A safetensors file opens with the length of its header and a brace.
    return not (len(head) > 8 and head[8:9] == b"{")


def _what_is(path: Path) -> str:
    """A guess at what a file is instead, for error messages."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (run 'git lfs pull')"
    if head.lstrip()[:1] == b"<":
        return "an HTML or XML page"
    if head[:1] == b"\x80":
        return "a pickle that is damaged or holds more than tensors (nothing was executed)"
    if head.startswith(b"PK"):
        if path.suffix not in _TORCH_SUFFIXES:
            return "a zip archive (a torch file?)"
        return "a zip archive that is damaged or holds more than tensors (nothing was executed)"
    if head.startswith(b"GGUF"):
        return "a GGUF file"
    return f"{path.stat().st_size:,} bytes that are damaged or something else"


def _refused_global(error: Exception) -> str:
    """The name that a refused pickle asked for, out of torch's long message."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return repr(found[1]) if found else "other code"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long to be one
        return False


def _require_confined(index: Path, name: str) -> None:
    # Lexical, because hub caches hold shards as links that point elsewhere on purpose.
    parts = PurePosixPath(name).parts + PureWindowsPath(name).parts
    if not name or ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        raise CheckpointError(f"{index}: expected shards inside its folder, got {name!r}.")
    if name.endswith(".index.json"):
        raise CheckpointError(f"{index}: expected shards of tensors, got another index, {name!r}.")

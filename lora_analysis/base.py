"""Base models as lazy mappings from targets to matrices, always oriented (d_out, d_in).

Conventions
-----------
One matrix at a time is read, never the whole model. A matrix keeps its stored dtype; a weight stored as
(d_in, d_out), like those of transformers' ``Conv1D``, comes back as a transposed view.

How a weight is stored is decided by, in order: the shape of the update, where only one orientation fits;
the base itself, for a square weight (the module's type in a live model; in a file, a bias that proves
another weight of the same name to be transposed, as GPT-2's ``mlp.c_proj`` proves for the square
``attn.c_proj``); what the adapter's configuration says (``fan_in_fan_out``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_analysis.adapter import Target
from lora_analysis.checkpoint import Checkpoint, StateDict, open_checkpoint
from lora_analysis.errors import BaseWeightsError, CheckpointError

_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
)
_WRAPPERS = {"_fsdp_wrapped_module", "_orig_mod", "base_layer"}
_PREFIXES = ("module.", "base_model.model.")
_MAX_DROPPED = 2
_SCALES = ("_scale_inv", "_scale", ".scale", "_scales")
"""What tensors of scales beside a quantised weight are called."""


class BaseWeights:
    """The matrices of a base model, read one at a time.

    Made by ``load_base``. It pickles as the path to open again, or with its tensors when they were given
    in memory.

    Attributes
    ----------
    source : str
        Path, or a name for what was given in memory.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        source: str,
        origin: object,
        device: str | torch.device = "cpu",
        stored: Mapping[str, bool] | None = None,
    ) -> None:
        self.source = source
        self._checkpoint = checkpoint
        self._origin = origin
        self._device = torch.device(device)
        self._names = {_plain_name(name): name for name in checkpoint}
        self._stored = stored
        self._proven: dict[str, bool] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_base, (self._origin, self._device)

    def __repr__(self) -> str:
        return f"BaseWeights({self.source!r}, {len(self)} tensors)"

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, tensor: object) -> bool:
        return tensor in self._names

    def find(self, tensor: str) -> str:
        """The base's own name of one tensor; see ``find_all``."""
        return self.find_all([tensor])[tensor]

    def find_all(self, tensors: Iterable[str]) -> dict[str, str]:
        """The base's own names of the tensors an adapter updates, whose common prefix may differ.

        Exact names win. Otherwise one change of prefix must serve all of them: up to two leading components
        that they share are dropped (``transformer.h.0…`` against a file saved from the bare model), or one
        prefix is put before all. So no two tensors of an adapter end up on one of the base.

        Parameters
        ----------
        tensors : iterable of str
            All the tensors of one adapter.

        Returns
        -------
        dict of str to str
            Adapter's name to base's name.

        Raises
        ------
        BaseWeightsError
            If no change of prefix fits, or several do.
        """
        wanted = list(dict.fromkeys(tensors))
        if all(tensor in self._names for tensor in wanted):  # also where there are none
            return {tensor: tensor for tensor in wanted}
        parts = [tensor.split(".") for tensor in wanted]
        for dropped in range(1, min(_MAX_DROPPED, min(map(len, parts)) - 2) + 1):
            if len({tuple(components[:dropped]) for components in parts}) == 1:
                shorter = {tensor: ".".join(c[dropped:]) for tensor, c in zip(wanted, parts, strict=True)}
                if all(name in self._names for name in shorter.values()):
                    return shorter
        # Every name of the base that ends in the first one proposes a prefix.
        prefixes = [name.removesuffix(wanted[0]) for name in self._names if name.endswith(f".{wanted[0]}")]
        fitting = [prefix for prefix in prefixes if all(prefix + tensor in self._names for tensor in wanted)]
        if len(fitting) == 1:
            return {tensor: fitting[0] + tensor for tensor in wanted}
        if fitting:
            first, second = (prefix + wanted[0] for prefix in fitting[:2])
            raise BaseWeightsError(
                f"{self.source}: {wanted[0]!r} could be any of {len(fitting)} tensors ({first!r}, {second!r}, …). "
                "Give the component's own weights as the base."
            )
        missing = next(tensor for tensor in wanted if tensor not in self._names)
        raise BaseWeightsError(
            f"{self.source}: expected the tensor {missing!r} that the adapter updates, found none of that name among "
            f"{len(self)} (first: {next(iter(self._names), 'nothing')!r}), nor all of the adapter's under another "
            "prefix. Is this the model the adapter was trained on?"
        )

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Shape of a tensor as stored, without reading it."""
        return self._checkpoint.shape(self._names[self.find(tensor)])

    def matrix(self, target: Target, shape: tuple[int, int] | None = None) -> Tensor:
        """The base matrix an update acts on.

        Parameters
        ----------
        target : Target
            From ``adapter.targets[module]``.
        shape : (int, int), optional
            Shape of the update, which the matrix must have.

        Returns
        -------
        Tensor, shape (d_out, d_in)
            In the stored dtype; convolution kernels unfolded to (out, in·k·k).

        Raises
        ------
        BaseWeightsError
            If the base lacks it, its shape does not fit, or it is stored quantised.
        """
        name = self.find(target.tensor)
        weight = self._checkpoint[self._names[name]].detach().to(self._device)
        where = f"{self.source}: {name!r}"
        scale = next((self._names[f"{name}{end}"] for end in _SCALES if f"{name}{end}" in self._names), None)
        if not weight.is_floating_point() or weight.dtype.itemsize < 2 or scale is not None:
            beside = f" and {scale!r} beside it" if scale else ""
            raise BaseWeightsError(
                f"{where}: expected floating-point weights of two bytes or more, got {weight.dtype}{beside}: a "
                "quantised base. Give the original weights."
            )
        if target.expert is not None:
            if weight.ndim != 3 or not 0 <= target.expert < weight.shape[0]:
                raise BaseWeightsError(
                    f"{where}: expected a stack of experts with number {target.expert}, got {tuple(weight.shape)}."
                )
            weight = weight[target.expert]
        if weight.ndim < 2:
            raise BaseWeightsError(f"{where}: expected a matrix, got shape {tuple(weight.shape)}.")
        weight = weight.flatten(1)
        transposed = self._transposed(name, target, (weight.shape[0], weight.shape[1]), shape)
        weight = weight.mT if transposed else weight
        rows, columns = (slice(*(bounds or (None,))) for bounds in (target.rows, target.columns))
        return weight[rows, columns]

    def _transposed(self, name: str, target: Target, stored: tuple[int, int], shape: tuple[int, int] | None) -> bool:
        fitting = [flip for flip in (False, True) if _fits(target, stored[::-1] if flip else stored, shape)]
        if not fitting:
            wanted = "x".join(map(str, shape)) if shape else "the target's slice"
            part = "" if target.rows is None else f" in rows {target.rows[0]}:{target.rows[1]}"
            raise BaseWeightsError(
                f"{self.source}: {name!r}: expected {wanted}{part}, got {stored[0]}x{stored[1]}. "
                "Is this the model the adapter was trained on?"
            )
        if len(fitting) == 1:
            return fitting[0]
        if self._stored is not None and name in self._stored:
            return self._stored[name]
        return target.transposed or self._proven_transposed(name)

    def _proven_transposed(self, name: str) -> bool:
        """Whether a bias proves that weights of this last name are stored as (d_in, d_out)."""
        family = ".".join(name.split(".")[-2:])
        if family not in self._proven:
            self._proven[family] = any(
                self._bias_runs_along_columns(other)
                for other in self._names
                if other.endswith(f".{family}") and other.endswith(".weight")
            )
        return self._proven[family]

    def _bias_runs_along_columns(self, name: str) -> bool:
        bias = name.removesuffix("weight") + "bias"
        if bias not in self._names:
            return False
        shape = self._checkpoint.shape(self._names[name])
        length = self._checkpoint.shape(self._names[bias])
        return len(shape) == 2 and shape[0] != shape[1] and length == shape[1:]


def load_base(
    source: str | os.PathLike[str] | nn.Module | Mapping[str, Tensor],
    *,
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> BaseWeights:
    """The weights of a base model, lazily.

    Parameters
    ----------
    source : path, nn.Module or mapping
        A ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file; an ``*.index.json`` of shards; a directory
        with one of these; a live model, also one that carries LoRA layers; or a state dict.
    device : str or torch.device
        Where matrices are put.
    revision : str, optional
        Reserved for hub sources, which are not read yet.

    Returns
    -------
    BaseWeights

    Raises
    ------
    BaseWeightsError
        If there are no weights at ``source`` or they cannot be read.

    Examples
    --------
    >>> base = load_base({"lin.weight": torch.ones(2, 3)})
    >>> base.matrix(Target("lin.weight")).shape
    torch.Size([2, 3])
    """
    if revision is not None:
        raise ValueError("revision: expected None, hub sources are not read yet. Give a local path.")
    return _load_base(source, torch.device(device))


def _load_base(source: Any, device: torch.device) -> BaseWeights:
    if isinstance(source, nn.Module):
        if merged := [name for name, module in source.named_modules() if _is_merged(module)]:
            raise BaseWeightsError(
                f"{type(source).__name__}: expected the base's weights, got a model with merged updates (first: "
                f"{merged[0]!r}). Unmerge it; loralib merges in eval(), so call train() first."
            )
        return BaseWeights(
            StateDict(source.state_dict()),
            source=type(source).__name__,
            origin=source,
            device=device,
            stored=_stored_transposed(source),
        )
    if isinstance(source, Mapping):
        return BaseWeights(StateDict(source), source="state dict", origin=source, device=device)
    path = Path(source)
    try:
        checkpoint = open_checkpoint(_weights_file(path))
    except CheckpointError as error:
        raise BaseWeightsError(str(error)) from error
    return BaseWeights(checkpoint, source=str(path), origin=path, device=device)


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise BaseWeightsError(f"{path}: no such file or directory.")
    for name in _FILES:
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise BaseWeightsError(
            f"{path}: expected model weights ({', '.join(_FILES[:4])}, or a single .safetensors file), "
            f"found {len(files) or 'none'}."
        )
    return files[0]


def _plain_name(name: str) -> str:
    # Wrappers first: compile may lie round DDP and PEFT, and would hide their prefixes.
    name = ".".join(component for component in name.split(".") if component not in _WRAPPERS)
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _is_merged(module: nn.Module) -> bool:
    """Whether a LoRA layer, ours or loralib's or PEFT's, has folded its update into its weight."""
    return hasattr(module, "lora_A") and bool(getattr(module, "merged", False))


def _stored_transposed(model: nn.Module) -> dict[str, bool]:
    """How a live model stores its weights, by the types of its modules."""
    return {
        # transformers' Conv1D is recognised by name, so that transformers need not be imported; a LoRA
        # layer that holds its weight itself says so by loralib's flag.
        _plain_name(f"{name}.weight"): type(module).__name__ == "Conv1D" or getattr(module, "fan_in_fan_out", False)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
    }


def _fits(target: Target, whole: tuple[int, int], shape: tuple[int, int] | None) -> bool:
    for axis, bounds in enumerate((target.rows, target.columns)):
        if bounds is not None and not 0 <= bounds[0] <= bounds[1] <= whole[axis]:
            return False
        length = whole[axis] if bounds is None else bounds[1] - bounds[0]
        if shape is not None and shape[axis] != length:
            return False
    return True

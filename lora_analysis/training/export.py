"""Checkpoints for the libraries that define LoRA: loralib's state dict, and PEFT's directory with all that trained.

``extract`` and ``save_adapter`` are about updates: biases and modules that trained in full beside the factors are no
part of them. What is written here gives the library the same model, and comes back as the same.

Values
------
``lora_state_dict``, ``save_peft``, ``load_peft``.

References
----------
``lora_state_dict`` and ``ConvLoRA`` of loralib (microsoft/LoRA); PEFT's ``get_peft_model_state_dict``: biases of
adapted layers are ``<module>.base_layer.bias``, other biases and ``modules_to_save`` have the base's own names.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_analysis.adapter import Adapter
from lora_analysis.base import load_base
from lora_analysis.errors import AdapterFormatError, BaseWeightsError, UnsupportedAdapterError
from lora_analysis.formats import load_adapter
from lora_analysis.formats.files import WEIGHTS
from lora_analysis.formats.peft.names import FACTOR, MAGNITUDE, module_name
from lora_analysis.formats.saving import CONFIGURATION, draft, require_destination, safetensors_writer
from lora_analysis.formats.writers import WRITERS, save_adapter
from lora_analysis.training.attach import attach
from lora_analysis.training.extract import extract
from lora_analysis.training.factors import Beside, LoraFactors
from lora_analysis.training.inject import Bias
from lora_analysis.training.kinds import loaded
from lora_analysis.training.layers import LoraLayer, LoraParameter, Site, sites
from lora_analysis.training.merging import parametrized
from lora_analysis.training.switching import activate, adapters, chosen_adapter, trained_in_full

_PREFIX = "base_model.model."
_TENSORS = "adapter_model.safetensors"


def lora_state_dict(model: nn.Module, *, bias: Bias = "none", name: str | None = None) -> dict[str, Tensor]:
    """The factors of an adapter as ``loralib.lora_state_dict`` gives them, for ``load_state_dict(…, strict=False)``.

    ``<module>.lora_A`` (r, d_in) and ``<module>.lora_B`` (d_out, r); of blocks of a fused weight, those of a
    ``MergedLinear`` with these slots enabled. loralib keeps alpha out of its files: a layer of it, and
    ``load_adapter``, must be given ``factors.scale * r`` again (of its convolutions with their r, ours divided by k).

    Parameters
    ----------
    model : Module
    bias : {"none", "lora_only", "all"}
        As loralib's: biases of adapted layers, or every tensor with ``bias`` in its name, whether or not they trained.
    name : str, optional
        Which adapter, in a model with several.

    Returns
    -------
    dict of str to Tensor
        A convolution comes under the name of its weight's module, or of the loralib ``ConvLoRA`` that holds it.

    Raises
    ------
    ValueError
        If the model has no such adapter, or ``bias`` is none of these.
    UnsupportedAdapterError
        If loralib has no layer that does the same: DoRA, PiSSA, experts, packed projections, unequal blocks, and
        convolutions but those of loralib's own view or of a kernel of 1 without groups.

    Examples
    --------
    >>> from lora_analysis.training import inject
    >>> model = nn.Sequential(nn.Linear(4, 6))
    >>> inject(model, ["0"], slots={"0": "q,v"}, r=1)
    ['0']
    >>> {name: tuple(tensor.shape) for name, tensor in lora_state_dict(model, bias="lora_only").items()}
    {'0.lora_A': (2, 4), '0.lora_B': (4, 1), '0.bias': (6,)}
    """
    if bias not in get_args(Bias):
        raise ValueError(f"bias: expected one of {get_args(Bias)}, got {bias!r}.")
    chosen = chosen_adapter(model, name)
    state = _plain_state(model)
    found: dict[str, Tensor] = {}
    for where, site in sites(model).items():
        if chosen not in site.adapters:
            continue
        factors = site.adapters.named()[chosen]
        stem = _loralib_stem(model, where, site, factors)
        found |= {f"{stem}.lora_A": factors.lora_A, f"{stem}.lora_B": factors.lora_B}
        if bias == "lora_only" and f"{stem}.bias" in state:
            found[f"{stem}.bias"] = state[f"{stem}.bias"]
    if bias == "all":
        found |= {key: tensor for key, tensor in state.items() if "bias" in key}
    return {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in found.items()}


def save_peft(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    base_model_name_or_path: str | None = None,
) -> Path:
    """Write a PEFT directory with everything that trained: factors, magnitudes, biases and ``modules_to_save``.

    ``peft.PeftModel.from_pretrained(base, directory)`` is then the same model, and so is what ``load_peft`` makes of
    the base. What trains in full is what ``inject`` was told, also if it was frozen since; of anything else that takes
    gradients there is a warning.

    Parameters
    ----------
    model : Module
    directory : path
        Made if absent; files are moved into place when they are whole.
    name : str, optional
        Which adapter, in a model with several.
    base_model_name_or_path : str, optional
        For the configuration. By default what the model's own ``config`` says, where it has one.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        If the model has no such adapter, or something else is where it is to be written.
    UnsupportedAdapterError
        If an update is on a parameter and not on a layer, or a name would mean other modules in PEFT as well.
    """
    path, files = Path(directory), WRITERS["peft"].files
    require_destination(path, files, WEIGHTS)
    chosen = chosen_adapter(model, name)
    adapted = {where: site for where, site in sites(model).items() if chosen in site.adapters}
    if stray := next((where for where, site in adapted.items() if isinstance(site, LoraParameter)), None):
        raise UnsupportedAdapterError(
            f"{stray!r}: expected updates of layers, got one of a parameter, which PEFT's files name otherwise or not "
            "at all. merge_and_unload the model and save its state dict, or adapt the layers."
        )
    beside = next(iter(adapted.values())).adapters.named()[chosen].beside
    _require_unmistakable(model, beside.modules)
    state = _plain_state(model)
    full = {key: state[key] for key in state if any(key.startswith(f"{module}.") for module in beside.modules)}
    for key, parameter in trained_in_full(model, chosen).items():
        owner, _, attribute = key.rpartition(".")
        if key not in full:
            full[f"{owner}.base_layer.{attribute}" if owner in adapted else key] = parameter
    known = {id(parameter) for other in adapters(model) for parameter in trained_in_full(model, other).values()}
    factors = {id(parameter) for site in sites(model).values() for parameter in site.adapters.parameters()}
    if left := [key for key, p in model.named_parameters() if p.requires_grad and id(p) not in known | factors]:
        warnings.warn(
            f"{len(left)} parameters that take gradients are not written (first: {left[0]!r}): no adapter was told of "
            "them by bias= or modules_to_save=.",
            stacklevel=2,
        )
    own_name = getattr(getattr(model, "config", None), "name_or_path", None) or None
    fields = {
        "bias": beside.bias,
        "modules_to_save": list(beside.modules) or None,
        "base_model_name_or_path": base_model_name_or_path or own_name,
    }
    with draft(path, files) as first:
        save_adapter(extract(model, name=chosen, dora="factors"), first, base=load_base(state))
        tensors = load_file(first / _TENSORS) | {f"{_PREFIX}{key}": tensor for key, tensor in full.items()}
        safetensors_writer(tensors, {"format": "pt"})(first / _TENSORS)
        config = json.loads((first / CONFIGURATION).read_text(encoding="utf-8")) | fields
        (first / CONFIGURATION).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def load_peft(
    model: nn.Module, source: str | os.PathLike[str], *, name: str = "default", dropout: float = 0.0
) -> list[str]:
    """Put all of a PEFT LoRA adapter onto a model: ``attach``, and what trained in full beside the factors.

    Biases and modules take the place of the model's own, of which no second copy is kept: ``activate`` and ``remove``
    do not bring those back. All of it goes on training.

    Parameters
    ----------
    model : Module
    source : path, hub id or URL
        As ``load_adapter`` takes it.
    name : str
        What to call the adapter in the model.
    dropout : float
        On the input of A while training, in [0, 1).

    Returns
    -------
    list of str
        Names of the adapted weights.

    Raises
    ------
    AdapterFormatError
        If it is no PEFT adapter.
    BaseWeightsError
        If the model lacks a module or tensor, or a shape does not fit.
    UnsupportedAdapterError, UndefinedUpdateError, ValueError
        As ``attach``. The model is always left as it was.
    """
    adapter = load_adapter(source, format="peft")
    bias = adapter.config.get("bias") or "none"
    if bias not in get_args(Bias):
        raise AdapterFormatError(f"{adapter.source}: bias: expected one of {get_args(Bias)}, got {bias!r}.")
    state, full = _plain_state(model), _full_tensors(adapter)
    for key, tensor in full.items():
        shape = tuple(state[key].shape) if key in state else None
        if shape != tuple(tensor.shape):
            raise BaseWeightsError(
                f"{adapter.source}: expected a tensor {key!r} of {tuple(tensor.shape)} in {type(model).__name__}, "
                f"got {shape or 'none'}. Load it onto the base it was trained on."
            )
    # PEFT's rule: the end of a module's name.
    wanted = tuple(adapter.config.get("modules_to_save") or ())
    owners = {key.rpartition(".")[0] for key in full}
    modules = tuple(
        module
        for module, _ in model.named_modules()
        if wanted and module.endswith(wanted) and any(f"{owner}.".startswith(f"{module}.") for owner in owners)
    )
    attached = attach(model, adapter, name=name, dropout=dropout)
    with torch.no_grad():
        for key, tensor in full.items():
            state[key].copy_(tensor)
    for site in sites(model).values():
        if name in site.adapters:
            site.adapters.named()[name].beside = Beside(cast(Bias, bias), modules)
    activate(model, name)
    return attached


def _full_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of a PEFT file that stand for whole tensors of the base, by the base's names."""
    found = {}
    for key in (item.tensor for item in adapter.unused):
        if FACTOR.match(key) or MAGNITUDE.match(key) or ".original_module." in key:
            continue
        # PEFT writes biases of modules_to_save a second time under bias="all", as its wrapper calls them.
        name = re.sub(r"\.modules_to_save\.[^.]+\.", ".", module_name(key).replace(".base_layer.", "."))
        found[name] = cast(Any, adapter.checkpoint)[key]
    return found


def _plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model without LoRA: its tensors themselves, as they are now."""
    prefixes: dict[str, str | None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoraLayer):
            prefixes |= {f"{name}.base_layer.": f"{name}.", f"{name}.adapters.": None}
        elif isinstance(module, LoraParameter):
            of_torch = name.rpartition(".")[0]
            owner, _, attribute = of_torch.rpartition(".")
            tensor = f"{owner.removesuffix('parametrizations')}{attribute}"
            prefixes |= {f"{name}.": None, f"{of_torch}.original": tensor}
    found: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        hit = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if hit is None:
            found[key] = tensor
        elif (plain := prefixes[hit]) is not None:
            found[plain + key.removeprefix(hit)] = tensor
    return found


def _loralib_stem(model: nn.Module, where: str, site: Site, factors: LoraFactors) -> str:
    """The name of the loralib layer that does what a site does.

    Raises
    ------
    UnsupportedAdapterError
        If there is none.
    """
    storage = site.storage
    if factors.lora_magnitude is not None or factors.less_initial:
        what = "the magnitudes of DoRA" if factors.lora_magnitude is not None else "the initial factors of PiSSA"
        raise UnsupportedAdapterError(f"{where!r}: loralib has no place for {what}. Merge, or use save_peft.")
    heights = {block.stop - block.start for block in factors.blocks}
    if heights and (
        len(heights) > 1 or factors.d_out % min(heights) or any(b.start % min(heights) for b in factors.blocks)
    ):
        raise UnsupportedAdapterError(
            f"{where!r}: expected blocks that are slots of a MergedLinear, equal parts of {factors.d_out} rows, got "
            f"{', '.join(f'{b.name} {b.start}-{b.stop}' for b in factors.blocks)}."
        )
    kernel = storage.shape[2:] if storage.experts is None else ()
    if isinstance(site, LoraLayer):
        if kernel and (set(kernel) != {1} or cast(Any, site.base_layer).groups != 1):
            raise UnsupportedAdapterError(
                f"{where!r}: expected a convolution as loralib has it, which views B A as the kernel, got factors of "
                f"its unfolding. Train it through parameters={{'{where}.weight': (out // groups * k, in * k)}}."
            )
        return where
    owner, attribute = parametrized(model, site)
    if attribute != "weight" or storage.experts is not None or not _is_loralibs_view(site, owner, factors):
        raise UnsupportedAdapterError(
            f"{where!r}: expected the weight of a layer that loralib has, got {attribute} "
            f"{storage.shape}{f' viewed as {storage.view}' if storage.view else ''}. Merge, and save the whole weight."
        )
    parent = where.rpartition(".")[0]
    conv = loaded("loralib.layers", "ConvLoRA")
    return parent if conv is not None and isinstance(model.get_submodule(parent), conv) else where


def _is_loralibs_view(site: LoraParameter, owner: nn.Module, factors: LoraFactors) -> bool:
    """Whether a parameter's matrix is that of a loralib Linear, Embedding or convolution."""
    storage = site.storage
    if len(storage.shape) == 2:
        return storage.view is None
    k, groups = storage.shape[2], getattr(owner, "groups", 1)
    view = (storage.shape[0] // groups * k, storage.shape[1] * groups * k)
    return set(storage.shape[2:]) == {k} and storage.view == view and factors.r % k == 0


def _require_unmistakable(model: nn.Module, modules: tuple[str, ...]) -> None:
    """Refuse modules whose names PEFT, which goes by their ends, would find in other modules' as well."""
    names = [name for name, _ in model.named_modules()]
    for module in modules:
        if other := next((name for name in names if name.endswith(module) and name != module), None):
            raise UnsupportedAdapterError(
                f"modules_to_save: PEFT takes {module!r} for {other!r} as well, whose name ends like it. Rename it, or "
                "train the factors alone."
            )
        if isinstance(kept := model.get_submodule(module), nn.ModuleList | nn.ModuleDict):
            raise UnsupportedAdapterError(
                f"modules_to_save: PEFT saves no {type(kept).__name__}, such as {module!r}. Name the modules in it."
            )

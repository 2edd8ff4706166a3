"""LoRA on parameters: experts one by one, in both of PEFT's layouts, and what is done where nothing tells which."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from numpy.typing import NDArray
from peft_models import CONFIG, WEIGHTS, assert_accounts_for, edited, randomise, saved
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_analysis.adapter import Adapter, Target
from lora_analysis.base import BaseWeights, load_base
from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError
from lora_analysis.formats import load_adapter

AMBIGUOUS = ("ambiguous-layout",)
EXPERTS = "layers.0.mlp.experts"


class Experts(nn.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]], transposed: bool = False) -> None:
        super().__init__()
        if transposed:
            self.is_transposed = True
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


class Net(nn.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]], transposed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].mlp = nn.Module()
        self.layers[0].mlp.experts = Experts(shapes, transposed)
        self.layers[0].mlp.gate = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x


# Three experts, hidden 6, inner 5: as (out, in), and turned as gpt-oss holds them.
UPRIGHT = {"gate_up_proj": (3, 10, 6), "down_proj": (3, 6, 5)}
TURNED = {"gate_up_proj": (3, 6, 10), "down_proj": (3, 5, 6)}


def adapted(model: nn.Module, *names: str, **options: Any) -> Any:
    parameters = [f"mlp.experts.{name}" for name in names]
    config = peft.LoraConfig(
        **({"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": parameters} | options)
    )
    made = peft.get_peft_model(model, config)
    randomise(made)
    return made


def base_of(model: Net) -> BaseWeights:
    return load_base({name: tensor.clone() for name, tensor in model.state_dict().items()})


def deltas(model: Any) -> dict[str, NDArray[np.float64]]:
    """PEFT's own ΔW of every parameter, as stored."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "parameter_name"):
            owner = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found[f"{owner}.{layer.parameter_name}"] = layer.get_delta_weight("default").detach().double().numpy()
    return found


def assert_equals(adapter: Adapter, model: Any, base: BaseWeights) -> None:
    held = load_base({name: torch.from_numpy(delta) for name, delta in deltas(model).items()})
    for name, module in adapter.modules.items():
        oracle = held.matrix(module.target, module.shape).numpy()
        assert base.matrix(module.target, module.shape).shape == module.shape
        np.testing.assert_allclose(adapter[name].dense().numpy(), oracle, atol=1e-5)


@pytest.mark.parametrize("given", [True, False], ids=["with base", "without base"])
@pytest.mark.parametrize("transposed", [False, True], ids=["(E, out, in)", "(E, in, out)"])
@pytest.mark.parametrize("names", [("gate_up_proj", "down_proj"), ("down_proj", "gate_up_proj")], ids=str)
def test_experts_come_one_by_one(tmp_path: Path, names: tuple[str, ...], transposed: bool, given: bool) -> None:
    """The order of the configuration is not that of the wrappers, which is the module's own."""
    net = Net(TURNED if transposed else UPRIGHT, transposed)
    base = base_of(net)
    model = adapted(net, *names)
    adapter = load_adapter(saved(model, tmp_path), base=base if given else None)
    assert set(adapter) == {f"{EXPERTS}.{name}.{e}" for name in names for e in range(3)}
    for e in range(3):
        for name, shape in (("gate_up_proj", (10, 6)), ("down_proj", (6, 5))):
            module = adapter.modules[f"{EXPERTS}.{name}.{e}"]
            # Oriented as linear maps, whichever way they are stored; alpha / r, not alpha / (r·E).
            assert (module.shape, module.r, module.scale, module.flags) == (shape, 2, 1.5, ())
            assert (module.target.tensor, module.target.expert) == (f"{EXPERTS}.{name}", e)
            assert module.target.transposed == (transposed and given)
    assert adapter.notes == ()
    assert_equals(adapter, model, base)
    assert_accounts_for_experts(adapter, load_file(tmp_path / WEIGHTS))
    again = pickle.loads(pickle.dumps(adapter))
    assert all(torch.equal(again[name].dense(), adapter[name].dense()) for name in adapter)


def assert_accounts_for_experts(adapter: Adapter, tensors: dict[str, Tensor]) -> None:
    assert adapter.ledger.keys() == tensors.keys()
    assert {key for module in adapter.modules.values() for key in module.tensors} == tensors.keys()


# PEFT looks for the keys among modules only when it warns, and uses them for parameters all the same.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_name_the_parameter(tmp_path: Path, rslora: bool) -> None:
    net = Net(UPRIGHT)
    base = base_of(net)
    patterns = {"rank_pattern": {"down_proj": 4}, "alpha_pattern": {r".*\.gate_up_proj": 7}}
    model = adapted(net, "gate_up_proj", "down_proj", use_rslora=rslora, **patterns)
    adapter = load_adapter(saved(model, tmp_path))
    layers = {layer.parameter_name: layer for layer in model.modules() if hasattr(layer, "parameter_name")}
    for name, layer in layers.items():
        module = adapter.modules[f"{EXPERTS}.{name}.1"]
        assert (module.r, module.scale) == (layer.r["default"], pytest.approx(layer.scaling["default"], rel=1e-15))
    assert_equals(adapter, model, base)


@pytest.mark.parametrize("given", [True, False], ids=["with base", "without base"])
def test_a_matrix_among_the_parameters_is_an_ordinary_update(tmp_path: Path, given: bool) -> None:
    net = Net({"router": (4, 7)})
    base = base_of(net)
    model = adapted(net, "router")
    adapter = load_adapter(saved(model, tmp_path), base=base if given else None)
    assert adapter.targets == {f"{EXPERTS}.router": Target(f"{EXPERTS}.router")}
    assert_equals(adapter, model, base)
    assert_accounts_for(adapter, load_file(tmp_path / WEIGHTS))


def test_a_weight_among_the_parameters_is_named_as_its_module(tmp_path: Path) -> None:
    model = adapted(Net({"router": (4, 7)}), target_parameters=["mlp.gate.weight"])
    adapter = load_adapter(saved(model, tmp_path))
    assert adapter.targets == {"layers.0.mlp.gate": Target("layers.0.mlp.gate.weight")}


def test_a_stack_of_one_expert_is_told_by_the_base(tmp_path: Path) -> None:
    net = Net({"w": (1, 4, 6)})
    base = base_of(net)
    folder = saved(adapted(net, "w"), tmp_path)
    assert list(load_adapter(folder, base=base)) == [f"{EXPERTS}.w.0"]
    assert list(load_adapter(folder)) == [f"{EXPERTS}.w"]


def test_targets_without_a_module_are_the_parameters_of_any(tmp_path: Path) -> None:
    net = Net(UPRIGHT)
    base = base_of(net)
    parameters = ["gate_up_proj", "down_proj"]
    model = adapted(net, target_parameters=parameters, target_modules=["gate"])
    for given in (base, None):
        adapter = load_adapter(saved(model, tmp_path), base=given)
        assert len(adapter) == 7
        assert adapter.targets["layers.0.mlp.gate"] == Target("layers.0.mlp.gate.weight")


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize(
    ("targets", "is_module"),
    [(r".*\.gate", False), (r".*\.(gate|experts)", True), ("(a+)+", False), ("(", False)],
    ids=str,
)
def test_a_regular_expression_of_modules_tells_them_from_parameters(
    tmp_path: Path, targets: str, is_module: bool
) -> None:
    """Whatever r the patterns give a module of the owner's name; what cannot be matched names no module."""
    model = adapted(Net({"up_proj": (3, 5, 6)}), target_parameters=["up_proj"], target_modules=[])
    folder = edited(saved(model, tmp_path), target_modules=targets, rank_pattern={"experts": 6})
    assert list(load_adapter(folder)) == ([EXPERTS] if is_module else [f"{EXPERTS}.up_proj.{e}" for e in range(3)])


@pytest.mark.parametrize("order", [("gate", "up"), ("up", "gate")], ids=str)
def test_parameters_of_one_shape_are_told_apart_by_nothing_and_flagged(tmp_path: Path, order: tuple[str, ...]) -> None:
    net = Net({"gate": (3, 5, 6), "up": (3, 5, 6), "down": (3, 6, 5)})
    base = base_of(net)
    model = adapted(net, *order, "down")
    adapter = load_adapter(saved(model, tmp_path), base=base)
    assert {module.flags for module in adapter.modules.values()} == {AMBIGUOUS}
    assert len(adapter.notes) == 1
    assert f"the innermost is taken for '{order[0]}', the first in target_parameters" in adapter.notes[0]
    if order == ("gate", "up"):  # the module's own order
        assert_equals(adapter, model, base)


def test_without_a_base_the_order_of_the_configuration_is_taken_and_flagged(tmp_path: Path) -> None:
    net = Net({"w1": (3, 5, 6), "w2": (3, 6, 7)})
    base = base_of(net)
    model = adapted(net, "w1", "w2")
    adapter = load_adapter(saved(model, tmp_path))
    assert {module.flags for module in adapter.modules.values()} == {AMBIGUOUS}
    assert "Pass base=, whose shapes may tell." in adapter.notes[0]
    assert_equals(adapter, model, base)
    known = load_adapter(tmp_path, base=base)
    assert {module.flags for module in known.modules.values()} == {()}
    assert known.notes == ()


def test_fewer_wrappers_than_parameters_take_the_base(tmp_path: Path) -> None:
    net = Net({"w1": (3, 5, 6)})
    base = base_of(net)
    model = adapted(net, "w1", "w2")
    folder = saved(model, tmp_path)
    assert list(load_adapter(folder, base=base)) == [f"{EXPERTS}.w1.{e}" for e in range(3)]
    with pytest.raises(
        UnsupportedAdapterError, match=f"'{EXPERTS}': 1 of 2 parameters of target_parameters.*Pass base="
    ):
        load_adapter(folder)


# Layouts. What PEFT before 0.19 wrote is made by its rule, einsum("b k x, x k a -> x a b") with a the second axis of
# the parameter and b the third, because that version is not at hand.


def in_the_old_layout(
    folder: Path, shapes: dict[str, tuple[int, int, int]], *, version: str | None = "0.18.1", **extra: Any
) -> dict[str, NDArray[np.float64]]:
    """An adapter of r = 2 on these parameters, innermost first; the update of each as stored."""
    generator = torch.Generator().manual_seed(0)
    tensors, stored = {}, {}
    for depth, (name, (count, second, third)) in enumerate(shapes.items()):
        a = torch.randn(2 * count, second, generator=generator)
        b = torch.randn(third, 2 * count, generator=generator)
        stem = f"base_model.model.{EXPERTS}" + ".base_layer" * (len(shapes) - 1 - depth)
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        stored[name] = (
            1.5
            * torch.einsum(
                "bkx,xka->xab", b.double().reshape(third, 2, count), a.double().reshape(count, 2, second)
            ).numpy()
        )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_parameters": [f"experts.{name}" for name in shapes]}
    config |= ({} if version is None else {"peft_version": version}) | extra
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))
    return stored


def assert_is_stored(adapter: Adapter, stored: dict[str, NDArray[np.float64]], base: BaseWeights) -> None:
    for name, module in adapter.modules.items():
        parameter, _, expert = name.removeprefix(f"{EXPERTS}.").partition(".")
        dense = adapter[name].dense().numpy()
        assert dense.shape == base.matrix(module.target, module.shape).shape
        oracle = stored[parameter][int(expert)]
        np.testing.assert_allclose(dense.T if module.target.transposed else dense, oracle, atol=1e-12)


def base_for(shapes: dict[str, tuple[int, int, int]]) -> BaseWeights:
    return load_base({f"{EXPERTS}.{name}": torch.zeros(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("version", ["0.18.1", "0.17.0", None])
@pytest.mark.parametrize("shapes", [UPRIGHT, TURNED], ids=["(E, out, in)", "(E, in, out)"])
def test_old_gated_experts_are_told_by_their_widths(
    tmp_path: Path, shapes: dict[str, tuple[int, int, int]], version: str | None
) -> None:
    """gate_up_proj maps hidden to twice inner, down_proj inner to hidden: that tells the sides."""
    stored = in_the_old_layout(tmp_path, shapes, version=version)
    for base in (base_for(shapes), None):
        adapter = load_adapter(tmp_path, base=base)
        assert {module.flags for module in adapter.modules.values()} == {()}
        assert adapter.modules[f"{EXPERTS}.gate_up_proj.0"].shape == (10, 6)
        assert adapter.modules[f"{EXPERTS}.down_proj.0"].shape == (6, 5)
        if base is not None or version is not None:
            assert_is_stored(adapter, stored, base_for(shapes))


def test_other_old_experts_may_have_their_sides_exchanged(tmp_path: Path) -> None:
    shapes = {"w1": (3, 5, 6)}
    stored = in_the_old_layout(tmp_path, shapes)
    adapter = load_adapter(tmp_path, base=base_for(shapes))
    # Against the base it is right in any case; which side is U and which is V is open.
    assert_is_stored(adapter, stored, base_for(shapes))
    assert {module.flags for module in adapter.modules.values()} == {AMBIGUOUS}
    assert "U and V may have to be exchanged" in adapter.notes[0]


def test_the_base_tells_the_layouts_apart_where_it_is_not_square(tmp_path: Path) -> None:
    """One file, read against a base stored this way or that: the version that wrote it is not stated."""
    stored = in_the_old_layout(tmp_path, {"w1": (3, 5, 6)}, version=None)
    positional = load_adapter(tmp_path, base=base_for({"w1": (3, 5, 6)}))
    assert_is_stored(positional, stored, base_for({"w1": (3, 5, 6)}))
    linear = load_adapter(tmp_path, base=base_for({"w1": (3, 6, 5)}))
    assert_is_stored(linear, {"w1": stored["w1"].transpose(0, 2, 1)}, base_for({"w1": (3, 6, 5)}))
    # Development versions of 0.19 called themselves 0.18.
    assert_is_stored(
        load_adapter(edited(tmp_path, peft_version="0.18.2.dev0"), base=base_for({"w1": (3, 6, 5)})),
        {"w1": stored["w1"].transpose(0, 2, 1)},
        base_for({"w1": (3, 6, 5)}),
    )
    # Only PEFT since 0.19 writes the latter, and there A is the side of inputs.
    assert {module.flags for module in linear.modules.values()} == {()}


@pytest.mark.parametrize("transposed", [False, True])
def test_square_experts_are_told_by_a_parameter_beside_them(tmp_path: Path, transposed: bool) -> None:
    shapes = {"gate": (3, 6, 6), "w": (3, 6, 4) if transposed else (3, 4, 6)}
    net = Net(dict(shapes), transposed)
    base = base_of(net)
    model = adapted(net, "gate", "w")
    adapter = load_adapter(saved(model, tmp_path), base=base)
    assert {module.flags for module in adapter.modules.values()} == {()}
    assert {module.target.transposed for module in adapter.modules.values()} == {transposed}
    assert_equals(adapter, model, base)


def test_square_experts_alone_are_flagged(tmp_path: Path) -> None:
    net = Net({"w": (3, 6, 6)})
    base = base_of(net)
    model = adapted(net, "w")
    for given in (base, None):
        adapter = load_adapter(saved(model, tmp_path), base=given)
        assert {module.flags for module in adapter.modules.values()} == {AMBIGUOUS}
        assert "square, and nothing says which way the base stores it" in adapter.notes[0]
        assert_equals(adapter, model, base)
    old = in_the_old_layout(tmp_path, {"w": (3, 6, 6)})
    adapter = load_adapter(tmp_path, base=base)
    assert_is_stored(adapter, old, base)


@pytest.mark.parametrize(
    "changes",
    [
        {"base_model_name_or_path": "unsloth/Qwen3-30B-A3B"},
        {"auto_mapping": {"base_model_class": "X", "parent_library": "y", "unsloth_fixed": True}},
    ],
    ids=str,
)
def test_files_of_unsloth_may_hold_the_expert_slowest(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = adapted(Net(UPRIGHT), "gate_up_proj")
    adapter = load_adapter(edited(saved(model, tmp_path), **changes))
    assert {module.flags for module in adapter.modules.values()} == {AMBIGUOUS}
    assert "Unsloth for a time wrote B with the expert slowest" in adapter.notes[0]


def test_tensors_win_over_r_where_the_base_counts_the_experts(tmp_path: Path) -> None:
    net = Net(UPRIGHT)
    base = base_of(net)
    model = adapted(net, "gate_up_proj")
    folder = edited(saved(model, tmp_path), r=4)
    adapter = load_adapter(folder, base=base)
    assert {(module.r, module.scale) for module in adapter.modules.values()} == {(2, 1.5)}
    assert adapter.notes == (f"{EXPERTS}.gate_up_proj: the configuration says r=4, the tensors have r=2; they win.",)
    with pytest.raises(
        AdapterFormatError, match=r"expected lora_A with r·E rows, r=4 by the configuration, got 6\. Pass"
    ):
        load_adapter(folder)


def test_a_base_that_does_not_fit_is_named(tmp_path: Path) -> None:
    folder = saved(adapted(Net(UPRIGHT), "gate_up_proj"), tmp_path)
    for shape in ((3, 10, 7), (4, 10, 6), (0, 10, 6), (10, 7), (30,)):
        base = load_base({f"{EXPERTS}.gate_up_proj": torch.zeros(shape)})
        match = rf"'{EXPERTS}': expected factors that fit the base's '{EXPERTS}.gate_up_proj' \({shape[0]},"
        with pytest.raises(AdapterFormatError, match=match):
            load_adapter(folder, base=base)


def test_nested_factors_without_target_parameters_are_refused(tmp_path: Path) -> None:
    saved(adapted(Net(UPRIGHT), "gate_up_proj", "down_proj"), tmp_path)
    edited(tmp_path, target_parameters=None)
    match = f"'{EXPERTS}': holds LoRA on parameters, and nothing says which.*target_parameters belongs beside"
    with pytest.raises(UnsupportedAdapterError, match=match):
        load_adapter(tmp_path)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(UnsupportedAdapterError, match=match):
        load_adapter(tmp_path)


def test_experts_without_a_configuration_are_noted(tmp_path: Path) -> None:
    saved(adapted(Net(UPRIGHT), "gate_up_proj"), tmp_path)
    (tmp_path / CONFIG).unlink()
    adapter = load_adapter(tmp_path)
    assert adapter.notes == (
        f"{EXPERTS}: r·E rows of experts cannot be told from r rows without adapter_config.json; read as one matrix.",
    )


def test_levels_of_nesting_must_be_whole(tmp_path: Path) -> None:
    stem = f"base_model.model.{EXPERTS}.base_layer.base_layer"
    save_file({f"{stem}.lora_{side}.weight": torch.ones(6, 6) for side in "AB"}, tmp_path / WEIGHTS)
    config = {"peft_type": "LORA", "r": 2, "target_parameters": ["experts.a", "experts.b"]}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(AdapterFormatError, match="expected one pair of factors at each level of base_layer"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("experts.w", "expected a list of names, got 'experts.w'"),
        ([1], r"expected a list of names, got \[1\]"),
        ([""], r"expected a list of names, got \[''\]"),
        ({"a": 1}, "expected a list of names"),
        ([f"w{i}" for i in range(5001)], "expected at most 5000 names, got 5001"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_target_parameters_of_another_type_are_refused(tmp_path: Path, value: Any, match: str) -> None:
    folder = edited(saved(adapted(Net(UPRIGHT), "gate_up_proj"), tmp_path), target_parameters=value)
    with pytest.raises(AdapterFormatError, match=f"target_parameters: {match}"):
        load_adapter(folder)


@pytest.mark.parametrize(("a", "b"), [((6, 5), (4, 3)), ((6,), (4, 6)), ((0, 5), (4, 0))], ids=str)
def test_factors_of_experts_that_do_not_fit_are_named(tmp_path: Path, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    in_the_old_layout(tmp_path, {"w": (3, 5, 6)})
    stem = f"base_model.model.{EXPERTS}"
    save_file({f"{stem}.lora_A.weight": torch.ones(a), f"{stem}.lora_B.weight": torch.ones(b)}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterFormatError, match=rf"'{EXPERTS}': expected .*lora_A .*share r"):
        load_adapter(tmp_path)

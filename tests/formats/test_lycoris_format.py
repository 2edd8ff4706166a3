"""LyCORIS' files against LyCORIS' own modules: what their forward adds is what is read."""

from __future__ import annotations

import itertools
import math
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    from lycoris import create_lycoris
    from lycoris.modules.boft import ButterflyOFTModule
    from lycoris.modules.diag_oft import DiagOFTModule
    from lycoris.modules.full import FullModule
    from lycoris.modules.glora import GLoRAModule
    from lycoris.modules.ia3 import IA3Module
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule
    from lycoris.modules.norms import NormModule
    from lycoris.modules.tlora import TLoraModule

from lora_analysis.adapter import Adapter
from lora_analysis.base import load_base
from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError
from lora_analysis.formats import load_adapter
from lora_analysis.update import DenseUpdate, KroneckerUpdate, LowRankUpdate

NAME = "lycoris_net_block_0_proj"
MODULE = "net.block.0.proj"

LAYERS = {
    "linear": lambda: nn.Linear(24, 36, bias=False),
    "conv1d": lambda: nn.Conv1d(24, 36, 3, padding=1, bias=False),
    "conv2d": lambda: nn.Conv2d(24, 36, 3, padding=1, bias=False),
    "conv2d 1x1": lambda: nn.Conv2d(24, 36, 1, bias=False),
    "conv3d": lambda: nn.Conv3d(24, 36, (1, 3, 3), padding=(0, 1, 1), bias=False),
}
ALGORITHMS = {
    "LoCon": (LoConModule, {}),
    "LoHa": (LohaModule, {}),
    "LoHa, dense": (LohaModule, {"lora_dim": 5}),
    "LoKr": (LokrModule, {}),
    "LoKr, both factored": (LokrModule, {"decompose_both": True}),
    "LoKr, full": (LokrModule, {"full_matrix": True}),
    "LoKr, w1 factored only": (LokrModule, {"decompose_both": True, "lora_dim": 3, "factor": 3}),
}
OPTIONS = {
    "": {},
    "Tucker": {"use_tucker": True},
    "rsLoRA": {"rs_lora": True},
    "scalar": {"use_scalar": True},
}


def trained(algorithm: str, layer: nn.Module, **options) -> nn.Module:
    """A module with random numbers in every parameter, in float64."""
    kind, own = ALGORITHMS[algorithm]
    module = kind("x", layer.double(), **{"lora_dim": 2, "alpha": 3.0, "bypass_mode": False} | own | options).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name == "dora_scale":
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module


def saved(folder: Path, modules: dict[str, nn.Module], **metadata: str) -> Path:
    """A file as LyCORIS saves it."""
    tensors = {
        f"{name}.{key}": value.detach().clone().contiguous()
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    save_file(tensors, folder / "x.safetensors", metadata=metadata or None)
    return folder / "x.safetensors"


def inputs(layer: nn.Module) -> Tensor:
    spatial = {nn.Linear: (), nn.Conv1d: (7,), nn.Conv2d: (5, 6), nn.Conv3d: (2, 4, 5)}[type(layer)]
    return torch.randn(3, 24, *spatial, dtype=torch.float64)


def effect(adapter: Adapter, layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's output with the adapter's update in its weight."""
    weight = layer.weight + adapter[next(iter(adapter))].dense().view(layer.weight.shape)
    return torch.func.functional_call(layer, {"weight": weight}, (x,))


@pytest.mark.parametrize(
    ("algorithm", "option"),
    [pair for pair in itertools.product(ALGORITHMS, OPTIONS) if pair != ("LoKr, full", "rsLoRA")],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_an_update_is_what_the_module_adds(tmp_path: Path, kind: str, algorithm: str, option: str) -> None:
    layer = LAYERS[kind]()
    module = trained(algorithm, layer, **OPTIONS[option])
    x = inputs(layer)
    adapter = load_adapter(saved(tmp_path, {NAME: module}))
    torch.testing.assert_close(effect(adapter, layer, x), module(x), rtol=1e-6, atol=1e-6)
    described, update = adapter.modules[NAME], adapter[NAME]
    assert adapter.format == "lycoris"
    assert described.shape == update.shape == (36, layer.weight[0].numel())
    assert described.scale == update.scale
    assert described.scale_source == ("format default" if algorithm == "LoKr, full" else "tensor")
    assert set(adapter.ledger) == set(load_file(tmp_path / "x.safetensors"))
    assert not adapter.unused


@pytest.mark.parametrize("wd_on_out", [True, False])
@pytest.mark.parametrize("algorithm", ["LoCon", "LoHa", "LoKr"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d 1x1"])
def test_dora_with_the_base_is_what_the_module_adds(tmp_path: Path, kind: str, algorithm: str, wd_on_out: bool) -> None:
    layer = LAYERS[kind]()
    module = trained(algorithm, layer, weight_decompose=True, wd_on_out=wd_on_out)
    x = inputs(layer)
    path = saved(tmp_path, {NAME: module})
    base = load_base({f"{MODULE}.weight": layer.weight.detach()})
    adapter = load_adapter(path, base=base)
    torch.testing.assert_close(effect(adapter, layer, x), module(x), rtol=1e-6, atol=1e-6)
    assert list(adapter) == [MODULE]
    described = adapter.modules[MODULE]
    assert described.flags == ()
    assert described.magnitude is not None
    assert described.magnitude_axis == int(wd_on_out)
    assert described.magnitude().numel() == (36 if wd_on_out else 24)
    assert isinstance(adapter[MODULE], DenseUpdate)
    assert not adapter.notes


def test_dora_without_the_base_is_flagged_as_its_product(tmp_path: Path) -> None:
    layer = LAYERS["linear"]()
    module = trained("LoCon", layer, weight_decompose=True)
    adapter = load_adapter(saved(tmp_path, {NAME: module}))
    assert adapter.modules[NAME].flags == ("dora-low-rank-part",)
    torch.testing.assert_close(adapter[NAME].dense(), module.get_diff_weight()[0].detach())
    assert [note for note in adapter.notes if "1 modules are DoRA" in note]


def test_a_magnitude_of_one_axis_is_one_per_row_as_peft_has_it(tmp_path: Path) -> None:
    layer = LAYERS["linear"]()
    module = trained("LoCon", layer, weight_decompose=True)
    path = saved(tmp_path, {NAME: module})
    tensors = load_file(path)
    tensors[f"{NAME}.dora_scale"] = tensors[f"{NAME}.dora_scale"].flatten()
    save_file(tensors, path)
    adapter = load_adapter(path, base={f"{MODULE}.weight": layer.weight.detach()})
    x = inputs(layer)
    torch.testing.assert_close(effect(adapter, layer, x), module(x))
    tensors[f"{NAME}.dora_scale"] = torch.ones(7, 1)
    save_file(tensors, path)
    with pytest.raises(AdapterFormatError, match=r"expected dora_scale \(out, 1, …\).* of 36x24, got \(7, 1\)"):
        load_adapter(path)


@pytest.mark.parametrize("algorithm", ["LoCon", "LoHa", "LoKr"])
def test_rslora_is_in_the_saved_alpha_and_its_root_is_not_taken_again(tmp_path: Path, algorithm: str) -> None:
    module = trained(algorithm, LAYERS["linear"](), rs_lora=True)
    adapter = load_adapter(saved(tmp_path, {NAME: module}))
    assert adapter.modules[NAME].scale == pytest.approx(3 / math.sqrt(2))


def test_rslora_of_two_whole_matrices_is_read_as_lycoris_reloads_it_not_as_it_trained(tmp_path: Path) -> None:
    """Its root of r is in the saved alpha, which no loader looks at where both matrices are whole."""
    layer = LAYERS["linear"]()
    module = trained("LoKr, full", layer, rs_lora=True)
    weights = [getattr(module, name, None) for name in LokrModule.weight_list[:-2]]
    with torch.no_grad():
        again = LokrModule.make_module_from_state_dict("x", layer, *weights, module.alpha, None).double()
    assert (module.scale, again.scale) == (pytest.approx(math.sqrt(2)), 1.0)
    adapter = load_adapter(saved(tmp_path, {NAME: module}))
    x = inputs(layer)
    torch.testing.assert_close(effect(adapter, layer, x), again(x), rtol=1e-6, atol=1e-6)


def test_lycoris_merges_loha_and_lokr_with_their_scale_twice() -> None:
    """Why the forward is the oracle here: get_diff_weight, which merge_to uses, multiplies once more."""
    for algorithm in ("LoHa", "LoKr"):
        layer = LAYERS["linear"]()
        module = trained(algorithm, layer)
        added = module(torch.eye(24, dtype=torch.float64)).mT - layer.weight
        torch.testing.assert_close(module.get_diff_weight()[0], 1.5 * added)
    module = trained("LoCon", layer)
    added = module(torch.eye(24, dtype=torch.float64)).mT - layer.weight
    torch.testing.assert_close(module.get_diff_weight()[0], added)


@pytest.mark.parametrize("stored", [0.0, 1.0, 64.0])
def test_lokr_of_whole_matrices_has_scale_1_whatever_its_alpha(tmp_path: Path, stored: float) -> None:
    w1, w2 = torch.randn(3, 2), torch.randn(4, 5)
    save_file({f"{NAME}.lokr_w1": w1, f"{NAME}.lokr_w2": w2, f"{NAME}.alpha": torch.tensor(stored)}, tmp_path / "x")
    adapter = load_adapter(tmp_path / "x", alpha=7)
    module = adapter.modules[NAME]
    assert (module.scale, module.scale_source) == (1.0, "format default")
    assert module.r == adapter[NAME].r == 2 * 4
    torch.testing.assert_close(adapter[NAME].dense(), torch.kron(w1, w2).double())
    assert "alpha= does not bear on 1 modules" in adapter.notes[0]


def test_structures_are_kept(tmp_path: Path) -> None:
    expected = {"LoCon": LowRankUpdate, "LoHa": LowRankUpdate, "LoHa, dense": DenseUpdate, "LoKr": KroneckerUpdate}
    for algorithm, kind in expected.items():
        module = trained(algorithm, LAYERS["linear"]())
        adapter = load_adapter(saved(tmp_path, {NAME: module}))
        assert isinstance(adapter[NAME], kind)
        assert adapter.modules[NAME].r == module.lora_dim


def test_full_differences_norms_and_biases(tmp_path: Path) -> None:
    layer, norm = nn.Conv2d(4, 6, 3), nn.LayerNorm(5)
    full, gain = FullModule("x", layer), NormModule("y", norm)
    for parameter in (*full.parameters(), *gain.parameters()):
        nn.init.normal_(parameter)
    full.org_weight = layer.weight.data
    path = saved(tmp_path, {"lycoris_conv": full, "lycoris_norm": gain})
    tensors = load_file(path)
    adapter = load_adapter(path)
    assert isinstance(adapter["lycoris_conv"], DenseUpdate)
    torch.testing.assert_close(adapter["lycoris_conv"].dense(), tensors["lycoris_conv.diff"].flatten(1).double())
    module = adapter.modules["lycoris_conv"]
    assert (module.scale, module.r, module.target.kernel) == (1.0, 6, (3, 3))
    assert {item.tensor: item.reason for item in adapter.unused} == {
        "lycoris_conv.diff_b": "the difference of a bias, no part of ΔW",
        "lycoris_norm.w_norm": "the difference of a norm's gain, a vector",
        "lycoris_norm.b_norm": "the difference of a norm's bias",
    }
    save_file(tensors | {"lycoris_norm2.diff": torch.ones(5)}, path)
    assert "vector" in load_adapter(path).ledger["lycoris_norm2.diff"]


def test_a_network_of_lycoris_resolves_against_its_model(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q = nn.Linear(24, 36)
            self.conv_in = nn.Conv2d(3, 8, 3)

    model = nn.Sequential(Block(), nn.Sequential(Block()))
    for algorithm in ("lora", "loha", "lokr"):
        network = create_lycoris(model, 1.0, linear_dim=2, linear_alpha=1, algo=algorithm)
        assert {module.lora_name for module in network.loras} == {
            "lycoris_0_conv_in",
            "lycoris_0_to_q",
            "lycoris_1_0_conv_in",
            "lycoris_1_0_to_q",
        }
        path = saved(tmp_path, {module.lora_name: module for module in network.loras})
        adapter = load_adapter(path, base=load_base(model))
        assert set(adapter) == {"0.conv_in", "0.to_q", "1.0.conv_in", "1.0.to_q"}
        assert adapter.modules["1.0.conv_in"].target.kernel == (3, 3)
        assert adapter.modules["1.0.to_q"].target.tensor == "1.0.to_q.weight"
        assert adapter.modules["0.to_q"].scale == 0.5


def test_algorithms_mix_in_one_file_which_pickles(tmp_path: Path) -> None:
    modules = {f"lora_unet_{i}_x": trained(algorithm, LAYERS["linear"]()) for i, algorithm in enumerate(ALGORITHMS)}
    adapter = load_adapter(saved(tmp_path, modules))
    again = pickle.loads(pickle.dumps(adapter))
    assert list(adapter) == list(again) == list(modules)
    for name in adapter:
        torch.testing.assert_close(adapter[name].dense(), again[name].dense(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "title"),
    [
        (DiagOFTModule, "OFT or BOFT, a multiplicative update"),
        (ButterflyOFTModule, "OFT or BOFT, a multiplicative update"),
        (IA3Module, "IA3, a multiplicative update"),
        (GLoRAModule, "GLoRA, whose update is partly a product with the base"),
        (TLoraModule, "T-LoRA"),
    ],
)
def test_a_module_that_is_not_additive_refuses_the_file_by_name(tmp_path: Path, kind: type, title: str) -> None:
    odd = kind("x", nn.Linear(16, 16, bias=False), lora_dim=4)
    for modules in ({"lycoris_odd": odd}, {"lycoris_a": trained("LoCon", LAYERS["linear"]()), "lycoris_odd": odd}):
        with pytest.raises(UnsupportedAdapterError, match=f"'lycoris_odd' is {title}"):
            load_adapter(saved(tmp_path, modules))


def test_a_scalar_beside_the_factors_has_two_readings(tmp_path: Path) -> None:
    tensors = {f"{NAME}.lora_up.weight": torch.ones(3, 1), f"{NAME}.lora_down.weight": torch.ones(1, 2)}
    save_file(tensors | {f"{NAME}.scalar": torch.tensor(1.0)}, tmp_path / "x")
    assert load_adapter(tmp_path / "x")[NAME].dense().tolist() == [[1.0, 1.0]] * 3
    save_file(tensors | {f"{NAME}.scalar": torch.tensor(0.5)}, tmp_path / "x")
    with pytest.raises(AdapterFormatError, match=r"LyCORIS' scalar to be folded into the factors, got 0\.5"):
        load_adapter(tmp_path / "x")


BROKEN = {
    "half of LoHa": ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 5), "hada_w2_a": (4, 2)}, "got only hada_w2_a"),
    "two r in LoHa": (
        {"hada_w1_a": (4, 2), "hada_w1_b": (2, 5), "hada_w2_a": (4, 3), "hada_w2_b": (3, 5)},
        "expected two products of one shape and one r",
    ),
    "one core": (
        {"hada_w1_a": (2, 4), "hada_w1_b": (2, 5), "hada_w2_a": (2, 4), "hada_w2_b": (2, 5), "hada_t1": (2, 2, 3, 3)},
        "got only hada_t1",
    ),
    "LoKr without w2": ({"lokr_w1": (2, 2)}, "expected lokr_w2, or lokr_w2_a and lokr_w2_b, got lokr_w1"),
    "LoKr with w1 twice": (
        {"lokr_w1": (2, 2), "lokr_w1_a": (2, 1), "lokr_w1_b": (1, 2), "lokr_w2": (3, 3)},
        "expected lokr_w1, or lokr_w1_a and lokr_w1_b",
    ),
    "LoKr whose factors do not fit": (
        {"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (1, 3)},
        r"expected lokr_w2_a and lokr_w2_b to share r, got \(3, 2\) and \(1, 3\)",
    ),
    "LoKr of two r": (
        {"lokr_w1_a": (9, 3), "lokr_w1_b": (3, 9), "lokr_w2_a": (9, 2), "lokr_w2_b": (2, 9)},
        "expected the factors of w1 and w2 to share r, got 3 and 2",
    ),
    "a core of w1": ({"lokr_w1": (2, 2), "lokr_w2": (3, 3), "lokr_t1": (2, 2)}, "without a Tucker core, got lokr_t1"),
    "a core of another r": (
        {"lora_up.weight": (4, 2, 1, 1), "lora_down.weight": (2, 3, 1, 1), "lora_mid.weight": (3, 3, 3, 3)},
        r"to share r, got \(2, 3, 1, 1\), \(4, 2, 1, 1\) and \(3, 3, 3, 3\)",
    ),
    "nothing": ({"lokr_w1": (0, 2), "lokr_w2": (3, 3)}, r"a matrix with numbers in it, got shape \(0, 2\)"),
    "two algorithms": ({"lokr_w1": (2, 2), "lokr_w2": (3, 3), "diff": (6, 6)}, "the tensors of one algorithm"),
    "a magnitude alone": ({"dora_scale": (2, 1)}, "the tensors of one algorithm, got dora_scale"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    shapes, message = BROKEN[case]
    save_file({f"{NAME}.{key}": torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "x")
    with pytest.raises(AdapterFormatError, match=message) as caught:
        load_adapter(tmp_path / "x")
    assert "\n" not in str(caught.value)


def test_an_unknown_tensor_of_a_module_is_refused(tmp_path: Path) -> None:
    save_file(
        {f"{NAME}.lokr_w1": torch.ones(2, 2), f"{NAME}.lokr_w2": torch.ones(3, 3), f"{NAME}.lokr_w3": torch.ones(2)},
        tmp_path / "x",
    )
    with pytest.raises(AdapterFormatError, match=r"proj\.lokr_w3': expected a tensor of LyCORIS or kohya"):
        load_adapter(tmp_path / "x")


@pytest.mark.parametrize("r", [4, 16])
def test_real_lokr_has_three_modules_that_change_nothing(shared_adapters: Path, r: int) -> None:
    path = shared_adapters / "lycoris" / f"smart_falcon_{r}_lokr.safetensors"
    adapter, tensors = load_adapter(path), load_file(path)
    assert (adapter.format, len(adapter), adapter.unused, adapter.notes) == ("lycoris", 350, (), ())
    assert set(adapter.ledger) == set(tensors)
    assert {update.r for update in adapter.values()} == {r}
    assert sum(update.norm() == 0 for update in adapter.values()) == 3

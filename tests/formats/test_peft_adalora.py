"""PEFT's AdaLoRA: every ΔW equal to the one PEFT has after it has loaded the same folder, pruned or not."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_analysis.adapter import Adapter, Target
from lora_analysis.base import load_base
from lora_analysis.errors import AdapterFormatError, UndefinedUpdateError, UnsupportedAdapterError
from lora_analysis.formats import load_adapter
from lora_analysis.formats.peft import adalora
from lora_analysis.update import LowRankUpdate

# PEFT adds 1e-5 to its ranknum, and keeps it, in float32.
PEFT = 1e-6

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
LINEAR = {"q": (12, 10), "k": (5, 12), "v": (9, 5)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(10, 12), nn.Linear(12, 5), nn.Linear(5, 9)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.v(torch.tanh(self.k(torch.tanh(self.q(x)))))
        return out


class TransposedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.square = Conv1D(12, 10), Conv1D(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.square(self.q(x))
        return out


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point = nn.Conv2d(3, 4, (3, 2)), nn.Conv2d(4, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.point(self.conv(x))
        return out


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5 for an attribute under its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but", UserWarning)
        # PEFT takes AdaLoRA's masks for LoRA's patterns when it loads them.
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
        # What PEFT says of modules that were pruned to nothing.
        warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)
        warnings.filterwarnings("ignore", ".* have invalid shape", peft.utils.warning.PeftWarning)
        yield


def config(**options: Any) -> peft.AdaLoraConfig:
    given: dict[str, Any] = {
        "init_r": 6,
        "target_r": 2,
        "lora_alpha": 5,
        "target_modules": ["q", "k", "v"],
        "total_step": 30,
        "tinit": 3,
        "tfinal": 8,
    }
    return peft.AdaLoraConfig(**(given | options))


def adapted(model: nn.Module, **options: Any) -> Any:
    """A model of PEFT with random factors and singular values."""
    dtype = next(model.parameters()).dtype
    with quiet():
        made = peft.get_peft_model(model, config(**options), autocast_adapter_dtype=dtype == torch.float32)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape))
    return made


def pruned(model: Any, keep: dict[str, list[bool]]) -> Any:
    """What ``update_and_allocate`` leaves behind: zeros in E and the pattern in the configuration."""
    with torch.no_grad():
        for module, rows in keep.items():
            model.get_submodule(f"base_model.model.{module}").lora_E["default"][~torch.tensor(rows)] = 0
    model.peft_config["default"].rank_pattern = {f"{m}.lora_E.default": rows for m, rows in keep.items()}
    return model


def saved(model: Any, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder)
    return folder


def as_peft_has_it(base: nn.Module, folder: Path) -> dict[str, Tensor]:
    """(d_out, d_in) of each module, once PEFT has loaded the folder, in float64."""
    dtype = next(base.parameters()).dtype
    with quiet():
        loaded = peft.PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=dtype == torch.float32).double()
    found = {}
    for name, layer in loaded.named_modules():
        if isinstance(layer, peft.tuners.adalora.AdaLoraLayer):
            delta = layer.get_delta_weight("default").detach().flatten(1)
            found[name.removeprefix("base_model.model.")] = delta.mT if getattr(layer, "fan_in_fan_out", 0) else delta
    return found


def assert_equal(adapter: Adapter, oracle: dict[str, Tensor]) -> None:
    assert set(adapter) == set(oracle)
    for module, delta in oracle.items():
        update = adapter[module]
        assert update.shape == adapter.modules[module].shape == delta.shape
        assert update.r == adapter.modules[module].r
        torch.testing.assert_close(update.dense(), delta, rtol=0, atol=PEFT * max(float(delta.abs().max()), 1.0))


def written(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    if config is not None:
        (folder / CONFIG).write_text(json.dumps({"peft_type": "ADALORA"} | config))
    return folder


def factors(stem: str = "base_model.model.q", *, r: int = 3, ending: str = "") -> dict[str, Tensor]:
    shapes = {"lora_A": (r, 10), "lora_B": (12, r), "lora_E": (r, 1)}
    return {f"{stem}.{name}{ending}": torch.randn(shape) for name, shape in shapes.items()}


def test_unpruned_layers_equal_peft(tmp_path: Path) -> None:
    saved(adapted(Model()), tmp_path)
    adapter = load_adapter(tmp_path)
    assert adapter.format == "peft"
    assert_equal(adapter, as_peft_has_it(Model(), tmp_path))
    for module in adapter.modules.values():
        assert (module.r, module.scale_source) == (6, "config")
        assert module.scale == pytest.approx(5 / 6, rel=1e-5)
        assert module.scale != 5 / 6
    assert adapter.notes == ()
    assert set(adapter.ledger) == set(load_file(tmp_path / WEIGHTS))


def test_the_update_is_what_merging_adds_to_the_base(tmp_path: Path) -> None:
    model = pruned(adapted(Model()), {"q": [True, False] * 3, "k": [True] * 6, "v": [False] * 5 + [True]})
    base = {name: weight.clone() for name, weight in Model().state_dict().items()}
    saved(model, tmp_path)
    bare = Model()
    bare.load_state_dict(base)
    with quiet():
        merged = peft.PeftModel.from_pretrained(bare, tmp_path).double().merge_and_unload().state_dict()
    difference = {m: merged[f"{m}.weight"] - base[f"{m}.weight"].double() for m in LINEAR}
    assert_equal(load_adapter(tmp_path), difference)


def test_pruned_layers_still_divide_by_the_initial_rank(tmp_path: Path) -> None:
    keep = {"q": [True, False, True, False, False, True], "k": [True] * 6, "v": [False, True] + [False] * 4}
    saved(pruned(adapted(Model()), keep), tmp_path)
    adapter = load_adapter(tmp_path)
    assert_equal(adapter, as_peft_has_it(Model(), tmp_path))
    assert {name: module.r for name, module in adapter.modules.items()} == {"q": 3, "k": 6, "v": 1}
    assert {module.scale for module in adapter.modules.values()} == {5 / (6 + 1e-5)}
    assert adapter.notes == ()


def test_a_real_training_equals_peft(tmp_path: Path) -> None:
    torch.manual_seed(3)
    with quiet():
        model = peft.get_peft_model(Model(), config())
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    x, y = torch.randn(32, 10), torch.randn(32, 9)
    for step in range(30):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimiser.step()
        model.base_model.update_and_allocate(step)
        optimiser.zero_grad()
    in_training = {m: model.get_submodule(f"base_model.model.{m}").get_delta_weight("default").detach() for m in LINEAR}
    saved(model, tmp_path)
    adapter = load_adapter(tmp_path)
    assert sum(module.r for module in adapter.modules.values()) == 6 < 18
    assert_equal(adapter, as_peft_has_it(Model(), tmp_path))
    for module, delta in in_training.items():
        torch.testing.assert_close(adapter[module].dense(), delta.double(), rtol=1e-5, atol=1e-6)


def test_a_layer_pruned_to_nothing_is_an_update_of_zero(tmp_path: Path) -> None:
    model = pruned(adapted(Model()), {"q": [False] * 6, "k": [True] * 6, "v": [True] * 6})
    saved(model, tmp_path)
    adapter = load_adapter(tmp_path)
    assert (adapter.modules["q"].r, adapter.modules["q"].shape, adapter.modules["q"].scale) == (0, (12, 10), 0.0)
    assert adapter["q"].norm() == 0
    assert adapter.notes == ("q: r=0, pruned to an update of zero; its scale is given as 0.",)
    assert_equal(adapter, as_peft_has_it(Model(), tmp_path))


@pytest.mark.parametrize("alpha", [0, -3])
def test_without_a_positive_alpha_r_takes_its_place(tmp_path: Path, alpha: int) -> None:
    keep = {"q": [True, False, True, False, False, True], "k": [True] * 6, "v": [True] * 6}
    saved(pruned(adapted(Model(), lora_alpha=alpha), keep), tmp_path)
    adapter = load_adapter(tmp_path)
    assert_equal(adapter, as_peft_has_it(Model(), tmp_path))
    assert adapter.modules["q"].scale == 3 / (6 + 1e-5)
    assert adapter.notes == (
        "q: lora_alpha is not positive, so r takes its place: 3 here and when PEFT loads it, 6 in training.",
    )


def test_transposed_bases_equal_peft(tmp_path: Path) -> None:
    saved(adapted(TransposedModel(), target_modules=["q", "square"]), tmp_path)
    adapter = load_adapter(tmp_path)
    assert_equal(adapter, as_peft_has_it(TransposedModel(), tmp_path))
    assert adapter.targets["square"] == Target("square.weight", transposed=True)
    assert load_base(TransposedModel()).matrix(adapter.targets["q"], adapter.modules["q"].shape).shape == (12, 10)


def test_convolutions_equal_peft_in_the_unfolding(tmp_path: Path) -> None:
    base = Convolutions()
    saved(adapted(base, target_modules=["conv", "point"]), tmp_path)
    oracle = as_peft_has_it(Convolutions(), tmp_path)
    assert oracle["conv"].shape == (4, 18)
    assert_equal(load_adapter(tmp_path), oracle)
    adapter = load_adapter(tmp_path, base=load_base(Convolutions()))
    assert_equal(adapter, oracle)
    assert adapter.targets["conv"] == Target("conv.weight", kernel=(3, 2))
    assert adapter.targets["point"] == Target("point.weight", kernel=(1, 1))


def test_half_precision_and_r_beyond_both_sides(tmp_path: Path) -> None:
    keep = {"q": [True] * 20, "k": [True, False] * 10, "v": [True] * 20}
    saved(pruned(adapted(Model().to(torch.bfloat16), init_r=20), keep), tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    adapter = load_adapter(tmp_path)
    assert {name: module.r for name, module in adapter.modules.items()} == {"q": 20, "k": 10, "v": 20}
    oracle = as_peft_has_it(Model().to(torch.bfloat16), tmp_path)
    for module, delta in oracle.items():
        # ranknum + 1e-5 = ranknum in bfloat16; the rest is exact in float64.
        torch.testing.assert_close(adapter[module].dense(), delta, rtol=0, atol=PEFT * float(delta.abs().max()))
        assert isinstance(adapter[module], LowRankUpdate)
        assert math.isnan(adapter[module].eps)


def test_a_raw_dump_states_its_ranknum(tmp_path: Path) -> None:
    model = pruned(adapted(Model()), {"q": [True, False] * 3})
    oracle = {m: model.get_submodule(f"base_model.model.{m}").get_delta_weight("default").detach() for m in LINEAR}
    torch.save({n: t for n, t in model.state_dict().items() if "lora_" in n or "ranknum" in n}, tmp_path / "raw.pt")
    adapter = load_adapter(tmp_path / "raw.pt", alpha=5)
    assert adapter.format == "peft"
    for module, delta in oracle.items():
        torch.testing.assert_close(adapter[module].dense(), delta.double(), rtol=1e-5, atol=1e-6)
        assert adapter.modules[module].scale_source == "caller"
        assert len(adapter.modules[module].tensors) == 4
    unscaled = load_adapter(tmp_path / "raw.pt")
    assert math.isnan(unscaled.modules["q"].scale)
    assert load_adapter(tmp_path / "raw.pt", name="default").modules.keys() == LINEAR.keys()
    with pytest.raises(AdapterFormatError, match="expected an adapter named 'other', found 'default'"):
        load_adapter(tmp_path / "raw.pt", name="other")


def test_a_dump_of_several_adapters_asks_which(tmp_path: Path) -> None:
    model = adapted(Model())
    with quiet():
        model.add_adapter("other", config(init_r=2, inference_mode=True))
    torch.save(model.state_dict(), tmp_path / "raw.pt")
    with pytest.raises(AdapterFormatError, match=r"holds several adapters \('default', 'other'\). Pass name= with one"):
        load_adapter(tmp_path / "raw.pt")
    adapter = load_adapter(tmp_path / "raw.pt", name="other", alpha=3)
    assert {module.r for module in adapter.modules.values()} == {2}
    assert adapter.ledger["base_model.model.q.lora_E.default"] == "a factor of another adapter in the same file"
    assert set(adapter.ledger) == set(model.state_dict())


def test_without_its_configuration_the_scale_is_unknown(tmp_path: Path) -> None:
    written(tmp_path, factors())
    adapter = load_adapter(tmp_path)
    assert (adapter.format, adapter.modules["q"].scale_source) == ("peft", "unknown")
    with pytest.raises(UndefinedUpdateError, match="scale of this update is unknown"):
        adapter["q"].norm()
    known_alpha = load_adapter(tmp_path, alpha=16)
    assert known_alpha.modules["q"].scale_source == "unknown"
    assert "divides by the r that training began with" in known_alpha.notes[0]


def test_alpha_of_the_caller_wins(tmp_path: Path) -> None:
    written(tmp_path, factors(), {"init_r": 7, "lora_alpha": 2})
    module = load_adapter(tmp_path, alpha=16).modules["q"]
    assert (module.scale, module.scale_source) == (16 / (7 + 1e-5), "caller")


def test_missing_fields_have_pefts_defaults(tmp_path: Path) -> None:
    written(tmp_path, factors(), {})
    adapter = load_adapter(tmp_path)
    assert adapter.modules["q"].scale == 8 / (12 + 1e-5)
    assert adapter.modules["q"].scale_source == "format default"
    assert [note.split(";")[1] for note in adapter.notes] == [
        " PEFT's default, 8, applies.",
        " PEFT's default, 12, applies.",
    ]
    fresh = peft.AdaLoraConfig(total_step=1)
    assert (fresh.lora_alpha, fresh.init_r) == (8, adalora.DEFAULT_INIT_R)


def test_fields_that_adalora_ignores_are_named(tmp_path: Path) -> None:
    saved(adapted(Model(), use_rslora=True, alpha_pattern={"q": 100}), tmp_path)
    adapter = load_adapter(tmp_path)
    assert_equal(adapter, as_peft_has_it(Model(), tmp_path))
    assert adapter.notes == (
        "alpha_pattern is set; PEFT's AdaLoRA does not use it.",
        "use_rslora is set; PEFT's AdaLoRA does not use it.",
    )


def test_every_field_of_pefts_configuration_is_known(tmp_path: Path) -> None:
    saved(adapted(Model()), tmp_path)
    known = {*adalora._FIELDS, *adalora._REFUSED_OPTIONS, "init_weights"}
    assert set(json.loads((tmp_path / CONFIG).read_text())) <= known


def test_disagreements_are_noted(tmp_path: Path) -> None:
    pattern = {"q.lora_E": [True, True, False, False], "gone.lora_E": [True] * 4}
    written(tmp_path, factors(), {"init_r": 4, "lora_alpha": 2, "rank_pattern": pattern, "a_new_key": None})
    assert load_adapter(tmp_path).notes == (
        "configuration keys not known here, none of them set: 'a_new_key'.",
        "rank_pattern names 1 modules that are not in the file (first: 'gone').",
        "q: rank_pattern keeps 2 of 4 rows, the tensors have r=3; they win.",
    )
    tensors = factors(ending=".default") | {"base_model.model.q.ranknum.default": torch.tensor([9.0])}
    written(tmp_path, tensors, {"init_r": 4, "lora_alpha": 2})
    adapter = load_adapter(tmp_path)
    assert adapter.notes == ("q: init_r is 4, the tensor ranknum says 9; it wins.",)
    assert adapter.modules["q"].scale == 2 / (9 + 1e-5)


def test_other_tensors_are_listed(tmp_path: Path) -> None:
    others = {"base_model.model.q.base_layer.bias": torch.ones(12), "base_model.model.head.weight": torch.ones(2, 2)}
    written(tmp_path, factors() | others, {"modules_to_save": ["head"], "init_r": 4, "lora_alpha": 2})
    adapter = load_adapter(tmp_path)
    assert [entry.tensor for entry in adapter.unused] == sorted(others)[::-1] or len(adapter.unused) == 2
    assert adapter.ledger["base_model.model.head.weight"].startswith("modules_to_save")
    assert set(adapter.ledger) == set(load_file(tmp_path / WEIGHTS))


def test_it_pickles_and_reads_the_same_numbers(tmp_path: Path) -> None:
    written(tmp_path, factors(), {"init_r": 4, "lora_alpha": 2})
    adapter = load_adapter(tmp_path)
    again = pickle.loads(pickle.dumps(adapter))
    assert torch.equal(again["q"].dense(), adapter["q"].dense())


BAD_TENSORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "unpaired": ({"base_model.model.q.lora_E": torch.ones(3, 1)}, "'q': expected lora_A, lora_E, lora_B, lora_A is"),
    "E of another r": (
        factors() | {"base_model.model.q.lora_E": torch.ones(4, 1)},
        r"'q': expected lora_A \(r, d_in\).*got \(3, 10\), \(4, 1\) and \(12, 3\)",
    ),
    "E as a vector": (factors() | {"base_model.model.q.lora_E": torch.ones(3)}, r"'q': expected.*\(3,\)"),
    "transposed": (factors() | {"base_model.model.q.lora_A": torch.ones(10, 3)}, "'q': expected lora_A"),
    "no inputs": (factors() | {"base_model.model.q.lora_A": torch.ones(3, 0)}, r"'q': expected.*\(3, 0\)"),
    "integers": (
        factors() | {"base_model.model.q.lora_B": torch.ones(12, 3, dtype=torch.int64)},
        "'q': expected floating-point factors, got torch.int64",
    ),
    "ranknum of NaN": (
        factors(ending=".d") | {"base_model.model.q.ranknum.d": torch.tensor([math.nan])},
        r"ranknum.d': expected one rank, got shape \(1,\), value nan",
    ),
    "ranknum of two": (
        factors(ending=".d") | {"base_model.model.q.ranknum.d": torch.ones(2)},
        r"ranknum.d': expected one rank, got shape \(2,\)",
    ),
    "an unknown part": (
        factors() | {"base_model.model.q.lora_F": torch.ones(3, 1)},
        "'base_model.model.q.lora_F': expected",
    ),
    "LoRA's own": (
        factors() | {"base_model.model.v.lora_X.weight": torch.ones(3, 1)},
        "'base_model.model.v.lora_X.weight': expected",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    tensors, match = BAD_TENSORS[case]
    written(tmp_path, tensors, {"init_r": 4, "lora_alpha": 2})
    with pytest.raises(AdapterFormatError, match=match) as caught:
        load_adapter(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"lora_alpha": "8"}, "lora_alpha: expected a finite number, got '8'"),
        ({"lora_alpha": math.nan}, "lora_alpha: expected a finite number, got nan"),
        ({"init_r": 0}, "init_r: expected a positive integer, got 0"),
        ({"init_r": 3.5}, "init_r: expected a positive integer, got 3.5"),
        ({"rank_pattern": [1]}, "rank_pattern: expected an object, got list"),
        ({"rank_pattern": {"q.lora_E": 3}}, r"rank_pattern\['q.lora_E'\]: expected a list of booleans"),
        ({"rank_pattern": {"q.lora_E": [1, 0]}}, r"expected a list of booleans, AdaLoRA's, got \[1, 0\]"),
        (
            {"init_r": 4, "rank_pattern": {"q.lora_E": [True]}},
            r"\['q'\]: expected a list of init_r = 4 booleans, got 1",
        ),
        ({"fan_in_fan_out": "yes"}, "fan_in_fan_out: expected true or false"),
    ],
    ids=str,
)
def test_fields_of_the_wrong_kind_are_refused(tmp_path: Path, config: dict[str, Any], match: str) -> None:
    written(tmp_path, factors(), config)
    with pytest.raises(AdapterFormatError, match=match):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
        ({"target_parameters": ["x"]}, "target_parameters is set"),
        ({"use_dora": True}, "use_dora is set"),
        ({"use_something_new": True}, "use_something_new is set, an option that may change the update"),
    ],
    ids=str,
)
def test_options_that_are_not_read_are_refused(tmp_path: Path, config: dict[str, Any], match: str) -> None:
    written(tmp_path, factors(), config)
    with pytest.raises(UnsupportedAdapterError, match=match):
        load_adapter(tmp_path)


def test_what_the_caller_says_of_other_kinds_is_refused(tmp_path: Path) -> None:
    written(tmp_path, factors(), {})
    with pytest.raises(UnsupportedAdapterError, match="split= has no meaning for a PEFT ADALORA"):
        load_adapter(tmp_path, split="q,v")
    with pytest.raises(UnsupportedAdapterError, match="heads= has no meaning"):
        load_adapter(tmp_path, heads=(4, 2))


def test_hostile_names_stay_on_one_line(tmp_path: Path) -> None:
    written(tmp_path, factors("a\n\x1b[31mb", r=0), {"init_r": 3, "lora_alpha": 1})
    adapter = load_adapter(tmp_path)
    assert all(note.isprintable() for note in adapter.notes)
    assert list(adapter) == ["a\n\x1b[31mb"]

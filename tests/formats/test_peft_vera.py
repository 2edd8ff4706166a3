"""PEFT's VeRA: every ΔW equal to the one PEFT has after it has loaded the same folder, projections saved or not."""

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
from lora_analysis.errors import AdapterFormatError, BaseWeightsError, UnsupportedAdapterError
from lora_analysis.formats import load_adapter
from lora_analysis.formats.peft import parts, vera

# The oracle too is in float64, from the same stored numbers.
PEFT = 1e-9

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class Model(nn.Module):
    """Widths that are all different: the largest d_in and the largest d_out are of different modules."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.square = nn.Linear(10, 12), nn.Linear(12, 5), nn.Linear(5, 20), nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.v(self.k(self.q(x)))
        return out


class TransposedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.square = Conv1D(12, 10), Conv1D(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.square(self.q(x))
        return out


TARGETS = ["q", "k", "v", "square"]


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5 for an attribute under its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but", UserWarning)
        # What PEFT says of projections that are not saved.
        warnings.filterwarnings("ignore", "Specified to not (save|load) vera_A and vera_B", UserWarning)
        yield


def adapted(model: nn.Module, **options: Any) -> Any:
    dtype = next(model.parameters()).dtype
    given: dict[str, Any] = {"r": 4, "target_modules": TARGETS, "projection_prng_key": 5}
    with quiet():
        made = peft.get_peft_model(
            model, peft.VeraConfig(**(given | options)), autocast_adapter_dtype=dtype == torch.float32
        )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "vera_lambda" in name:
                parameter.copy_(torch.randn(parameter.shape))
    return made


def saved(model: Any, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder)
    return folder


def deltas(model: Any, adapter: str = "default") -> dict[str, Tensor]:
    """(d_out, d_in) of each module, in float64."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, peft.tuners.vera.VeraLayer):
            for projections in (layer.vera_A, layer.vera_B):
                projections[adapter] = projections[adapter].double()
            delta = layer.double().get_delta_weight(adapter).detach()
            found[name.removeprefix("base_model.model.")] = delta.mT if layer.fan_in_fan_out else delta
    return found


def as_peft_has_it(base: nn.Module, folder: Path) -> dict[str, Tensor]:
    dtype = next(base.parameters()).dtype
    with quiet():
        return deltas(peft.PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=dtype == torch.float32))


def assert_equal(adapter: Adapter, oracle: dict[str, Tensor]) -> None:
    assert set(adapter) == set(oracle)
    for module, delta in oracle.items():
        update = adapter[module]
        assert update.shape == adapter.modules[module].shape == delta.shape
        assert update.r == adapter.modules[module].r
        torch.testing.assert_close(update.dense(), delta, rtol=0, atol=PEFT * float(delta.abs().max()))


def written(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    if config is not None:
        (folder / CONFIG).write_text(json.dumps({"peft_type": "VERA"} | config))
    return folder


def file(**changes: Tensor | None) -> dict[str, Tensor]:
    """One module of 12x10 and r=3, projections and all."""
    tensors: dict[str, Tensor | None] = {
        "base_model.model.q.vera_lambda_b": torch.randn(12),
        "base_model.model.q.vera_lambda_d": torch.randn(3),
        "base_model.vera_A": torch.randn(3, 10),
        "base_model.vera_B": torch.randn(12, 3),
    }
    tensors |= {next((key for key in tensors if key.endswith(name)), name): t for name, t in changes.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


BASE = {"q.weight": torch.zeros(12, 10)}


@pytest.mark.parametrize("save_projection", [True, False])
def test_every_module_equals_peft(tmp_path: Path, save_projection: bool) -> None:
    saved(adapted(Model(), save_projection=save_projection), tmp_path)
    adapter = load_adapter(tmp_path, base=load_base(Model()))
    assert adapter.format == "peft"
    oracle = as_peft_has_it(Model(), tmp_path)
    assert oracle["v"].shape == (20, 5)
    assert_equal(adapter, oracle)
    assert {(m.r, m.scale, m.scale_source) for m in adapter.modules.values()} == {(4, 1.0, "format default")}
    assert set(adapter.ledger) == set(load_file(tmp_path / WEIGHTS))
    assert adapter.unused == ()


def test_the_update_is_what_merging_adds_to_the_base(tmp_path: Path) -> None:
    base = Model().double()
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    saved(adapted(Model()), tmp_path)
    with quiet():
        after = peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload().state_dict()
    adapter = load_adapter(tmp_path, base=before)
    for module, update in adapter.items():
        difference = after[f"{module}.weight"] - before[f"{module}.weight"]
        torch.testing.assert_close(update.dense(), difference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key", [0, 7, 2**40, -3])
def test_projections_are_drawn_again_to_the_last_bit(tmp_path: Path, key: int) -> None:
    saved(adapted(Model(), save_projection=False, projection_prng_key=key, r=9), tmp_path)
    adapter = load_adapter(tmp_path, base=load_base(Model()))
    with quiet():
        loaded = peft.PeftModel.from_pretrained(Model(), tmp_path)
    drawn = vera._Drawn(key, 20, 12, (torch.float32,))
    for mine, theirs in zip(drawn(9), (loaded.base_model.vera_A, loaded.base_model.vera_B), strict=True):
        assert torch.equal(mine, theirs["default"])
    assert any("drawn again from projection_prng_key" in note for note in adapter.notes)


def test_the_projections_are_used_by_every_module(tmp_path: Path) -> None:
    saved(adapted(Model()), tmp_path)
    adapter = load_adapter(tmp_path, base=load_base(Model()))
    assert adapter.ledger["base_model.vera_A"] == adapter.ledger["base_model.vera_B"]
    assert set(adapter.ledger["base_model.vera_A"].removeprefix("used by ").split(", ")) == set(TARGETS)
    assert any("share their row space by construction" in note for note in adapter.notes)


def test_the_row_spaces_are_shared_by_construction(tmp_path: Path) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(11, 8), nn.Linear(11, 9)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.a(x)
            return out

    saved(adapted(Twins(), target_modules=["a", "b"]), tmp_path)
    adapter = load_adapter(tmp_path, base=load_base(Twins()))
    cosines = torch.linalg.svdvals(adapter["a"].svd(4).Vh @ adapter["b"].svd(4).V)
    torch.testing.assert_close(cosines, torch.ones(4, dtype=torch.float64))


def test_transposed_bases_equal_peft(tmp_path: Path) -> None:
    saved(adapted(TransposedModel(), target_modules=["q", "square"]), tmp_path)
    adapter = load_adapter(tmp_path, base=load_base(TransposedModel()))
    assert_equal(adapter, as_peft_has_it(TransposedModel(), tmp_path))
    assert adapter.targets["q"] == Target("q.weight", transposed=True)
    assert adapter.targets["square"] == Target("square.weight", transposed=True)


@pytest.mark.parametrize("save_projection", [True, False])
def test_half_precision_and_r_beyond_both_sides(tmp_path: Path, save_projection: bool) -> None:
    saved(adapted(Model().to(torch.bfloat16), r=30, save_projection=save_projection), tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    # Projections that are drawn again are rounded to the dtype of the base, as PEFT rounds them.
    adapter = load_adapter(tmp_path, base=load_base(Model().to(torch.bfloat16)))
    assert_equal(adapter, as_peft_has_it(Model().to(torch.bfloat16), tmp_path))
    assert adapter.modules["k"].r == 30
    assert math.isnan(adapter["k"].eps)


def test_prefixes_of_the_base_may_differ(tmp_path: Path) -> None:
    saved(adapted(Model()), tmp_path)
    longer = {f"model.{name}": weight for name, weight in Model().state_dict().items()}
    assert_equal(load_adapter(tmp_path, base=longer), as_peft_has_it(Model(), tmp_path))


def test_a_raw_dump_holds_copies_of_the_projections(tmp_path: Path) -> None:
    model = adapted(Model())
    torch.save(model.state_dict(), tmp_path / "raw.pt")
    adapter = load_adapter(tmp_path / "raw.pt", base=load_base(Model()))
    assert set(adapter.ledger) == set(model.state_dict())
    copy = "the shared projection once more, a copy for one module"
    assert adapter.ledger["base_model.model.q.vera_A.default"] == copy
    assert_equal(adapter, deltas(model))


def test_a_dump_of_the_inner_model_has_only_the_copies(tmp_path: Path) -> None:
    model = adapted(Model())
    torch.save(model.base_model.model.state_dict(), tmp_path / "raw.pt")
    adapter = load_adapter(tmp_path / "raw.pt", base=load_base(Model()))
    assert_equal(adapter, deltas(model))
    assert adapter.ledger["q.vera_A.default"] == "used by q"


def test_a_dump_of_several_adapters_asks_which(tmp_path: Path) -> None:
    model = adapted(Model())
    with quiet():
        model.add_adapter("other", peft.VeraConfig(r=4, target_modules=["q", "k"], projection_prng_key=5))
    torch.save(model.state_dict(), tmp_path / "raw.pt")
    with pytest.raises(AdapterFormatError, match=r"several adapters \('default', 'other'\)"):
        load_adapter(tmp_path / "raw.pt", base=load_base(Model()))
    adapter = load_adapter(tmp_path / "raw.pt", base=load_base(Model()), name="other")
    assert set(adapter) == {"q", "k"}
    assert set(adapter.ledger) == set(model.state_dict())
    assert adapter.ledger["base_model.vera_A.default"] == "a factor of another adapter in the same file"


@pytest.mark.parametrize("save_projection", [True, False])
def test_without_a_base_the_widths_are_unknown(tmp_path: Path, save_projection: bool) -> None:
    saved(adapted(Model(), save_projection=save_projection), tmp_path)
    with pytest.raises(UnsupportedAdapterError, match=r"does not say how many inputs .* Pass base=") as caught:
        load_adapter(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


def test_alpha_has_no_meaning(tmp_path: Path) -> None:
    written(tmp_path, file(), {})
    with pytest.raises(UnsupportedAdapterError, match="alpha= has no meaning for VeRA"):
        load_adapter(tmp_path, base=BASE, alpha=8)
    with pytest.raises(UnsupportedAdapterError, match="split= has no meaning for a PEFT VERA"):
        load_adapter(tmp_path, base=BASE, split="q")


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((11, 10), r"'q': expected a base matrix with 12 outputs, got shape \(11, 10\)"),
        ((12, 10, 1), r"expected a base matrix with 12 outputs, got shape \(12, 10, 1\)"),
        ((120, 1), r"got shape \(120, 1\)"),
    ],
    ids=str,
)
def test_another_base_is_refused(tmp_path: Path, shape: tuple[int, ...], match: str) -> None:
    written(tmp_path, file(), {})
    with pytest.raises(BaseWeightsError, match=match):
        load_adapter(tmp_path, base={"q.weight": torch.zeros(shape)})
    with pytest.raises(BaseWeightsError, match=r"expected the tensor 'q\.weight'"):
        load_adapter(tmp_path, base={"other.weight": torch.zeros(12, 10)})


def test_disagreements_are_noted(tmp_path: Path) -> None:
    written(tmp_path, file(), {"r": 7, "save_projection": False, "a_new_key": None})
    first, _, second, third = load_adapter(tmp_path, base=BASE).notes
    assert first == "configuration keys not known here, none of them set: 'a_new_key'."
    assert second == "save_projection is false, yet the file holds projections; they win, PEFT would draw its own."
    assert third == "q: the configuration says r=7, the tensors have r=3; they win."


def test_it_pickles_and_reads_the_same_numbers(tmp_path: Path) -> None:
    for save_projection in (True, False):
        folder = saved(adapted(Model(), save_projection=save_projection), tmp_path / str(save_projection))
        torch.save(Model().state_dict(), tmp_path / "base.pt")
        adapter = load_adapter(folder, base=tmp_path / "base.pt")
        again = pickle.loads(pickle.dumps(adapter))
        assert torch.equal(again["q"].dense(), adapter["q"].dense())


def test_every_field_of_pefts_configuration_is_known(tmp_path: Path) -> None:
    saved(adapted(Model()), tmp_path)
    assert set(json.loads((tmp_path / CONFIG).read_text())) <= {*vera._FIELDS, *parts._COMMON_FIELDS}


BAD_TENSORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "no lambda_b": (file(lambda_b=None), "'q': expected vera_lambda_b, vera_lambda_d, vera_lambda_b is missing"),
    "no lambda_d": (file(lambda_d=None), "'q': expected vera_lambda_b, vera_lambda_d, vera_lambda_d is missing"),
    "no B": (file(vera_B=None), "'q': expected vera_A, vera_B, vera_B is missing"),
    "no projections": (
        file(vera_A=None, vera_B=None),
        "expected base_model.vera_A and base_model.vera_B in the file, found none",
    ),
    "lambda as a matrix": (file(lambda_b=torch.ones(12, 1)), r"expected vera_lambda_b \(d_out\).*got \(12, 1\) and"),
    "no r": (file(lambda_d=torch.ones(0)), r"expected vera_lambda_b.*\(0,\)"),
    "lambdas of integers": (
        file(lambda_d=torch.ones(3, dtype=torch.int64)),
        "vera_lambda_d': expected floating-point numbers, got torch.int64",
    ),
    "A of another r": (file(vera_A=torch.ones(4, 10)), r"expected vera_A \(3, 10 or more\).*got \(4, 10\)"),
    "A too narrow": (file(vera_A=torch.ones(3, 9)), r"expected vera_A \(3, 10 or more\).*got \(3, 9\)"),
    "B too short": (file(vera_B=torch.ones(11, 3)), r"vera_B \(12 or more, 3\), got \(3, 10\) and \(11, 3\)"),
    "B of integers": (file(vera_B=torch.ones(12, 3, dtype=torch.int8)), "'q': expected floating-point factors"),
    "an unknown part": (
        file() | {"base_model.model.q.vera_lambda_c": torch.ones(3)},
        "'base_model.model.q.vera_lambda_c': expected the parts of a module to be",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    tensors, match = BAD_TENSORS[case]
    written(tmp_path, tensors, {})
    with pytest.raises(AdapterFormatError, match=match):
        load_adapter(tmp_path, base=BASE)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (None, "found none, nor adapter_config.json with projection_prng_key"),
        ({"save_projection": False, "projection_prng_key": "5"}, "expected an integer of 64 bits, got '5'"),
        ({"save_projection": False, "projection_prng_key": 2**64}, "expected an integer of 64 bits, got 18446744073"),
        ({"save_projection": "no"}, "save_projection: expected true or false, got 'no'"),
    ],
    ids=str,
)
def test_a_seed_must_be_there(tmp_path: Path, config: dict[str, Any] | None, match: str) -> None:
    written(tmp_path, file(vera_A=None, vera_B=None), config)
    with pytest.raises(AdapterFormatError, match=match):
        load_adapter(tmp_path, base=BASE)


def test_options_that_are_not_known_are_refused(tmp_path: Path) -> None:
    written(tmp_path, file(), {"vera_alpha": 3})
    with pytest.raises(UnsupportedAdapterError, match="vera_alpha is set, an option that may change the update"):
        load_adapter(tmp_path, base=BASE)


def test_hostile_names_stay_on_one_line(tmp_path: Path) -> None:
    name = "a\n\x1b[31mb"
    renamed = {key.replace("model.q.", f"model.{name}."): tensor for key, tensor in file().items()}
    written(tmp_path, renamed, {"r": 2})
    adapter = load_adapter(tmp_path, base={f"{name}.weight": torch.zeros(12, 10)})
    assert all(note.isprintable() for note in adapter.notes)
    with pytest.raises(UnsupportedAdapterError, match="does not say") as caught:
        load_adapter(tmp_path)
    assert "\n" not in str(caught.value)

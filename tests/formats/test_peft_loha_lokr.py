"""PEFT's LoHa and LoKr: every ΔW equal to the one PEFT has after it has loaded the same folder; PEFT's other kinds."""

from __future__ import annotations

import itertools
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
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_analysis.adapter import Adapter, Target
from lora_analysis.base import load_base
from lora_analysis.checkpoint import StateDict
from lora_analysis.errors import AdapterFormatError, UndefinedUpdateError, UnsupportedAdapterError
from lora_analysis.formats import load_adapter, unread
from lora_analysis.formats import peft as peft_format
from lora_analysis.formats.peft import kronecker, lycoris_scaling, parts
from lora_analysis.update import DenseUpdate, KroneckerUpdate, LowRankUpdate

# PEFT keeps LoHa's alpha / r in float32; the rest of the oracle is in float64, from the same stored numbers.
PEFT = 1e-6

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class Model(nn.Module):
    """Linear layers and convolutions with kernels, strides and groups that are all different."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.proj, self.q_proj = nn.Linear(20, 24), nn.Linear(24, 15), nn.Linear(7, 30)
        self.conv2d, self.point = nn.Conv2d(10, 14, (3, 2), stride=2), nn.Conv2d(14, 10, 1)
        self.conv1d, self.point1d = nn.Conv1d(10, 14, 5, padding=1), nn.Conv1d(14, 12, 1)
        self.grouped = nn.Conv2d(20, 14, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(self.q(x))
        return out


TARGETS = ["q", "proj", "q_proj", "conv2d", "point", "conv1d", "point1d", "grouped"]
KERNELS = {"conv2d": (3, 2), "point": (1, 1), "conv1d": (5,), "point1d": (1,), "grouped": (3, 3)}
KINDS: dict[str, Any] = {"LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig}


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5 for an attribute under its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def adapted(kind: str, model: nn.Module | None = None, **options: Any) -> Any:
    base = Model() if model is None else model
    dtype = next(base.parameters()).dtype
    given: dict[str, Any] = {"r": 3, "alpha": 5, "target_modules": TARGETS}
    with quiet():
        made = peft.get_peft_model(
            base, KINDS[kind](**(given | options)), autocast_adapter_dtype=dtype == torch.float32
        )
    randomise(made)
    return made


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hada_" in name or "lokr_" in name:
                parameter.copy_(torch.randn(parameter.shape))


def saved(model: Any, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder)
    return folder


def deltas(model: Any, adapter: str = "default") -> dict[str, Tensor]:
    """(d_out, d_in) of each module, in float64."""
    model = model.double()
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(adapter).detach().flatten(1)
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight") and adapter in layer._available_adapters
    }


def as_peft_has_it(folder: Path, base: nn.Module | None = None) -> dict[str, Tensor]:
    base = Model() if base is None else base
    dtype = next(base.parameters()).dtype
    with quiet():
        return deltas(peft.PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=dtype == torch.float32))


def assert_equal(adapter: Adapter, oracle: dict[str, Tensor]) -> None:
    assert set(adapter) == set(oracle)
    for module, delta in oracle.items():
        update = adapter[module]
        assert update.shape == adapter.modules[module].shape == delta.shape, module
        torch.testing.assert_close(
            update.dense(), delta, rtol=0, atol=PEFT * float(delta.abs().max()), msg=lambda m, module=module: module + m
        )


def written(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    if config is not None:
        (folder / CONFIG).write_text(json.dumps(config))
    return folder


def module(stem: str = "base_model.model.q", **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {f"{stem}.{name}": torch.randn(shape) for name, shape in shapes.items()}


LOHA = {"hada_w1_a": (9, 3), "hada_w1_b": (3, 8), "hada_w2_a": (9, 3), "hada_w2_b": (3, 8)}
TUCKER = {name: (3, shape[0] if name.endswith("a") else shape[1]) for name, shape in LOHA.items()} | {
    "hada_t1": (3, 3, 2, 2),
    "hada_t2": (3, 3, 2, 2),
}

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoHa": ("LOHA", {}),
    "LoHa, Tucker": ("LOHA", {"use_effective_conv2d": True}),
    "LoHa, r beyond both sides": ("LOHA", {"r": 40}),
    "LoHa, patterns": ("LOHA", {"rank_pattern": {"proj": 2, "conv.d": 4}, "alpha_pattern": {"^q": 9, "proj": 1}}),
    "LoHa, dropouts": ("LOHA", {"rank_dropout": 0.5, "module_dropout": 0.5}),
    "LoKr": ("LOKR", {"r": 2}),
    "LoKr, Tucker": ("LOKR", {"r": 2, "use_effective_conv2d": True}),
    "LoKr, w2 full": ("LOKR", {"r": 8}),
    "LoKr, both low rank": ("LOKR", {"r": 1, "decompose_both": True, "decompose_factor": 4}),
    "LoKr, a factor": ("LOKR", {"r": 2, "decompose_factor": 2}),
    "LoKr, patterns": ("LOKR", {"rank_pattern": {"proj": 1, "conv.d": 2}, "alpha_pattern": {"q": 9, "proj": 1}}),
    "LoKr, dropouts": ("LOKR", {"r": 1, "rank_dropout": 0.5, "rank_dropout_scale": True}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_every_module_equals_peft(tmp_path: Path, case: str) -> None:
    kind, options = OPTIONS[case]
    saved(adapted(kind, **options), tmp_path)
    oracle = as_peft_has_it(tmp_path)
    adapter = load_adapter(tmp_path)
    assert adapter.format == "peft"
    assert_equal(adapter, oracle)
    assert {m.scale_source for m in adapter.modules.values()} == {"config"}
    assert set(adapter.ledger) == set(load_file(tmp_path / WEIGHTS))
    with_base = load_adapter(tmp_path, base=load_base(Model()))
    assert_equal(with_base, oracle)
    assert {name: target.kernel for name, target in with_base.targets.items()} == {
        name: KERNELS.get(name, ()) for name in TARGETS
    }


@pytest.mark.parametrize("case", ["LoHa", "LoHa, Tucker", "LoKr", "LoKr, w2 full"])
def test_half_precision_equals_peft(tmp_path: Path, case: str) -> None:
    kind, options = OPTIONS[case]
    saved(adapted(kind, Model().to(torch.bfloat16), **options), tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    assert_equal(load_adapter(tmp_path), as_peft_has_it(tmp_path, Model().to(torch.bfloat16)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_what_merging_adds_to_the_base(tmp_path: Path, kind: str) -> None:
    base = Model().double()
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    saved(adapted(kind, r=2, use_effective_conv2d=True), tmp_path)
    with quiet():
        after = peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload().state_dict()
    for name, update in load_adapter(tmp_path).items():
        difference = (after[f"{name}.weight"] - before[f"{name}.weight"]).flatten(1)
        torch.testing.assert_close(update.dense(), difference, rtol=1e-5, atol=1e-5)


def test_updates_keep_the_structure_of_their_files(tmp_path: Path) -> None:
    saved(
        adapted(
            "LOHA",
            nn.ModuleDict({"wide": nn.Linear(90, 80), "narrow": nn.Linear(8, 9)}),
            r=4,
            target_modules=["wide", "narrow"],
        ),
        tmp_path / "loha",
    )
    adapter = load_adapter(tmp_path / "loha")
    assert isinstance(adapter["wide"], LowRankUpdate)
    assert adapter["wide"].r == 16
    assert isinstance(adapter["narrow"], DenseUpdate)
    assert adapter["narrow"].r == adapter.modules["wide"].r == 4
    saved(adapted("LOKR", nn.ModuleDict({"wide": nn.Linear(90, 80)}), target_modules=["wide"]), tmp_path / "lokr")
    update = load_adapter(tmp_path / "lokr")["wide"]
    assert isinstance(update, KroneckerUpdate)
    assert update.r == 3


def test_a_full_w2_on_a_conv1d_is_multiplied_the_other_way_round(tmp_path: Path) -> None:
    class Model1d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(6, 8, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(x)
            return out

    base, x = Model1d().double(), torch.randn(2, 6, 11, dtype=torch.float64)
    before = base(x)
    model = adapted("LOKR", base, r=8, target_modules=["conv"])
    saved(model, tmp_path)
    adapter = load_adapter(tmp_path, base=load_base(Model1d()))
    kernel = adapter["conv"].dense().reshape(8, 6, 5)
    torch.testing.assert_close(model(x) - before, nn.functional.conv1d(x, kernel))
    w1, w2 = (load_file(tmp_path / WEIGHTS)[f"base_model.model.conv.lokr_{name}"].double() for name in ("w1", "w2"))
    by_hand = torch.zeros(8, 6, 5, dtype=torch.float64)
    for i, j, p, q in itertools.product(*map(range, (*w1.shape, *w2.shape[:2]))):
        by_hand[p * w1.shape[0] + i, q * w1.shape[1] + j] = w1[i, j] * w2[p, q] * 5 / 8
    torch.testing.assert_close(kernel, by_hand)
    as_elsewhere = 5 / 8 * torch.kron(w1, w2.flatten(1)).reshape(8, 6, 5)
    assert not torch.allclose(kernel, as_elsewhere)
    assert adapter.targets["conv"].kernel == (5,)
    assert adapter.notes == (
        "conv: a full lokr_w2 on a Conv1d, which PEFT multiplies the other way round; the update is what PEFT "
        "computes, and no Kronecker product.",
    )


def test_alpha_and_r_come_from_patterns_as_in_peft(tmp_path: Path) -> None:
    options = OPTIONS["LoHa, patterns"][1]
    model = adapted("LOHA", **options)
    saved(model, tmp_path)
    adapter = load_adapter(tmp_path)
    for name, found in adapter.modules.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        assert (found.r, found.scale) == (layer.r["default"], layer.scaling["default"])
    assert len({found.scale for found in adapter.modules.values()}) > 3


def test_two_full_sides_divide_by_the_r_of_the_configuration(tmp_path: Path) -> None:
    saved(adapted("LOKR", r=100, alpha=7, rank_pattern={"proj": 50}), tmp_path)
    adapter = load_adapter(tmp_path)
    assert_equal(adapter, as_peft_has_it(tmp_path))
    assert (adapter.modules["q"].r, adapter.modules["q"].scale) == (100, 0.07)
    assert (adapter.modules["proj"].r, adapter.modules["proj"].scale) == (50, 0.14)
    assert load_adapter(tmp_path, alpha=50).modules["q"].scale == 0.5
    (tmp_path / CONFIG).unlink()
    for alpha in (None, 7):
        unscaled = load_adapter(tmp_path, alpha=alpha)
        assert unscaled.modules["q"].scale_source == "unknown"
        assert "the r that alpha is divided by is in adapter_config.json only" in unscaled.notes[0]
        with pytest.raises(UndefinedUpdateError, match="scale"):
            unscaled["q"].norm()
        assert unscaled["q"].r == unscaled.modules["q"].r


@pytest.mark.parametrize("kind", KINDS)
def test_missing_fields_have_pefts_defaults(tmp_path: Path, kind: str) -> None:
    assert (KINDS[kind]().alpha, KINDS[kind]().r) == (8, kronecker.DEFAULT_R)
    tensors = module(**LOHA) if kind == "LOHA" else module(lokr_w1=(2, 3), lokr_w2=(5, 4))
    written(tmp_path, tensors, {"peft_type": kind})
    adapter = load_adapter(tmp_path)
    r = 3 if kind == "LOHA" else 8
    assert (adapter.modules["q"].scale, adapter.modules["q"].scale_source) == (8 / r, "format default")
    assert adapter.notes[0] == "the configuration holds no alpha; PEFT's default, 8, applies."


@pytest.mark.parametrize("kind", KINDS)
def test_lora_alpha_is_not_alpha(tmp_path: Path, kind: str) -> None:
    tensors = module(**LOHA) if kind == "LOHA" else module(lokr_w1=(2, 3), lokr_w2_a=(5, 3), lokr_w2_b=(3, 4))
    written(tmp_path, tensors, {"peft_type": kind, "alpha": 6, "lora_alpha": 1})
    with pytest.raises(UnsupportedAdapterError, match="lora_alpha is set, an option that may change the update"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_raw_dumps_name_their_adapters(tmp_path: Path, kind: str) -> None:
    model = adapted(kind, r=1)
    with quiet():
        model.add_adapter("other", KINDS[kind](r=2, alpha=5, target_modules=["q", "conv2d"]))
    randomise(model)
    torch.save(model.state_dict(), tmp_path / "raw.pt")
    with pytest.raises(AdapterFormatError, match=r"holds several adapters \('default', 'other'\). Pass name= with one"):
        load_adapter(tmp_path / "raw.pt", alpha=5)
    adapter = load_adapter(tmp_path / "raw.pt", name="other", alpha=5)
    assert adapter.format == "peft"
    assert set(adapter.ledger) == set(model.state_dict())
    oracle = deltas(model, "other")
    assert set(oracle) == set(adapter) == {"q", "conv2d"}
    for name, delta in oracle.items():
        assert adapter.modules[name].scale_source == "caller"
        torch.testing.assert_close(adapter[name].dense(), delta, rtol=1e-5, atol=1e-6)


def test_without_a_configuration_only_pefts_prefix_tells_it_from_lycoris() -> None:
    for names, prefixed in ((LOHA, True), (LOHA, False), ({"lokr_w1": 0, "lokr_w2": 0}, True)):
        stem = "base_model.model.q" if prefixed else "lycoris_q"
        checkpoint = StateDict({f"{stem}.{name}": torch.ones(1) for name in names})
        assert peft_format.matches(checkpoint, {}) is prefixed
        if prefixed:
            assert unread.recognised(checkpoint, {}) is None


def test_disagreements_are_noted(tmp_path: Path) -> None:
    written(tmp_path, module(**LOHA), {"peft_type": "LOHA", "alpha": 6, "r": 5, "a_new_key": None})
    assert load_adapter(tmp_path).notes == (
        "configuration keys not known here, none of them set: 'a_new_key'.",
        "q: the configuration says r=5, the tensors have r=3; they win.",
    )
    tensors = module(lokr_w1=(2, 3), lokr_w2_a=(5, 3), lokr_w2_b=(3, 4))
    written(tmp_path, tensors, {"peft_type": "LOKR", "alpha": 6, "r": 5})
    adapter = load_adapter(tmp_path)
    assert adapter.modules["q"].scale == 2.0
    assert adapter.notes == ("q: the configuration says r=5, the tensors have r=3; they win.",)


def test_other_tensors_are_listed(tmp_path: Path) -> None:
    extra = {"base_model.model.head.weight": torch.ones(2, 2), "base_model.model.q.base_layer.bias": torch.ones(9)}
    written(tmp_path, module(**LOHA) | extra, {"peft_type": "LOHA", "alpha": 6, "modules_to_save": ["head"]})
    adapter = load_adapter(tmp_path)
    assert {entry.tensor for entry in adapter.unused} == set(extra)
    assert adapter.ledger["base_model.model.head.weight"].startswith("modules_to_save")


@pytest.mark.parametrize("kind", KINDS)
def test_it_pickles_and_reads_the_same_numbers(tmp_path: Path, kind: str) -> None:
    adapter = load_adapter(saved(adapted(kind, r=8), tmp_path))
    again = pickle.loads(pickle.dumps(adapter))
    for name in ("q", "conv1d"):
        assert torch.equal(again[name].dense(), adapter[name].dense())


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_pefts_configuration_is_known(tmp_path: Path, kind: str) -> None:
    saved(adapted(kind), tmp_path)
    own = lycoris_scaling.LYCORIS_FIELDS if kind == "LOHA" else kronecker._FIELDS
    assert set(json.loads((tmp_path / CONFIG).read_text())) <= {*own, *parts._COMMON_FIELDS}


BAD_TENSORS: dict[str, tuple[str, dict[str, Tensor], str]] = {
    "LoHa, no w2_b": (
        "LOHA",
        module(hada_w1_a=(9, 3), hada_w1_b=(3, 8), hada_w2_a=(9, 3)),
        r"'q': expected hada_w1_a, .*hada_w2_b is missing \(found hada_w1_a",
    ),
    "LoHa, unpaired": ("LOHA", module(**LOHA | {"hada_w1_a": (9, 4)}), r"'q': expected hada_w1_a \(d_out, r\)"),
    "LoHa, two shapes": (
        "LOHA",
        module(**LOHA | {"hada_w2_b": (3, 7)}),
        r"got \(9, 3\), \(3, 8\), \(9, 3\) and \(3, 7",
    ),
    "LoHa, two r": (
        "LOHA",
        module(**LOHA | {"hada_w2_a": (9, 2), "hada_w2_b": (2, 8)}),
        r"hada_w2 likewise, got \(9, 3\), \(3, 8\), \(9, 2\)",
    ),
    "LoHa, r of 0": ("LOHA", module(**{name: (9, 0) if name[-1] == "a" else (0, 8) for name in LOHA}), r"\(0, 8\)"),
    "LoHa, vectors": ("LOHA", module(**LOHA | {"hada_w1_b": (3,)}), r"'q': expected hada_w1_a.*\(3,\)"),
    "LoHa, a scalar": ("LOHA", module(**LOHA | {"hada_w1_b": ()}), r"'q': expected hada_w1_a.*\(\)"),
    "LoHa, one core": ("LOHA", module(**LOHA, hada_t1=(3, 3, 2, 2)), "hada_t2 is missing"),
    "LoHa, cores on linear factors": (
        "LOHA",
        module(**LOHA, hada_t1=(3, 3, 2, 2), hada_t2=(3, 3, 2, 2)),
        r"expected hada_w1_a \(r, out\), hada_w1_b \(r, in\) and hada_t1 \(r, r, k, k\)",
    ),
    "LoHa, cores of two kernels": ("LOHA", module(**TUCKER | {"hada_t2": (3, 3, 2, 1)}), r"\(3, 3, 2, 1\)"),
    "LoHa, cores of three axes": (
        "LOHA",
        module(**TUCKER | {"hada_t1": (3, 3, 2), "hada_t2": (3, 3, 2)}),
        r"and hada_t1 \(r, r, k, k\)",
    ),
    "LoHa, an unknown part": (
        "LOHA",
        module(**LOHA, hada_w3_a=(9, 3)),
        "'base_model.model.q.hada_w3_a': expected the parts of a module to be hada_w1_a,",
    ),
    "LoHa, integers": (
        "LOHA",
        {name: tensor.to(torch.int32) for name, tensor in module(**LOHA).items()},
        "'q': expected floating-point factors, got torch.int32",
    ),
    "LoKr, no w2": ("LOKR", module(lokr_w1=(2, 3)), r"'q': expected lokr_w1 or .*got lokr_w1\."),
    "LoKr, w1 twice": (
        "LOKR",
        module(lokr_w1=(2, 3), lokr_w1_a=(2, 1), lokr_w1_b=(1, 3), lokr_w2=(5, 4)),
        "expected lokr_w1 or lokr_w1_a and lokr_w1_b",
    ),
    "LoKr, a core beside a full w2": ("LOKR", module(lokr_w1=(2, 3), lokr_w2=(5, 4), lokr_t2=(1, 1, 2, 2)), "got lokr"),
    "LoKr, unpaired": (
        "LOKR",
        module(lokr_w1=(2, 3), lokr_w2_a=(5, 2), lokr_w2_b=(3, 4)),
        r"'q': expected matrices w1 and w2.*lokr_w2_a \(5, 2\)",
    ),
    "LoKr, two r": (
        "LOKR",
        module(lokr_w1_a=(2, 1), lokr_w1_b=(1, 3), lokr_w2_a=(5, 2), lokr_w2_b=(2, 4)),
        "all with one r, got lokr_w1_a",
    ),
    "LoKr, w1 with a kernel": ("LOKR", module(lokr_w1=(2, 3, 1), lokr_w2=(5, 4)), r"lokr_w1 \(2, 3, 1\)"),
    "LoKr, a vector": ("LOKR", module(lokr_w1=(2,), lokr_w2=(5, 4)), r"lokr_w1 \(2,\)"),
    "LoKr, nothing": ("LOKR", module(lokr_w1=(2, 3), lokr_w2=(0, 4)), r"lokr_w2 \(0, 4\)"),
    "LoKr, a core of another r": (
        "LOKR",
        module(lokr_w1=(2, 3), lokr_w2_a=(2, 5), lokr_w2_b=(2, 4), lokr_t2=(3, 2, 2, 2)),
        r"lokr_t2 \(3, 2, 2, 2\)",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    kind, tensors, match = BAD_TENSORS[case]
    written(tmp_path, tensors, {"peft_type": kind, "alpha": 6})
    with pytest.raises(AdapterFormatError, match=match) as caught:
        load_adapter(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"alpha": "8"}, ": alpha: expected a finite number, got '8'"),
        ({"alpha": math.nan}, ": alpha: expected a finite number, got nan"),
        ({"r": 0}, "r: expected a positive integer, got 0"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]: expected a positive integer"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: expected"),
        ({"modules_to_save": "head"}, "modules_to_save: expected a list of names"),
    ],
    ids=str,
)
def test_fields_of_the_wrong_kind_are_refused(tmp_path: Path, kind: str, config: dict[str, Any], match: str) -> None:
    tensors = module(**LOHA) if kind == "LOHA" else module(lokr_w1=(2, 3), lokr_w2=(5, 4))
    written(tmp_path, tensors, {"peft_type": kind} | config)
    with pytest.raises(AdapterFormatError, match=match):
        load_adapter(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_alphas_in_tensors_are_refused(tmp_path: Path, kind: str) -> None:
    tensors = module(**LOHA) if kind == "LOHA" else module(lokr_w1=(2, 3), lokr_w2=(5, 4))
    written(tmp_path, tensors | module(alpha=()), {"peft_type": kind, "alpha": 4})
    with pytest.raises(UnsupportedAdapterError, match=r"q.alpha': per-module alpha tensors"):
        load_adapter(tmp_path)


def test_every_kind_of_peft_is_read_or_named() -> None:
    assert set(unread.PEFT_READ) == set(peft_format._READERS)
    kinds = {str(kind.value) for kind in PeftType}
    assert kinds <= set(unread.PEFT_READ) | set(unread.PEFT_TYPES)
    assert not set(unread.PEFT_READ) & set(unread.PEFT_TYPES)


@pytest.mark.parametrize("kind", [*unread.PEFT_TYPES, "OF_TOMORROW"])
def test_other_kinds_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    written(tmp_path, module(lora_A=(3, 4)), {"peft_type": kind})
    for options in ({}, {"format": "peft"}):
        with pytest.raises(UnsupportedAdapterError, match=rf"holds PEFT {kind}, [a-z].*; it is not read\."):
            load_adapter(tmp_path, **options)


def test_a_family_without_its_tensors_is_an_error(tmp_path: Path) -> None:
    for kind in ("LOHA", "LOKR", "ADALORA", "VERA"):
        written(tmp_path, {"base_model.model.head.weight": torch.ones(2, 2)}, {"peft_type": kind})
        with pytest.raises(AdapterFormatError, match="expected LoRA factors, found none among its 1 tensors"):
            load_adapter(tmp_path)


def test_kernels_of_cores_are_told_without_a_base(tmp_path: Path) -> None:
    written(tmp_path, module(**TUCKER), {"peft_type": "LOHA", "alpha": 4})
    assert load_adapter(tmp_path).targets["q"] == Target("q.weight", kernel=(2, 2))
    assert load_adapter(tmp_path).modules["q"].shape == (9, 32)

"""loralib: every ΔW equal to the one its own layers merge, block by block, and nothing guessed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import loralib  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_analysis.adapter import Adapter, Target
from lora_analysis.base import load_base
from lora_analysis.errors import (
    AdapterFormatError,
    AmbiguousAdapterError,
    BaseWeightsError,
    UndefinedUpdateError,
    UnsupportedAdapterError,
)
from lora_analysis.formats import load_adapter
from lora_analysis.formats.options import Split

# loralib multiplies in float32: r products of numbers near 1.
FLOAT32 = 1e-6

R, ALPHA = 3, 7
D_IN, SLOT = 10, 4
MASKS = [[True, False, True], [True, True, True], [False, True, False], [True, True, False], [False, False, True]]


def randomise(model: nn.Module) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape))
    return model


def saved(model: nn.Module, folder: Path, bias: str = "none", prefix: str = "") -> Path:
    path = folder / "lora.bin"
    torch.save({prefix + name: tensor for name, tensor in loralib.lora_state_dict(model, bias=bias).items()}, path)
    return path


def linear(fan_in_fan_out: bool = False) -> Any:
    layer = loralib.Linear(D_IN, 2 * SLOT, r=R, lora_alpha=ALPHA, fan_in_fan_out=fan_in_fan_out)
    return randomise(nn.ModuleDict({"query": layer}))


def merged_linear(enable_lora: list[bool], fan_in_fan_out: bool = False, d_in: int = D_IN) -> Any:
    layer = loralib.MergedLinear(
        d_in,
        SLOT * len(enable_lora),
        r=R,
        lora_alpha=ALPHA,
        enable_lora=enable_lora,
        fan_in_fan_out=fan_in_fan_out,
    )
    return randomise(nn.ModuleDict({"attn": layer}))


def change_by_merging(layer: Any) -> NDArray[np.float64]:
    """What ``eval()`` adds to the weight, which is loralib's own merging, as (d_out, d_in)."""
    layer.double()
    before = layer.weight.detach().clone()
    layer.eval()
    change: NDArray[np.float64] = (layer.weight.detach() - before).numpy()
    return change.T if layer.fan_in_fan_out else change


def placed(adapter: Adapter, d_out: int) -> NDArray[np.float64]:
    """The blocks of an adapter at their rows, zeros elsewhere."""
    whole = np.zeros((d_out, D_IN))
    for name, update in adapter.items():
        rows = adapter.targets[name].rows or (0, d_out)
        assert update.shape == adapter.modules[name].shape == (rows[1] - rows[0], D_IN)
        whole[slice(*rows)] += update.dense().numpy()
    return whole


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_linear_updates_are_what_loralib_merges(tmp_path: Path, fan_in_fan_out: bool) -> None:
    model = linear(fan_in_fan_out)
    adapter = load_adapter(saved(model, tmp_path), alpha=ALPHA)
    assert adapter.format == "loralib"
    assert list(adapter) == ["query"]
    module = adapter.modules["query"]
    assert (module.shape, module.r, module.scale, module.scale_source) == ((8, D_IN), R, ALPHA / R, "caller")
    assert module.target == Target("query.weight")
    np.testing.assert_allclose(adapter["query"].dense().numpy(), change_by_merging(model["query"]), atol=1e-12)


def names_of(mask: list[bool]) -> list[str]:
    return [f"attn.{name}" for name, enabled in zip("qkv", mask, strict=True) if enabled]


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_blocks_of_a_merged_linear_are_what_loralib_merges(
    tmp_path: Path, mask: list[bool], fan_in_fan_out: bool
) -> None:
    model = merged_linear(mask, fan_in_fan_out)
    layer = model["attn"]
    path = saved(model, tmp_path)
    adapter = load_adapter(path, split=mask, alpha=ALPHA)
    assert list(adapter) == names_of(mask)
    assert {(module.r, module.shape) for module in adapter.modules.values()} == {(R, (SLOT, D_IN))}
    whole = placed(adapter, 3 * SLOT)
    merged = layer.merge_AB().detach() * layer.scaling
    np.testing.assert_allclose(
        whole, (merged.T if fan_in_fan_out else merged).numpy(), atol=FLOAT32 * np.abs(whole).max()
    )
    np.testing.assert_allclose(whole, change_by_merging(layer), atol=1e-12)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_the_base_the_split_and_the_old_mask_agree(tmp_path: Path, mask: list[bool], fan_in_fan_out: bool) -> None:
    model = merged_linear(mask, fan_in_fan_out)
    base = load_base({"attn.weight": model["attn"].weight.detach()})
    path = saved(model, tmp_path)
    by_split = load_adapter(path, split=mask, alpha=ALPHA)
    by_both = load_adapter(path, split=",".join(name[-1] for name in names_of(mask)), base=base, alpha=ALPHA)
    tensors = torch.load(path, weights_only=True) | {"attn.lora_ind": model["attn"].lora_ind}
    torch.save(tensors, tmp_path / "old.bin")
    by_mask = load_adapter(tmp_path / "old.bin", alpha=ALPHA)
    assert by_mask.unused == ()
    found = [by_split, by_both, by_mask]
    if all(mask):
        found.append(load_adapter(path, base=base, alpha=ALPHA))
    for adapter in found:
        assert adapter.targets == by_split.targets
        for name in by_split:
            assert torch.equal(adapter[name].dense(), by_split[name].dense())
    for name, update in by_both.items():
        block = base.matrix(by_both.targets[name], update.shape)
        weight = model["attn"].weight.detach()
        assert torch.equal(block, (weight.T if fan_in_fan_out else weight)[slice(*by_both.targets[name].rows or ())])


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("q,v", ["q", "v"]),
        (" v , q ", ["q", "v"]),
        (["v", "q"], ["q", "v"]),
        ((True, False, True), ["q", "v"]),
        ([True, True], ["slot0", "slot1"]),
        ([False, True, False, True], ["slot1", "slot3"]),
    ],
    ids=str,
)
def test_slots_are_named_in_the_order_of_the_weight(tmp_path: Path, split: Split, names: list[str]) -> None:
    adapter = load_adapter(saved(merged_linear([True, False, True]), tmp_path), split=split)
    assert list(adapter) == [f"attn.{name}" for name in names]


def test_slots_that_are_not_three_merge_alike(tmp_path: Path) -> None:
    mask = [False, True, False, True]
    model = merged_linear(mask)
    adapter = load_adapter(saved(model, tmp_path), split=mask, alpha=ALPHA)
    np.testing.assert_allclose(placed(adapter, 4 * SLOT), change_by_merging(model["attn"]), atol=1e-12)


@pytest.mark.parametrize("split", ["x", "q,q", "", [], [False, False], [True, "q"], ["q", "x"]], ids=str)
def test_a_split_names_slots(tmp_path: Path, split: Split) -> None:
    with pytest.raises(ValueError, match="split: expected the adapted ones of q,k,v, as 'q,v' or"):
        load_adapter(saved(merged_linear([True, False, True]), tmp_path), split=split)


def test_which_slots_are_enabled_is_never_guessed(tmp_path: Path) -> None:
    model = merged_linear([True, False, True])
    path = saved(model, tmp_path)
    base = load_base({"attn.weight": model["attn"].weight})
    match = r"'attn': a MergedLinear with 2 enabled slot\(s\) of a fused weight.*Pass split= with 2 of q,k,v"
    given: list[dict[str, Any]] = [{}, {"base": base}, {"split": "q"}, {"split": "q,k,v"}]
    for options in given:
        wrong = AdapterFormatError if "split" in options else AmbiguousAdapterError
        with pytest.raises(wrong, match=match):
            load_adapter(path, alpha=ALPHA, **options)


def test_one_enabled_slot_is_known_by_its_base(tmp_path: Path) -> None:
    """Without a base it looks like a Linear; with one, B has too few rows."""
    model = merged_linear([False, True, False])
    path = saved(model, tmp_path)
    base = load_base({"attn.weight": model["attn"].weight})
    assert load_adapter(path).targets == {"attn": Target("attn.weight")}
    with pytest.raises(AmbiguousAdapterError, match=r"'attn': a MergedLinear with 1 enabled slot\(s\)"):
        load_adapter(path, base=base)
    adapter = load_adapter(path, base=base, split="k", alpha=ALPHA)
    assert adapter.targets == {"attn.k": Target("attn.weight", rows=(SLOT, 2 * SLOT))}
    np.testing.assert_allclose(placed(adapter, 3 * SLOT), change_by_merging(model["attn"]), atol=1e-12)


def test_a_linear_beside_merged_ones_stays_whole(tmp_path: Path) -> None:
    model: Any = nn.ModuleDict({**merged_linear([True, False, True]), **linear()})
    path = saved(model, tmp_path)
    base = load_base({"attn.weight": model["attn"].weight, "query.weight": model["query"].weight})
    given: list[dict[str, Any]] = [{}, {"base": base}]
    for options in given:
        assert list(load_adapter(path, split="q,v", **options)) == ["attn.q", "attn.v", "query"]


def test_a_split_that_does_not_fit_the_base_is_refused(tmp_path: Path) -> None:
    path = saved(merged_linear([True, False, True]), tmp_path)
    base = load_base({"attn.weight": torch.randn(2 * SLOT, D_IN)})
    with pytest.raises(AdapterFormatError, match="'attn': expected a base with 3 blocks of 4 rows, got 8 rows"):
        load_adapter(path, base=base, split="q,v")


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(12, dtype=torch.bool),
        torch.tensor([True, False] * 6),
        torch.tensor([True] * 4 + [False] * 8),
        torch.ones(11, dtype=torch.bool),
        torch.zeros(0, dtype=torch.bool),
        torch.tensor(True),
    ],
    ids=["none", "alternating", "one", "ragged", "empty", "scalar"],
)
def test_a_mask_that_does_not_fit_is_refused(tmp_path: Path, mask: Tensor) -> None:
    path = saved(merged_linear([True, False, True]), tmp_path)
    torch.save(torch.load(path, weights_only=True) | {"attn.lora_ind": mask}, path)
    with pytest.raises(AdapterFormatError, match="'attn': lora_ind does not mark 2 slots of 4 rows"):
        load_adapter(path)


def test_alpha_is_unknown_until_the_caller_says(tmp_path: Path) -> None:
    path = saved(linear(), tmp_path)
    adapter = load_adapter(path)
    module = adapter.modules["query"]
    assert math.isnan(module.scale)
    assert (module.scale_source, module.r) == ("unknown", R)
    assert any("do not hold lora_alpha" in note and "default is 1" in note for note in adapter.notes)
    with pytest.raises(UndefinedUpdateError, match="Pass alpha="):
        adapter["query"].singular_values()
    told = load_adapter(path, alpha=1)
    assert told.notes == ()
    # loralib's own default of alpha is 1, so its scale is 1/r and not 1.
    assert told.modules["query"].scale == loralib.Linear(2, 2, r=R).scaling == 1 / R


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_alpha_is_a_finite_number(tmp_path: Path, alpha: float) -> None:
    with pytest.raises(ValueError, match=f"alpha: expected a finite number, got {alpha}"):
        load_adapter(saved(linear(), tmp_path), alpha=alpha)


@pytest.mark.parametrize("alpha", [1e308, 10**400], ids=["1e308", "of 400 digits"])
def test_alpha_is_a_plausible_number(tmp_path: Path, alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha: expected a plausible number, got 1"):
        load_adapter(saved(linear(), tmp_path), alpha=alpha)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_listed(tmp_path: Path, bias: str) -> None:
    adapter = load_adapter(saved(linear(), tmp_path, bias=bias))
    assert list(adapter) == ["query"]
    assert [(u.tensor, u.reason, u.nbytes) for u in adapter.unused] == [
        ("query.bias", "bias: a full bias in place of the base's", 8 * 4)
    ]


def test_a_whole_state_dict_lists_the_base(tmp_path: Path) -> None:
    model = nn.ModuleDict({**linear(), "head": nn.Linear(3, 3)})
    torch.save(model.state_dict(), tmp_path / "all.pt")
    adapter = load_adapter(tmp_path / "all.pt", alpha=ALPHA)
    assert list(adapter) == ["query"]
    listed = {unused.tensor: unused.reason for unused in adapter.unused}
    assert set(listed) == {"query.weight", "query.bias", "head.weight", "head.bias"}
    assert listed["head.weight"] == "a full tensor trained beside LoRA, no part of any update"


def test_the_prefix_of_data_parallel_training_is_dropped(tmp_path: Path) -> None:
    model = merged_linear([True, False, True])
    adapter = load_adapter(saved(model, tmp_path, prefix="module."), split="q,v", alpha=ALPHA)
    assert list(adapter) == ["attn.q", "attn.v"]
    assert adapter.targets["attn.q"].tensor == "attn.weight"
    np.testing.assert_allclose(placed(adapter, 3 * SLOT), change_by_merging(model["attn"]), atol=1e-12)


def test_safetensors_are_read_alike(tmp_path: Path) -> None:
    model = linear()
    save_file(loralib.lora_state_dict(model), tmp_path / "lora.safetensors")
    a, b = load_adapter(tmp_path / "lora.safetensors", alpha=1), load_adapter(saved(model, tmp_path), alpha=1)
    assert torch.equal(a["query"].dense(), b["query"].dense())


def convolution(kind: Any = loralib.Conv2d, r: int = 2, **settings: Any) -> Any:
    return randomise(nn.ModuleDict({"conv": kind(4, 6, r=r, lora_alpha=ALPHA, **settings)}))


@pytest.mark.parametrize("inner", ["conv.", ""], ids=["loralib's base", "plain base"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_convolutions_are_what_loralib_merges(tmp_path: Path, kernel_size: int, groups: int, inner: str) -> None:
    model = convolution(kernel_size=kernel_size, groups=groups).double()
    layer = model["conv"]
    before = layer.conv.weight.detach().clone()
    base = load_base({f"conv.{inner}weight": before})
    adapter = load_adapter(saved(model, tmp_path), base=base, alpha=ALPHA)
    layer.eval()
    merged = (layer.conv.weight.detach() - before).flatten(1)
    update, module = adapter["conv"], adapter.modules["conv"]
    assert module.target == Target(f"conv.{inner}weight", kernel=(kernel_size, kernel_size))
    assert (update.shape, module.shape) == (merged.shape, (6, 4 // groups * kernel_size**2))
    assert (update.r, module.r, update.scale, module.scale_source) == (2, 2, ALPHA / 2, "caller")
    np.testing.assert_allclose(update.dense().numpy(), merged.numpy(), atol=1e-12)
    assert torch.equal(base.matrix(module.target, update.shape), before.flatten(1))


def test_the_unfolding_of_a_convolution_has_more_than_r_directions(tmp_path: Path) -> None:
    """Which is why it is no product of two factors of r columns."""
    model = convolution(kernel_size=3, r=1).double()
    base = load_base({"conv.weight": model["conv"].conv.weight})
    update = load_adapter(saved(model, tmp_path), base=base, alpha=1)["conv"]
    assert update.r == 1
    assert int((update.singular_values() > 1e-9).sum()) > 1
    assert math.isnan(update.eps)


def test_a_live_convolution_of_loralib_is_its_own_base(tmp_path: Path) -> None:
    model = convolution(kernel_size=3)
    adapter = load_adapter(saved(model, tmp_path), base=load_base(model))
    assert adapter.targets == {"conv": Target("conv.conv.weight", kernel=(3, 3))}
    assert adapter.modules["conv"].scale_source == "unknown"


@pytest.mark.parametrize("kind", [loralib.Conv1d, loralib.Conv3d], ids=["1d", "3d"])
def test_convolutions_that_loralib_cannot_run_are_refused(tmp_path: Path, kind: Any) -> None:
    model = convolution(kind, kernel_size=3)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        model["conv"](torch.ones(1, 4, *(5 for _ in model["conv"].conv.kernel_size)))
    base = load_base({"conv.weight": model["conv"].conv.weight})
    with pytest.raises(UnsupportedAdapterError, match=r"'conv': lora_B·lora_A, 18x12, cannot be viewed as its base"):
        load_adapter(saved(model, tmp_path), base=base)


@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (6, 3, 3, 3), (5, 6, 4)], ids=str)
def test_a_kernel_that_does_not_fit_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = saved(convolution(kernel_size=3), tmp_path)
    with pytest.raises(
        (AdapterFormatError, UnsupportedAdapterError), match=r"'conv': .*(cannot be viewed|on a kernel)"
    ):
        load_adapter(path, base=load_base({"conv.weight": torch.ones(shape)}))


@pytest.mark.parametrize("vocabulary", [20, 6])
def test_an_embedding_is_a_linear_map_on_a_turned_weight(tmp_path: Path, vocabulary: int) -> None:
    """A (r, vocab) and B (dim, r) of an Embedding are those of a Linear from words to vectors."""
    layer = loralib.Embedding(vocabulary, 6, r=R, lora_alpha=ALPHA)
    model = randomise(nn.ModuleDict({"wte": layer})).double()
    before = layer.weight.detach().clone()
    adapter = load_adapter(saved(model, tmp_path), base=load_base({"wte.weight": before}), alpha=ALPHA)
    # The base's shape tells, but for as many words as dimensions.
    assert adapter.targets["wte"] == Target("wte.weight", transposed=vocabulary != 6)
    assert adapter.modules["wte"].shape == (6, vocabulary)
    layer.eval()
    merged = (layer.weight.detach() - before).T
    np.testing.assert_allclose(adapter["wte"].dense().numpy(), merged.numpy(), atol=1e-12)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_the_base_says_how_a_weight_is_stored(tmp_path: Path, fan_in_fan_out: bool) -> None:
    model = linear(fan_in_fan_out)
    base = load_base({"query.weight": model["query"].weight.detach().clone()})
    adapter = load_adapter(saved(model, tmp_path), base=base)
    assert adapter.targets == {"query": Target("query.weight", transposed=fan_in_fan_out)}


def test_a_base_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = saved(linear(), tmp_path)
    with pytest.raises(
        AdapterFormatError, match=r"'query': expected a base matrix with 10 input columns, got \(8, 9\)"
    ):
        load_adapter(path, base=load_base({"query.weight": torch.ones(8, 9)}))
    with pytest.raises(BaseWeightsError, match=r"expected the tensor 'query\.weight'"):
        load_adapter(path, base=load_base({"other.weight": torch.ones(8, 10)}))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((3, 5), (4, 2)),
        ((2, 5), (4, 3)),
        ((5,), (4, 2)),
        ((2, 5), (4,)),
        ((2, 5, 1), (4, 2)),
        ((2, 5), (4, 0)),
        ((0, 5), (4, 2)),
        ((), ()),
    ],
    ids=str,
)
def test_factors_of_other_layouts_are_refused(tmp_path: Path, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    torch.save({"m.lora_A": torch.zeros(a), "m.lora_B": torch.zeros(b)}, tmp_path / "x.bin")
    with pytest.raises(
        AdapterFormatError, match=r"'m': expected lora_A \(r, d_in\) .*read other layouts with pattern="
    ):
        load_adapter(tmp_path / "x.bin")


TRANSPOSED = (
    r"'m': looks transposed: expected lora_A \(r, d_in\) .*pattern='down={module}\.lora_A\.T up={module}\.lora_B\.T'"
)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((768, 8), (8, 768)),
        ((3072, 8), (8, 768)),
        ((768, 8), (8, 3072)),
        ((784, 16), (16, 512)),
        ((768, 8), (8, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("based", [False, True], ids=["no base", "base"])
def test_factors_of_x_a_b_are_refused(tmp_path: Path, a: tuple[int, int], b: tuple[int, int], based: bool) -> None:
    torch.save({"m.lora_A": torch.zeros(a), "m.lora_B": torch.zeros(b)}, tmp_path / "x.bin")
    base = load_base({"m.weight": torch.zeros(b[1], a[0])}) if based else None
    with pytest.raises(AdapterFormatError, match=TRANSPOSED) as caught:
        load_adapter(tmp_path / "x.bin", base=base)
    assert "MergedLinear" not in str(caught.value)


def test_a_base_that_fits_allows_an_r_beyond_the_sides(tmp_path: Path) -> None:
    layer = randomise(nn.ModuleDict({"m": loralib.Linear(4, 4, r=6, lora_alpha=ALPHA)}))
    path = saved(layer, tmp_path)
    with pytest.raises(AdapterFormatError, match=f"{TRANSPOSED}.* pass base="):
        load_adapter(path)
    adapter = load_adapter(path, base=load_base({"m.weight": torch.zeros(4, 4)}), alpha=ALPHA)
    np.testing.assert_allclose(adapter["m"].dense().numpy(), change_by_merging(layer["m"]), atol=1e-12)


def test_an_r_beyond_few_outputs_is_no_transposition(tmp_path: Path) -> None:
    """A head of two classes: read the other way round its factors would not share their inner side."""
    torch.save({"m.lora_A": torch.zeros(8, 768), "m.lora_B": torch.zeros(2, 8)}, tmp_path / "x.bin")
    assert load_adapter(tmp_path / "x.bin").modules["m"].shape == (2, 768)


@pytest.mark.parametrize("based", [False, True], ids=["no base", "base"])
def test_a_split_that_splits_nothing_is_refused(tmp_path: Path, based: bool) -> None:
    path = saved(linear(), tmp_path)
    base = load_base({"query.weight": torch.zeros(2 * SLOT, D_IN)}) if based else None
    with pytest.raises(AdapterFormatError, match="split= names slots, but no module of the file is a MergedLinear"):
        load_adapter(path, split="q,v", base=base)


def test_blocks_keep_the_order_of_their_weight_between_modules_in_natural_order(tmp_path: Path) -> None:
    layers = {f"layer{i}": merged_linear([True, True, True])["attn"] for i in (10, 2)}
    adapter = load_adapter(saved(nn.ModuleDict(layers), tmp_path), split="q,k,v")
    assert list(adapter) == [f"layer{i}.{slot}" for i in (2, 10) for slot in "qkv"]


def test_tensors_that_would_change_an_update_are_not_listed_away(tmp_path: Path) -> None:
    tensors = loralib.lora_state_dict(linear())
    for name, error, match in (
        ("query.alpha", UnsupportedAdapterError, "'query.alpha': per-module alpha tensors"),
        ("query.lora_scaling", AdapterFormatError, "'query.lora_scaling': expected the tensors of LoRA to be factors"),
        ("lora_A", AdapterFormatError, "'lora_A': expected the tensors of LoRA to be factors"),
    ):
        torch.save({**tensors, name: torch.ones(1)}, tmp_path / "x.bin")
        with pytest.raises(error, match=match):
            load_adapter(tmp_path / "x.bin")


def test_a_container_named_after_lora_says_nothing_about_its_tensors(tmp_path: Path) -> None:
    tensors = {"lora_layers.0.lora_A": torch.ones(1, 3), "lora_layers.0.lora_B": torch.ones(2, 1)}
    torch.save({**tensors, "lora_layers.0.weight": torch.ones(2, 3)}, tmp_path / "x.bin")
    adapter = load_adapter(tmp_path / "x.bin")
    assert (list(adapter), [unused.tensor for unused in adapter.unused]) == (
        ["lora_layers.0"],
        ["lora_layers.0.weight"],
    )


def test_rows_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    torch.save({"m.lora_A": torch.zeros(4, 5), "m.lora_B": torch.zeros(7, 2)}, tmp_path / "x.bin")
    with pytest.raises(AdapterFormatError, match="'m': expected the 7 rows of lora_B in 2 equal blocks"):
        load_adapter(tmp_path / "x.bin", split="q,v")


@pytest.mark.parametrize("lost", ["A", "B"])
def test_a_factor_without_its_partner_is_named(tmp_path: Path, lost: str) -> None:
    tensors = loralib.lora_state_dict(linear())
    del tensors[f"query.lora_{lost}"]
    torch.save(tensors, tmp_path / "x.bin")
    with pytest.raises(
        AdapterFormatError, match=f"'query': expected lora_A and lora_B, 'query.lora_{lost}' is missing"
    ):
        load_adapter(tmp_path / "x.bin")


def test_adapters_of_loralib_have_no_names(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match="expected an adapter named 'x'; loralib's have no names"):
        load_adapter(saved(linear(), tmp_path), name="x")


def test_factors_stay_in_their_dtype_and_lie_on_the_device(tmp_path: Path) -> None:
    update = load_adapter(saved(linear().half(), tmp_path), alpha=1, device="meta")["query"]
    assert (update.up.dtype, update.up.device.type) == (torch.float16, "meta")  # type: ignore[attr-defined]

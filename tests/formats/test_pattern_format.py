"""Files whose tensors the caller names: factors found, turned and scaled as said, all else listed."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_analysis.adapter import Target
from lora_analysis.base import load_base
from lora_analysis.checkpoint import StateDict
from lora_analysis.errors import AdapterFormatError, UndefinedUpdateError
from lora_analysis.formats import load_adapter
from lora_analysis.formats import pattern as by_pattern
from lora_analysis.formats.pattern import parse_pattern

TOYLORA = "down=lora_layers.{module}.lora_A.T up=lora_layers.{module}.lora_B.T"
PLAIN = "down={module}.a up={module}.b"

# Our product is in float64 from the same stored numbers.
DENSE = 1e-12


def written(folder: Path, tensors: dict[str, Tensor]) -> Path:
    path = folder / "factors.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def factors(r: int = 3) -> dict[str, Tensor]:
    return {"x.0.a": torch.randn(r, 8), "x.0.b": torch.randn(6, r)}


def test_toylora_equals_its_dense_products(shared_adapters: Path) -> None:
    path = shared_adapters / "toylora" / "finetuned.pth"
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    adapter = load_adapter(path, pattern=TOYLORA, alpha=32)
    assert adapter.format == "pattern"
    assert list(adapter) == ["0", "1", "2", "3"]
    for name, update in adapter.items():
        a, b = (tensors[f"lora_layers.{name}.lora_{side}"].double().numpy() for side in "AB")
        oracle = 32 / 16 * (a @ b).T
        assert update.shape == adapter.modules[name].shape == oracle.shape
        np.testing.assert_allclose(update.dense().numpy(), oracle, rtol=0, atol=DENSE)
        assert np.abs(oracle).max() > 1e-3
        assert (adapter.modules[name].r, adapter.modules[name].scale_source) == (16, "caller")
    assert set(adapter.ledger) == set(tensors)
    assert {entry.reason for entry in adapter.unused} == {"not named by the pattern"}
    assert adapter.notes == ()


def test_modules_take_the_base_names_of_the_template(shared_adapters: Path) -> None:
    path = shared_adapters / "toylora" / "finetuned.pth"
    # The file repeats the base's tensors beside the factors.
    adapter = load_adapter(path, pattern=f"{TOYLORA} as=lora_layers.{{module}}.original_layer", alpha=32)
    base = load_base(path)
    weights = torch.load(shared_adapters / "toylora" / "pretrained.pth", map_location="cpu", weights_only=True)
    assert list(adapter) == [f"lora_layers.{i}.original_layer" for i in range(4)]
    for name, layer in zip(adapter, (0, 3, 6, 9), strict=True):
        matrix = base.matrix(adapter.targets[name], adapter.modules[name].shape)
        assert torch.equal(matrix, weights[f"network.{layer}.weight"])


def test_it_pickles_and_reads_the_same_numbers(tmp_path: Path) -> None:
    adapter = load_adapter(written(tmp_path, factors()), pattern=PLAIN, alpha=2)
    again = pickle.loads(pickle.dumps(adapter))
    assert again.format == "pattern"
    assert torch.equal(again["x.0"].dense(), adapter["x.0"].dense())


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_either_factor_may_be_transposed(tmp_path: Path, transposed: tuple[bool, bool]) -> None:
    a, b = factors().values()
    path = written(tmp_path, {"a.q": a.T if transposed[0] else a, "b.q": b.T if transposed[1] else b})
    ends = [".T" if turned else "" for turned in transposed]
    update = load_adapter(path, pattern=f"up=b.{{module}}{ends[1]} down=a.{{module}}{ends[0]}", alpha=6)["q"]
    torch.testing.assert_close(update.dense(), 2 * b.double() @ a.double())
    assert not math.isnan(update.eps)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_alphas_are_read_from_tensors(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = written(tmp_path, factors() | {"x.0.alpha": torch.full(shape, 12.0, dtype=torch.float16)})
    adapter = load_adapter(path, pattern=PLAIN + " alpha={module}.alpha")
    assert (adapter.modules["x.0"].scale, adapter.modules["x.0"].scale_source) == (4.0, "tensor")
    assert adapter.ledger["x.0.alpha"] == "used by x.0"
    overridden = load_adapter(path, pattern=PLAIN + " alpha={module}.alpha", alpha=6)
    assert (overridden.modules["x.0"].scale, overridden.modules["x.0"].scale_source) == (2.0, "caller")


def test_without_alpha_the_scale_is_unknown(tmp_path: Path) -> None:
    adapter = load_adapter(written(tmp_path, factors()), pattern=PLAIN)
    assert adapter.modules["x.0"].scale_source == "unknown"
    assert adapter.notes == (
        "the pattern names no alpha: the scale is unknown. Pass alpha=, or name its tensors by alpha=….",
    )
    with pytest.raises(UndefinedUpdateError, match="Pass alpha="):
        adapter["x.0"].norm()


@pytest.mark.parametrize("kernel", [(3, 2), (5,)], ids=str)
def test_convolutions_are_unfolded(tmp_path: Path, kernel: tuple[int, ...]) -> None:
    convolution = nn.Conv2d if len(kernel) == 2 else nn.Conv1d
    down = convolution(4, 3, kernel, bias=False, dtype=torch.float64)  # type: ignore[arg-type]
    up = convolution(3, 6, (1,) * len(kernel), bias=False, dtype=torch.float64)  # type: ignore[arg-type]
    path = written(tmp_path, {"c.a": down.weight.detach(), "c.b": up.weight.detach()})
    adapter = load_adapter(path, pattern=PLAIN, alpha=3)
    assert adapter.targets["c"] == Target("c.weight", kernel=kernel)
    both = convolution(4, 6, kernel, bias=False, dtype=torch.float64)  # type: ignore[arg-type]
    both.weight.data = adapter["c"].dense().reshape(both.weight.shape)
    x = torch.randn(2, 4, *(9,) * len(kernel), dtype=torch.float64)
    torch.testing.assert_close(up(down(x)), both(x))


def test_a_forgotten_transposition_is_noted_or_refused(tmp_path: Path) -> None:
    square = {"q.a": torch.ones(8, 3), "q.b": torch.ones(3, 8)}
    adapter = load_adapter(written(tmp_path, square), pattern=PLAIN, alpha=1)
    assert adapter.notes == ("'q': r=8 exceeds both sides of 3x3; is .T missing in pattern=?",)
    (tmp_path / "oblong").mkdir()
    path = written(tmp_path / "oblong", {"q.a": torch.ones(8, 3), "q.b": torch.ones(3, 6)})
    with pytest.raises(AdapterFormatError, match=r"share r, got \(8, 3\) and \(3, 6\).*takes \.T behind its name"):
        load_adapter(path, pattern=PLAIN)
    with pytest.raises(AdapterFormatError, match=r"expected down \(d_in, r\) and up \(d_out, r\)"):
        load_adapter(path, pattern="down={module}.a.T up={module}.b")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "expected down= and up=, down= is missing in ''. Such as 'down="),
        ("down={module}.a", "up= is missing in 'down={module}.a'"),
        ("down={module}.a up=b", "expected exactly one {module} in up=, got 'b'"),
        ("down={module}.{module} up={module}.b", "expected exactly one {module} in down=, got '{module}.{module}'"),
        ("down={module}.a up={module}.b up={module}.c", "expected up= once, got it again as 'up={module}.c'"),
        ("down={module}.a up={module}.a.T", "expected different names for down, up and alpha"),
        ("down={module}.a up={module}.b rank={module}.r", "expected down=, up=, alpha=, as= parts, got 'rank="),
        ("{module}.a {module}.b", "expected down=, up=, alpha=, as= parts, got '{module}.a'"),
        ("down={module}.a up={modules}.b", "expected exactly one {module} in up=, got '{modules}.b'"),
        ("down={module}.{x}.a up={module}.b", "expected no braces but those of {module} in down="),
        ("down={module}.a up={module}.b as=network", "expected exactly one {module} in as=, got 'network'"),
    ],
    ids=str,
)
def test_patterns_that_are_none_are_named(tmp_path: Path, text: str, match: str) -> None:
    path = written(tmp_path, factors())
    with pytest.raises(ValueError, match=r"^pattern: ") as caught:
        load_adapter(path, pattern=text)
    assert match in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pattern_reads_a_file_of_any_other_format(tmp_path: Path) -> None:
    kohya = {"lora_unet_x.lora_down.weight": torch.randn(3, 8), "lora_unet_x.lora_up.weight": torch.randn(6, 3)}
    path = written(tmp_path, kohya)
    pattern = "down=lora_unet_{module}.lora_down.weight up=lora_unet_{module}.lora_up.weight as=unet.{module}"
    for format in (None, "pattern"):
        assert list(load_adapter(path, pattern=pattern, format=format)) == ["unet.x"]
    with pytest.raises(ValueError, match="pattern: expected format='pattern' beside it or none, got format='kohya'"):
        load_adapter(path, pattern=pattern, format="kohya")
    with pytest.raises(ValueError, match="pattern: expected names of tensors beside format='pattern', such as"):
        load_adapter(path, format="pattern")
    assert not by_pattern.matches(StateDict(kohya), {})


def test_modules_may_hold_dots_and_anything_else(tmp_path: Path) -> None:
    names = ["a.b.c", "a(b)[c]*", "a\n\x1b[31mb"]
    shapes = {"down": (9, 2), "up": (2, 9)}
    path = written(tmp_path, {f"{kind}.{name}": torch.ones(shape) for name in names for kind, shape in shapes.items()})
    adapter = load_adapter(path, pattern="down=down.{module} up=up.{module}", alpha=1)
    assert set(adapter) == set(names)
    assert all(note.isprintable() for note in adapter.notes)


BAD: dict[str, tuple[dict[str, Tensor], str, str]] = {
    "unpaired": ({"x.a": torch.ones(3, 8)}, PLAIN, r"'x': expected down, up, 'x\.b' \(up\) is missing"),
    "no alpha": (factors(), PLAIN + " alpha={module}.alpha", r"'x\.0': .* 'x\.0\.alpha' \(alpha\) is missing"),
    "nothing": ({"y": torch.ones(3)}, PLAIN, r"tensors called '{module}\.a', found none among 1 \(first: 'y'\)"),
    "vectors": ({"x.a": torch.ones(3), "x.b": torch.ones(6, 3)}, PLAIN, r"'x': expected down \(r, d_in\).*\(3,\)"),
    "no r": ({"x.a": torch.ones(0, 8), "x.b": torch.ones(6, 0)}, PLAIN, r"'x': expected.*got \(0, 8\) and \(6, 0\)"),
    "up with a kernel": (
        {"x.a": torch.ones(3, 8), "x.b": torch.ones(6, 3, 2, 2)},
        PLAIN,
        r"to share r, got \(3, 8\) and \(6, 3, 2, 2\)",
    ),
    "a transposed kernel": (
        {"x.a": torch.ones(3, 3, 3, 3), "x.b": torch.ones(3, 3)},
        "down={module}.a.T up={module}.b",
        r"expected down \(d_in, r\)",
    ),
    "two kinds": (
        {"x.a": torch.ones(3, 8), "x.b.a": torch.ones(6, 3)},
        "down={module}.a up={module}.b.a",
        r"'x\.b\.a': expected a tensor of one kind, got one that both down= and up=",
    ),
    "alpha of NaN": (
        factors() | {"x.0.alpha": torch.tensor(math.nan)},
        PLAIN + " alpha={module}.alpha",
        r"'x\.0\.alpha': expected a plausible finite number, got nan",
    ),
    "alphas": (
        factors() | {"x.0.alpha": torch.ones(2)},
        PLAIN + " alpha={module}.alpha",
        r"'x\.0\.alpha': expected one number, got shape \(2,\)",
    ),
    "integers": (
        {"x.a": torch.ones(3, 8, dtype=torch.int64), "x.b": torch.ones(6, 3)},
        PLAIN,
        "'x': expected floating-point factors, got torch.int64",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    tensors, pattern, match = BAD[case]
    path = written(tmp_path, tensors)
    with pytest.raises(AdapterFormatError, match=match) as caught:
        load_adapter(path, pattern=pattern)
    assert str(caught.value).startswith(str(path))


def test_templates_say_what_they_match() -> None:
    templates = parse_pattern("  down=layers.{module}.w.T   up={module}/up\talpha=alphas.{module} ")
    assert {key: str(template) for key, template in templates.items()} == {
        "down": "layers.{module}.w",
        "up": "{module}/up",
        "alpha": "alphas.{module}",
    }
    assert [template.transposed for template in templates.values()] == [True, False, False]
    assert templates["down"].module("layers.w") is None
    assert templates["down"].module("layers.layers.w.w") == "layers.w"

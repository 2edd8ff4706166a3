"""Every conversion is read back: a writer that errs is caught, and whatever fails leaves everything as it was."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convertible import OPTIONS, destination, diffusion_model, language_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_analysis.adapter import Adapter, Target
from lora_analysis.base import load_base
from lora_analysis.convert import convert
from lora_analysis.errors import LoraAnalysisError, UndefinedUpdateError, UnsupportedAdapterError
from lora_analysis.formats import load_adapter, save_adapter, saving
from lora_analysis.formats.writers import WRITERS, Part, WriteOptions, Written
from lora_analysis.update import LowRankUpdate

FIRST = "model.layers.0.self_attn.q_proj"


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def mutate(monkeypatch: pytest.MonkeyPatch, to: str, change: Callable[[list[Part]], list[Part]]) -> None:
    """Let a writer write other parts than it is given, and say nothing of it."""
    honest = WRITERS[to]

    def write(parts: Sequence[Part], adapter: Adapter, path: Path, options: WriteOptions) -> Written:
        written = honest.write(change(list(parts)), adapter, path, options)
        return Written(parts, {part.name: written.names.get(part.name, part.name) for part in parts})

    monkeypatch.setitem(WRITERS, to, honest._replace(write=write))  # type: ignore[arg-type]


def scaled_by(factor: float) -> Callable[[list[Part]], list[Part]]:
    return lambda parts: [replace(parts[0], up=parts[0].up * factor), *parts[1:]]


def turned(parts: list[Part]) -> list[Part]:
    return [replace(parts[0], up=parts[0].up.flip(0)), *parts[1:]]


def exchanged(parts: list[Part]) -> list[Part]:
    """Two modules of one shape, each with the other's factors."""
    same = [part for part in parts if part.update.shape == parts[0].update.shape]
    a, b = same[:2]
    swapped = {a.name: replace(a, up=b.up, down=b.down), b.name: replace(b, up=a.up, down=a.down)}
    return [swapped.get(part.name, part) for part in parts]


@pytest.mark.parametrize(
    "change",
    [scaled_by(1.0001), scaled_by(-1), scaled_by(0), turned, exchanged],
    ids=["scale", "sign", "zero", "rows", "modules"],
)
@pytest.mark.parametrize("to", OPTIONS)
def test_a_writer_that_changes_an_update_is_caught_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, change: Callable[[list[Part]], list[Part]]
) -> None:
    adapter, path = language_model(), destination(tmp_path, to)
    convert(adapter, path, to=to, **OPTIONS[to])
    before = everything_in(tmp_path)
    mutate(monkeypatch, to, change)
    match = r"what was written is not the adapter when read back: ΔW of '.*q_proj' differs by a norm of .* Nothing is"
    for target in (path, destination(tmp_path / "new" / "deeper", to)):
        with pytest.raises(LoraAnalysisError, match=match):
            convert(adapter, target, to=to, **OPTIONS[to])
        assert everything_in(tmp_path) == before
        assert not (tmp_path / "new").exists()


def without_first(parts: list[Part]) -> list[Part]:
    return parts[1:]


def with_another(parts: list[Part]) -> list[Part]:
    name = "model.layers.7.mlp.up_proj"
    return [*parts, replace(parts[0], name=name, target=Target(f"{name}.weight"))]


def wider(parts: list[Part]) -> list[Part]:
    return [replace(parts[0], down=torch.cat([parts[0].down, parts[0].down], dim=1)), *parts[1:]]


def with_magnitudes(parts: list[Part]) -> list[Part]:
    return [replace(part, magnitude=torch.ones(len(part.up))) for part in parts]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without_first, f"'{FIRST}' is missing"),
        (with_another, "it has a module 'model.layers.7.mlp.up_proj', which was not written"),
        (wider, rf"'{FIRST}' is of shape \(32, 64\), not \(32, 32\)"),
        (with_magnitudes, f"'{FIRST}' has a magnitude of DoRA"),
    ],
    ids=["missing", "more", "shape", "magnitude"],
)
@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_a_writer_of_other_modules_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, change: Callable[[list[Part]], list[Part]], match: str
) -> None:
    mutate(monkeypatch, to, change)
    with pytest.raises(LoraAnalysisError, match=match):
        convert(language_model(), tmp_path / "out", to=to)
    assert everything_in(tmp_path) == {}


@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_magnitudes_written_along_another_axis_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """Those of a square weight are as many either way, so that their numbers alone would not show it."""
    adapter = Adapter({FIRST: LowRankUpdate(torch.randn(8, 2), torch.randn(2, 8), 1.5)})
    magnitude = torch.rand(8) + 1
    described = replace(adapter.modules[FIRST], magnitude=lambda: magnitude, flags=("dora-low-rank-part",))
    adapter.modules = {FIRST: replace(described, magnitude_axis=0)}
    mutate(monkeypatch, to, lambda parts: [replace(part, magnitude_axis=1) for part in parts])
    with pytest.raises(LoraAnalysisError, match=f"'{FIRST}' has another magnitude of DoRA"):
        convert(adapter, tmp_path / "out", to=to)
    assert everything_in(tmp_path) == {}


def fused() -> tuple[Adapter, dict[str, Tensor]]:
    """Two blocks of three, of 8 rows each."""
    rows = {"q": (0, 8), "v": (16, 24)}
    blocks = {
        f"h.0.c_attn.{n}": LowRankUpdate(torch.randn(8, 2), torch.randn(2, 6), 0.7 + i) for i, n in enumerate(rows)
    }
    targets = {f"h.0.c_attn.{n}": Target("h.0.c_attn.weight", rows=rows[n]) for n in rows}
    return Adapter(blocks, targets=targets), {"h.0.c_attn.weight": torch.randn(24, 6)}


@pytest.mark.parametrize("block", [0, 1])
def test_blocks_are_compared_one_by_one_and_the_rows_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    adapter, base = fused()
    done = convert(adapter, tmp_path / "out", to="peft", base=load_base(base))
    assert (done.modules, set(done.errors)) == (1, set(adapter))

    def change(parts: list[Part]) -> list[Part]:
        up = parts[0].up.clone()
        up[16 * block : 16 * block + 8] *= 1.01
        return [replace(parts[0], up=up)]

    mutate(monkeypatch, "peft", change)
    with pytest.raises(LoraAnalysisError, match=f"ΔW of 'h.0.c_attn.{'qv'[block]}' differs"):
        convert(adapter, tmp_path / "other", to="peft", base=load_base(base))
    mutate(monkeypatch, "peft", lambda parts: [replace(parts[0], up=parts[0].up + 1.0)])
    monkeypatch.setattr(
        sys.modules["lora_analysis.convert"], "_EXACT", 100.0
    )  # so that only the rest of the rows can tell
    with pytest.raises(LoraAnalysisError, match=r"'h\.0\.c_attn' changes rows that no module changes"):
        convert(adapter, tmp_path / "other", to="peft", base=load_base(base))


def test_a_fused_weight_that_the_reader_takes_apart_again_is_compared(tmp_path: Path) -> None:
    """As kohya's reader does with qkv of Flux that were trained in blocks."""
    name = "transformer.double_blocks.0.img_attn.qkv"
    rows = {"q": (0, 8), "k": (8, 16), "v": (16, 24)}
    adapter = Adapter(
        {f"{name}.{n}": LowRankUpdate(torch.randn(8, 2), torch.randn(2, 8), 1.5) for n in rows},
        targets={f"{name}.{n}": Target(f"{name}.weight", rows=between) for n, between in rows.items()},
    )
    base = load_base({f"{name}.weight": torch.zeros(24, 8)})
    done = convert(adapter, tmp_path / "out.safetensors", to="kohya", base=base)
    assert set(done.errors) == set(adapter)
    assert done.largest_error < 1e-7
    assert len(load_adapter(tmp_path / "out.safetensors")) == 3


@pytest.mark.parametrize("to", OPTIONS)
def test_an_adapter_may_be_converted_onto_itself(tmp_path: Path, to: str) -> None:
    path = destination(tmp_path, to)
    convert(language_model(), path, to=to, **OPTIONS[to])
    original = load_adapter(path)
    dense = {name: update.dense() for name, update in original.items()}
    if to != "gguf":  # whose own names need a base
        done = convert(path, path, to=to, dtype=torch.bfloat16, **OPTIONS[to] if to != "diffusers" else {})
        assert 1e-4 < done.largest_error < 1e-2
        for name, update in load_adapter(path).items():
            error = float((update.dense() - dense[name]).norm() / dense[name].norm())
            assert error == pytest.approx(done.errors[name], rel=1e-6)


@pytest.mark.parametrize("to", OPTIONS)
def test_a_place_of_another_kind_is_a_wrong_argument(tmp_path: Path, to: str) -> None:
    path = destination(tmp_path, to)
    directory = to in ("peft", "mlx")
    if directory:
        path.write_text("mine")
    else:
        path.mkdir()
    match = f"expected {'a directory' if directory else 'a file'} to write to, or nothing there"
    for write in (convert, save_adapter):
        with pytest.raises(ValueError, match=match):
            write(language_model(), path, **{"to" if write is convert else "format": to}, **OPTIONS[to])
    assert path.read_text() == "mine" if directory else path.is_dir()


@pytest.mark.parametrize(("there", "to"), [("peft", "mlx"), ("mlx", "peft")])
def test_the_configuration_of_another_adapter_is_not_overwritten(tmp_path: Path, there: str, to: str) -> None:
    convert(language_model(), tmp_path, to=there)
    before = everything_in(tmp_path)
    for write in (convert, save_adapter):
        with pytest.raises(ValueError, match="expected a directory without another adapter in it, found 'adapter"):
            write(language_model(), tmp_path, **{"to" if write is convert else "format": to})
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors", "7_adapters.safetensors"]
)
@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_a_file_that_would_be_read_with_anothers_configuration_is_not_written(
    tmp_path: Path, to: str, name: str
) -> None:
    convert(language_model(scale=2.0), tmp_path, to="peft")
    before = everything_in(tmp_path)
    for write in (convert, save_adapter):
        with pytest.raises(ValueError, match=r"expected no adapter_config\.json beside a file of this name"):
            write(
                language_model(scale=3.0),
                tmp_path / name,
                **{"to" if write is convert else "format": to},
                **OPTIONS[to],
            )
    assert everything_in(tmp_path) == before
    # By another name it is read alone.
    done = convert(language_model(scale=3.0), tmp_path / "mine.safetensors", to=to, **OPTIONS[to])
    assert {module.scale for module in load_adapter(done.path).modules.values()} == {3.0}


@pytest.mark.parametrize(
    ("to", "name"),
    [("kohya", "x.gguf"), ("kohya", "x.bin"), ("diffusers", "x.npz"), ("gguf", "x.safetensors"), ("gguf", "x.pt")],
)
def test_a_name_of_another_format_is_a_wrong_argument(tmp_path: Path, to: str, name: str) -> None:
    for write in (convert, save_adapter):
        with pytest.raises(
            ValueError, match=r"expected a name that ends in \.\w+, the format's own, got \.\w+, another"
        ):
            write(language_model(), tmp_path / name, **{"to" if write is convert else "format": to}, **OPTIONS[to])
    assert everything_in(tmp_path) == {}
    assert len(load_adapter(convert(language_model(), tmp_path / "x.v2", to=to, **OPTIONS[to]).path)) == 6


@pytest.mark.parametrize("to", OPTIONS)
def test_a_place_inside_a_file_is_a_wrong_argument(tmp_path: Path, to: str) -> None:
    (tmp_path / "file").write_text("mine")
    for write in (convert, save_adapter):
        with pytest.raises(ValueError, match=r"expected a place in a directory, but .*file is a file"):
            write(
                language_model(),
                destination(tmp_path / "file", to),
                **{"to" if write is convert else "format": to},
                **OPTIONS[to],
            )
    assert everything_in(tmp_path) == {"file": b"mine"}


def test_a_directory_where_a_file_is_to_be_leaves_everything_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").mkdir()
    for write in (convert, save_adapter):
        with pytest.raises(ValueError, match=r"expected a file or nothing at 'adapter_config\.json', got a directory"):
            write(language_model(), tmp_path, **{"to" if write is convert else "format": "peft"})
    assert everything_in(tmp_path) == {}


@pytest.mark.parametrize("write", [convert, save_adapter])
@pytest.mark.parametrize("there", [False, True])
def test_an_interruption_never_leaves_files_of_two_writings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., object], there: bool
) -> None:
    """New weights beside an old configuration would be read, with the wrong scale."""
    if there:
        convert(language_model(scale=2.0), tmp_path, to="peft")
    before, replaced = everything_in(tmp_path), os.replace
    names = {"adapter_config.json", "adapter_model.safetensors"}
    # The old ones are set aside and the new ones moved; convert's are put into its draft before.
    moves = (4 if there else 2) + (2 if write is convert else 0)
    for failing in range(moves + 1):
        calls = itertools.count()

        def interrupted(source: Path, target: Path, failing: int = failing, calls: Iterator[int] = calls) -> None:
            if names <= {path.name for path in tmp_path.iterdir()}:
                assert everything_in(tmp_path).items() >= before.items()
            if next(calls) == failing:
                raise KeyboardInterrupt
            replaced(source, target)

        monkeypatch.setattr(saving.os, "replace", interrupted)
        options = {"to" if write is convert else "format": "peft"}
        if failing == moves:
            write(language_model(scale=3.0), tmp_path, **options)
            break
        with pytest.raises(KeyboardInterrupt):
            write(language_model(scale=3.0), tmp_path, **options)
        assert everything_in(tmp_path) == before
    assert {module.scale for module in load_adapter(tmp_path).modules.values()} == {3.0}


def test_a_draft_lies_in_the_directory_it_is_for(tmp_path: Path) -> None:
    """What that lies in may be another disk, onto which nothing is moved, or closed to the caller."""
    (tmp_path / "out").mkdir()
    for path, near in ((tmp_path / "out", tmp_path / "out"), (tmp_path / "a" / "b", tmp_path)):
        with saving.draft(path, ["x"]) as first:
            assert first.parent.parent == near
            first.mkdir()
            (first / "x").write_text("x")
    assert everything_in(tmp_path) == {"out/x": b"x", "a/b/x": b"x"}


@pytest.mark.parametrize("to", OPTIONS)
def test_what_is_written_is_as_readable_as_any_new_file(tmp_path: Path, to: str) -> None:
    (tmp_path / "any").touch()
    mode = (tmp_path / "any").stat().st_mode
    convert(language_model(), destination(tmp_path, to), to=to, **OPTIONS[to])
    assert {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()} == {mode}


def test_a_working_directory_may_be_the_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    convert(language_model(), ".", to="peft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    convert(language_model(), "out.gguf", to="gguf", **OPTIONS["gguf"])
    assert len(load_adapter("out.gguf")) == 6


@pytest.mark.parametrize("to", OPTIONS)
def test_scales_that_no_reader_takes_are_named(tmp_path: Path, to: str) -> None:
    for write in (convert, save_adapter):
        with pytest.raises(
            UnsupportedAdapterError, match=rf"'{FIRST}': expected a plausible scale to save, got 1e\+308"
        ):
            write(
                language_model(scale=1e308),
                destination(tmp_path, to),
                **{"to" if write is convert else "format": to},
                **OPTIONS[to],
            )
    assert everything_in(tmp_path) == {}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    adapter = language_model()
    update = adapter[FIRST]
    assert isinstance(update, LowRankUpdate)
    update.up[0, 0] = value
    with pytest.raises(UndefinedUpdateError, match=f"llama: '{FIRST}': expected finite numbers to save"):
        convert(adapter, tmp_path / "out", to="peft")
    infinite = Adapter({"q": LowRankUpdate(torch.ones(2, 1), torch.ones(1, 2), torch.inf)})
    with pytest.raises(UndefinedUpdateError, match="'q': expected finite numbers to save"):
        convert(infinite, tmp_path / "out", to="peft")
    assert everything_in(tmp_path) == {}


def test_numbers_beyond_the_dtype_are_named(tmp_path: Path) -> None:
    adapter = Adapter({"q": LowRankUpdate(torch.full((3, 1), 1e6), torch.ones(1, 4), 1.0)})
    with pytest.raises(UnsupportedAdapterError, match=r"'q': expected factors within the range of torch\.float16"):
        convert(adapter, tmp_path / "out", to="peft", dtype=torch.float16)


def test_options_of_loading_need_something_to_load(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="alpha: options of load_adapter, and this adapter is loaded already"):
        convert(language_model(), tmp_path / "out", to="peft", alpha=3)
    with pytest.raises(ValueError, match="r: expected a positive integer, got 0"):
        convert(language_model(), tmp_path / "out", to="peft", r=0)


def test_experts_are_refused_with_the_reason(tmp_path: Path) -> None:
    name = "layers.0.experts.up_proj.0"
    adapter = Adapter(
        {name: LowRankUpdate(torch.ones(2, 1), torch.ones(1, 2), 1.0)},
        targets={name: Target("layers.0.experts.up_proj", expert=0)},
    )
    for to, options in OPTIONS.items():
        with pytest.raises(UnsupportedAdapterError, match=f"'{name}': .* one of many experts: these are read, and not"):
            convert(adapter, destination(tmp_path, to), to=to, **options)


def test_the_command_of_the_readme_writes_gguf_and_reads_it_back(tmp_path: Path) -> None:
    """--heads is for GGUF, and means nothing to the PEFT adapter that is read."""
    convert(language_model(), tmp_path / "r8", to="peft")
    command = [sys.executable, "-m", "lora_analysis", "convert", "r8", "r8.gguf", "--to", "gguf"]
    run = subprocess.run(
        [*command, "--architecture", "llama", "--heads", "4,2", "--json"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    done = json.loads(run.stdout)
    assert (done["modules"], done["losses"]) == (6, [])
    assert done["largest_error"] < 1e-12


def test_heads_turn_what_either_format_has_interleaved(tmp_path: Path) -> None:
    adapter = language_model()
    base = load_base({f"{name}.weight": torch.zeros(update.shape) for name, update in adapter.items()})
    convert(adapter, tmp_path / "out.gguf", to="gguf", architecture="llama", heads=(4, 2))
    convert(tmp_path / "out.gguf", tmp_path / "back", to="peft", base=base, heads=(4, 2))
    back = load_adapter(tmp_path / "back")
    for name, update in adapter.items():
        torch.testing.assert_close(back[name].dense(), update.dense(), rtol=1e-6, atol=1e-6)


def test_names_of_other_formats_need_a_base(tmp_path: Path) -> None:
    convert(diffusion_model(), tmp_path / "in.safetensors", to="kohya")
    convert(language_model(), tmp_path / "in.gguf", to="gguf", **OPTIONS["gguf"])
    tune = {f"layers.0.attn.q_proj.lora_{side}.weight": torch.ones(8, 8) for side in "ab"}
    save_file(tune, tmp_path / "tune.safetensors")
    save_file({"unet:0:up": torch.ones(4, 2), "unet:0:down": torch.ones(2, 4)}, tmp_path / "list.safetensors")
    for source, to, match in (
        ("in.safetensors", "peft", "'lora_te_.*': expected the base's own name .* peft needs, got kohya's. Pass base="),
        ("in.safetensors", "diffusers", "got kohya's. Pass base="),
        ("in.gguf", "peft", "'blk.0.attn_k': .* got GGUF's. Pass base="),
        ("tune.safetensors", "mlx", "'layers.0.attn.q_proj': .* got torchtune's. Pass heads= or base="),
        ("list.safetensors", "peft", "'unet.0': .* got its number in the file. The file does not say more"),
        ("list.safetensors", "kohya", "'unet.0': .* which kohya needs, got its number in the file"),
    ):
        with pytest.raises(UnsupportedAdapterError, match=match):
            convert(
                tmp_path / source, destination(tmp_path / "out", to), to=to, **{"alpha": 8} if source[0] == "t" else {}
            )
    # To kohya's own they go as they are.
    done = convert(tmp_path / "in.safetensors", tmp_path / "again.safetensors", to="kohya", dtype=torch.float16)
    assert load_file(tmp_path / "again.safetensors").keys() == load_file(tmp_path / "in.safetensors").keys()
    assert len(done.losses) == 1

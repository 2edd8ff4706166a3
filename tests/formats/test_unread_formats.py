"""Formats and kinds that are known and not read: refused by name, in one line, never half read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_analysis.checkpoint import StateDict
from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError
from lora_analysis.formats import FORMATS, load_adapter, unread

# Keys as the writers' own source code makes them.
KEYS: dict[str, tuple[list[str], str]] = {
    "BOFT": (["base_model.model.q.boft_R", "base_model.model.q.boft_s"], "OFT or BOFT"),
    "OFT": (["base_model.model.q.oft_r"], "OFT or BOFT"),
    "IA3": (["base_model.model.q.ia3_l"], "IA3, which is no additive low-rank update"),
    "textual inversion": (["<cat>", "<hat>"], "learned token embeddings"),
}
NAMES = "gguf, mlx, torchtune, lycoris, diffusers, kohya, peft, loralib, sam_lora, cloneofsimo, pattern"


def written(folder: Path, names: list[str], **metadata: str) -> Path:
    path = folder / "adapter.safetensors"
    save_file({name: torch.ones(2, 2) for name in names}, path, metadata=metadata or None)
    return path


@pytest.mark.parametrize("format", KEYS)
def test_known_formats_are_refused_by_name(tmp_path: Path, format: str) -> None:
    names, title = KEYS[format]
    path = written(tmp_path, names)
    with pytest.raises(UnsupportedAdapterError, match=f"holds {title}.*not read. Read are: {NAMES}") as caught:
        load_adapter(path, alpha=1)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", KEYS)
def test_order_of_the_tensors_does_not_matter(format: str) -> None:
    names, title = KEYS[format]
    for ordered in (names, names[::-1]):
        found = unread.recognised(StateDict(dict.fromkeys(ordered, torch.ones(1))), {})
        assert found is not None
        assert found.startswith(title)


@pytest.mark.parametrize(
    ("config", "title"),
    [
        ({"peft_type": "HIRA"}, "PEFT HIRA, which multiplies .*"),
        ({"peft_type": "PREFIX_TUNING"}, "PEFT PREFIX_TUNING, which changes no weight"),
    ],
    ids=str,
)
def test_a_configuration_names_its_format(tmp_path: Path, config: dict[str, Any], title: str) -> None:
    # Names that a reader here would take, so that only the configuration can tell.
    names = ["base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"]
    written(tmp_path, names).rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedAdapterError, match=f"holds {title}; it is not read"):
        load_adapter(tmp_path)


def test_a_header_names_its_format(tmp_path: Path) -> None:
    names = ["transformer.q.lora_A.weight", "transformer.q.lora_B.weight"]
    assert load_adapter(written(tmp_path, names, lora_adapter_metadata="{}")).format == "diffusers"
    assert load_adapter(written(tmp_path, names)).format == "peft"


@pytest.mark.parametrize(
    "names",
    [
        ["base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"],
        ["base_model.model.q.lora_A.default.weight", "base_model.model.q.lora_B.default.weight"],
        ["q.lora_A", "q.lora_B"],
        ["lora_A_block.q.lora_A", "lora_A_block.q.lora_B"],
    ],
    ids=str,
)
def test_formats_that_are_read_are_not_refused(names: list[str]) -> None:
    assert unread.recognised(StateDict(dict.fromkeys(names, torch.ones(1))), {}) is None
    assert unread.recognised(StateDict(dict.fromkeys(names, torch.ones(1))), {"peft_type": "LORA"}) is None


@pytest.mark.parametrize("names", [["foo.finegates_rows"], ["layers.0.weight", "layers.0.bias"], ["lora_A"]])
def test_an_unknown_file_is_described(tmp_path: Path, names: list[str]) -> None:
    match = rf"no known format matches its {len(names)} tensors \(first: '.*'\)\. Known: {NAMES}"
    with pytest.raises(AdapterFormatError, match=match):
        load_adapter(written(tmp_path, names))


def test_an_empty_file_is_described(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match=r"no known format matches its 0 tensors"):
        load_adapter(written(tmp_path, []))


def test_a_name_of_two_lines_stays_on_one(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match="no known format") as caught:
        load_adapter(written(tmp_path, ["a\nb\x1b[31m"]))
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_the_caller_may_name_the_format(tmp_path: Path) -> None:
    torch.save({"q.lora_A": torch.ones(1, 3), "q.lora_B": torch.ones(2, 1)}, tmp_path / "x.pt")
    assert load_adapter(tmp_path / "x.pt", format="loralib").format == "loralib"
    with pytest.raises(AdapterFormatError, match=r"expected LoRA factors, found none .*read as 'peft'"):
        load_adapter(tmp_path / "x.pt", format="peft")
    with pytest.raises(ValueError, match=f"format: expected one of {NAMES}, got 'onnx'"):
        load_adapter(tmp_path / "x.pt", format="onnx")


def test_every_format_has_a_name_and_a_reader() -> None:
    assert ", ".join(module.NAME for module in FORMATS) == NAMES
    for module in FORMATS:
        assert callable(module.matches)
        assert callable(module.read)


def test_missing_and_ambiguous_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match=r"nothing: no such file or directory\.$"):
        load_adapter(tmp_path / "nothing")
    for source in ("nothing.safetensors", "a/b/c", "x" * 5000):
        with pytest.raises(AdapterFormatError, match=r"no such file or directory\.$"):
            load_adapter(source)
    with pytest.raises(AdapterFormatError, match=r"or one file of tensors, found none\."):
        load_adapter(tmp_path)
    for name in ("a.pt", "b.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(AdapterFormatError, match=r"expected one file of tensors, found 2 \(a\.pt, b\.safetensors\)"):
        load_adapter(tmp_path)


def test_a_damaged_file_is_an_error_of_its_format(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(AdapterFormatError, match="got a Git LFS pointer"):
        load_adapter(tmp_path)
    torch.save([torch.ones(1), 3], tmp_path / "lists.pt")
    with pytest.raises(AdapterFormatError, match="expected a mapping of names to tensors, got a list"):
        load_adapter(tmp_path / "lists.pt")


def test_revisions_are_not_read_yet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="revision: expected None"):
        load_adapter(tmp_path, revision="main")

"""cloneofsimo: pairs by index, from named tensors and from bare lists, as its own layer adds them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_analysis.base import load_base
from lora_analysis.checkpoint import open_checkpoint
from lora_analysis.errors import AdapterFormatError, CheckpointError, UnsupportedAdapterError
from lora_analysis.formats import load_adapter

R = 2


class Injected(nn.Module):
    """A layer with a pair beside it, as ``LoraInjectedLinear`` runs it, whose scale is 1."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out)
        self.lora_down = nn.Linear(d_in, R, bias=False)
        self.lora_up = nn.Linear(R, d_out, bias=False)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) + self.lora_up(self.lora_down(x)) * self.scale
        return out


def layers() -> list[Injected]:
    return [Injected(d_in, d_out).double() for d_in, d_out in ((6, 8), (8, 6), (5, 9))]


def as_tensors(component: str, modules: list[Injected]) -> dict[str, Tensor]:
    sides = {"up": "lora_up", "down": "lora_down"}
    return {
        f"{component}:{i}:{side}": module.get_submodule(name).weight.detach()  # type: ignore[misc]
        for i, module in enumerate(modules)
        for side, name in sides.items()
    }


def written(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path = folder / "lora.safetensors"
    save_file(tensors, path, metadata=metadata)
    return path


def test_updates_are_what_the_layers_add(tmp_path: Path) -> None:
    unet, encoder = layers(), layers()
    tensors = as_tensors("unet", unet) | as_tensors("text_encoder", encoder) | {"<krk>": torch.ones(7)}
    metadata = {"unet": json.dumps(["CrossAttention"]), "<krk>": "<embed>"}
    metadata |= {f"unet:{i}:rank": str(R) for i in range(3)}
    path = written(tmp_path, tensors, metadata)
    adapter = load_adapter(path)
    assert adapter.format == "cloneofsimo"
    assert list(adapter) == [f"{part}.{i}" for part in ("text_encoder", "unet") for i in range(3)]
    for part, modules in (("unet", unet), ("text_encoder", encoder)):
        for i, module in enumerate(modules):
            eye = torch.eye(module.linear.in_features, dtype=torch.float64)
            with torch.no_grad():
                oracle = (module(eye) - module.linear(eye)).T.numpy()
            np.testing.assert_allclose(adapter[f"{part}.{i}"].dense().numpy(), oracle, atol=1e-12)
            assert adapter[f"{part}.{i}"].r == R
    assert {(m.scale, m.scale_source) for m in adapter.modules.values()} == {(1.0, "format default")}
    assert [(unused.tensor, unused.reason) for unused in adapter.unused] == [
        ("<krk>", "a learned token embedding (textual inversion), no part of any update")
    ]
    assert sorted(adapter.ledger) == sorted(tensors)
    assert adapter.notes == ()
    assert json.loads(adapter.metadata["unet"]) == ["CrossAttention"]


def test_a_list_is_read_by_its_positions(tmp_path: Path) -> None:
    tensors = as_tensors("unet", layers())
    torch.save([tensors[f"unet:{i}:{side}"] for i in range(3) for side in ("up", "down")], tmp_path / "lora.pt")
    adapter = load_adapter(tmp_path / "lora.pt")
    named = load_adapter(written(tmp_path, tensors))
    assert (adapter.format, list(adapter)) == ("cloneofsimo", ["lora.0", "lora.1", "lora.2"])
    assert adapter.modules["lora.1"].tensors == ("2", "3")
    assert sorted(adapter.ledger) == [str(i) for i in range(6)]
    for i in range(3):
        assert torch.equal(adapter[f"lora.{i}"].dense(), named[f"unet.{i}"].dense())


def test_alpha_of_the_caller_is_the_papers(tmp_path: Path) -> None:
    path = written(tmp_path, as_tensors("unet", layers()))
    assert {(m.scale, m.scale_source) for m in load_adapter(path, alpha=6).modules.values()} == {(3.0, "caller")}


def test_convolutions_are_unfolded(tmp_path: Path) -> None:
    """As ``LoraInjectedConv2d`` runs them."""
    up, down = torch.randn(6, R, 1, 1).double(), torch.randn(R, 4, 3, 3).double()
    adapter = load_adapter(written(tmp_path, {"unet:0:up": up, "unet:0:down": down}))
    assert adapter.targets["unet.0"].kernel == (3, 3)
    x = torch.randn(1, 4, 5, 5).double()
    kernel = adapter["unet.0"].dense().view(6, 4, 3, 3)
    chained = nn.functional.conv2d(nn.functional.conv2d(x, down), up)
    torch.testing.assert_close(nn.functional.conv2d(x, kernel), chained, rtol=0, atol=1e-12)


def test_a_rank_that_the_header_denies_is_reported(tmp_path: Path) -> None:
    path = written(tmp_path, as_tensors("unet", layers()), {"unet:1:rank": "4", "unet:2:rank": "\x1b[31m"})
    assert load_adapter(path).notes == (
        "'unet.1': the header says rank 4, the tensors have r=2; they win. The same of 1 other.",
    )
    path = written(tmp_path, as_tensors("unet", layers()), {"unet:2:rank": "\x1b[31m"})
    assert load_adapter(path).notes == ("'unet.2': the header says rank '\\x1b[31m', the tensors have r=2; they win.",)


def pair(up: tuple[int, ...], down: tuple[int, ...]) -> dict[str, Tensor]:
    return {"unet:0:up": torch.ones(up), "unet:0:down": torch.ones(down)}


BROKEN = {
    "ranks": (
        pair((8, 3), (2, 6)),
        r"'unet\.0': expected up \(out, r\) and down \(r, in\).* got \(8, 3\) and \(2, 6\)",
    ),
    "swapped": (pair((2, 6), (8, 2)), r"'unet\.0': expected up"),
    "vector": (pair((8,), (2, 6)), r"'unet\.0': expected up"),
    "kernel": (pair((8, 2, 3, 3), (2, 6, 3, 3)), r"'unet\.0': expected up"),
    "zero": (pair((8, 0), (0, 6)), r"'unet\.0': expected up"),
    "alone": ({"unet:0:up": torch.ones(8, 2)}, r"'unet\.0': expected up and down, got only up .* down is missing"),
    "integers": ({"unet:0:up": torch.ones(8, 2), "unet:0:down": torch.ones(2, 6).int()}, "floating-point factors"),
    "lora": (pair((8, 2), (2, 6)) | {"unet.lora_x": torch.ones(2)}, "'unet.lora_x': expected the tensors of LoRA"),
}


@pytest.mark.parametrize(("tensors", "match"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused(tmp_path: Path, tensors: dict[str, Tensor], match: str) -> None:
    with pytest.raises(AdapterFormatError, match=match):
        load_adapter(written(tmp_path, tensors))


def test_other_tensors_are_listed(tmp_path: Path) -> None:
    tensors = pair((8, 2), (2, 6)) | {"conv_in": torch.ones(8, 2), "<new>": torch.ones(4)}
    adapter = load_adapter(written(tmp_path, tensors))
    assert {unused.reason for unused in adapter.unused} == {"a tensor beside the factors, no part of any update"}
    assert sorted(adapter.ledger) == sorted(tensors)
    with pytest.raises(UnsupportedAdapterError, match="'unet:00:up': expected updates of one kind"):
        load_adapter(written(tmp_path, tensors | {"unet:00:up": torch.ones(8, 2)}))


LISTS: dict[str, tuple[list[Tensor], str]] = {
    "odd": ([torch.ones(8, 2)] * 3, r"expected a list of up, down, up, down, …, got an odd number of tensors \(3\)"),
    "order": ([torch.ones(2, 6), torch.ones(8, 2)], r"'lora\.0': expected up"),
    "vectors": ([torch.ones(2), torch.ones(2)], r"'lora\.0': expected up"),
}


@pytest.mark.parametrize(("content", "match"), LISTS.values(), ids=LISTS)
def test_a_list_of_something_else_is_refused(tmp_path: Path, content: list[Tensor], match: str) -> None:
    torch.save(content, tmp_path / "lora.pt")
    with pytest.raises(AdapterFormatError, match=match):
        load_adapter(tmp_path / "lora.pt")


def test_a_list_opens_as_numbered_tensors(tmp_path: Path) -> None:
    torch.save([torch.ones(2), nn.Parameter(torch.zeros(3))], tmp_path / "list.pt")
    checkpoint = open_checkpoint(tmp_path / "list.pt")
    assert (list(checkpoint), dict(checkpoint.metadata)) == (["0", "1"], {"container": "list"})
    assert checkpoint.shape("1") == (3,)
    torch.save([torch.eye(3).to_sparse()], tmp_path / "sparse.pt")
    with pytest.raises(CheckpointError, match=r"'0': expected dense \(strided\) tensors"):
        open_checkpoint(tmp_path / "sparse.pt")
    torch.save([], tmp_path / "empty.pt")
    with pytest.raises(CheckpointError, match=r"got a list\."):
        open_checkpoint(tmp_path / "empty.pt")


def test_textual_inversion_is_no_adapter(tmp_path: Path) -> None:
    torch.save({"<a>": torch.ones(4), "<b>": torch.ones(4)}, tmp_path / "a.ti.pt")
    with pytest.raises(UnsupportedAdapterError, match=r"holds learned token embeddings \(textual inversion\)"):
        load_adapter(tmp_path / "a.ti.pt")


def test_a_base_says_nothing_of_where_its_layers_are(tmp_path: Path) -> None:
    path = written(tmp_path, as_tensors("unet", layers()))
    assert load_adapter(path).notes == ()
    (note,) = load_adapter(path, base=load_base({"unet.mid_block.conv.weight": torch.ones(2, 2)})).notes
    assert note == "the file does not name its layers, so that base= says nothing of where they are."


def test_an_adapter_pickles_as_its_source(tmp_path: Path) -> None:
    tensors = as_tensors("unet", layers())
    torch.save([tensors[f"unet:{i}:{side}"] for i in range(3) for side in ("up", "down")], tmp_path / "lora.pt")
    adapter = load_adapter(tmp_path / "lora.pt", alpha=4)
    again = pickle.loads(pickle.dumps(adapter))
    assert torch.equal(again["lora.2"].dense(), adapter["lora.2"].dense())


@pytest.mark.parametrize(("file", "r"), [("analog_svd_rank4", 4), ("lora_disney", 1)])
def test_real_named_files_are_accounted_for(shared_adapters: Path, file: str, r: int) -> None:
    path = shared_adapters / "cloneofsimo" / f"{file}.safetensors"
    tensors = load_file(path)
    adapter = load_adapter(path)
    assert len(adapter) == 192
    assert list(adapter) == [f"text_encoder.{i}" for i in range(48)] + [f"unet.{i}" for i in range(144)]
    assert sorted(adapter.ledger) == sorted(tensors)
    assert [unused.tensor for unused in adapter.unused] == (["<s1>", "<s2>"] if file == "lora_disney" else [])
    assert adapter.notes == ()
    assert {(module.r, module.scale) for module in adapter.modules.values()} == {(r, 1.0)}


@pytest.mark.parametrize(
    ("file", "modules", "zeros"),
    [("lora_pop.pt", 128, list(range(3, 128, 4))), ("lora_kiriko2.text_encoder.pt", 48, [])],
)
def test_real_lists_hold_updates_of_zero(shared_adapters: Path, file: str, modules: int, zeros: list[int]) -> None:
    adapter = load_adapter(shared_adapters / "cloneofsimo" / file)
    assert (len(adapter), len(adapter.ledger), adapter.unused) == (modules, 2 * modules, ())
    assert [i for i, update in enumerate(adapter.values()) if update.norm() == 0] == zeros

"""Every option of ``load_adapter`` in every format: used, or refused in one line; never without effect in silence."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_analysis.adapter import Adapter
from lora_analysis.checkpoint import StateDict
from lora_analysis.errors import AdapterFormatError, UnsupportedAdapterError
from lora_analysis.formats import FORMATS, load_adapter
from lora_analysis.formats.options import ReadOptions

R, D_IN, D_OUT = 2, 8, 24
LORA = {"peft_type": "LORA", "r": R, "lora_alpha": 6}
Q = "model.layers.0.self_attn.q_proj"
TURNED = "layers.0.attn.q_proj"
FUSED = "h.0.attn.c_attn"


def down(*lead: int) -> Tensor:
    return torch.randn(*lead, R, D_IN)


def up() -> Tensor:
    return torch.randn(D_OUT, R)


def pair(stem: str, down_end: str, up_end: str) -> dict[str, Tensor]:
    return {f"{stem}{down_end}": down(), f"{stem}{up_end}": up()}


SAM = {f"w_{side}_{i:03d}": torch.randn(*((R, D_IN) if side == "a" else (D_IN, R))) for i in (0, 1) for side in "ab"}
GGUF = {
    "general.type": "adapter",
    "adapter.type": "lora",
    "general.architecture": "llama",
    "adapter.lora.alpha": "6",
}
HADAMARD = {f"hada_w{i}_{side}": (D_OUT, R) if side == "a" else (R, D_IN) for i in (1, 2) for side in "ab"}

# Tensors, header and adapter_config.json of a file that detection takes for the format; by hand where it has a pattern.
FILES: dict[str, tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]] = {
    "gguf": (pair("blk.0.attn_q.weight", ".lora_a", ".lora_b"), GGUF, {}),
    "mlx": (
        {f"{Q}.lora_a": torch.randn(D_IN, R), f"{Q}.lora_b": torch.randn(R, D_OUT)},
        {},
        {"fine_tune_type": "lora", "lora_parameters": {"rank": R, "scale": 3.0}},
    ),
    "torchtune": (pair(TURNED, ".lora_a.weight", ".lora_b.weight"), {}, {}),
    "lycoris": ({f"lora_unet_a.{part}": torch.randn(shape) for part, shape in HADAMARD.items()}, {}, {}),
    "diffusers": (pair("unet.mid_block.proj", ".lora_A.weight", ".lora_B.weight"), {}, {}),
    "kohya": (pair("lora_unet_mid_block_proj", ".lora_down.weight", ".lora_up.weight"), {}, {}),
    "peft": (pair(f"base_model.model.{FUSED}", ".lora_A.weight", ".lora_B.weight"), {}, LORA),
    "loralib": (pair("roberta.query", ".lora_A", ".lora_B"), {}, {}),
    "sam_lora": (SAM, {}, {}),
    "cloneofsimo": (pair("unet:0", ":down", ":up"), {}, {}),
    "pattern": (pair("layers.0", ".a", ".b"), {}, {}),
}
OPTIONS = ("name", "split", "initial", "heads")
ALWAYS = {"pattern": {"pattern": "down=layers.{module}.a up=layers.{module}.b"}}


def written(
    folder: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None, config: dict[str, Any] | None = None
) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata=header or None)
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapter_model.safetensors"


@pytest.fixture(params=[module.NAME for module in FORMATS])
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(format: str, tmp_path: Path) -> Path:
    return written(tmp_path / "adapter", *FILES[format])


def taken(format: str) -> tuple[str, ...]:
    return next(tuple(module.TAKES) for module in FORMATS if format == module.NAME)


def test_every_file_is_detected(format: str, path: Path) -> None:
    adapter = load_adapter(path, **ALWAYS.get(format, {}))
    assert adapter.format == format
    assert adapter.unused == ()


@pytest.mark.parametrize(
    ("format", "option"),
    [(module.NAME, option) for module in FORMATS for option in OPTIONS if option not in module.TAKES],
    ids=str,
)
def test_an_option_that_a_reader_does_not_take_is_refused(format: str, option: str, tmp_path: Path) -> None:
    path = written(tmp_path / "adapter", *FILES[format])
    initial = load_adapter(written(tmp_path / "initial", *FILES["peft"]))
    given = {"name": "other", "split": "q,v", "initial": initial, "heads": (2, 1)}[option]
    error = AdapterFormatError if option == "name" else UnsupportedAdapterError
    with pytest.raises(error, match=rf"adapter_model\.safetensors: .*Leave {option}= out\.$") as caught:
        load_adapter(path, **{option: given}, **ALWAYS.get(format, {}))
    assert "\n" not in str(caught.value)


def named(*names: str) -> dict[str, Tensor]:
    """Two adapters of different numbers in one file."""
    ends = [(f".lora_A.{name}.weight", f".lora_B.{name}.weight") for name in names]
    return {key: tensor for end in ends for key, tensor in pair("unet.proj", *end).items()}


# (format, option): the file, other options, the option as used, what it is compared with (None: refused without).
USED: dict[tuple[str, str], tuple[dict[str, Tensor], dict[str, Any], Any, Any]] = {
    ("gguf", "heads"): (FILES["gguf"][0], {}, (2, 1), (4, 1)),
    ("torchtune", "heads"): (FILES["torchtune"][0], {}, (2, 1), (4, 1)),
    ("diffusers", "name"): (named("one", "two"), {}, "one", "two"),
    ("peft", "name"): (named("one", "two"), {"format": "peft"}, "one", "two"),
    ("peft", "split"): (FILES["peft"][0], {}, "q,k,v", None),
    ("peft", "heads"): (FILES["peft"][0], {"split": "q,k,v"}, (4, 1), (2, 2)),
    ("peft", "initial"): (FILES["peft"][0], {}, "initial", None),
    ("loralib", "split"): (
        {"a.c_attn.lora_A": torch.randn(2 * R, D_IN), "a.c_attn.lora_B": torch.randn(D_OUT, R)},
        {},
        "q,v",
        "k,v",
    ),
}


def test_the_table_of_used_options_is_complete() -> None:
    assert set(FILES) == {module.NAME for module in FORMATS}
    assert set(USED) == {(module.NAME, option) for module in FORMATS for option in module.TAKES if option != "config"}
    assert {option for module in FORMATS for option in module.TAKES} == {"config", *OPTIONS}


def figures(adapter: Adapter) -> dict[str, Any]:
    return {module: (adapter.targets[module], update.dense().numpy().tolist()) for module, update in adapter.items()}


@pytest.mark.parametrize(("format", "option"), USED, ids=str)
def test_an_option_that_a_reader_takes_has_an_effect(format: str, option: str, tmp_path: Path) -> None:
    tensors, others, used, compared = USED[format, option]
    header, config = FILES[format][1:]
    path = written(tmp_path / "adapter", tensors, header, config)
    if used == "initial":
        used = load_adapter(written(tmp_path / "initial", *(pair_of_peft(), {}, LORA)))
    with_it = load_adapter(path, alpha=6, **others, **{option: used})
    other = load_adapter(path, alpha=6, **others, **({} if compared is None else {option: compared}))
    assert with_it.format == other.format == format
    assert figures(with_it) != figures(other)


def pair_of_peft() -> dict[str, Tensor]:
    return pair(f"base_model.model.{FUSED}", ".lora_A.weight", ".lora_B.weight")


def test_alpha_is_divided_by_r_in_every_format(format: str, path: Path) -> None:
    for module in load_adapter(path, alpha=7, **ALWAYS.get(format, {})).modules.values():
        assert (module.scale, module.scale_source) == (7 / R, "caller")
    for module in load_adapter(path, alpha=0, **ALWAYS.get(format, {})).modules.values():
        assert (module.scale, module.scale_source) == (0, "caller")
    adapter = load_adapter(path, alpha=np.float32(7), **ALWAYS.get(format, {}))
    assert {type(module.scale) for module in adapter.modules.values()} == {float}


def test_a_configuration_that_a_format_has_none_of_is_noted(format: str, tmp_path: Path) -> None:
    tensors, header, _ = FILES[format]
    path = written(tmp_path / "adapter", tensors, header, LORA)
    notes = load_adapter(path, **ALWAYS.get(format, {"format": format})).notes
    noted = [note for note in notes if note.startswith("the adapter_config.json beside the file is not looked at")]
    assert len(noted) == ("config" not in taken(format))


def test_an_adapter_of_every_format_pickles_as_its_source(format: str, path: Path) -> None:
    adapter = load_adapter(path, alpha=3, **ALWAYS.get(format, {}))
    pickled = pickle.dumps(adapter)
    assert len(pickled) < 2000
    again = pickle.loads(pickled)
    assert (again.format, again.notes, dict(again.ledger)) == (adapter.format, adapter.notes, dict(adapter.ledger))
    assert figures(again) == figures(adapter)


class Recording(StateDict):
    """A checkpoint that knows which of its tensors were read."""

    def __init__(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        super().__init__(tensors, metadata)
        self.read: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return super().__getitem__(name)


def test_a_reader_describes_a_file_without_its_numbers(format: str) -> None:
    tensors, header, config = FILES[format]
    reader = next(module for module in FORMATS if format == module.NAME)
    pattern = ALWAYS.get(format, {}).get("pattern")
    options = ReadOptions("x", None, None, None, torch.device("cpu"), None, pattern=pattern)
    alphas = {f"{key.rpartition('.lora_')[0]}.alpha": torch.tensor(1.0) for key in tensors if format == "kohya"}
    checkpoint = Recording(tensors | alphas, header)
    contents = reader.read(checkpoint, config, options)
    assert checkpoint.read == list(alphas)
    for module in contents.modules.values():
        module.read()
    assert set(checkpoint.read) == tensors.keys() | alphas.keys()


def test_initial_factors_of_another_format_are_not_blamed_on_their_own_options(tmp_path: Path) -> None:
    initial = written(tmp_path / "initial", *FILES["kohya"])
    path = written(tmp_path / "adapter", *FILES["kohya"])
    with pytest.raises(UnsupportedAdapterError, match=r"/adapter/adapter_model.safetensors: initial= .*Leave initial="):
        load_adapter(path, initial=initial)
    peft = written(tmp_path / "peft", *FILES["peft"])
    with pytest.raises(AdapterFormatError, match="expected initial factors of this module"):
        load_adapter(peft, initial=initial)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"alpha": "2"}, TypeError, r"^alpha: expected a number, got '2'\.$"),
        ({"alpha": True}, TypeError, r"^alpha: expected a number, got 'True'\.$"),
        ({"alpha": torch.tensor(2.0)}, TypeError, r"^alpha: expected a number"),
        ({"alpha": float("nan")}, ValueError, r"^alpha: expected a finite number, got nan\.$"),
        ({"alpha": 1e200}, ValueError, r"^alpha: expected a plausible number, got 1e\+200\.$"),
        ({"heads": 8}, ValueError, r"^heads: expected two positive integers, \(n_heads, n_kv_heads\), got '8'\.$"),
        ({"heads": "8,2"}, ValueError, "^heads: expected two positive integers"),
        ({"heads": (8,)}, ValueError, "^heads: expected two positive integers"),
        ({"heads": (8, 2, 2)}, ValueError, "^heads: expected two positive integers"),
        ({"heads": (8, 0)}, ValueError, "^heads: expected two positive integers"),
        ({"heads": (8.0, 2)}, ValueError, "^heads: expected two positive integers"),
        ({"heads": (True, 1)}, ValueError, "^heads: expected two positive integers"),
        ({"name": ""}, AdapterFormatError, "no such file"),
        ({"split": 3}, ValueError, "^split: expected the adapted ones of q,k,v"),
        ({"split": [0, 1, 0]}, ValueError, "^split: expected the adapted ones of q,k,v"),
        ({"split": [[1], "q"]}, ValueError, "^split: expected the adapted ones of q,k,v"),
    ],
    ids=str,
)
def test_an_option_that_is_none_is_a_wrong_argument(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    # Before the file is opened: it is not there.
    with pytest.raises(error, match=match):
        load_adapter(tmp_path / "nothing.safetensors", **options)

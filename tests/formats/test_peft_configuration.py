"""What ``adapter_config.json`` may say: values, patterns, keys that are known, refused or unknown."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_models import CONFIG, WEIGHTS, assert_equals_peft, edited, saved, trained
from safetensors.torch import save_file

from lora_analysis.errors import (
    AdapterFormatError,
    UnsupportedAdapterError,
)
from lora_analysis.formats import load_adapter
from lora_analysis.formats.patterns import pattern_regex
from lora_analysis.formats.peft import fields


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"r": 0}, "r: expected a positive integer, got 0"),
        ({"r": -4}, "r: expected a positive integer, got -4"),
        ({"r": 4.5}, r"r: expected a positive integer, got 4\.5"),
        ({"r": "4"}, "r: expected a positive integer, got '4'"),
        ({"r": True}, "r: expected a positive integer, got True"),
        ({"lora_alpha": "16"}, "lora_alpha: expected a finite number, got '16'"),
        ({"lora_alpha": math.nan}, "lora_alpha: expected a finite number, got nan"),
        ({"lora_alpha": math.inf}, "lora_alpha: expected a finite number, got inf"),
        ({"lora_alpha": [16]}, r"lora_alpha: expected a finite number, got \[16\]"),
        ({"rank_pattern": {"lin": 0}}, r"rank_pattern\['lin'\]: expected a positive integer"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern: expected regular expressions, got '\('"),
        ({"rank_pattern": ["lin"]}, "rank_pattern: expected an object, got list"),
        ({"alpha_pattern": {"lin": None}}, r"alpha_pattern\['lin'\]: expected a finite number, got None"),
        ({"alpha_pattern": {"*": 2}}, r"alpha_pattern: expected regular expressions, got '\*'"),
        ({"alpha_pattern": {"(" * 999: 2}}, r"alpha_pattern: expected regular expressions"),
        ({"alpha_pattern": {"(" * 5000: 2}}, r"alpha_pattern: expected keys .* \(more than 1000 characters\)"),
        ({"lora_alpha": 10**400}, r"lora_alpha: expected a plausible number, got 10+…\."),
        ({"lora_alpha": 1e308}, r"lora_alpha: expected a plausible number, got 1e\+308"),
        ({"alpha_pattern": {"lin": -1e101}}, r"alpha_pattern\['lin'\]: expected a plausible number, got -1e\+101"),
        ({"modules_to_save": 5}, "modules_to_save: expected a list of names, got 5"),
        ({"modules_to_save": ["lin", 5]}, r"modules_to_save: expected a list of names, got \['lin', 5\]"),
        ({"modules_to_save": "lin"}, "modules_to_save: expected a list of names, got 'lin'"),
        ({"peft_type": 7}, "peft_type: expected a name such as 'LORA', got 7"),
        ({"alpha_pattern": {"a{99999999999}": 2}}, r"alpha_pattern: expected regular expressions"),
        ({"alpha_pattern": "lin"}, "alpha_pattern: expected an object, got str"),
        ({"use_rslora": "yes"}, "use_rslora: expected true or false, got 'yes'"),
        ({"fan_in_fan_out": 1}, "fan_in_fan_out: expected true or false, got 1"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_values_the_format_forbids_are_refused(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(AdapterFormatError, match=match) as caught:
        load_adapter(edited(saved(trained(), tmp_path), **changes))
    assert str(caught.value).startswith(str(tmp_path))
    assert len(str(caught.value).removeprefix(str(tmp_path))) < 250


DANGEROUS = {
    "(a+)+b": "a repeated group whose body varies",
    "(?:a*)*b": "a repeated group whose body varies",
    "((a+)b?)+c": "a repeated group whose body varies",
    "(a|a)*b": "a repeated group whose body varies",
    "((a|aa))+b": "a repeated group whose body varies",
    "(a?){30}a": "a repeated group whose body varies",
    "(a{1,9})*b": "a repeated group whose body varies",
    "([)]+)+b": "a repeated group whose body varies",
    r"(\)+)+b": "a repeated group whose body varies",
    "(a+)+?b": "a repeated group whose body varies",
    "(a|a)" * 30 + "b": "more than 6 parts that vary",
    ".*" * 7 + "b": "more than 6 parts that vary",
    "a?" * 30 + "a" * 30: "more than 6 parts that vary",
    "(?x:(a+) +)b": "the construct '(?x'",
    "a+)+(b": "a parenthesis that closes none",
    "({}+)+b": "a repeated group whose body varies",
    "[](a+)+]+)": "a parenthesis that closes none",
    "(a+)(?#)+b": "the construct '(?#'",
    "a" * 1001: "more than 1000 characters",
}


@pytest.mark.parametrize("key", DANGEROUS, ids=lambda key: key[:20])
@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_keys_that_may_match_for_ever_are_refused_at_once(tmp_path: Path, key: str, option: str) -> None:
    name = "a" * 60
    save_file({f"{name}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", option: {key: 2}}))
    start = time.process_time()
    with pytest.raises(AdapterFormatError, match=f"{option}: expected keys that are matched quickly, got '") as caught:
        load_adapter(tmp_path)
    assert f"({DANGEROUS[key]})" in str(caught.value)
    assert repr(key)[1:30].rstrip("'") in str(caught.value)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "key",
    [
        r".*\.layers\.\d+\.(self_)?attn\.(q_)?proj",
        r"^model\.layers\.(0|1|2|30)\.mlp",
        "|".join(rf"layers\.{i}\..*\.q_proj" for i in range(40)),
        r"(?:encoder|decoder)\.block\.[0-9]{1,2}\.layer",
        "(ab){2}",
        "(lin)+",
        r"\(a\+\)\+b",
        "[(]a+[])]+",
        "a{b}",
        r"lin(?=$)|(?P<side>q|v)_proj",
        "[](a+)+]+",
        "(",
    ],
    ids=lambda key: key[:20],
)
def test_ordinary_keys_are_not_held_for_dangerous(key: str) -> None:
    """They compile where ``re`` alone compiles them."""
    try:
        theirs = re.compile(rf"(.*\.)?({key})$")
    except re.error:
        with pytest.raises(re.error):
            pattern_regex(key)
    else:
        assert pattern_regex(key) == theirs


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    saved(trained(), tmp_path)
    for content, match in (("{", "expected JSON"), ("[]", "expected a JSON object, got list")):
        (tmp_path / CONFIG).write_text(content)
        with pytest.raises(AdapterFormatError, match=match):
            load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"init_lora_weights": "corda"}, "initialised by 'corda'"),
        ({"init_lora_weights": "lora_ga"}, "initialised by 'lora_ga'"),
        ({"init_lora_weights": "loftq"}, "initialised by 'loftq'"),
        ({"use_bdlora": {"x": 1}}, "use_bdlora is set: block-diagonal"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
        ({"use_something_new": True}, "use_something_new is set, an option that may change the update"),
        ({"peft_type": "MISS"}, "PEFT MISS"),
    ],
    ids=str,
)
def test_options_that_change_the_update_are_refused(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=match):
        load_adapter(edited(saved(trained(), tmp_path), **changes))


NAMED = {
    "QALoRA": {"use_qalora": True},
    "block-diagonal LoRA": {"use_bdlora": {"nblocks": 2}},
    "KaSA": {"kasa_config": {"beta": 1}},
    "VeLoRA": {"velora_config": {"num_groups": 2}},
    "MonteCLoRA": {"monteclora_config": {"num_samples": 2}},
    "Arrow routing": {"arrow_config": {"top_k": 2}},
    "layer replication": {"layer_replication": [[0, 2], [1, 3]]},
    "MergedLinear": {"enable_lora": [True, False, True]},
    "MoRA": {"use_mora": True},
}


@pytest.mark.parametrize("title", NAMED)
def test_kinds_of_lora_that_are_not_read_are_refused_by_name(tmp_path: Path, title: str) -> None:
    (option,) = NAMED[title]
    match = f"{option} is set: {title}.*, which is not read yet"
    with pytest.raises(UnsupportedAdapterError, match=match) as caught:
        load_adapter(edited(saved(trained(), tmp_path), **NAMED[title]))
    assert "\n" not in str(caught.value)


def test_their_tensors_alone_are_refused_too(tmp_path: Path) -> None:
    for name, title in ((".lora_diag.default", "KaSA"), (".lora_monteclora_sampler.default.x", "MonteCLoRA")):
        tensors = {f"lin.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
        save_file(tensors | {f"lin{name}": torch.ones(2)}, tmp_path / WEIGHTS)
        with pytest.raises(UnsupportedAdapterError, match=f"belongs to {title}, which is not read yet"):
            load_adapter(tmp_path)


def test_every_field_of_pefts_own_class_is_known() -> None:
    """A new one fails here: somebody has to say what it does to ΔW."""
    theirs = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert theirs - {*fields.READ, *fields.WITHOUT_EFFECT, *fields.REFUSED} == set()
    ours = [*fields.READ, *fields.WITHOUT_EFFECT, *fields.REFUSED]
    assert len(ours) == len(set(ours))
    # Earlier versions and other trainers have keys of their own, which must not shadow PEFT's.
    assert theirs.isdisjoint({*fields.EARLIER_REFUSED, *fields.EARLIER_WITHOUT_EFFECT})


def test_what_peft_writes_by_default_needs_no_note(tmp_path: Path) -> None:
    saved(trained(), tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written.keys() >= {"peft_version", "use_qalora", "kasa_config", "ensure_weight_tying"}
    assert load_adapter(tmp_path).notes == ()


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}], ids=repr)
def test_unknown_keys_that_are_not_set_are_named_in_a_note(tmp_path: Path, value: Any) -> None:
    saved(trained(), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text()) | {"use_magic": value, "magic\nconfig": value}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    adapter = load_adapter(tmp_path)
    assert adapter.notes == (r"configuration keys not known here, none of them set: 'magic\nconfig', 'use_magic'.",)


@pytest.mark.parametrize("value", [True, 1, 0.5, "svd", [1], {"a": 0}], ids=repr)
def test_unknown_keys_that_are_set_may_change_the_update(tmp_path: Path, value: Any) -> None:
    match = "magic is set, an option that may change the update and is not known here. Take it out of adapter_config"
    with pytest.raises(UnsupportedAdapterError, match=match):
        load_adapter(edited(saved(trained(), tmp_path), magic=value))


def test_keys_of_earlier_versions_and_other_trainers_are_known(tmp_path: Path) -> None:
    changes = {"enable_lora": False, "merge_weights": True, "lora_dtype": "bfloat16", "lorap_lr_ratio": 16.0}
    assert load_adapter(edited(saved(trained(), tmp_path), **changes)).notes == ()


def test_an_activated_lora_acts_later_but_its_update_is_the_same(tmp_path: Path) -> None:
    """``alora_invocation_tokens`` say from where on it is added; what is added is s·B·A."""
    model = trained()
    folder = edited(saved(model, tmp_path), alora_invocation_tokens=[5, 7])
    adapter = load_adapter(folder)
    assert_equals_peft(adapter, model)
    assert adapter.notes == ("activated LoRA: the updates act from the invocation tokens on, and not before.",)


def test_many_unknown_keys_that_are_not_set_make_a_short_note(tmp_path: Path) -> None:
    folder = saved(trained(), tmp_path)
    edited(folder, **{f"later_{i:03}": False for i in range(200)})
    (note,) = load_adapter(folder).notes
    assert note.endswith("'later_008', 'later_009' and 190 more.")

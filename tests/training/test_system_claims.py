from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lora_analysis.training.accounting import lora_count, parameter_count
from lora_analysis.training.system_claims import Claim, gpt3_175b, system_claims

D, LAYERS = 12288, 96
TOTAL = 174_604_259_328


def figures(*, place: str, unit: str, words: str) -> dict[str, float]:
    """Formulas of the claims of a place and unit, by the end of their assumption."""
    found = [c for c in system_claims() if c.place == place and c.unit == unit and words in c.assumption + c.claim]
    return {claim.assumption: claim.formula for claim in found}


def test_gpt3_has_the_parameters_of_its_closed_form() -> None:
    model = gpt3_175b()
    closed = LAYERS * (12 * D**2 + 13 * D) + (50257 + 2048 + 2) * D
    assert parameter_count(model).total == closed == TOTAL
    # Brown et al., table 2.1, print 175.0B.
    assert closed == pytest.approx(175.0e9, rel=0.0025)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_gpt3_has_the_parameters_of_a_gpt2_of_its_size() -> None:
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(GPT2Config(n_positions=2048, n_embd=D, n_layer=LAYERS, n_head=96))
    assert theirs.config.tie_word_embeddings
    theirs.tie_weights()
    assert parameter_count(theirs).total == TOTAL


@pytest.mark.parametrize(
    ("targets", "r"),
    [
        (["Wq"], 8),
        (["Wk"], 8),
        (["Wv"], 8),
        (["Wo"], 8),
        (["Wq", "Wk"], 4),
        (["Wq", "Wv"], 4),
        (["Wq", "Wk", "Wv", "Wo"], 2),
    ],
)
def test_every_column_of_table_5_is_one_budget(targets: list[str], r: int) -> None:
    count = lora_count(gpt3_175b(), targets, r=r)
    assert len(count.matrices) == LAYERS * len(targets)
    assert count.trainable == LAYERS * 2 * D * 8 == 18_874_368


def test_ten_thousand_times_is_9272_of_the_printed_total_and_9251_of_the_shapes() -> None:
    found = figures(place="abstract", unit="times", words="trainable parameters")
    assert [round(x) for x in found.values()] == [9251, 9272, 37003]
    # 9,272 needs a total of 174.994 to 175.012 billion.
    assert round(174.993e9 / 18_874_368) == 9271
    assert round(175.013e9 / 18_874_368) == 9273


def test_the_checkpoint_of_35_mb_is_37_7_mb_or_36_mib() -> None:
    found = [c for c in system_claims() if "checkpoint" in c.claim]
    assert [c.formula for c in found] == [2 * TOTAL / 1e9, 37.748736, 36.0, TOTAL / 18_874_368]
    assert [c.printed for c in found] == [350, 35, 35, 1e4]


def test_memory_is_bytes_per_parameter_times_parameters() -> None:
    tuned = figures(place="section 4.2", unit="TB", words="fine-tuning")
    # Weights, gradients, moments, masters; step counters are some kB.
    expected = [(4 + 4 + 8), (2 + 2 + 8 + 4), (2 + 2 + 4), (2 + 4)]
    assert list(tuned.values()) == pytest.approx([n * TOTAL / 1e12 for n in expected], rel=1e-7)


def test_the_printed_memory_lies_between_two_readings() -> None:
    _, _, held, streamed = figures(place="section 4.2", unit="TB", words="fine-tuning").values()
    assert streamed < 1.2 < held
    full, *half = figures(place="section 4.2", unit="GB", words="LoRA,").values()
    assert full == pytest.approx(700, rel=0.005)
    assert half == pytest.approx([350] * 3, rel=0.005)
    times = figures(place="abstract", unit="times", words="GPU memory")
    assert list(times.values()) == pytest.approx([4, 8, 4, 3], rel=1e-3)


def test_two_thirds_are_the_moments_where_gradients_are_not_held() -> None:
    states = figures(place="section 4.2", unit="of the total", words="optimizer states alone")
    saved = figures(place="section 4.2", unit="of the total", words="all that is saved")
    frozen = 1 - 18_874_368 / TOTAL
    assert list(states.values()) == pytest.approx([frozen * share for share in (1 / 2, 1 / 2, 1 / 2, 2 / 3)], rel=1e-6)
    assert list(saved.values()) == pytest.approx([3 / 4, 7 / 8, 3 / 4, 2 / 3], rel=1e-3)


def test_table_15_prints_the_formula_to_two_tenths_of_a_million() -> None:
    found = [c for c in system_claims() if c.place == "table 15"]
    matrices = [1, 2, 2, 4, 2, 4, 2, 4, 2, 4]
    ranks = [2, 1, 2, 1, 4, 2, 8, 4, 64, 64]
    assert [c.formula for c in found] == [LAYERS * m * 2 * D * r / 1e6 for m, r in zip(matrices, ranks, strict=True)]
    assert all(abs(c.formula - c.printed) < 0.2 for c in found)
    assert {c.printed for c in found if round(c.formula, 1) != c.printed} == {18.8, 301.9, 603.8}


def test_a_ratio_is_formula_over_printed() -> None:
    assert Claim("place", "claim", "assumption", printed=4.0, formula=3.0, unit="times").ratio == 0.75

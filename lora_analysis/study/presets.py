"""The studies that come with the package: MiniLM on docstrings, a small decoder on code and prose, generation.

Their margins, learning rates and sizes are fixed here, before any run. Learning rates were tuned at one rank on
training items held back, with a seed that no run of the grid has; rsLoRA's scale makes one of them serve all ranks.

Values
------
``minilm_plan``, ``decoder_plan``, ``generation_plan``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_analysis.study.plan import Plan, Recipe

TABLE_5 = (
    (("k",), 8),
    (("v",), 8),
    (("o",), 8),
    (("q", "k"), 4),
    (("q", "v"), 4),
    (("q", "k", "v", "o"), 2),
)
"""Beside q at r = 8: the paper's Table 5, seven ways to spend one number of parameters."""

MINILM = Recipe(
    steps=100,
    batch_size=32,
    lr={"lora": 5e-3, "full": 1e-4, "bitfit": 5e-3, "head": 1e-2},
    alpha=6.0,
)
DECODER = Recipe(
    steps=100,
    batch_size=8,
    lr={"lora": 5e-3, "full": 5e-4, "bitfit": 5e-3, "head": 2e-3},
    alpha=6.0,
)


def minilm_plan(
    *, other_tasks: Mapping[str, Mapping[str, Any]] | None = None, quick: bool = False, **changes: Any
) -> Plan:
    """Setting (b): all-MiniLM-L6-v2, from which of six libraries a docstring paragraph comes.

    Parameters
    ----------
    other_tasks : mapping, optional
        Tasks of files of the user's, as ``read_task`` takes them: what C17 compares with.
    quick : bool
        A study of minutes that shows that everything works, and can show little else.
    **changes
        Fields of ``Plan`` to set otherwise.

    Returns
    -------
    Plan
    """
    sizes = {"held_out_per_class": 40, "train_per_class": 60} if quick else {"held_out_per_class": 200}
    others = dict(other_tasks or {})
    setting = {
        "kind": "classification",
        "tasks": {"docstrings": sizes, **others},
        "max_length": 24 if quick else 32,
    }
    recipe = Recipe(8, 16, MINILM.lr, MINILM.alpha) if quick else MINILM
    return Plan(
        **{
            "setting": setting,
            "task": "docstrings",
            "recipe": recipe,
            "other_tasks": tuple(others),
            **(_QUICK if quick else _FULL | {"sizes": (60, 600)}),
            **changes,
        }
    )


def decoder_plan(*, quick: bool = False, **changes: Any) -> Plan:
    """Setting (a): a decoder of 3 layers pretrained on Python, adapted to tests (near), prose (far) and C++ (headers).

    The control ``permuted`` is the near text under a fixed permutation of byte values; no claim is judged by it.

    Parameters
    ----------
    quick : bool
    **changes
        Fields of ``Plan`` to set otherwise.

    Returns
    -------
    Plan
    """
    sizes = {"train_bytes": 200_000, "held_out_bytes": 16_384} if quick else {}
    setting: dict[str, Any] = {
        "kind": "language",
        "tasks": {
            "near": sizes,
            "far": sizes,
            "headers": sizes,
            "permuted": {"corpus": "near", "permuted": True, **sizes},
        },
        "held_out_blocks": 60 if quick else 400,
    }
    if quick:
        setting |= {"pretraining_steps": 20, "pretraining_bytes": 200_000}
    recipe = Recipe(8, 4, DECODER.lr, DECODER.alpha) if quick else DECODER
    options = _QUICK if quick else _FULL | {"sizes": (100, 1000)}
    return Plan(
        **{
            "setting": setting,
            "task": "near",
            "recipe": recipe,
            "other_tasks": ("far", "headers"),
            "control_tasks": ("permuted",),
            **options,
            "controls": ("full", "head"),  # the decoder has no biases
            **changes,
        }
    )


def generation_plan(
    tasks: Mapping[str, Mapping[str, Any]], *, model: str = "decoder", quick: bool = False, **changes: Any
) -> Plan:
    """Conditional generation from files of the user's, such as E2E NLG, measured by loss and BLEU.

    Parameters
    ----------
    tasks : mapping
        Name to ``{"file": path}``; the first is the study's, others are what C17 compares with.
    model : str
        The small decoder, or a causal transformers model.
    quick : bool
    **changes
        Fields of ``Plan`` to set otherwise.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        If there is no task.
    """
    if not tasks:
        raise ValueError("tasks: expected a file of meaning representations and texts, got none.")
    setting: dict[str, Any] = {"kind": "generation", "tasks": dict(tasks), "model": model}
    if quick:
        setting |= {"held_out_mrs": 4, "max_new_tokens": 24, "pretraining_steps": 20, "pretraining_bytes": 200_000}
    first, *others = tasks
    return Plan(
        **{
            "setting": setting,
            "task": first,
            "recipe": Recipe(8, 4, DECODER.lr, DECODER.alpha) if quick else DECODER,
            "other_tasks": tuple(others),
            **(_QUICK if quick else _FULL),
            "controls": ("full", "head"),
            **changes,
        }
    )


_FULL: dict[str, Any] = {"budget": TABLE_5, "controls": ("full", "bitfit", "head")}
_QUICK: dict[str, Any] = {
    "target_sets": (("q",), ("q", "v")),
    "ranks": (1, 8),
    "seeds": (0, 1),
    "controls": ("full", "head"),
}

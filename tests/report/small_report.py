"""A small report with everything in it: two ranks, a hostile name, a base, a study."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import lora_analysis as la

HOSTILE = "<img src=x onerror='window.hacked=1'>\"</script><script>window.hacked=1</script>\u202eabc\x1b[31m"
SHOWN = HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")
"""How a page shows it: markup as text, control and direction characters as escapes."""
STUDY = Path(__file__).parents[2] / "figures" / "study-minilm"
MODULES = [f"layers.{layer}.{kind}_proj" for layer in range(3) for kind in "qv"]
SIZE = 40


def adapter(name, r, *, modules=MODULES, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    factors = {
        module: (torch.randn(SIZE, r, generator=generator), torch.randn(r, SIZE, generator=generator))
        for module in modules
    }
    updates = {module: la.LowRankUpdate(up, down, scale=scale) for module, (up, down) in factors.items()}
    return la.Adapter(updates, source=f"runs/{name}")


def make_adapters():
    strange = adapter(HOSTILE, 4, modules=[*MODULES[:4], HOSTILE], seed=2)
    strange.metadata = {HOSTILE: HOSTILE}
    strange.config = {"base_model_name_or_path": HOSTILE}
    return [adapter("r4", 4, seed=0), adapter("r8", 8, seed=1), strange]


def make_base():
    generator = torch.Generator().manual_seed(9)
    return la.load_base(
        {f"{name}.weight": torch.randn(SIZE, SIZE, generator=generator) for name in [*MODULES, HOSTILE]}
    )


def data(folder, name):
    """What a data script hands to a page."""
    text = (folder / "data" / f"{name}.js").read_text("ascii")
    head = f"report.receive({json.dumps(name)},"
    assert text.startswith(head)
    assert text.endswith(");\n")
    return json.loads(text[len(head) : -3])

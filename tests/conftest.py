"""What every test shares: a fixed seed, examples that do not change from run to run, and the real adapters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

SHARED_ADAPTERS = Path(__file__).parents[1].parent / "shared" / "data" / "adapters"

# The first example of a property pays for imports and thread pools, so a deadline would be a test of the machine.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Modules made by a test start from the same random weights in any order of tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_adapters() -> Path:
    """Adapters trained by others, which a user's checkout does not have."""
    if not SHARED_ADAPTERS.is_dir():
        pytest.skip("the real adapters of ../shared/data/adapters are not here")
    return SHARED_ADAPTERS


@pytest.fixture(scope="session")
def quick_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``lora-analysis demo --quick`` leaves behind, made once for all tests that look at it."""
    out = tmp_path_factory.mktemp("demo") / "lora-demo"
    subprocess.run([sys.executable, "-m", "lora_analysis", "demo", "--quick", "--out", str(out)], check=True)
    return out

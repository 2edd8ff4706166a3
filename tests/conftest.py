"""What every test shares: a fixed seed, examples that do not change from run to run, and the real adapters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

SHARED_ADAPTERS = Path(__file__).parents[1].parent / "shared" / "data" / "adapters"

# Workers of the run, and commands that tests run, each have one thread: more would wait for each other's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

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
def quick_demo(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """What ``lora-analysis demo --quick`` leaves behind, made once for all tests of all workers that look at it."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent  # each worker has a folder of its own in that of the run
    out, failed = shared / "lora-demo", shared / "demo-failed"
    with FileLock(shared / "demo.lock"):
        if not out.exists() and not failed.exists():
            command = [sys.executable, "-m", "lora_analysis", "demo", "--quick", "--out", str(out)]
            if subprocess.run(command, check=False).returncode:
                failed.touch()
    assert not failed.exists(), "lora-analysis demo --quick failed; what it printed is above."
    return out

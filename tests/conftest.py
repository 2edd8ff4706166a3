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


def _shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder of the run that all its workers share; each has one of its own in it."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


def _made_once(shared: Path, name: str, *arguments: str) -> Path:
    """What a command of ours leaves behind in ``shared/name``, run once for all tests of all workers."""
    out, failed = shared / name, shared / f"{name}-failed"
    with FileLock(shared / f"{name}.lock"):
        if not out.exists() and not failed.exists():
            command = [sys.executable, "-m", "lora_analysis", *arguments]
            if subprocess.run(command, check=False).returncode:
                failed.touch()
    assert not failed.exists(), f"lora-analysis {' '.join(arguments)} failed; what it printed is above."
    return out


@pytest.fixture(scope="session")
def quick_demo(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The directory of ``lora-analysis demo --quick``."""
    shared = _shared(tmp_path_factory, worker_id)
    return _made_once(shared, "lora-demo", "demo", "--quick", "--out", str(shared / "lora-demo"))


@pytest.fixture(scope="session")
def small_decoder_cache(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Where pretrained decoders are kept during the tests, instead of the user's own cache."""
    cache = _shared(tmp_path_factory, worker_id) / "decoder-cache"
    os.environ["LORA_ANALYSIS_CACHE"] = str(cache)
    return cache


@pytest.fixture(scope="session")
def quick_study(tmp_path_factory: pytest.TempPathFactory, worker_id: str, small_decoder_cache: Path) -> Path:
    """The directory of ``lora-analysis ablate --setting decoder --quick``."""
    shared = _shared(tmp_path_factory, worker_id)
    out = str(shared / "study")
    return _made_once(shared, "study", "ablate", out, "--setting", "decoder", "--quick")

"""The small report that the tests of this folder read and open, made once."""

from __future__ import annotations

import pytest
from small_report import STUDY, make_adapters, make_base

from lora_analysis.report import write_report


@pytest.fixture(scope="session")
def adapters():
    return make_adapters()


@pytest.fixture(scope="session")
def base():
    return make_base()


@pytest.fixture(scope="session")
def folder(tmp_path_factory, adapters, base):
    out = tmp_path_factory.mktemp("reports") / "report"
    write_report(adapters, base, out=out, study=STUDY, draws=99)
    return out

"""The command line called within the test's own process: importing everything again takes seconds."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from unittest import mock

from lora_analysis import cli


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """What ``lora-analysis`` with these arguments returns and prints, in a pipe of 80 columns.

    Encodings, signals, environments and what importing costs are tested with processes of their own.
    """
    argv = ["lora-analysis", *map(str, arguments)]
    code: int | str | None = 0
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(os.environ, {"COLUMNS": "80"}),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(argv, int(code or 0), out.getvalue(), err.getvalue())

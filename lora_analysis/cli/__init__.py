"""The command line: one file per command, each an option list, a table and a way to print it.

Exit codes: 0 fine; 1 a named error, in one line on stderr; 2 wrong usage.
"""

from __future__ import annotations

import os
import sys

import typer

from lora_analysis.cli.amplify import amplify
from lora_analysis.cli.compare import compare, layers
from lora_analysis.cli.demo import demo
from lora_analysis.cli.inspect import inspect
from lora_analysis.cli.output import plain_text
from lora_analysis.cli.spectrum import spectrum
from lora_analysis.errors import LoraAnalysisError

app = typer.Typer(
    name="lora-analysis",
    help="Rank-deficiency analysis of LoRA adapters: spectra, subspace similarity, amplification, with their nulls.",
    epilog="Start with: lora-analysis inspect ADAPTER, or lora-analysis demo --quick",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (inspect, spectrum, compare, layers, amplify, demo):
    app.command()(command)


def main() -> None:
    """Run the command line; the package's own errors become one line and an exit code."""
    try:
        app()
    except LoraAnalysisError as error:
        _fail(error, 1)
    except BrokenPipeError:
        # The reader of our output, such as head, has gone: nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError) as error:
        _fail(error, 2)
    except OSError as error:
        _fail(error, 1)


def _fail(error: Exception, code: int) -> None:
    print(f"lora-analysis: {plain_text(' '.join(str(error).split()))}", file=sys.stderr)
    raise SystemExit(code) from None

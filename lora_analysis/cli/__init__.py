"""The command line: one file per command, each an option list, a table and a way to print it.

Exit codes, each but the first with a line on stderr and never a traceback:

0
    Fine, also where the reader of our output, such as ``head``, has gone before its end.
1
    A named error of this package, a file that cannot be read or written, or not enough memory.
2
    Wrong usage. Options are checked where they are parsed; a ``ValueError`` of a function that they are
    handed to counts as such too.

Anything else, a ``TypeError`` above all, is a bug of ours: its traceback is shown.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Annotated

import torch
import typer

from lora_analysis.cli.ablate import ablate
from lora_analysis.cli.amplify import amplify
from lora_analysis.cli.atlas import atlas
from lora_analysis.cli.compare import compare, layers
from lora_analysis.cli.convert import convert
from lora_analysis.cli.demo import demo
from lora_analysis.cli.diff import diff
from lora_analysis.cli.figure import figure
from lora_analysis.cli.inspect import inspect
from lora_analysis.cli.interference import interference
from lora_analysis.cli.intruders import intruders
from lora_analysis.cli.lint import lint
from lora_analysis.cli.magnitude import magnitude
from lora_analysis.cli.merge import merge
from lora_analysis.cli.output import plain_text
from lora_analysis.cli.overlap import overlap
from lora_analysis.cli.report import report
from lora_analysis.cli.reproducible import reproducible
from lora_analysis.cli.resize import resize
from lora_analysis.cli.same import same
from lora_analysis.cli.spectrum import spectrum
from lora_analysis.cli.strength import strength
from lora_analysis.cli.suggestions import with_next
from lora_analysis.cli.tokens import tokens
from lora_analysis.cli.train import train
from lora_analysis.cli.used_rank import used_rank
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


def _print_version(asked: bool) -> None:
    if asked:
        print(f"lora-analysis {metadata.version('lora-analysis')}")
        raise typer.Exit


COMMANDS: tuple[tuple[Callable[..., None], str], ...] = (
    (inspect, "What is this adapter? Format, modules, r, scale."),
    (lint, "What is wrong with it, and what is the cure?"),
    (convert, "The same in another format, read back and compared."),
    (spectrum, "Singular values, and ranks by every measure."),
    (used_rank, "Did I waste rank? Rank measures beside chance."),
    (resize, "Cut it to a rank, an energy or a budget; or raise it."),
    (compare, "Do two adapters find the same directions? (phi)"),
    (layers, "The same of the layers of one adapter."),
    (same, "Are these the same? Start, cosine, subspaces."),
    (reproducible, "What do trainings from different seeds share?"),
    (strength, "Which layers learned, and does a merge keep it?"),
    (amplify, "What does it amplify? (table 7, with gain)"),
    (overlap, "Where along W's spectrum does it lie? (figure 8)"),
    (intruders, "Which directions are new to the model?"),
    (tokens, "What do its directions say in tokens?"),
    (interference, "Will they merge? Interference beside chance."),
    (merge, "Several as one: sum, TSV, Iso-C or KnOTS."),
    (atlas, "A shelf of adapters: families and outliers."),
    (report, "All five questions as pages that open from disk."),
    (magnitude, "Did lengths or directions of rows change? (DoRA)"),
    (diff, "What did full fine-tuning change?"),
    (figure, "The paper's figures of any adapters, for print."),
    (train, "Train one adapter, and save it as PEFT reads it."),
    (ablate, "The paper's ablations, every claim judged."),
    (demo, "Train five ranks on a real task, and look at them."),
)
"""Every command with what it is for, in the order of ``--help``."""


@app.callback()
def _version(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before any command."""


for command, short in COMMANDS:
    app.command(name=command.__name__.replace("_", "-"), short_help=short)(with_next(command))


def main() -> None:
    """Run the command line; errors that are no bugs become one line and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A pipe on Windows, say, that cannot hold φ shows ? in its place; stderr has escapes by default.
        sys.stdout.reconfigure(errors="replace")
    status = 0
    try:
        status = _status()
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left unwritten would be tried again, and complained about, when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    raise SystemExit(status)


def _status() -> int:
    try:
        app()
    except SystemExit as end:
        # Typer makes an exit code 1 of a pipe without reader, which is no error here.
        if isinstance(end.__context__, BrokenPipeError):
            raise end.__context__ from None
        return end.code if isinstance(end.code, int) else 0
    except BrokenPipeError:
        raise
    except (LoraAnalysisError, OSError) as error:
        return _failed(str(error), 1)
    except ValueError as error:
        return _failed(str(error), 2)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return _failed(f"out of memory. {error}", 1)
    return 0


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: on a CPU torch says so in words only."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _failed(message: str, code: int) -> int:
    print(f"lora-analysis: {plain_text(' '.join(message.split()))}", file=sys.stderr)
    return code

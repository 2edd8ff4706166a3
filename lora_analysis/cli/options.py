"""Options that several commands share, and how they open what they name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from lora_analysis.adapter import Adapter
from lora_analysis.base import BaseWeights, load_base
from lora_analysis.cli.output import say
from lora_analysis.errors import LoraAnalysisError
from lora_analysis.formats import FORMATS, load_adapter
from lora_analysis.formats.options import parse_split
from lora_analysis.tables.frames import SUFFIXES

_MOST_DRAWS = 1_000_000
_MOST_K = 1_000_000
_MOST_SEED = 2**63 - 1


def _checked_format(value: str | None) -> str | None:
    names = [module.NAME for module in FORMATS]
    if value is not None and value not in names:
        raise typer.BadParameter(f"expected one of {', '.join(names)}, got {value!r}.")
    return value


def _checked_alpha(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"expected a finite number, got {value}.")
    return value


def _checked_split(value: str | None) -> str | None:
    try:
        parse_split(value)
    except ValueError:
        raise typer.BadParameter(f"expected the adapted ones of q,k,v, such as q,v, got {value!r}.") from None
    return value


def _checked_heads(value: str | None) -> str | None:
    head_counts(value)
    return value


def _checked_device(value: str) -> str:
    """A device that is there and computes in float64, as all measures do."""
    try:
        device = torch.device(value)
    except RuntimeError:
        raise typer.BadParameter(f"expected a device such as cpu, cuda or cuda:1, got {value!r}.") from None
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"expected cpu or cuda, the devices that compute in float64, got {value!r}.")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise typer.BadParameter(f"expected a device that is there, got {value!r} with {count} CUDA devices.")
    return value


def _checked_out(value: Path | None) -> Path | None:
    """A file name that can be written, checked before the work and not after it."""
    if value is not None and value.suffix not in SUFFIXES:
        raise typer.BadParameter(f"expected a name ending in {', '.join(SUFFIXES)}, got {str(value)!r}.")
    return value


def _checked_ks(value: str | None) -> str | None:
    integers(value)
    return value


def _checked_pairs(value: list[str] | None) -> list[str] | None:
    module_pairs(value)
    return value


Adapters = Annotated[list[str], typer.Argument(metavar="ADAPTER", help="Folders, files, hub ids or URLs of adapters.")]
OneAdapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder, file, hub id or URL of an adapter.")]
Format = Annotated[
    str | None,
    typer.Option(
        help=f"Read as this format instead of detecting it: {', '.join(f.NAME for f in FORMATS)}.",
        callback=_checked_format,
    ),
]
Alpha = Annotated[
    float | None,
    typer.Option(help="lora_alpha of training, where the file does not hold it.", callback=_checked_alpha),
]
_BASE = typer.Option(help="The base model: a file, a folder, a hub id or a URL.")
Base = Annotated[str | None, _BASE]
RequiredBase = Annotated[str, _BASE]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of an adapter on the Hugging Face hub.")]
BaseRevision = Annotated[str | None, typer.Option(help="The same of the base.")]
Split = Annotated[
    str | None,
    typer.Option(
        help="Adapted slots of a fused q,k,v weight (loralib), such as q,v; the blocks to cut it into (peft).",
        callback=_checked_split,
    ),
]
Initial = Annotated[
    str | None, typer.Option(help="The adapter training started from, where it was subtracted from the base (PiSSA).")
]
Heads = Annotated[
    str | None,
    typer.Option(
        help="Query and key-value heads, such as 32,8: undoes the rotary order of torchtune and GGUF.",
        callback=_checked_heads,
    ),
]
Pattern = Annotated[
    str | None,
    typer.Option(help="How tensors are called: 'down={module}.a up={module}.b', .T after a transposed one."),
]
Name = Annotated[str | None, typer.Option(help="Which adapter, where a folder or a file holds several.")]
Device = Annotated[str, typer.Option(help="Where to compute, such as cpu or cuda.", callback=_checked_device)]
Out = Annotated[
    Path | None,
    typer.Option(
        help=f"Write the whole table to FILE ({', '.join(SUFFIXES)}) instead of printing it.", callback=_checked_out
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, and nothing else.")]
Workers = Annotated[int | None, typer.Option(help="Threads; the cores of the machine by default.", min=1)]
Draws = Annotated[int, typer.Option(help="Monte Carlo draws of a p that has no closed form.", min=1, max=_MOST_DRAWS)]
Seed = Annotated[int, typer.Option(help="Seed of the draws.", min=0, max=_MOST_SEED)]
Ks = Annotated[
    str | None,
    typer.Option(help="Truncations, such as 1,4,8; powers of two up to r, and r, by default.", callback=_checked_ks),
]
Pairs = Annotated[
    list[str] | None,
    typer.Option(
        help="'same' names, 'all' against all, or MODULE_A=MODULE_B, which may be repeated.", callback=_checked_pairs
    ),
]


def integers(text: str | None) -> list[int] | None:
    """Positive integers between commas."""
    if text is None:
        return None
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1 or max(found) > _MOST_K:
        raise typer.BadParameter(f"expected integers from 1 to {_MOST_K:,}, such as 1,4,8, got {text!r}.")
    return found


def head_counts(text: str | None) -> tuple[int, int] | None:
    """Two positive integers between commas, or one that counts for both."""
    counts = integers(text)
    if counts is None:
        return None
    if len(counts) > 2:
        raise typer.BadParameter(f"expected query and key-value heads, such as 32,8, got {text!r}.")
    return counts[0], counts[-1]


def module_pairs(pairs: Sequence[str] | None) -> Literal["same", "all"] | list[tuple[str, str]] | None:
    """A rule by its name, or the pairs of names that are written out."""
    if not pairs:
        return None
    if list(pairs) == ["same"]:
        return "same"
    if list(pairs) == ["all"]:
        return "all"
    found = []
    for pair in pairs:
        first, _, second = pair.partition("=")
        if not first or not second or "=" in second:
            raise typer.BadParameter(f"expected 'same', 'all' or MODULE_A=MODULE_B, got {pair!r}.")
        found.append((first, second))
    return found


def require_free(out: Path, *, overwrite: bool, sources: Sequence[str] = ()) -> None:
    """Refuse to write over what is there, before the work; over what is read, in any case.

    An empty folder is nothing.
    """
    same = [source for source in sources if Path(source).exists() and Path(source).resolve() == out.resolve()]
    if same:
        raise typer.BadParameter(f"{out}: expected another place than the adapter that is read.")
    if not overwrite and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise typer.BadParameter(f"{out}: expected nothing there, got {'a folder' if out.is_dir() else 'a file'}. "
                                 "Name another place, or pass --overwrite.")  # fmt: skip


def open_base(base: str | None, device: str, revision: str | None) -> BaseWeights | None:
    """The base that an option names, if it names one."""
    if base is None and revision is not None:
        raise typer.BadParameter("--base-revision: expected --base beside it.")
    return None if base is None else load_base(base, device=device, revision=revision)


def open_adapters(
    sources: Sequence[str],
    *,
    format: str | None,
    alpha: float | None,
    base: BaseWeights | None,
    split: str | None,
    name: str | None,
    initial: str | None,
    heads: str | None,
    pattern: str | None,
    device: str,
    revision: str | None,
    skip: bool = False,
) -> list[Adapter]:
    """The adapters that arguments name, all with the same options.

    With ``skip``, of several what is no adapter is left out with a note: a pattern of names catches other files too.
    """
    opened: list[Adapter] = []
    for source in sources:
        try:
            adapter = load_adapter(
                source,
                format=format,
                alpha=alpha,
                base=base,
                split=split,
                name=name,
                initial=initial,
                heads=head_counts(heads),
                pattern=pattern,
                device=device,
                revision=revision,
            )
        except LoraAnalysisError as error:
            if not skip or len(sources) == 1 or (source == sources[-1] and not opened):
                raise
            say(f"left out: {error}")
        else:
            opened.append(adapter)
    return opened

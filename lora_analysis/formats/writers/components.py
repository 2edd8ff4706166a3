"""Names with the component of a pipeline in front, which the formats of diffusion models need."""

from __future__ import annotations

from collections.abc import Mapping

from lora_analysis.errors import UnsupportedAdapterError

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def in_component(source: str, name: str, component: str | None, format: str) -> str:
    """A module's name with its component first: its own, or else the one given.

    Raises
    ------
    UnsupportedAdapterError
        If it has none, and none that is known is given.
    """
    first, _, rest = name.partition(".")
    if first in COMPONENTS and rest:
        return name
    if component in COMPONENTS:
        return f"{component}.{name}"
    given = "" if component is None else f", and component={component!r} is none"
    raise UnsupportedAdapterError(
        f"{source}: {name!r}: expected a name that begins with its component ({', '.join(COMPONENTS)}), which "
        f"{format}'s names need{given}. Pass component= with one of them."
    )


def require_distinct(source: str, names: Mapping[str, str], format: str) -> None:
    """Refuse modules that a format would call the same.

    Raises
    ------
    UnsupportedAdapterError
        If two have one name.
    """
    taken: dict[str, str] = {}
    for module, name in names.items():
        if (other := taken.setdefault(name, module)) != module:
            raise UnsupportedAdapterError(
                f"{source}: {module!r}: expected a {format} name of its own, got {name!r}, as {other!r} has."
            )

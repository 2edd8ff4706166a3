"""What a file is instead of what it should be, for error messages."""

from __future__ import annotations

from pathlib import Path

TORCH_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}


def what_is(path: Path) -> str:
    """A guess at what a file is instead, for error messages."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        return f"one that cannot be read ({error.strerror})"
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (run 'git lfs pull')"
    if head.lstrip()[:1] == b"<":
        return "an HTML or XML page"
    if head[:1] == b"\x80":
        return "a pickle that is damaged or holds more than tensors (nothing was executed)"
    if head.startswith(b"PK"):
        if path.suffix not in TORCH_SUFFIXES:
            return "a zip archive (a torch file?)"
        return "a zip archive that is damaged or holds more than tensors (nothing was executed)"
    if head.startswith(b"GGUF"):
        return "a GGUF file"
    return f"{path.stat().st_size:,} bytes that are damaged or something else"


def one_line(error: Exception) -> str:
    """The message of an error, on one line and not too long."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def is_file(path: Path) -> bool:
    """Whether there is a file; names that cannot be one are none."""
    return exists(path) and path.is_file()


def exists(path: Path) -> bool:
    """Whether there is anything of this name; names that cannot be one are none."""
    try:
        return path.exists()
    except OSError:  # a name too long to be one, as signed URLs are
        return False

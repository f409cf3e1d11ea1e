"""Names that become files: what every system can hold, and how to show what it cannot."""

from __future__ import annotations

import re

from hyimg.errors import HyimgError

MAX_NAME_CHARS = 200
"""Leaves room, within the 255 bytes of common file systems, for `-step00000100.safetensors` and the like."""

_FORBIDDEN = frozenset('<>:"|?*/\\')
# Windows gives these to devices, with any ending
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def printable(text: str) -> str:
    """The text with what is not UTF-8 escaped: a file name's bytes that no encoding explains."""
    return text.encode("utf-8", "backslashreplace").decode()


def plain_name_problem(name: str) -> str | None:
    """Why a name cannot be part of a file name on every system, or None where it can."""
    if not name.strip():
        return "it is empty"
    if found := sorted(_FORBIDDEN & set(name)):
        return f"it holds {' '.join(f'`{char}`' for char in found)}"
    if any(ord(char) < 32 for char in name):
        return "it holds a control character"
    if set(name) == {"."}:
        return "it stands for a folder"
    if name[-1] in ". ":
        return "it ends with a dot or a blank, which Windows takes away"
    if _DEVICE.fullmatch(name):
        return "Windows takes it for a device"
    # bytes are what a file system counts
    if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_CHARS:
        return f"it is longer than {MAX_NAME_CHARS} bytes"
    return None


def check_plain_name(name: str, option: str, *, hint: str | None = None) -> None:
    """Raises HyimgError where `name`, given with `option` (say `--output_name`), is no plain name."""
    if (problem := plain_name_problem(name)) is not None:
        raise HyimgError(f"`{option}` `{printable(name)}` must be a plain name: {problem}", hint=hint)

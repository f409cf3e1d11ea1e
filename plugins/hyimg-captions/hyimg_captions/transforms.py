"""Caption transforms: `(caption, context) -> caption`, each a function of the caption alone."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from hyimg.errors import HyimgError

if TYPE_CHECKING:
    from hyimg.data.captions import CaptionContext


def underscores(caption: str, context: CaptionContext, *, separator: str = ",") -> str:
    """Blanks for the underscores of each tag that has two letters or more in a row; `^_^` and `>_<` stay."""
    lines = []
    for line in caption.split("\n"):
        tags = line.split(separator)
        lines.append(separator.join(_blanks(tag) for tag in tags))
    return "\n".join(lines)


def _blanks(tag: str) -> str:
    is_word = any(one.isalpha() and other.isalpha() for one, other in pairwise(tag))
    return tag.replace("_", " ") if is_word else tag


def replace(caption: str, context: CaptionContext, *, old: str, new: str = "") -> str:
    """`new` wherever `old` stands; raises HyimgError for an empty `old`."""
    if not old:
        raise HyimgError("`old` of the caption transform `replace` is empty", hint="say what to replace")
    return caption.replace(old, new)

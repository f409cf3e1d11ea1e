"""Functions and classes by their place, and how somebody else's exceptions and values are called in a sentence."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from hyimg.errors import HyimgError


def load_object(place: str) -> Callable[..., Any]:
    """The function or class at "module:name", or at "package.Class"; HyimgError where there is none."""
    module_name, _, name = place.partition(":") if ":" in place else place.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (Exception, SystemExit) as error:  # a module's own code runs on import
        raise HyimgError(
            f"`{place}` cannot be imported: {describe(error)}",
            hint="install the package that holds it, or mend the name",
        ) from error
    if not callable(found):
        raise HyimgError(f"`{place}` is no function or class")
    return found  # type: ignore[no-any-return]


def describe(error: BaseException) -> str:
    """Somebody else's exception on one line: its type, and its message where it has one."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def with_article(noun: str) -> str:
    """ "a list", "an int"."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"

"""Plugins: loading them, finding the functions that they provide, and binding their arguments.

Plugins are our own built-ins, installed packages with an entry point in the group `hyimg`, and what
`--plugin FILE_OR_MODULE` names. Nothing is loaded just because it is in some folder. The environment
variable `HYIMG_LOAD_PLUGINS` (comma-separated entry point names, empty for none) selects among the packages.

    plugins = load_plugins(["mine.py"])
    loss = plugins.resolve("losses", "frequency")
    # from hyimg.plugins.arguments
    arguments = bind_arguments(loss, parse_arguments(["gain=3"], "--loss_args"), option="--loss_args", name="frequency")
"""

from __future__ import annotations

from hyimg.plugins.manager import (
    BUILTIN_MODULE,
    ENTRY_POINT_GROUP,
    LoadedPlugin,
    Plugins,
    ProvidedEntry,
    ProvidedKind,
    load_object,
    load_plugins,
)

__all__ = [
    "BUILTIN_MODULE",
    "ENTRY_POINT_GROUP",
    "LoadedPlugin",
    "Plugins",
    "ProvidedEntry",
    "ProvidedKind",
    "load_object",
    "load_plugins",
]

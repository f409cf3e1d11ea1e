"""Plugins: what is loaded, from where, who provides which name, and the arguments that reach it.

Plugins are our own built-ins, installed packages with an entry point in the group `hyimg`, and what
`--plugin FILE_OR_MODULE` names. Nothing is loaded because it happens to lie in a folder. The environment
variable `HYIMG_LOAD_PLUGINS` (comma-separated entry point names, empty for none) selects among the packages.

    plugins = load_plugins(["mine.py"])
    loss = plugins.resolve("losses", "frequency")
    arguments = bind_arguments(loss, parse_arguments(["gain=3"], "--loss_args"), option="--loss_args", name="frequency")
"""

from __future__ import annotations

from hyimg.plugins.arguments import bind_arguments, check_names, parse_arguments
from hyimg.plugins.loading import BUILTIN_MODULES, ENTRY_POINT_GROUP, load_plugins
from hyimg.plugins.objects import describe, load_object
from hyimg.plugins.registry import Entry, Kind, LoadedPlugin, Plugins

__all__ = [
    "BUILTIN_MODULES",
    "ENTRY_POINT_GROUP",
    "Entry",
    "Kind",
    "LoadedPlugin",
    "Plugins",
    "bind_arguments",
    "check_names",
    "describe",
    "load_object",
    "load_plugins",
    "parse_arguments",
]

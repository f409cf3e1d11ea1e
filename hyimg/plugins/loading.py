"""Importing plugins: the built-ins, installed packages by their entry points, and what `--plugin` names."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hyimg.errors import HyimgError, did_you_mean
from hyimg.plugins.objects import describe, with_article
from hyimg.plugins.registry import MEND, Plugins

BUILTIN_MODULES = (
    "hyimg.flow.builtins",
    "hyimg.training.builtins",
    "hyimg.lora.builtins",
    "hyimg.cli.builtins",
)
ENTRY_POINT_GROUP = "hyimg"


def load_plugins(extra: Sequence[str] = (), *, problems: list[HyimgError] | None = None) -> Plugins:
    """The built-ins, the installed packages, and `extra` (what `--plugin` named), in that order.

    Raises HyimgError, naming the plugin and its place, for one that cannot be imported or whose hooks are
    wrong. Where `problems` is given, these are appended to it and that plugin is left out.
    """
    plugins = Plugins()
    for module_name in BUILTIN_MODULES:
        plugins.register(importlib.import_module(module_name), module_name, "built in")
    for name, origin, load in (*_installed(problems), *map(_named, extra)):
        try:
            plugins.register(_import(load, name, origin), name, origin)
        except HyimgError as error:
            if problems is None:
                raise
            problems.append(error)
    return plugins


def _installed(problems: list[HyimgError] | None) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Name, origin and import of each selected package."""
    try:
        selected = _selected_entry_points()
    except HyimgError as error:
        if problems is None:
            raise
        problems.append(error)
        return
    for entry_point in selected:
        distribution = entry_point.dist
        origin = f"{distribution.name} {distribution.version}" if distribution else entry_point.value
        yield entry_point.name, origin, entry_point.load


def _named(place: str) -> tuple[str, str, Callable[[], Any]]:
    """The same of what `--plugin` names."""
    if place.endswith(".py") or os.sep in place or Path(place).is_file():
        return Path(place).stem, place, functools.partial(_import_file, Path(place))
    return place, place, functools.partial(importlib.import_module, place)


def _selected_entry_points() -> list[importlib.metadata.EntryPoint]:
    found = sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name)
    selection = os.environ.get("HYIMG_LOAD_PLUGINS")
    if selection is None:
        return found
    wanted = [name.strip() for name in selection.split(",") if name.strip()]
    known = {e.name for e in found}
    for name in wanted:
        if name not in known:
            raise HyimgError(
                f"`HYIMG_LOAD_PLUGINS` names `{name}`, which is not installed",
                hint=did_you_mean(name, known) or "`hyimg plugins` lists what is",
            )
    return [e for e in found if e.name in wanted]


def _import(load: Callable[[], Any], name: str, origin: str) -> ModuleType:
    try:
        module = load()
    except HyimgError:
        raise
    except (Exception, SystemExit) as error:
        raise HyimgError(
            f"the plugin `{name}` ({origin}) cannot be imported: {describe(error)}", hint=MEND
        ) from error
    if not isinstance(module, ModuleType):
        raise HyimgError(
            f"the plugin `{name}` ({origin}) is {with_article(type(module).__name__)}, not a module",
            hint=f"its entry point must name a module, without a `:` ({MEND})",
        )
    return module


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise HyimgError(
            f"the plugin file `{path}` does not exist", hint="give `--plugin` a `.py` file or a module"
        )
    # the name carries the place, so that two files of one name do not meet in sys.modules
    digest = hashlib.blake2b(str(path.resolve()).encode(), digest_size=4).hexdigest()
    spec = importlib.util.spec_from_file_location(f"hyimg_plugin_{path.stem}_{digest}", path)
    if spec is None or spec.loader is None:
        raise HyimgError(f"the plugin file `{path}` is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module

"""The plugin manager: what is loaded, from where, and who provides which name.

Plugins are our own built-ins, installed packages with an entry point in the group `hyimg`, and what
`--plugin FILE_OR_MODULE` names. Nothing is loaded because it happens to lie in a folder. The environment
variable `HYIMG_LOAD_PLUGINS` (comma-separated entry point names, empty for none) selects among the packages.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pluggy

from hyimg import hookspecs
from hyimg.errors import HyimgError, did_you_mean, nearest

BUILTIN_MODULES = ("hyimg.flow.builtins", "hyimg.training.builtins")
ENTRY_POINT_GROUP = "hyimg"

Kind = Literal["losses", "samplers", "timestep_samplers", "optimizers"]
_OPTION = {
    "losses": "--loss_type",
    "samplers": "--sampler",
    "timestep_samplers": "--timestep_sampling",
    "optimizers": "--optimizer_type",
}


@dataclass(frozen=True)
class LoadedPlugin:
    """One plugin: its name, and where it came from (`built in`, a package with its version, or a file)."""

    name: str
    origin: str
    provides: dict[str, tuple[str, ...]]


class Plugins:
    """The loaded plugins, and the functions that they provide by name."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager("hyimg")
        self.manager.add_hookspecs(hookspecs)
        self._origins: dict[str, str] = {}

    @property
    def hook(self) -> Any:
        """The event hooks, to be called with keyword arguments (`plugins.hook.hyimg_run_start(run=run)`)."""
        return self.manager.hook

    def register(self, module: ModuleType, name: str, origin: str) -> None:
        """Adds a plugin module; a hook that hyimg does not know is an error, since it would never be called."""
        if self.manager.has_plugin(name):
            raise HyimgError(f"the plugin `{name}` is loaded twice, the second time from {origin}")
        unknown = [n for n in dir(module) if n.startswith("hyimg_") and not hasattr(self.manager.hook, n)]
        if unknown:
            known = [n for n in dir(hookspecs) if n.startswith("hyimg_")]
            raise HyimgError(
                f"the plugin `{name}` ({origin}) implements `{unknown[0]}`, which is no hook",
                hint=did_you_mean(unknown[0], known) or f"the hooks are {', '.join(known)}",
            )
        self.manager.register(module, name)
        self._origins[name] = origin

    def provided(self, kind: Kind) -> dict[str, str | Callable[..., Any]]:
        """All names of a kind with what stands for each; raises HyimgError where two plugins give one name."""
        found: dict[str, str | Callable[..., Any]] = {}
        givers: dict[str, str] = {}
        for implementation in getattr(self.manager.hook, f"hyimg_{kind}").get_hookimpls():
            plugin = implementation.plugin_name
            for name, target in implementation.function().items():
                if name in found:
                    raise HyimgError(
                        f"the plugin `{plugin}` ({self._origins[plugin]}) gives `{name}` for `{_OPTION[kind]}`, "
                        f"which `{givers[name]}` has already",
                        hint="rename one of the two, or load only one plugin",
                    )
                found[name], givers[name] = target, plugin
        return found

    def resolve(self, kind: Kind, name: str) -> Callable[..., Any]:
        """The function of that name, imported now; raises HyimgError that lists the names there are."""
        found = self.provided(kind)
        by_lower = {known.lower(): known for known in found}
        actual = by_lower.get(name.lower())
        if actual is None:
            close = nearest(name, found)
            known = ", ".join(f"`{n}`" for n in sorted(found, key=str.lower))
            raise HyimgError(
                f"`{_OPTION[kind]}` `{name}` is unknown",
                hint=f"did you mean `{close[0]}`? (there are {known})" if close else f"there are {known}",
            )
        target = found[actual]
        return target if callable(target) else load_object(target)

    def listing(self) -> list[LoadedPlugin]:
        """Every loaded plugin with what it provides, in order of loading."""
        rows = []
        for name, module in self.manager.list_name_plugin():
            provides = {
                kind: tuple(getattr(module, f"hyimg_{kind}")())
                for kind in _OPTION
                if hasattr(module, f"hyimg_{kind}")
            }
            rows.append(LoadedPlugin(name, self._origins[name], provides))
        return rows


def load_plugins(extra: Sequence[str] = ()) -> Plugins:
    """The built-ins, the installed packages, and `extra` (what `--plugin` named), in that order.

    Raises HyimgError, naming the plugin and its place, for one that cannot be imported.
    """
    plugins = Plugins()
    for module_name in BUILTIN_MODULES:
        plugins.register(importlib.import_module(module_name), module_name, "built in")
    for entry_point in _selected_entry_points():
        distribution = entry_point.dist
        origin = f"{distribution.name} {distribution.version}" if distribution else entry_point.value
        plugins.register(_import(entry_point.load, entry_point.name, origin), entry_point.name, origin)
    for place in extra:
        if place.endswith(".py") or os.sep in place or Path(place).is_file():
            module = _import_file(Path(place))
            plugins.register(module, Path(place).stem, str(place))
        else:
            load = functools.partial(importlib.import_module, place)
            plugins.register(_import(load, place, place), place, place)
    return plugins


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
    except Exception as error:
        raise HyimgError(
            f"the plugin `{name}` ({origin}) cannot be imported: {type(error).__name__}: {error}",
            hint="mend or uninstall it, or choose plugins with the environment variable HYIMG_LOAD_PLUGINS",
        ) from error
    assert isinstance(module, ModuleType), f"the entry point `{name}` must name a module"
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
    module, loader = importlib.util.module_from_spec(spec), spec.loader

    def load() -> ModuleType:
        sys.modules[module.__name__] = module
        loader.exec_module(module)
        return module

    return _import(load, path.stem, str(path))


def load_object(place: str) -> Callable[..., Any]:
    """The function or class at "module:name", or at "package.Class"."""
    module_name, _, name = place.partition(":") if ":" in place else place.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise HyimgError(
            f"`{place}` cannot be imported: {error}",
            hint="install the package that holds it, or mend the name",
        ) from error
    if not callable(found):
        raise HyimgError(f"`{place}` is no function or class")
    return found  # type: ignore[no-any-return]


def parse_arguments(pairs: Iterable[str], option: str) -> dict[str, Any]:
    """`"name=value"` texts as a dictionary; values are Python literals where they can be read as such.

    `true`, `false` and `none` count as literals in any case. Raises HyimgError for a text without `=`.
    """
    result: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip():
            raise HyimgError(f"`{option}` takes `name=value`, got `{pair}`")
        result[name.strip()] = _literal(text.strip())
    return result


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def bind_arguments(
    function: Callable[..., Any], arguments: dict[str, Any], *, option: str, name: str
) -> dict[str, Any]:
    """`arguments` after checking that the function takes them as keywords.

    Raises HyimgError for an argument that it does not take, naming those it does.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return arguments
    takes = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty]
    for argument in arguments:
        if argument not in takes:
            known = ", ".join(f"`{t}`" for t in takes) or "none"
            raise HyimgError(
                f"`{option}`: `{name}` takes no argument `{argument}`",
                hint=did_you_mean(argument, takes) or f"its arguments: {known}",
            )
    return arguments

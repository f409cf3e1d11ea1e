"""The plugins that are loaded, and the functions that they provide by name.

Plugins are our own built-ins, installed packages with an entry point in the group `hyimg`, and what `--plugin` names.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import pluggy

from hyimg import hookspecs
from hyimg.errors import HyimgError, RunError, did_you_mean, nearest
from hyimg.hookspecs import Provided
from hyimg.plugins.guard import guarded

HOOKS = tuple(name for name in dir(hookspecs) if name.startswith("hyimg_"))


def check_hook(place: str, hook: str, function: object) -> None:
    """Raises HyimgError for a hook that does not exist, is not marked, is a wrapper, or takes unknown arguments.

    `place` names the plugin and its origin.
    """
    if hook not in HOOKS:
        raise HyimgError(
            f"{place} implements `{hook}`, which is not a hook",
            hint=did_you_mean(hook, HOOKS) or f"the hooks are {', '.join(HOOKS)}",
        )
    blame = f"{place}: hook `{hook}`"
    marks = getattr(function, "hyimg_impl", None)
    if marks is None or not inspect.isroutine(function):
        raise HyimgError(
            f"{blame} is not marked, so it would never be called",
            hint="decorate the function with `@hookimpl` from hyimg.hookspecs",
        )
    if marks["wrapper"] or marks["hookwrapper"]:
        raise HyimgError(f"{blame} is a wrapper", hint="write a plain hook function")
    may = tuple(inspect.signature(getattr(hookspecs, hook)).parameters)
    for parameter in inspect.signature(function).parameters.values():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not variadic and parameter.name not in may:
            takes = ", ".join(f"`{name}`" for name in may) if may else "nothing"
            raise HyimgError(
                f"{blame} takes `{parameter.name}`, which the hook does not pass",
                hint=f"the hook may take {takes}",
            )


def load_object(place: str) -> Callable[..., Any]:
    """The function or class at "module:name" or "package.Class"; raises HyimgError if there is none."""
    module_name, _, name = place.partition(":") if ":" in place else place.rpartition(".")
    hint = "install the package that contains it, or correct the name"
    with guarded(
        f"`{place}` cannot be imported", hint=hint, imports=True
    ):  # a module's own code runs on import
        found = getattr(importlib.import_module(module_name), name)
    if not callable(found):
        raise HyimgError(f"`{place}` is not a function or class")
    return found  # type: ignore[no-any-return]


def with_article(noun: str) -> str:
    """ "a list", "an int"."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


ProvidedKind = Literal[
    "losses",
    "samplers",
    "timestep_samplers",
    "optimizers",
    "networks",
    "caption_transforms",
    "commands",
]
_OPTION: Mapping[ProvidedKind, str] = {
    "losses": "--loss_type",
    "samplers": "--sampler",
    "timestep_samplers": "--timestep_sampling",
    "optimizers": "--optimizer_type",
    "networks": "--network_module",
    "caption_transforms": "--caption_transform",
    "commands": "hyimg NAME",
}
FIX = "fix or uninstall it, or choose plugins with the environment variable HYIMG_LOAD_PLUGINS"


class ProvidedEntry(NamedTuple):
    """A name as its plugin spells it, the function or its place ("module:function"), and the plugin's name."""

    name: str
    target: str | Callable[..., Any]
    plugin: str


@dataclass(frozen=True)
class LoadedPlugin:
    """A plugin: its name, its origin (`built in`, a package with its version, or a file or module), the hooks that it
    implements, and the names that it provides by kind."""

    name: str
    origin: str
    hooks: tuple[str, ...]
    provides: dict[str, tuple[str, ...]]


class Plugins:
    """The loaded plugins, and the functions that they provide by name.

    Faults of a plugin are HyimgErrors that name it, its origin and the hook.
    """

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager("hyimg")
        self.manager.add_hookspecs(hookspecs)
        self._origins: dict[str, str] = {}

    def register(self, module: ModuleType, name: str, origin: str) -> None:
        """Adds a plugin module; raises HyimgError if a hook of it would never be called, or not as it is written."""
        if self.manager.has_plugin(name):
            raise HyimgError(f"the plugin `{name}` is loaded twice, the second time from {origin}")
        if (known_as := self.manager.get_name(module)) is not None:
            raise HyimgError(
                f"`--plugin` `{name}` is already loaded as the plugin `{known_as}` "
                f"({self._origins[known_as]})",
                hint="remove `--plugin`, or deselect the installed plugin with `HYIMG_LOAD_PLUGINS`",
            )
        place = f"the plugin `{name}` ({origin})"
        for hook in dir(module):
            if hook.startswith("hyimg_"):
                check_hook(place, hook, getattr(module, hook))
        try:
            self.manager.register(module, name)
        except pluggy.PluginValidationError as error:
            raise HyimgError(f"{place} is invalid: {' '.join(str(error).split())}") from error
        self._origins[name] = origin

    def notify(self, event: str, **details: Any) -> None:
        """Calls the event hook `event` ("hyimg_run_start") of every plugin, the last loaded first.

        An exception in one becomes a RunError that names plugin and hook; a HyimgError passes unchanged.
        """
        for implementation in reversed(getattr(self.manager.hook, event).get_hookimpls()):
            with guarded(
                f"{self.place(implementation.plugin_name)}: hook `{event}` failed",
                hint="fix the plugin, or run without it; `--traceback` shows where it failed",
                error=RunError,
            ):
                implementation.function(*(details[argument] for argument in implementation.argnames))

    def provided(self, kind: ProvidedKind) -> dict[str, str | Callable[..., Any]]:
        """All names of a kind with their functions or places.

        Raises HyimgError if two plugins provide the same name, whatever its case.
        """
        return {entry.name: entry.target for entry in self.entries(kind).values()}

    def canonical(self, kind: ProvidedKind, name: str) -> str:
        """The name as its plugin spells it, for a name in any case; raises like `resolve`."""
        return self._entry(kind, name).name

    def resolve(self, kind: ProvidedKind, name: str) -> Callable[..., Any]:
        """The function of that name in any case, imported now; raises a HyimgError that lists the known names."""
        return self.load(kind, self._entry(kind, name))

    def load(self, kind: ProvidedKind, entry: ProvidedEntry) -> Callable[..., Any]:
        """The function of an entry, imported now; raises a HyimgError that names the plugin if that fails."""
        if callable(entry.target):
            return entry.target
        try:
            return load_object(entry.target)
        except HyimgError as error:
            raise HyimgError(
                f"{self.place(entry.plugin)}: hook `hyimg_{kind}`: `{entry.name}`: {error.message}",
                hint=error.hint,
            ) from error

    def listing(self) -> list[LoadedPlugin]:
        """Every loaded plugin with what it provides, in order of loading; raises like `provided`."""
        provides: dict[str, dict[str, list[str]]] = {name: {} for name in self._origins}
        for kind in _OPTION:
            for entry in self.entries(kind).values():
                provides[entry.plugin].setdefault(kind, []).append(entry.name)
        return [
            LoadedPlugin(
                name,
                origin,
                tuple(sorted(caller.name for caller in self.manager.get_hookcallers(plugin) or ())),
                {kind: tuple(names) for kind, names in provides[name].items()},
            )
            for name, origin in self._origins.items()
            if (plugin := self.manager.get_plugin(name)) is not None
        ]

    def _entry(self, kind: ProvidedKind, name: str) -> ProvidedEntry:
        entries = self.entries(kind)
        if name.lower() in entries:
            return entries[name.lower()]
        names = [entry.name for entry in entries.values()]
        listed = "choose from " + ", ".join(f"`{n}`" for n in sorted(names, key=str.lower))
        if not names:
            listed = "no loaded plugin provides one (`hyimg plugins` lists them, `--plugin` loads another)"
        close = nearest(name, names)
        raise HyimgError(
            f"`{_OPTION[kind]}` `{name}` is unknown",
            hint=f"did you mean `{close[0]}`? ({listed})" if close else listed,
        )

    def entries(
        self, kind: ProvidedKind, *, problems: list[HyimgError] | None = None
    ) -> dict[str, ProvidedEntry]:
        """All entries of a kind by the name in lower case.

        Raises HyimgError for a faulty hook and for a name that is already taken. If `problems` is given, these are
        appended to it instead, and the entries that they are about are skipped.
        """
        found: dict[str, ProvidedEntry] = {}
        for implementation in self._implementations(kind):
            try:
                for name, target in self._given(implementation, kind).items():
                    self._add(found, kind, ProvidedEntry(name, target, implementation.plugin_name))
            except HyimgError as error:
                if problems is None:
                    raise
                problems.append(error)
        return found

    def _add(self, found: dict[str, ProvidedEntry], kind: ProvidedKind, entry: ProvidedEntry) -> None:
        if (there := found.get(entry.name.lower())) is not None:
            same = "" if there.name == entry.name else f" as `{there.name}`"
            raise HyimgError(
                f"{self.place(entry.plugin)} provides `{entry.name}` for `{_OPTION[kind]}`, "
                f"which `{there.plugin}` already has{same}",
                hint="rename one of the two, or load only one plugin",
            )
        found[entry.name.lower()] = entry

    def _implementations(self, kind: ProvidedKind) -> list[pluggy.HookImpl]:
        implementations: list[pluggy.HookImpl] = getattr(self.manager.hook, f"hyimg_{kind}").get_hookimpls()
        return implementations

    def _given(self, implementation: pluggy.HookImpl, kind: ProvidedKind) -> Provided:
        """The checked return value of one plugin's hook."""
        blame = f"{self.place(implementation.plugin_name)}: hook `hyimg_{kind}`"
        with guarded(f"{blame} failed", hint=FIX):
            given: object = implementation.function()
        must = "it must return a mapping from names to functions or `module:function` strings"
        if not isinstance(given, Mapping):
            raise HyimgError(f"{blame} returned {with_article(type(given).__name__)}", hint=must)
        for name, target in given.items():
            if not isinstance(name, str) or not (isinstance(target, str) or callable(target)):
                raise HyimgError(f"{blame} returned `{name!r}: {target!r}`", hint=must)
        return given

    def place(self, plugin: str) -> str:
        """A loaded plugin as messages name it."""
        return f"the plugin `{plugin}` ({self._origins[plugin]})"


BUILTIN_MODULE = "hyimg.plugins.builtins"
_PLUGIN_BYTES = 10_000_000
ENTRY_POINT_GROUP = "hyimg"


def load_plugins(extra: Sequence[str] = (), *, problems: list[HyimgError] | None = None) -> Plugins:
    """The built-ins, the installed packages, and `extra` (the values of `--plugin`), in that order.

    Raises a HyimgError that names the plugin and its origin if it cannot be imported or its hooks are faulty. If
    `problems` is given, these are appended to it instead, and that plugin is skipped.
    """
    plugins = Plugins()
    plugins.register(importlib.import_module(BUILTIN_MODULE), BUILTIN_MODULE, "built in")
    for name, origin, load in (*_installed(problems), *map(_named, extra)):
        try:
            plugins.register(_import(load, name, origin), name, origin)
        except HyimgError as error:
            if problems is None:
                raise
            problems.append(error)
    return plugins


def _installed(problems: list[HyimgError] | None) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Name, origin and import function of each selected package."""
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
    """Name, origin and import function of a value of `--plugin`."""
    if (
        place.endswith(".py") or os.sep in place or os.path.isfile(place)
    ):  # false for a name that no file can have
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
                hint=did_you_mean(name, known) or "`hyimg plugins` lists the installed ones",
            )
    return [e for e in found if e.name in wanted]


def _import(load: Callable[[], Any], name: str, origin: str) -> ModuleType:
    with guarded(f"the plugin `{name}` ({origin}) cannot be imported", hint=FIX, imports=True):
        module = load()
    if not isinstance(module, ModuleType):
        raise HyimgError(
            f"the plugin `{name}` ({origin}) is {with_article(type(module).__name__)}, not a module",
            hint=f"its entry point must name a module, without a `:` ({FIX})",
        )
    return module


def _import_file(path: Path) -> ModuleType:
    from hyimg.config.documents import require_regular

    hint = "`--plugin` takes a `.py` file or a module's name"
    try:
        require_regular(path, _PLUGIN_BYTES)
    except FileNotFoundError:
        raise HyimgError(f"the plugin file `{path}` does not exist", hint=hint) from None
    except OSError as error:
        raise HyimgError(f"cannot read the plugin file `{path}`: {error.strerror}", hint=hint) from None
    # the module's name includes a hash of the path, so that files of one name do not collide in sys.modules
    digest = hashlib.blake2b(str(path.resolve()).encode(), digest_size=4).hexdigest()
    spec = importlib.util.spec_from_file_location(f"hyimg_plugin_{path.stem}_{digest}", path)
    if spec is None or spec.loader is None:
        raise HyimgError(f"the plugin file `{path}` is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import pluggy

from hyimg import hookspecs
from hyimg.errors import HyimgError, RunError, did_you_mean, nearest
from hyimg.hookspecs import Provided

BUILTIN_MODULES = ("hyimg.flow.builtins", "hyimg.training.builtins")
ENTRY_POINT_GROUP = "hyimg"

Kind = Literal["losses", "samplers", "timestep_samplers", "optimizers"]
_OPTION: Mapping[Kind, str] = {
    "losses": "--loss_type",
    "samplers": "--sampler",
    "timestep_samplers": "--timestep_sampling",
    "optimizers": "--optimizer_type",
}
_MEND = "mend or uninstall it, or choose plugins with the environment variable HYIMG_LOAD_PLUGINS"


class _Entry(NamedTuple):
    """A name as its plugin spells it, the function or its place, and the plugin's name."""

    name: str
    target: str | Callable[..., Any]
    plugin: str


@dataclass(frozen=True)
class LoadedPlugin:
    """One plugin: its name, and where it came from (`built in`, a package with its version, or a file)."""

    name: str
    origin: str
    provides: dict[str, tuple[str, ...]]


class Plugins:
    """The loaded plugins, and the functions that they provide by name.

    What a plugin does wrong is a HyimgError that names it, its place and the hook.
    """

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager("hyimg")
        self.manager.add_hookspecs(hookspecs)
        self._origins: dict[str, str] = {}

    @property
    def hook(self) -> Any:
        """The hooks as pluggy has them; events go through `notify`, which says whose hook has failed."""
        return self.manager.hook

    def register(self, module: ModuleType, name: str, origin: str) -> None:
        """Adds a plugin module; a hook that would never be called, or not as it is written, is an error."""
        if self.manager.has_plugin(name):
            raise HyimgError(f"the plugin `{name}` is loaded twice, the second time from {origin}")
        if (known_as := self.manager.get_name(module)) is not None:
            raise HyimgError(
                f"`--plugin` `{name}` names what is loaded already, the plugin `{known_as}` "
                f"({self._origins[known_as]})",
                hint="leave `--plugin` out, or leave the installed plugin out with `HYIMG_LOAD_PLUGINS`",
            )
        self._origins[name] = origin
        for hook in dir(module):
            if hook.startswith("hyimg_"):
                self._check_hook(name, hook, getattr(module, hook))
        try:
            self.manager.register(module, name)
        except pluggy.PluginValidationError as error:
            raise HyimgError(f"{self._place(name)} does not fit: {' '.join(str(error).split())}") from error

    def notify(self, event: str, **details: Any) -> None:
        """Calls the event hook `event` ("hyimg_run_start") of every plugin, the last loaded first.

        Raises RunError, naming plugin and hook, for one that raises; its own HyimgError stays as it is.
        """
        for implementation in reversed(getattr(self.manager.hook, event).get_hookimpls()):
            try:
                implementation.function(*(details[argument] for argument in implementation.argnames))
            except HyimgError:
                raise
            except (Exception, SystemExit) as error:
                raise RunError(
                    f"{self._place(implementation.plugin_name)}: hook `{event}` failed: {describe(error)}",
                    hint="mend the plugin, or run without it; `--traceback` shows where it failed",
                ) from error

    def provided(self, kind: Kind) -> dict[str, str | Callable[..., Any]]:
        """All names of a kind with what stands for each.

        Raises HyimgError where two plugins give one name; upper and lower case are one name.
        """
        return {entry.name: entry.target for entry in self._entries(kind).values()}

    def canonical(self, kind: Kind, name: str) -> str:
        """The name as its plugin spells it, for a name in any case; raises as `resolve`."""
        return self._entry(kind, name).name

    def resolve(self, kind: Kind, name: str) -> Callable[..., Any]:
        """The function of that name in any case, imported now; raises HyimgError that lists the names there are."""
        canonical, target, plugin = self._entry(kind, name)
        if callable(target):
            return target
        try:
            return load_object(target)
        except HyimgError as error:
            raise HyimgError(
                f"{self._place(plugin)}: hook `hyimg_{kind}`: `{canonical}`: {error.message}",
                hint=error.hint,
            ) from error

    def listing(self) -> list[LoadedPlugin]:
        """Every loaded plugin with what it provides, in order of loading."""
        provides: dict[str, dict[str, tuple[str, ...]]] = {name: {} for name in self._origins}
        for kind in _OPTION:
            for implementation in self._implementations(kind):
                provides[implementation.plugin_name][kind] = tuple(self._given(implementation, kind))
        return [LoadedPlugin(name, origin, provides[name]) for name, origin in self._origins.items()]

    def _entry(self, kind: Kind, name: str) -> _Entry:
        entries = self._entries(kind)
        if name.lower() in entries:
            return entries[name.lower()]
        names = [entry.name for entry in entries.values()]
        listed = "there are " + ", ".join(f"`{n}`" for n in sorted(names, key=str.lower))
        close = nearest(name, names)
        raise HyimgError(
            f"`{_OPTION[kind]}` `{name}` is unknown",
            hint=f"did you mean `{close[0]}`? ({listed})" if close else listed,
        )

    def _entries(self, kind: Kind) -> dict[str, _Entry]:
        """All entries of a kind by the name in lower case."""
        found: dict[str, _Entry] = {}
        for implementation in self._implementations(kind):
            plugin = implementation.plugin_name
            for name, target in self._given(implementation, kind).items():
                if (there := found.get(name.lower())) is not None:
                    same = "" if there.name == name else f" as `{there.name}`"
                    raise HyimgError(
                        f"{self._place(plugin)} gives `{name}` for `{_OPTION[kind]}`, "
                        f"which `{there.plugin}` has already{same}",
                        hint="rename one of the two, or load only one plugin",
                    )
                found[name.lower()] = _Entry(name, target, plugin)
        return found

    def _implementations(self, kind: Kind) -> list[pluggy.HookImpl]:
        implementations: list[pluggy.HookImpl] = getattr(self.manager.hook, f"hyimg_{kind}").get_hookimpls()
        return implementations

    def _given(self, implementation: pluggy.HookImpl, kind: Kind) -> Provided:
        """What one plugin's hook returns, checked."""
        blame = f"{self._place(implementation.plugin_name)}: hook `hyimg_{kind}`"
        try:
            given: object = implementation.function()
        except HyimgError:
            raise
        except (Exception, SystemExit) as error:
            raise HyimgError(f"{blame} failed: {describe(error)}", hint=_MEND) from error
        must = "it must return a mapping from names to functions or to their places as `module:function`"
        if not isinstance(given, Mapping):
            raise HyimgError(f"{blame} returned {_article(type(given).__name__)}", hint=must)
        for name, target in given.items():
            if not isinstance(name, str) or not (isinstance(target, str) or callable(target)):
                raise HyimgError(f"{blame} returned `{name!r}: {target!r}`", hint=must)
        return given

    def _check_hook(self, plugin: str, hook: str, function: object) -> None:
        known = [name for name in dir(hookspecs) if name.startswith("hyimg_")]
        if hook not in known:
            raise HyimgError(
                f"{self._place(plugin)} implements `{hook}`, which is no hook",
                hint=did_you_mean(hook, known) or f"the hooks are {', '.join(known)}",
            )
        blame = f"{self._place(plugin)}: hook `{hook}`"
        marks = getattr(function, "hyimg_impl", None)
        if marks is None or not inspect.isroutine(function):
            raise HyimgError(
                f"{blame} is not marked, so it would never be called",
                hint="put `@hookimpl` (from hyimg.hookspecs) in front of the function",
            )
        if marks["wrapper"] or marks["hookwrapper"]:
            raise HyimgError(
                f"{blame} is a wrapper", hint="write a function that is called beside the others"
            )
        may = tuple(inspect.signature(getattr(hookspecs, hook)).parameters)
        for parameter in inspect.signature(function).parameters.values():
            variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if parameter.default is parameter.empty and not variadic and parameter.name not in may:
                takes = ", ".join(f"`{name}`" for name in may) if may else "nothing"
                raise HyimgError(
                    f"{blame} asks for `{parameter.name}`, which it is not given",
                    hint=f"the hook may take {takes}",
                )

    def _place(self, plugin: str) -> str:
        return f"the plugin `{plugin}` ({self._origins[plugin]})"


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
    except (Exception, SystemExit) as error:
        raise HyimgError(
            f"the plugin `{name}` ({origin}) cannot be imported: {describe(error)}", hint=_MEND
        ) from error
    if not isinstance(module, ModuleType):
        raise HyimgError(
            f"the plugin `{name}` ({origin}) is {_article(type(module).__name__)}, not a module",
            hint=f"its entry point must name a module, without a `:` ({_MEND})",
        )
    return module


def describe(error: BaseException) -> str:
    """Somebody else's exception on one line: its type, and its message where it has one."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


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
    except (Exception, SystemExit) as error:  # a module's own code runs on import
        raise HyimgError(
            f"`{place}` cannot be imported: {describe(error)}",
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

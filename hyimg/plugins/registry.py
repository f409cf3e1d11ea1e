"""Who provides which name: the loaded plugins, their hooks, and the functions that these give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple

import pluggy

from hyimg import hookspecs
from hyimg.errors import HyimgError, RunError, nearest
from hyimg.hookspecs import Provided
from hyimg.plugins.hook_check import check_hook
from hyimg.plugins.objects import describe, load_object, with_article

Kind = Literal[
    "losses",
    "samplers",
    "timestep_samplers",
    "optimizers",
    "networks",
    "caption_transforms",
    "commands",
]
_OPTION: Mapping[Kind, str] = {
    "losses": "--loss_type",
    "samplers": "--sampler",
    "timestep_samplers": "--timestep_sampling",
    "optimizers": "--optimizer_type",
    "networks": "--network_module",
    "caption_transforms": "--caption_transform",
    "commands": "hyimg NAME",
}
MEND = "mend or uninstall it, or choose plugins with the environment variable HYIMG_LOAD_PLUGINS"


class Entry(NamedTuple):
    """A name as its plugin spells it, the function or its place, and the plugin's name."""

    name: str
    target: str | Callable[..., Any]
    plugin: str


@dataclass(frozen=True)
class LoadedPlugin:
    """One plugin: its name, where it came from (`built in`, a package with its version, or a file or module),
    the hooks that it implements, and the names that it provides."""

    name: str
    origin: str
    hooks: tuple[str, ...]
    provides: dict[str, tuple[str, ...]]


class Plugins:
    """The loaded plugins, and the functions that they provide by name.

    What a plugin does wrong is a HyimgError that names it, its place and the hook.
    """

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager("hyimg")
        self.manager.add_hookspecs(hookspecs)
        self._origins: dict[str, str] = {}

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
        place = f"the plugin `{name}` ({origin})"
        for hook in dir(module):
            if hook.startswith("hyimg_"):
                check_hook(place, hook, getattr(module, hook))
        try:
            self.manager.register(module, name)
        except pluggy.PluginValidationError as error:
            raise HyimgError(f"{place} does not fit: {' '.join(str(error).split())}") from error
        self._origins[name] = origin

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
                    f"{self.place(implementation.plugin_name)}: hook `{event}` failed: {describe(error)}",
                    hint="mend the plugin, or run without it; `--traceback` shows where it failed",
                ) from error

    def provided(self, kind: Kind) -> dict[str, str | Callable[..., Any]]:
        """All names of a kind with what stands for each.

        Raises HyimgError where two plugins give one name; upper and lower case are one name.
        """
        return {entry.name: entry.target for entry in self.entries(kind).values()}

    def canonical(self, kind: Kind, name: str) -> str:
        """The name as its plugin spells it, for a name in any case; raises as `resolve`."""
        return self._entry(kind, name).name

    def resolve(self, kind: Kind, name: str) -> Callable[..., Any]:
        """The function of that name in any case, imported now; raises HyimgError that lists the names there are."""
        return self.load(kind, self._entry(kind, name))

    def load(self, kind: Kind, entry: Entry) -> Callable[..., Any]:
        """The function of an entry, imported now; raises HyimgError that names the plugin where it cannot be."""
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
        """Every loaded plugin with what it provides, in order of loading; raises as `provided`."""
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

    def _entry(self, kind: Kind, name: str) -> Entry:
        entries = self.entries(kind)
        if name.lower() in entries:
            return entries[name.lower()]
        names = [entry.name for entry in entries.values()]
        listed = "there are " + ", ".join(f"`{n}`" for n in sorted(names, key=str.lower))
        if not names:
            listed = (
                "no plugin that is loaded gives any (`hyimg plugins` lists them, `--plugin` loads one more)"
            )
        close = nearest(name, names)
        raise HyimgError(
            f"`{_OPTION[kind]}` `{name}` is unknown",
            hint=f"did you mean `{close[0]}`? ({listed})" if close else listed,
        )

    def entries(self, kind: Kind, *, problems: list[HyimgError] | None = None) -> dict[str, Entry]:
        """All entries of a kind by the name in lower case.

        Raises HyimgError for what a hook does wrong and for a name that is there already. Where `problems` is
        given, these are appended to it and what they are about is left out.
        """
        found: dict[str, Entry] = {}
        for implementation in self._implementations(kind):
            try:
                for name, target in self._given(implementation, kind).items():
                    self._add(found, kind, Entry(name, target, implementation.plugin_name))
            except HyimgError as error:
                if problems is None:
                    raise
                problems.append(error)
        return found

    def _add(self, found: dict[str, Entry], kind: Kind, entry: Entry) -> None:
        if (there := found.get(entry.name.lower())) is not None:
            same = "" if there.name == entry.name else f" as `{there.name}`"
            raise HyimgError(
                f"{self.place(entry.plugin)} gives `{entry.name}` for `{_OPTION[kind]}`, "
                f"which `{there.plugin}` has already{same}",
                hint="rename one of the two, or load only one plugin",
            )
        found[entry.name.lower()] = entry

    def _implementations(self, kind: Kind) -> list[pluggy.HookImpl]:
        implementations: list[pluggy.HookImpl] = getattr(self.manager.hook, f"hyimg_{kind}").get_hookimpls()
        return implementations

    def _given(self, implementation: pluggy.HookImpl, kind: Kind) -> Provided:
        """What one plugin's hook returns, checked."""
        blame = f"{self.place(implementation.plugin_name)}: hook `hyimg_{kind}`"
        try:
            given: object = implementation.function()
        except HyimgError:
            raise
        except (Exception, SystemExit) as error:
            raise HyimgError(f"{blame} failed: {describe(error)}", hint=MEND) from error
        must = "it must return a mapping from names to functions or to their places as `module:function`"
        if not isinstance(given, Mapping):
            raise HyimgError(f"{blame} returned {with_article(type(given).__name__)}", hint=must)
        for name, target in given.items():
            if not isinstance(name, str) or not (isinstance(target, str) or callable(target)):
                raise HyimgError(f"{blame} returned `{name!r}: {target!r}`", hint=must)
        return given

    def place(self, plugin: str) -> str:
        """A loaded plugin as sentences name it."""
        return f"the plugin `{plugin}` ({self._origins[plugin]})"

"""Commands that plugins give: listed by `hyimg --help`, found when their name is typed, errors told as ours.

Our own commands are found without a look at the plugins, so that a broken one stands in nobody's way; what loads
plugins is imported when they are looked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from hyimg.cli.flags import CONTEXT_SETTINGS, TRACEBACK_FLAG, take_traceback
from hyimg.errors import HyimgError, RunError

if TYPE_CHECKING:
    from hyimg.plugins import Entry, Plugins

PANEL = "Plugins"
_TOO_HEAVY = "torch"
_LISTED = "hyimg.listed"


class PluginCommand(TyperCommand):
    """A plugin's function as a command; `blame` names both in errors."""

    blame = ""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        args, show_traceback = take_traceback(args, [p for p in self.params if isinstance(p, TyperOption)])
        if ctx.obj is not None and show_traceback:
            ctx.obj[TRACEBACK_FLAG] = True
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (HyimgError, typer.Abort, typer.Exit, typer.TyperException, BrokenPipeError):
            raise
        except Exception as error:
            from hyimg.plugins import describe

            raise RunError(
                f"{self.blame} failed: {describe(error)}",
                hint=f"mend the plugin; `{TRACEBACK_FLAG}` shows where it failed",
            ) from error


class PluginGroup(TyperGroup):
    """The command `hyimg`: our own commands, and after them those of plugins."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Every name, ours first. What is wrong with a plugin is told on stderr, and the others are listed."""
        from hyimg.plugins import load_plugins

        own = super().list_commands(ctx)
        problems: list[HyimgError] = []
        listed = ctx.meta[_LISTED] = {}
        with _without_torch():
            plugins = load_plugins(_named(ctx), problems=problems)
            for entry in _foreign(plugins, own, problems).values():
                try:
                    listed[entry.name] = _listed(plugins, entry)
                except HyimgError as error:
                    problems.append(error)
        for problem in problems:
            if not isinstance(problem.__cause__, _HeavyError):
                typer.echo(f"warning: {problem.message}", err=True)
        return own + sorted(listed)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Refuses `--plugin` before one of our own commands, which takes it after its name."""
        if _named(ctx) and args[0] in super().list_commands(ctx):
            raise HyimgError(
                f"`--plugin` stands before `{args[0]}`", hint=f"give it after: `hyimg {args[0]} --plugin ...`"
            )
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, None where there is none.

        Raises HyimgError where no plugin that works has it, and one is broken, which may be the one.
        """
        if (command := super().get_command(ctx, cmd_name)) is not None:
            return command
        if (listed := ctx.meta.get(_LISTED, {}).get(cmd_name)) is not None:
            return listed
        from hyimg.plugins import load_plugins

        problems: list[HyimgError] = []
        plugins = load_plugins(_named(ctx), problems=problems)
        entry = _foreign(plugins, super().list_commands(ctx), problems).get(cmd_name.lower())
        if entry is not None:
            return _command(plugins.load("commands", entry), entry.name, plugins.place(entry.plugin))
        if problems:
            raise HyimgError(
                f"no such command `{cmd_name}`, and {problems[0].message}", hint=problems[0].hint
            )
        return None


def _named(ctx: Any) -> Sequence[str]:
    """What stands after `--plugin` before the command."""
    return ctx.params.get("plugin") or ()


def _foreign(plugins: Plugins, own: Sequence[str], problems: list[HyimgError]) -> dict[str, Entry]:
    entries = plugins.entries("commands", problems=problems)
    return {name: entry for name, entry in entries.items() if entry.name not in own}


def _listed(plugins: Plugins, entry: Entry) -> TyperCommand:
    """A stand-in for the list: the docstring of a function that is there; of one that is not, whose it is."""
    if callable(entry.target):
        return _command(entry.target, entry.name, plugins.place(entry.plugin))
    return TyperCommand(entry.name, help=f"From {plugins.place(entry.plugin)}.", rich_help_panel=PANEL)


def _command(function: Callable[..., Any], name: str, place: str) -> PluginCommand:
    """Raises HyimgError for a signature that makes no command."""
    blame = f"{place}: command `{name}`"
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name, cls=PluginCommand, context_settings=CONTEXT_SETTINGS, rich_help_panel=PANEL)(function)
    try:
        command = typer.main.get_command(app)
    except Exception as error:
        from hyimg.plugins import describe

        raise HyimgError(
            f"{blame} has a signature that makes no options: {describe(error)}", hint="mend the plugin"
        ) from error
    assert isinstance(command, PluginCommand)
    command.blame = blame
    return command


class _HeavyError(ImportError):
    """A plugin imports torch when it is loaded."""


class _Refusal:
    """Among the import system's finders: finds nothing, and refuses torch."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == _TOO_HEAVY:
            raise _HeavyError(f"`{name}` is not imported to list commands")


@contextmanager
def _without_torch() -> Iterator[None]:
    """A block in which torch is not imported, since a list must come at once."""
    refusal = _Refusal()
    sys.meta_path.insert(0, refusal)
    try:
        yield
    finally:
        sys.meta_path.remove(refusal)

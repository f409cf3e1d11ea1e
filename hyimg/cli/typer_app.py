"""What Typer does: help pages, shell completion, `--version`, and the commands of plugins.

Our own commands are run without it (`hyimg.cli.argv`): their values are text, and Typer would build a validator
for each of their options first, 0.1 s before anything happens.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from hyimg import __version__
from hyimg.cli.flag_names import HELP_FLAGS, TRACEBACK_FLAG, Requests, flag_of, normalized
from hyimg.config.command_table import COMMAND_TABLE, config_of
from hyimg.errors import HyimgError, RunError, did_you_mean, exception_text
from hyimg.report import ConsoleReporter

if TYPE_CHECKING:
    from hyimg.config.option import Option
    from hyimg.plugins import Plugins, ProvidedEntry

_CONTEXT_SETTINGS = {"help_option_names": list(HELP_FLAGS), "token_normalize_func": normalized}
_PLUGIN_PANEL = "Plugins"
_TOO_HEAVY = "torch"
_LISTED = "hyimg.listed"
_INTERRUPTED = 130


def run_typer(arguments: list[str], requests: Requests) -> int:
    """Runs a command line that does not start with one of our commands, and returns its exit code.

    Raises HyimgError for what Typer refuses, and what a plugin's command raises.
    """
    try:
        code: Any = app(arguments, prog_name="hyimg", standalone_mode=False, obj=requests)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except typer.TyperException as error:
        # no_args_is_help arrives as an exception whose message is the help page
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message(), err=True)
            return 2
        message, hint = _usage(error)
        raise HyimgError(message, hint=hint) from error
    if code == _INTERRUPTED:  # what Typer makes of Ctrl-C
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def print_help(name: str) -> None:
    """Prints the help page of one of our commands."""
    _declared(name).main(["--help"], prog_name=f"hyimg {name}", standalone_mode=False)


def _usage(error: typer.TyperException) -> tuple[str, str | None]:
    """(message, hint) of a usage error that Typer found."""
    ctx = getattr(error, "ctx", None)
    message = error.format_message().strip().rstrip(".")
    message = message[:1].lower() + message[1:]
    if ctx is None:
        return message, None
    hint = f"`{ctx.command_path} --help` lists the options"
    unknown = getattr(error, "option_name", None)
    if unknown is not None and type(error).__name__ == "NoSuchOption":
        known = [name for p in ctx.command.params for name in p.opts if not getattr(p, "hidden", False)]
        return f"no such option: `{unknown}`", did_you_mean(unknown, known) or hint
    return message, hint


# ---- help pages of our own commands


def _declared(name: str) -> TyperCommand:
    """One of our commands with all its options, which nothing but its help and completion reads."""
    from hyimg.config.option import all_options

    def command(**values: object) -> None:
        raise AssertionError("our own commands are run by hyimg.cli.argv")

    config = config_of(name)
    parameters = [_parameter(opt) for opt in all_options(config)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return _typer_command(command, name, TyperCommand, help=COMMAND_TABLE[name].help)


def _typer_command(
    function: Callable[..., Any], name: str, cls: type[TyperCommand], *, help: str | None = None
) -> TyperCommand:
    typer_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    typer_app.command(
        name, cls=cls, help=help, context_settings=_CONTEXT_SETTINGS, rich_help_panel=_PLUGIN_PANEL
    )(function)
    command = typer.main.get_command(typer_app)
    assert isinstance(command, cls)
    return command


def _parameter(opt: Option) -> inspect.Parameter:
    help = f"{opt.help}{_note(opt)}"
    if opt.argument:
        declared: Any = typer.Argument(metavar=opt.name.upper(), help=help, show_default=False)
    else:
        declared = typer.Option(
            *(flag_of(name) for name in opt.names),
            help=help,
            metavar=opt.metavar or None,
            rich_help_panel=opt.panel,
            show_default=False,
            autocompletion=(lambda: list(opt.choices)) if opt.choices else None,
        )
    kind: Any = bool if opt.kind == "bool" else str
    kind = list[kind] if opt.many else kind
    return inspect.Parameter(
        opt.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, declared],
    )


def _note(opt: Option) -> str:
    if opt.required:
        note = "required"
    elif opt.default in (None, (), "", False):
        return ""
    else:
        values = opt.default if opt.many else (opt.default,)
        note = "default: " + " ".join(f"{v:g}" if opt.kind == "float" else str(v) for v in values)
    # a backslash, since rich reads brackets as markup
    return f" \\[{note}]"


# ---- the commands of plugins


class PluginCommand(TyperCommand):
    """A plugin's function as a command; `blame` names both in errors."""

    blame = ""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (HyimgError, typer.Abort, typer.Exit, typer.TyperException):
            raise
        except Exception as error:
            raise RunError(
                f"{self.blame} failed: {exception_text(error)}",
                hint=f"fix the plugin; `{TRACEBACK_FLAG}` shows where it failed",
            ) from error


class CommandGroup(TyperGroup):
    """The command `hyimg`: our own commands, and after them those of plugins.

    Our own are found without loading plugins, so that a broken plugin cannot disable them.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # for the list: without their options, and what these import
        self.commands = {
            name: TyperCommand(name, help=command.help, rich_help_panel=command.panel)
            for name, command in COMMAND_TABLE.items()
        }

    def list_commands(self, ctx: Any) -> list[str]:
        """Every name, ours first. Problems with plugins are warnings on stderr, and the other plugins are listed."""
        from hyimg.plugins import load_plugins

        problems: list[HyimgError] = []
        listed = ctx.meta[_LISTED] = {}
        with _without_torch():
            plugins = load_plugins(_named(ctx), problems=problems)
            for entry in plugins.entries("commands", problems=problems).values():
                try:
                    if entry.name not in self.commands:
                        listed[entry.name] = _listed(plugins, entry)
                except HyimgError as error:
                    problems.append(error)
        for problem in problems:
            if not isinstance(problem.__cause__, _HeavyError):
                ConsoleReporter().warning(problem.message)
        return [*self.commands, *sorted(listed)]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Refuses `--plugin` before one of our own commands, which take it after their name."""
        name = normalized(args[0])
        if name not in self.commands:
            return super().resolve_command(ctx, args)
        if ctx.resilient_parsing:  # completion
            return name, _declared(name), args[1:]
        raise HyimgError(
            f"`--plugin` must follow `{args[0]}`", hint=f"put it after: `hyimg {args[0]} --plugin ...`"
        )

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, None if there is none.

        Raises HyimgError if no working plugin has it, and one that is broken may have it.
        """
        listed = self.commands | ctx.meta.get(_LISTED, {})
        if cmd_name in listed:
            return listed[cmd_name]
        from hyimg.plugins import load_plugins

        problems: list[HyimgError] = []
        plugins = load_plugins(_named(ctx), problems=problems)
        entry = plugins.entries("commands", problems=problems).get(cmd_name.lower())
        if entry is not None and entry.name not in self.commands:
            return _command(plugins.load("commands", entry), entry.name, plugins.place(entry.plugin))
        if problems:
            raise HyimgError(
                f"no such command `{cmd_name}`, and {problems[0].message}", hint=problems[0].hint
            )
        return None


def _named(ctx: Any) -> Sequence[str]:
    """The values of `--plugin` before the command."""
    return ctx.params.get("plugin") or ()


def _listed(plugins: Plugins, entry: ProvidedEntry) -> TyperCommand:
    """A stand-in for the list: with the docstring of a loaded function, or else the plugin's name."""
    if callable(entry.target):
        return _command(entry.target, entry.name, plugins.place(entry.plugin))
    return TyperCommand(
        entry.name, help=f"From {plugins.place(entry.plugin)}.", rich_help_panel=_PLUGIN_PANEL
    )


def _command(function: Callable[..., Any], name: str, place: str) -> TyperCommand:
    """Raises HyimgError for a signature that makes no command."""
    blame = f"{place}: command `{name}`"
    try:
        command = _typer_command(function, name, PluginCommand)
    except Exception as error:
        raise HyimgError(
            f"{blame}: its signature cannot be turned into options: {exception_text(error)}",
            hint="fix the plugin",
        ) from error
    assert isinstance(command, PluginCommand)
    command.blame = blame
    command.params += _typer_command(_with_traceback, name, TyperCommand).params
    return command


def _note_traceback(ctx: typer.Context, asked: bool) -> None:
    if isinstance(ctx.obj, Requests):
        ctx.obj.traceback |= asked


def _with_traceback(
    traceback: Annotated[
        bool,
        typer.Option(
            TRACEBACK_FLAG, hidden=True, is_eager=True, expose_value=False, callback=_note_traceback
        ),
    ] = False,
) -> None:
    """Declares the option that every plugin command has in addition to its own."""


class _HeavyError(ImportError):
    """A plugin imports torch when it is loaded."""


class _Refusal:
    """An import finder that finds nothing, and refuses torch."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == _TOO_HEAVY:
            raise _HeavyError(f"`{name}` is not imported to list commands")


@contextmanager
def _without_torch() -> Iterator[None]:
    """A block in which torch cannot be imported, since the list must appear at once."""
    refusal = _Refusal()
    sys.meta_path.insert(0, refusal)
    try:
        yield
    finally:
        sys.meta_path.remove(refusal)


app = typer.Typer(
    name="hyimg",
    cls=CommandGroup,
    help="Train LoRA adapters for HunyuanImage-2.1, and render with them.",
    no_args_is_help=True,
    context_settings=_CONTEXT_SETTINGS,
    pretty_exceptions_enable=False,
    epilog=f"Every command takes `{TRACEBACK_FLAG}`, which shows where an error was raised.",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hyimg {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    plugin: Annotated[
        list[str] | None,
        # eager, so that it is known if `--help` follows it
        typer.Option(
            "--plugin",
            help="Load a plugin and its commands: a `.py` file or a module's name.",
            is_eager=True,
        ),
    ] = None,
) -> None:
    pass

"""From a command's config to Typer options, and from what the user typed back to the config.

Every option is declared as text: the config's loader converts and checks flags and run files alike, so that
both get the same answer. Names work with dashes or underscores; several values may follow one flag.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperArgument, TyperCommand, TyperOption

from hyimg.config import legacy, load
from hyimg.config.option import Option, all_options
from hyimg.memory.processes import Processes
from hyimg.report import ConsoleReporter, Reporter, SilentReporter

C = TypeVar("C")

TRACEBACK_FLAG = "--traceback"

CONTEXT_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("_", "-"),
}


class StageCommand(TyperCommand):
    """A command that takes several values after one flag and knows the reference tool's flags.

    `--lora_weight a b` is read as `--lora_weight a --lora_weight b`. Where a command has positional arguments, the
    first words that do not stand right behind an option are these; where it takes any number of them, those before
    the first option of several values.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        notes: list[str] = []
        options = [p for p in self.params if isinstance(p, TyperOption)]
        args, show_traceback = take_traceback(args, options)
        if ctx.obj is not None and show_traceback:
            ctx.obj[TRACEBACK_FLAG] = True
        known = frozenset(
            o.lstrip("-").replace("-", "_") for p in options for o in [*p.opts, *p.secondary_opts]
        )
        args = legacy.translate_arguments(args, known, notes)
        many = {_normal(o) for p in options if p.multiple for o in p.opts}
        args, ctx.meta["hyimg.off"] = _take_negations(args, options)
        ctx.meta["hyimg.notes"] = notes
        arguments = [p for p in self.params if isinstance(p, TyperArgument)]
        args = _take_named_argument(args, [str(p.name) for p in arguments])
        takes_value = {_normal(o) for p in options if not p.is_flag for o in p.opts}
        return super().parse_args(
            ctx, _repeat_flags(args, many, takes_value, sum(p.nargs == 1 for p in arguments))
        )


def take_traceback(args: list[str], options: list[TyperOption]) -> tuple[list[str], bool]:
    """The words without `--traceback`, where it is not the value of the option before it."""
    takes_value = {_normal(name) for o in options if not o.is_flag for name in o.opts}
    pairs = zip(["", *args], args, strict=False)
    kept = [word for before, word in pairs if word != TRACEBACK_FLAG or _normal(before) in takes_value]
    return kept, len(kept) < len(args)


def _take_negations(args: list[str], options: list[TyperOption]) -> tuple[list[str], list[str]]:
    """`--no_NAME` for each on/off option (so that a flag wins over the run file), kept out of the help."""
    switches = {_normal(f"--no-{o.name}"): str(o.name) for o in options if o.is_flag}
    off = [switches[_normal(word)] for word in args if _normal(word) in switches]
    return [word for word in args if _normal(word) not in switches], off


def _take_named_argument(args: list[str], names: list[str]) -> list[str]:
    """Where a command has one positional argument, `--NAME value` is it too, as other commands spell it.

    It is put first, so that it is none of the values of the option before it.
    """
    if len(names) != 1:
        return args
    flag = _normal(f"--{names[0]}")
    taken: list[str] = []
    others: list[str] = []
    follows = False
    for word in args:
        name, equals, value = word.partition("=")
        if follows:
            taken.append(word)
            follows = False
        elif _normal(name) == flag:
            taken += [value] * bool(equals)
            follows = not equals
        else:
            others.append(word)
    return taken + others


def _normal(flag: str) -> str:
    return flag.replace("_", "-")


def _repeat_flags(args: list[str], many: set[str], takes_value: set[str], num_arguments: int) -> list[str]:
    result: list[str] = []
    flag: str | None = None
    is_value = False
    for word in args:
        if word.startswith("--"):
            name = _normal(word.partition("=")[0])
            flag = word if name in many and "=" not in word else None
            is_value = name in takes_value and "=" not in word
        elif is_value:
            is_value = False
        elif _is_short_flag(word):
            flag, is_value = None, word in takes_value
        elif num_arguments:
            num_arguments -= 1
        elif flag is not None:
            result.append(flag)
        result.append(word)
    return result


def _is_short_flag(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and not word[1].isdigit() and word[1] != "."


def add_command(
    app: typer.Typer, name: str, config: type[C], run: Callable[[C, Reporter], None], *, panel: str
) -> None:
    """Adds the command `name`, whose options are the config's; `run` gets the config and where to report.

    `run`'s docstring is the command's help.
    """
    options = list(all_options(config))

    def command(ctx: typer.Context, **typed: Any) -> None:
        notes: list[str] = ctx.meta.get("hyimg.notes", [])
        given = {key: value for key, value in typed.items() if value not in (None, [], ())}
        given |= dict.fromkeys(ctx.meta.get("hyimg.off", []), False)
        run_file = given.get("config")
        resolved = load.make(config, given, run_file=Path(run_file) if run_file else None, notes=notes)
        load.check_inputs(resolved)
        # of several processes that a launcher started, one speaks
        reporter: Reporter = ConsoleReporter() if Processes.current().is_main else SilentReporter()
        for note in notes:
            reporter.note(f"note: {note}")
        run(resolved, reporter)

    parameters = [inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    required = getattr(config, "REQUIRED", ())
    parameters += [_parameter(opt, opt.name in required) for opt in options]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(
        name,
        cls=StageCommand,
        help=inspect.getdoc(run),
        context_settings=CONTEXT_SETTINGS,
        rich_help_panel=panel,
    )(command)


def _parameter(opt: Option, required: bool) -> inspect.Parameter:
    # never required for Typer: the run file may give it, and the loader says what is missing
    help = _help(opt, required)
    declared = typer.Argument(metavar=opt.name.upper(), help=help, show_default=False)
    if not opt.traits.argument:
        declared = _option(opt, help)
    annotation: Any = bool if opt.kind == "bool" else str
    annotation = list[annotation] if opt.many else annotation
    return inspect.Parameter(
        opt.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[annotation | None, declared],
    )


def _option(opt: Option, help: str) -> Any:
    names = [flag_of(name) for name in (opt.name, *opt.traits.aliases)]
    return typer.Option(
        *names,
        help=help,
        metavar=opt.metavar or None,
        rich_help_panel=opt.panel,
        show_default=False,
        autocompletion=(lambda: list(opt.traits.choices)) if opt.traits.choices else None,
    )


def flag_of(name: str) -> str:
    """`--name`, and `-n` for a single letter."""
    return f"--{name}" if len(name) > 1 else f"-{name}"


def _help(opt: Option, required: bool) -> str:
    if required:
        note = "required"
    elif opt.default in (None, (), "", False):
        return opt.traits.help
    else:
        values = opt.default if opt.many else (opt.default,)
        note = "default: " + " ".join(f"{v:g}" if opt.kind == "float" else str(v) for v in values)
    # a backslash, since rich reads brackets as markup
    return f"{opt.traits.help} \\[{note}]"

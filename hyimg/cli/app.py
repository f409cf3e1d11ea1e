"""The command `hyimg`: its subcommands, and how errors become sentences and exit codes.

Exit codes: 0 done, 2 wrong input, 1 a failed run, 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from types import FrameType
from typing import Annotated, Any

import typer

from hyimg import __version__
from hyimg.cli import commands
from hyimg.cli.flags import CONTEXT_SETTINGS, TRACEBACK_FLAG, add_command
from hyimg.cli.plugin_commands import PluginGroup
from hyimg.config import commands as configs
from hyimg.errors import HyimgError, Terminated, did_you_mean
from hyimg.memory.out_of_memory import general_changes, out_of_memory_error, out_of_memory_place
from hyimg.memory.processes import Processes

_INTERRUPTED, _TERMINATED = 130, 143

app = typer.Typer(
    name="hyimg",
    cls=PluginGroup,
    help="Train LoRA adapters for HunyuanImage-2.1, and render with them.",
    no_args_is_help=True,
    context_settings=CONTEXT_SETTINGS,
    pretty_exceptions_enable=False,
    epilog="Every command: `--traceback` shows where an error came from.",
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
        # eager, so that it is known where `--help` comes after it
        typer.Option(
            "--plugin", help="Plugin whose commands to know: a `.py` file or a module's name.", is_eager=True
        ),
    ] = None,
) -> None:
    pass


STAGES, TOOLS = "Stages", "Tools"
add_command(app, "dataset", configs.DatasetConfig, commands.dataset, panel=STAGES)
add_command(app, "cache-latents", configs.CacheLatentsConfig, commands.cache_latents, panel=STAGES)
add_command(app, "cache-text", configs.CacheTextConfig, commands.cache_text, panel=STAGES)
add_command(app, "train", configs.TrainConfig, commands.train, panel=STAGES)
add_command(app, "sample", configs.SampleConfig, commands.sample, panel=STAGES)
add_command(app, "infer", configs.InferConfig, commands.infer, panel=STAGES)
add_command(app, "convert-comfy", configs.ConvertComfyConfig, commands.convert_comfy, panel=STAGES)
add_command(app, "merge", configs.MergeConfig, commands.merge, panel=STAGES)
add_command(app, "inspect-modules", configs.InspectModulesConfig, commands.inspect_modules, panel=STAGES)
add_command(app, "check", configs.CheckConfig, commands.check, panel=STAGES)
add_command(app, "download-models", configs.DownloadModelsConfig, commands.download_models, panel=TOOLS)
add_command(app, "make-tiny-model", configs.MakeTinyModelConfig, commands.make_tiny_model, panel=TOOLS)
add_command(app, "demo", configs.DemoConfig, commands.demo, panel=TOOLS)
add_command(app, "plugins", configs.PluginsConfig, commands.list_plugins, panel=TOOLS)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command line and exits the process with its code."""
    for stream in (sys.stdout, sys.stderr):
        # captions and paths in any script go through a pipe of any encoding; what it cannot hold is spelt out
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def _terminate(number: int, frame: FrameType | None) -> None:
    """Unwinds the stack, as Ctrl-C does, so that locks and temporary files go."""
    raise Terminated


def run(arguments: list[str]) -> int:
    """Runs a command line and returns its exit code; errors are printed to stderr."""
    # set by the command that finds the flag among its options
    asked = {TRACEBACK_FLAG: arguments[:1] == [TRACEBACK_FLAG]}
    try:
        code: Any = app(
            arguments[asked[TRACEBACK_FLAG] :], prog_name="hyimg", standalone_mode=False, obj=asked
        )
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Terminated:
        _complain("terminated", None)
        return _TERMINATED
    except BrokenPipeError:
        _close_stdout()
        return 1
    except Exception as error:
        if asked[TRACEBACK_FLAG]:
            raise
        return _answer(error)
    # Typer makes an exit code of Ctrl-C without a word
    if code == _INTERRUPTED:
        _complain("interrupted", None)
    return code if isinstance(code, int) else 0


def _answer(error: Exception) -> int:
    """Says on stderr what went wrong, and gives the exit code."""
    if isinstance(error, HyimgError):
        _complain(error.message, error.hint)
        return error.exit_code
    if isinstance(error, typer.TyperException):
        # no_args_is_help arrives as an exception whose message is the whole help
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message(), err=True)
        else:
            _complain(*_usage(error))
        return 2
    if (place := out_of_memory_place(error)) is not None:
        return _answer(out_of_memory_error(error, place, general_changes(place)))
    text = str(error).strip()
    _complain(
        f"unexpected {type(error).__name__}" + (f": {text}" if text else ""),
        f"run again with `{TRACEBACK_FLAG}`, and report it",
    )
    return 1


def _close_stdout() -> None:
    """After the reader of a pipe left: nothing more is written, not even what waits in the buffer."""
    # Python's own advice (docs of SIGPIPE): otherwise the flush at exit complains
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, sys.stdout.fileno())
    except (OSError, ValueError):  # a stdout that is no file
        pass
    finally:
        os.close(nowhere)


def _usage(error: typer.TyperException) -> tuple[str, str | None]:
    """(message, hint) of a usage error that Typer found."""
    ctx = getattr(error, "ctx", None)
    listing = f"`{ctx.command_path} --help` lists what there is" if ctx is not None else None
    unknown = getattr(error, "option_name", None)
    if unknown is not None and type(error).__name__ == "NoSuchOption" and ctx is not None:
        # Typer compares with dashes; users read our names with underscores
        known = [name for p in ctx.command.params for name in p.opts if not getattr(p, "hidden", False)]
        unknown = "--" + unknown.lstrip("-").replace("-", "_")
        return f"no such option: `{unknown}`", did_you_mean(unknown, known) or listing
    message = error.format_message().strip().rstrip(".")
    if "unexpected extra argument" in message and ctx is not None:
        extra = message.partition(" (")[2].removesuffix(")")
        if (
            extra.endswith(".toml")
            and extra.count(".toml") == 1
            and any("--dataset_config" in param.opts for param in ctx.command.params)
        ):
            return message[:1].lower() + message[1:], f"give it with its option: `--dataset_config {extra}`"
        listing = f"a value with spaces stands in quotes, and follows its option: {listing}"
    return message[:1].lower() + message[1:], listing


def _complain(message: str, hint: str | None) -> None:
    if not Processes.current().is_first_to_fail():
        return  # another of the launcher's processes has said why all of them end
    typer.echo(f"error: {message}", err=True)
    if hint:
        typer.echo(f"hint: {hint}", err=True)

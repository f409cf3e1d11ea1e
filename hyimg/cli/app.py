"""The command `hyimg`: runs a command line, and turns errors into messages and exit codes.

Exit codes: 0 done, 2 wrong input, 1 a failed run, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
"""

from __future__ import annotations

import errno
import importlib
import io
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from hyimg.cli.flag_names import TRACEBACK_FLAG, Requests, normalized
from hyimg.config.command_table import COMMAND_TABLE
from hyimg.distributed.processes import Processes, is_repetition, stop_signals
from hyimg.errors import (
    HyimgError,
    RunError,
    Terminated,
    first_lines,
    out_of_memory_place,
    system_limit,
)
from hyimg.import_path import keep_working_folder_out_of_children
from hyimg.report import lost_output, outlive_the_terminal, show_python_plainly

_INTERRUPTED = 130
_MOST_LINES = 20

_AGAIN = "run the same command again"
# Errors of the system that may occur anywhere, with hints; limits are `hyimg.errors.system_limit`'s, and
# `hyimg.cache.atomic` says more about files that are written
_REFUSALS = {
    errno.ENOSPC: f"free some space, and {_AGAIN}",
    errno.EDQUOT: f"free some space, and {_AGAIN}",
    errno.EFBIG: f"raise the limit on the size of files (`ulimit -f unlimited`), and {_AGAIN}",
    errno.EIO: "the disk or the network drive has failed: check the system log",
    errno.EACCES: "change its permissions, or choose another",
    errno.EPERM: "change its permissions, or choose another",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "give the file that the link should point to",
    errno.EROFS: "choose a writable location",
    errno.EAGAIN: f"raise the limit on processes (`ulimit -u`), or close other programs, and {_AGAIN}",
}


def main(arguments: list[str] | None = None) -> None:
    """Runs a command line and exits with its code."""
    outlive_the_terminal()
    for stream in (sys.stdout, sys.stderr):
        # captions and paths may have characters that the encoding of a pipe lacks: those are escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    show_python_plainly()
    keep_working_folder_out_of_children()
    for number in stop_signals():
        if number != signal.SIGINT:
            signal.signal(number, _terminate)
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


_last_signal: int | None = None


def _terminate(number: int, frame: FrameType | None) -> None:
    """Unwinds the stack like Ctrl-C, to remove locks and temporary files; a repeated signal does not interrupt that."""
    global _last_signal
    last, _last_signal = _last_signal, number
    if last is None or not is_repetition(last, number):
        raise Terminated(number)


def run(arguments: list[str]) -> int:
    """Runs a command line and returns its exit code; errors are printed to stderr."""
    requests = Requests(traceback=arguments[:1] == [TRACEBACK_FLAG])
    command, *words = arguments[requests.traceback :] or [""]
    code = 0
    try:
        if (name := normalized(command)) in COMMAND_TABLE:
            _run_command(name, words, requests)
        else:
            from hyimg.cli.typer_app import run_typer

            code = run_typer(arguments[requests.traceback :], requests)
        if (lost := lost_output()) is not None:
            raise RunError(f"the output could not be written: {lost.strerror}")
    except KeyboardInterrupt:
        _complain(RunError("interrupted"))
        return _INTERRUPTED
    except Terminated as error:
        _complain(RunError("terminated"))
        return error.exit_code
    except Exception as error:
        if requests.traceback:
            raise
        answer = _answer(error)
        _complain(answer)
        return answer.exit_code
    return code


def _answer(error: Exception) -> HyimgError:
    """The error to print for an exception that ended a command."""
    if (limit := system_limit(error)) is not None:
        return limit
    if isinstance(error, HyimgError):
        return error
    if (place := out_of_memory_place(error)) is not None:
        from hyimg.memory.out_of_memory import general_changes, out_of_memory_error

        return out_of_memory_error(error, place, general_changes(place))
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        what = (
            f"cannot use `{error.filename}`"
            if error.filename is not None
            else "the system refused an operation"
        )
        kind = HyimgError if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else RunError
        return kind(f"{what}: {error.strerror}", hint=_REFUSALS[error.errno])
    text, *more = str(error).strip().splitlines() or [""]
    return RunError(
        f"unexpected {type(error).__name__}" + (f": {text}" if text else ""),
        details=first_lines(more, limit=_MOST_LINES),
        hint=f"run again with `{TRACEBACK_FLAG}`, and report it",
    )


def _complain(error: HyimgError) -> None:
    # if the launcher's variables are wrong themselves, print that error
    with suppress(HyimgError):
        if not Processes.current().is_first_to_fail():
            return  # another process of the launcher has printed why all of them end
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)


def _run_command(name: str, words: Sequence[str], requests: Requests) -> None:
    """Runs `hyimg NAME WORDS...`; `requests` is filled in. Raises what the command raises."""
    from hyimg.cli.argv import read_arguments

    notes: list[str] = []
    given = read_arguments(name, words, requests, notes)
    if requests.help:
        from hyimg.cli.typer_app import print_help

        print_help(name)
        return
    from hyimg.config import load
    from hyimg.config.command_table import config_of
    from hyimg.config.option import idle_lines
    from hyimg.report import ConsoleReporter, SilentReporter

    run_file = given.get("config")
    config: Any = load.make(
        config_of(name), given, run_file=Path(run_file) if run_file else None, notes=notes
    )
    load.check_inputs(config)
    # of several processes that a launcher started, only the first one reports
    report = ConsoleReporter() if Processes.current().is_main else SilentReporter()
    for note in notes:
        report.note(f"note: {note}")
    for line in idle_lines(config):
        report.warning(line)
    _load(COMMAND_TABLE[name].target)(config, report)


def _load(target: str) -> Callable[[Any, Any], object]:
    module, _, function = target.partition(":")
    loaded: Callable[[Any, Any], object] = getattr(importlib.import_module(module), function)
    return loaded

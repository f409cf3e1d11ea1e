"""Errors that a user can cause, and the escaping of untrusted text in them and on the console.

Errors are raised where the problem is known and before heavy work; `hyimg.cli.app` prints them to stderr and sets the
exit code. A programming error stays an ordinary exception or an `assert`.

File names, captions, tensor names and metadata are untrusted text, which could control a terminal or fake a line of
ours. Messages do not escape them themselves: `shown` does, for errors here and for all other lines in `hyimg.report`.
"""

from __future__ import annotations

import difflib
import errno
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto

MAX_VALUE_CHARS = 500
"""The longest value, in backticks, that a message shows in full."""
MAX_LINE_CHARS = 1900
"""The longest line of a message."""
_KEPT_AT_END = 60

# Control characters (C0, DEL, C1), line and paragraph separators, bidirectional marks, zero-width characters (except
# the joiners, which Persian and emoji need), tags, and lone surrogates
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2060-\u206f"
    "\xad\u180e\u200b\ufeff\ufff9-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f\ud800-\udfff]"
)
_VALUE = re.compile(r"`([^`]*)`")


def printable(text: str) -> str:
    r"""The text with control characters escaped, newlines too: `\n`, `\x1b`, `\u202e`, `\udcff`."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def shortened(text: str, limit: int = MAX_VALUE_CHARS) -> str:
    """The printable text; if longer than `limit` (at least 200) characters its start, end and length."""
    start = printable(text[: limit + 1])
    if len(text) <= limit and len(start) <= limit:
        return start
    end = f"…{printable(text[-_KEPT_AT_END:])[-_KEPT_AT_END:]} ({len(text)} characters)"
    return start[: limit - len(end)] + end


def shown(line: str) -> str:
    """One line as it is printed: printable, with values in backticks and the line itself `shortened`."""

    def value(match: re.Match[str]) -> str:
        is_command = match[1].startswith("hyimg ")  # kept in full, to be copied
        return match[0] if is_command else f"`{shortened(match[1])}`"

    return shortened(_VALUE.sub(value, line), MAX_LINE_CHARS)


class _Shown(str):
    """Escaped lines of an error, which another error may reuse unchanged."""

    __slots__ = ()


def _shown_once(line: str) -> str:
    return line if isinstance(line, _Shown) else shown(line)


class HyimgError(Exception):
    """A foreseeable problem: one sentence that says what and where, and a hint that says what to do.

    `message` has no full stop and puts names in backticks; `details` are lines below it, and a hint may have several
    lines too. All of them are `shown`: a newline within a line is escaped. `exit_code` is 2 for wrong input (the
    default) and 1 for a run that failed.
    """

    exit_code = 2

    def __init__(
        self, message: str, *, hint: str | Sequence[str] | None = None, details: Sequence[str] = ()
    ) -> None:
        hint_lines = (hint,) if isinstance(hint, str) else hint or ()
        self.message: str = _Shown("\n  ".join(map(_shown_once, (message, *details))))
        self.hint: str | None = _Shown("\n".join(map(_shown_once, hint_lines))) if hint_lines else None
        super().__init__(self.message)

    def __reduce__(self) -> tuple[object, ...]:
        # errors are pickled between processes, without what a subclass adds
        kind = RunError if self.exit_code == RunError.exit_code else HyimgError
        return _rebuilt, (kind, self.message, self.hint)

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class RunError(HyimgError):
    """A run with valid input that could not be finished (disk full, out of memory, a diverged loss)."""

    exit_code = 1


class SystemLimitError(RunError):
    """The system has no file descriptor or memory left; the file being opened is not at fault."""


class PeerProcessLostError(RunError):
    """Another process of the run has ended: the consequence of an error, not the one to report."""


class DivergedError(RunError):
    """A loss or gradient that is not finite; all processes of a run raise it in the same step."""


class StoppedError(RunError):
    """A run that stopped cleanly after a signal: its progress is saved."""

    def __init__(self, message: str, *, hint: str | None = None, signal_number: int) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[object, ...]:
        return _stopped, (self.message, self.hint, self.exit_code - 128)


class Terminated(BaseException):
    """SIGTERM or SIGHUP, which ends the process at once like KeyboardInterrupt for Ctrl-C."""

    def __init__(self, signal_number: int = signal.SIGTERM) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


# errno -> message and hint
_SYSTEM_LIMITS = {
    errno.EMFILE: (
        "this process has too many open files",
        "raise the limit, for example with `ulimit -n 65536`",
    ),
    errno.ENFILE: ("the system has too many open files", "close other programs, or raise `fs.file-max`"),
    errno.ENOMEM: ("the system has no memory left", "close other programs, or raise the limit (`ulimit -v`)"),
}
# Python's message, which has no errno
_NO_THREAD = "can't start new thread"


def exception_text(error: BaseException) -> str:
    """An exception from other code on one line: its type and its shortened message, if any."""
    message = shortened(" ".join(str(error).split()))
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def system_limit(error: BaseException | None) -> SystemLimitError | None:
    """The system limit that caused an error, directly or through its causes; None if there is none."""
    while error is not None:
        if isinstance(error, SystemLimitError):
            return error
        if isinstance(error, RunError):
            return None  # it blames no input, and is more specific
        if isinstance(error, RuntimeError) and str(error) == _NO_THREAD:
            hint = (
                "close other programs, or raise the limits on processes and memory (`ulimit -u`, `ulimit -v`)"
            )
            return SystemLimitError("the system cannot start another thread", hint=hint)
        if isinstance(error, OSError) and error.errno in _SYSTEM_LIMITS:
            message, hint = _SYSTEM_LIMITS[error.errno]
            where = f" (to open `{error.filename}`)" if error.filename is not None else ""
            return SystemLimitError(message + where, hint=hint)
        error = error.__cause__ or error.__context__
    return None


def raise_system_limit(error: BaseException) -> None:
    """Raises SystemLimitError if that caused `error`: for handlers that would blame a file, or skip it."""
    if (limit := system_limit(error)) is not None:
        raise limit from error


@contextmanager
def work_has_begun() -> Iterator[None]:
    """A block after the input was checked: HyimgErrors in it are a failed run (exit code 1)."""
    try:
        yield
    except HyimgError as error:
        if error.exit_code == HyimgError.exit_code:
            error.exit_code = RunError.exit_code
        raise


def _rebuilt(kind: type[HyimgError], message: str, hint: str | None) -> HyimgError:
    return kind(message, hint=hint)


def _stopped(message: str, hint: str | None, signal_number: int) -> StoppedError:
    return StoppedError(message, hint=hint, signal_number=signal_number)


def nearest(name: str, known: Iterable[str], *, limit: int = 3) -> list[str]:
    """The known names most similar to `name`, best first, at most `limit`."""
    return difflib.get_close_matches(name, list(known), n=limit, cutoff=0.6)


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A hint for a misspelt name, or None if no known name is similar."""
    close = nearest(name, known)
    return f"did you mean {' or '.join(f'`{c}`' for c in close)}?" if close else None


def first_few(names: Sequence[str], *, limit: int = 3, separator: str = ", ") -> str:
    """The first `limit` names and the number of the others: "`a`, `b`, `c` and 17 more".

    Names are given with their backticks. A single remaining name is listed rather than counted. The number follows the
    `separator` if that is more than a comma, as between sentences.
    """
    *shown_names, rest = first_lines(names, limit=limit) or [""]
    before_rest = " " if separator == ", " and len(names) > limit + 1 else separator
    return before_rest.join([separator.join(shown_names), rest]) if shown_names else rest


def first_lines(lines: Sequence[str], *, limit: int) -> list[str]:
    """The first `limit` lines, then "and 17 more", for an error's `details`."""
    if len(lines) <= limit + 1:
        return list(lines)
    return [*lines[:limit], f"and {len(lines) - limit} more"]


_DEVICE_TEXTS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "MPS backend out of memory",
    "XPU out of memory",
    "OUT_OF_DEVICE_MEMORY",
    "_ALLOC_FAILED",
    # NCCL, which allocates its own memory
    "Cuda failure 2 'out of memory'",
    "Cuda failure 'out of memory'",
    "Failed to CUDA calloc",
)
_HOST_TEXTS = (
    # torch's allocator on Linux and Windows, the system, and C++
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "bad_alloc",
)
# oneDNN gives no reason. What it can't compute it refuses when the primitive's descriptor is made, with a longer text;
# after that only memory can be missing
_ONEDNN_TEXTS = (
    "could not create a primitive",
    "could not create a memory",
    "could not create a memory object",
)

# Not enough memory, out of memory, and paging file too small
_WINDOWS_ERRORS = (8, 14, 1455)


class FullMemory(Enum):
    """Which memory ran out."""

    DEVICE = auto()
    """A GPU's."""
    HOST = auto()
    """The system's."""


def out_of_memory_place(error: BaseException) -> FullMemory | None:
    """Which memory an error says is exhausted; None for any other error.

    Recognized are torch's `OutOfMemoryError`, errors of the CUDA runtime and its libraries, of MPS and XPU, of torch's
    host allocator and of oneDNN (plain RuntimeErrors), Python's MemoryError, and the system's ENOMEM.
    """
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return FullMemory.HOST
    if getattr(error, "winerror", None) in _WINDOWS_ERRORS:
        return FullMemory.HOST
    if type(error).__name__ == "OutOfMemoryError":
        return FullMemory.DEVICE
    if isinstance(error, RuntimeError):
        if any(part in text for part in _DEVICE_TEXTS):
            return FullMemory.DEVICE
        if any(part in text for part in _HOST_TEXTS) or text.partition("\n")[0] in _ONEDNN_TEXTS:
            return FullMemory.HOST
    return None

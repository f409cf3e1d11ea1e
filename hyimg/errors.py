"""The errors that a user can cause, and nothing else.

They are raised where the fact is known and before heavy work, and become a sentence on stderr and an exit
code in `hyimg.cli.app`. A programming mistake stays an ordinary exception or an `assert`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HyimgError(Exception):
    """Foreseeable trouble: one sentence that says what and where, and a hint that says what to do.

    `message` has no full stop and puts names in backticks. `exit_code` is 2 where the input is wrong (the
    default) and 1 where a run that was asked for correctly failed.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        # errors travel between processes; what a subclass knows beyond this stays behind
        kind = RunError if self.exit_code == RunError.exit_code else HyimgError
        return _rebuilt, (kind, self.message, self.hint)

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class RunError(HyimgError):
    """A correctly asked run that could not be finished (disk full, out of memory, a diverged loss)."""

    exit_code = 1


class FellowLostError(RunError):
    """Another process of the run is gone: the consequence of an error, and not the error to tell."""


class DivergedError(RunError):
    """A loss or gradient that is not finite: all processes of a run find it in the same step."""


class StoppedError(RunError):
    """A run that a signal asked to stop, and that did so in order: what was done is saved."""

    def __init__(self, message: str, *, hint: str | None = None, signal_number: int) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[object, ...]:
        return _stopped, (self.message, self.hint, self.exit_code - 128)


class Terminated(BaseException):
    """SIGTERM that ends the process at once, as KeyboardInterrupt is for Ctrl-C."""


def _rebuilt(kind: type[HyimgError], message: str, hint: str | None) -> HyimgError:
    return kind(message, hint=hint)


def _stopped(message: str, hint: str | None, signal_number: int) -> StoppedError:
    return StoppedError(message, hint=hint, signal_number=signal_number)


def nearest(name: str, known: Iterable[str], *, limit: int = 3) -> list[str]:
    """The known names that look most like `name`, best first, at most `limit`."""
    return difflib.get_close_matches(name, list(known), n=limit, cutoff=0.6)


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A hint for a misspelt name, or None where nothing looks like it."""
    close = nearest(name, known)
    return f"did you mean {' or '.join(f'`{c}`' for c in close)}?" if close else None

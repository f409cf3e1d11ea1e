"""Ctrl-C and SIGTERM while training: the first asks the loop to stop after its step, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from hyimg.errors import Terminated
from hyimg.report import Reporter

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Takes the two signals over for the time of a block; `signal` is the first that came, else None.

        with StopRequest(report) as stop:
            for step in steps:
                ...
                if stop.signal is not None:
                    break

    The second raises KeyboardInterrupt or Terminated, wherever the program is. Under torchrun or
    `accelerate launch`, which hand the terminal's Ctrl-C on as a SIGTERM, that is no second. Python hands
    signals to the main thread only; in another one the block changes nothing.
    """

    def __init__(self, report: Reporter) -> None:
        self.signal: signal.Signals | None = None
        self._under_launcher = "TORCHELASTIC_RUN_ID" in os.environ
        self._report = report
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # None: a handler that was not set from Python and cannot be set again from here
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._under_launcher and number == signal.SIGTERM and self.signal == signal.SIGINT:
            return
        if self.signal is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        self.signal = signal.Signals(number)
        again = "Ctrl-C" if number == signal.SIGINT else "the signal"
        # a handler may run in the middle of another print, which a stream does not allow
        with suppress(RuntimeError):
            self._report.note(f"finishing this step, then saving; {again} once more stops at once")

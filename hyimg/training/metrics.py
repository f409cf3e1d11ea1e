"""`NAME.metrics.jsonl`: one JSON object a step, in the file as soon as the step is done."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from hyimg.cache.atomic import atomic_write_text
from hyimg.errors import RunError


class MetricsLog:
    """Appends a line a step; a line is written whole and flushed, so that a killed run leaves whole lines.

    It writes in a `with` block, which begins the file with `before`: the lines of the steps that a resumed
    run does not repeat. With `writes` false it does not: one process of a run keeps its metrics.
    """

    def __init__(self, path: Path, before: str = "", *, writes: bool = True) -> None:
        self.path = path
        self._before = before
        self._writes = writes

    def text(self) -> str:
        """All lines so far."""
        return self.path.read_text(encoding="utf-8")

    def write(self, values: Mapping[str, float | int | str | Mapping[str, float] | None]) -> None:
        """One line. Values that are not finite become null, since JSON has no name for them.

        Raises RunError where it cannot be written.
        """
        if not self._writes:
            return
        try:
            self._file.write(json.dumps({k: _finite(v) for k, v in values.items()}) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(
                f"cannot write `{self.path}`: {error.strerror}", hint="files that were saved before are whole"
            ) from error

    def __enter__(self) -> MetricsLog:
        if self._writes:
            atomic_write_text(self.path, self._before)
            self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writes:
            self._file.close()


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MovingAverage:
    """The mean of the last `window` values."""

    def __init__(self, window: int = 50) -> None:
        self.window = window
        self._values: list[float] = []

    def add(self, value: float) -> float:
        """Takes a value in and gives the mean."""
        self._values = [*self._values[-self.window + 1 :], value]
        return self.value

    @property
    def value(self) -> float:
        """The mean now; NaN before the first value."""
        return sum(self._values) / len(self._values) if self._values else math.nan

    def state_dict(self) -> list[float]:
        return list(self._values)

    def load_state_dict(self, values: list[float]) -> None:
        self._values = list(values)

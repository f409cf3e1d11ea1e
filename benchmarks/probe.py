"""A plugin that takes the times of a training run from inside, into the file that HYIMG_PROBE names."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from hyimg.hookspecs import hookimpl

if TYPE_CHECKING:
    from hyimg.training.run import Run

_PASSES = ("forward", "backward", "optimizer")
_times: dict[str, list[float]] = {what: [] for what in (*_PASSES, "step", "to_run_start", "to_first_step")}
# since the last step's end
_now: dict[str, float] = dict.fromkeys(_PASSES, 0.0)
_last_end = 0.0


@hookimpl
def hyimg_run_start(run: Run) -> None:
    """Puts clocks around the model, the backward pass and the optimiser's step."""
    global _last_end
    run.objective.dit.forward = _timed("forward", run.objective.dit.forward)
    run.stepper.backward = _timed("backward", run.stepper.backward)  # type: ignore[method-assign]
    run.optimizer.step = _timed("optimizer", run.optimizer.step)  # type: ignore[method-assign]
    _times["to_run_start"].append(_since_process_start())
    _last_end = _clock()


@hookimpl
def hyimg_step_end(run: Run) -> None:
    global _last_end
    end = _clock()
    _times["step"].append(end - _last_end)
    for what in _PASSES:
        _times[what].append(_now[what])
        _now[what] = 0.0
    if not _times["to_first_step"]:
        _times["to_first_step"].append(_since_process_start())
    _last_end = end


@hookimpl
def hyimg_run_end(run: Run) -> None:
    Path(os.environ["HYIMG_PROBE"]).write_text(json.dumps(_times), encoding="utf-8")


def _timed(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*arguments: Any, **named: Any) -> Any:
        started = _clock()
        result = function(*arguments, **named)
        _now[what] += _clock() - started
        return result

    return timed


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _since_process_start() -> float:
    return time.time() - psutil.Process().create_time()

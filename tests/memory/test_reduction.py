"""What goes wrong between the processes of a step, in a sentence; the sums themselves are tested through training."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from hyimg.errors import FellowLostError, RunError
from hyimg.memory.processes import Processes
from hyimg.memory.reduction import process_group, sum_over_processes

CPU = torch.device("cpu")


def raising(error):
    def call(*_, **__):
        raise error

    return call


def test_a_sum_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", raising(RuntimeError("Duplicate GPU\ndetected")))
    with pytest.raises(FellowLostError, match="is lost: RuntimeError: Duplicate GPU detected"):
        sum_over_processes([torch.ones(2)])


def test_memory_that_runs_out_in_a_sum_is_no_lost_connection(monkeypatch):
    monkeypatch.setattr(
        torch.distributed, "all_reduce", raising(torch.OutOfMemoryError("CUDA out of memory"))
    )
    with pytest.raises(torch.OutOfMemoryError):
        sum_over_processes([torch.ones(2)])


def test_processes_that_do_not_find_each_other_are_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", raising(RuntimeError("no such interface")))
    with (
        pytest.raises(RunError, match="cannot be connected: RuntimeError: no such interface"),
        process_group(Processes(0, 2, 0), CPU, timedelta(minutes=1)),
    ):
        pass

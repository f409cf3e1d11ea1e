"""What goes wrong between the processes of a step, in a sentence; the sums themselves are tested through training."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize(("device", "is_nccl"), [("cuda:1", True), ("cuda:1", False), ("cpu", True)])
def test_nccl_takes_its_memory_before_the_model_does(monkeypatch, device, is_nccl):
    told = {}
    monkeypatch.setenv("NCCL_RUNTIME_CONNECT", "")  # so that it is as it was afterwards
    monkeypatch.delenv("NCCL_RUNTIME_CONNECT")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: is_nccl)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *names, **more: told.update(more, on=names[0])
    )
    with process_group(Processes(1, 2, 1), torch.device(device), timedelta(minutes=1)):
        pass
    expected = ("nccl", torch.device(device)) if is_nccl and device != "cpu" else ("gloo", None)
    assert (told["on"], told["device_id"]) == expected
    assert os.environ.get("NCCL_RUNTIME_CONNECT") == ("0" if expected[0] == "nccl" else None)


def test_cards_that_cannot_reach_each_other_are_told_to_nccl(monkeypatch):
    monkeypatch.setattr("accelerate.utils.check_cuda_p2p_ib_support", lambda: False)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "0")  # what a user has set stays
    monkeypatch.setenv("NCCL_IB_DISABLE", "")  # so that it is as it was afterwards
    monkeypatch.delenv("NCCL_IB_DISABLE")
    with process_group(Processes(0, 1, 0), torch.device("cuda"), timedelta(minutes=1)):
        assert (os.environ["NCCL_P2P_DISABLE"], os.environ["NCCL_IB_DISABLE"]) == ("0", "1")


def test_memory_that_runs_out_while_connecting_is_no_question_of_the_network(monkeypatch):
    error = torch.distributed.DistBackendError(
        "NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"
    )
    monkeypatch.setattr(torch.distributed, "init_process_group", raising(error))
    with (
        pytest.raises(torch.distributed.DistBackendError),
        process_group(Processes(0, 2, 0), CPU, timedelta(minutes=1)),
    ):
        pass


def test_processes_that_do_not_find_each_other_are_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", raising(RuntimeError("no such interface")))
    with (
        pytest.raises(RunError, match="cannot be connected: RuntimeError: no such interface"),
        process_group(Processes(0, 2, 0), CPU, timedelta(minutes=1)),
    ):
        pass

"""What goes wrong between the processes of a step, in a sentence; the sums themselves are tested through training."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch

from hyimg.cache.own_files import try_lock
from hyimg.distributed import launch
from hyimg.distributed.collectives import process_group, sum_over_processes
from hyimg.distributed.processes import STORE_FILE, Processes
from hyimg.errors import PeerProcessLostError, RunError

CPU = torch.device("cpu")


def raising(error):
    def call(*_, **__):
        raise error

    return call


def test_a_failed_sum_is_reported_with_its_reason(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", raising(RuntimeError("Duplicate GPU\ndetected")))
    with pytest.raises(
        PeerProcessLostError, match="processes of this run: RuntimeError: Duplicate GPU detected"
    ):
        sum_over_processes([torch.ones(2)])


def test_out_of_memory_in_a_sum_is_not_a_lost_connection(monkeypatch):
    monkeypatch.setattr(
        torch.distributed, "all_reduce", raising(torch.OutOfMemoryError("CUDA out of memory"))
    )
    with pytest.raises(torch.OutOfMemoryError):
        sum_over_processes([torch.ones(2)])


@pytest.mark.parametrize(("device", "is_nccl"), [("cuda:1", True), ("cuda:1", False), ("cpu", True)])
def test_nccl_allocates_its_memory_before_the_model(monkeypatch, device, is_nccl):
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


def test_nccl_peer_access_is_disabled_on_cards_without_it(monkeypatch):
    monkeypatch.setattr("accelerate.utils.check_cuda_p2p_ib_support", lambda: False)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "0")  # what a user has set stays
    monkeypatch.setenv("NCCL_IB_DISABLE", "")  # so that it is as it was afterwards
    monkeypatch.delenv("NCCL_IB_DISABLE")
    with process_group(Processes(0, 1, 0), torch.device("cuda"), timedelta(minutes=1)):
        assert (os.environ["NCCL_P2P_DISABLE"], os.environ["NCCL_IB_DISABLE"]) == ("0", "1")


def test_out_of_memory_while_connecting_is_not_a_network_error(monkeypatch):
    error = torch.distributed.DistBackendError(
        "NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"
    )
    monkeypatch.setattr(torch.distributed, "init_process_group", raising(error))
    with (
        pytest.raises(torch.distributed.DistBackendError),
        process_group(Processes(0, 2, 0), CPU, timedelta(minutes=1)),
    ):
        pass


def test_a_failed_connection_between_processes_is_reported(monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", raising(RuntimeError("no such interface")))
    with (
        pytest.raises(RunError, match="cannot be connected: RuntimeError: no such interface"),
        process_group(Processes(0, 2, 0), CPU, timedelta(minutes=1)),
    ):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="torch takes no interface by name there")
def test_processes_on_one_machine_use_a_file_store_and_the_loopback(monkeypatch, tmp_path):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "a user's choice")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    environment = launch._environment(0, 2, tmp_path)
    chosen = psutil.net_if_addrs()[environment["GLOO_SOCKET_IFNAME"]]
    assert "127.0.0.1" in [address.address for address in chosen]
    assert environment["NCCL_SOCKET_IFNAME"] == "a user's choice"
    assert not {"MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"} & environment.keys()
    monkeypatch.setenv(STORE_FILE, environment[STORE_FILE])
    Processes(0, 2).group_store().set("key", "value")
    assert b"value" in Path(environment[STORE_FILE]).read_bytes()
    assert Path(environment[STORE_FILE]).parent == tmp_path


def test_the_store_folder_is_private_and_removed():
    with launch._private_folder() as folder:
        (folder / "store").touch()
        assert folder.stat().st_mode & 0o077 == 0 or sys.platform == "win32"
    assert not folder.exists()


def test_the_folder_of_a_killed_parent_is_removed_by_the_next_launch(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folders = {name: tmp_path / f"hyimg-processes-{name}" for name in ("stale", "used", "new", "other")}
    for name, folder in folders.items():
        folder.mkdir()
        if name != "other":
            (folder / "lock").touch()
        if name != "new":
            os.utime(folder, (0, 0))
    with open(folders["used"] / "lock", "rb+") as lock:
        if not try_lock(lock.fileno()):
            pytest.skip("no file locks here")
        with launch._private_folder() as own:
            assert set(tmp_path.iterdir()) == {own, *folders.values()} - {folders["stale"]}
    assert not own.exists()

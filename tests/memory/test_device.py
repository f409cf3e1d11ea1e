"""Which device a name means, and that torch is told of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hyimg.errors import HyimgError
from hyimg.memory.device import resolve_device
from hyimg.report import SilentReporter


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Two CUDA devices; the list of those that were made the current one."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_named_device_becomes_the_current_one(
    two_devices: list[torch.device], name: str, index: int
) -> None:
    device = torch.device("cuda", index)
    assert resolve_device(name) == device
    assert two_devices == [device], "so that memory which is locked for copies is locked for it"


def test_without_a_name_the_current_device_is_taken(two_devices: list[torch.device]) -> None:
    assert resolve_device(None) == torch.device("cuda", 0)


@pytest.mark.parametrize("has_driver", [True, False])
def test_a_torch_without_cuda_on_a_machine_with_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_driver: bool
) -> None:
    for there in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(there, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if has_driver:
        (tmp_path / "nvidia-smi").touch(mode=0o755)
    report = SilentReporter()
    assert resolve_device(None, report) == torch.device("cpu")
    assert [warning.partition(",")[0] for warning in report.warnings] == [
        "an NVIDIA driver is there"
    ] * has_driver
    report.warnings.clear()
    assert resolve_device("cpu", report) == torch.device("cpu")
    assert not report.warnings


@pytest.mark.parametrize(
    ("name", "words"),
    [("cuda:2", "torch sees 2 CUDA devices"), ("gpu", "is no device"), ("xpu", "not supported")],
)
def test_a_device_that_is_not_there_is_refused(
    two_devices: list[torch.device], name: str, words: str
) -> None:
    with pytest.raises(HyimgError, match=words):
        resolve_device(name)
    assert two_devices == []

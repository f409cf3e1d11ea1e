"""Which device a name means, and that torch is told of it."""

from __future__ import annotations

import pytest
import torch

from hyimg.errors import HyimgError
from hyimg.memory.device import resolve_device


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

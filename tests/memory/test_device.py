"""Which device a name means, and that torch is told of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hyimg.distributed.processes import Processes
from hyimg.errors import HyimgError
from hyimg.memory import device
from hyimg.memory.device import accelerator, resolve_device
from hyimg.report import SilentReporter
from hyimg.training.resume import generators_part


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None, int], list[torch.device]]:
    """Pretends so many accelerators of a kind; gives the list of those that were made the current one."""

    def pretend(kind: str | None, count: int = 1) -> list[torch.device]:
        current: list[torch.device] = []
        found = None if kind is None else torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: found)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        for module in (torch.cuda, torch.xpu):
            monkeypatch.setattr(module, "current_device", lambda: 0)
            monkeypatch.setattr(module, "set_device", current.append)
        return current

    return pretend


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
@pytest.mark.parametrize(("suffix", "index"), [("", 0), (":0", 0), (":1", 1)])
def test_a_named_device_becomes_the_current_one(machine, kind: str, suffix: str, index: int) -> None:
    current = machine(kind, 2)
    expected = torch.device(kind, index)
    assert resolve_device(f"{kind}{suffix}") == expected
    assert current == [expected], "so that memory which is locked for copies is locked for it"


@pytest.mark.parametrize(
    ("kind", "best"), [("cuda", "cuda:0"), ("xpu", "xpu:0"), ("mps", "mps"), (None, "cpu")]
)
def test_the_accelerator_is_the_default_device(machine, kind: str | None, best: str) -> None:
    machine(kind)
    assert resolve_device(None) == torch.device(best)
    assert resolve_device(best) == torch.device(best)
    assert resolve_device("cpu") == torch.device("cpu")


def test_without_its_accelerator_torch_runs_on_the_cpu(machine) -> None:
    machine("cuda", 0)
    assert accelerator() is None
    assert resolve_device(None) == torch.device("cpu")


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_each_process_gets_its_own_device(machine, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    current = machine(kind, 2)
    for rank, expected in enumerate((0, 1)):
        monkeypatch.setattr(Processes, "current", lambda rank=rank: Processes(rank, 2, rank))
        assert resolve_device(None) == torch.device(kind, expected)
    assert [device.index for device in current] == [0, 1]
    monkeypatch.setattr(Processes, "current", lambda: Processes(2, 3, 2))
    with pytest.raises(HyimgError, match="process 3 on this machine has no device: torch sees 2"):
        resolve_device(kind)


@pytest.mark.parametrize("has_driver", [True, False])
def test_an_nvidia_driver_without_a_cuda_torch_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine, has_driver: bool
) -> None:
    machine(None)
    monkeypatch.setenv("PATH", str(tmp_path))
    if has_driver:
        (tmp_path / "nvidia-smi").touch(mode=0o755)
    report = SilentReporter()
    assert resolve_device(None, report) == torch.device("cpu")
    assert [warning.partition(",")[0] for warning in report.warnings] == [
        "an NVIDIA driver is installed"
    ] * has_driver
    report.warnings.clear()
    assert resolve_device("cpu", report) == torch.device("cpu")
    assert not report.warnings


@pytest.mark.parametrize(
    ("kind", "name", "words", "way_out"),
    [
        ("cuda", "cuda:2", "torch sees 2 CUDA devices", "use `cuda`, `cuda:N` or `cpu`"),
        ("xpu", "xpu:3", "torch sees 2 xpu devices", "use `xpu`, `xpu:N` or `cpu`"),
        ("xpu", "cuda", "torch sees 0 CUDA devices", "install a build of torch"),
        ("cuda", "xpu", "torch sees 0 xpu devices", "install a build of torch"),
        (None, "mps", "torch sees 0 mps devices", "use `--device cpu`"),
        ("cuda", "gpu", "is not a device", "use `cuda`"),
        ("cuda", "meta", "is not supported", "use `cuda`"),
    ],
)
def test_an_unknown_or_missing_device_is_refused(
    machine, kind: str | None, name: str, words: str, way_out: str
) -> None:
    current = machine(kind, 2)
    with pytest.raises(HyimgError, match=words) as caught:
        resolve_device(name)
    assert way_out in (caught.value.hint or "")
    assert current == []


class Module:
    """A kind's module with a generator and memory that it counts."""

    state = torch.arange(3, dtype=torch.uint8)
    released = 0

    def get_rng_state(self, device: torch.device) -> torch.Tensor:
        return self.state

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        self.state = state

    def max_memory_allocated(self, device: torch.device) -> int:
        return 7

    def get_device_name(self, device: torch.device) -> str:
        return "a card"

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(total_memory=9, has_fp64=False)

    def empty_cache(self) -> None:
        self.released += 1


def test_device_properties_come_from_the_devices_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module()
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    xpu = torch.device("xpu", 0)
    assert (device.device_name(xpu), device.total_memory(xpu), device.peak_memory(xpu)) == ("a card", 9, 7)
    assert not device.has_float64(xpu)
    device.empty_cache(xpu)
    assert module.released == 1
    generators = generators_part(xpu)
    saved = generators.state_dict()
    module.state = torch.zeros(3, dtype=torch.uint8)
    generators.load_state_dict(saved)
    assert torch.equal(module.state, torch.arange(3, dtype=torch.uint8))


def test_missing_device_properties_have_fallbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(get_device_properties=lambda d: SimpleNamespace())
    monkeypatch.setattr(torch, "get_device_module", lambda kind: properties)
    for one in (torch.device("xpu", 0), torch.device("cpu")):
        assert device.total_memory(one) is None
        assert device.peak_memory(one) is None
        assert device.rng_state(one) is None
        device.empty_cache(one)
    assert device.has_float64(torch.device("cpu"))
    assert not device.has_float64(torch.device("mps"))
    assert device.total_memory(torch.device("mps")) is None, "it is the host's"

"""What each model computes in: the decision for every kind of device, from doubles of what they are asked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from hyimg.config.models import Compute
from hyimg.distributed.processes import Processes
from hyimg.errors import HyimgError
from hyimg.memory import precision
from hyimg.memory.precision import Precision, agreed, decide_precision, multiplies_bf16, slow_warning
from hyimg.report import SilentReporter

CPU, CUDA, XPU = torch.device("cpu"), torch.device("cuda", 0), torch.device("xpu", 0)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends a processor: what oneDNN says of bfloat16 (None: there is no oneDNN), and its instructions."""

    def pretend(
        onednn: bool | None, *instructions: str, machine: str = "x86_64", slowdown: float = 35
    ) -> None:
        ops = (
            SimpleNamespace() if onednn is None else SimpleNamespace(_is_mkldnn_bf16_supported=lambda: onednn)
        )
        monkeypatch.setattr(torch.ops, "mkldnn", ops)
        monkeypatch.setattr("platform.machine", lambda: machine)
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda name=name: name in instructions, raising=False)
        monkeypatch.setattr(precision, "slowdown", lambda dtype: slowdown)

    return pretend


class Heard(SilentReporter):
    """Keeps notes too."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def decide(device: torch.device, mixed_precision: str = "auto", **options: object) -> Precision:
    return decide_precision(Compute(mixed_precision=mixed_precision), device, **options)


@pytest.mark.parametrize(
    ("onednn", "instructions", "machine", "fast"),
    [
        (True, ["_is_avx512_bf16_supported"], "x86_64", True),
        (True, ["_is_amx_tile_supported"], "AMD64", True),
        # AVX-512 without bfloat16 (Skylake), where oneDNN says yes and computes 4 times slower
        (True, [], "x86_64", False),
        (False, ["_is_avx512_bf16_supported"], "x86_64", False),
        (True, [], "aarch64", True),
        (False, [], "aarch64", False),
    ],
)
def test_a_cpu_computes_in_bf16_where_it_has_instructions_for_it(cpu, onednn, instructions, machine, fast):
    cpu(onednn, *instructions, machine=machine)
    assert multiplies_bf16(CPU) is fast
    decided = decide(CPU)
    assert decided.mixed_precision == ("bf16" if fast else "no")
    assert (decided.dit, decided.text_encoder) == ((BF16, BF16) if fast else (F32, F32))
    assert (decided.vae, decided.byt5, decided.adapters) == (F32, F32, F32)


@pytest.mark.parametrize(("slowdown", "fast"), [(0.6, True), (1.8, False)])
def test_without_onednn_a_product_is_measured(cpu, slowdown, fast):
    cpu(None, machine="arm64", slowdown=slowdown)
    assert multiplies_bf16(CPU) is fast


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [
        ((7, 5), None, ("fp16", F16, F32, F16)),
        ((8, 0), None, ("bf16", BF16, BF16, F16)),
        ((9, 0), None, ("bf16", BF16, BF16, F16)),
        ((6, 1), "6.2", ("bf16", BF16, BF16, F16)),
    ],
)
def test_a_gpu_before_ampere_computes_in_float16_but_never_the_text_encoder(
    monkeypatch, capability, hip, expected
):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    decided = decide(CUDA)
    assert (decided.mixed_precision, decided.dit, decided.text_encoder, decided.vae) == expected
    assert decided.byt5 is None, "as in its file"
    assert decided.adapters == F32


def test_other_accelerators_are_asked_whether_they_compute_in_bf16(monkeypatch):
    for answer, name in ((True, "bf16"), (False, "fp16")):
        for asked in (
            lambda answer=answer: answer,
            lambda including_emulation=True, a=answer: including_emulation or a,
        ):
            module = SimpleNamespace(is_bf16_supported=asked)
            monkeypatch.setattr(torch, "get_device_module", lambda kind, module=module: module)
            assert decide(XPU).mixed_precision == name
    monkeypatch.setattr(torch, "get_device_module", lambda kind: SimpleNamespace())
    monkeypatch.setattr(precision, "_can_multiply", lambda dtype, device: device.type == "mps")
    assert decide(XPU).mixed_precision == "fp16"
    assert decide(torch.device("mps")).mixed_precision == "bf16", "which is tried"


def test_what_is_asked_for_is_done_on_any_device(cpu):
    cpu(False)
    for name, dtype in (("no", F32), ("fp16", F16), ("bf16", BF16)):
        assert decide(CPU, name).dit == dtype
    whole = decide(CUDA, "no")
    assert (whole.dit, whole.vae, whole.text_encoder, whole.byt5, whole.adapters) == (F32,) * 5
    assert decide(CPU, "bf16").text_encoder == BF16
    assert decide(CPU, "fp16").text_encoder == F32, "Qwen overflows in float16"


def test_the_text_encoder_has_a_word_of_its_own(cpu):
    cpu(False)
    for name, dtype in (("bf16", BF16), ("fp32", F32)):
        for mixed_precision in ("auto", "no", "fp16", "bf16"):
            decided = decide(CPU, mixed_precision, text_encoder_dtype=name)
            assert (decided.text_encoder, decided.text_entries) == (dtype, (name,))
    assert decide(CPU).text_entries == ("fp32", "bf16"), "entries of either, its own type first"
    assert decide(CPU, "bf16").text_entries == ("bf16", "fp32")
    assert not decide(CPU).text_encoder_asked
    assert decide(CPU, "bf16").text_encoder_asked
    assert not decide(CPU, "fp16").text_encoder_asked


def test_encoders_on_the_cpu_follow_the_cpu(cpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cpu(False)
    decided = decide(CUDA, text_encoder_device=CPU)
    assert (decided.dit, decided.vae, decided.text_encoder, decided.byt5) == (BF16, F16, F32, F32)


def test_every_process_computes_as_the_main_one_decides(cpu):
    sent = []

    class Fellow(Processes):
        def broadcast(self, value):
            if self.is_main:
                sent.append(json.dumps(value))
            return json.loads(sent[0])

    decided = []
    for rank, has_bf16 in enumerate((True, False)):
        cpu(has_bf16, "_is_avx512_bf16_supported")
        decided.append(agreed(decide(CPU), Fellow(rank, world=2)))
    assert [(one.dit, one.text_encoder, one.text_entries) for one in decided] == [
        (BF16, BF16, ("bf16", "fp32"))
    ] * 2


def test_adapters_of_16_bits_decide_what_auto_is(cpu):
    cpu(False)
    assert decide(CPU, full_bf16=True).mixed_precision == "bf16"
    both = decide(CPU, full_fp16=True)
    assert (both.mixed_precision, both.adapters) == ("fp16", F16)
    for given, message in (
        ({"full_bf16": True}, "`--full_bf16` needs `--mixed_precision bf16`, not `no`"),
        ({"full_bf16": True, "full_fp16": True}, "exclude each other"),
    ):
        with pytest.raises(HyimgError, match=message):
            decide(CPU, "no", **given)


def test_the_line_names_each_model_and_a_slow_type_is_warned_of_with_what_was_measured(cpu, monkeypatch):
    cpu(False, slowdown=34.6)
    report = Heard()
    decide(CPU).log(report, "DiT", "adapters", "VAE", cached_text="bf16")
    assert report.notes == [
        "precision: DiT float32, adapters float32, VAE float32, cached texts bf16 (`--mixed_precision auto`)"
    ]
    assert report.warnings == []
    decide(CPU, "bf16").log(report, "DiT", "text encoder")
    assert report.notes[1] == "precision: DiT bf16, text encoder bf16"
    assert report.warnings == [
        "this CPU is about 35 times slower in bf16 than in float32 (measured): `--mixed_precision no` is faster"
    ], "once"
    decide(CPU, "bf16").log(report, "VAE")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    decide(CUDA, "bf16").log(report, "DiT")
    assert len(report.warnings) == 1, "the VAE is float32 on a CPU, and a GPU is not the CPU"


@pytest.mark.parametrize(
    ("capability", "hip", "asked", "warns"),
    [((7, 5), None, "bf16", True), ((7, 5), None, "fp16", False), ((9, 0), "6.4", "bf16", False)],
)
def test_bf16_on_a_gpu_without_it_is_warned_of(monkeypatch, capability, hip, asked, warns):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    report = Heard()
    decide(CUDA, asked).log(report, "DiT")
    assert ["`--mixed_precision fp16`" in warning for warning in report.warnings] == [True] * warns


def test_no_warning_for_what_the_cpu_has_instructions_for_or_does_as_fast(cpu):
    cpu(True, "_is_avx512_bf16_supported", slowdown=50)
    assert slow_warning(BF16) is None
    assert slow_warning(F16) is not None
    cpu(False, slowdown=1.4)
    assert slow_warning(F16) is None


def test_the_ratio_is_measured_in_milliseconds_and_threads_are_as_before():
    precision.slowdown.cache_clear()
    threads = torch.get_num_threads()
    assert 0 < precision.slowdown(BF16) < 1000
    assert torch.get_num_threads() == threads
    assert re.search("about", slow_warning(F16) or "about")

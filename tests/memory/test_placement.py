"""Loading as the memory options want it: what goes where, in what form, and what is said about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hyimg.errors import HyimgError
from hyimg.memory.dit import DiTOptions
from hyimg.memory.fp8 import ScaledLinear, dequantize, is_quantised, quantize
from hyimg.memory.plan import activation_bytes, fits_twice, require_room, weight_bytes
from hyimg.memory.swap_plan import SwapPlan
from hyimg.model.architecture import DIT_2_1, DIT_TINY
from hyimg.model.dit import DiT
from hyimg.model.layers import Linear
from hyimg.model.random_init import init_random
from hyimg.report import SilentReporter

ARCH = replace(DIT_TINY, num_double=4, num_single=8)
CPU = torch.device("cpu")


class Listening(SilentReporter):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    model = DiT(ARCH)
    init_random(model, seed=0)
    return {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def path(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dit") / "dit.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="module")
def fp8_path(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in ComfyUI's older scaled-fp8 form."""
    state = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in weights.items():
        if is_quantised(name):
            scale = tensor.float().abs().max() / 448
            state[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            state[name.replace(".weight", ".scale_weight")] = scale
        else:
            state[name] = tensor
    path = tmp_path_factory.mktemp("fp8") / "fp8.safetensors"
    save_file(state, path)
    return path


def load(path: Path, **options: object) -> tuple[DiT, Listening]:
    report = Listening()
    return DiTOptions(**options).load(path, CPU, torch.bfloat16, report), report


def test_the_weights_of_a_streamed_unit_are_one_piece_of_memory_and_the_only_copy(path, weights):
    dit, report = load(path, blocks_to_swap=4)
    plan = SwapPlan.for_arch(ARCH, 4)
    storages = {name: p.untyped_storage().data_ptr() for name, p in dit.named_parameters()}
    for unit in plan.units:
        names = [n for n in storages if is_quantised(n) and n.startswith(tuple(f"{b}." for b in unit))]
        assert len({storages[name] for name in names}) == 1
        others = {storage for name, storage in storages.items() if name not in names}
        assert storages[names[0]] not in others
    assert all(torch.equal(p, weights[name]) for name, p in dit.named_parameters())
    assert not any(p.requires_grad for p in dit.parameters())
    assert [note for note in report.notes if "saves nothing" in note] == report.notes


def test_without_options_nothing_is_said_and_every_weight_is_the_files(path, weights):
    dit, report = load(path)
    assert report.notes == []
    assert all(torch.equal(p, weights[name]) for name, p in dit.named_parameters())


@pytest.mark.parametrize("blocks_to_swap", [0, 4])
def test_fp8_scaled_quantises_the_linears_of_the_blocks_and_nothing_else(path, weights, blocks_to_swap):
    dit, report = load(path, fp8_scaled=True, blocks_to_swap=blocks_to_swap)
    linears = {name for name, module in dit.named_modules() if isinstance(module, Linear)}
    assert {name for name, module in dit.named_modules() if isinstance(module, ScaledLinear)} == linears
    for name, parameter in dit.named_parameters():
        if is_quantised(name):
            q, scale = quantize(weights[name])
            assert torch.equal(parameter.view(torch.uint8), q.view(torch.uint8))
            assert torch.equal(dit.get_parameter(name + "_scale"), scale)
        elif not name.endswith("weight_scale"):
            assert torch.equal(parameter, weights[name])
    assert "relative error of the weights 2." in report.notes[0]


@pytest.mark.parametrize("blocks_to_swap", [0, 4])
def test_the_weights_of_an_fp8_file_stay_fp8(fp8_path, weights, blocks_to_swap):
    dit, _ = load(fp8_path, blocks_to_swap=blocks_to_swap)
    for name, parameter in dit.named_parameters():
        if is_quantised(name):
            assert parameter.dtype == torch.float8_e4m3fn
            value = dequantize(parameter, dit.get_parameter(name + "_scale"), torch.float32)
            torch.testing.assert_close(value, weights[name].float(), rtol=0.07, atol=1e-4)


def test_what_cannot_be_is_refused_from_the_header(path, fp8_path):
    def refused(match: str, path: Path = path, **options: object) -> None:
        with pytest.raises(HyimgError, match=match):
            DiTOptions(**options).check(path, CPU, torch.bfloat16)

    refused("`--blocks_to_swap` 6 is more than this model's 5", blocks_to_swap=6)
    refused("is fp8 already", fp8_path, fp8_scaled=True)
    refused("sageattn", attn_mode="sageattn", training=True)
    DiTOptions(blocks_to_swap=5, fp8_scaled=True).check(path, CPU, torch.bfloat16)
    DiTOptions().check(fp8_path, CPU, torch.bfloat16)


def test_weights_that_no_memory_of_the_machine_could_hold_are_refused_before_they_are_read():
    whole = weight_bytes(DIT_2_1, blocks_to_swap=0, fp8=False)
    streamed = weight_bytes(DIT_2_1, blocks_to_swap=37, fp8=False)
    gigabytes = 10**9
    room = {"device_name": "cuda:0", "device_bytes": 24 * gigabytes, "host_bytes": 24 * gigabytes}
    with pytest.raises(HyimgError, match="take 34.9 GB on cuda:0, which has 24.0 GB"):
        require_room(whole, **room)
    with pytest.raises(HyimgError, match="31.3 GB of weights would be in host memory"):
        require_room(streamed, **room)
    require_room(streamed, **room | {"host_bytes": 32 * gigabytes})
    require_room(weight_bytes(DIT_2_1, blocks_to_swap=9, fp8=True), **room)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("blocks_to_swap", [0, 1, 4])
def test_what_the_weights_take_is_told_as_it_is(path, fp8, blocks_to_swap):
    taken = weight_bytes(ARCH, blocks_to_swap=blocks_to_swap, fp8=fp8)
    dit, _ = load(path, fp8_scaled=fp8, blocks_to_swap=blocks_to_swap)
    streamed = SwapPlan.for_arch(ARCH, blocks_to_swap).blocks
    sizes = {True: 0, False: 0}
    for name, parameter in dit.named_parameters():
        is_streamed = ".".join(name.split(".")[:2]) in streamed and is_quantised(name.replace("_scale", ""))
        sizes[is_streamed] += parameter.nbytes
    assert (sizes[True], sizes[False]) == (taken.host, taken.device - taken.ring)


def test_two_images_at_a_time_are_for_gpus_with_room(path, monkeypatch):
    image = activation_bytes(DIT_2_1, 2048, 2048)
    assert activation_bytes(DIT_2_1, 1024, 1024) < image / 2
    streamed = weight_bytes(DIT_2_1, blocks_to_swap=37, fp8=True)
    assert fits_twice(streamed, image, 8 << 30)
    assert not fits_twice(weight_bytes(DIT_2_1, blocks_to_swap=0, fp8=False), image, 40 << 30)
    assert fits_twice(streamed, 10, int((streamed.device + 20) / 0.85) + 2)
    assert not fits_twice(streamed, 10, int((streamed.device + 20) / 0.85) - 2)

    def has_room(device, gigabytes):
        properties = SimpleNamespace(total_memory=gigabytes * 1e9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return DiTOptions().has_room_for_two(path, torch.device(device), torch.bfloat16, 2048, 2048)

    assert has_room("cuda", 1)
    assert not has_room("cuda", 0.01)
    assert not has_room("cpu", 1), "whose memory others use too"

"""Loading as the memory options want it: what goes where, in what form, and what is said about it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hyimg.checkpoints.architecture import DIT_2_1, DIT_TINY, NATIVE_SIZES, VAE_2_1
from hyimg.checkpoints.header_check import open_dit
from hyimg.config.models import Memory, TrainingMemory
from hyimg.errors import HyimgError
from hyimg.memory.budget import (
    activation_bytes,
    fits_twice,
    least_decoding_bytes,
    least_rendering_bytes,
    require_room,
    require_room_for_images,
    weight_bytes,
)
from hyimg.memory.dit_loader import DiTSetup
from hyimg.memory.fp8 import ScaledLinear, dequantize, is_quantised, quantize
from hyimg.memory.swap import streamed_units
from hyimg.model.dit import DiT
from hyimg.model.layers import Linear
from hyimg.model.loading import init_random
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


def setup(
    path: Path, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", **options: object
) -> DiTSetup:
    return DiTSetup(open_dit(path), Memory(**options), torch.device(device), dtype)


def load(path: Path, **options: object) -> tuple[DiT, Listening]:
    report = Listening()
    return setup(path, **options).load(report), report


def test_a_streamed_units_weights_are_in_one_buffer_and_nowhere_else(path, weights):
    dit, report = load(path, blocks_to_swap=4)
    units = streamed_units(ARCH, 4)
    storages = {name: p.untyped_storage().data_ptr() for name, p in dit.named_parameters()}
    for unit in units:
        names = [n for n in storages if is_quantised(n) and n.startswith(tuple(f"{b}." for b in unit))]
        assert len({storages[name] for name in names}) == 1
        others = {storage for name, storage in storages.items() if name not in names}
        assert storages[names[0]] not in others
    assert all(torch.equal(p, weights[name]) for name, p in dit.named_parameters())
    assert not any(p.requires_grad for p in dit.parameters())
    assert [note for note in report.notes if "saves nothing" in note] == report.notes


def test_without_options_all_weights_equal_the_files_and_nothing_is_noted(path, weights):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantised_in_file", [False, True])
def test_fp8_products_run_in_the_models_dtype(path, fp8_path, dtype, quantised_in_file):
    file = fp8_path if quantised_in_file else path
    dit = setup(file, dtype=dtype, fp8_scaled=not quantised_in_file).load(SilentReporter())
    assert dit.dtype == dtype
    layers = [module for module in dit.modules() if isinstance(module, ScaledLinear)][:3]
    assert layers
    for layer in layers:
        x = torch.ones(2, layer.in_features, dtype=dtype)
        weight = dequantize(layer.weight, layer.weight_scale, dtype)
        assert layer.bias.dtype == dtype
        assert torch.equal(layer.base_forward(x), torch.nn.functional.linear(x, weight, layer.bias))


def test_impossible_options_are_refused_before_weights_are_read(path, fp8_path):
    def refused(match: str, path: Path = path, **options: object) -> None:
        with pytest.raises(HyimgError, match=match):
            setup(path, **options).check()

    refused("`--blocks_to_swap` 6 is more than this model's 5", blocks_to_swap=6)
    refused("is already fp8", fp8_path, fp8_scaled=True)
    with pytest.raises(HyimgError, match="sageattn` cannot train"):
        replace(setup(path, attn_mode="sageattn"), training=TrainingMemory()).check()
    setup(path, blocks_to_swap=5, fp8_scaled=True).check()
    setup(fp8_path).check()


def test_weights_larger_than_memory_are_refused():
    whole = weight_bytes(DIT_2_1, blocks_to_swap=0, fp8=False)
    streamed = weight_bytes(DIT_2_1, blocks_to_swap=37, fp8=False)
    gigabytes = 10**9
    room = {"device_name": "cuda:0", "device_bytes": 24 * gigabytes, "host_bytes": 24 * gigabytes}
    with pytest.raises(HyimgError, match="need 34.9 GB on cuda:0, which has 24.0 GB"):
        require_room(whole, **room)
    with pytest.raises(HyimgError, match="31.3 GB of weights would be in host memory"):
        require_room(streamed, **room)
    require_room(streamed, **room | {"host_bytes": 32 * gigabytes})
    require_room(weight_bytes(DIT_2_1, blocks_to_swap=9, fp8=True), **room)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("blocks_to_swap", [0, 1, 4])
def test_the_predicted_weight_bytes_are_exact(path, fp8, blocks_to_swap):
    taken = weight_bytes(ARCH, blocks_to_swap=blocks_to_swap, fp8=fp8)
    dit, _ = load(path, fp8_scaled=fp8, blocks_to_swap=blocks_to_swap)
    streamed = {block for unit in streamed_units(ARCH, blocks_to_swap) for block in unit}
    sizes = {True: 0, False: 0}
    for name, parameter in dit.named_parameters():
        is_streamed = ".".join(name.split(".")[:2]) in streamed and is_quantised(name.replace("_scale", ""))
        sizes[is_streamed] += parameter.nbytes
    assert (sizes[True], sizes[False]) == (taken.host, taken.device - taken.ring)


def test_two_images_at_a_time_need_a_gpu_with_room(path, monkeypatch):
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
        return setup(path, device=device).has_room_for_two(2048, 2048)

    assert has_room("cuda", 1)
    assert not has_room("cuda", 0.01)
    assert not has_room("cpu", 1), "whose memory others use too"


GIGABYTE = 10**9


def picture_needs(*, in_tiles: bool) -> dict[str, Callable[[int, int], int]]:
    """What pictures of the real model take at the least, in bf16."""
    return {
        "rendering": partial(least_rendering_bytes, DIT_2_1),
        "decoding": partial(least_decoding_bytes, VAE_2_1, in_tiles=in_tiles),
    }


@pytest.mark.parametrize("in_tiles", [False, True])
def test_native_sizes_are_never_refused_on_small_cards(in_tiles: bool) -> None:
    needs = picture_needs(in_tiles=in_tiles)
    require_room_for_images(NATIVE_SIZES, needs, device_name="cuda:0", memory=6 * GIGABYTE, hints={})
    for width, height in NATIVE_SIZES:
        assert needs["rendering"](width, height) < activation_bytes(DIT_2_1, width, height)


def test_an_impossible_image_size_is_refused_with_the_largest_that_fits() -> None:
    needs = picture_needs(in_tiles=True)
    with pytest.raises(HyimgError) as error:
        require_room_for_images(
            [(2048, 2048), (3_200_000, 2048)], needs, device_name="cuda:0", memory=24 * GIGABYTE, hints={}
        )
    assert error.value.message == (
        "rendering an image of 3200000x2048 (width x height) needs at least 367.0 GB, and cuda:0 has 24.0 GB"
    )
    assert error.value.exit_code == 2
    side = int(re.search(r"at most (\d+)x\1 could fit", error.value.hint or "")[1])
    assert side % 32 == 0
    require_room_for_images([(side, side)], needs, device_name="cuda:0", memory=24 * GIGABYTE, hints={})
    with pytest.raises(HyimgError):
        require_room_for_images(
            [(side + 32, side + 32)], needs, device_name="cuda:0", memory=24 * GIGABYTE, hints={}
        )


def test_tiles_are_suggested_for_an_image_that_only_they_can_decode() -> None:
    with pytest.raises(HyimgError, match="decoding an image of 8192x8192") as error:
        require_room_for_images(
            [(8192, 8192)],
            picture_needs(in_tiles=False),
            device_name="cuda:0",
            memory=24 * GIGABYTE,
            hints={"decoding": "give `--vae_tile_size 512`"},
        )
    assert (error.value.hint or "").startswith("give `--vae_tile_size 512`; at most ")


@pytest.mark.parametrize("size", [(32, 10**30), (10**30, 10**30)])
def test_huge_sizes_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(HyimgError, match="needs at least"):
        require_room_for_images(
            [size], picture_needs(in_tiles=True), device_name="cpu", memory=GIGABYTE, hints={}
        )

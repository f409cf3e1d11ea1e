"""Scaled fp8 of block weights: the golden rule, dequantising exactly, and products that save only fp8."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from hyimg.checkpoints.architecture import DIT_2_1, DIT_TINY
from hyimg.checkpoints.names import linear_modules
from hyimg.errors import HyimgError
from hyimg.lora.adapter import LoRA
from hyimg.memory import fp8
from hyimg.memory.fp8 import (
    E4M3,
    QuantizationErrors,
    ScaledLinear,
    dequantize,
    is_quantised,
    layer_kind,
    put_scaled,
    quantize,
    require_fp8_device,
    scaled_linear,
)
from hyimg.model import kernels
from hyimg.model.dit import DiT
from hyimg.model.layers import MLP, Linear

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "fp8.safetensors")
GOLDEN_LAYERS = ("img_attn_qkv", "img_mlp_fc1", "img_attn_proj", "txt_attn_proj")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {"tensor": (1,), "scalar": (), "row": (24, 1), "block": (24, 3, 1)}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def scaled(linear: Linear) -> ScaledLinear:
    return ScaledLinear(linear, *quantize(linear.weight))


@pytest.mark.parametrize("layer", GOLDEN_LAYERS)
def test_quantising_agrees_with_the_golden_bit_for_bit(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = GOLDEN[f"{layer}.weight"]
    for chunk in (kernels.CHUNK_VALUES, 1, 7 * 64):
        monkeypatch.setattr(kernels, "CHUNK_VALUES", chunk)
        q, scale = quantize(weight)
        assert same_bits(q.view(torch.uint8), GOLDEN[f"{layer}.q_u8"])
        assert same_bits(scale, GOLDEN[f"{layer}.scale_fp32_used_to_quantise"])
        # The scales of bf16 weights are bf16 values, so that nothing is lost by how they are stored
        assert same_bits(dequantize(q, scale, weight.dtype), GOLDEN[f"{layer}.dequant"])


@pytest.mark.parametrize("layer", GOLDEN_LAYERS)
def test_a_product_agrees_with_the_golden(layer: str) -> None:
    weight, x = GOLDEN[f"{layer}.weight"], GOLDEN[f"{layer}.x"]
    expected = GOLDEN[f"{layer}.linear_out"]
    # Kernels differ by machine: rounding in the last place
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(scaled_linear(x, *quantize(weight)), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", SHAPES)
def test_every_value_is_dequantised_exactly(dtype: torch.dtype, form: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    q = codes[(codes & 0x7F) != 0x7F].repeat(12)[: 24 * 99].view(E4M3).view(24, 99)
    scale = torch.linspace(1e-4, 3e-2, 24 * 3)[: max(1, torch.Size(SHAPES[form]).numel())].view(SHAPES[form])
    # On a CPU scales are rounded to the dtype first; then one rounding
    scale_GK = scale.to(dtype).float().reshape(-1, 1)
    expected = (q.float().view(len(scale_GK), -1) * scale_GK).to(dtype).view(q.shape)
    assert same_bits(dequantize(q, scale, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zero_and_nan_spreads(dtype: torch.dtype) -> None:
    weight = torch.randn(2, 128).to(dtype)
    weight[0, :64] = 0
    weight[1, 70] = torch.inf
    q, scale = quantize(weight)
    assert not q[0, :64].view(torch.uint8).any()
    assert (scale[:, 0] > 0).all()
    restored = dequantize(q, scale, torch.float32)
    assert torch.equal(restored[0, :64], torch.zeros(64))
    assert not restored[1, 64:].isfinite().all()
    assert restored[1, :64].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "run", [fp8._dequantize_in_two_passes, pytest.param(fp8._decode, id="what is compiled")]
)
def test_gpu_and_cpu_dequantising_give_the_same_bits(
    dtype: torch.dtype, run: Callable[[Tensor, Tensor, torch.dtype], Tensor]
) -> None:
    q, scale = quantize(torch.randn(48, 256).bfloat16())
    q_GK, scale_G1 = q.view(-1, 64), scale.view(-1, 1)
    if run is fp8._decode:
        q_GK = q_GK.view(torch.uint8)
    if dtype == torch.float16:  # of a bf16 scale some bits do not fit; torch rounds at another place
        assert torch.allclose(
            run(q_GK, scale_G1, dtype).view(q.shape), dequantize(q, scale, dtype), rtol=2**-10
        )
        return
    assert same_bits(run(q_GK, scale_G1, dtype).view(q.shape), dequantize(q, scale, dtype))


def test_gradients_are_those_of_the_dequantised_weight() -> None:
    linear = Linear(128, 96).requires_grad_(False)
    layer = scaled(linear)
    plain = dequantize(layer.weight, layer.weight_scale, torch.float32)
    x = torch.randn(2, 5, 128, requires_grad=True)
    gradient = torch.randn(2, 5, 96)
    output = layer(x)
    assert torch.equal(output, F.linear(x, plain, linear.bias))
    (found,) = torch.autograd.grad(output, x, gradient)
    (expected,) = torch.autograd.grad(F.linear(x, plain, linear.bias), x, gradient)
    assert torch.equal(found, expected)
    with torch.no_grad():
        assert torch.equal(layer(x), output)


def saved_by(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        return run(x), saved


def quantised_mlp() -> tuple[MLP, MLP]:
    """An MLP as it is, and with fp8 weights."""
    torch.manual_seed(0)
    plain = MLP(128, 320).bfloat16().requires_grad_(False)
    quantised = MLP(128, 320).bfloat16().requires_grad_(False)
    quantised.load_state_dict(plain.state_dict())
    for name in ("fc1", "fc2"):
        put_scaled(quantised, f"{name}.weight", *quantize(plain.get_parameter(f"{name}.weight")))
    return plain, quantised


def test_only_fp8_weights_are_saved_for_backward_and_the_result_is_close() -> None:
    plain, quantised = quantised_mlp()
    x = torch.randn(1, 33, 128).bfloat16().requires_grad_()
    output, saved = saved_by(quantised, x)
    matrices = [tensor for tensor in saved if tensor.shape in {(320, 128), (128, 320)}]
    assert [tensor.dtype for tensor in matrices] == [E4M3, E4M3]
    error = (output - plain(x)).norm() / plain(x).norm()
    assert 0.005 < error < 0.05, "e4m3 has 3 bits: 2 to 3% a product"
    # Recomputed in backward, the same
    (gradient,) = torch.autograd.grad(output.sum(), x)
    again = checkpoint(quantised, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], gradient)


def test_adapters_survive_quantisation_and_work_as_on_any_linear() -> None:
    parent = nn.Sequential(Linear(64, 64).requires_grad_(False))
    lora = LoRA(64, 64, rank=2, alpha=2)
    lora.initialize(0)
    nn.init.ones_(lora.lora_up.weight)
    parent[0].adapters = (lora,)
    before = parent[0]
    layer = put_scaled(parent, "0.weight", *quantize(before.weight))
    assert parent[0] is layer
    assert layer.bias is before.bias
    assert layer.adapters == (lora,)
    assert sorted(layer.state_dict()) == ["bias", "weight", "weight_scale"]
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), lora(x, layer.base_forward(x)))


def test_a_missing_scale_is_one() -> None:
    parent = nn.Sequential(Linear(64, 64).requires_grad_(False))
    q = torch.randn(64, 64).to(E4M3)
    layer = put_scaled(parent, "0.weight", q, None)
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), F.linear(x, q.float(), layer.bias))


def test_the_same_layers_as_in_the_reference_are_quantised() -> None:
    with torch.device("meta"):
        names = [name for name, _ in DiT(DIT_TINY).named_parameters()]
    chosen = {name for name in names if is_quantised(name)}
    assert chosen == {f"{module.name}.weight" for module in linear_modules(DIT_TINY)}
    assert sum(is_quantised(f"{module.name}.weight") for module in linear_modules(DIT_2_1)) == 320


def test_a_device_without_fp8_is_refused() -> None:
    require_fp8_device(torch.device("cpu"))
    with pytest.raises(HyimgError, match="MPS has no fp8"):
        require_fp8_device(torch.device("mps"))


def test_errors_are_summed_by_layer_kind() -> None:
    torch.manual_seed(0)
    errors = QuantizationErrors()
    weights = {
        "single_blocks.0.linear1.weight": torch.randn(40, 128),
        "single_blocks.7.linear1.weight": torch.randn(40, 128) * 3,
        "double_blocks.1.img_mlp.fc1.weight": torch.randn(40, 96),
    }
    differences = {}
    for name, weight in weights.items():
        q, scale = quantize(weight)
        errors.add(name, weight, q, scale)
        differences[name] = (weight - dequantize(q, scale, torch.float32)).square().sum()
    first, second, third = weights
    norm = weights[first].square().sum() + weights[second].square().sum()
    expected = ((differences[first] + differences[second]) / norm).sqrt()
    assert errors.by_kind()["linear1"] == pytest.approx(float(expected), rel=1e-5)
    assert set(errors.by_kind()) == {"linear1", "img_mlp.fc1"} == {layer_kind(name) for name in weights}
    assert all(0.015 < error < 0.035 for error in errors.by_kind().values())
    total = sum(differences.values()) / (norm + weights[third].square().sum())
    assert errors.total() == pytest.approx(float(total.sqrt()), rel=1e-5)
    assert errors.summary().startswith("fp8: relative error of the weights 2.")
    assert "linear1 2." in errors.summary()


def test_the_product_is_one_operator_in_a_compiled_block() -> None:
    """And saves what the plain one does: traced through, it might keep the dequantised weight."""
    pytest.importorskip("torch._inductor")
    torch._dynamo.reset()
    _, mlp = quantised_mlp()
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 33, 128).bfloat16().requires_grad_()
    plain, _ = saved_by(mlp, x)
    output, saved = saved_by(compiled, x)
    assert torch.equal(output, plain)
    assert E4M3 in {tensor.dtype for tensor in saved}
    for tensor in saved:
        assert tensor.dtype == E4M3 or tensor.shape not in {(320, 128), (128, 320)}
    assert torch.equal(torch.autograd.grad(output.sum(), x)[0], torch.autograd.grad(plain.sum(), x)[0])


@pytest.mark.long
def test_the_gpu_decoder_compiles_and_runs_inside_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the C++ compiler in Triton's place: one graph for all numbers of blocks, also where autograd runs."""
    torch._dynamo.reset()
    _, mlp = quantised_mlp()
    x = torch.randn(1, 33, 128).bfloat16().requires_grad_()
    expected = mlp(x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    monkeypatch.setattr(kernels, "dequantize_e4m3", fp8._fused)
    torch._dynamo.utils.counters.clear()
    assert torch.equal(mlp(x), expected)
    assert torch.equal(torch.autograd.grad(mlp(x).sum(), x)[0], gradient)
    with torch.no_grad():
        assert torch.equal(mlp(x), expected)
    assert fp8._can_compile
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.long
def test_the_gpu_decoder_has_the_same_bits_for_weights_of_many_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights of a multiple of 1024 blocks are decoded with constant sizes: few graphs, whatever the weight."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for rows, columns in ((256, 256), (512, 256), (1024, 512), (2048, 128)):
        q, scale = quantize(torch.randn(rows, columns).bfloat16())
        for dtype in DTYPES:
            found = fp8._fused(q.view(-1, 64), scale.view(-1, 1), dtype)
            assert same_bits(found.view(rows, columns), dequantize(q, scale, dtype))
    assert fp8._can_compile
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4 * len(DTYPES)


def test_without_a_compiler_dequantising_takes_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> Tensor:
        raise RuntimeError("no Triton here")

    monkeypatch.setattr(fp8, "_compiled", lambda decode: fails)
    monkeypatch.setattr(fp8, "_can_compile", True)
    fp8._decodes_right.cache_clear()
    q, scale = quantize(torch.randn(8, 128).bfloat16())
    with pytest.warns(UserWarning, match="two passes instead of one: no Triton here"):
        found = fp8._fused(q.view(-1, 64), scale.view(-1, 1), torch.bfloat16)
    assert same_bits(found.view(8, 128), dequantize(q, scale, torch.bfloat16))
    assert not fp8._can_compile


def test_a_compiler_that_miscompiles_the_decoder_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch 2.7.0 makes of the expression for a GPU."""

    def converts(q_GK: Tensor, scale_G1: Tensor, dtype: torch.dtype) -> Tensor:
        wide = q_GK.to(torch.int16)
        half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(torch.float16)
        return (half.float() * (scale_G1 * 256.0)).to(dtype)

    q, scale = quantize(torch.randn(8, 128).bfloat16())
    found = {}
    for name, compiled in {"wrong": converts, "right": fp8._decode}.items():
        monkeypatch.setattr(fp8, "_compiled", lambda decode, compiled=compiled: compiled)
        monkeypatch.setattr(fp8, "_can_compile", True)
        fp8._decodes_right.cache_clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found[name] = fp8._fused(q.view(-1, 64), scale.view(-1, 1), torch.bfloat16).view(8, 128)
        assert fp8._can_compile == (name == "right")
        assert ["miscompiles it" in str(one.message) for one in told] == [True] * (name == "wrong")
        assert same_bits(found[name], dequantize(q, scale, torch.bfloat16))
    fp8._decodes_right.cache_clear()


def test_dequantising_makes_no_full_size_float32_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest allocation while quantising and dequantising is the result itself."""
    weight = torch.randn(1024, 1024).bfloat16()

    def largest(run: Callable[[], object]) -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            run()
        return max(event.self_cpu_memory_usage for event in profile.key_averages())

    q, scale = quantize(weight)
    assert weight.numel() * 2 <= largest(lambda: dequantize(q, scale, torch.bfloat16)) < weight.numel() * 3
    monkeypatch.setattr(kernels, "CHUNK_VALUES", 1 << 14)
    assert max(tensor.numel() for tensor in float32_made(lambda: quantize(weight))) <= max(
        1 << 14, scale.numel()
    )


def float32_made(run: Callable[[], object]) -> list[Tensor]:
    """Every float32 tensor that an operation returns."""
    from torch.utils._python_dispatch import TorchDispatchMode

    made: list[Tensor] = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dtype == torch.float32:
                made.append(result)
            return result

    with Recording():
        run()
    return made


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", SHAPES)
def test_on_a_gpu_dequantising_is_one_pass_with_the_same_bits(form: str) -> None:
    q = torch.randn(24, 192).to(E4M3)
    scale = torch.rand(SHAPES[form]).bfloat16().float()
    for dtype in DTYPES:
        found = dequantize(q.cuda(), scale.cuda(), dtype)
        torch.testing.assert_close(found.cpu(), dequantize(q, scale, dtype), rtol=2**-8, atol=0)
    assert fp8._can_compile


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_quantising_and_products_are_the_cpus() -> None:
    for layer in GOLDEN_LAYERS:
        q, scale = quantize(GOLDEN[f"{layer}.weight"].cuda())
        assert same_bits(q.cpu().view(torch.uint8), GOLDEN[f"{layer}.q_u8"])
        torch.testing.assert_close(scale.cpu(), GOLDEN[f"{layer}.scale_fp32_used_to_quantise"])
    _, mlp = quantised_mlp()
    x = torch.randn(1, 33, 128).bfloat16().requires_grad_()
    expected = mlp(x)
    weight = 21504 * 3584
    big = torch.randn(21504, 3584, dtype=torch.bfloat16, device="cuda")
    q, scale = quantize(big)
    del big
    dequantize(q, scale, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dequantize(q, scale, torch.bfloat16)
    assert torch.cuda.max_memory_allocated() - before < weight * 2.1, "the bf16 weight and nothing beside it"
    torch.testing.assert_close(mlp.cuda()(x.cuda()).cpu(), expected, rtol=2e-2, atol=2e-2)


def test_the_compiler_is_not_loaded_before_it_is_needed() -> None:
    code = "import sys, hyimg.memory.fp8; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

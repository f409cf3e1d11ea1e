"""Block weights in scaled fp8: e4m3 values with a float32 scale for every 64, and the error that this costs.

    q_OI, scale = quantize(weight_OI)               # the rule of tests/golden/fp8.safetensors
    put_scaled(dit, "single_blocks.3.linear1.weight", q_OI, scale)

Only storage is fp8. A product dequantises its weight, runs in its input's dtype and drops the dequantised weight;
autograd saves the fp8 weight, and backward dequantises again. A scale may be for a tensor, a row or a block of a
row, so that checkpoints from other tools fit too.

Shapes: O output features, I input features, G groups of values that share a scale, K values in a group
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyimg.errors import HyimgError
from hyimg.memory.compilation import use_private_cache
from hyimg.model import kernels
from hyimg.model.layers import ROWS_AT_A_TIME, Linear

BLOCK_SIZE = 64
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# So that a block of zeros has a scale
MIN_SCALE = 1e-8

# Values that are quantised at a time on a device
_CHUNK_DEVICE = 1 << 24
# Blocks that compiled code decodes together: all weights of HunyuanImage-2.1's blocks have a multiple of these
_BLOCKS_TOGETHER = 1024


def require_fp8_device(device: torch.device) -> None:
    """Raises HyimgError for a device without fp8 tensors."""
    if device.type == "mps":
        raise HyimgError("Apple's MPS has no fp8 tensors", hint="do not use fp8, or use `--device cpu`")


def is_quantised(name: str) -> bool:
    """Whether fp8 applies to the parameter of this original name: the weights of the blocks' Linears.

    The reference's rule: weights in double and single blocks without `norm` or `_emb` in their names.
    """
    in_block = name.startswith(("double_blocks.", "single_blocks."))
    return in_block and name.endswith(".weight") and "norm" not in name and "_emb" not in name


@torch.no_grad()
def quantize(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises a weight (O, I) of any float dtype: e4m3 (O, I) and float32 scales, (O, I/64, 1).

    Scales are (O, 1) if 64 does not divide I. scale = max|w| / 448 over a block, computed in the weight's dtype and
    at least 1e-8; q = w / scale in float32, rounded to the nearest e4m3 value. A NaN spreads over its block. Works
    through the rows in chunks, on the weight's device.
    """
    num_rows, num_columns = weight_OI.shape
    is_blockwise = num_columns % BLOCK_SIZE == 0
    group = BLOCK_SIZE if is_blockwise else num_columns
    weight_GK = weight_OI.reshape(-1, group)
    q_OI = torch.empty(weight_OI.shape, dtype=E4M3, device=weight_OI.device)
    scale_G1 = torch.empty((len(weight_GK), 1), dtype=torch.float32, device=weight_OI.device)
    step = max(1, (kernels.CHUNK_VALUES if weight_OI.device.type == "cpu" else _CHUNK_DEVICE) // group)
    for start in range(0, len(weight_GK), step):
        rows = slice(start, start + step)
        chunk_GK, scale = weight_GK[rows], scale_G1[rows]
        wide_GK = chunk_GK.float()
        largest_G1 = wide_GK.abs().amax(dim=1, keepdim=True).to(chunk_GK.dtype)
        scale.copy_((largest_G1 / E4M3_MAX).clamp_(min=MIN_SCALE))
        scale.clamp_(min=MIN_SCALE)  # float16 rounds it to 0
        q_OI.view(-1, group)[rows] = torch.div(wide_GK, scale).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return q_OI, scale_G1.view(num_rows, -1, 1) if is_blockwise else scale_G1


@torch.no_grad()
def dequantize(q_OI: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (O, I) in `dtype`: float32, bfloat16 or float16.

    `scale` is float32 with one value, (O, 1), or (O, I/K, 1) for blocks of a row. The product is rounded once; on a
    CPU the scales are rounded to `dtype` first, which changes nothing if they were made from weights of that dtype.
    Makes no float32 copy of the weight.
    """
    # A tensor's single scale is repeated for each row
    num_groups = scale.numel() if scale.numel() > 1 else len(q_OI)
    q_GK = q_OI.reshape(num_groups, -1)
    scale_G1 = scale.reshape(-1, 1).expand(num_groups, 1)
    if q_OI.device.type == "cpu":
        return kernels.dequantize_e4m3(q_GK, scale_G1, dtype).view(q_OI.shape)
    if q_OI.device.type == "cuda":
        return _fused(q_GK, scale_G1, dtype).view(q_OI.shape)
    return _dequantize_in_two_passes(q_GK, scale_G1, dtype).view(q_OI.shape)


def _dequantize_in_two_passes(q_GK: Tensor, scale_G1: Tensor, dtype: torch.dtype) -> Tensor:
    return q_GK.to(dtype).mul_(scale_G1)


def _decode(q_GK: Tensor, scale_G1: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantises q (uint8) by its bits; compiled to one pass over its bytes.

    Triton has no e4m3 before compute capability 8.9. Goes through float16, whose subnormals no hardware flushes.
    """
    wide = q_GK.to(torch.int16)
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).view(torch.float16)
    return (half.float() * (scale_G1 * 256.0)).to(dtype)


def _decode_blocks(q_NGK: Tensor, scale_NG1: Tensor, dtype: torch.dtype) -> Tensor:
    """`_decode` with constant G and K: loads and stores are vectors then, and no index is divided by a size."""
    return _decode(q_NGK, scale_NG1, dtype)


@functools.cache
def _compiled(decode: Callable[..., Tensor]) -> Any:
    # Lazily: this loads torch's compiler, which takes seconds
    use_private_cache()
    # One graph for all sizes; past the compiler's limit it must fail, not run step by step in float32
    return torch.compile(decode, dynamic=True, fullgraph=True)


@functools.cache
def _decodes_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the compiled code decodes every e4m3 number correctly.

    torch before 2.7.1 compiles `view` from int16 to float16 as a numeric conversion (pytorch issue 151156): every
    weight would be wrong without an error.
    """
    # Cloned, or torch would compile one more graph for views
    byte_GK = torch.arange(256, dtype=torch.uint8, device=device).view(2, -1).clone()
    right_GK = byte_GK.view(E4M3).to(dtype)
    decoded_GK = _compiled(_decode)(byte_GK, torch.ones(2, 1, device=device), dtype)
    is_number = ~right_GK.isnan()
    return torch.equal(decoded_GK[is_number], right_GK[is_number])


_can_compile = True


def _fused(q_GK: Tensor, scale_G1: Tensor, dtype: torch.dtype) -> Tensor:
    """One pass if torch can compile for the device (which needs Triton), else two."""
    global _can_compile
    if _can_compile:
        try:
            if not _decodes_right(q_GK.device, dtype):
                raise RuntimeError(f"torch {torch.__version__} miscompiles it; use 2.7.1 or later")
            decoded: Tensor
            byte_GK = q_GK.view(torch.uint8)
            if q_GK.shape[1] == BLOCK_SIZE and len(q_GK) % _BLOCKS_TOGETHER == 0:
                blocks = [
                    tensor.view(-1, _BLOCKS_TOGETHER, tensor.shape[1]) for tensor in (byte_GK, scale_G1)
                ]
                for tensor in blocks:
                    torch._dynamo.mark_static(tensor, [1, 2])
                decoded = _compiled(_decode_blocks)(*blocks, dtype)
            else:
                decoded = _compiled(_decode)(byte_GK, scale_G1, dtype)
            return decoded
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any failure to compile has a fallback
            _can_compile = False
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            warnings.warn(f"fp8 weights are dequantised in two passes instead of one: {reason}", stacklevel=2)
    return _dequantize_in_two_passes(q_GK, scale_G1, dtype)


def scaled_linear(input: Tensor, q_OI: Tensor, scale: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear` with a dequantised weight: (..., I) to (..., O) in the input's dtype.

    Differentiable in the input; saves the fp8 weight and its scales for backward.
    """
    product: Any = _product_op if torch.compiler.is_compiling() else _Product.apply
    output: Tensor = product(input, q_OI, scale, bias_O)
    return output


def _product(input: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(input, dequantize(q, scale, input.dtype), bias)


def _product_backward(gradient: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    return gradient @ dequantize(q, scale, gradient.dtype)


class _Product(torch.autograd.Function):
    """The product in eager mode."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, scale)
        return _product(input, q, scale, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _product_backward(gradient, *ctx.saved_tensors), None, None, None


# In compiled blocks the product is an opaque operator: if it were traced, the partitioner could save the dequantised
# weight for backward
_product_op = torch.library.custom_op(
    "hyimg::scaled_linear",
    _product,
    mutates_args=(),
    schema="(Tensor input, Tensor q, Tensor scale, Tensor? bias) -> Tensor",
)
_product_backward_op = torch.library.custom_op(
    "hyimg::scaled_linear_backward",
    _product_backward,
    mutates_args=(),
    schema="(Tensor gradient, Tensor q, Tensor scale) -> Tensor",
)


@_product_op.register_fake
def _(input: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty((*input.shape[:-1], q.shape[0]))


@_product_backward_op.register_fake
def _(gradient: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], q.shape[1]))


_product_op.register_autograd(
    lambda ctx, gradient: (_product_backward_op(gradient, *ctx.saved_tensors), None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1], inputs[2]),
)


class ScaledLinear(Linear):
    """A block's frozen Linear with an e4m3 `weight` (O, I) and a float32 `weight_scale`.

    Both are parameters without gradients, so that they move and stream like other weights. Bias and adapters work as
    in `Linear`.
    """

    weight_scale: nn.Parameter

    def __init__(self, linear: Linear, q_OI: Tensor, scale: Tensor) -> None:
        """Replaces `linear` and takes over its bias and adapters. `scale` as in `dequantize`."""
        assert q_OI.shape == linear.weight.shape
        assert (q_OI.dtype, scale.dtype) == (E4M3, torch.float32)
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features)
        self.bias = linear.bias
        self.adapters = linear.adapters
        self.weight = nn.Parameter(q_OI, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.train(linear.training)

    def base_forward(self, input: Tensor) -> Tensor:
        return scaled_linear(input, self.weight, self.weight_scale, self.bias)

    def matmul(self, input: Tensor) -> Tensor:
        return scaled_linear(input, self.weight, self.weight_scale)

    def row_norms(self) -> Tensor:
        values_OI = dequantize(self.weight.detach(), self.weight_scale.detach(), torch.bfloat16)
        chunks = torch.split(values_OI, ROWS_AT_A_TIME)
        return torch.cat([torch.linalg.vector_norm(rows.float(), dim=1) for rows in chunks])


def put_scaled(model: nn.Module, name: str, q_OI: Tensor, scale: Tensor | None) -> ScaledLinear:
    """Replaces a Linear by a `ScaledLinear` with an e4m3 weight (O, I), and returns it. `name` ends in `.weight`.

    `scale` as in `dequantize`; None means 1.
    """
    scale = torch.ones(1, device=q_OI.device) if scale is None else scale
    path = name.removesuffix(".weight")
    parent_path, _, leaf = path.rpartition(".")
    linear = model.get_submodule(path)
    assert isinstance(linear, Linear), name
    scaled = ScaledLinear(linear, q_OI, scale)
    setattr(model.get_submodule(parent_path), leaf, scaled)
    return scaled


_BLOCK = re.compile(r"^(double|single)_blocks\.\d+\.")
_CHUNK_VALUES = 1 << 20


def layer_kind(name: str) -> str:
    """The name of a block's weight within its block: `linear1` for `single_blocks.3.linear1.weight`."""
    return _BLOCK.sub("", name).removesuffix(".weight")


class QuantizationErrors:
    """Collects the error of each weight while a model is quantised, without synchronising with the device.

    The relative error is ||w - dequantised w|| / ||w|| in Frobenius norms.
    """

    def __init__(self) -> None:
        # By kind: sums of squares of the differences and of the weights, float64 (2,) on the device
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, name: str, weight_OI: Tensor, q_OI: Tensor, scale: Tensor) -> None:
        """Adds a weight by its original name; `q_OI` and `scale` as returned by `quantize`."""
        kind = layer_kind(name)
        sums = self._sums.setdefault(kind, weight_OI.new_zeros(2, dtype=torch.float64))
        step = max(1, _CHUNK_VALUES // weight_OI.shape[1])
        for start in range(0, len(weight_OI), step):
            rows = slice(start, start + step)
            wide_OI = weight_OI[rows].float()
            sums[1] += wide_OI.square().sum()
            sums[0] += dequantize(q_OI[rows], scale[rows], torch.float32).sub_(wide_OI).square_().sum()

    def by_kind(self) -> dict[str, float]:
        """The relative error (0..1) of each layer kind, in order of first appearance."""
        return {kind: _relative(sums) for kind, sums in self._sums.items()}

    def total(self) -> float:
        """The relative error (0..1) of all weights."""
        return _relative(torch.stack([sums.cpu() for sums in self._sums.values()]).sum(dim=0))

    def summary(self) -> str:
        """One line: `fp8: relative error 2.4% (linear2 2.6%, ...)`, the largest first."""
        kinds = sorted(self.by_kind().items(), key=lambda item: -item[1])
        listed = ", ".join(f"{kind} {error:.2%}" for kind, error in kinds)
        return f"fp8: relative error of the weights {self.total():.2%} ({listed})"


def _relative(sums: Tensor) -> float:
    error, norm = sums.sqrt().tolist()
    return error / norm if norm else 0.0

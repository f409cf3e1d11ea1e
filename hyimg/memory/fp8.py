"""Block weights in scaled fp8: one byte a value (e4m3) and a float32 scale for each 64 of them.

    q_OI, scale = quantize(weight_OI)               # the rule that tests/golden/fp8.safetensors holds
    put_scaled(dit, "single_blocks.3.linear1.weight", q_OI, scale)

Only storage is fp8: a product dequantises its weight first, runs in the dtype of its input and forgets the
dequantised weight again. Autograd keeps the fp8 weight, and backward dequantises once more. Scales may be one
a tensor, one a row or one a block of a row, so that checkpoints which other tools quantised fit too.

Shapes: O output features, I input features, G groups of values with one scale, K values in a group
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyimg.errors import HyimgError
from hyimg.model.layers import ROWS_AT_A_TIME, Linear

BLOCK_SIZE = 64
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# A block of zeros has a scale too
MIN_SCALE = 1e-8

# Values worked on at a time: what fits a core's cache, and on a device what is no burden
_CHUNK_CPU = 1 << 18
_CHUNK_DEVICE = 1 << 24


def require_fp8_device(device: torch.device) -> None:
    """Raises HyimgError for a device whose tensors cannot be fp8."""
    if device.type == "mps":
        raise HyimgError("Apple's MPS has no fp8 tensors", hint="leave fp8 out, or use `--device cpu`")


def is_quantised(name: str) -> bool:
    """Whether fp8 is for the parameter of this original name: the weights of the blocks' Linears, all of them.

    The reference's rule: weights in double and single blocks without `norm` or `_emb` in their names.
    """
    in_block = name.startswith(("double_blocks.", "single_blocks."))
    return in_block and name.endswith(".weight") and "norm" not in name and "_emb" not in name


@torch.no_grad()
def quantize(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """An e4m3 weight (O, I) and its float32 scales: (O, I/64, 1), or (O, 1) where 64 does not divide I.

    scale = max|w| / 448 over a block, made in the weight's own dtype and never under 1e-8;
    q = w / scale in float32, rounded to the nearest e4m3 value. What is no number makes its block so. Works on
    some rows at a time, wherever the weight is.
    """
    num_rows, num_columns = weight_OI.shape
    is_blockwise = num_columns % BLOCK_SIZE == 0
    group = BLOCK_SIZE if is_blockwise else num_columns
    weight_GK = weight_OI.reshape(-1, group)
    q_OI = torch.empty(weight_OI.shape, dtype=E4M3, device=weight_OI.device)
    scale_G1 = torch.empty((len(weight_GK), 1), dtype=torch.float32, device=weight_OI.device)
    step = _groups_at_a_time(weight_OI.device, group)
    for start in range(0, len(weight_GK), step):
        rows = slice(start, start + step)
        chunk_GK, scale = weight_GK[rows], scale_G1[rows]
        wide_GK = chunk_GK.float()
        largest_G1 = wide_GK.abs().amax(dim=1, keepdim=True).to(chunk_GK.dtype)
        scale.copy_((largest_G1 / E4M3_MAX).clamp_(min=MIN_SCALE))
        scale.clamp_(min=MIN_SCALE)  # which float16 rounds to 0
        q_OI.view(-1, group)[rows] = torch.div(wide_GK, scale).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return q_OI, scale_G1.view(num_rows, -1, 1) if is_blockwise else scale_G1


@torch.no_grad()
def dequantize(q_OI: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (O, I) in float32, bfloat16 or float16.

    `scale` has one value, one for each row (O, 1), or one for each block of a row (O, I/K, 1). The product is
    rounded once; on a CPU the scales are rounded to `dtype` first, which changes nothing where they were made
    from weights of that dtype. No float32 copy of the weight is made on the way.
    """
    # A scale for a tensor becomes the same one for each row
    num_groups = scale.numel() if scale.numel() > 1 else len(q_OI)
    q_GK = q_OI.reshape(num_groups, -1)
    scale_G1 = scale.reshape(-1, 1).expand(num_groups, 1)
    if q_OI.device.type == "cpu":
        return _dequantize_in_cache(q_GK, scale_G1, dtype).view(q_OI.shape)
    if q_OI.device.type == "cuda":
        return _fused(q_GK, scale_G1, dtype).view(q_OI.shape)
    return _dequantize_in_two_passes(q_GK, scale_G1, dtype).view(q_OI.shape)


class _Bits(NamedTuple):
    """Where e4m3's bits stand in a wider float: shifted by `shift`, and only those of `mask` kept.

    The wider float reads them, e4m3's subnormals too, as 2^-exponent times the value.
    """

    integer: torch.dtype
    shift: int
    mask: int
    exponent: int


_BITS = {
    torch.bfloat16: _Bits(torch.int16, 4, 0x87F0 - (1 << 16), 120),
    torch.float16: _Bits(torch.int16, 7, 0xBF80 - (1 << 16), 8),
    torch.float32: _Bits(torch.int32, 20, 0x87F00000 - (1 << 32), 120),
}


def _dequantize_in_cache(q_GK: Tensor, scale_G1: Tensor, dtype: torch.dtype) -> Tensor:
    """Shifts bits into place, a chunk at a time that stays in the cache.

    torch's own conversion from e4m3 is not vectorised on a CPU, and ten times slower. (e4m3 has no infinities,
    and its one NaN, which no quantiser makes, reads as 480 here.)
    """
    bits = _BITS[dtype]
    q_GK = q_GK.view(torch.int8)
    wide_GK = torch.empty(q_GK.shape, dtype=bits.integer)
    factor_G1 = (scale_G1.float() * 2.0**bits.exponent).to(dtype)
    step = _groups_at_a_time(q_GK.device, q_GK.shape[1])
    for start in range(0, len(q_GK), step):
        chunk = wide_GK[start : start + step]
        chunk.copy_(q_GK[start : start + step])  # the sign is spread over the upper bits
        chunk.bitwise_left_shift_(bits.shift).bitwise_and_(bits.mask)
        chunk.view(dtype).mul_(factor_G1[start : start + step])
    return wide_GK.view(dtype)


def _dequantize_in_two_passes(q_GK: Tensor, scale_G1: Tensor, dtype: torch.dtype) -> Tensor:
    return q_GK.to(dtype).mul_(scale_G1)


def _decode(q_GK: Tensor, scale_G1: Tensor, dtype: torch.dtype) -> Tensor:
    """The expression that is compiled to one pass over the bytes of q (uint8).

    By bits, since Triton has no e4m3 before compute capability 8.9; through float16, whose subnormals no
    hardware flushes.
    """
    wide = q_GK.to(torch.int16)
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).view(torch.float16)
    return (half.float() * (scale_G1 * 256.0)).to(dtype)


@functools.cache
def _compiled_decode() -> Any:
    # When it is needed: this loads torch's compiler, which takes seconds
    # One graph for all sizes; beyond the compiler's limit it must fail and not run step by step in float32
    return torch.compile(_decode, dynamic=True, fullgraph=True)


@functools.cache
def _decodes_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether what was compiled for the device gives every e4m3 number its value.

    torch before 2.7.1 compiles `view` from int16 to float16 to a conversion of the number (pytorch issue 151156): every
    weight would be wrong, and nothing would fail.
    """
    # a tensor of its own, or torch would compile one more graph for views
    byte_GK = torch.arange(256, dtype=torch.uint8, device=device).view(2, -1).clone()
    right_GK = byte_GK.view(E4M3).to(dtype)
    decoded_GK = _compiled_decode()(byte_GK, torch.ones(2, 1, device=device), dtype)
    is_number = ~right_GK.isnan()
    return torch.equal(decoded_GK[is_number], right_GK[is_number])


_can_compile = True


def _fused(q_GK: Tensor, scale_G1: Tensor, dtype: torch.dtype) -> Tensor:
    """One pass where torch can compile for the device (it needs Triton there), else two."""
    global _can_compile
    if _can_compile:
        try:
            if not _decodes_right(q_GK.device, dtype):
                raise RuntimeError(f"torch {torch.__version__} compiles it wrongly; 2.7.1 and later do not")
            decoded: Tensor = _compiled_decode()(q_GK.view(torch.uint8), scale_G1, dtype)
            return decoded
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever keeps it from compiling here, it can be done without
            _can_compile = False
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            warnings.warn(f"fp8 weights are dequantised in two passes instead of one: {reason}", stacklevel=2)
    return _dequantize_in_two_passes(q_GK, scale_G1, dtype)


def _groups_at_a_time(device: torch.device, group: int) -> int:
    return max(1, (_CHUNK_CPU if device.type == "cpu" else _CHUNK_DEVICE) // group)


def scaled_linear(input: Tensor, q_OI: Tensor, scale: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear` by a dequantised weight, differentiable in the input; saves the fp8 weight and its scales."""
    product: Any = _product_op if torch.compiler.is_compiling() else _Product.apply
    output: Tensor = product(input, q_OI, scale, bias_O)
    return output


def _product(input: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(input, dequantize(q, scale, input.dtype), bias)


def _product_backward(gradient: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    return gradient @ dequantize(q, scale, gradient.dtype)


class _Product(torch.autograd.Function):
    """The product outside of compiled blocks."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, scale)
        return _product(input, q, scale, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _product_backward(gradient, *ctx.saved_tensors), None, None, None


# In compiled blocks the product is an operator that is taken as it is: traced through, the partitioner would be
# free to keep the dequantised weight for backward
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
    """A frozen Linear of a block whose `weight` is e4m3 (O, I), beside a float32 `weight_scale`.

    Both are parameters without gradients, so that they move and stream as other weights do; the bias stays as
    it was. Adapters act on it as on any Linear.
    """

    weight_scale: nn.Parameter

    def __init__(self, linear: Linear, q_OI: Tensor, scale: Tensor) -> None:
        """In place of `linear`, whose bias and adapters it takes over. `scale` as `dequantize` takes it."""
        assert q_OI.shape == linear.weight.shape
        assert (q_OI.dtype, scale.dtype) == (E4M3, torch.float32)
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features)
        self.bias = linear.bias
        self.adapters = linear.adapters
        self.weight = nn.Parameter(q_OI, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.train(linear.training)

    def product(self, input: Tensor) -> Tensor:
        return scaled_linear(input, self.weight, self.weight_scale, self.bias)

    def multiply(self, input: Tensor) -> Tensor:
        return scaled_linear(input, self.weight, self.weight_scale)

    def row_norms(self) -> Tensor:
        values_OI = dequantize(self.weight.detach(), self.weight_scale.detach(), torch.bfloat16)
        chunks = torch.split(values_OI, ROWS_AT_A_TIME)
        return torch.cat([torch.linalg.vector_norm(rows.float(), dim=1) for rows in chunks])


def put_scaled(model: nn.Module, name: str, q_OI: Tensor, scale: Tensor | None) -> ScaledLinear:
    """Stores an fp8 weight under its original name (`....weight`); its Linear becomes a `ScaledLinear`.

    `scale` has one value, (O, 1) or (O, I/K, 1); None where the values are the weights. Returns the new module.
    """
    scale = torch.ones(1, device=q_OI.device) if scale is None else scale
    path = name.removesuffix(".weight")
    parent_path, _, leaf = path.rpartition(".")
    linear = model.get_submodule(path)
    assert isinstance(linear, Linear), name
    scaled = ScaledLinear(linear, q_OI, scale)
    setattr(model.get_submodule(parent_path), leaf, scaled)
    return scaled

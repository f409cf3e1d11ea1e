"""Attention backends: torch's own, and other packages' through doubles with their signatures and layouts."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hyimg.checkpoints.architecture import DIT_TINY
from hyimg.errors import HyimgError
from hyimg.model import attention
from hyimg.model.attention import AttentionBackend, bind_lengths, resolve_attention
from hyimg.model.dit import DiT, collate
from hyimg.model.loading import init_random

CUDA = torch.device("cuda")
Calls = list[tuple[Any, ...]]


def sdpa(q_BTNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTNK, k_BTNK, v_BTNK))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def flash_attn_double(calls: Calls, version: str = "2.8.3") -> dict[str, ModuleType]:
    """flash_attn of that version: (B, T, N, K) and packed (total, N, K), half precision only on a GPU."""
    module = ModuleType("flash_attn")
    module.__version__ = version

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                        softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
        assert q.stride(-1) == 1
        calls.append(("flash_attn_func", tuple(q.shape)))
        return sdpa(q, k, v)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                               softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                               alibi_slopes=None, deterministic=False, return_attn_probs=False,
                               block_table=None):  # fmt: skip
        assert cu_seqlens_q.dtype == torch.int32
        assert cu_seqlens_k.dtype == torch.int32
        assert cu_seqlens_q.device == q.device
        calls.append(("flash_attn_varlen_func", tuple(q.shape), cu_seqlens_q.tolist(), max_seqlen_q))
        bounds = cu_seqlens_q.tolist()
        assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in itertools.pairwise(bounds))
        rows = [sdpa(q[None, a:b], k[None, a:b], v[None, a:b])[0] for a, b in itertools.pairwise(bounds)]
        return torch.cat(rows)

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return {"flash_attn": module}


def xformers_double(calls: Calls, version: str = "0.0.33.post2") -> dict[str, ModuleType]:
    module, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    module.__version__ = version

    class BlockDiagonalMask:
        @classmethod
        def from_seqlens(cls, q_seqlen: Sequence[int], kv_seqlen: Any = None, *, device: Any = None) -> Any:
            mask = cls()
            mask.lengths = list(q_seqlen)
            calls.append(("mask", mask.lengths, str(device)))
            return mask

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None,
                                   output_dtype=None):  # fmt: skip
        calls.append(("memory_efficient_attention", tuple(query.shape), attn_bias is not None))
        if attn_bias is None:
            return sdpa(query, key, value)
        assert len(query) == 1
        parts = (x.split(attn_bias.lengths, dim=1) for x in (query, key, value))
        return torch.cat([sdpa(*qkv) for qkv in zip(*parts, strict=True)], dim=1)

    ops.memory_efficient_attention = memory_efficient_attention
    ops.fmha = SimpleNamespace(attn_bias=SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask))
    module.ops = ops
    return {"xformers": module, "xformers.ops": ops}


def sageattention_double(calls: Calls, version: str = "2.2.0") -> dict[str, ModuleType]:
    module = ModuleType("sageattention")
    module.__version__ = version

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
        assert tensor_layout == "NHD"
        assert not kwargs
        calls.append(("sageattn", tuple(q.shape)))
        return sdpa(q, k, v)

    module.sageattn = sageattn
    return {"sageattention": module}


DOUBLES = {"flash": flash_attn_double, "xformers": xformers_double, "sageattn": sageattention_double}


@pytest.fixture
def calls() -> Calls:
    return []


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> Callable[..., None]:
    """Puts the double of a mode's package where an import finds it, on a machine with a recent GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def put(mode: str, **options: Any) -> None:
        for name, module in DOUBLES[mode](calls, **options).items():
            monkeypatch.setitem(sys.modules, name, module)

    return put


def on_gpu(mode: str, **options: Any) -> AttentionBackend:
    return resolve_attention(mode, **{"device": CUDA, "dtype": torch.bfloat16, **options})


def qkv(num_samples: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """As a block makes them: views of one packed tensor."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(num_samples, num_tokens, 3, 2, 8, generator=generator)
    q, k, v = packed.unbind(2)
    return q, k, v


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("mode", ["torch", "flash", "xformers", "sageattn"])
def test_every_backend_computes_the_attention_of_each_sample_alone(
    install: Any, mode: str, split: bool
) -> None:
    if mode != "torch":
        install(mode)
    backend = on_gpu(mode, split=split)
    q, k, v = qkv(3, 7)
    for lengths in (None, [7, 3, 5]):
        out = backend(q, k, v, lengths)
        assert out.shape == q.shape
        for sample, length in enumerate(lengths or [7, 7, 7]):
            row = slice(sample, sample + 1)
            alone = sdpa(q[row, :length], k[row, :length], v[row, :length])
            # The same kernel on a batch of other size
            torch.testing.assert_close(out[row, :length], alone, rtol=0, atol=1e-6)
            assert torch.isfinite(out[row, length:]).all()


def test_padding_gets_no_gradient_and_samples_get_their_own(install: Any) -> None:
    install("flash")
    gradients = []
    for backend in (resolve_attention("torch"), on_gpu("flash")):
        q, k, v = (x.clone().requires_grad_() for x in qkv(2, 6))
        backend(q, k, v, [4, 6]).square().sum().backward()
        assert not any(x.grad[0, 4:].any() for x in (q, k, v))
        gradients.append((q.grad, k.grad, v.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_equal_lengths_go_to_the_library_in_one_call_and_unequal_ones_packed(
    install: Any, calls: Calls
) -> None:
    install("flash")
    flash = on_gpu("flash")
    flash(*qkv(2, 6), None)
    flash(*qkv(1, 6), None)
    flash(*qkv(2, 6), [6, 4])
    assert calls == [
        ("flash_attn_func", (2, 6, 2, 8)),
        ("flash_attn_func", (1, 6, 2, 8)),
        ("flash_attn_varlen_func", (10, 2, 8), [0, 6, 10], 6),
    ]


def test_xformers_takes_unequal_lengths_as_blocks_of_one_sequence(install: Any, calls: Calls) -> None:
    install("xformers")
    xformers = on_gpu("xformers", dtype=torch.float32)
    xformers(*qkv(2, 6), None)
    xformers(*qkv(2, 6), [6, 4])
    xformers(*qkv(2, 6), [6, 4])
    assert calls == [
        ("memory_efficient_attention", (2, 6, 2, 8), False),
        ("mask", [6, 4], "cpu"),
        ("memory_efficient_attention", (1, 10, 2, 8), True),
        ("memory_efficient_attention", (1, 10, 2, 8), True),
    ], "and a mask is made once for all blocks"


def test_sageattention_and_split_take_samples_one_by_one(install: Any, calls: Calls) -> None:
    install("sageattn")
    install("flash")
    on_gpu("sageattn")(*qkv(2, 6), [6, 4])
    assert calls == [("sageattn", (1, 6, 2, 8)), ("sageattn", (1, 4, 2, 8))]
    calls.clear()
    on_gpu("sageattn")(*qkv(2, 6), None)
    assert calls == [("sageattn", (2, 6, 2, 8))]
    calls.clear()
    on_gpu("flash", split=True)(*qkv(2, 6), None)
    on_gpu("flash", split=True)(*qkv(2, 6), [6, 4])
    assert [shape for _, shape in calls] == [(1, 6, 2, 8)] * 3 + [(1, 4, 2, 8)]


def test_a_whole_model_runs_on_each_backend(install: Any) -> None:
    model = DiT(DIT_TINY)
    init_random(model, seed=0)
    text = collate([(torch.ones(4, 64), None), (torch.ones(3, 64), torch.ones(2, 48))])
    inputs = (torch.ones(2, 16, 4, 6), torch.tensor([500.0, 100.0]), text)
    with torch.no_grad():
        expected = model(*inputs)
        for mode in DOUBLES:
            install(mode)
            model.attention = on_gpu(mode)
            torch.testing.assert_close(model(*inputs), expected, rtol=0, atol=1e-5)


def test_backend_names_for_the_log(install: Any) -> None:
    for mode in DOUBLES:
        install(mode)
    assert resolve_attention("sdpa").name == "torch"
    assert resolve_attention("torch", split=True).name == "torch, one image at a time"
    assert on_gpu("flash").name == "flash-attn 2.8.3"
    assert on_gpu("xformers", split=True).name == "xformers 0.0.33.post2, one image at a time"
    assert on_gpu("sageattn").name == "sageattention 2.2.0"


def test_flash_attention_follows_torchs_deterministic_mode(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("flash")
    asked = []
    monkeypatch.setattr(
        sys.modules["flash_attn"],
        "flash_attn_func",
        lambda q, k, v, deterministic: asked.append(deterministic) or q,
    )
    flash = on_gpu("flash")
    flash(*qkv(1, 4), None)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    flash(*qkv(1, 4), None)
    assert asked == [False, True]


@pytest.mark.parametrize(
    ("mode", "options", "message", "hint"),
    [
        ("torsh", {}, "unknown attention mode `torsh`", "did you mean `torch`?"),
        ("flash", {"device": torch.device("cpu")}, "needs a CUDA device, and this run is on `cpu`", "torch"),
        (
            "flash",
            {"dtype": torch.float32},
            "bf16 or fp16, and this run is in float32",
            "mixed_precision bf16",
        ),
        ("sageattn", {"dtype": torch.float32}, "bf16 or fp16, and this run is in float32", "mixed_precision"),
        ("sageattn", {"training": True}, "`--attn_mode sageattn` cannot train", "`flash`"),
        ("flash", {}, "the package `flash_attn`, which is not installed", "flash-attn --no-build-isolation"),
        ("xformers", {}, "the package `xformers`, which is not installed", "run `pip install xformers`"),
        ("sageattn", {}, "the package `sageattention`, which is not installed", "pip install sageattention"),
    ],
)
def test_unusable_modes_are_refused_with_a_hint(
    monkeypatch: pytest.MonkeyPatch, mode: str, options: dict[str, Any], message: str, hint: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for package in attention.PACKAGES.values():
        monkeypatch.setitem(sys.modules, package.module, None)  # as if it were not installed
    with pytest.raises(HyimgError, match=message) as error:
        on_gpu(mode, **options)
    assert error.value.exit_code == 2
    assert hint in error.value.hint
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    ("mode", "version", "needed"), [("flash", "2.6.3", "2.7.0"), ("xformers", "0.0.26", "0.0.27"),
                                    ("sageattn", "1.0.3", "1.0.6")],
)  # fmt: skip
def test_an_old_version_is_refused_with_the_one_needed(
    install: Any, mode: str, version: str, needed: str
) -> None:
    install(mode, version=version)
    with pytest.raises(HyimgError, match=f" {needed} or later, and {version} is installed") as error:
        on_gpu(mode)
    assert "--upgrade" in error.value.hint


def test_versions_are_compared_as_numbers(install: Any) -> None:
    install("flash", version="2.10.0+cu128")
    assert on_gpu("flash").name == "flash-attn 2.10.0+cu128"


def test_a_package_built_for_another_torch_says_why(
    install: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install("flash")
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.syspath_prepend(tmp_path)
    symbol = "undefined symbol: _ZN3c104cuda9SetDeviceEi"
    (tmp_path / "flash_attn.py").write_text(f"raise ImportError({symbol!r} + chr(10) + 'and more')")
    with pytest.raises(HyimgError, match=f"`flash_attn` cannot be imported: {symbol}\nhint") as error:
        on_gpu("flash")
    assert torch.__version__ in error.value.hint


def test_a_version_without_the_function_is_refused_too(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install("flash")
    monkeypatch.delattr(sys.modules["flash_attn"], "flash_attn_varlen_func")
    with pytest.raises(HyimgError, match="2.8.3 lacks `flash_attn_varlen_func`"):
        on_gpu("flash")


def test_an_old_gpu_is_refused(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install("flash")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(HyimgError, match="8.0 .Ampere. or later, and this one has 7.5"):
        on_gpu("flash")


def test_bound_attention_merges_heads_and_passes_lengths_only_with_padding() -> None:
    heard = []

    def backend(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None) -> Tensor:
        heard.append(lengths)
        return v

    out = bind_lengths(backend, [6, 6], 6)(*qkv(2, 6))
    bind_lengths(backend, [6, 5], 6)(*qkv(2, 6))
    assert out.shape == (2, 6, 16)
    assert heard == [None, [6, 5]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["torch", "flash", "xformers", "sageattn"])
def test_on_a_gpu_each_installed_backend_agrees_with_torch(mode: str) -> None:
    if mode != "torch":
        pytest.importorskip(attention.PACKAGES[mode].module)
    backend = resolve_attention(mode, device=torch.device("cuda", 0), dtype=torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(2, 300, 4, 128, device="cuda", generator=generator).bfloat16() for _ in range(3))
    for lengths in (None, [300, 211]):
        out = backend(q, k, v, lengths)
        expected = resolve_attention("torch")(q.float(), k.float(), v.float(), lengths)
        # bf16 has 8 bits; sageattn rounds q and k to 8 bits in all
        tolerance = 0.05 if mode == "sageattn" else 0.01
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=tolerance)

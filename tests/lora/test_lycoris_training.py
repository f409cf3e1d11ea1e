"""LoHa and LoKr as trainable adapters: their start, gradients and norms, and the factors of a LoKr."""

from __future__ import annotations

import pytest
import torch

from hyimg.errors import HyimgError
from hyimg.lora.lycoris import LoHa, LoKr
from hyimg.randomness import keyed_generator

OUT, IN, RANK = 24, 20, 2
KINDS = {"loha": {}, "lokr": {}, "lokr of a large rank": {"rank": 8}, "full lokr": {"full_matrix": True}}


def filled(adapter, *key):
    """The adapter with random values in every parameter."""
    for name, parameter in adapter.named_parameters():
        parameter.data.normal_(generator=keyed_generator(*key, name))
    return adapter


@pytest.fixture(params=KINDS)
def adapter(request):
    options = {"rank": RANK, "alpha": 1.0, **KINDS[request.param]}
    return (LoHa if request.param == "loha" else LoKr)(IN, OUT, **options)


def test_a_fresh_adapter_does_nothing_and_can_learn(adapter):
    adapter.initialize(1, "a module")
    assert not bool(adapter.delta().any())
    x, target = torch.ones(3, IN), torch.ones(3, OUT)
    (adapter(x, torch.zeros(3, OUT)) - target).square().sum().backward()
    assert any(bool(parameter.grad.any()) for parameter in adapter.parameters())


def test_the_start_depends_on_the_key(adapter):
    def start(*key):
        adapter.initialize(*key)
        return torch.cat([parameter.detach().flatten().clone() for parameter in adapter.parameters()])

    assert torch.equal(start(1, "a"), start(1, "a"))
    assert not torch.equal(start(1, "a"), start(2, "a"))


def test_the_output_and_its_gradients_are_those_of_the_delta(adapter):
    filled(adapter, "x")
    adapter.multiplier = 0.5
    x = torch.randn(5, IN, generator=keyed_generator("input"))
    expected = 1.0 + 0.5 * x @ adapter.delta().T
    actual = adapter(x, torch.ones(5, OUT))
    torch.testing.assert_close(actual, expected)
    own, of_delta = (
        torch.autograd.grad(output.square().sum(), list(adapter.parameters()))
        for output in (actual, expected)
    )
    for one, other in zip(own, of_delta, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(adapter(x, torch.ones(5, OUT)), expected)


def test_the_norm_is_the_deltas_and_shrinking_scales_it(adapter):
    filled(adapter, "x")
    before = adapter.delta().detach()
    torch.testing.assert_close(adapter.update_norm(), torch.linalg.matrix_norm(before))
    adapter.shrink(0.3)
    torch.testing.assert_close(adapter.delta(), 0.3 * before)


def test_a_files_tensors_make_the_same_adapter(adapter):
    tensors = filled(adapter, "x").tensors()
    again = type(adapter).from_tensors(tensors)
    assert torch.equal(again.delta(), adapter.delta())
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_lokr_is_the_kronecker_product_element_by_element():
    lokr = filled(LoKr(IN, OUT, rank=RANK, alpha=1.0), "x")
    held = lokr.tensors()
    (a, b), c, d = held["lokr_w1"].shape, held["lokr_w2_a"].shape[0], held["lokr_w2_b"].shape[1]
    assert (a, b, c, d) == (4, 4, 6, 5)
    w2 = held["lokr_w2_a"] @ held["lokr_w2_b"]
    delta = lokr.delta()
    for row, column in ((0, 0), (7, 3), (23, 19)):
        expected = held["lokr_w1"][row // c, column // d] * w2[row % c, column % d] / RANK
        assert delta[row, column].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("options", [{"rank": 64}, {"rank": 2, "full_matrix": True}])
def test_a_factor_limits_the_small_matrix_and_a_full_second_one_is_not_scaled(options):
    lokr = LoKr(IN, OUT, alpha=1.0, factor=2, **options)
    assert lokr.lokr_w1.shape == (2, 2)
    assert lokr.tensors()["lokr_w2"].shape == (12, 10)
    assert lokr.scale == 1
    with pytest.raises(HyimgError, match="`factor`"):
        LoKr(IN, OUT, rank=2, alpha=1.0, factor=0)

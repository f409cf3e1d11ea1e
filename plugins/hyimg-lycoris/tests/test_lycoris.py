"""The adapters of both kinds by themselves: their formulas, their starts, and what a network asks of them."""

from __future__ import annotations

import pytest
import torch

from hyimg.errors import HyimgError
from hyimg.randomness import keyed_generator

OUT, IN, RANK = 24, 20, 2


def filled(adapter, *key):
    """The adapter with draws in every parameter."""
    for name, parameter in adapter.named_parameters():
        parameter.data.normal_(generator=keyed_generator(*key, name))
    return adapter


@pytest.fixture(params=["loha", "lokr", "lokr of a whole matrix"])
def adapter(request):
    from hyimg_lycoris.loha import LoHa
    from hyimg_lycoris.lokr import LoKr

    kind = LoHa if request.param == "loha" else LoKr
    rank = 8 if "whole" in request.param else RANK
    return kind(IN, OUT, rank=rank, alpha=1.0)


def test_a_fresh_adapter_does_nothing_and_can_learn(adapter):
    adapter.initialize(1, "a module")
    assert not bool(adapter.delta().any())
    adapter(torch.ones(3, IN), torch.zeros(3, OUT)).square().sum().backward()
    x, target = torch.ones(3, IN), torch.ones(3, OUT)
    (adapter(x, torch.zeros(3, OUT)) - target).square().sum().backward()
    assert any(bool(parameter.grad.any()) for parameter in adapter.parameters())


def test_the_start_follows_from_the_key(adapter):
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
    names = [name for name, _ in adapter.named_parameters()]
    own, of_delta = (
        torch.autograd.grad(output.square().sum(), list(adapter.parameters()))
        for output in (actual, expected)
    )
    for name, one, other in zip(names, own, of_delta, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=name)
    adapter.multiplier = 0
    assert torch.equal(adapter(x, torch.ones(5, OUT)), torch.ones(5, OUT))


def test_the_norm_is_the_deltas_and_shrinking_scales_it(adapter):
    filled(adapter, "x")
    before = adapter.delta().detach()
    torch.testing.assert_close(adapter.update_norm(), torch.linalg.matrix_norm(before))
    adapter.shrink(0.3)
    torch.testing.assert_close(adapter.delta(), 0.3 * before)


def test_tensors_come_back_as_they_were(adapter):
    held = {name: tensor.clone() for name, tensor in filled(adapter, "x").tensors().items()}
    delta = adapter.delta().detach()
    filled(adapter, "y")
    adapter.load_tensors(held)
    assert torch.equal(adapter.delta(), delta)


def test_loha_is_the_product_of_two_low_rank_matrices():
    from hyimg_lycoris.loha import LoHa

    loha = filled(LoHa(IN, OUT, rank=RANK, alpha=1.0), "x")
    held = loha.tensors()
    assert {name: list(tensor.shape) for name, tensor in held.items()} == {
        "hada_w1_a": [OUT, RANK],
        "hada_w1_b": [RANK, IN],
        "hada_w2_a": [OUT, RANK],
        "hada_w2_b": [RANK, IN],
        "alpha": [],
    }
    expected = (held["hada_w1_a"] @ held["hada_w1_b"]) * (held["hada_w2_a"] @ held["hada_w2_b"]) / RANK
    torch.testing.assert_close(loha.delta(), expected)


def test_lokr_is_the_kronecker_product_element_by_element():
    from hyimg_lycoris.lokr import LoKr

    lokr = filled(LoKr(IN, OUT, rank=RANK, alpha=1.0), "x")
    held = lokr.tensors()
    (a, b), c, d = held["lokr_w1"].shape, held["lokr_w2_a"].shape[0], held["lokr_w2_b"].shape[1]
    assert (a, b, c, d) == (4, 4, 6, 5)
    w2 = held["lokr_w2_a"] @ held["lokr_w2_b"]
    delta = lokr.delta()
    for row, column in ((0, 0), (7, 3), (23, 19)):
        expected = held["lokr_w1"][row // c, column // d] * w2[row % c, column % d] / RANK
        assert delta[row, column].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_factor_bounds_the_small_matrix_and_a_whole_second_has_no_scale():
    from hyimg_lycoris.lokr import LoKr

    lokr = LoKr(IN, OUT, rank=64, alpha=1.0, factor=2)
    assert lokr.lokr_w1.shape == (2, 2)
    assert lokr.tensors()["lokr_w2"].shape == (12, 10)
    assert lokr.scale == 1
    with pytest.raises(HyimgError, match="`factor`"):
        LoKr(IN, OUT, rank=2, alpha=1.0, factor=0)

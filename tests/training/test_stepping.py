"""A step's order: scale, norm, clip, move, schedule; and the same done parameter by parameter."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn.functional import linear

from hyimg.training.optimization import trial_optimizer
from hyimg.training.stepping import FusedBackward, LossScaler, Stepper


def sgd(*values, lr=1.0, dtype=torch.float32):
    """SGD on one parameter of these values."""
    return torch.optim.SGD([torch.nn.Parameter(torch.tensor(values, dtype=dtype))], lr=lr)


def weights(stepper):
    return stepper.parameters[0].tolist()


def gradient(stepper, *values):
    """Gives the stepper this gradient by way of its backward pass."""
    (parameter,) = stepper.parameters
    stepper.backward((parameter.float() * torch.tensor(values)).sum())


def test_the_norm_is_told_unclipped_and_the_step_is_clipped():
    stepper = Stepper(sgd(0.0, 0.0), max_grad_norm=1.0)
    gradient(stepper, 3.0, 4.0)
    assert stepper.gradient_norm() == 5.0
    stepper.step()
    assert weights(stepper) == pytest.approx([-0.6, -0.8], rel=1e-6)  # torch divides by the norm plus 1e-6


@pytest.mark.parametrize("scale", [1.0, 1024.0, 2.0**-3])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_a_scale_changes_neither_norm_nor_step(scale, max_norm):
    plain, scaled = (
        Stepper(sgd(0.0, 0.0), max_grad_norm=max_norm, scaler=scaler) for scaler in (None, LossScaler(scale))
    )
    for stepper in (plain, scaled):
        gradient(stepper, 0.3, 1.7)
        gradient(stepper, -0.1, 0.9)
    assert scaled.parameters[0].grad.tolist() == [g * scale for g in plain.parameters[0].grad.tolist()]
    assert plain.gradient_norm() == scaled.gradient_norm()
    plain.step()
    scaled.step()
    assert weights(plain) == weights(scaled)
    assert scaled.metrics == plain.metrics | {"loss_scale": scale}


def test_a_float16_gradient_beyond_its_range_has_a_finite_norm():
    stepper = Stepper(sgd(0.0, 0.0, dtype=torch.float16), max_grad_norm=1.0)
    gradient(stepper, 60000.0, 60000.0)
    assert stepper.gradient_norm() == pytest.approx(60000 * math.sqrt(2))
    stepper.step()
    assert weights(stepper) == pytest.approx([-math.sqrt(0.5)] * 2, rel=1e-3)


def test_a_step_left_out_moves_nothing_and_the_next_starts_from_no_gradient():
    optimizer = sgd(0.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    stepper = Stepper(optimizer, scheduler=schedule, scaler=LossScaler(4.0))
    gradient(stepper, math.inf)
    assert stepper.overflowed(stepper.gradient_norm())
    stepper.skip()
    assert weights(stepper) == [0.0]
    assert stepper.metrics == {"learning_rate": 1.0, "loss_scale": 4.0}
    gradient(stepper, 1.0)
    assert stepper.gradient_norm() == 1.0
    stepper.step()
    assert weights(stepper) == [-1.0], "the schedule did not go on for a step that was left out"
    assert stepper.metrics == {"learning_rate": 1.0, "loss_scale": 2.0}
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_the_rate_that_is_told_is_the_one_that_the_step_was_taken_with():
    optimizer = sgd(0.0)
    stepper = Stepper(optimizer, scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))
    told = []
    for _ in range(3):
        gradient(stepper, 1.0)
        stepper.gradient_norm()
        stepper.step()
        told.append(stepper.metrics["learning_rate"])
    assert told == [1.0, 0.5, 0.25]
    assert weights(stepper) == [-1.75]


def test_an_overflow_is_only_what_a_smaller_scale_may_mend():
    assert not Stepper(sgd(0.0)).overflowed(math.inf)
    assert not LossScaler(2.0).overflowed(1.0)
    assert LossScaler(2.0).overflowed(math.nan)
    assert not LossScaler(1.0).overflowed(math.inf)


def test_a_scale_falls_at_once_and_rises_after_2000_finite_steps_as_torchs():
    scaler, theirs = LossScaler(), torch.amp.GradScaler("cpu")
    finite = [False, False, *[True] * 2000, *[True] * 1999, False, *[True] * 4001]
    optimizer = sgd(0.0)
    for number, is_finite in enumerate(finite):
        (parameter,) = optimizer.param_groups[0]["params"]
        theirs.scale(parameter.sum())  # it makes its own scale at the first call
        parameter.grad = torch.tensor([1.0 if is_finite else math.inf])
        theirs.step(optimizer)
        theirs.update()
        scaler.update(finite=is_finite)
        assert scaler.scale == theirs.get_scale(), number
    assert scaler.scale == 65536 / 4 * 2 / 2 * 2 * 2


def test_a_scalers_state_goes_through_json():
    scaler, other = LossScaler(), LossScaler()
    for _ in range(1999):
        scaler.update(finite=True)
    other.load_state_dict(json.loads(json.dumps(scaler.state_dict())))
    other.update(finite=True)
    assert other.scale == 2 * 65536


# ---- fused backward


def network(make, rates):
    """An optimiser of pairs of 64x64 matrices, and the loss of a deep product of them, step by step."""
    optimizer = trial_optimizer(make, rates)
    downs_ups = [p for group in optimizer.param_groups for p in group["params"]]

    def loss(number):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(number))
        for up, down in zip(downs_ups[::2], downs_ups[1::2], strict=True):
            x = x + linear(linear(x, down), up)
        return (x - 1).square().mean()

    return optimizer, loss


@pytest.fixture
def make():
    return lambda groups, lr: torch.optim.AdamW(groups, lr=lr)


def test_a_fused_step_is_the_plain_one_bit_for_bit(make):
    rates = (1e-2, 1e-3, 1e-1)
    plain, plain_loss = network(make, rates)
    fused, fused_loss = network(make, rates)
    steppers = Stepper(plain), Stepper(fused, fused=FusedBackward(fused))
    for number in range(6):
        norms = []
        for stepper, loss in zip(steppers, (plain_loss, fused_loss), strict=True):
            stepper.backward(loss(number))
            norms.append(stepper.gradient_norm())
            stepper.step()
        assert norms[0] == norms[1]
    for a, b in zip(steppers[0].parameters, steppers[1].parameters, strict=True):
        assert torch.equal(a, b)
        assert a.any()


def test_a_fused_state_is_the_plain_one(make):
    plain, plain_loss = network(make, (1e-2,))
    fused, fused_loss = network(make, (1e-2,))
    for optimizer, loss, hooks in ((plain, plain_loss, None), (fused, fused_loss, FusedBackward(fused))):
        stepper = Stepper(optimizer, fused=hooks)
        stepper.backward(loss(0))
        stepper.gradient_norm()
        stepper.step()
    one, other = plain.state_dict(), fused.state_dict()
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for key, state in one["state"].items():
        assert all(torch.equal(value, other["state"][key][name]) for name, value in state.items())
    # and a plain one goes on from it, groups made anew by loading included
    plain.load_state_dict(other)
    fused.load_state_dict(one)
    stepper = Stepper(fused, fused=hooks)
    stepper.backward(fused_loss(1))
    stepper.gradient_norm()
    plain_loss(1).backward()
    plain.step()
    assert all(torch.equal(a, b) for a, b in zip(stepper.parameters, Stepper(plain).parameters, strict=True))


def test_a_fused_gradient_is_freed_before_the_next_is_there(make):
    optimizer, loss = network(make, (1e-2, 1e-2, 1e-2))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = []
    for parameter in parameters:
        parameter.register_hook(lambda g: held.append(sum(p.grad is not None for p in parameters)))
    fused = FusedBackward(optimizer)
    loss(0).backward()
    assert len(held) == len(parameters)
    assert max(held) <= 1
    assert all(p.grad is None for p in parameters)
    assert len(fused.finish()) == len(parameters)
    assert fused.finish() == []


def test_numbers_that_a_group_keeps_go_on_once_a_step(make):
    from schedulefree import AdamWScheduleFree

    def free(groups, lr):
        optimizer = AdamWScheduleFree(groups, lr=lr, warmup_steps=3)
        optimizer.train()
        return optimizer

    optimizer, loss = network(free, (1e-2, 1e-3))
    stepper = Stepper(optimizer, fused=FusedBackward(optimizer))
    for number in range(2):
        stepper.backward(loss(number))
        stepper.gradient_norm()
        stepper.step()
    assert [group["k"] for group in optimizer.param_groups] == [2, 2]
    assert stepper.metrics["effective_learning_rate"] == pytest.approx(1e-2 * 2 / 3)

"""The optimisers by name: what each is, what it needs, and what is told of its rate."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from hyimg.errors import HyimgError
from hyimg.plugins import load_plugins
from hyimg.training.builtins import OPTIMIZERS
from hyimg.training.evaluation_weights import averaged_weights
from hyimg.training.optimizers import has_modes, rates, resolve_optimizer

TARGET = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))


def made(name, pairs=(), *, shape=(64, 64), lr=0.05):
    """The optimiser of one parameter of zeros."""
    parameter = torch.nn.Parameter(torch.zeros(shape))
    return resolve_optimizer(load_plugins(), name, pairs)([{"params": [parameter], "lr": lr}], lr), parameter


def step(optimizer, parameter):
    """One step towards TARGET; gives the loss before it."""
    loss = (parameter - TARGET).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_goes_downhill(name):
    # the rates that each is made for; the gradient of a mean over 4096 values is small, which only SGD minds
    lr = {"Prodigy": 1.0, "SGDNesterov": 100.0, "SGDScheduleFree": 100.0}.get(name, 0.05)
    # Adafactor's own rate is scaled by the weights', which are zeros here
    pairs = ["relative_step=False", "scale_parameter=False"] if name == "Adafactor" else []
    optimizer, parameter = made(name, pairs, lr=lr)
    losses = [step(optimizer, parameter) for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("lion", "bitsandbytes.optim.lion.Lion"),
        ("Lion8bit", "bitsandbytes.optim.lion.Lion8bit"),
        ("PagedAdamW8bit", "bitsandbytes.optim.adamw.PagedAdamW8bit"),
        ("Prodigy", "prodigyopt.prodigy.Prodigy"),
        ("CAME", "pytorch_optimizer.optimizer.came.CAME"),
        ("RAdamScheduleFree", "schedulefree.radam_schedulefree.RAdamScheduleFree"),
        ("AdamWScheduleFree", "schedulefree.adamw_schedulefree.AdamWScheduleFree"),
        ("RMSprop", "torch.optim.rmsprop.RMSprop"),
        ("pytorch_optimizer.StableAdamW", "pytorch_optimizer.optimizer.adamw.StableAdamW"),
    ],
)
def test_a_name_is_the_class_that_users_expect(name, place):
    kind = type(made(name)[0])
    assert f"{kind.__module__}.{kind.__name__}" == place


def test_lion_is_the_papers():
    # arXiv 2302.06675, algorithm 2, with decoupled weight decay
    lr, beta1, beta2, decay = 0.01, 0.9, 0.99, 0.1
    optimizer, parameter = made("Lion", [f"betas=({beta1}, {beta2})", f"weight_decay={decay}"], lr=lr)
    expected, momentum = torch.zeros(64, 64), torch.zeros(64, 64)
    for number in range(5):
        gradient = torch.randn(64, 64, generator=torch.Generator().manual_seed(number))
        parameter.grad = gradient.clone()
        optimizer.step()
        update = (beta1 * momentum + (1 - beta1) * gradient).sign()
        expected -= lr * (update + decay * expected)
        momentum = beta2 * momentum + (1 - beta2) * gradient
    torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "package", "line"),
    [
        ("Prodigy", "prodigyopt", 'pip install --upgrade "hyimg\\[optimizers\\]"'),
        ("CAME", "pytorch_optimizer", 'pip install --upgrade "hyimg\\[optimizers\\]"'),
        ("AdamWScheduleFree", "schedulefree", 'pip install --upgrade "hyimg\\[optimizers\\]"'),
        ("Lion", "bitsandbytes.optim", "pip install --upgrade bitsandbytes"),
    ],
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch, name, package, line):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(HyimgError, match=f"`{name}` needs {package.partition('.')[0]}") as error:
        resolve_optimizer(load_plugins(), name, [])
    assert error.match(line) or pytest.fail(str(error.value))


def test_an_argument_of_a_packaged_optimiser_is_checked_by_its_class():
    with pytest.raises(HyimgError, match="`Prodigy` takes no argument `d_coeff`"):
        resolve_optimizer(load_plugins(), "Prodigy", ["d_coeff=2"])
    assert made("Prodigy", ["d_coef=2"])[0].param_groups[0]["d_coef"] == 2


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"])
def test_a_schedule_free_optimiser_is_saved_averaged_and_goes_on_as_if_it_had_not_been(name):
    (undisturbed, plain), (optimizer, parameter) = made(name), made(name)
    for _ in range(20):
        step(undisturbed, plain)
        step(optimizer, parameter)
        trained = parameter.detach().clone()
        with averaged_weights(optimizer):
            average = parameter.detach().clone()
        assert torch.equal(parameter, trained)
    assert torch.equal(parameter, plain)
    assert not torch.equal(average, trained)
    beta1 = optimizer.param_groups[0].get("betas", (optimizer.param_groups[0].get("momentum"),))[0]
    # y = beta z + (1 - beta) x of arXiv 2405.15682, equation 1, with their beta counted from the other end
    z = optimizer.state[parameter]["z"]
    torch.testing.assert_close((1 - beta1) * z + beta1 * average, trained, atol=1e-6, rtol=0)


def test_weights_come_back_where_saving_fails():
    optimizer, parameter = made("AdamWScheduleFree")
    step(optimizer, parameter)
    step(optimizer, parameter)
    trained = parameter.detach().clone()
    with pytest.raises(OSError), averaged_weights(optimizer):
        raise OSError
    assert torch.equal(parameter, trained)
    step(optimizer, parameter)  # it raises where it is not in its training mode


def test_an_optimiser_without_modes_is_left_alone():
    optimizer, parameter = made("AdamW")
    assert not has_modes(optimizer)
    before = parameter.detach().clone()
    with averaged_weights(optimizer):
        assert torch.equal(parameter, before)


def test_the_rates_told_are_those_of_each_group_and_what_the_optimiser_makes_of_them():
    parameters = [torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(2)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, (0.5, 0.25), strict=True)]
    assert rates(torch.optim.SGD(groups)) == {"learning_rate": 0.5, "learning_rate_1": 0.25}
    prodigy, parameter = made("Prodigy", ["d0=0.01"], lr=0.5)
    step(prodigy, parameter)
    told = rates(prodigy)
    assert told == {"learning_rate": 0.5, "effective_learning_rate": prodigy.param_groups[0]["d"] * 0.5}
    free, parameter = made("AdamWScheduleFree", ["warmup_steps=4"], lr=0.5)
    step(free, parameter)
    assert rates(free) == {"learning_rate": 0.5, "effective_learning_rate": 0.125}


def test_a_rate_that_adafactor_makes_is_told_once_it_has_made_one():
    optimizer, parameter = made("Adafactor")
    assert rates(optimizer) == {}
    for number in range(1, 4):
        rms = max(1e-3, float(parameter.detach().square().mean().sqrt()))
        step(optimizer, parameter)
        # arXiv 1804.04235, algorithm 5: rho = min(1e-2, 1/sqrt(t)), times the weights' scale
        assert rates(optimizer) == {"learning_rate": pytest.approx(rms * min(1e-2, 1 / math.sqrt(number)))}

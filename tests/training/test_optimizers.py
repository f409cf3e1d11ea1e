"""The optimisers by name: what each is, what it needs, and what is told of its rate."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from hyimg.errors import HyimgError
from hyimg.plugins import load_plugins
from hyimg.plugins.builtins import OPTIMIZERS
from hyimg.training.ema import averaged_weights
from hyimg.training.optimizers import has_modes, rates, resolve_optimizer
from tests.tolerances import rounding

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
    rates = {"Prodigy": 1.0, **dict.fromkeys(("SGDNesterov", "SGDNesterov8bit", "SGDScheduleFree"), 100.0)}
    lr = rates.get(name, 1.0 if name.startswith("DAdapt") else 0.05)
    # Adafactor's own rate is scaled by the weights', which are zeros here
    pairs = ["relative_step=False", "scale_parameter=False"] if name == "Adafactor" else []
    optimizer, parameter = made(name, pairs, lr=lr)
    # D-Adaptation raises its rate from 1e-6, slowly in AdaGrad's form and too far at first in the preprint's
    losses = [step(optimizer, parameter) for _ in range(150 if name.startswith("DAdapt") else 40)]
    assert losses[-1] < 0.9 * losses[0]


# Everything that library/train_util.py of kohya-ss/sd-scripts takes by a short name, February 2026
REFERENCE = {
    "AdamW": "torch.optim.adamw.AdamW",
    "AdamW8bit": "bitsandbytes.optim.adamw.AdamW8bit",
    "PagedAdamW": "bitsandbytes.optim.adamw.PagedAdamW",
    "PagedAdamW8bit": "bitsandbytes.optim.adamw.PagedAdamW8bit",
    "PagedAdamW32bit": "bitsandbytes.optim.adamw.PagedAdamW32bit",
    "Lion": "bitsandbytes.optim.lion.Lion",  # there lion_pytorch's, of the same paper
    "Lion8bit": "bitsandbytes.optim.lion.Lion8bit",
    "PagedLion8bit": "bitsandbytes.optim.lion.PagedLion8bit",
    "SGDNesterov": "torch.optim.sgd.SGD",
    "SGDNesterov8bit": "bitsandbytes.optim.sgd.SGD8bit",
    "DAdaptation": "dadaptation.experimental.dadapt_adam_preprint.DAdaptAdamPreprint",
    "DAdaptAdamPreprint": "dadaptation.experimental.dadapt_adam_preprint.DAdaptAdamPreprint",
    "DAdaptAdaGrad": "dadaptation.dadapt_adagrad.DAdaptAdaGrad",
    "DAdaptAdam": "dadaptation.dadapt_adam.DAdaptAdam",
    "DAdaptAdan": "dadaptation.dadapt_adan.DAdaptAdan",
    "DAdaptAdanIP": "dadaptation.experimental.dadapt_adan_ip.DAdaptAdanIP",
    "DAdaptLion": "dadaptation.dadapt_lion.DAdaptLion",
    "DAdaptSGD": "dadaptation.dadapt_sgd.DAdaptSGD",
    "Prodigy": "prodigyopt.prodigy.Prodigy",
    "AdaFactor": "transformers.optimization.Adafactor",
    "AdamWScheduleFree": "schedulefree.adamw_schedulefree.AdamWScheduleFree",
    "RAdamScheduleFree": "schedulefree.radam_schedulefree.RAdamScheduleFree",
    "SGDScheduleFree": "schedulefree.sgd_schedulefree.SGDScheduleFree",
    "AdEMAMix8bit": "bitsandbytes.optim.ademamix.AdEMAMix8bit",
    "PagedAdEMAMix8bit": "bitsandbytes.optim.ademamix.PagedAdEMAMix8bit",
}


@pytest.mark.parametrize("name", REFERENCE)
def test_every_short_name_of_the_reference_tool_is_its_class(name):
    for spelling in (name, name.lower()):
        kind = type(made(spelling)[0])
        assert f"{kind.__module__}.{kind.__name__}" == REFERENCE[name]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("CAME", "pytorch_optimizer.optimizer.came.CAME"),
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
        ("DAdaptAdam", "dadaptation", 'pip install --upgrade "hyimg\\[optimizers\\]"'),
        ("DAdaptAdamPreprint", "dadaptation.experimental", 'pip install --upgrade "hyimg\\[optimizers\\]"'),
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
    with pytest.raises(HyimgError, match="unknown argument `d_coeff` of `Prodigy`"):
        resolve_optimizer(load_plugins(), "Prodigy", ["d_coeff=2"])
    assert made("Prodigy", ["d_coef=2"])[0].param_groups[0]["d_coef"] == 2


@pytest.mark.parametrize(
    ("name", "pair", "words"),
    [
        ("AdamW", "weight_decay=0,5", "must be a number, got `0,5`"),
        ("AdamW", "betas=0.9", "must be numbers like `0.9,0.999`, got `0.9`"),
        ("Prodigy", "betas=0.9", "must be numbers like `0.9,0.999`, got `0.9`"),
        ("Lion8bit", "betas=0.9,0.99,0.999", "must be numbers like"),
        (
            "Adafactor",
            "scale_parameter=no",
            "must be true or false, got `no`",
        ),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_its_argument(name, pair, words):
    with pytest.raises(HyimgError, match=words):
        made(name, [pair])


@pytest.mark.parametrize("name", ["CAME", "DAdaptAdan", "AdEMAMix8bit"])
def test_an_optimiser_of_three_betas_takes_three(name):
    assert made(name, ["betas=0.9,0.99,0.999"])[0].param_groups[0]["betas"][:2] == (0.9, 0.99)


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


def wrapped(name, pairs=(), wrapper_pairs=(), *, lr=0.05):
    """The optimiser of one parameter of zeros in schedulefree's wrapper."""
    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    make = resolve_optimizer(load_plugins(), name, pairs, wrapper_pairs=wrapper_pairs)
    return make([{"params": [parameter], "lr": lr}], lr), parameter


@pytest.mark.parametrize("name", ["AdamW", "Lion", "AdamW8bit", "Lion8bit", "CAME", "SGDNesterov", "RMSprop"])
def test_a_wrapped_optimiser_learns_and_saving_leaves_no_trace(name):
    # schedulefree's own wrapper fails at the first step of all of these but SGD
    (undisturbed, plain), (optimizer, parameter) = wrapped(name, lr=0.01), wrapped(name, lr=0.01)
    losses = []
    for _ in range(20):
        step(undisturbed, plain)
        losses.append(step(optimizer, parameter))
        with averaged_weights(optimizer):
            average = parameter.detach().clone()
    assert losses[-1] < losses[0]
    assert torch.equal(parameter, plain)
    assert not torch.equal(average, parameter)


def test_the_wrapper_computes_the_papers_average():
    # arXiv 2405.15682, equations 1 to 3, around plain SGD: gradient at y, step of z, average x
    lr, beta = 2.0, 0.8
    # element by element: ten steps of at most eight roundings each, of values up to the target's
    tolerance = rounding(10 * 8) * float(TARGET.abs().max())
    optimizer, parameter = wrapped("torch.optim.SGD", wrapper_pairs=[f"momentum={beta}"], lr=lr)
    x = z = torch.zeros(64, 64)
    for number in range(1, 11):
        y = (1 - beta) * z + beta * x
        torch.testing.assert_close(parameter.detach(), y, atol=tolerance, rtol=0)
        z = z - lr * 2 * (y - TARGET) / TARGET.numel()
        x = x + (z - x) / number
        step(optimizer, parameter)
    with averaged_weights(optimizer):
        torch.testing.assert_close(parameter.detach(), x, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("name", "pairs", "wrapper_pairs", "words"),
    [
        ("Prodigy", [], [], "cannot be used with `Prodigy`: both keep a number named `k`"),
        ("DAdaptAdam", [], [], "cannot be used with `DAdaptAdam`: both keep a number named `k`"),
        ("Adafactor", [], [], "cannot be used with `Adafactor`, which makes its own learning rate"),
        ("AdamW", [], ["momentum=0"], "`momentum=0` in `--schedulefree_wrapper_args` must be above 0"),
        ("AdamW", [], ["momentum=x"], "must be a number, got `x`"),
        ("AdamW", [], ["momentun=1"], "unknown argument `momentun` of `ScheduleFreeWrapper`"),
        ("AdamW", [], ["base=1"], "unknown argument `base` of `ScheduleFreeWrapper`"),
    ],
)
def test_what_cannot_be_wrapped_is_one_sentence(name, pairs, wrapper_pairs, words):
    with pytest.raises(HyimgError, match=words):
        wrapped(name, pairs, wrapper_pairs)


def test_a_rate_of_zero_cannot_be_wrapped():
    with pytest.raises(HyimgError, match="needs a learning rate above 0"):
        wrapped("AdamW", lr=0.0)


def test_the_wrapper_without_its_package_is_refused_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    monkeypatch.delitem(sys.modules, "hyimg.training.schedulefree_wrapper", raising=False)
    with pytest.raises(HyimgError, match="needs schedulefree") as caught:
        wrapped("AdamW")
    assert caught.value.hint == 'pip install --upgrade "hyimg[optimizers]"'


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

"""What an optimiser cannot do is found on small parameters, before anything long is begun."""

from __future__ import annotations

import pytest
import torch

from hyimg.errors import HyimgError
from hyimg.plugins import load_plugins
from hyimg.plugins.builtins import OPTIMIZERS
from hyimg.training.optimization import try_optimizer
from hyimg.training.optimizers import resolve_optimizer


def attempt(name, *pairs, rates=(1e-4,), **wanted):
    try_optimizer(resolve_optimizer(load_plugins(), name, pairs), name, rates=rates, **wanted)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_trains_float32_and_bf16(name):
    attempt(name)
    attempt(name, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "pairs", "message"),
    [
        ("AdamW", ["weight_decay=-1"], "rejects its arguments: ValueError: Invalid weight_decay"),
        ("torch.optim.LBFGS", [], "cannot make a step: .*closure"),
    ],
)
def test_an_optimiser_that_cannot_be_made_or_stepped_is_one_sentence(name, pairs, message):
    with pytest.raises(HyimgError, match=message):
        attempt(name, *pairs)


def test_what_makes_no_optimiser_is_said_so():
    with pytest.raises(HyimgError, match="`here` is not an optimiser: it returns a dict"):
        try_optimizer(lambda groups, lr: {}, "here", rates=(1e-4,))


def test_prodigy_takes_one_rate():
    with pytest.raises(HyimgError, match="`Prodigy` cannot make a step") as caught:
        attempt("Prodigy", rates=(1.0, 0.5))
    assert "same learning rate" in caught.value.hint
    attempt("Prodigy", rates=(1.0,))


@pytest.mark.parametrize("name", ["AdamW", "CAME", "AdamWScheduleFree"])
def test_an_optimiser_whose_state_underflows_in_fp16_is_refused(name):
    with pytest.raises(
        HyimgError, match=f"`{name}` cannot train weights in fp16: small gradients make them NaN"
    ):
        attempt(name, dtype=torch.float16)


def test_an_optimiser_that_stands_still_in_fp16_is_refused():
    with pytest.raises(
        HyimgError, match="`Prodigy` cannot train weights in fp16: small gradients do not move"
    ):
        attempt("Prodigy", rates=(1.0,), dtype=torch.float16)


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "Lion", "Lion8bit"])
def test_an_optimiser_with_a_wide_state_trains_fp16(name):
    attempt(name, dtype=torch.float16)


def test_a_rate_of_zero_moves_nothing_and_is_no_fault():
    attempt("AdamW8bit", rates=(0.0,), dtype=torch.float16)


ADAPTIVE = [name for name in OPTIMIZERS if name == "Prodigy" or name.startswith("DAdapt")]


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ADAPTIVE])
def test_an_optimiser_that_treats_each_parameter_by_itself_may_be_fused(name):
    attempt(name, rates=(1e-3, 1e-4), fused=True)


@pytest.mark.parametrize(
    ("name", "lr"),
    [*((name, 1.0) for name in ADAPTIVE), ("Prodigy", 1e-4), ("pytorch_optimizer.Prodigy", 1.0)],
)
def test_an_optimiser_that_looks_at_all_gradients_together_may_not_be_fused(name, lr):
    with pytest.raises(HyimgError, match=f"cannot be used with `{name}`: its step uses all gradients"):
        attempt(name, rates=(lr,), fused=True)


def test_one_that_counts_steps_outside_its_groups_may_not_be_fused():
    class Decaying(torch.optim.SGD):
        num_steps = 0

        @torch.no_grad()
        def step(self, closure=None):
            self.num_steps += 1
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=1 / self.num_steps)

    def make(groups, lr):
        return Decaying(groups, lr=lr)

    try_optimizer(make, "Decaying", rates=(1.0,))
    with pytest.raises(HyimgError, match="`--fused_backward_pass` cannot be used with `Decaying`"):
        try_optimizer(make, "Decaying", rates=(1.0,), fused=True)

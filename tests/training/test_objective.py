"""What a step minimises, against the formulas, with a DiT that answers what the test says."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from hyimg.checkpoints.architecture import DIT_2_1, DIT_2_1_DISTILLED, DIT_TINY
from hyimg.config.rendering import Sampling
from hyimg.config.training import FlowMatching
from hyimg.data.batches import LoadedBatch
from hyimg.flow.losses import l2
from hyimg.flow.timesteps import uniform
from hyimg.model.dit import DiT
from hyimg.model.loading import init_random
from hyimg.rendering.renderer import render_defaults
from hyimg.training.objective import Objective

SHAPE = (16, 8, 8)
ANSWER = 0.3
# one formula written twice in float32: 1024 terms in another order
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class FakeDiT:
    """Answers 0.3 everywhere and keeps what it was asked last."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, arch=DIT_2_1):
        self.arch = arch

    def __call__(self, noisy_BCHW, timestep_B, text, **distilled):
        self.asked = SimpleNamespace(noisy_BCHW=noisy_BCHW, timestep_B=timestep_B, text=text, **distilled)
        return torch.full_like(noisy_BCHW, ANSWER).requires_grad_()


def objective(dit=None, *, seed=1, posterior_mean=False, **flow):
    options = FlowMatching(**flow)
    return Objective(dit or FakeDiT(), l2, uniform, options, seed, posterior_mean=posterior_mean)


def batch_of(*keys, repeats=None, weights=None, masks_BHW=None, texts=None):
    """Images of those keys with means of 2 and deviations of 0.5."""
    mean_BCHW = torch.full((len(keys), *SHAPE), 2.0)
    return LoadedBatch(
        mean_BCHW=mean_BCHW,
        std_BCHW=torch.full_like(mean_BCHW, 0.5),
        text=texts or [(torch.ones(3, 4), None) for _ in keys],
        weights_B=torch.tensor(weights or [1.0] * len(keys)),
        alpha_mask_BHW=masks_BHW,
        sample_keys=keys,
        repeats=repeats or (0,) * len(keys),
        prompts=keys,
        network_multiplier=1.0,
        custom_attributes=(None,) * len(keys),
    )


def squares(drawn, prediction_BCHW=ANSWER):
    """(prediction - velocity)^2, by the definition of the velocity."""
    return (prediction_BCHW - (drawn.noise_BCHW - drawn.latent_BCHW)).square()


def test_the_loss_is_the_squared_error_of_the_velocity_times_the_images_weight():
    own, batch = objective(), batch_of("a", "b", weights=[1.0, 0.25])
    loss_B, _ = own(batch, 1)
    expected_B = squares(own.draw(batch, 1)).mean((1, 2, 3)) * torch.tensor([1.0, 0.25])
    torch.testing.assert_close(loss_B, expected_B, **CLOSE)


def test_a_mask_of_one_half_leaves_the_loss_of_that_half():
    mask_BHW = torch.zeros(1, 8, 8)
    mask_BHW[:, :, :4] = 1
    own, batch = objective(), batch_of("a", masks_BHW=mask_BHW)
    expected = squares(own.draw(batch, 1))[..., :4].mean()
    torch.testing.assert_close(own(batch, 1)[0], expected[None], **CLOSE)


def test_the_model_is_shown_the_line_between_latent_and_noise_and_its_time():
    own, batch = objective(), batch_of("a", "b")
    _, sigma_B = own(batch, 1)
    drawn, asked = own.draw(batch, 1), own.dit.asked
    sigma_B111 = sigma_B[:, None, None, None]
    expected = drawn.latent_BCHW + sigma_B111 * (drawn.noise_BCHW - drawn.latent_BCHW)
    torch.testing.assert_close(asked.noisy_BCHW, expected, **CLOSE)
    torch.testing.assert_close(asked.timestep_B, 1000 * sigma_B)


def test_posterior_noise_and_perturbation_are_three_draws_of_their_strengths():
    drawn = objective(ip_noise_gamma=0.25).draw(batch_of("a"), 1)
    parts = (drawn.latent_BCHW - 2, drawn.noise_BCHW, drawn.mixed_noise_BCHW - drawn.noise_BCHW)
    draws = torch.stack([part.flatten() for part in parts])
    # 1024 draws: a deviation is known to 2 %, a correlation of independent ones to 0.03
    assert draws.std(1).tolist() == pytest.approx([0.5, 1.0, 0.25], rel=0.1)
    assert float((torch.corrcoef(draws) - torch.eye(3)).abs().max()) < 0.15


def test_posterior_mean_takes_the_mean():
    drawn = objective(posterior_mean=True).draw(batch_of("a"), 1)
    assert torch.equal(drawn.latent_BCHW, torch.full((1, *SHAPE), 2.0))


@pytest.mark.parametrize(
    "change", [{"seed": 2}, {"epoch": 2}, {"key": "b"}, {"repeat": 1}], ids=lambda c: next(iter(c))
)
def test_every_draw_depends_on_seed_epoch_image_and_repeat(change):
    def draws(*, seed=1, epoch=1, key="a", repeat=0):
        own = objective(seed=seed, ip_noise_gamma=0.5, ip_noise_gamma_random_strength=True)
        drawn = own.draw(batch_of(key, repeats=(repeat,)), epoch)
        extra = drawn.mixed_noise_BCHW - drawn.noise_BCHW
        # the deviation of 1024 normal draws is known to 2 %, so its change is the strength's
        values = {"posterior": drawn.latent_BCHW, "noise": drawn.noise_BCHW, "sigma": drawn.sigma_B}
        return {**values, "perturbation": extra / extra.std(), "strength": extra.std().round(decimals=1)}

    first, again, other = draws(), draws(), draws(**change)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert [name for name in first if torch.equal(first[name], other[name])] == []


def test_a_batch_of_two_is_two_batches_of_one():
    dit = DiT(DIT_TINY)
    init_random(dit, 0)
    draw = torch.Generator().manual_seed(0)
    text_a, text_b, glyphs_b = (torch.randn(shape, generator=draw) for shape in ((5, 64), (9, 64), (4, 48)))
    texts = [(text_a, None), (text_b, glyphs_b)]
    masks_BHW = torch.rand(2, 8, 8, generator=draw)
    own = objective(dit, ip_noise_gamma=0.1)
    both = batch_of("a", "b", repeats=(0, 1), weights=[1.0, 0.5], masks_BHW=masks_BHW, texts=texts)
    loss_B, sigma_B = own(both, 3)
    for i in range(2):
        one = batch_of(
            "ab"[i], repeats=(i,), weights=[[1.0, 0.5][i]], masks_BHW=masks_BHW[i : i + 1], texts=[texts[i]]
        )
        loss, sigma = own(one, 3)
        assert torch.equal(sigma, sigma_B[i : i + 1])
        # matrix products of another size and padded attention, through six float32 blocks
        torch.testing.assert_close(loss, loss_B[i : i + 1], rtol=1e-4, atol=0)


def test_a_perturbed_input_keeps_the_target_of_the_plain_noise():
    own, batch = objective(ip_noise_gamma=0.5), batch_of("a")
    loss_B, sigma_B = own(batch, 1)
    drawn = own.draw(batch, 1)
    torch.testing.assert_close(loss_B, squares(drawn).mean()[None], **CLOSE)
    extra = (own.dit.asked.noisy_BCHW - (1 - sigma_B) * drawn.latent_BCHW) / sigma_B - drawn.noise_BCHW
    assert float(extra.std()) == pytest.approx(0.5, rel=0.1)  # of 1024 draws, known to 2 %


def test_timesteps_fill_their_range_and_do_not_leave_it():
    keys = [str(number) for number in range(64)]
    whole_B = objective().draw(batch_of(*keys), 1).sigma_B
    sigma_B = objective(min_timestep=250, max_timestep=500).draw(batch_of(*keys), 1).sigma_B
    torch.testing.assert_close(sigma_B, 0.25 + 0.25 * whole_B)
    assert float(whole_B.min()) < 0.1
    assert float(whole_B.max()) > 0.9


@pytest.mark.parametrize("kind", ["additive", "sigma_scaled"])
def test_the_prediction_type_joins_the_answer_with_the_noisy_latent(kind):
    own, batch = objective(model_prediction_type=kind), batch_of("a")
    loss_B, sigma_B = own(batch, 1)
    noisy_BCHW = own.dit.asked.noisy_BCHW
    prediction = {"additive": ANSWER + noisy_BCHW, "sigma_scaled": noisy_BCHW - sigma_B * ANSWER}[kind]
    torch.testing.assert_close(loss_B, squares(own.draw(batch, 1), prediction).mean()[None], **CLOSE)


@pytest.mark.parametrize(
    ("scheme", "weight"),
    [
        ("sigma_sqrt", lambda sigma: sigma**-2),
        ("cosmap", lambda sigma: 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))),
    ],
)
def test_the_weighting_scheme_weights_sigma_scaled_losses_by_noise_level(scheme, weight):
    batch = batch_of("a", "b")
    plain_B, sigma_B = objective(model_prediction_type="sigma_scaled")(batch, 1)
    loss_B, _ = objective(model_prediction_type="sigma_scaled", weighting_scheme=scheme)(batch, 1)
    torch.testing.assert_close(loss_B, plain_B * weight(sigma_B), **CLOSE)


def test_a_distilled_model_is_told_its_guidance_in_thousands_and_its_start_as_its_end():
    own = objective(FakeDiT(DIT_2_1_DISTILLED))
    _, sigma_B = own(batch_of("a", "b"), 1)
    assert own.dit.asked.guidance_B.tolist() == [3250, 3250]
    torch.testing.assert_close(own.dit.asked.timestep_r_B, 1000 * sigma_B)
    torch.testing.assert_close(own.dit.asked.timestep_B, 1000 * sigma_B)


def test_the_base_model_is_told_neither():
    own = objective()
    own(batch_of("a"), 1)
    assert (own.dit.asked.guidance_B, own.dit.asked.timestep_r_B) == (None, None)


def test_a_checkpoint_renders_with_its_own_values_where_nothing_is_said():
    def values(arch, **flags):
        made = render_defaults(Sampling(**flags), arch)
        return made.steps, made.guidance_scale, made.flow_shift

    assert values(DIT_2_1_DISTILLED) == (8, 3.25, 4.0)
    assert values(DIT_2_1) == (50, 3.5, 5.0)
    assert values(DIT_2_1_DISTILLED, infer_steps=4, guidance_scale=0.0, flow_shift=2.0) == (4, 0.0, 2.0)

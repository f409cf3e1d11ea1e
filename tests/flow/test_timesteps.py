from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest
import torch

from hyimg.errors import HyimgError
from hyimg.flow.timesteps import (
    Draws,
    TimestepContext,
    TimestepSampler,
    density_mode,
    draw,
    map_flux_shift,
    map_sigma,
    sample_sigmas,
)
from hyimg.plugins.builtins import TIMESTEP_SAMPLERS

# the golden file's short option names
OPTIONS = {
    "ws": "weighting_scheme",
    "sig": "sigmoid_scale",
    "lm": "logit_mean",
    "ls": "logit_std",
    "ms": "mode_scale",
    "shift": "discrete_flow_shift",
    "h": "latent_height",
    "w": "latent_width",
}


def sampler(name: str) -> TimestepSampler:
    module, function = TIMESTEP_SAMPLERS[name].split(":")
    found: TimestepSampler = getattr(import_module(module), function)
    return found


def context(**options: Any) -> TimestepContext:
    return TimestepContext(**{"latent_height": 64, "latent_width": 64, **options})


def test_every_sampling_agrees_with_the_golden_file(schedule: dict[str, Any]) -> None:
    """18 cases: 5 samplings, the weighting schemes, shifts, scales and sizes.

    decisions.md overrides one: the bfloat16 `sigma` case holds a table rounded to 294 values, so there the
    rounded value of ours is compared. The int64 timesteps in the file are not ours (float timesteps).
    """
    seen = set()
    for case in schedule["timestep_sampling"]["cases"]:
        options = {OPTIONS[key]: value for key, value in case["options"].items() if key != "mode"}
        raw_B = torch.tensor(case["raw"])
        unused_B = torch.full_like(raw_B, float("nan"))
        draws = Draws(raw_B, unused_B) if case["raw_draw"] == "u" else Draws(unused_B, raw_B)
        sigma_B = sample_sigmas(sampler(case["options"]["mode"]), draws, context(**options))
        rounds = case["dtype"] == "bfloat16" and case["options"]["mode"] == "sigma"
        assert sigma_B.dtype == torch.float32
        torch.testing.assert_close(
            sigma_B.bfloat16().float() if rounds else sigma_B, torch.tensor(case["sigma"]), atol=2e-6, rtol=0
        )
        if not rounds:
            peer = torch.tensor(case["timestep_peer_returned"])
            # the reference returned the bfloat16 `shift` case's timesteps in bfloat16: 3 digits
            tolerance = 4.0 if case["dtype"] == "bfloat16" else 2e-3
            torch.testing.assert_close(sigma_B * 1000, peer, atol=tolerance, rtol=0)
        seen.add(case["options"]["mode"])
    assert seen == set(TIMESTEP_SAMPLERS)


def test_flux_shift_grows_with_the_resolution_along_a_straight_line() -> None:
    """The golden cases stand near one end of the line (256 tokens); this is the other end and the middle."""
    for side, mu in ((32, 0.5), (128, 1.15), (64, 0.5 + 0.65 * 768 / 3840)):
        sigma_B = map_flux_shift(torch.zeros(1), latent_height=side, latent_width=side)
        assert sigma_B.item() == pytest.approx(1 / (1 + math.exp(-mu)), rel=1e-6)


def test_mode_weighting_takes_the_last_entry_for_a_draw_of_zero() -> None:
    density_B = density_mode(torch.zeros(1))
    assert density_B.item() == 1.0
    assert map_sigma(density_B).item() == pytest.approx(0.005 / 1.004)
    # a mode_scale beyond the density's range cannot wrap to the table's other end
    beyond_B = density_mode(torch.linspace(0, 1, 101), mode_scale=-3.0)
    assert beyond_B.min() < 0
    assert (map_sigma(beyond_B)[beyond_B < 0] == 1.0).all()


def test_a_draw_belongs_to_its_sample_and_not_to_the_batch() -> None:
    samples = [("a", 0), ("b", 0), ("a", 1)]
    together = draw(7, 2, samples)
    for i, sample in enumerate(samples):
        alone = draw(7, 2, [sample])
        assert torch.equal(alone.uniform_B, together.uniform_B[i : i + 1])
        assert torch.equal(alone.normal_B, together.normal_B[i : i + 1])
    everything = [draw(seed, epoch, samples) for seed, epoch in ((7, 2), (8, 2), (7, 3), (7, "validation"))]
    assert len(torch.cat([d.uniform_B for d in everything]).unique()) == 12
    assert len(torch.cat([d.normal_B for d in everything]).unique()) == 12


def test_draws_follow_their_distributions() -> None:
    draws = draw(0, 0, [(str(i), 0) for i in range(2000)])
    # five standard errors of 2000 draws
    assert draws.uniform_B.mean().item() == pytest.approx(0.5, abs=5 * 0.29 / 2000**0.5)
    assert draws.normal_B.mean().item() == pytest.approx(0.0, abs=5 / 2000**0.5)
    assert draws.normal_B.std().item() == pytest.approx(1.0, abs=5 * 0.71 / 2000**0.5)
    assert torch.corrcoef(torch.stack([draws.uniform_B, draws.normal_B]))[0, 1].abs() < 5 / 2000**0.5


@pytest.mark.parametrize("name", sorted(TIMESTEP_SAMPLERS))
def test_min_and_max_timestep_are_honoured_by_every_sampling(name: str) -> None:
    draws = draw(1, 0, [(str(i), 0) for i in range(300)])
    sigma_B = sample_sigmas(sampler(name), draws, context(), min_timestep=250, max_timestep=600)
    assert sigma_B.min() >= 0.25
    assert sigma_B.max() <= 0.6
    assert sigma_B.max() - sigma_B.min() > 0.25
    whole_B = sample_sigmas(sampler(name), draws, context())
    torch.testing.assert_close(sigma_B, 0.25 + 0.35 * whole_B)


@pytest.mark.parametrize(("low", "high"), [(600, 250), (500, 500), (-1, 1000), (0, 1001)])
def test_an_impossible_timestep_range_is_refused(low: int, high: int) -> None:
    with pytest.raises(HyimgError, match="no range within"):
        sample_sigmas(
            sampler("uniform"), draw(0, 0, [("a", 0)]), context(), min_timestep=low, max_timestep=high
        )


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([0.5, 0.5], r"returned list, not a float tensor of shape \(2,\)"),
        (torch.tensor(0.5), r"shape \(\), not a float tensor"),
        (torch.full((2, 1), 0.5), r"shape \(2, 1\), not a float tensor"),
        (torch.tensor([1, 0]), "returned int64"),
        (torch.tensor([0.5, 500.0]), "the noise level 500"),
        (torch.tensor([-0.1, 0.5]), "the noise level -0.1"),
        (torch.tensor([0.5, math.nan]), "the noise level nan"),
    ],
)
def test_a_sampler_that_returns_no_noise_levels_is_named(answer: Any, words: str) -> None:
    def of_a_plugin(draws: Draws, context: TimestepContext) -> Any:
        return answer

    draws = draw(0, 0, [("a", 0), ("b", 0)])
    with pytest.raises(HyimgError, match=words) as caught:
        sample_sigmas(of_a_plugin, draws, context())
    assert "`of_a_plugin`" in caught.value.message


def test_a_rounding_over_one_and_another_precision_are_taken() -> None:
    draws = draw(0, 0, [("a", 0), ("b", 0)])
    sigma_B = sample_sigmas(lambda draws, context: torch.tensor([1.0000001, 0.25]).double(), draws, context())
    assert sigma_B.dtype == torch.float32
    assert sigma_B.tolist() == [1.0, 0.25]

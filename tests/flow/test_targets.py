from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hyimg.flow.targets import (
    add_noise,
    apply_prediction_type,
    loss_weighting,
    perturb_noise,
    velocity_target,
)

# rel 1e-5 (tests/golden/README-lora-math.md): float32 rounding of a handful of operations


def test_noisy_latent_target_and_loss_of_the_golden_training_step(
    golden_tensors: Callable[[str], dict[str, torch.Tensor]],
) -> None:
    golden = golden_tensors("train_step.safetensors")
    latent, noise, sigma_B = golden["in.latents"], golden["in.noise"], golden["in.sigma"]
    torch.testing.assert_close(add_noise(latent, noise, sigma_B), golden["noisy"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(velocity_target(latent, noise), golden["target"], atol=1e-6, rtol=1e-5)


def test_noise_level_zero_is_the_latent_and_one_the_noise() -> None:
    latent, noise = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    noisy = add_noise(latent, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(noisy[0], latent[0])
    assert torch.equal(noisy[1], noise[1])


def test_input_perturbation_agrees_with_the_golden_file(schedule: dict[str, Any]) -> None:
    """decisions.md and DESIGN.md: the random strength is drawn for each sample, not once a batch; the golden
    case has one number for both samples, which is given to both here."""
    golden = schedule["ip_noise"]
    latent, noise, xi = (torch.tensor(golden[k]).view(golden["shape"]) for k in ("latents", "noise", "xi"))
    sigma_B = torch.tensor(golden["sigmas"])
    gamma = golden["gamma"]
    for name, strength in (
        ("fixed", gamma),
        ("random_strength", gamma * golden["rand_strength_draw"]),
        ("no_ip_noise", 0.0),
    ):
        noisy = add_noise(latent, perturb_noise(noise, xi, torch.full((2,), strength)), sigma_B)
        expected = torch.tensor(golden[name]).view(golden["shape"])
        torch.testing.assert_close(noisy, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("kind", ["raw", "additive", "sigma_scaled"])
def test_prediction_types_and_their_weights_agree_with_the_golden_file(
    schedule: dict[str, Any], kind: Any, scheme: str
) -> None:
    golden = schedule["model_prediction_type"]
    prediction, noisy = (
        torch.tensor(golden[k]).view(golden["shape"]) for k in ("model_pred", "noisy_model_input")
    )
    sigma_B = torch.tensor(golden["sigmas"])
    expected = golden[f"{kind}/{scheme}"]
    output = apply_prediction_type(prediction, noisy, sigma_B, kind)
    torch.testing.assert_close(output.flatten(), torch.tensor(expected["output"]), atol=1e-6, rtol=1e-5)
    weighting = [1.0, 1.0] if expected["weighting"] is None else expected["weighting"]
    torch.testing.assert_close(
        loss_weighting(sigma_B, scheme, kind), torch.tensor(weighting), atol=0, rtol=1e-5
    )


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
def test_loss_weights_agree_with_the_golden_file(schedule: dict[str, Any], scheme: str) -> None:
    golden = schedule["loss_weighting"]
    weights_B = loss_weighting(torch.tensor(golden["sigma_grid"]), scheme, "sigma_scaled")
    torch.testing.assert_close(weights_B, torch.tensor(golden[scheme]), atol=0, rtol=1e-5)
    assert torch.equal(
        loss_weighting(torch.tensor([0.3]), "uniform", "sigma_scaled"),
        loss_weighting(torch.tensor([0.3]), "none", "sigma_scaled"),
    )


def test_a_noise_level_of_zero_has_a_finite_weight() -> None:
    assert loss_weighting(torch.zeros(1), "sigma_sqrt", "sigma_scaled").isfinite().all()

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hyimg.errors import HyimgError
from hyimg.flow.losses import (
    LossContext,
    huber,
    huber_threshold,
    image_mean,
    l1,
    l2,
    smooth_l1,
    weight_map_from_mask,
)

# rel 1e-5 (tests/golden/README-lora-math.md): float32 rounding


def at(timestep_B: list[float], weight_map: torch.Tensor | None = None) -> LossContext:
    timesteps = torch.tensor(timestep_B)
    return LossContext(timesteps / 1000, timesteps, weight_map)


def test_every_loss_agrees_with_the_golden_file_image_by_image(schedule: dict[str, Any]) -> None:
    golden = schedule["conditional_loss"]
    prediction, target = (torch.tensor(golden[k]).view(golden["shape"]) for k in ("pred", "target"))
    assert golden["huber_c"] == [0.1, 0.4]
    # the exponential schedule with c = 0.1 has these thresholds at these times
    context = at([1000.0, 397.94000867])
    losses: dict[str, torch.Tensor] = {
        "l1": l1(prediction, target, context),
        "l2": l2(prediction, target, context),
        "huber": huber(prediction, target, context, huber_schedule="exponential"),
        "smooth_l1": smooth_l1(prediction, target, context, huber_schedule="exponential"),
    }
    for name, loss_B in losses.items():
        expected_B = torch.tensor(golden[name]["none"]).view(2, -1).mean(1)
        torch.testing.assert_close(loss_B, expected_B, atol=0, rtol=1e-5)
        assert loss_B.mean().item() == pytest.approx(golden[name]["mean"], rel=1e-5)


def test_l2_agrees_with_the_golden_training_step(
    golden_tensors: Callable[[str], dict[str, torch.Tensor]],
) -> None:
    golden = golden_tensors("train_step.safetensors")
    loss_B = l2(golden["pred"], golden["target"], at([500.0, 500.0]))
    torch.testing.assert_close(loss_B, golden["loss_per_sample"], atol=0, rtol=1e-5)


def test_huber_thresholds_agree_with_the_golden_file(schedule: dict[str, Any]) -> None:
    """decisions.md: the schedule snr, an error in the reference too, is refused with a reason."""
    golden = schedule["huber_threshold"]
    timestep_B = torch.tensor(golden["timesteps"], dtype=torch.float32)
    cases = [case for case in golden["cases"] if case["loss_type"] in ("huber", "smooth_l1")]
    assert len(cases) == 12
    for case in cases:
        options = {key: case[key] for key in ("huber_c", "huber_scale", "huber_schedule")}
        if case["huber_schedule"] == "snr":
            with pytest.raises(HyimgError, match=r"snr.*flow model"):
                huber_threshold(timestep_B, **options)
        else:
            threshold_B = huber_threshold(timestep_B, **options)
            torch.testing.assert_close(threshold_B, torch.tensor(case["result"]), atol=0, rtol=1e-5)


def test_huber_is_square_near_zero_and_straight_far_away() -> None:
    target = torch.zeros(3, 1, 1, 1)
    prediction = torch.tensor([1e-5, 100.0, 101.0]).view(3, 1, 1, 1)
    context = at([0.0, 0.0, 0.0])
    small, far, farther = huber(prediction, target, context, huber_c=0.5, huber_scale=2.0).double()
    assert small.item() == pytest.approx(1e-10, rel=1e-4)  # the plain formula gives 0 here
    assert (farther - far).item() == pytest.approx(2.0, rel=1e-3)
    small, far, farther = smooth_l1(prediction, target, context, huber_c=0.5).double()
    assert small.item() == pytest.approx(2e-10, rel=1e-4)
    assert (farther - far).item() == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("options", [{"huber_c": 0.0}, {"huber_scale": -1.0}, {"huber_schedule": "linear"}])
def test_impossible_huber_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(HyimgError, match=next(iter(options))):
        huber_threshold(torch.zeros(1), **options)


def test_half_precision_is_compared_in_float32() -> None:
    prediction, target = torch.full((1, 4, 8, 8), 3.0, dtype=torch.bfloat16), torch.full((1, 4, 8, 8), 3.001)
    loss_B = l2(prediction, target, at([1.0]))
    assert loss_B.dtype == torch.float32
    assert loss_B.item() == pytest.approx(1e-6, rel=1e-2)
    # 1 + 2^-9 has one digit more than bfloat16, and its square fewer than float32
    one, small = (torch.full((1, 1, 1, 1), value, dtype=torch.bfloat16) for value in (1.0, -(2.0**-9)))
    assert l2(one, small, at([1.0])).item() == (1 + 2.0**-9) ** 2


@pytest.mark.parametrize("loss", [l1, l2, huber, smooth_l1])
def test_a_masked_loss_is_the_mean_over_what_the_mask_shows(loss: Callable[..., torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(2, 4, 6, 8, generator=generator) for _ in range(2))
    mask = torch.zeros(2, 1, 6, 8)
    mask[0, :, :, :4] = 1
    mask[1] = 0.25
    loss_B = loss(prediction, target, at([500.0, 500.0], mask))
    left_B = loss(prediction[..., :4], target[..., :4], at([500.0, 500.0]))
    whole_B = loss(prediction, target, at([500.0, 500.0]))
    torch.testing.assert_close(loss_B, torch.stack([left_B[0], whole_B[1]]))


def test_an_all_transparent_image_gives_no_loss_and_no_gradient_and_no_nan() -> None:
    prediction = torch.randn(1, 4, 2, 2, requires_grad=True)
    loss_B = l2(prediction, torch.zeros(1, 4, 2, 2), at([1.0], torch.zeros(1, 1, 2, 2)))
    loss_B.sum().backward()
    assert loss_B.item() == 0
    assert prediction.grad is not None
    assert (prediction.grad == 0).all()


def test_an_alpha_mask_is_averaged_over_each_latent_pixel() -> None:
    mask = torch.zeros(1, 64, 96)
    mask[:, :32, :16] = 1
    expected = torch.tensor([[[[0.5, 0, 0], [0, 0, 0]]]])
    assert torch.equal(weight_map_from_mask(mask, 2, 3), expected)
    assert image_mean(torch.ones(1, 4, 2, 3), expected).item() == pytest.approx(1.0)

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

from hyimg.errors import HyimgError
from hyimg.flow.timesteps import inference_sigmas, timesteps, training_sigmas

# sigmas agree to 2e-6 and timesteps to 2e-3: float32 rounding, as tests/golden/README-lora-math.md states


def test_inference_sigmas_and_timesteps_agree_with_the_golden_file(schedule: dict[str, Any]) -> None:
    assert len(schedule["inference"]) == 4
    for case in schedule["inference"]:
        sigmas = inference_sigmas(case["steps"], case["shift"])
        torch.testing.assert_close(sigmas, torch.tensor(case["sigmas"]), atol=2e-6, rtol=0)
        torch.testing.assert_close(timesteps(sigmas[:-1]), torch.tensor(case["timesteps"]), atol=2e-3, rtol=0)


@pytest.mark.parametrize("shift", [5.0, 4.0])
def test_steps_that_divide_1000_have_the_levels_of_comfyuis_simple(shift: float) -> None:
    """`simple` takes entry -(1 + int(i * 1000 / steps)) of a rising table of 1000 levels, and 0 at the end
    (comfy/samplers.py, comfy/model_sampling.py); in fractions here."""

    def level(t: Fraction) -> Fraction:
        return Fraction(shift) * t / (1 + (Fraction(shift) - 1) * t)

    table = [level(Fraction(number, 1000)) for number in range(1, 1001)]
    for steps in (1, 8, 20, 25, 50, 7, 30):
        simple = [float(table[-(1 + i * 1000 // steps)]) for i in range(steps)] + [0.0]
        ours = inference_sigmas(steps, shift).double()
        if 1000 % steps == 0:
            # three float32 operations at levels up to 1, the table's fraction amplified by at most the shift
            torch.testing.assert_close(ours, torch.tensor(simple).double(), atol=8 * 2**-24 * shift, rtol=0)
        else:
            # each is at most one entry of the table higher
            difference = torch.tensor(simple).double() - ours
            assert 0 < difference.max() <= shift / 1000
            assert difference.min() >= -8 * 2**-24 * shift


def test_inference_starts_at_pure_noise_and_ends_at_the_image_exactly() -> None:
    for steps, shift in ((1, 5.0), (7, 0.3), (50, 5.0), (1000, 12.0)):
        sigmas = inference_sigmas(steps, shift)
        assert (sigmas[0], sigmas[-1], len(sigmas)) == (1.0, 0.0, steps + 1)
        assert (sigmas.diff() < 0).all()


def test_training_table_agrees_with_the_golden_file(schedule: dict[str, Any]) -> None:
    table = schedule["train_scheduler"]
    sigmas = training_sigmas(table["shift"])
    torch.testing.assert_close(sigmas, torch.tensor(table["sigmas"]), atol=2e-6, rtol=0)
    assert len(sigmas.unique()) == 1000


def test_timesteps_keep_their_fraction() -> None:
    assert timesteps(torch.tensor([0.37125])).item() == pytest.approx(371.25)
    assert timesteps(torch.tensor([0.5], dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("steps", "shift", "what"), [(0, 5.0, "steps"), (-3, 5.0, "steps"), (10, 0.0, "shift")]
)
def test_a_schedule_that_cannot_be_is_refused(steps: int, shift: float, what: str) -> None:
    with pytest.raises(HyimgError, match=what):
        inference_sigmas(steps, shift)

from __future__ import annotations

from typing import Any

import pytest
import torch

from hyimg.errors import HyimgError
from hyimg.flow.schedule import inference_sigmas, timesteps, training_sigmas

# sigmas agree to 2e-6 and timesteps to 2e-3: float32 rounding, as tests/golden/README-lora-math.md states


def test_inference_sigmas_and_timesteps_agree_with_the_golden_file(schedule: dict[str, Any]) -> None:
    assert len(schedule["inference"]) == 4
    for case in schedule["inference"]:
        sigmas = inference_sigmas(case["steps"], case["shift"])
        torch.testing.assert_close(sigmas, torch.tensor(case["sigmas"]), atol=2e-6, rtol=0)
        torch.testing.assert_close(timesteps(sigmas[:-1]), torch.tensor(case["timesteps"]), atol=2e-3, rtol=0)


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

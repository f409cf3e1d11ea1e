from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest
import torch

from hyimg.errors import HyimgError, RunError
from hyimg.flow.samplers import Sampler, check_sampler, dpmpp_2m, euler, heun, run_sampler
from hyimg.flow.timesteps import inference_sigmas
from hyimg.plugins.builtins import LOSSES, SAMPLERS, TIMESTEP_SAMPLERS

# Images of one pixel: normally distributed with these values. The best estimate of the clean image, and the
# path of the flow from noise to image, are known in closed form.
MEAN, SPREAD = 0.7, 0.4


def spread_at(sigma: float) -> float:
    return math.hypot((1 - sigma) * SPREAD, sigma)


def estimate(x: torch.Tensor, sigma: float) -> torch.Tensor:
    gain = (1 - sigma) * SPREAD**2 / spread_at(sigma) ** 2
    return MEAN + gain * (x - (1 - sigma) * MEAN)


def noise() -> torch.Tensor:
    return torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)


def on_the_path(sigma: float) -> torch.Tensor:
    return (1 - sigma) * MEAN + spread_at(sigma) * noise()


def error(sampler: Sampler, sigmas: torch.Tensor) -> float:
    result = sampler(estimate, on_the_path(sigmas[0].item()), sigmas)
    return float((result - on_the_path(sigmas[-1].item())).abs().max())


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2), (dpmpp_2m, 2)])
def test_a_sampler_converges_with_its_order(sampler: Sampler, order: int) -> None:
    """Twice the steps, 2^order times less error; 0.1 for higher terms. Between 0.9 and 0.1, since the steps
    at either end are of first order in all of them."""
    coarse, fine = (error(sampler, torch.linspace(0.9, 0.1, n + 1, dtype=torch.float64)) for n in (80, 160))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def test_second_order_samplers_are_closer_than_euler_at_usual_step_numbers() -> None:
    twenty, forty = inference_sigmas(20, 3.0), inference_sigmas(40, 3.0)
    assert error(dpmpp_2m, twenty) < 0.5 * error(euler, twenty)
    assert error(heun, twenty) < 0.8 * error(euler, forty)  # at the same number of model calls


def test_euler_is_the_loop_of_the_official_pipeline() -> None:
    x = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(-1, 1, 6)

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return torch.sin(3 * x + sigma) * weight

    sigmas = inference_sigmas(9, 5.0)
    result = euler(lambda x, sigma: x - sigma * velocity(x, sigma), x, sigmas)
    for i in range(9):
        x = x - (sigmas[i] - sigmas[i + 1]) * velocity(x, sigmas[i].item())
    # the velocity is recovered from the estimate by a division: some float32 roundings
    torch.testing.assert_close(result, x, atol=1e-5, rtol=0)


def test_dpmpp_2m_agrees_with_diffusers_solver() -> None:
    """On the same noise levels; diffusers' start just under 1 (it has no limit for pure noise)."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=5.0,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(16)
    sigmas = scheduler.sigmas.clone()
    assert sigmas[0] < 1
    assert sigmas[-1] == 0
    theirs = noise().float()
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = sigmas[i].item()
        velocity = (theirs - estimate(theirs, sigma)) / sigma
        theirs = scheduler.step(velocity, timestep, theirs).prev_sample
    ours = dpmpp_2m(estimate, noise().float(), sigmas)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("sampler", "num_calls"), [(euler, 5), (heun, 9), (dpmpp_2m, 5)])
def test_every_step_is_reported_and_costs_what_it_says(sampler: Sampler, num_calls: int) -> None:
    calls: list[float] = []
    steps: list[int] = []
    states: list[torch.Tensor] = []

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        assert 0 < sigma <= 1
        calls.append(sigma)
        return estimate(x, sigma)

    def callback(step: int, x: torch.Tensor, denoised: torch.Tensor) -> None:
        steps.append(step)
        states.append(x)
        assert denoised.shape == x.shape

    start = noise()
    result = sampler(denoise, start, inference_sigmas(5, 5.0), callback)
    assert len(calls) == num_calls
    assert steps == [0, 1, 2, 3, 4]
    assert torch.equal(states[-1], result)
    assert torch.equal(start, noise())


@pytest.mark.parametrize("sampler", [euler, heun, dpmpp_2m])
def test_one_step_is_the_estimate_itself(sampler: Sampler) -> None:
    result = sampler(estimate, noise(), inference_sigmas(1, 5.0))
    torch.testing.assert_close(result, estimate(noise(), 1.0))


def test_every_built_in_name_leads_to_a_function() -> None:
    for name in [*LOSSES.values(), *SAMPLERS.values(), *TIMESTEP_SAMPLERS.values()]:
        module, function = name.split(":")
        assert callable(getattr(import_module(module), function))


def test_a_distilled_model_is_rendered_with_straight_steps_only() -> None:
    for name in ("heun", "dpm++2m"):
        check_sampler(name, meanflow=False)
        with pytest.raises(HyimgError, match="distilled") as caught:
            check_sampler(name, meanflow=True)
        assert "euler" in str(caught.value.hint)
    check_sampler("euler", meanflow=True)
    check_sampler("somebody's own", meanflow=True)


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (lambda *_: None, "returned NoneType, not a float tensor of shape"),
        (
            lambda denoise, x, sigmas, callback: x[0],
            r"returned float64 of shape \(1, 3, 3\), not a float tensor of shape",
        ),
        (lambda denoise, x, sigmas, callback: x.long(), "returned int64"),
        (lambda denoise, x, sigmas: x, "failed: TypeError"),
        (lambda denoise, x, sigmas, callback: denoise(x), "failed: TypeError"),
        (lambda denoise, x, sigmas, callback: x[9], "failed: IndexError"),
    ],
)
def test_a_sampler_that_fails_is_named_as_the_user_called_it(sampler: Sampler, words: str) -> None:
    with pytest.raises(RunError, match=f"^the sampler `mine` {words}"):
        run_sampler(sampler, "mine", estimate, noise(), inference_sigmas(2))


@pytest.mark.parametrize("where", ["denoise", "callback"])
def test_what_fails_under_a_sampler_is_not_its_fault(where: str) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError(where)

    denoise, callback = (fail, None) if where == "denoise" else (estimate, fail)
    with pytest.raises(ZeroDivisionError, match=where):
        run_sampler(heun, "heun", denoise, noise(), inference_sigmas(2), callback)


def test_a_lack_of_memory_is_not_a_samplers_fault() -> None:
    def sampler(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        run_sampler(sampler, "mine", estimate, noise(), inference_sigmas(2))

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hyimg.checkpoints.architecture import DiTArch
from hyimg.errors import HyimgError, RunError
from hyimg.flow.guidance import Guidance, GuidanceSettings
from hyimg.flow.samplers import Callback, Denoise, dpmpp_2m, euler, heun
from hyimg.flow.targets import initial_noise
from hyimg.flow.timesteps import inference_sigmas
from hyimg.model.dit import DiT, TextCondition, collate
from hyimg.rendering.renderer import Denoiser, render_latent


@dataclass
class FakeDiT:
    """Answers with a smooth function of latent, time and prompt, and records how it was called."""

    guidance_embed: bool = False
    meanflow: bool = False
    calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def arch(self) -> Any:
        return SimpleNamespace(latent_channels=16, guidance_embed=self.guidance_embed, meanflow=self.meanflow)

    def __call__(
        self,
        latent_BCHW: torch.Tensor,
        timestep_B: torch.Tensor,
        text: TextCondition,
        *,
        guidance_B: torch.Tensor | None = None,
        timestep_r_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        assert latent_BCHW.dtype == timestep_B.dtype == torch.float32
        self.calls.append(
            {"t": timestep_B, "g": guidance_B, "r": timestep_r_B, "batch": len(latent_BCHW), "text": text}
        )
        mood_B = (text.text_BTD.mean(2) * text.text_mask_BT).sum(1)
        return self.answer(latent_BCHW, timestep_B, mood_B)

    @staticmethod
    def answer(latent_BCHW: torch.Tensor, timestep_B: torch.Tensor, mood_B: torch.Tensor) -> torch.Tensor:
        return torch.sin(2 * latent_BCHW + (timestep_B / 1000 + mood_B).view(-1, 1, 1, 1))


def condition(value: float, tokens: int = 3, glyphs: int = 0) -> TextCondition:
    byt5 = torch.full((glyphs, 6), value) if glyphs else None
    return collate([(torch.full((tokens, 8), value), byt5)])


PROMPT, NEGATIVE = condition(0.4), condition(-0.1, tokens=5)


def render(dit: Any, *, scale: float = 3.5, **options: Any) -> torch.Tensor:
    settings: dict[str, Any] = {
        "steps": 8,
        "flow_shift": 5.0,
        "seed": 7,
        "height": 96,
        "width": 160,
    } | options
    guidance = settings.pop("guidance", GuidanceSettings(guidance_scale=scale))
    return render_latent(dit, settings.pop("condition", PROMPT), NEGATIVE, guidance=guidance, **settings)


def official_loop(scale: float, steps: int, start_step: int) -> torch.Tensor:
    """The base model's rendering, written out."""
    sigmas = inference_sigmas(steps, 5.0)
    x = initial_noise((1, 16, 3, 5), 7)
    guidance = Guidance(GuidanceSettings(guidance_scale=scale, apg_start_step_general=start_step))
    for i in range(steps):
        timestep_B = sigmas[i : i + 1] * 1000
        cond = FakeDiT.answer(x, timestep_B, torch.tensor([3 * 0.4]))
        uncond = FakeDiT.answer(x, timestep_B, torch.tensor([5 * -0.1]))
        velocity = guidance(cond, uncond, i)
        x = x - (sigmas[i] - sigmas[i + 1]) * velocity
    return x


def test_the_base_model_is_rendered_as_the_official_loop_does() -> None:
    dit = FakeDiT()
    latent = render(dit, height=96, width=160)
    assert latent.shape == (1, 16, 3, 5)
    assert latent.dtype == torch.float32
    # APG multiplies float32 rounding by 10 at steps 6 and 7
    torch.testing.assert_close(latent, official_loop(3.5, 8, 5), atol=1e-4, rtol=0)
    assert [call["t"].item() for call in dit.calls[::2]] == (inference_sigmas(8, 5.0)[:-1] * 1000).tolist()
    assert all(call["g"] is None and call["r"] is None for call in dit.calls)


def test_quoted_text_postpones_apg() -> None:
    plain, quoted = render(FakeDiT()), render(FakeDiT(), has_quoted_text=True)
    # guidance of 3.5 can multiply a step's rounding (1e-6 at this size) by up to 6, and eight steps add up
    torch.testing.assert_close(quoted, official_loop(3.5, 8, 38), atol=1e-4, rtol=0)
    assert (plain - quoted).abs().max() > 0.1


def test_no_second_pass_without_guidance() -> None:
    dit = FakeDiT()
    render(dit, scale=1.0)
    assert len(dit.calls) == 8
    assert all(torch.equal(call["text"].text_BTD, PROMPT.text_BTD) for call in dit.calls)
    render(dit := FakeDiT(), scale=0.0)
    assert len(dit.calls) == 16


def test_cond_and_uncond_in_one_call_give_the_same_image_in_half_the_calls() -> None:
    dit = FakeDiT()
    latent = render(dit, batch_cond_uncond=True)
    assert [call["batch"] for call in dit.calls] == [2] * 8
    torch.testing.assert_close(latent, render(FakeDiT()), atol=1e-4, rtol=0)  # as above
    # with guidance off the choice means nothing
    render(dit := FakeDiT(), scale=1.0, batch_cond_uncond=True)
    assert [call["batch"] for call in dit.calls] == [1] * 8


def test_a_distilled_model_is_told_scale_and_next_timestep_and_never_called_without_prompt() -> None:
    dit = FakeDiT(guidance_embed=True, meanflow=True)
    latent = render(dit, scale=3.25, flow_shift=4.0, batch_cond_uncond=True)
    assert len(dit.calls) == 8
    timesteps = (inference_sigmas(8, 4.0) * 1000).tolist()
    assert [call["t"].item() for call in dit.calls] == timesteps[:-1]
    assert [call["r"].item() for call in dit.calls] == timesteps[1:]
    assert timesteps[-1] == 0.0
    assert {call["g"].item() for call in dit.calls} == {3250.0}
    # guidance is inside the model: outside, nothing is added
    assert torch.equal(latent, render(FakeDiT(), scale=1.0, flow_shift=4.0))


def test_any_sampler_may_ask_between_the_schedules_levels() -> None:
    """A midpoint sampler, as a plugin might bring: it belongs to the step it is in."""
    dit = FakeDiT(guidance_embed=True, meanflow=True)

    def midpoint(
        denoise: Denoise, x: torch.Tensor, sigmas: torch.Tensor, callback: Callback | None, *, share: float
    ) -> torch.Tensor:
        levels = sigmas.tolist()
        for sigma, following in pairwise(levels):
            middle = sigma + share * (following - sigma)
            ahead = x + (x - denoise(x, sigma)) / sigma * (middle - sigma)
            x = x + (ahead - denoise(ahead, middle)) / middle * (following - sigma)
        return x

    render(dit, steps=4, sampler=midpoint, sampler_args={"share": 0.5})
    ends = (inference_sigmas(4, 5.0)[1:] * 1000).tolist()
    assert [call["r"].item() for call in dit.calls] == [end for end in ends for _ in range(2)]


@pytest.mark.parametrize("sampler", [euler, heun, dpmpp_2m])
def test_a_seed_gives_the_same_latent_and_another_seed_another(sampler: Callable[..., torch.Tensor]) -> None:
    first = render(FakeDiT(), sampler=sampler)
    torch.manual_seed(99)
    assert torch.equal(render(FakeDiT(), sampler=sampler), first)
    assert (render(FakeDiT(), sampler=sampler, seed=8) - first).abs().max() > 0.1


def test_progress_is_reported_and_can_end_the_rendering() -> None:
    class StopRenderingError(Exception):
        pass

    seen = []

    def callback(step: int, x: torch.Tensor, denoised: torch.Tensor) -> None:
        seen.append(step)
        if step == 3:
            raise StopRenderingError

    dit = FakeDiT()
    with pytest.raises(StopRenderingError):
        render(dit, callback=callback)
    assert seen == [0, 1, 2, 3]
    assert len(dit.calls) == 8


@pytest.mark.parametrize("options", [{"height": 100}, {"width": 0}, {"steps": 0}, {"flow_shift": -1.0}])
def test_what_cannot_be_rendered_is_refused_before_the_model_is_called(options: dict[str, Any]) -> None:
    dit = FakeDiT()
    with pytest.raises(HyimgError, match=next(iter(options)).replace("_", " ")):
        render(dit, **options)
    assert not dit.calls


ARCH = DiTArch(
    hidden=32,
    heads=2,
    head_dim=16,
    num_double=1,
    num_single=1,
    mlp_hidden=64,
    latent_channels=16,
    text_dim=8,
    byt5_dim=6,
    byt5_hidden=8,
    refiner_depth=1,
)


def test_the_distilled_model_answers_as_in_the_golden_file(
    golden_tensors: Callable[[str], dict[str, torch.Tensor]],
) -> None:
    """Case a: the first of six steps at shift 5, guidance 3.25. Tolerance 1e-5 as the golden README says."""
    golden = golden_tensors("dit_distilled.safetensors")
    weights = {
        name.removeprefix("weights."): tensor
        for name, tensor in golden.items()
        if name.startswith("weights.")
    }
    dit = DiT(DiTArch.from_shapes({name: tuple(tensor.shape) for name, tensor in weights.items()}))
    dit.load_state_dict(weights)
    text = TextCondition(golden["a.text_states"], golden["a.text_mask"].bool())
    guidance = Guidance(GuidanceSettings(guidance_scale=3.25))
    denoise = Denoiser(dit, text, None, inference_sigmas(6, 5.0), guidance)
    with torch.no_grad():
        velocity = denoise.velocity(golden["a.latent"], 1.0)
    torch.testing.assert_close(velocity, golden["a.out"], atol=1e-5, rtol=0)


def tiny_dit() -> DiT:
    torch.manual_seed(0)
    dit = DiT(ARCH)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return dit


def test_the_real_model_renders_alike_with_one_call_and_with_two() -> None:
    """1e-4: another batch size rounds differently, and guidance multiplies that."""
    dit = tiny_dit()
    prompt, negative = condition(0.4, glyphs=4), condition(-0.1, tokens=5)

    def latent(*, one_call: bool) -> torch.Tensor:
        return render_latent(
            dit,
            prompt,
            negative,
            height=64,
            width=96,
            steps=8,
            flow_shift=5.0,
            seed=1,
            guidance=GuidanceSettings(),
            batch_cond_uncond=one_call,
        )

    apart = latent(one_call=False)
    assert apart.isfinite().all()
    assert not apart.requires_grad
    torch.testing.assert_close(latent(one_call=True), apart, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_that_is_not_finite_is_a_failed_run(value: float) -> None:
    class Broken(FakeDiT):
        @staticmethod
        def answer(latent_BCHW: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return torch.full_like(latent_BCHW, value)

    with pytest.raises(RunError, match="^the latent is not finite") as caught:
        render(Broken(), scale=1.0)
    for word in ("LoRA", "`--lora_multiplier`", "`--guidance_scale`"):
        assert word in str(caught.value.hint)
    assert "fp16" not in str(caught.value.hint)
    half = PROMPT.to("cpu", torch.float16)
    with pytest.raises(RunError) as caught:
        render(Broken(), scale=1.0, condition=half)
    assert "overflowed in fp16: give `--mixed_precision bf16` or `no`" in str(caught.value.hint)


def test_a_samplers_fault_carries_the_name_that_the_user_gave() -> None:
    with pytest.raises(RunError, match="the sampler `mine` returned NoneType"):
        render(FakeDiT(), sampler=lambda *_: None, sampler_name="mine")

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hyimg.flow.guidance import Guidance, GuidanceSettings, classifier_free, rescale

Golden = dict[str, torch.Tensor]

# abs 1e-5 (tests/golden/README-lora-math.md): float32 rounding, times 10 by APG's scale
ATOL = 1e-5
# from here on every step is APG's
NO_CFG: dict[str, Any] = {"apg_start_step_general": -1, "apg_start_step_ocr": -1}


@pytest.fixture
def golden(golden_tensors: Callable[[str], Golden]) -> Golden:
    return golden_tensors("guidance.safetensors")


def run(golden: Golden, *, has_quoted_text: bool = False, **settings: Any) -> torch.Tensor:
    guidance = Guidance(GuidanceSettings(**settings), has_quoted_text=has_quoted_text)
    pairs = zip(golden["cond"], golden["uncond"], strict=True)
    return torch.stack([guidance(cond, uncond, step) for step, (cond, uncond) in enumerate(pairs)])


def test_cfg_and_its_rescaling_agree_with_the_golden_file(golden: Golden) -> None:
    for i, (cond, uncond) in enumerate(zip(golden["cond"], golden["uncond"], strict=True)):
        guided = classifier_free(cond, uncond, 3.5)
        torch.testing.assert_close(guided, golden["cfg"][i], atol=ATOL, rtol=0)
        torch.testing.assert_close(rescale(guided, cond, 0.5), golden["cfg_rescale0.5"][i], atol=ATOL, rtol=0)


def test_whole_guidance_sequences_agree_with_the_golden_file(golden: Golden) -> None:
    """12 steps each; APG's start differs for quoted text, and `guidance_rescale` works before it begins, as
    decisions.md has it with the reference tool (the official code ignores it there)."""
    sequences = {
        "mix_general_start5": run(golden),
        "mix_general_start5_scale1": run(golden, guidance_scale=1.0),
        "mix_general_start5_cfgrescale0.5_apgrescale0.5_sdscripts": run(
            golden, guidance_rescale=0.5, guidance_rescale_apg=0.5
        ),
        "mix_ocr_start8": run(golden, has_quoted_text=True, apg_start_step_ocr=8),
        "mix_ocr_start38": run(golden, has_quoted_text=True),
        "apg_from_step0": run(golden, **NO_CFG),
        "apg_from_step0_rescale0.5": run(golden, guidance_rescale_apg=0.5, **NO_CFG),
    }
    for name, sequence in sequences.items():
        assert (sequence - golden[name]).abs().max() <= ATOL, name
    # the two rules differ from step 6 on and not before
    differs = (sequences["mix_general_start5"] - sequences["mix_ocr_start38"]).abs().amax((1, 2, 3, 4)) > 1e-3
    assert differs.tolist() == [False] * 6 + [True] * 6


def test_a_second_call_at_a_step_replaces_the_first_ones_momentum(golden: Golden) -> None:
    once = run(golden, **NO_CFG)
    guidance = Guidance(GuidanceSettings(**NO_CFG))
    for step, (cond, uncond) in enumerate(zip(golden["cond"], golden["uncond"], strict=True)):
        guidance(cond + 1, uncond - 1, step)
        assert torch.equal(guidance(cond, uncond, step), once[step])


def test_images_of_a_batch_are_guided_each_for_itself(golden: Golden) -> None:
    cond = torch.cat([golden["cond"][0], 3 * golden["cond"][1]])
    uncond = torch.cat([golden["uncond"][0], golden["uncond"][1]])
    settings = GuidanceSettings(guidance_rescale_apg=0.5, **NO_CFG)
    together = Guidance(settings)(cond, uncond, 0)
    for i in range(2):
        alone = Guidance(settings)(cond[i : i + 1], uncond[i : i + 1], 0)
        torch.testing.assert_close(together[i : i + 1], alone, atol=ATOL, rtol=0)


def test_half_precision_answers_are_guided_in_float32(golden: Golden) -> None:
    cond, uncond = golden["cond"][0].bfloat16(), golden["uncond"][0].bfloat16()
    guided = Guidance(GuidanceSettings())(cond, uncond, 0)
    assert guided.dtype == torch.float32
    torch.testing.assert_close(guided, classifier_free(cond.float(), uncond.float(), 3.5))


def test_equal_answers_with_and_without_prompt_stay_as_they_are() -> None:
    answer = torch.zeros(1, 4, 2, 2)
    assert torch.equal(Guidance(GuidanceSettings(**NO_CFG))(answer, answer, 0), answer)

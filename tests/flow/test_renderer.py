from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hyimg.checkpoints.architecture import DIT_2_1, DIT_TINY
from hyimg.errors import HyimgError
from hyimg.model.dit import DiT
from hyimg.plugins import load_plugins
from hyimg.rendering.prompts import RenderDefaults, parse_prompt_line
from hyimg.rendering.render_plan import warn_of_sizes
from hyimg.rendering.renderer import attach_lora, check_loras, decide, resolve_samplers
from hyimg.report import SilentReporter

RANK = 2


def write_lora(path: Path, *modules: str, value: float = 0.5) -> Path:
    """A LoRA of Linears from hidden to hidden."""
    state = {}
    for module in modules:
        name = "lora_unet_" + module.replace(".", "_")
        state[f"{name}.lora_down.weight"] = torch.full((RANK, DIT_TINY.hidden), 0.5)
        state[f"{name}.lora_up.weight"] = torch.full((DIT_TINY.hidden, RANK), value)
        state[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(state, path)
    return path


def test_a_sampler_is_recorded_and_checked_under_its_own_name() -> None:
    plugins = load_plugins()
    (spec,) = decide([parse_prompt_line("a cat --ss Heun")], RenderDefaults(), plugins)
    assert spec.sampler == "heun"
    assert list(resolve_samplers(plugins, ["Heun", "heun"], [], DIT_TINY)) == ["heun"]
    with pytest.raises(HyimgError, match="`heun` cannot render with a distilled checkpoint"):
        resolve_samplers(plugins, ["Heun"], [], replace(DIT_TINY, meanflow=True))


def test_a_lora_of_a_deeper_model_is_refused_from_its_header(tmp_path: Path) -> None:
    inside = f"double_blocks.{DIT_TINY.num_double - 1}.img_attn_proj"
    beyond = [f"double_blocks.{DIT_TINY.num_double + n}.img_attn_proj" for n in range(2)]
    check_loras([write_lora(tmp_path / "fits.safetensors", inside)], DIT_TINY, SilentReporter())
    with pytest.raises(
        HyimgError, match=f"deep.safetensors.*`{beyond[0]}`, `{beyond[1]}`, which the DiT has not"
    ):
        check_loras([write_lora(tmp_path / "deep.safetensors", inside, *beyond)], DIT_TINY, SilentReporter())


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_lora_that_is_not_finite_is_not_attached(tmp_path: Path, value: float) -> None:
    dit = DiT(DIT_TINY)
    module = "double_blocks.0.img_attn_proj"
    path = write_lora(tmp_path / "broken.safetensors", module, value=value)
    with pytest.raises(
        HyimgError, match="broken.safetensors` holds NaN or infinity, in `lora_unet_.*lora_up.weight`"
    ):
        attach_lora(dit, path, 1.0, SilentReporter())
    assert not dit.get_submodule(module).adapters


def test_attaching_says_how_much_of_the_model_is_adapted(tmp_path: Path) -> None:
    class Listener(SilentReporter):
        def note(self, text: str) -> None:
            notes.append(text)

    notes: list[str] = []
    path = write_lora(tmp_path / "small.safetensors", "double_blocks.0.img_attn_proj")
    attach_lora(DiT(DIT_TINY), path, 0.5, Listener())
    assert notes == [f"LoRA {path}: 1 of 32 modules, multiplier 0.5"]


def test_sizes_that_2_1_was_not_made_for_are_told_once_and_of_no_other_model() -> None:
    class Listener(SilentReporter):
        def __init__(self) -> None:
            self.warnings: list[str] = []

        def warning(self, message: str) -> None:
            self.warnings.append(message)

    prompts = [
        parse_prompt_line(line) for line in ("x --w 96 --h 64", "y --w 96 --h 64", "z --w 2048 --h 2048")
    ]
    specs = decide(prompts, RenderDefaults(), load_plugins([]))
    real, tiny = Listener(), Listener()
    warn_of_sizes(specs, DIT_2_1, real)
    warn_of_sizes(specs, DIT_TINY, tiny)
    (warning,) = real.warnings
    assert "96x64 (width x height) is not one of the sizes that the model was made for" in warning
    assert tiny.warnings == []

"""From prompts to latents with one loaded DiT: what `infer`, `sample` and samples in training share.

Shapes: C latent channels, T text tokens, S glyph tokens, E byT5 width
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyimg.config.rendering import Sampling
from hyimg.errors import HyimgError
from hyimg.flow.guidance import GuidanceSettings
from hyimg.flow.prompts import BASE_DEFAULTS, DISTILLED_DEFAULTS, PromptSpec, RenderDefaults, RenderSpec
from hyimg.flow.render import render_latent
from hyimg.flow.samplers import Callback, check_sampler
from hyimg.lora.contents import LoRAContents
from hyimg.lora.network import LoRANetwork
from hyimg.model.architecture import DiTArch
from hyimg.model.conditioning import TextCondition, collate
from hyimg.model.dit import DiT
from hyimg.model.keys import linear_modules
from hyimg.plugins import Plugins, bind_arguments, parse_arguments
from hyimg.report import Reporter, count_text

# (text_TD, byt5_SE or None) of a prompt, as the encoders or the text cache give it
PromptStates = tuple[Tensor, Tensor | None]


def render_defaults(options: Sampling, arch: DiTArch) -> RenderDefaults:
    """What a command line renders with where a prompt says nothing: its flags, then the checkpoint's values."""
    own = DISTILLED_DEFAULTS if arch.guidance_embed else BASE_DEFAULTS
    height, width = options.image_size

    def first(given: Any, default: Any) -> Any:
        return default if given is None else given

    return RenderDefaults(
        width=width,
        height=height,
        steps=first(options.infer_steps, own.steps),
        guidance_scale=first(options.guidance_scale, own.guidance_scale),
        flow_shift=first(options.flow_shift, own.flow_shift),
        seed=options.seed,
        sampler=options.sampler,
    )


def decide(prompts: Sequence[PromptSpec], defaults: RenderDefaults, plugins: Plugins) -> list[RenderSpec]:
    """The prompts completed, with samplers named as their plugins spell them; HyimgError for an unknown one."""
    specs = [prompt.resolve(defaults) for prompt in prompts]
    return [replace(spec, sampler=plugins.canonical("samplers", spec.sampler)) for spec in specs]


def resolve_samplers(
    plugins: Plugins, names: Sequence[str], pairs: Sequence[str], arch: DiTArch
) -> dict[str, Callable[..., Tensor]]:
    """The samplers of those names, by their canonical names, with `--sampler_args` checked.

    Raises HyimgError before any weight is read.
    """
    arguments = parse_arguments(pairs, "--sampler_args")
    samplers = {}
    for name in dict.fromkeys(plugins.canonical("samplers", name) for name in names):
        check_sampler(name, meanflow=arch.meanflow)
        samplers[name] = plugins.resolve("samplers", name)
        bind_arguments(samplers[name], arguments, option="--sampler_args", name=name)
    return samplers


@dataclass(frozen=True)
class Renderer:
    """A DiT with everything that its renders have in common.

    `samplers` maps the canonical names that specs carry to functions; `states` maps every prompt and negative
    prompt to its encoder states, on the CPU.
    """

    dit: DiT
    options: Sampling
    samplers: Mapping[str, Callable[..., Tensor]]
    states: Mapping[str, PromptStates]
    has_quoted_text: Callable[[str], bool]
    joins: Callable[[RenderSpec], bool] = lambda spec: False
    """Whether the model is called once a step, with and without the prompt together."""

    def render(self, spec: RenderSpec, callback: Callback | None = None) -> Tensor:
        """One image's latent [1, C, height/32, width/32], scaled, float32, on the CPU."""
        guidance = GuidanceSettings(
            guidance_scale=spec.guidance_scale,
            guidance_rescale=self.options.guidance_rescale,
            guidance_rescale_apg=self.options.guidance_rescale_apg,
            apg_start_step_general=self.options.apg_start_step_general,
            apg_start_step_ocr=self.options.apg_start_step_ocr,
        )
        guides = guidance.needs_uncond and not self.dit.arch.guidance_embed
        latent_BCHW = render_latent(
            self.dit,
            self._condition(spec.prompt),
            self._condition(spec.negative_prompt) if guides else None,
            height=spec.height,
            width=spec.width,
            steps=spec.steps,
            flow_shift=spec.flow_shift,
            seed=spec.seed,
            guidance=guidance,
            has_quoted_text=self.has_quoted_text(spec.prompt),
            sampler=self.samplers[spec.sampler],
            sampler_name=spec.sampler,
            sampler_args=parse_arguments(self.options.sampler_args, "--sampler_args"),
            batch_cond_uncond=self.joins(spec),
            callback=callback,
        )
        return latent_BCHW.cpu()

    def _condition(self, prompt: str) -> TextCondition:
        return collate([self.states[prompt]]).to(self.dit.device, self.dit.dtype)


def prompts_to_encode(specs: Sequence[PromptSpec] | Sequence[RenderSpec]) -> list[str]:
    """Every distinct prompt and negative prompt, the empty one where none was given."""
    return list(dict.fromkeys(text for spec in specs for text in (spec.prompt, spec.negative_prompt or "")))


def lora_multipliers(paths: Sequence[Path], multipliers: Sequence[float]) -> list[float]:
    """A multiplier for each LoRA file: as given, one for all, or 1; raises HyimgError where the counts differ."""
    if len(multipliers) > 1 and len(multipliers) != len(paths):
        raise HyimgError(
            f"{len(multipliers)} values of `--lora_multiplier` for {count_text(len(paths), 'LoRA file')}",
            hint="give one for each file, one for all, or none (1)",
        )
    if multipliers and not paths:
        raise HyimgError("`--lora_multiplier` without `--lora_weight`", hint="name the LoRA file too")
    return (
        list(multipliers) * len(paths) if len(multipliers) == 1 else list(multipliers) or [1.0] * len(paths)
    )


@torch.no_grad()
def attach_lora(
    dit: DiT, path: Path, multiplier: float, report: Reporter, network: LoRANetwork | None = None
) -> LoRANetwork:
    """Lets a LoRA file act on a DiT beside its weights; `detach` on what is returned takes it off again.

    `network` is what was read of the file already. Raises HyimgError for a file that does not fit, or whose weights
    are not finite.
    """
    network = network or LoRANetwork.from_file(path, dit)
    network.to(dit.device).requires_grad_(False)
    network.set_multiplier(multiplier)
    network.attach(dit)
    report.note(
        f"LoRA {path}: {len(network.plan)} of {len(linear_modules(dit.arch))} modules, multiplier {multiplier:g}"
    )
    return network


def check_loras(paths: Sequence[Path], arch: DiTArch) -> None:
    """Reads the headers of LoRA files.

    Raises HyimgError for one that is damaged, of a model of another width, or with modules that the DiT lacks.
    """
    for path in paths:
        check_contents(LoRAContents.open(path), arch)


def check_contents(contents: LoRAContents, arch: DiTArch) -> None:
    """The same for a LoRA file whose header was read already."""
    path, hidden = contents.path, contents.hidden
    if hidden != arch.hidden:
        raise HyimgError(
            f"`{path}` is a LoRA for a model of width {hidden}, and the DiT's is {arch.hidden}",
            hint="give a LoRA that was trained on this model",
        )
    known = {module.name for module in linear_modules(arch)}
    strange = [module.name for module in contents.modules if module.name not in known]
    if strange:
        more = f" and {len(strange) - 1} more like it" if len(strange) > 1 else ""
        raise HyimgError(
            f"`{path}` is a LoRA for a deeper model: it adapts `{strange[0]}`{more}, which the DiT has not "
            f"({arch.num_double} double and {arch.num_single} single blocks)",
            hint="give a LoRA that was trained on this model",
        )


def settings_of(
    spec: RenderSpec,
    options: Sampling,
    mixed_precision: str,
    dit: Path,
    loras: Sequence[Mapping[str, object]],
) -> dict[str, object]:
    """Everything that an image was made with, as its PNG tells it; `loras` with file name, hash, multiplier."""
    return {
        "prompt": spec.prompt,
        "negative_prompt": spec.negative_prompt,
        "width": spec.width,
        "height": spec.height,
        "infer_steps": spec.steps,
        "guidance_scale": spec.guidance_scale,
        "flow_shift": spec.flow_shift,
        "seed": spec.seed,
        "sampler": spec.sampler,
        "sampler_args": list(options.sampler_args),
        "apg_start_step_general": options.apg_start_step_general,
        "apg_start_step_ocr": options.apg_start_step_ocr,
        "guidance_rescale": options.guidance_rescale,
        "guidance_rescale_apg": options.guidance_rescale_apg,
        "mixed_precision": mixed_precision,
        "dit": dit.name,
        "loras": [dict(lora) for lora in loras],
    }

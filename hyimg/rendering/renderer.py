"""From prompts to latents with one loaded DiT: what `infer`, `sample` and samples in training share.

Shapes: C latent channels, T text tokens, S glyph tokens, E byT5 width

One prompt's embeddings to one latent: the model, guidance and a sampler joined.

Two kinds of checkpoint are rendered. The base model is called with and without the prompt and guided from
outside. A distilled model has guidance built in (the scale is an input) and, being a mean-flow model, gets
where its step ends; it is never called without the prompt.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from hyimg.cache.prompt_embeddings import PromptEmbedding
from hyimg.checkpoints.architecture import DiTArch
from hyimg.checkpoints.names import linear_modules
from hyimg.config.rendering import Sampling
from hyimg.errors import HyimgError, RunError, first_few
from hyimg.flow.guidance import Guidance, GuidanceSettings
from hyimg.flow.samplers import Callback, Sampler, check_sampler, euler, run_sampler
from hyimg.flow.targets import initial_noise
from hyimg.flow.timesteps import NUM_TRAIN_TIMESTEPS, inference_sigmas, timesteps
from hyimg.lora.files.stored import LoRAFile
from hyimg.lora.network import AdapterNetwork
from hyimg.model.dit import DiT, TextCondition, collate
from hyimg.plugins import Plugins
from hyimg.plugins.arguments import bind_arguments, parse_arguments
from hyimg.rendering.prompts import (
    BASE_DEFAULTS,
    DISTILLED_DEFAULTS,
    SIZE_MULTIPLE,
    PromptSpec,
    RenderDefaults,
    RenderSpec,
    check_size,
)
from hyimg.report import Reporter

# Shapes: B batch (1 here, 2 in a joined call), C latent channels, H W latent height and width


class VelocityModel(Protocol):
    """What rendering needs of a DiT: its architecture and its call."""

    @property
    def arch(self) -> DiTArch: ...

    def __call__(
        self,
        latent_BCHW: Tensor,
        timestep_B: Tensor,
        text: TextCondition,
        *,
        guidance_B: Tensor | None = None,
        timestep_r_B: Tensor | None = None,
    ) -> Tensor: ...


class Denoiser:
    """The function that samplers see: `(x_BCHW, sigma) -> estimate of the clean latent`, float32.

    A sampler may ask at any noise level; the step that it belongs to is the interval of `sigmas` that holds
    it. That step decides which guidance applies and where a mean-flow model's step ends.
    """

    def __init__(
        self,
        dit: VelocityModel,
        condition: TextCondition,
        uncond: TextCondition | None,
        sigmas: Tensor,
        guidance: Guidance,
        *,
        batch_cond_uncond: bool = False,
    ) -> None:
        arch = dit.arch
        self.dit = dit
        self.guidance = guidance
        self.guides = guidance.settings.needs_uncond and not arch.guidance_embed
        assert uncond is not None or not self.guides, "guidance needs the negative prompt's embeddings"
        self.condition = condition
        self.uncond = uncond if self.guides else None
        self.joined = _join(condition, self.uncond) if batch_cond_uncond and self.uncond else None
        self._levels = sigmas.tolist()
        self._rising = [-level for level in self._levels]

    def __call__(self, x_BCHW: Tensor, sigma: float) -> Tensor:
        return x_BCHW - sigma * self.velocity(x_BCHW, sigma)

    def velocity(self, x_BCHW: Tensor, sigma: float) -> Tensor:
        """The guided velocity at x, float32."""
        step = self.step_at(sigma)
        if self.uncond is None:
            return self._predict(x_BCHW, sigma, step, self.condition)
        if self.joined is not None:
            both_BCHW = self._predict(torch.cat([x_BCHW, x_BCHW]), sigma, step, self.joined)
            cond_BCHW, uncond_BCHW = both_BCHW.chunk(2)
        else:
            cond_BCHW = self._predict(x_BCHW, sigma, step, self.condition)
            uncond_BCHW = self._predict(x_BCHW, sigma, step, self.uncond)
        return self.guidance(cond_BCHW, uncond_BCHW, step)

    def step_at(self, sigma: float) -> int:
        """The step, from 0, that starts at or last before the noise level `sigma`."""
        last_step = len(self._levels) - 2
        return min(max(bisect_right(self._rising, -sigma) - 1, 0), last_step)

    def _predict(self, x_BCHW: Tensor, sigma: float, step: int, text: TextCondition) -> Tensor:
        arch = self.dit.arch
        sigma_B = torch.full((x_BCHW.shape[0],), sigma, dtype=torch.float32, device=x_BCHW.device)
        # the scale is passed times 1000 like a timestep, in float32: bfloat16 would round 3250 to 3248
        scale = self.guidance.settings.guidance_scale
        guidance_B = torch.full_like(sigma_B, scale * 1000) if arch.guidance_embed else None
        end_B = torch.full_like(sigma_B, self._levels[step + 1]) if arch.meanflow else None
        return self.dit(
            x_BCHW,
            timesteps(sigma_B),
            text,
            guidance_B=guidance_B,
            timestep_r_B=None if end_B is None else timesteps(end_B),
        ).float()


@torch.no_grad()
def render_latent(
    dit: VelocityModel,
    condition: TextCondition,
    uncond: TextCondition | None,
    *,
    height: int,
    width: int,
    steps: int,
    flow_shift: float,
    seed: int,
    guidance: GuidanceSettings,
    has_quoted_text: bool = False,
    sampler: Sampler = euler,
    sampler_name: str = "euler",
    sampler_args: Mapping[str, object] = MappingProxyType({}),
    batch_cond_uncond: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Render one image's latent, [1, C, height / 32, width / 32], scaled, float32, on the condition's device.

    Args:
        dit: the model; the architecture says whether it is distilled.
        condition, uncond: embeddings of the prompt and of the negative prompt, a batch of one each, on the
            model's device. `uncond` is not used at guidance scale 1 nor by a distilled model.
        height, width: pixels, multiples of 32.
        seed: the initial noise; drawn on the CPU, so alike on every device.
        guidance: for a distilled model only `guidance_scale` is used.
        has_quoted_text: whether the prompt holds text to write, which postpones APG.
        sampler, sampler_name, sampler_args: the sampler, what an error calls it, and its keyword arguments.
        batch_cond_uncond: one model call with both embeddings in place of two calls: faster, more memory, and
            equal within the tolerance of another batch size only.
        callback: `(step, x, estimate)` after every step; what it raises ends the rendering.

    Raises HyimgError for a size, step number or shift that cannot be rendered, and RunError for a sampler that
    fails and for a latent that is not finite.
    """
    check_size(height, "height")
    check_size(width, "width")
    sigmas = inference_sigmas(steps, flow_shift)
    denoise = Denoiser(
        dit,
        condition,
        uncond,
        sigmas,
        Guidance(guidance, has_quoted_text=has_quoted_text),
        batch_cond_uncond=batch_cond_uncond,
    )
    shape = (1, dit.arch.latent_channels, height // SIZE_MULTIPLE, width // SIZE_MULTIPLE)
    noise_BCHW = initial_noise(shape, seed).to(condition.text_BTD.device)
    latent_BCHW = run_sampler(sampler, sampler_name, denoise, noise_BCHW, sigmas, callback, sampler_args)
    if not torch.isfinite(latent_BCHW).all():
        is_fp16 = condition.text_BTD.dtype == torch.float16
        raise RunError(
            f"the latent is not finite (NaN or infinity) after {steps} steps of the sampler `{sampler_name}`",
            hint=("values may have overflowed in fp16: give `--mixed_precision bf16` or `no`, or " * is_fp16)
            + "leave the LoRA out or lower its `--lora_multiplier`, or lower `--guidance_scale`",
        )
    return latent_BCHW


def _join(condition: TextCondition, uncond: TextCondition) -> TextCondition:
    """Two conditions of one row each as one of two rows, each row's valid tokens only."""
    return collate([_row(condition), _row(uncond)])


def _row(condition: TextCondition) -> PromptEmbedding:
    """The valid tokens of a condition with one row."""
    text_TD = condition.text_BTD[0][condition.text_mask_BT[0]]
    if condition.byt5_BSE is None or condition.byt5_mask_BS is None:
        return PromptEmbedding(text_TD)
    byt5_SE = condition.byt5_BSE[0][condition.byt5_mask_BS[0]]
    return PromptEmbedding(text_TD, byt5_SE if len(byt5_SE) else None)


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


def describe_preset(options: Sampling, specs: Sequence[RenderSpec]) -> str | None:
    """What `--preset` has come to, in a line; None without one."""
    if options.preset is None or not specs:
        return None

    def each(name: str) -> str:
        return ", ".join(
            dict.fromkeys(
                f"{value:g}" if isinstance(value, float) else str(value)
                for value in (getattr(spec, name) for spec in specs)
            )
        )

    start = min(options.apg_start_step_general, options.apg_start_step_ocr)
    apg = "no APG" if all(start >= spec.steps - 1 for spec in specs) else f"APG after step {start}"
    line = (
        f"preset {options.preset}: sampler {each('sampler')}, shift {each('flow_shift')}, "
        f"guidance {each('guidance_scale')}, {apg}"
    )
    uneven = dict.fromkeys(spec.steps for spec in specs if NUM_TRAIN_TIMESTEPS % spec.steps)
    if uneven:
        line += (
            f"; at {', '.join(map(str, uneven))} steps ComfyUI's noise levels differ a little, since "
            f"{NUM_TRAIN_TIMESTEPS} is no multiple of that"
        )
    return line


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
    prompt to its embedding, on the CPU.
    """

    dit: DiT
    options: Sampling
    samplers: Mapping[str, Callable[..., Tensor]]
    states: Mapping[str, PromptEmbedding]
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


@torch.no_grad()
def attach_lora(
    dit: DiT, path: Path, multiplier: float, report: Reporter, network: AdapterNetwork | None = None
) -> AdapterNetwork:
    """Applies a LoRA file to a DiT live, without changing its weights; `detach` of the result removes it.

    `network` is what was read of the file already. Raises HyimgError for a file that does not fit, or whose weights
    are not finite.
    """
    network = network or AdapterNetwork.read(path, dit.arch)
    network.to(dit.device).requires_grad_(False)
    network.set_multiplier(multiplier)
    network.attach(dit)
    report.note(
        f"LoRA {path}: {len(network.plan)} of {len(linear_modules(dit.arch))} modules, multiplier {multiplier:g}"
    )
    return network


def check_loras(paths: Sequence[Path], arch: DiTArch, report: Reporter) -> None:
    """Reads the headers of LoRA files; warns where a file does not say how strongly it acts.

    Raises HyimgError for one that is damaged, of a model of another width, or with modules that the DiT lacks.
    """
    for path in dict.fromkeys(paths):
        file = LoRAFile.open(path)
        check_lora_file(file, arch)
        for warning in file.warnings():
            report.warning(warning)


def check_lora_file(file: LoRAFile, arch: DiTArch) -> None:
    """The same for a LoRA file whose header was read already."""
    path, hidden = file.path, file.hidden
    if hidden != arch.hidden:
        raise HyimgError(
            f"`{path}` is a LoRA for a model of width {hidden}, and the DiT's is {arch.hidden}",
            hint="give a LoRA that was trained on this model",
        )
    known = {module.name for module in linear_modules(arch)}
    strange = [name for name in file.module_names if name not in known]
    if strange:
        names = first_few([f"`{name}`" for name in strange])
        raise HyimgError(
            f"`{path}` is a LoRA for a deeper model: it adapts {names}, which the DiT has not "
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

"""What a training step minimises: from a batch of cache entries to one loss per image, and output preservation.

Every draw (posterior, noise, timestep, perturbation) is keyed by (seed, epoch, sample, repeat), so an image's
loss does not depend on the other images of its batch, on the device or on earlier training.

Shapes: B batch, C latent channels, H W latent height and width
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from hyimg.cache.prompt_embeddings import PromptEmbedding, TextStore
from hyimg.config.training import ClassCaptions, FlowMatching
from hyimg.config.training import Preservation as PreservationOptions
from hyimg.data.batches import LoadedBatch
from hyimg.data.samples import EMPTY_PROMPT, Sample, check_class_captions, class_caption, class_captions
from hyimg.errors import HyimgError, RunError
from hyimg.flow.losses import LossContext
from hyimg.flow.targets import (
    add_noise,
    apply_prediction_type,
    ip_noise_strength,
    latent_noise,
    loss_weighting,
    perturb_noise,
    velocity_target,
)
from hyimg.flow.timesteps import TimestepContext, TimestepSampler, draw, sample_sigmas, timesteps
from hyimg.lora.network import AdapterNetwork
from hyimg.model.dit import DiT, TextCondition, collate
from hyimg.plugins.guard import check_tensor, guarded
from hyimg.report import Reporter, count_text

Loss = Callable[[Tensor, Tensor, LossContext], Tensor]

DISTILLED_GUIDANCE = 3.25
"""The guidance scale given to a distilled model, as in rendering (official default)."""


@dataclass(frozen=True)
class NoisedBatch:
    """The keyed draws of a batch, float32 on the CPU: clean latent, noise, the noise to mix in, and sigma (0..1)."""

    latent_BCHW: Tensor
    noise_BCHW: Tensor
    mixed_noise_BCHW: Tensor
    sigma_B: Tensor

    def noisy(self) -> Tensor:
        """The model's input, float32 BCHW."""
        return add_noise(self.latent_BCHW, self.mixed_noise_BCHW, self.sigma_B)


@dataclass(frozen=True)
class Objective:
    """The loss of a DiT on a batch. `posterior_mean` uses the VAE's mean instead of a posterior sample."""

    dit: DiT
    loss: Loss
    timestep_sampler: TimestepSampler
    flow: FlowMatching
    seed: int
    posterior_mean: bool = False

    def __call__(self, batch: LoadedBatch, epoch: int) -> tuple[Tensor, Tensor]:
        """(loss_B, sigma_B): each image's weighted loss, on the DiT's device with its graph, and its noise level
        (0..1), on the CPU; float32."""
        drawn = self.draw(batch, epoch)
        mask_BHW = batch.alpha_mask_BHW
        weight_map_B1HW = None if mask_BHW is None else mask_BHW[:, None]
        loss_B = self.evaluate(drawn, collate(batch.text), weight_map_B1HW)
        return loss_B * batch.weights_B.to(loss_B.device), drawn.sigma_B

    def draw(self, batch: LoadedBatch, epoch: int | str) -> NoisedBatch:
        """All random values of a batch, by key; `epoch` is a word outside of training ("validation")."""
        samples = list(zip(batch.sample_keys, batch.repeats, strict=True))
        keys = [(self.seed, epoch, key, repeat) for key, repeat in samples]
        shape = batch.mean_BCHW.shape[1:]
        latent_BCHW = batch.mean_BCHW
        if not self.posterior_mean:
            posterior_BCHW = torch.stack([latent_noise(shape, *key, purpose="posterior") for key in keys])
            latent_BCHW = latent_BCHW + batch.std_BCHW * posterior_BCHW
        noise_BCHW = torch.stack([latent_noise(shape, *key) for key in keys])
        mixed_BCHW = noise_BCHW
        if self.flow.ip_noise_gamma:
            random = self.flow.ip_noise_gamma_random_strength
            gammas = [ip_noise_strength(self.flow.ip_noise_gamma, *key, random=random) for key in keys]
            extra_BCHW = torch.stack([latent_noise(shape, *key, purpose="ip_noise") for key in keys])
            mixed_BCHW = perturb_noise(noise_BCHW, extra_BCHW, torch.tensor(gammas))
        sigma_B = sample_sigmas(
            self.timestep_sampler,
            draw(self.seed, epoch, samples),
            timestep_context(self.flow, *shape[-2:]),
            min_timestep=self.flow.min_timestep,
            max_timestep=self.flow.max_timestep,
        )
        return NoisedBatch(latent_BCHW, noise_BCHW, mixed_BCHW, sigma_B)

    def evaluate(
        self, drawn: NoisedBatch, text: TextCondition, weight_map_B1HW: Tensor | None = None
    ) -> Tensor:
        """loss_B for given draws, float32 on the DiT's device, weighted by noise level but not by sample.

        Raises RunError if the loss function, possibly a plugin's, raises or does not return one value per image.
        """
        device = self.dit.device
        sigma_B = drawn.sigma_B.to(device)
        noisy_BCHW = drawn.noisy().to(device)
        target_BCHW = velocity_target(drawn.latent_BCHW, drawn.noise_BCHW).to(device)
        answer_BCHW = self.predict(noisy_BCHW, sigma_B, text.to(device, self.dit.dtype)).float()
        prediction_BCHW = apply_prediction_type(
            answer_BCHW,
            noisy_BCHW,
            sigma_B,
            self.flow.model_prediction_type,  # type: ignore[arg-type]
        )
        weight_map_B1HW = None if weight_map_B1HW is None else weight_map_B1HW.to(device)
        context = LossContext(sigma_B, timesteps(sigma_B), weight_map_B1HW)
        with guarded("the loss failed", hint="fix the plugin", error=RunError):
            loss_B = self.loss(prediction_BCHW, target_BCHW, context)
        hint = "a loss is `(prediction, target, context) -> (B,)`, differentiable"
        check_tensor(loss_B, sigma_B.shape, "the loss returned", hint=hint, error=RunError)
        if loss_B.requires_grad != prediction_BCHW.requires_grad:
            raise RunError("the loss returned a value without a gradient", hint=hint)
        return loss_B * loss_weighting(sigma_B, self.flow.weighting_scheme, self.flow.model_prediction_type)

    def predict(self, noisy_BCHW: Tensor, sigma_B: Tensor, text: TextCondition) -> Tensor:
        """The DiT's output BCHW, in its dtype. A distilled model gets guidance 3.25, and its start time as end time."""
        arch = self.dit.arch
        timestep_B = timesteps(sigma_B)
        guidance_B = torch.full_like(timestep_B, DISTILLED_GUIDANCE * 1000) if arch.guidance_embed else None
        answer: Tensor = self.dit(
            noisy_BCHW,
            timestep_B,
            text,
            guidance_B=guidance_B,
            timestep_r_B=timestep_B if arch.meanflow else None,
        )
        return answer


def timestep_context(flow: FlowMatching, latent_height: int, latent_width: int) -> TimestepContext:
    """The context of a timestep sampler for a batch of that latent size."""
    return TimestepContext(
        latent_height=latent_height,
        latent_width=latent_width,
        sigmoid_scale=flow.sigmoid_scale,
        discrete_flow_shift=flow.discrete_flow_shift,
        weighting_scheme=flow.weighting_scheme,
        logit_mean=flow.logit_mean,
        logit_std=flow.logit_std,
        mode_scale=flow.mode_scale,
    )


# The weight of a preservation loss, and the prompt that it uses in place of an image's own
PreservationTerm = tuple[float, Callable[[str], str]]

_CACHED_PROMPTS = 64


@dataclass(frozen=True)
class OutputPreservation:
    """Output preservation: a loss that holds the adapted model to the base model where the LoRA should change nothing.

    At the same noisy latent and time, the adapted model's output for another prompt is compared with the base
    model's: for the empty prompt (`--blank_prompt_preservation`), or for the caption with the class instead of the
    trigger word, "a woman in a park" for "ohwx woman in a park" (`--diff_output_preservation`). Both follow
    ai-toolkit, and so does the loss, the mean squared difference. Each adds two forward passes and one backward pass
    per batch. `read` returns the prompt embedding of a prompt.
    """

    objective: Objective
    network: AdapterNetwork
    terms: Sequence[PreservationTerm]
    read: Callable[[str], PromptEmbedding]

    def losses(self, batch: LoadedBatch, epoch: int) -> Iterator[Tensor]:
        """loss_B of each term, weighted, float32, with its graph.

        Call backward on each before taking the next, so that only one graph is held. Noise and timesteps are those
        of the objective; the network must have the batch's multiplier and dropout key.
        """
        if not self.terms:
            return
        dit = self.objective.dit
        drawn = self.objective.draw(batch, epoch)
        noisy_BCHW, sigma_B = drawn.noisy().to(dit.device), drawn.sigma_B.to(dit.device)
        for weight, prompt_for in self.terms:
            text = collate([self.read(prompt_for(prompt)) for prompt in batch.prompts])
            text = text.to(dit.device, dit.dtype)
            with torch.no_grad(), self.network.disabled():
                base_BCHW = self.objective.predict(noisy_BCHW, sigma_B, text).float()
            answer_BCHW = self.objective.predict(noisy_BCHW, sigma_B, text).float()
            yield weight * (answer_BCHW - base_BCHW).square().mean(dim=(1, 2, 3))


def preservation_terms(options: PreservationOptions, captions: ClassCaptions) -> list[PreservationTerm]:
    """The losses that the options ask for; a weight of 0 disables one."""
    terms: list[PreservationTerm] = []
    if weight := options.blank_prompt_preservation:
        terms.append((weight, lambda prompt: EMPTY_PROMPT))
    if weight := options.diff_output_preservation:
        terms.append((weight, partial(class_caption, options=captions)))
    return terms


def check_preservation(options: PreservationOptions, captions: ClassCaptions, report: Reporter) -> None:
    """Reports what preservation costs; raises HyimgError if the class captions are missing."""
    check_class_captions(captions)
    if options.diff_output_preservation and captions.trigger_word is None:
        raise HyimgError(
            "`--diff_output_preservation` needs `--trigger_word` and `--diff_output_preservation_class`",
            hint="give the trigger word, and the class of what it names, such as `woman` or `style`",
        )
    if terms := preservation_terms(options, captions):
        # a forward pass costs 1, a backward pass at least 1: 2 become 2 + 3 for each term
        report.note(
            "output preservation adds two forward passes and one backward pass for each of its "
            f"{count_text(len(terms), 'term')}: a step takes about {1 + 1.5 * len(terms):g} times as long"
        )


def class_captions_to_read(
    options: PreservationOptions, captions: ClassCaptions, samples: Sequence[Sample], report: Reporter
) -> list[str]:
    """The prompts that preservation needs in addition to the captions; raises HyimgError as `class_captions`."""
    if not options.diff_output_preservation:
        return []
    trigger_word = captions.trigger_word or ""
    lacking = [s for s in samples if not any(trigger_word in prompt for prompt in s.prompts)]
    prompts = class_captions(samples, captions)
    if lacking:
        report.warning(
            f"`{trigger_word}` is not in the captions of {count_text(len(lacking), 'image')}, the first "
            f"`{lacking[0].image_path}`: their content is trained and preserved at the same time"
        )
    return prompts


def class_caption_flags(options: PreservationOptions, captions: ClassCaptions) -> str:
    """The flags with which cache-text caches these prompts too."""
    if not options.diff_output_preservation:
        return ""
    flags = {
        "trigger_word": captions.trigger_word,
        "diff_output_preservation_class": captions.diff_output_preservation_class,
    }
    return "".join(f" --{name} {shlex.quote(value or '')}" for name, value in flags.items())


def prompt_reader(store: TextStore) -> Callable[[str], PromptEmbedding]:
    """Reads prompt embeddings from the text cache and keeps the most recent ones."""
    return lru_cache(maxsize=_CACHED_PROMPTS)(store.read)

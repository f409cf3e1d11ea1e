"""Output preservation: a loss that keeps what the base model does where the adapter has no business.

For each image the adapted model's answer to another prompt is held to the base's own, at the same noisy
latent and time: to the empty prompt (`--blank_prompt_preservation`), or to the caption of the class, "a woman
in a park" for "ohwx woman in a park" (`--diff_output_preservation`). Both are ai-toolkit's, with its loss, the
mean square of the difference. Each costs two forward passes and one backward pass more for every batch.

Shapes: B batch, C latent channels, H W latent height and width
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from hyimg.cache.text import TextStore
from hyimg.config.commands import TrainConfig
from hyimg.data.class_captions import check_class_captions, class_caption, class_captions
from hyimg.data.sample import EMPTY_PROMPT, Sample
from hyimg.data.training_data import LoadedBatch
from hyimg.errors import HyimgError
from hyimg.lora.network import LoRANetwork
from hyimg.model.conditioning import collate
from hyimg.report import Reporter, count_text
from hyimg.training.objective import Objective

REMEMBERED_PROMPTS = 64

PromptStates = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Term:
    """One thing to preserve: the weight of its loss, and which prompt it asks about for an image's own."""

    weight: float
    prompt_for: Callable[[str], str]


@dataclass(frozen=True)
class Preservation:
    """The terms of a run. `read` gives a prompt's encoder states, as the text cache has them."""

    objective: Objective
    network: LoRANetwork
    terms: Sequence[Term]
    read: Callable[[str], PromptStates]

    def losses(self, batch: LoadedBatch, epoch: int) -> Iterator[Tensor]:
        """loss_B of each term with its graph, weighted, float32.

        To be taken backward before the next is asked for, so that one graph at a time is held. The noise and
        times are those of the objective, and the network is to have the multiplier and dropout key of the batch.
        """
        if not self.terms:
            return
        dit = self.objective.dit
        drawn = self.objective.draw(batch, epoch)
        noisy_BCHW, sigma_B = drawn.noisy().to(dit.device), drawn.sigma_B.to(dit.device)
        for term in self.terms:
            states = [self.read(term.prompt_for(prompt)) for prompt in batch.prompts]
            text = collate(states).to(dit.device, dit.dtype)
            with torch.no_grad(), self.network.silenced():
                base_BCHW = self.objective.predict(noisy_BCHW, sigma_B, text).float()
            answer_BCHW = self.objective.predict(noisy_BCHW, sigma_B, text).float()
            yield term.weight * (answer_BCHW - base_BCHW).square().mean(dim=(1, 2, 3))


def terms_of(config: TrainConfig) -> list[Term]:
    """What the options ask to preserve; a weight of 0 is none."""
    terms = []
    if weight := config.preservation.blank_prompt_preservation:
        terms.append(Term(weight, lambda prompt: EMPTY_PROMPT))
    if weight := config.preservation.diff_output_preservation:
        terms.append(Term(weight, partial(class_caption, options=config.class_captions)))
    return terms


def check_preservation(config: TrainConfig, report: Reporter) -> None:
    """Says what preservation costs; raises HyimgError where the class captions are not told."""
    check_class_captions(config.class_captions)
    terms = terms_of(config)
    told = config.class_captions.trigger_word is not None
    if config.preservation.diff_output_preservation and not told:
        raise HyimgError(
            "`--diff_output_preservation` needs `--trigger_word` and `--diff_output_preservation_class`",
            hint="give the word that names what is trained, and the class that it is of: `woman`, `style`",
        )
    if told and not config.preservation.diff_output_preservation:
        report.warning("`--trigger_word` has no effect without `--diff_output_preservation`")
    if terms:
        # a forward pass costs one, a backward pass at least one: 2 become 2 + 3 for each term
        report.note(
            f"output preservation takes two more forward passes and one more backward pass for each of its "
            f"{count_text(len(terms), 'term')}: a step takes about {1 + 1.5 * len(terms):g} times as long"
        )


def class_captions_to_read(config: TrainConfig, samples: Sequence[Sample], report: Reporter) -> list[str]:
    """The prompts that preservation reads beside the captions; raises HyimgError as `class_captions`."""
    if not config.preservation.diff_output_preservation:
        return []
    trigger_word = config.class_captions.trigger_word or ""
    lacking = [s for s in samples if not any(trigger_word in prompt for prompt in s.prompts)]
    prompts = class_captions(samples, config.class_captions)
    if lacking:
        report.warning(
            f"`{trigger_word}` is not in the captions of {count_text(len(lacking), 'image')}, the first "
            f"`{lacking[0].image_path}`: what they show is held to the base's and trained at once"
        )
    return prompts


def class_caption_flags(config: TrainConfig) -> str:
    """The flags with which cache-text caches them too."""
    options = config.class_captions
    if not config.preservation.diff_output_preservation:
        return ""
    flags = {
        "trigger_word": options.trigger_word,
        "diff_output_preservation_class": options.diff_output_preservation_class,
    }
    return "".join(f" --{name} {shlex.quote(value or '')}" for name, value in flags.items())


def reader(store: TextStore) -> Callable[[str], PromptStates]:
    """Reads prompts from the text cache, and keeps those that it read last."""

    @lru_cache(maxsize=REMEMBERED_PROMPTS)
    def read(prompt: str) -> PromptStates:
        entry = store.read(prompt)
        return entry.text_TD, entry.byt5_SE

    return read

"""Output preservation: its loss by hand, what it reads, what it costs, and what it keeps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hyimg.checkpoints.architecture import DIT_TINY
from hyimg.config.commands import CacheTextConfig, TrainConfig
from hyimg.config.load import make
from hyimg.config.training import ClassCaptions
from hyimg.data.samples import class_caption, class_captions
from hyimg.errors import HyimgError
from hyimg.model.dit import collate
from hyimg.report import SilentReporter
from hyimg.stages.cache_text import cache_text
from hyimg.training.objective import NoisedBatch, OutputPreservation, class_captions_to_read
from hyimg.training.preparation import open_training_workspace, prepare

CLASS = {"trigger_word": "cat", "diff_output_preservation_class": "animal"}


class Listener(SilentReporter):
    """Keeps what is said."""

    def __init__(self):
        self.notes, self.warnings = [], []

    def note(self, text):
        self.notes.append(text)

    def warning(self, text):
        self.warnings.append(text)


class Doubling:
    """A stand-in for objective and DiT: the answer is the prompt's number, and the adapter adds w to it."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        self.dit = self
        self.w = torch.nn.Parameter(torch.tensor(3.0))
        self.multiplier = 1.0
        self.asked = []

    def draw(self, batch, epoch):
        zeros = torch.zeros(len(batch.prompts), 1, 2, 2)
        return NoisedBatch(zeros, zeros, zeros, torch.full((len(batch.prompts),), 0.5))

    def predict(self, noisy_BCHW, sigma_B, text):
        self.asked.append((text.text_BTD[:, 0, 0].tolist(), self.multiplier, torch.is_grad_enabled()))
        answer_B = text.text_BTD[:, 0, 0] + (self.multiplier * self.w if self.multiplier else 0)
        return answer_B[:, None, None, None].expand_as(noisy_BCHW)

    def disabled(self):
        class Block:
            __enter__ = lambda _: setattr(self, "multiplier", 0.0)  # noqa: E731
            __exit__ = lambda *_: setattr(self, "multiplier", 1.0)  # noqa: E731

        return Block()


def test_the_loss_is_the_weighted_square_of_what_the_adapter_changes_at_the_other_prompt():
    fake = Doubling()
    states = {"": 7.0, "a woman": 5.0, "a sks": 1.0}
    terms = [(0.5, lambda prompt: ""), (2.0, lambda prompt: prompt.replace("sks", "woman"))]
    own = OutputPreservation(fake, fake, terms, lambda prompt: (torch.full((1, 1), states[prompt]), None))
    losses = own.losses(SimpleNamespace(prompts=("a sks", "a woman")), 1)
    blank_B = next(losses)
    assert len(fake.asked) == 2, "the second term is not computed before the first is taken"
    assert blank_B.tolist() == [0.5 * 9, 0.5 * 9]
    blank_B.sum().backward()
    assert float(fake.w.grad) == 2 * 0.5 * 2 * 3
    assert next(losses).tolist() == [2 * 9, 2 * 9]
    assert fake.asked == [
        ([7.0, 7.0], 0.0, False),
        ([7.0, 7.0], 1.0, True),
        ([5.0, 5.0], 0.0, False),
        ([5.0, 5.0], 1.0, True),
    ]


def test_without_terms_nothing_is_drawn():
    assert list(OutputPreservation(None, None, [], None).losses(None, 1)) == []


def test_the_class_takes_the_triggers_place_everywhere():
    options = ClassCaptions(trigger_word="ohwx woman", diff_output_preservation_class="woman")
    assert class_caption("ohwx woman, an ohwx woman's hat", options) == "woman, an woman's hat"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trigger_word": "cat"}, "`--trigger_word` without `--diff_output_preservation_class`"),
        ({"diff_output_preservation_class": "cat"}, "without `--trigger_word`"),
        ({"trigger_word": " ", "diff_output_preservation_class": "cat"}, "is empty"),
        ({"trigger_word": "cat", "diff_output_preservation_class": "cat"}, "are both `cat`"),
        ({"trigger_word": "dog", "diff_output_preservation_class": "cat"}, "no caption contains .* `dog`"),
    ],
)
def test_options_that_name_no_class_captions_are_refused(options, words):
    samples = [SimpleNamespace(prompts=("a cat",))]
    with pytest.raises(HyimgError, match=words):
        class_captions(samples, ClassCaptions(**options))


def test_diff_output_preservation_without_a_class_is_refused(train):
    with pytest.raises(HyimgError, match="needs `--trigger_word` and `--diff_output_preservation_class`"):
        train(diff_output_preservation=1.0)


def test_class_captions_must_be_cached_and_cache_text_makes_them(train, make_dataset, models, tmp_path):
    dataset = make_dataset(caches=((0, 0),))
    with pytest.raises(HyimgError, match="no text cache for the prompt `animal`") as caught:
        train(dataset_config=dataset, diff_output_preservation=1.0, **CLASS)
    flags = "--trigger_word cat --diff_output_preservation_class animal"
    assert caught.value.hint is not None
    assert f"--dataset_config {dataset} {flags}`" in caught.value.hint
    files = {"text_encoder": models[0].text_encoder, "byt5": models[0].byt5, "dataset_config": dataset}
    files["text_encoder_dtype"] = "bf16"  # as the entries that are there
    made = cache_text(make(CacheTextConfig, {**files, **CLASS}), SilentReporter())
    assert made.num_made == 4, "one for each caption"
    run = train(dataset_config=dataset, diff_output_preservation=1.0, **CLASS)
    # a fresh adapter changes nothing, so there is nothing to hold back yet
    assert run.measured == {"loss_preservation": 0.0}


def test_the_blank_prompt_is_kept_near_the_bases(train, dataset):
    def change(run):
        """How far the trained adapter moves the answer to the empty prompt."""
        objective = run.objective
        generator = torch.Generator().manual_seed(0)
        noisy_BCHW = torch.randn(4, DIT_TINY.latent_channels, 2, 2, generator=generator)
        text = collate([run.preservation.read("")] * 4)
        with torch.no_grad():
            moved_BCHW = objective.predict(noisy_BCHW, torch.linspace(0.2, 0.8, 4), text)
            with run.network.disabled():
                base_BCHW = objective.predict(noisy_BCHW, torch.linspace(0.2, 0.8, 4), text)
        return float((moved_BCHW - base_BCHW).norm())

    options = {"max_train_steps": 12, "learning_rate": 1e-2, "network_alpha": 4}
    free, kept = train(**options), train(**options, blank_prompt_preservation=10.0)
    assert change(kept) < 0.7 * change(free)


def test_the_cost_and_what_fights_itself_are_said(make_dataset, models):
    report = Listener()
    own = {"dit": models[0].dit, "dataset_config": make_dataset()}
    options = {"blank_prompt_preservation": 1.0, "diff_output_preservation": 1.0}
    options |= {"trigger_word": "catcat", "diff_output_preservation_class": "animal"}
    config = make(
        TrainConfig, {**own, **options, "device": "cpu", "output_dir": own["dataset_config"].parent}
    )
    prepare(config, report)
    (note,) = [note for note in report.notes if "preservation" in note]
    assert "2 terms: a step takes about 4 times as long" in note
    samples = open_training_workspace(config, report).found.samples
    prompts = class_captions_to_read(config.preservation, config.class_captions, samples, report)
    assert set(prompts) == {"cat", "animal", "animalcat", "animalanimal"}
    (warning,) = [warning for warning in report.warnings if "catcat" in warning]
    assert "is not in the captions of 1 image" in warning


def test_weights_of_zero_cost_nothing(train):
    run = train(blank_prompt_preservation=0.0)
    assert not run.preservation.terms
    assert run.measured == {}

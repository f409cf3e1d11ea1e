"""Validation and samples in a run: what they leave, and that training does not know of them."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from hyimg.config.image_file import read_settings
from hyimg.config.rendering import NO_APG
from hyimg.data.dataset_file import load_dataset_file
from hyimg.data.scan import scan
from hyimg.training import saving
from hyimg.training.evaluation import training_subset
from hyimg.training.metrics import COST_FIELDS


@pytest.fixture
def prompts(tmp_path, own_dataset, fill, hyimg):
    """A prompt file whose prompts are in the text cache of the dataset."""
    path = tmp_path / "prompts.txt"
    path.write_text(
        "a red square --w 64 --h 96 --s 2\na cat --n blurry --s 2 --w 64 --h 64\n", encoding="utf-8"
    )
    code, _, err = hyimg(*fill("text", own_dataset, "--sample_prompts", path))
    assert code == 0, err
    return path


@pytest.fixture
def train(hyimg, own_dataset, tmp_path):
    runs = iter(range(100))

    def call(*extra, code=0):
        folder = tmp_path / f"run{next(runs)}"
        got, _, err = hyimg(
            *("train", "--dit", "{dit}", "--dataset_config", own_dataset, "--output_dir", folder),
            *"--max_train_epochs 2 --seed 7 --network_dim 4 --network_alpha 4 --learning_rate 1e-2".split(),
            *"--mixed_precision no --save_precision float".split(),
            *extra,
        )
        assert got == code, err
        return folder, err

    return call


def lines(folder):
    """(lines of steps, lines of validations), times left out."""
    text = (folder / "lora.metrics.jsonl").read_text(encoding="utf-8")
    every = [
        {k: v for k, v in json.loads(line).items() if k not in COST_FIELDS} for line in text.splitlines()
    ]
    return [x for x in every if "loss" in x], [x for x in every if "validation_loss" in x]


NOISY_LOSS = """
import random
import numpy as np
import torch
from hyimg.hookspecs import hookimpl

def noisy(prediction, target, context):
    drawn = torch.rand(()) + random.random() + np.random.rand()
    return drawn * (prediction - target).square().mean((1, 2, 3))

@hookimpl
def hyimg_losses():
    return {"noisy": noisy}
"""


@pytest.fixture
def noisy(tmp_path):
    """The options of a loss that draws from the global generators."""
    (tmp_path / "noisy.py").write_text(NOISY_LOSS, encoding="utf-8")
    return ["--plugin", tmp_path / "noisy.py", "--loss_type", "noisy"]


def test_a_folder_for_validation_only_is_validated_and_not_trained_on(train, own_dataset):
    held = own_dataset.parent / "held"
    held.mkdir()
    for name in ("3.png", "3.txt", "4.png", "4.txt"):
        (own_dataset.parent / "images" / name).rename(held / name)
    subset = '\n  [[datasets.subsets]]\n  image_dir = "held"\n  validation_split = 1.0\n'
    own_dataset.write_text(own_dataset.read_text(encoding="utf-8") + subset, encoding="utf-8")
    folder, _ = train("--max_train_epochs", "1", "--max_validation_steps", "1")
    assert len(lines(folder)[1]) == 2  # before the first step and after the epoch
    with safe_open(folder / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_num_train_images"], metadata["ss_num_validation_images"]) == ("3", "2")


def test_validating_and_sampling_change_no_bit_of_the_training(train, prompts, noisy):
    """With everything that has a place of its own in memory or randomness."""
    options = ["--validation_split", "0.4", *noisy]
    options += ["--blocks_to_swap", "1", "--gradient_checkpointing", "--ema_decay", "0.5"]
    options += ["--network_dropout", "0.2", "--network_args", "module_dropout=0.2"]
    plain, _ = train(*options, "--max_validation_steps", "1", "--validate_every_n_epochs", "99")
    watched, _ = train(
        *options,
        *("--validate_every_n_steps", "1", "--sample_prompts", prompts, "--vae", "{vae}"),
        *("--sample_every_n_steps", "1", "--sample_at_first"),
    )
    assert lines(watched)[0] == lines(plain)[0]
    first, second = load_file(plain / "lora.safetensors"), load_file(watched / "lora.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("options", [["--ema_decay", "0.9"], ["--optimizer_type", "AdamWScheduleFree"]])
def test_the_weights_that_are_saved_are_those_validated_and_sampled(train, prompts, options):
    common = ["--validation_split", "0.4", "--sample_prompts", prompts, "--vae", "{vae}"]
    common += ["--sample_preset", "comfyui"]
    folder, err = train(*common, *options)
    assert "samples: preset comfyui: sampler " in err
    assert read_settings(folder / "sample/lora-000002-01.png")["apg_start_step_general"] == NO_APG
    start = ["--network_weights", folder / "lora.safetensors", "--sample_at_first"]
    again, _ = train(*common, *start, "--max_train_epochs", "1")
    (*_, last), (first, *_) = lines(folder)[1], lines(again)[1]
    assert (last["epoch"], first["epoch"]) == (2, 0)
    assert {**last, "step": 0, "epoch": 0} == first
    for number in (1, 2):
        names = (
            folder / f"sample/lora-000002-0{number}.png",
            again / f"sample/lora-step00000000-0{number}.png",
        )
        ours, saved = (Image.open(name).tobytes() for name in names)
        assert ours == saved


def test_held_back_images_are_asked_and_never_trained(train):
    folder, err = train("--validation_split", "0.4")
    steps, validations = lines(folder)
    assert sum(line["samples"] for line in steps) == 2 * 3, "two of five are held back"
    assert [(line["step"], line["epoch"]) for line in validations] == [(0, 0), (2, 1), (4, 2)]
    assert "validation loss" in err
    first, *_, last = validations
    assert last["validation_train_loss"] < first["validation_train_loss"], "it has learnt something"
    assert last["validation_divergence"] == pytest.approx(
        last["validation_loss"] - last["validation_train_loss"]
    )
    bands = ["t0-250", "t250-500", "t500-750", "t750-1000"]
    for name in ("validation_loss", "validation_train_loss"):
        by_band = [first[f"{name}_{band}"] for band in bands]
        assert first[name] == pytest.approx(sum(by_band) / len(by_band))


def test_losses_are_compared_with_those_of_trained_images_and_not_of_regularisation_images(own_dataset):
    images, regular = own_dataset.parent / "images", own_dataset.parent / "regular"
    regular.mkdir()
    for name in ("3.png", "3.txt", "4.png", "4.txt"):
        (images / name).rename(regular / name)
    text = own_dataset.read_text(encoding="utf-8").replace("num_repeats = 1", "num_repeats = 3")
    subset = '\n  [[datasets.subsets]]\n  image_dir = "regular"\n  is_reg = true\n'
    own_dataset.write_text(text + subset, encoding="utf-8")
    samples = scan(load_dataset_file(own_dataset)).samples
    assert len(samples) == 5
    for count, expected in ((99, 3), (2, 2)):
        chosen = training_subset(samples, count, seed=0)
        assert len({sample.key for sample in chosen}) == expected
        assert all(not sample.subset.is_reg and sample.num_repeats == 1 for sample in chosen)


@pytest.mark.parametrize("draws", [False, True], ids=["l2", "a loss that draws"])
def test_the_same_is_asked_at_every_validation_and_in_every_run(train, noisy, draws):
    still = ["--validation_split", "0.4", "--learning_rate", "1e-30", "--validate_every_n_steps", "1"]
    still += noisy if draws else []
    _, first = lines(train(*still)[0])
    values = [{k: v for k, v in line.items() if k.startswith("validation")} for line in first]
    assert all(line == values[0] for line in values), "a model that stands still is measured the same"
    _, other = lines(train(*still, "--timestep_sampling", "uniform", "--ip_noise_gamma", "0.3")[0])
    assert {k: v for k, v in other[0].items() if k.startswith("validation")} == values[0]


@pytest.fixture
def split(own_dataset):
    """The dataset file says which images are held back."""
    text = own_dataset.read_text(encoding="utf-8")
    own_dataset.write_text(
        text.replace("num_repeats = 1", "num_repeats = 1\nvalidation_split = 0.4\nvalidation_seed = 0"),
        "utf-8",
    )


def test_runs_of_other_seeds_measure_an_untouched_model_the_same(train, noisy, split):
    def first(*options):
        return lines(train("--max_train_steps", "1", *noisy, *options)[0])[1][0]

    plain = first()
    assert first("--seed", "8", "--validation_seed", "0") == plain
    other = first("--validation_seed", "1")
    assert other["validation_loss"] != plain["validation_loss"], "of the same images with another noise"


def test_a_run_that_goes_on_with_another_seed_of_validation_says_that_losses_do_not_compare(
    train, split, monkeypatch, as_format_1
):
    common = ["--save_state", "--max_train_epochs"]
    folder, _ = train(*common, "1")
    more = ["--resume", "latest", "--output_dir", folder, *common]
    _, err = train(*more, "2", "--validation_seed", "5")
    assert "used seed 0 before this state and uses 5 now" in err
    # from a state of a release in which the run's seed decided the noise
    write = saving.write_state

    def write_as_before(path, document, *rest, **options):
        document = {key: value for key, value in document.items() if key != "validation_seed"}
        write(path, document, *rest, **options)
        as_format_1(path, (folder / "lora.metrics.jsonl").read_text(encoding="utf-8"))

    monkeypatch.setattr(saving, "write_state", write_as_before)
    _, err = train(*more, "3", "--validation_seed", "5")
    assert "are not comparable" not in err
    _, err = train(*more, "4")
    assert "used seed 7 before this state and uses 0 now" in err
    _, err = train(*more, "5", "--validation_seed", "7")
    assert "are not comparable" not in err


def test_no_more_batches_are_asked_than_the_option_says(train):
    def first(*options):
        _, validations = lines(train("--validation_split", "0.4", "--max_train_epochs", "1", *options)[0])
        return validations[0]

    # two held-back images of two shapes, and two training images of two
    whole, two, one = first(), *(first("--max_validation_steps", n) for n in ("2", "1"))
    assert two == whole
    for name in ("validation_loss", "validation_train_loss"):
        assert one[name] != whole[name]


def test_the_range_of_timesteps_is_that_of_the_training(train):
    _, validations = lines(train("--validation_split", "0.4", "--max_timestep", "400")[0])
    bands = [key for key in validations[0] if key.startswith("validation_loss_t")]
    assert bands == ["validation_loss_t0-250", "validation_loss_t250-500"]


def test_samples_are_rendered_when_they_are_asked_for(train, prompts):
    common = ["--sample_prompts", prompts, "--vae", "{vae}"]
    folder, _ = train(*common)
    assert [p.name for p in sorted((folder / "sample").iterdir())] == [
        f"lora-{epoch:06}-{number:02}.png" for epoch in (1, 2) for number in (1, 2)
    ]
    assert Image.open(folder / "sample" / "lora-000001-01.png").size == (64, 96)
    folder, err = train(
        *common, "--sample_every_n_steps", "3", "--sample_at_first", "--log_with", "tensorboard"
    )
    for step in (0, 3, 6):
        assert f"step {step}: 2 samples in {folder / 'sample'}" in err
    names = {p.name for p in (folder / "sample").iterdir()}
    assert names == {f"lora-step{step:08}-{n:02}.png" for step in (0, 3) for n in (1, 2)} | {
        f"lora-step{step:08}-{n:02}.png" for step in (6,) for n in (1, 2)
    }


def test_a_prompt_that_is_not_cached_is_refused_at_the_start_and_skipped_later(train, prompts, tmp_path):
    text = prompts.read_text(encoding="utf-8")
    prompts.write_text(text + "a blue whale --s 1\n", encoding="utf-8")
    _, err = train("--sample_prompts", prompts, "--vae", "{vae}", code=2)
    assert "a blue whale" in err
    assert f"--sample_prompts {prompts}" in err, "the command that would encode it"
    prompts.write_text(text, encoding="utf-8")
    plugin = tmp_path / "adds.py"
    plugin.write_text(
        "from hyimg.hookspecs import hookimpl\n"
        "@hookimpl\ndef hyimg_run_start(run):\n"
        f"    open({str(prompts)!r}, 'a').write('a blue whale --s 1\\n')\n"
    )
    folder, err = train("--sample_prompts", prompts, "--vae", "{vae}", "--plugin", plugin)
    assert "no sample of prompt 3" in err
    assert len(list((folder / "sample").iterdir())) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sample_every_n_steps", "1"], "`--sample_every_n_steps` without `--sample_prompts`"),
        (["--sample_prompts", "{prompts}"], "`--sample_prompts` needs `--vae`"),
        (["--validate_every_n_steps", "1"], "no image is held back"),
        (["--validation_split", "0.01"], "validation_split"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_loaded(train, prompts, options, words):
    folder, err = train(*(prompts if option == "{prompts}" else option for option in options), code=2)
    assert words in err
    assert not folder.exists()


def test_the_dry_run_holds_back_what_the_run_does(hyimg, own_dataset, tmp_path):
    common = ["train", "--dit", "{dit}", "--dataset_config", own_dataset, "--output_dir", tmp_path / "run"]
    code, out, err = hyimg(*common, "--validation_split", "0.4", "--dry_run")
    assert code == 0, err
    assert "2 for validation" in out


def test_show_timesteps_draws_them_and_trains_nothing(train, tmp_path):
    folder, err = train("--show_timesteps", tmp_path / "t.png", "--timestep_sampling", "uniform")
    assert Image.open(tmp_path / "t.png").size == (900, 420)
    shares = [
        float(part.split()[-1].rstrip("%")) for part in err.split("timesteps: ")[1].split(";")[0].split(",")
    ]
    assert shares == pytest.approx([25] * 4, abs=1.5)
    assert not folder.exists()


def test_samples_are_rendered_with_the_sampler_that_is_asked_for(train, prompts):
    options = ["--sample_prompts", prompts, "--vae", "{vae}", "--max_train_steps", 1, "--sample_at_first"]
    pictures = {}
    for given in ("--sampler=euler", "--sampler=heun", "--sample_sampler=dpmsolver++"):
        folder, _ = train(*options, given)
        pictures[given] = (folder / "sample" / "lora-step00000000-01.png").read_bytes()
    assert len(set(pictures.values())) == 3
    folder, err = train(*options, "--sampler", "hewn", code=2)
    assert "did you mean `heun`" in err
    assert not folder.exists()

"""Options without effect, where only the dataset or the model shows it: through the commands."""

from __future__ import annotations

import pytest
from PIL import Image

from hyimg.config import commands
from hyimg.config.load import make
from hyimg.data.workspace import open_workspace
from hyimg.report import SilentReporter
from hyimg.training.preparation import open_training_workspace


class Recorder(SilentReporter):
    def __init__(self):
        self.warnings = []

    def warning(self, text):
        self.warnings.append(text)


@pytest.fixture
def warnings_of(own_dataset, tmp_path):
    """What opening the dataset for training warns of, with these options and this text added to its file."""

    def call(added="", **options):
        if added:
            own_dataset.write_text(own_dataset.read_text(encoding="utf-8") + added, encoding="utf-8")
        given = {
            "dit": "x",
            "dataset_config": str(own_dataset),
            "output_dir": str(tmp_path / "run"),
            **options,
        }
        report = Recorder()
        open_training_workspace(make(commands.TrainConfig, given), report)
        return [text for text in report.warnings if "has no effect" in text]

    return call


def test_options_about_data_that_is_not_there(warnings_of):
    lines = warnings_of(prior_loss_weight="1.0", masked_loss=True, caption_variants="4")
    assert [line.split(": ")[0].split("`")[1] for line in lines] == [
        "--caption_variants",
        "--masked_loss",
        "--prior_loss_weight",
    ]
    assert "`--prior_loss_weight` has no effect: the dataset has no regularisation images" in lines
    assert warnings_of() == []


def test_options_of_validation_where_nothing_is_validated(warnings_of, own_dataset):
    assert warnings_of(validation_seed="0") == [
        "`--validation_seed` has no effect: no image is held out for validation"
    ]
    assert warnings_of(validation_seed="0", validation_split="0.4") == []
    text = own_dataset.read_text(encoding="utf-8")
    own_dataset.write_text(text.replace("[[datasets]]", "[[datasets]]\nvalidation_split = 0.4"), "utf-8")
    assert warnings_of(validation_split="0.2") == [
        "`--validation_split` has no effect: the dataset file sets it everywhere"
    ]


def test_regularisation_images_use_the_weight_and_shuffling_the_variants(warnings_of, own_dataset):
    folder = own_dataset.parent / "class"
    folder.mkdir()
    Image.new("RGB", (64, 64), "blue").save(folder / "one.png")
    (folder / "one.txt").write_text("a, b", encoding="utf-8")
    added = f"[[datasets.subsets]]\nimage_dir = '{folder}'\nis_reg = true\nshuffle_caption = true\n"
    assert warnings_of(added, prior_loss_weight="0.5", caption_variants="4") == []


def test_a_flag_for_what_the_dataset_file_gives_everywhere(warnings_of, own_dataset):
    text = own_dataset.read_text(encoding="utf-8")
    without = "\n".join(line for line in text.splitlines() if not line.startswith("batch_size"))
    own_dataset.write_text(without + "\n", encoding="utf-8")
    assert warnings_of(train_batch_size="1") == []
    own_dataset.write_text(
        without.replace("[[datasets]]", "[[datasets]]\nbatch_size = 1") + "\n", encoding="utf-8"
    )
    (line,) = warnings_of(train_batch_size="1")
    assert line == "`--train_batch_size` has no effect: the dataset file sets it everywhere"


def test_a_share_for_validation_counts_unless_every_subset_has_its_own(warnings_of, own_dataset, hyimg):
    assert warnings_of(validation_split="0.5", validation_seed="1") == []
    (line,) = warnings_of("validation_split = 0.5\n", validation_split="0.25")
    assert line == "`--validation_split` has no effect: the dataset file sets it everywhere"
    code, _, err = hyimg("dataset", "--dataset_config", own_dataset, "--validation_split", "0.25")
    assert code == 0, err
    assert line in err


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        (["--guidance_rescale_apg", "0.5", "--infer_steps", "2"], "APG does not start in so few steps"),
        (["--guidance_rescale_apg", "0.5", "--infer_steps", "2", "--apg_start_step_general", "0"], None),
        (["--negative_prompt", "x", "--guidance_scale", "1", "--infer_steps", "1"], "at guidance 1"),
        (["--apg_start_step_ocr", "3", "--infer_steps", "1"], "no prompt has quoted text"),
    ],
)
def test_guidance_options_that_no_picture_uses(hyimg, tmp_path, flags, idle):
    models = ["--dit", "{dit}", "--text_encoder", "{text_encoder}", "--byt5", "{byt5}", "--vae", "{vae}"]
    output = ["--image_size", "64", "64", "--save_path", tmp_path / "a.png", "--seed", "1"]
    code, _, err = hyimg("infer", *models, "--prompt", "a red square", *output, *flags)
    assert code == 0, err
    lines = [line for line in err.splitlines() if "has no effect" in line]
    assert [idle is not None and idle in line for line in lines] == [True] * (idle is not None)


def test_prompts_that_all_have_their_own_leave_a_flag_without_effect(hyimg, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --s 1\na dog --s 2\n", encoding="utf-8")
    models = ["--dit", "{dit}", "--text_encoder", "{text_encoder}", "--byt5", "{byt5}", "--vae", "{vae}"]
    output = ["--image_size", "64", "64", "--save_path", tmp_path / "out", "--infer_steps", "5"]
    code, _, err = hyimg("infer", *models, "--from_file", prompts, *output)
    assert code == 0, err
    assert "`--infer_steps` has no effect: every prompt sets its own" in err
    assert "`--image_size` has no effect" not in err


def test_cache_latents_takes_only_what_it_honours(hyimg, own_dataset):
    command = ["cache-latents", "--dataset_config", own_dataset, "--vae", "{vae}"]
    code, _, err = hyimg(*command, "--plugin", "no-such.py")
    assert code == 2
    assert "the plugin file `no-such.py` does not exist" in err
    code, _, err = hyimg(*command, "--caption_transform", "nosuch")
    assert code == 2
    assert "no such option: `--caption_transform`" in err
    assert "it is an option of `hyimg dataset`, `hyimg cache-text`, `hyimg train`" in err


def test_captions_are_looked_at_without_variants_where_only_images_count(own_dataset):
    from hyimg.config.dataset_options import DatasetFileOptions

    space = open_workspace(DatasetFileOptions(dataset_config=own_dataset), SilentReporter())
    assert all(len(sample.prompts) == 1 for sample in space.all_samples)

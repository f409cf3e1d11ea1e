"""Plugins on the command line: caption transforms through every stage, and the example files."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import tomli
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from hyimg.training.metrics import COST_FIELDS

EXAMPLES = Path(__file__).parents[2] / "plugins" / "examples"
SHORT = "--max_train_steps 3 --seed 1 --mixed_precision no --save_precision float".split()


@pytest.fixture
def train(hyimg, tmp_path):
    """Trains three steps; gives (exit code, stderr, run folder)."""
    numbers = iter(range(100))

    def call(dataset, *extra):
        folder = tmp_path / f"run{next(numbers)}"
        own = ["train", "--dit", "{dit}", "--dataset_config", dataset, "--output_dir", folder, *SHORT]
        code, _, err = hyimg(*own, *extra)
        return code, err, folder

    return call


def metrics(folder):
    lines = (folder / "lora.metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in COST_FIELDS} for line in lines]


# ---- caption transforms

SHOUT = """
from hyimg.hookspecs import hookimpl

def shout(caption, context, *, mark: str = "!"):
    return caption + mark

@hookimpl
def hyimg_caption_transforms():
    return {"shout": shout}
"""


@pytest.fixture
def shout(tmp_path):
    (tmp_path / "shout.py").write_text(SHOUT, encoding="utf-8")
    return ["--plugin", tmp_path / "shout.py", "--caption_transform", "shout"]


def test_a_transform_goes_through_report_cache_and_training(hyimg, train, own_dataset, fill, shout):
    code, err, _ = train(own_dataset, *shout)
    assert code == 2, "the captions are cached as they are"
    assert "no text cache for the prompt `a red square!`, the prompt" in err
    assert f"--caption_transform shout --plugin {shout[1]}" in err
    code, out, err = hyimg("dataset", own_dataset, "--json", *shout)
    assert code == 0, err
    (store,) = json.loads(out)["text"]["stores"]
    assert store["missing"] == 5
    code, _, err = hyimg(*fill("text", own_dataset), *shout)
    assert code == 0, err
    assert "5 prompts made" in err
    code, err, folder = train(own_dataset, *shout, "--save_state_on_train_end")
    assert code == 0, err
    assert tomli.loads((folder / "lora.run.toml").read_text(encoding="utf-8"))["caption_transform"] == [
        "shout"
    ]
    plain_code, err, plain = train(own_dataset)
    assert plain_code == 0, err
    assert metrics(plain) != metrics(folder)

    resume = ["--resume", folder / "lora-state", "--max_train_steps", "4"]
    code, err, _ = train(own_dataset, *resume)
    assert code == 2
    assert "captions of the dataset have changed" in err
    code, err, _ = train(own_dataset, *resume, *shout)
    assert code == 0, err
    code, err, _ = train(own_dataset, *shout, "--caption_transform_args", "mark=?")
    assert code == 2
    assert "no text cache for the prompt `a red square?`, the prompt" in err


def test_pruning_keeps_what_the_transform_made_and_no_more(hyimg, own_dataset, fill, shout, entries):
    folder = own_dataset.parent
    shutil.copytree(folder / "images", folder / "more")
    (folder / "more" / "0.txt").write_text("a horse", encoding="utf-8")
    other = folder / "other.toml"
    other.write_text(own_dataset.read_text(encoding="utf-8").replace('"images"', '"more"'), encoding="utf-8")
    plain = set(entries(own_dataset, "text"))
    assert hyimg(*fill("text", other), *shout)[0] == 0
    made = set(entries(own_dataset, "text")) - plain
    for path in plain | made:
        os.utime(path, (time.time() - 3600, time.time() - 3600))  # young entries stay
    code, _, err = hyimg(*fill("text", own_dataset), *shout, "--prune", "--keep_for", other)
    assert code == 0, err
    after = set(entries(own_dataset, "text"))
    assert made <= after, "what the other file's captions become is kept"
    assert len(after & plain) == 1, "of the captions as they are only the empty prompt stays"


# ---- a network


def test_samples_show_a_plugins_network_as_it_learns(train, own_dataset, tmp_path, model):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --l 1", encoding="utf-8")
    plugin = EXAMPLES.parent / "hyimg-vera" / "hyimg_vera.py"
    options = ["--plugin", plugin, "--network_module", "vera", "--learning_rate", "5"]
    options += ["--vae", model.vae, "--sample_prompts", prompts, "--sample_at_first"]
    code, err, folder = train(own_dataset, *options, "--sample_every_n_steps", "3")
    assert code == 0, err
    before, after = ((folder / "sample" / f"lora-step0000000{n}-01.png").read_bytes() for n in (0, 3))
    assert before != after


# ---- one file, nothing installed


def test_a_file_gives_a_timestep_sampling_whose_arguments_reach_it(train, cached_dataset):
    plugin = ["--plugin", EXAMPLES / "kumaraswamy.py", "--timestep_sampling", "kumaraswamy"]
    option = "--timestep_sampling_args"
    code, err, uniform = train(cached_dataset, *plugin, option, "a=1", "b=1")
    assert code == 0, err
    code, err, plain = train(cached_dataset, "--timestep_sampling", "uniform")
    assert code == 0, err
    for line, other in zip(metrics(uniform), metrics(plain), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4), "a = b = 1 is uniform"
    code, err, high = train(cached_dataset, *plugin, option, "a=9")
    assert code == 0, err
    assert metrics(high)[0]["loss"] != pytest.approx(metrics(plain)[0]["loss"], rel=1e-4)
    assert tomli.loads((high / "lora.run.toml").read_text(encoding="utf-8"))[option[2:]] == ["a=9"]
    for pair, words in (
        ("a=low", "must be a number, got `low`"),
        ("c=1", "unknown argument `c` of `kumaraswamy`"),
    ):
        code, err, _ = train(cached_dataset, *plugin, option, pair)
        assert code == 2
        assert words in err
    code, err, _ = train(cached_dataset, option, "a=1")
    assert code == 2
    assert "unknown argument `a` of `sigma`" in err


def test_a_file_gives_an_optimiser_that_resumes_to_the_bit(train, cached_dataset):
    options = ["--plugin", EXAMPLES / "signum.py", "--optimizer_type", "signum", "--save_every_n_steps", "1"]
    options += ["--optimizer_args", "momentum=0.5", "--save_state"]
    code, err, whole = train(cached_dataset, *options)
    assert code == 0, err
    code, err, resumed = train(cached_dataset, *options, "--resume", whole / "lora-step00000001-state")
    assert code == 0, err
    assert metrics(resumed) == metrics(whole)
    name = "lora-step00000003.safetensors"
    one, other = load_file(whole / name), load_file(resumed / name)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_file_sees_the_events_and_its_memory_goes_on(train, cached_dataset):
    options = ["--plugin", EXAMPLES / "diary.py", "--save_every_n_steps", "2", "--save_state"]
    code, err, whole = train(cached_dataset, *options)
    assert code == 0, err
    lines = metrics(whole)
    assert all(line["loss_worst"] >= line["loss"] for line in lines)
    best = min(lines, key=lambda line: line["loss"])
    text = (whole / "lora.diary.txt").read_text(encoding="utf-8")
    assert text == f"at the end: best step {best['step']} of 3, loss {best['loss']:.4f}\n"
    code, err, resumed = train(cached_dataset, *options, "--resume", whole / "lora-step00000002-state")
    assert code == 0, err
    assert (resumed / "lora.diary.txt").read_text(encoding="utf-8") == text


# ---- errors as promised

LOSS = "from hyimg.hookspecs import hookimpl\ndef mine(prediction, target, context, *, gain: float = 1.0):\n    {}\n"
LOSS += "@hookimpl\ndef hyimg_losses():\n    return {{'mine': mine}}\n"


@pytest.mark.parametrize(
    ("body", "flags", "code", "words"),
    [
        (
            "return (prediction - target).square().mean()",
            [],
            1,
            "the loss returned float32 of shape (), not a float tensor of shape (2,)",
        ),
        (
            "return prediction.detach().flatten(1).mean(1)",
            [],
            1,
            "the loss returned a value without a gradient",
        ),
        ("return gain.nothing", [], 1, "the loss failed: AttributeError"),
        ("return 1", ["--loss_args", "gain=much"], 2, "must be a number, got `much`"),
        ("return 1", ["--loss_args", "gian=1"], 2, "unknown argument `gian` of `mine`"),
    ],
)
def test_a_loss_that_does_wrong_is_told_in_a_sentence(
    train, cached_dataset, tmp_path, body, flags, code, words
):
    (tmp_path / "mine.py").write_text(LOSS.format(body), encoding="utf-8")
    plugin = ["--plugin", tmp_path / "mine.py", "--loss_type", "mine"]
    got, err, _ = train(cached_dataset, *plugin, *flags)
    assert got == code, err
    assert words in err
    assert "Traceback" not in err


def test_a_module_that_is_not_there_is_an_error(train, cached_dataset):
    code, err, _ = train(cached_dataset, "--plugin", "no_such_module")
    assert code == 2
    assert "the plugin `no_such_module` (no_such_module) cannot be imported: ModuleNotFoundError" in err


# ---- code is named by a command line or its run file, never by data


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module that can be imported by its name, by its file and from the working folder; data in the same folder."""
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("evil", None)


def by_dataset_file(folder, dataset, trained):
    (folder / "data.toml").write_text('plugin = ["evil.py"]\n' + dataset.read_text())
    return ["dataset", folder / "data.toml"], "`plugin`"


def by_transform_in_a_dataset_file(folder, dataset, trained):
    named = 'caption_transform = ["evil:run"]\n  image_dir'
    (folder / "data.toml").write_text(dataset.read_text().replace("image_dir", named))
    return ["dataset", folder / "data.toml"], "caption_transform"


def by_lora_metadata(folder, dataset, trained):
    tensors = load_file(trained / "lora.safetensors")
    keys = ("network_module", "optimizer", "lr_scheduler", "caption_transform", "loss_type", "plugin")
    save_file(tensors, folder / "lora.safetensors", {f"ss_{key}": "evil.run" for key in keys})
    return ["check", folder / "lora.safetensors"], None


def by_peft_config(folder, dataset, trained):
    shutil.copy(trained / "lora.safetensors", folder / "adapter_model.safetensors")
    names = {"base_model_class": "run", "parent_library": "evil"}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "auto_mapping": names, "plugin": "evil.py"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return ["check", folder], None


def by_picture(folder, dataset, trained):
    settings = {"prompt": "a cat", "plugin": ["evil.py"], "sampler": "evil.run", "fingerprints": {}}
    info = PngImagePlugin.PngInfo()
    info.add_itxt("hyimg", json.dumps(settings))
    Image.new("RGB", (32, 32)).save(folder / "cat.png", pnginfo=info)
    models = ["--dit", "{dit}", "--text_encoder", "{text_encoder}", "--byt5", "{byt5}", "--vae", "{vae}"]
    return [
        "infer",
        *models,
        "--from_image",
        folder / "cat.png",
        "--save_path",
        folder / "out.png",
    ], "evil.run"


def by_prompt_file(folder, dataset, trained):
    (folder / "prompts.txt").write_text("a cat --ss evil.run")
    models = ["--dit", "{dit}", "--vae", "{vae}", "--output_dir", folder / "sheet"]
    return ["sample", *models, "--prompts", folder / "prompts.txt"], "evil.run"


def by_run_folder(folder, dataset, trained):
    shutil.copytree(trained, folder / "run")
    for name in ("lora.toml", "run.toml", "config.toml"):
        (folder / "run" / name).write_text('plugin = ["evil.py"]\noptimizer_type = "evil.run"\n')
    (folder / "prompts.txt").write_text("a cat")
    models = ["--dit", "{dit}", "--vae", "{vae}", "--output_dir", folder / "sheet"]
    return ["sample", *models, "--prompts", folder / "prompts.txt", "--run", folder / "run"], "embeddings"


@pytest.mark.parametrize(
    "write",
    [
        *(by_dataset_file, by_transform_in_a_dataset_file, by_lora_metadata, by_peft_config, by_picture),
        *(by_prompt_file, by_run_folder),
    ],
    ids=lambda write: write.__name__,
)
def test_code_that_data_name_is_not_imported(evil, hyimg, cached_dataset, trained, write):
    arguments, refused = write(evil, cached_dataset, trained)
    code, _, err = hyimg(*arguments)
    if refused is not None:
        assert (code, refused in err) == (2, True), err
    assert not (evil / "ran").exists()
    assert "evil" not in sys.modules


def test_code_that_a_run_file_names_is_imported_and_said(evil, hyimg):
    (evil / "run.toml").write_text('plugin = ["evil.py"]\n')
    code, _, err = hyimg("plugins", "--config", evil / "run.toml")
    assert code == 0
    assert f"note: `{evil / 'run.toml'}` makes this command import code: `evil.py` (`plugin`)" in err
    assert (evil / "ran").exists()

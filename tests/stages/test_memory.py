"""The memory options through the commands: what must not change a bit does not, and what cannot be is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hyimg.cli.app import run
from hyimg.config.load import make
from hyimg.config.tools import MakeTinyModelConfig
from hyimg.report import SilentReporter
from hyimg.stages.make_tiny_model import ModelFolder, make_tiny_model
from hyimg.training.metrics import COST_FIELDS

# Of the deep tiny model, as of 2.1 itself
MOST_BLOCKS = 37


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> ModelFolder:
    """20 + 40 narrow blocks, so that as many can be streamed as of the real model."""
    folder = tmp_path_factory.mktemp("deep")
    return make_tiny_model(
        make(MakeTinyModelConfig, {"directory": folder, "depth": "full"}), SilentReporter()
    )


@pytest.fixture
def train(hyimg, deep, cached_dataset, tmp_path):
    """Trains the deep model, or another, for two steps into a fresh folder; gives (metrics, tensors, stderr)."""
    runs = iter(range(100))

    def call(*extra, dit=deep.dit, precision="no", code=0):
        folder = tmp_path / f"run{next(runs)}"
        arguments = ["train", "--dit", dit, "--dataset_config", cached_dataset, "--output_dir", folder]
        arguments += (
            "--max_train_steps 2 --seed 7 --network_dim 4 --network_alpha 4 --learning_rate 1e-2".split()
        )
        arguments += ["--mixed_precision", precision, "--save_precision", "float", *extra]
        got, _, err = hyimg(*arguments)
        assert got == code, err
        if code:
            assert not folder.exists(), "nothing is left by what is refused"
            return None, None, err
        lines = [json.loads(line) for line in (folder / "lora.metrics.jsonl").read_text().splitlines()]
        return (
            [{k: v for k, v in line.items() if k not in COST_FIELDS} for line in lines],
            load_file(folder / "lora.safetensors"),
            err,
        )

    return call


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


STREAMED = ["--blocks_to_swap", MOST_BLOCKS]
# Products in bf16 take many times as long where a processor only emulates them: six blocks instead of sixty
SMALL = {"dit": "{dit}", "precision": "bf16"}


@pytest.mark.parametrize(
    ("run", "variants"),
    [
        (
            {},
            [
                STREAMED,
                [*STREAMED, "--gradient_checkpointing"],
                [*STREAMED, "--cpu_offload_checkpointing", "--checkpoint_keep", "attention"],
                ["--cpu_offload_checkpointing", "--split_attn"],
            ],
        ),
        (SMALL, [["--blocks_to_swap", "1", "--gradient_checkpointing"]]),
    ],
    ids=["no", "bf16"],
)
def test_streaming_and_recomputation_change_no_bit_of_a_run(train, run, variants):
    metrics, lora, _ = train(**run)
    for options in variants:
        other_metrics, other_lora, _ = train(*options, **run)
        assert other_metrics == metrics, options
        assert same(other_lora, lora), options


def test_fp8_is_near_and_streaming_it_changes_no_bit(train):
    plain, plain_lora, _ = train(**SMALL)
    metrics, lora, err = train("--fp8_scaled", **SMALL)
    assert "relative error" in err
    losses, plain_losses = ([line["loss"] for line in lines] for lines in (metrics, plain))
    assert losses == pytest.approx(plain_losses, rel=0.02)
    assert not same(lora, plain_lora), "the weights are quantised"
    streamed, streamed_lora, _ = train("--fp8_scaled", "--blocks_to_swap", "1", **SMALL)
    assert streamed == metrics
    assert same(streamed_lora, lora)


def test_streaming_on_a_cpu_says_once_that_it_saves_nothing(train):
    _, _, err = train("--blocks_to_swap", "4")
    assert err.count("saves nothing") == 1


def test_more_blocks_than_can_be_swapped_are_refused_with_the_limit(train, hyimg, cached_dataset, tmp_path):
    _, _, err = train("--blocks_to_swap", MOST_BLOCKS + 1, code=2)
    assert "38" in err
    assert "37" in err
    code, _, err = hyimg(
        *(
            "infer",
            "--dit",
            "{dit}",
            "--vae",
            "{vae}",
            "--text_encoder",
            "{text_encoder}",
            "--byt5",
            "{byt5}",
        ),
        *("--prompt", "a cat", "--save_path", tmp_path / "a.png", "--blocks_to_swap", "2"),
    )
    assert code == 2
    assert "at most 1" in err or " 1 " in err
    assert not (tmp_path / "a.png").exists()


def test_an_attention_library_that_cannot_serve_is_refused_before_anything_is_read(train):
    for mode in ("flash", "xformers", "sageattn"):
        _, _, err = train("--attn_mode", mode, code=2)
        assert mode in err
    _, _, err = train("--attn_mode", "sageattn", code=2)
    assert "train" in err


def test_streamed_renders_are_bit_equal(deep, hyimg, tmp_path):
    pictures = []
    for number, options in enumerate(([], ["--blocks_to_swap", MOST_BLOCKS])):
        path = tmp_path / f"{number}.png"
        code, _, err = hyimg(
            *("infer", "--dit", deep.dit, "--vae", deep.vae, "--text_encoder", deep.text_encoder),
            *("--byt5", deep.byt5, "--prompt", 'a sign "GO"', "--seed", "3", "--infer_steps", "3"),
            *("--image_size", "64", "96", "--save_path", path, *options),
        )
        assert code == 0, err
        pictures.append(np.asarray(Image.open(path)))
    assert np.array_equal(*pictures)


def test_an_fp8_file_takes_no_fp8_scaled(train, deep, cached_dataset, tmp_path):
    state = load_file(deep.dit)
    quantised = {}
    for name, tensor in state.items():
        if name.endswith(".weight") and "_blocks." in name and "norm" not in name:
            scale = tensor.float().abs().max() / 448
            quantised[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            quantised[f"{name}_scale"] = scale
        else:
            quantised[name] = tensor
    path = tmp_path / "fp8.safetensors"
    save_file(quantised, path)
    common = ["train", "--dit", path, "--dataset_config", cached_dataset, "--max_train_steps", "1"]
    assert run([str(a) for a in [*common, "--output_dir", tmp_path / "run"]]) == 0
    assert run([str(a) for a in [*common, "--output_dir", tmp_path / "other", "--fp8_scaled"]]) == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("command", ["infer", "infer a file", "sample", "train"])
def test_a_picture_that_no_memory_holds_is_refused_before_a_weight_is_read(
    hyimg, cached_dataset, tmp_path, monkeypatch, command
):
    def load(*arguments, **options):
        raise AssertionError("a model was loaded")

    plan = "hyimg.rendering.render_plan"
    for name in ("hyimg.memory.dit_loader.load_dit", f"{plan}.load_vae", f"{plan}.encode_prompts"):
        monkeypatch.setattr(name, load)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 3200000000 --h 3200000000\n", encoding="utf-8")
    models = ["--dit", "{dit}", "--vae", "{vae}"]
    encoders = ["--text_encoder", "{text_encoder}", "--byt5", "{byt5}"]
    size = ["--image_size", 3_200_000_000, 3_200_000_000]
    code, _, err = hyimg(
        *{
            "infer": ["infer", *models, *encoders, "--prompt", "a cat", *size],
            "infer a file": ["infer", *models, *encoders, "--from_file", prompts],
            "sample": ["sample", *models, *encoders, "--prompts", prompts],
            "train": ["train", *models, "--dataset_config", cached_dataset, "--sample_prompts", prompts],
        }[command],
        *("--save_path" if "infer" in command else "--output_dir", tmp_path / "out"),
        *(["--max_train_steps", "1"] if command == "train" else []),
    )
    assert code == 2, err
    assert "an image of 3200000000x3200000000 (width x height) needs at least" in err
    assert "could fit" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt"]

"""Wrong values, whatever they are written in: one checker, one set of sentences, and the place of each."""

from __future__ import annotations

import json
import math
from typing import Literal

import pytest

from hyimg.config.commands import InferConfig, TrainConfig
from hyimg.config.load import make
from hyimg.data.dataset_file import parse_dataset
from hyimg.errors import HyimgError
from hyimg.lora.rank_plan import parse_network_args
from hyimg.plugins.arguments import bind_arguments, parse_arguments
from hyimg.rendering.prompts import load_prompts, parse_prompt_line

TRAIN = {"dit": "dit.safetensors", "dataset_config": "data.toml", "output_dir": "out"}


def plugin(
    *,
    number: float = 1.0,
    count: int = 1,
    word: str = "",
    switch: bool = False,
    maybe: int | None = None,
    kind: Literal["soft", "hard", 2] = "soft",
): ...


def read(source, name, value, folder):
    """Gives `value` to the one `name` of a source."""
    if source == "flag":
        config = InferConfig if name in ("image_size", "guidance_scale") else TrainConfig
        make(config, {**(TRAIN if config is TrainConfig else {}), name: value})
    elif source == "run file":
        path = folder / "run.toml"
        path.write_text(f"{name} = {json.dumps(value)}\n", encoding="utf-8")
        make(TrainConfig, TRAIN, run_file=path)
    elif source == "dataset file":
        keys = {"resolution": 64, name: value, "subsets": [{"image_dir": str(folder)}]}
        parse_dataset({"datasets": [keys]}, folder / "set.toml")
    elif source == "network argument":
        parse_network_args([f"{name}={value}"])
    elif source == "prompt line":
        parse_prompt_line(f"a cat --{name} {value}", place="p.txt line 3")
    elif source == "prompt table":
        path = folder / "p.json"
        path.write_text(json.dumps([{"prompt": "a cat", name: value}]), encoding="utf-8")
        load_prompts(path)
    else:
        arguments = parse_arguments([f"{name}={value}"], "--x_args")
        bind_arguments(plugin, arguments, option="--x_args", name="it")


MESSAGES = {
    "flag": "`--{name}` {sentence}",
    "run file": "`--{name}` in `{folder}/run.toml` {sentence}",
    "dataset file": "`{folder}/set.toml`, [[datasets]] 1: `{name}` {sentence}",
    "network argument": "`{name}` in `--network_args` {sentence}",
    "prompt line": "p.txt line 3: `--{name}` {sentence}",
    "prompt table": "`{folder}/p.json` prompt 1: `{name}` {sentence}",
    "plugin argument": "`{name}` of `it` in `--x_args` {sentence}",
}
CHOICES = "must be one of `lanczos`, `bicubic`, `bilinear`, `area`, `nearest`, got `lancsoz`; did you mean `lanczos`?"
WRONG = {
    "flag": [
        ("max_train_steps", "ten", "must be a whole number, got `ten`"),
        ("max_train_steps", "", "must be a whole number, got nothing"),
        ("max_train_steps", "0", "must be at least 1, got 0"),
        ("max_train_steps", str(10**30), "must be at most 18446744073709551615, got a number of 31 digits"),
        ("seed", "1.5", "must be a whole number, got `1.5`"),
        ("seed", True, "must be a whole number, got `true`"),
        ("seed", str(2**64), "must be at most 18446744073709551615, got 18446744073709551616"),
        ("seed", "9" * 2000, "must be at most 18446744073709551615, got a number of 2000 digits"),
        ("network_alpha", "0", "must be above 0, got 0"),
        ("network_dropout", "1.5", "must be at most 1, got 1.5"),
        ("guidance_scale", "nan", "must be a finite number, got `nan`"),
        ("guidance_scale", "much", "must be a number, got `much`"),
        ("dataset_config", "", "must be a path, got nothing"),
        ("output_dir", "a\0b", "must be a path, got one with a zero byte"),
        (
            "output_dir",
            "~nobody-here/x",
            "must be a path, got `~nobody-here/x`, whose user does not exist here",
        ),
        ("output_dir", "caf\udce9", "must be UTF-8 text, got `caf\\udce9`"),
        ("output_name", "caf\udce9", "must be UTF-8 text, got `caf\\udce9`"),
        ("image_size", ["1000", "1024"], "must be a multiple of 32, got 1000 (nearest: 992 or 1024)"),
        ("image_size", ["1024"], "takes 2 values, got 1: height and width in pixels, multiples of 32"),
        ("save_at_steps", ["5,x"], "must be a whole number, got `x`"),
        ("save_at_steps", [""], "must be a whole number, got nothing"),
        ("lr_warmup_steps", "1.5", "must be a whole number of steps or a share below 1, got `1.5`"),
        ("lr_warmup_steps", "100%", "must be a whole number of steps or a share below 1, got `100%`"),
        ("lr_warmup_steps", "inf", "must be a whole number of steps or a share below 1, got `inf`"),
        ("lr_warmup_steps", "-1", "must be at least 0, got -1"),
    ],
    "run file": [
        ("max_train_steps", "ten", "must be a whole number, got `ten`"),
        ("max_train_steps", [1, 2], "takes one value, got 2"),
        ("learning_rate", True, "must be a number, got `true`"),
        ("output_name", 5, "must be text, got `5`"),
        ("save_state", "maybe", "must be true or false, got `maybe`"),
        (
            "mixed_precision",
            "bf61",
            "must be one of `auto`, `no`, `fp16`, `bf16`, got `bf61`; did you mean `bf16`?",
        ),
    ],
    "dataset file": [
        ("batch_size", "2", 'must be a whole number, got `"2"`'),
        ("batch_size", 2.0, "must be a whole number, got `2.0`"),
        ("batch_size", 0, "must be at least 1, got 0"),
        ("flip_aug", 1, "must be true or false, got `1`"),
        ("caption_dropout_rate", 1.5, "must be at most 1, got 1.5"),
        ("caption_separator", "", "must not be empty"),
        ("caption_separator", 3, "must be text, got `3`"),
        ("custom_attributes", 3, "must be a table, got `3`"),
        ("network_multiplier", 0, "must not be 0, which trains nothing"),
        ("network_multiplier", math.nan, "must be a finite number, got `NaN`"),
        ("prior_loss_weight", 10**400, "must be a finite number, got a number of 401 digits"),
        ("resize_interpolation", "lancsoz", CHOICES),
        ("resolution", True, "must be a whole number, got `true`"),
        ("resolution", [1024], "must be a whole number or [width, height], got 1 values"),
        ("resolution", 1000, "must be a multiple of 32, got 1000 (nearest: 992 or 1024)"),
        ("resolution", [64, 10**400], "must be at most 16384, got a number of 401 digits"),
        ("bucket_reso_steps", 10**9, "must be at most 16384, got 1000000000"),
        (
            "color_aug",
            True,
            "is not supported: latents are cached from one fixed view of each image, and this changes "
            "the image at each step",
        ),
        (
            "token_warmup_step",
            10,
            "is not supported: text is cached, and this makes captions depend on the training step",
        ),
    ],
    "network argument": [
        ("rank_dropout", "1", "must be below 1, got 1: 0 is off, 0.1 drops one in ten"),
        ("module_dropout", "often", "must be a number, got `often`"),
        ("loraplus_lr_ratio", "0", "must be above 0, got 0: it multiplies a learning rate; 16 is usual"),
        ("split_qkv", "perhaps", "must be true or false, got `perhaps`"),
        ("ggpo_beta", "0.1", "is not supported: this regularisation is not implemented"),
    ],
    "prompt line": [
        ("w", "100", "must be a multiple of 32, got 100 (nearest: 96 or 128)"),
        ("h", "0", "must be at least 32, got 0"),
        ("w", "12px", "must be a whole number, got `12px`"),
        ("s", "", "must be a whole number, got nothing"),
        ("d", "-1", "must be at least 0, got -1: without a seed, a random one is drawn"),
        ("d", "1.5", "must be a whole number, got `1.5`"),
        ("l", "nan", "must be a finite number, got `nan`"),
        ("g", "-2", "must be at least 0, got -2"),
        ("fs", "0", "must be above 0, got 0"),
    ],
    "prompt table": [
        ("seed", True, "must be a whole number, got `true`"),
        ("width", "64", 'must be a whole number, got `"64"`'),
        ("negative_prompt", 3, "must be text, got `3`"),
        ("scale", "x", 'must be a number, got `"x"`'),
    ],
    "plugin argument": [
        ("number", "abc", "must be a number, got `abc`"),
        ("number", "true", "must be a number, got `True`"),
        ("number", "none", "must be a number, got `None`"),
        ("count", "1.5", "must be a whole number, got `1.5`"),
        ("word", "3", "must be text, got `3`"),
        ("switch", "1", "must be true or false, got `1`"),
        ("maybe", "x", "must be a whole number or none, got `x`"),
        ("kind", "medium", "must be `soft` or `hard` or `2`, got `medium`"),
    ],
}


@pytest.mark.parametrize(
    ("source", "name", "value", "sentence"),
    [(source, *case) for source, cases in WRONG.items() for case in cases],
)
def test_a_wrong_value_is_one_sentence_with_its_place(tmp_path, source, name, value, sentence):
    with pytest.raises(HyimgError) as caught:
        read(source, name, value, tmp_path)
    assert caught.value.exit_code == 2
    assert caught.value.message == MESSAGES[source].format(name=name, sentence=sentence, folder=tmp_path)


@pytest.mark.parametrize(
    ("source", "name", "nearest"),
    [
        ("flag", "netwrk_dim", "network_dim"),
        ("run file", "netwrk_dim", "network_dim"),
        ("dataset file", "batch_sise", "batch_size"),
        ("network argument", "network_reg_dim", "network_reg_dims"),
        ("prompt table", "widht", "width"),
        ("plugin argument", "nubmer", "number"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(tmp_path, source, name, nearest):
    with pytest.raises(HyimgError) as caught:
        read(source, name, 1, tmp_path)
    assert "unknown" in caught.value.message
    assert f"`{name}`" in caught.value.message
    assert f"did you mean `{nearest}`" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "value"),
    [("100", 100), (100, 100), ("1e2", 100), ("0.05", 0.05), ("5%", 0.05), (0, 0), ("1", 1)],
)
def test_a_warm_up_is_a_number_of_steps_or_a_share_of_them(given, value):
    assert make(TrainConfig, {**TRAIN, "lr_warmup_steps": given}).optimizer.lr_warmup_steps == value


@pytest.mark.parametrize(
    "given", ["500,800", "500 800", ["500", "800"], ["500,", "800"], [500, 800], ["500,800"]]
)
def test_a_list_of_steps_takes_commas_and_spaces(given):
    assert make(TrainConfig, {**TRAIN, "save_at_steps": given}).saving.save_at_steps == (500, 800)


@pytest.mark.parametrize(
    ("given", "value"),
    [("true", True), ("YES", True), ("1", True), ("off", False), (False, False), (0, False)],
)
def test_switches_take_several_words(given, value):
    assert make(TrainConfig, {**TRAIN, "save_state": given}).saving.save_state is value


def test_whole_numbers_may_be_written_as_fractions_and_the_largest_seed_is_exact():
    given = {"max_train_steps": "1e4", "seed": str(2**64 - 1), "train_batch_size": 2.0}
    duration = make(TrainConfig, {**TRAIN, **given}).duration
    assert (duration.max_train_steps, duration.seed, duration.train_batch_size) == (10_000, 2**64 - 1, 2)


def test_network_args_are_read_as_declared():
    args = parse_network_args(["dora=True", "split_qkv=false", "rank_dropout=none", "loraplus_lr_ratio=4"])
    assert (args.dora, args.split_qkv, args.rank_dropout, args.loraplus_lr_ratio) == (True, False, 0.0, 4.0)
    both = parse_network_args(["loraplus_unet_lr_ratio=16", "loraplus_lr_ratio=4"])
    assert both.loraplus_lr_ratio == 16.0

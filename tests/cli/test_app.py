"""The command line itself: names, several values after a flag, the reference tool's flags, errors and codes."""

from __future__ import annotations

import pytest
import typer

from hyimg.cli.app import run
from hyimg.cli.flags import add_command
from hyimg.config import commands as configs
from hyimg.config import load


@pytest.fixture
def parse(monkeypatch):
    """A command of `config` that only keeps what it was given; returns (exit code, config)."""
    from hyimg.cli import app as module

    monkeypatch.setattr(load, "check_inputs", lambda config: None)  # the paths below are names only

    def call(config, *arguments):
        kept = []

        def keep(resolved, report):
            """Keeps its config."""
            kept.append(resolved)

        own = typer.Typer()
        own.callback()(lambda: None)
        add_command(own, "keep", config, keep, panel="x")
        original, module.app = module.app, own
        try:
            code = run(["keep", *arguments])
        finally:
            module.app = original
        return code, kept[0] if kept else None

    return call


TRAIN = ["--dit", "d", "--dataset_config", "c", "--output_dir", "o"]
INFER = ["--vae", "v", "--save_path", "o"]


def test_dashes_and_underscores_are_one_name(parse):
    code, config = parse(
        configs.TrainConfig, *TRAIN, "--network-dim", "8", "--learning_rate=2e-4", "--max-train_steps", "3"
    )
    assert code == 0
    assert (config.network.network_dim, config.rate.learning_rate, config.duration.max_train_steps) == (
        8,
        2e-4,
        3,
    )


def test_several_values_after_one_flag_and_the_flag_repeated(parse):
    _, config = parse(
        configs.TrainConfig,
        *TRAIN,
        "--optimizer_args",
        "a=1",
        "b=2",
        "--optimizer-args",
        "c=3",
        "--seed",
        "1",
    )
    assert config.optimizer.optimizer_args == ("a=1", "b=2", "c=3")
    assert config.duration.seed == 1
    _, config = parse(
        configs.InferConfig, *INFER, "--image_size", "1024", "2048", "--lora_multiplier", "-1", "-0.5"
    )
    assert config.sampling.image_size == (1024, 2048)
    assert config.lora.lora_multiplier == (-1.0, -0.5)


def test_a_flag_can_switch_off_what_the_file_switches_on(parse, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("gradient_checkpointing = true\nseed = 5\n", encoding="utf-8")
    _, config = parse(configs.TrainConfig, *TRAIN, "--config_file", str(file))
    assert config.training_memory.gradient_checkpointing
    _, config = parse(
        configs.TrainConfig, *TRAIN, "--config", str(file), "--no-gradient-checkpointing", "--seed", "6"
    )
    assert not config.training_memory.gradient_checkpointing
    assert config.duration.seed == 6


def test_flags_of_the_reference_tool_are_answered(parse, capsys):
    code, config = parse(
        configs.TrainConfig, *TRAIN, "--use_8bit_adam", "--lowram", "--sdpa", "--network_train_unet_only"
    )
    assert code == 0
    assert config.optimizer.optimizer_type == "AdamW8bit"
    err = capsys.readouterr().err
    assert "`--lowram` has no effect here" in err
    assert "`--use_8bit_adam` is `--optimizer_type AdamW8bit` here" in err
    assert parse(configs.TrainConfig, *TRAIN, "--v2", "--clip_skip", "2")[0] == 2
    err = capsys.readouterr().err
    assert "`--v2`" in err
    assert "`--clip_skip`: this model has no CLIP" in err
    for flags, way_out in (
        (["--fp8_base"], "--fp8_scaled"),
        (["--min-snr-gamma", "5"], "--weighting_scheme"),
    ):
        assert parse(configs.TrainConfig, *TRAIN, *flags)[0] == 2
        assert way_out in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["tran"], ["no such command", "train"]),
        (["train", "--network_dimm", "4"], ["no such option", "--network_dim"]),
        (["train", "--network_dim", "four", *TRAIN], ["`--network_dim` must be a whole number, got `four`"]),
        (["train"], ["`--dit` is required", "`--dataset_config` is required", "`--output_dir` is required"]),
        (["convert-comfy", "a.safetensors"], ["`DESTINATION` is required"]),
        (["train", *TRAIN, "--seed"], ["--seed", "requires an argument"]),
    ],
)
def test_wrong_command_lines_are_one_answer_with_exit_code_2(arguments, parts, capsys):
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    for text in parts:
        assert text in captured.err


def test_files_that_are_not_there_are_named_with_their_options(capsys):
    assert run(["train", *TRAIN]) == 2
    err = capsys.readouterr().err
    assert "`--dit`: there is no file `d`" in err
    assert "`--dataset_config`: there is no file `c`" in err


def test_traceback_is_shown_when_asked():
    from hyimg.errors import HyimgError

    with pytest.raises(HyimgError):
        run(["train", "--traceback"])


def test_interrupts_end_with_their_code(monkeypatch, capsys):
    from hyimg.cli import app as module

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "app", interrupt)
    assert run([]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_help_lists_what_works_and_hides_what_does_not_yet(capsys):
    run(["train", "--help"])
    text = capsys.readouterr().out
    assert "--network_dim" in text
    assert "--blocks_to_swap" not in text

"""The command line itself: names, several values after a flag, the reference tool's flags, errors and codes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import tomli

from hyimg.cli.app import run
from hyimg.config import load
from hyimg.config.command_table import COMMAND_TABLE
from hyimg.config.load import did_you_mean_file


@pytest.fixture
def parse(monkeypatch):
    """A command that only keeps the config that it is given; returns (exit code, config)."""
    monkeypatch.setattr(load, "check_inputs", lambda config: None)  # the paths below are names only

    def call(command, *arguments):
        kept = []
        replace_target(monkeypatch, command, lambda config, report: kept.append(config))
        return run([command, *arguments]), kept[0] if kept else None

    return call


def replace_target(monkeypatch, command, function):
    """Makes `hyimg COMMAND` run `function`."""
    monkeypatch.setattr(COMMAND_TABLE[command].target.replace(":", "."), function)


TRAIN = ["--dit", "d", "--dataset_config", "c", "--output_dir", "o"]
INFER = ["--vae", "v", "--save_path", "o"]


def test_dashes_and_underscores_are_one_name(parse):
    code, config = parse(
        "train", *TRAIN, "--network-dim", "8", "--learning_rate=2e-4", "--max-train_steps", "3"
    )
    assert code == 0
    assert (config.network.network_dim, config.rate.learning_rate, config.duration.max_train_steps) == (
        8,
        2e-4,
        3,
    )


@pytest.mark.parametrize(
    "words",
    [
        "data.toml --plugin a.py b.py --cache_dir c",
        "--plugin a.py data.toml --cache_dir c --plugin b.py",
        "--cache_dir c --json --dataset_config data.toml --plugin a.py b.py",
        "--plugin a.py b.py --dataset_config data.toml --cache_dir c",
        "--plugin a.py b.py --dataset-config=data.toml",
    ],
)
def test_the_positional_argument_is_none_of_a_flags_values(parse, words):
    code, config = parse("dataset", *words.split())
    assert code == 0
    assert str(config.dataset.dataset_config) == "data.toml"
    assert config.common.plugin == ("a.py", "b.py")


def test_several_values_after_one_flag_and_the_flag_repeated(parse):
    _, config = parse(
        "train",
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
    _, config = parse("infer", *INFER, "--image_size", "1024", "2048", "--lora_multiplier", "-1", "-0.5")
    assert config.sampling.image_size == (1024, 2048)
    assert config.lora.lora_multiplier == (-1.0, -0.5)


def test_a_flag_can_switch_off_what_the_file_switches_on(parse, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("gradient_checkpointing = true\nseed = 5\n", encoding="utf-8")
    _, config = parse("train", *TRAIN, "--config_file", str(file))
    assert config.training_memory.gradient_checkpointing
    _, config = parse("train", *TRAIN, "--config", str(file), "--no-gradient-checkpointing", "--seed", "6")
    assert not config.training_memory.gradient_checkpointing
    assert config.duration.seed == 6


def test_flags_of_the_reference_tool_are_answered(parse, capsys):
    code, config = parse(
        "train", *TRAIN, "--use_8bit_adam", "--lowram", "--sdpa", "--network_train_unet_only"
    )
    assert code == 0
    assert config.optimizer.optimizer_type == "AdamW8bit"
    err = capsys.readouterr().err
    assert "`--lowram` has no effect here" in err
    assert "`--use_8bit_adam` is `--optimizer_type AdamW8bit` here" in err
    assert parse("train", *TRAIN, "--v2", "--clip_skip", "2")[0] == 2
    err = capsys.readouterr().err
    assert "`--v2`" in err
    assert "`--clip_skip`: this model has no CLIP" in err
    for flags, way_out in (
        (["--fp8_base"], "--fp8_scaled"),
        (["--min-snr-gamma", "5"], "omit it"),
    ):
        assert parse("train", *TRAIN, *flags)[0] == 2
        assert way_out in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["tran"], ["no such command", "train"]),
        (["train", "--network_dimm", "4"], ["no such option", "--network_dim"]),
        (["train", "--network_dim", "four", *TRAIN], ["`--network_dim` must be a whole number, got `four`"]),
        (["train"], ["`--dit` is required", "`--dataset_config` is required", "`--output_dir` is required"]),
        (["convert-comfy", "a.safetensors"], ["`DESTINATION` is required"]),
        (["train", *TRAIN, "--seed"], ["`--seed` needs a value", "`hyimg train --help`"]),
        (["train", *TRAIN, "--lowvram=2", "--gradient_checkpointing=2"], ["no such option: `--lowvram`"]),
        (["train", "--gradient_checkpointing=2"], ["`--gradient_checkpointing` takes no value, got `2`"]),
        (["merge", "-x"], ["no such option: `--x`"]),
        (["train", "--image_size", "8", "8"], ["it is an option of `hyimg sample`, `hyimg infer`"]),
        (
            ["infer", "--prompt", "a", "cat"],
            ["unexpected argument: `cat`", "quote a value that contains spaces", "`hyimg infer --help`"],
        ),
        (["cache-latents", "cats (1).toml"], ["`--dataset_config cats (1).toml`"]),
        (["cache-latents", "a.toml", "b.toml"], ["`hyimg cache-latents --help`"]),
        (
            ["infer", "--prompt", "a cat", "--save_path", "a.png", "--image_size", "1024"],
            ["`--image_size` takes 2 values, got 1: height and width"],
        ),
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


@pytest.mark.parametrize("path", [".", "..", "/", ""])
def test_a_folder_as_a_run_file_is_named(path, capsys):
    assert run(["plugins", f"--config={path}"]) in (0, 2)  # an empty value is none
    err = capsys.readouterr().err
    assert "unexpected" not in err
    assert not path or f"`{path}`" in err


def test_a_misspelt_file_is_told_with_the_one_beside_it(tmp_path, capsys):
    (tmp_path / "dataset.toml").touch()
    assert (
        run(["train", "--dit", "d", "--dataset_config", f"{tmp_path / 'datset.toml'}", "--output_dir", "o"])
        == 2
    )
    assert f"no file `{tmp_path / 'datset.toml'}`; did you mean `dataset.toml`?" in capsys.readouterr().err


def test_an_ending_that_all_share_makes_no_file_look_like_another(tmp_path):
    (tmp_path / "notalora.safetensors").touch()
    assert did_you_mean_file(tmp_path / "hunyuanimage2.1.safetensors") is None
    for misspelt in ("notalora.safetensor", "notalora", "notalore.safetensors"):
        assert did_you_mean_file(tmp_path / misspelt) == "did you mean `notalora.safetensors`?"
    (tmp_path / "hunyuanimage2.1.safetensors").touch()
    assert did_you_mean_file(tmp_path / "hunyuanimage2.1") == "did you mean `hunyuanimage2.1.safetensors`?"


def test_traceback_is_shown_when_asked():
    from hyimg.errors import HyimgError

    with pytest.raises(HyimgError):
        run(["train", "--traceback"])


@pytest.fixture
def command_that(monkeypatch):
    """A command line of `train` that raises."""

    def make(error):
        def fail(config, report):
            raise error

        replace_target(monkeypatch, "train", fail)
        monkeypatch.setattr(load, "check_inputs", lambda config: None)
        return ["train", *TRAIN]

    return make


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (KeyError("x"), ["error: unexpected KeyError: 'x'", "hint: run again with `--traceback`"]),
        (AssertionError(), ["error: unexpected AssertionError\n", "report it"]),
        (MemoryError(), ["error: out of memory\n", "hint: "]),
        (
            OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has\nmore"),
            ["error: out of GPU memory: tried to allocate 9 GiB\n", "gradient_checkpointing"],
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ["error: out of memory"]),
    ],
)
def test_what_nobody_foresaw_is_one_sentence_and_exit_code_1(command_that, error, parts, capsys):
    arguments = command_that(error)
    assert run(arguments) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    for part in parts:
        assert part in err
    with pytest.raises(type(error)):
        run([*arguments, "--traceback"])
    with pytest.raises(type(error)):
        run(["--traceback", *arguments])


@pytest.mark.parametrize(
    ("number", "words", "code"),
    [
        (errno.EFBIG, "ulimit -f", 1),
        (errno.ENOSPC, "free some space", 1),
        (errno.ENAMETOOLONG, "a shorter name", 2),
    ],
)
def test_what_the_system_refuses_is_said_with_the_way_out(command_that, number, words, code, capsys):
    assert run(command_that(OSError(number, os.strerror(number), "a.png"))) == code
    err = capsys.readouterr().err
    assert err.startswith(f"error: cannot use `a.png`: {os.strerror(number)}\nhint: ")
    assert words in err


def test_an_interrupted_command_says_so(command_that, capsys):
    assert run(command_that(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_traceback_may_be_the_value_of_an_option(parse):
    code, config = parse("train", *TRAIN, "--training_comment", "--traceback", "--seed", "1")
    assert (code, config.metadata.training_comment) == (0, "--traceback")
    assert parse("train", *TRAIN, "--gradient_checkpointing", "--traceback")[0] == 0


def test_a_reader_that_leaves_is_no_error():
    pipe = subprocess.Popen(
        [sys.executable, "-m", "hyimg", "plugins"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    pipe.stdout.close()
    assert pipe.wait() == 0
    assert pipe.stderr.read() == b""
    pipe.stderr.close()


def test_dataset_flags_are_answered_with_the_file_that_they_make(parse, capsys):
    flags = "--train_data_dir pictures --resolution 1024,1024 --enable_bucket --min_bucket_reso=256".split()
    assert parse("train", *TRAIN, *flags, "--shuffle-caption", "--color_aug")[0] == 2
    err = capsys.readouterr().err
    assert "`--train_data_dir`, `--resolution`" in err
    assert "`--color_aug`: it cannot be used with cached latents" in err
    shown = err.partition("data.toml`:\n")[2]
    assert tomli.loads(textwrap.dedent(shown)) == {
        "general": {"enable_bucket": True, "min_bucket_reso": 256, "shuffle_caption": True},
        "datasets": [{"resolution": 1024, "subsets": [{"image_dir": "pictures"}]}],
    }


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--optimizer_type", "X", "--use_8bit_adam"], 0, "AdamW8bit` here"),
        (["--use_8bit_adam", "--optimizer_type", "X"], 0, "AdamW8bit` here"),
        (["--skip_until_initial_step"], 0, "no effect here"),
        (["--weighted_captions"], 2, "brackets are text"),
        (["--zero_stage", "2"], 2, "--num_processes N"),
        (["--log_tracker_config", "a.toml"], 2, "WANDB_ENTITY"),
        (["--token_warmup_step", "3"], 2, "cached text"),
        (["--face_crop_aug_range", "1,2"], 2, "cached latents"),
        (["--network_train_unet_only"], 0, "always on"),
        (["--no_network_train_unet_only"], 2, "text encoders are never trained"),
    ],
)
def test_further_flags_of_the_reference_tool_are_answered(parse, capsys, flags, code, words):
    answer, config = parse("train", *TRAIN, *flags)
    assert answer == code
    assert words in capsys.readouterr().err
    if "--optimizer_type" in flags:
        assert config.optimizer.optimizer_type == "AdamW8bit"


# ---- streams that nobody reads

posix = pytest.mark.skipif(sys.platform == "win32", reason="closes descriptors in a POSIX shell")


def in_shell(line):
    """Runs a line in which `hyimg` stands for the command."""
    own = f'hyimg() {{ "{sys.executable}" -m hyimg "$@"; }}; set -o pipefail; {line}'
    return subprocess.run(["bash", "-c", own], capture_output=True, text=True, check=False)


@posix
@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-", "| head -c 1"])
def test_output_that_nobody_reads_is_no_error(streams):
    done = in_shell(f"hyimg --help {streams}")
    assert (done.returncode, done.stderr) == (0, "")


@posix
def test_an_error_keeps_its_exit_code_where_nobody_reads_it():
    done = in_shell("hyimg no-such-command 2>&-")
    assert (done.returncode, done.stdout) == (2, "")


@posix
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="writes to /dev/full")
def test_output_that_a_full_disk_does_not_take_is_an_error():
    done = in_shell("hyimg --help > /dev/full")
    assert (done.returncode, done.stderr) == (
        1,
        "error: the output could not be written: No space left on device\n",
    )


@posix
def test_files_do_not_get_the_numbers_of_closed_streams(tmp_path):
    code = (
        "import os, sys; from hyimg.report import outlive_the_terminal; outlive_the_terminal()\n"
        "file = open(sys.argv[1], 'w'); assert file.fileno() > 2\n"
        "print('lost'); print('lost', file=sys.stderr); os.write(1, b'lost'); os.write(2, b'lost')\n"
        "assert sys.stdin.read() == ''; assert all(map(os.get_inheritable, range(3)))"
    )
    path = tmp_path / "file"
    line = f'"{sys.executable}" -c "$CODE" "{path}" <&- >&- 2>&-'
    done = subprocess.run(["bash", "-c", line], env={**os.environ, "CODE": code}, check=False)
    assert done.returncode == 0
    assert path.read_text() == ""


def test_a_second_sighup_does_not_interrupt_the_cleaning_up(monkeypatch):
    """The kernel and the shell both send one where a terminal is closed, and a session's end a SIGTERM."""
    from hyimg.cli import app as module
    from hyimg.errors import Terminated

    monkeypatch.setattr(module, "_last_signal", None)
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is None:
        pytest.skip("Windows has no SIGHUP")
    with pytest.raises(Terminated) as error:
        module._terminate(hangup, None)
    assert error.value.exit_code == 129
    module._terminate(hangup, None)
    module._terminate(signal.SIGTERM, None)
    with pytest.raises(Terminated):
        module._terminate(signal.SIGTERM, None)

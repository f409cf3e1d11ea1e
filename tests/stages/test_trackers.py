"""TensorBoard and W&B: what is logged is read back from disk. W&B is offline, so that no test needs an account."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from hyimg.config.commands import TrainConfig
from hyimg.config.load import make
from hyimg.distributed.processes import Processes
from hyimg.report import SilentReporter
from hyimg.training.metrics import COST_FIELDS
from hyimg.training.trackers import TrackedRun, check_trackers, start_trackers

pytest.importorskip("wandb")


def records(path: Path) -> list:
    """The records of a `.wandb` file, up to that of the run's end, which W&B's process writes some time later."""
    deadline = time.monotonic() + 120
    while True:
        found = records_so_far(path)
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < deadline
        time.sleep(0.05)


def records_so_far(path: Path) -> list:
    """After 7 bytes, LevelDB's log format: blocks of 32 KiB, each piece with a header."""
    from wandb.proto import wandb_internal_pb2

    data, position, pieces, found = path.read_bytes(), 7, [], []
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):
            break
        pieces.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # full, last
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(pieces))
            found.append(record)
            pieces = []
    return found


def history(log: list) -> dict[int, dict]:
    """What was logged, by step."""
    steps: dict[int, dict] = defaultdict(dict)
    for record in log:
        if record.WhichOneof("record_type") == "history":
            values = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            steps[record.history.step.num] |= values
    return steps


def wandb_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("logs/*/wandb/offline-run-*/*.wandb"))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "lora.metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def train(hyimg, cached_dataset, tmp_path):
    """Trains some steps into a folder; gives (folder, stderr)."""

    def call(steps, *extra, name="run"):
        folder = tmp_path / name
        code, _, err = hyimg(
            *("train", "--dit", "{dit}", "--dataset_config", cached_dataset, "--output_dir", folder),
            *("--max_train_steps", steps, "--seed", 7, "--mixed_precision", "no", "--device", "cpu", *extra),
        )
        assert code == 0, err
        return folder, err

    return call


@pytest.fixture
def prompts(hyimg, fill, cached_dataset, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat --w 64 --h 64 --s 1\n", encoding="utf-8")
    assert hyimg(*fill("text", cached_dataset), "--sample_prompts", path)[0] == 0
    return path


def test_wandb_is_told_what_the_metrics_tell_and_shown_the_samples(train, prompts):
    folder, err = train(
        *(3, "--log_with", "wandb", "--wandb_run_name", "cats", "--log_tracker_name", "of_mine"),
        *("--log_config", "--validation_split", 0.4, "--validate_every_n_steps", 2),
        *("--sample_prompts", prompts, "--vae", "{vae}", "--sample_every_n_steps", 3),
        *("--wandb_api_key", "w" * 40, "--huggingface_token", "hf_hidden"),
    )
    (path,) = wandb_files(folder)
    log = records(path)
    (run,) = [record.run for record in log if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("of_mine", "cats")
    config = {item.key: json.loads(item.value_json) for record in log for item in record.config.update}
    config |= {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["network_dim"] == "4"
    assert (config["validation_split"], config["dit"]) == ("0.4", "hunyuanimage2.1.safetensors")
    steps = history(log)
    for line in metrics(folder):
        values = {k: v for k, v in line.items() if k not in ("step", "epoch", "samples") and v is not None}
        logged = steps[line["step"]]
        assert {k: logged[k] for k in values} == values
    assert set(COST_FIELDS) <= steps[1].keys()
    assert "validation_loss" in steps[2]
    assert steps[3]["sample/1/_type"].startswith("image")
    (image,) = (path.parent / "files" / "media" / "images" / "sample").iterdir()
    with Image.open(image) as logged, Image.open(folder / "sample" / "lora-step00000003-01.png") as saved:
        assert logged.tobytes() == saved.tobytes()
    everything = [p.read_bytes() for p in folder.rglob("*") if p.is_file()]
    assert not [data for data in everything if b"w" * 40 in data or b"hf_hidden" in data]
    assert f"W&B: offline, in {path.parents[2]}" in err


def test_both_trackers_are_told_the_same(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = train(2, "--log_with", "all")
    (logs,) = {path.parent for path in folder.glob("logs/*/hyimg/events*")}
    events = EventAccumulator(str(logs)).Reload()
    steps = history(records(wandb_files(folder)[0]))
    names = events.Tags()["scalars"]
    assert {"loss", "loss_smoothed", "gradient_norm", "learning_rate", *COST_FIELDS} <= set(names)
    for name in names:
        for event in events.Scalars(name):
            assert math.isclose(event.value, steps[event.step][name], rel_tol=1e-6), name


def test_a_resumed_run_keeps_its_identity_and_says_that_offline_it_is_in_two_parts(train):
    folder, _ = train(2, "--log_with", "wandb", "--save_state")
    _, err = train(4, "--log_with", "wandb", "--resume", "latest")
    first, second = (records(path) for path in wandb_files(folder))
    runs = [
        record.run for log in (first, second) for record in log if record.WhichOneof("record_type") == "run"
    ]
    assert len({run.run_id for run in runs}) == 1
    assert sorted(history(first)) == [1, 2]
    assert sorted(history(second)) == [3, 4]
    assert f"same run ID `{runs[0].run_id}`" in err
    other, _ = train(2, "--log_with", "wandb", name="other")
    assert runs[0].run_id not in wandb_files(other)[0].name


def test_a_run_that_goes_on_online_asks_for_the_same_run_and_says_when_it_is_not_there(train, monkeypatch):
    import wandb

    asked, goes_on = [], [True]

    class Online:
        offline, disabled, url = False, False, "https://wandb.example/run"

        def __init__(self, resumed):
            self.resumed = resumed

        def log(self, *arguments, **options):
            pass

        def finish(self):
            pass

    def init(**options):
        asked.append(options)
        return Online(goes_on[0])

    monkeypatch.setattr(wandb, "init", init)
    train(1, "--log_with", "wandb", "--save_state")
    _, err = train(2, "--log_with", "wandb", "--resume", "latest", "--save_state")
    assert "https://wandb.example/run" in err
    assert "W&B has no run" not in err
    goes_on[0] = False
    _, err = train(3, "--log_with", "wandb", "--resume", "latest")
    assert f"W&B has no run `{asked[0]['id']}` to resume" in err
    assert [options["resume"] for options in asked] == [None, "allow", "allow"]
    assert len({options["id"] for options in asked}) == 1
    assert all(options["settings"].disable_git for options in asked)


@pytest.mark.parametrize(
    ("package", "install"), [("wandb", '"hyimg[wandb]"'), ("tensorboard", "tensorboard")]
)
def test_without_a_trackers_package_it_is_one_sentence_before_anything_is_made(
    hyimg, cached_dataset, tmp_path, monkeypatch, package, install
):
    find_spec = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == package else find_spec(name, *rest)
    )
    code, _, err = hyimg(
        *("train", "--dit", "{dit}", "--dataset_config", cached_dataset, "--output_dir", tmp_path / "run"),
        *("--log_with", "all"),
    )
    assert code == 2
    assert err == f"error: `--log_with all` needs the package {package}\nhint: `pip install {install}`\n"
    assert not (tmp_path / "run").exists()


def test_without_an_account_it_is_one_sentence_before_anything_is_made(model, cached_dataset, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_CONFIG_DIR": str(tmp_path)}
    environment |= {"WANDB_BASE_URL": "http://127.0.0.1:9"}  # where nobody listens
    words = [
        "train",
        "--dit",
        model.dit,
        "--dataset_config",
        cached_dataset,
        "--output_dir",
        tmp_path / "run",
    ]
    words += ["--log_with", "wandb", "--device", "cpu"]
    ran = subprocess.run(
        [sys.executable, "-m", "hyimg", *map(str, words)],
        **{
            "capture_output": True,
            "text": True,
            "env": environment,
            "stdin": subprocess.DEVNULL,
            "timeout": 120,
        },
    )
    assert ran.returncode == 2, ran.stderr
    assert "error: W&B login failed: No API key configured" in ran.stderr
    assert "WANDB_MODE=offline" in ran.stderr
    assert not (tmp_path / "run").exists()


def test_options_of_wandb_without_it_are_warned_of(train):
    _, err = train(1, "--wandb_run_name", "cats")
    assert "`--wandb_run_name` has no effect without `--log_with wandb`" in err


def test_of_several_processes_the_main_one_has_trackers(monkeypatch, tmp_path):
    needed = dict.fromkeys(("dit", "dataset_config", "output_dir"), tmp_path)
    config = make(TrainConfig, {**needed, "log_with": "all", "wandb_run_name": "cats"})
    run = TrackedRun(config, "lora", tmp_path / "logs", 0.0, None)
    start_trackers(SimpleNamespace(is_main_process=False), run, SilentReporter())
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Processes, "current", lambda: Processes(1, 2, 1))
    check_trackers(config.logging)

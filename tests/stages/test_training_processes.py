"""Training in two processes: the same as one process with twice the accumulation, whoever has started them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hyimg.memory.processes import Processes
from hyimg.training.state_folder import read_state
from hyimg.training.step_metrics import COST_FIELDS

PYTHON = sys.executable
LAUNCHERS = {
    "num_processes": [PYTHON, "-m", "hyimg"],
    "torchrun": [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "hyimg"],
    "accelerate": [
        *(PYTHON, "-m", "accelerate.commands.launch"),
        *("--multi_gpu", "--num_processes=2", "--mixed_precision=no", "-m", "hyimg"),
    ],
}
STEPS = 6  # an epoch is two: three images and one batch each, so that one process has none in every second
# each of these has randomness or a state of its own
OPTIONS = [
    *("--max_train_steps", str(STEPS), "--seed", "5", "--mixed_precision", "no", "--device", "cpu"),
    *(
        "--learning_rate",
        "1e-2",
        "--max_grad_norm",
        "0.1",
        "--ema_decay",
        "0.9",
        "--blank_prompt_preservation",
        "0.5",
    ),
    *("--network_args", "module_dropout=0.5", "rank_dropout=0.2", "--scale_weight_norms", "0.5"),
    *("--save_precision", "float", "--save_every_n_epochs", "1", "--save_every_n_steps", "3", "--save_state"),
    *("--validation_split", "0.4", "--validate_every_n_steps", "2", "--sample_every_n_epochs", "3"),
    "--no_metadata",
]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, cached_dataset, model) -> Path:
    """Five images one at a time, two of them held back, and the prompts of the samples."""
    from hyimg.cli.app import run

    folder = tmp_path_factory.mktemp("single") / "data"
    shutil.copytree(cached_dataset.parent, folder)
    path = folder / "data.toml"
    path.write_text(path.read_text().replace("batch_size = 2", "batch_size = 1"), encoding="utf-8")
    prompts = folder / "prompts.txt"
    prompts.write_text(
        "".join(f"prompt {n} --w 64 --h 64 --s 1 --d {n}\n" for n in range(3)), encoding="utf-8"
    )
    files = ["--text_encoder", model.text_encoder, "--byt5", model.byt5, "--sample_prompts", prompts]
    assert run(["cache-text", "--dataset_config", str(path), *map(str, files)]) == 0
    return path


@pytest.fixture
def command(model, dataset):
    """The arguments of a run into a folder."""

    def write(folder: Path, *extra) -> list[str]:
        prompts = dataset.parent / "prompts.txt"
        files = [
            "--dit",
            model.dit,
            "--vae",
            model.vae,
            "--dataset_config",
            dataset,
            "--sample_prompts",
            prompts,
        ]
        return [str(word) for word in ("train", *files, "--output_dir", folder, *OPTIONS, *extra)]

    return write


# Writes down which entries each process reads from the caches or writes into them, a line each
LISTENING = """
import os
from pathlib import Path
from hyimg.cache.latents import LatentStore
from hyimg.cache.text import TextStore

def listen(store, name):
    act = getattr(store, name)
    def listening(self, what, *rest):
        with open(f"{__file__}.{name}.{os.environ['RANK']}", "a") as file:
            file.write(f"{store.kind} {what!r}\\n")
        return act(self, what, *rest)
    setattr(store, name, listening)

if "RANK" in os.environ and not hasattr(LatentStore, "is_heard"):  # a plugin may be loaded by several stages
    LatentStore.is_heard = True
    for store in (LatentStore, TextStore):
        for name in ("read", "write"):
            listen(store, name)
"""


@pytest.fixture
def listening(tmp_path) -> Path:
    """A plugin for `heard`."""
    path = tmp_path / "listening.py"
    path.write_text(LISTENING, encoding="utf-8")
    return path


def heard(listening: Path, name: str) -> list[Counter[str]]:
    """What each of the two processes has done ("read" or "write"), and how often."""
    return [Counter(Path(f"{listening}.{name}.{rank}").read_text().splitlines()) for rank in (0, 1)]


def of_kind(counts: Counter[str], kind: str) -> int:
    return sum(count for what, count in counts.items() if what.startswith(kind))


def start(launcher: str, arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    more = ["--num_processes", "2"] if launcher == "num_processes" else []
    return subprocess.Popen(
        [*LAUNCHERS[launcher], *arguments, *more], stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.fixture
def alone(hyimg, command, tmp_path) -> Path:
    """The run of one process with twice the accumulation."""
    code, _, err = hyimg(*command(tmp_path / "alone", "--gradient_accumulation_steps", 2))
    assert code == 0, err
    return tmp_path / "alone"


def files(folder: Path) -> set[str]:
    """What a run has left, without the files of states, whose names are drawn."""
    found = {path.relative_to(folder) for path in folder.rglob("*")}
    return {
        str(path) for path in found if not (path.parent.name.endswith("-state") or path.suffix == ".toml")
    }


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "lora.metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in COST_FIELDS} for line in lines]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every number of the saved LoRA files and of the last state's network, optimiser and average."""
    found = {}
    for path in folder.rglob("lora*.safetensors"):
        if not path.parent.name.endswith("-state"):
            found |= {f"{path.name} {name}": tensor for name, tensor in load_file(path).items()}
    state = read_state(folder / "lora-state")
    for part in ("network", "optimizer", "ema"):
        found |= {f"{part} {name}": tensor for name, tensor in state.tensors(part).items()}
    return found


def assert_same_run(folder: Path, expected: Path, *, tolerance: float) -> float:
    """The same files, numbers and pictures; gives the largest difference of a weight."""
    assert files(folder) == files(expected)
    own, others = tensors_of(folder), tensors_of(expected)
    assert own.keys() == others.keys()
    worst = max(float((own[name].double() - others[name].double()).abs().max()) for name in own)
    assert worst <= tolerance
    lines, right = metrics(folder), metrics(expected)
    assert [line.keys() for line in lines] == [line.keys() for line in right]
    for line, other in zip(lines, right, strict=True):
        assert line == pytest.approx(other, rel=max(tolerance, 1e-9), abs=tolerance)
    for path in expected.glob("sample/*.png"):
        pixels = (np.asarray(Image.open(place), dtype=int) for place in (path, folder / "sample" / path.name))
        assert abs(next(pixels) - next(pixels)).max() <= (1 if tolerance else 0)
    return worst


@pytest.mark.parametrize(
    "launcher",
    ["num_processes", *(pytest.param(name, marks=pytest.mark.long) for name in ("torchrun", "accelerate"))],
)
def test_two_processes_do_what_one_does_with_twice_the_accumulation(
    hyimg, command, alone, tmp_path, launcher, listening, capsys
):
    folder = tmp_path / "two"
    process = start(launcher, command(folder, "--plugin", listening))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    worst = assert_same_run(folder, alone, tolerance=1e-6)
    assert len(list(folder.glob("sample/*.png"))) == 3
    assert err.count("run: 6 steps") == 1, "one process speaks"
    assert err.count("validation loss") == 4
    # an epoch is two batches and one, and each validation two held-back batches and two of the training's
    reads = heard(listening, "read")
    assert [of_kind(of_rank, "latent") for of_rank in reads] == [3 * 2 + 4 * 2, 3 * 1 + 4 * 2]
    for number in range(3):
        assert [of_rank[f"text 'prompt {number}'"] for of_rank in reads] == [1 - number % 2, number % 2]
    with capsys.disabled():
        print(f"\n{launcher}: weights, optimiser and average differ by {worst:g} at most")

    # what they have saved, one process goes on from
    state = folder / "lora-step00000003-state"
    code, _, err = hyimg(*command(tmp_path / "on", "--gradient_accumulation_steps", 2, "--resume", state))
    assert code == 0, err
    assert "number of processes 2 then, 1 now" in err
    for name, tensor in load_file(alone / "lora.safetensors").items():
        torch.testing.assert_close(
            load_file(tmp_path / "on" / "lora.safetensors")[name], tensor, atol=1e-6, rtol=0
        )


def entries(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.glob("hyimg-cache/*/*/*/*.safetensors")
    }


def test_two_processes_fill_the_caches_and_then_train_on_them(command, dataset, model, listening, tmp_path):
    cold = tmp_path / "cold"
    shutil.copytree(dataset.parent, cold, ignore=shutil.ignore_patterns("hyimg-cache"))
    files = ["--text_encoder", model.text_encoder, "--byt5", model.byt5, "--text_encoder_batch_size", "1"]
    fill = [
        "--cache_latents",
        "--cache_text_encoder_outputs",
        *files,
        "--dataset_config",
        cold / dataset.name,
    ]
    short = ["--max_train_steps", "2", "--plugin", listening]
    process = start("num_processes", command(tmp_path / "run", *fill, *short))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert entries(cold) == entries(dataset.parent)
    writes = heard(listening, "write")
    assert [of_kind(of_rank, "latent") for of_rank in writes] in ([3, 2], [2, 3])
    assert max((writes[0] + writes[1]).values()) == 1, "nothing was made twice"
    assert all(of_kind(of_rank, "text") for of_rank in writes)
    assert err.count("latents: 5 made") == err.count("run: 2 steps") == 1
    assert (tmp_path / "run" / "lora.safetensors").is_file()


def lines_of(folder: Path) -> int:
    path = folder / "lora.metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def wait_for_steps(process, folder: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while lines_of(folder) < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_two_processes_that_are_asked_to_stop_save_once_and_can_go_on(hyimg, command, tmp_path, number, code):
    folder = tmp_path / "stopped"
    process = start("num_processes", command(folder, "--max_train_steps", 100000))
    wait_for_steps(process, folder, 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert err.count("error: stopped by") == 1
    newest = max(folder.glob("lora-step*-state"))
    step = read_state(newest).document["step"]
    assert metrics(folder)[-1]["step"] == step
    more = ["--max_train_steps", step + 1, "--gradient_accumulation_steps", 2, "--resume", "latest"]
    assert hyimg(*command(folder, *more))[0] == 0
    assert not list(folder.glob(".*")), "no lock is left"


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes in /proc")
def test_when_one_of_two_is_killed_both_end_and_a_resumed_run_ends_in_the_same_bits(command, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert start("num_processes", command(whole)).wait(300) == 0
    process = start("num_processes", command(folder, "--resume", "latest"))
    wait_for_steps(process, folder, 5)
    stages = [
        pid for pid in children(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(stages[1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.count("error: ") == 1
    assert "process 2 of 2 was killed by SIGKILL" in err
    again = start("num_processes", command(folder, "--resume", "latest"))
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert_same_run(folder, whole, tolerance=0)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ["--fused_backward_pass", "--max_grad_norm", "0"],
            "`--fused_backward_pass` cannot be used in several",
        ),
        (["--num_processes", "3"], "the launcher has started 2"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(monkeypatch, hyimg, command, tmp_path, extra, message):
    monkeypatch.setattr(Processes, "current", lambda: Processes(0, 2, 0))
    monkeypatch.setattr(Processes, "is_first_to_fail", lambda self: True)
    code, _, err = hyimg(*command(tmp_path / "run", *extra))
    assert code == 2
    assert message in err
    assert not (tmp_path / "run").exists()


def test_the_run_file_says_how_many_processes_a_launcher_has_started(monkeypatch, hyimg, command, tmp_path):
    class Main(Processes):
        def broadcast(self, value):
            return value

    monkeypatch.setattr(Processes, "current", lambda: Main(0, 2, 0))
    assert hyimg(*command(tmp_path, "--output_config"))[0] == 0
    assert "num_processes = 2\n" in (tmp_path / "lora.run.toml").read_text(), "or it repeats another run"

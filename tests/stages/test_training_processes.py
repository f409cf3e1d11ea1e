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

from hyimg.distributed.processes import Processes
from hyimg.training.metrics import COST_FIELDS
from hyimg.training.state import read_state
from tests.tolerances import rounding

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
    # linear in the gradient: AdamW hides a wrong scale of it, and turns the rounding of a small one into a whole step
    *("--optimizer_type", "SGDNesterov", "--optimizer_args", "momentum=0.9", "--learning_rate", "1"),
    *("--max_grad_norm", "0.1", "--ema_decay", "0.9", "--blank_prompt_preservation", "0.5"),
    *("--network_args", "module_dropout=0.5", "rank_dropout=0.2", "--scale_weight_norms", "0.5"),
    *("--save_precision", "float", "--save_every_n_epochs", "1", "--save_every_n_steps", "3", "--save_state"),
    *("--validation_split", "0.4", "--validate_every_n_steps", "2", "--sample_every_n_epochs", "3"),
    "--no_metadata",
]
# A step's gradient of a matrix is a sum over two images, each with and without its prompt, of up to 64 tokens
CLOSE = rounding(2 * 2 * 64)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, cached_dataset, model) -> Path:
    """Five images one at a time, two of them held back, and the prompts of the samples."""
    from hyimg.cli.app import run

    folder = tmp_path_factory.mktemp("single") / "data"
    shutil.copytree(cached_dataset.parent, folder, ignore=shutil.ignore_patterns("text"))
    path = folder / "data.toml"
    path.write_text(path.read_text().replace("batch_size = 2", "batch_size = 1"), encoding="utf-8")
    prompts = folder / "prompts.txt"
    prompts.write_text(
        "".join(f"prompt {n} --w 64 --h 64 --s 1 --d {n}\n" for n in range(3)), encoding="utf-8"
    )
    files = ["--text_encoder", model.text_encoder, "--byt5", model.byt5, "--sample_prompts", prompts]
    # as OPTIONS have it, so that a run that encodes by itself makes the same entries on every processor
    how = ["--mixed_precision", "no", "--text_encoder_batch_size", "1"]
    assert run(["cache-text", *how, "--dataset_config", str(path), *map(str, files)]) == 0
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


# Writes down which entries each process reads from the caches or writes into them, a line each, and where it listens
LISTENING = """
import os
from pathlib import Path
import psutil
from hyimg.cache.latents import LatentStore
from hyimg.cache.prompt_embeddings import TextStore
from hyimg.hookspecs import hookimpl

def listen(store, name):
    act = getattr(store, name)
    def listening(self, what, *rest, **named):
        with open(f"{__file__}.{name}.{os.environ['RANK']}", "a") as file:
            file.write(f"{store.kind} {what!r}\\n")
        return act(self, what, *rest, **named)
    setattr(store, name, listening)

if "RANK" in os.environ and not hasattr(LatentStore, "is_heard"):  # a plugin may be loaded by several stages
    LatentStore.is_heard = True
    for store in (LatentStore, TextStore):
        for name in ("read", "write"):
            listen(store, name)

@hookimpl
def hyimg_step_end(step):
    # the addresses on which this process and the one that has started it listen
    if step == 2 and "RANK" in os.environ:
        own = psutil.Process()
        places = {
            connection.laddr.ip
            for process in (own, own.parent())
            for connection in getattr(process, "net_connections", getattr(process, "connections", None))("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        Path(f"{__file__}.sockets.{os.environ['RANK']}").write_text(" ".join(sorted(places)))
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


def start(launcher: str, arguments: list[str], cwd: Path | None = None) -> subprocess.Popen[str]:
    threads = str(torch.get_num_threads())  # the same bits as in this process need as many
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(Path(__file__).parents[2])}
    more = ["--num_processes", "2"] if launcher == "num_processes" else []
    return subprocess.Popen(
        [*LAUNCHERS[launcher], *arguments, *more],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=cwd,
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


def assert_close_tensors(
    own: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], share: float
) -> None:
    """Equal within `share` of the largest number of their kind: LoRA, optimiser or average."""
    assert own.keys() == expected.keys()
    for kind in {name.split()[0] for name in own}:
        names = [name for name in own if name.split()[0] == kind and own[name].is_floating_point()]
        largest = max(float(expected[name].abs().max()) for name in names if not name.endswith("alpha"))
        for name in names:
            torch.testing.assert_close(own[name], expected[name], rtol=0, atol=share * largest, msg=name)


def assert_same_run(folder: Path, expected: Path, *, share: float) -> None:
    """The same files, numbers and pictures, within `share` of how large such numbers are."""
    assert files(folder) == files(expected)
    assert_close_tensors(tensors_of(folder), tensors_of(expected), share)
    lines, right = metrics(folder), metrics(expected)
    assert [line.keys() for line in lines] == [line.keys() for line in right]
    largest_loss = max(line.get("loss", 0.0) for line in right)
    for line, other in zip(lines, right, strict=True):
        # metrics are losses, and differences and averages of losses
        assert line == (pytest.approx(other, rel=share, abs=share * largest_loss) if share else other)
    for path in expected.glob("sample/*.png"):
        pixels = (np.asarray(Image.open(place), dtype=int) for place in (path, folder / "sample" / path.name))
        assert abs(next(pixels) - next(pixels)).max() <= (1 if share else 0)


@pytest.mark.parametrize(
    "launcher",
    ["num_processes", *(pytest.param(name, marks=pytest.mark.long) for name in ("torchrun", "accelerate"))],
)
def test_two_processes_do_what_one_does_with_twice_the_accumulation(
    hyimg, command, alone, tmp_path, launcher, listening
):
    folder = tmp_path / "two"
    here = tmp_path / "here"
    here.mkdir()
    for name in ("multiprocessing", "socket", "torch", "numpy", "PIL", "safetensors"):
        (here / f"{name}.py").write_text("raise SystemExit('imported from the working folder')", "utf-8")
    own = launcher == "num_processes"  # the others are Python's and torch's, which search that folder
    process = start(launcher, command(folder, "--plugin", listening), cwd=here if own else None)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    if own:
        sockets = {Path(f"{listening}.sockets.{rank}").read_text() for rank in (0, 1)}
        assert sockets == {"127.0.0.1"}, "those of gloo, which no other machine can reach"
    assert_same_run(folder, alone, share=CLOSE)
    assert len(list(folder.glob("sample/*.png"))) == 3
    assert err.count("run: 6 steps") == 1, "one process speaks"
    assert err.count("validation loss") == 4
    # an epoch is two batches and one, and each validation two held-back batches and two of the training's
    reads = heard(listening, "read")
    assert [of_kind(of_rank, "latent") for of_rank in reads] == [3 * 2 + 4 * 2, 3 * 1 + 4 * 2]
    for number in range(3):
        assert [of_rank[f"text 'prompt {number}'"] for of_rank in reads] == [1 - number % 2, number % 2]

    # what they have saved, one process goes on from
    state = folder / "lora-step00000003-state"
    code, _, err = hyimg(*command(tmp_path / "on", "--gradient_accumulation_steps", 2, "--resume", state))
    assert code == 0, err
    assert "number of processes 2 then, 1 now" in err
    on, right = (load_file(place / "lora.safetensors") for place in (tmp_path / "on", alone))
    assert_close_tensors(
        {f"lora {n}": t for n, t in on.items()}, {f"lora {n}": t for n, t in right.items()}, CLOSE
    )


def entries(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.glob("hyimg-cache/*/*/*/*.safetensors")
    }


def test_two_processes_fill_the_caches_and_then_train_on_them(
    hyimg, command, dataset, model, listening, tmp_path
):
    cold, alone = tmp_path / "cold", tmp_path / "alone"
    for folder in (cold, alone):
        shutil.copytree(dataset.parent, folder, ignore=shutil.ignore_patterns("hyimg-cache"))
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
    own = [*("--dataset_config", alone / dataset.name), "--mixed_precision", "no", "--device", "cpu"]
    assert hyimg("cache-latents", *own, "--vae", model.vae)[0] == 0
    prompts = dataset.parent / "prompts.txt"
    assert hyimg("cache-text", *own, *files, "--sample_prompts", prompts)[0] == 0
    assert entries(cold) == entries(alone)
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
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGHUP", 129)])
def test_two_processes_that_are_asked_to_stop_save_once_and_can_go_on(hyimg, command, tmp_path, number, code):
    folder, number = tmp_path / "stopped", signal.Signals[number]
    before = signal.signal(
        signal.SIGHUP, signal.SIG_DFL
    )  # the tests may run under `nohup`, and a child inherits it
    process = start("num_processes", command(folder, "--max_train_steps", 100000))
    signal.signal(signal.SIGHUP, before)
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
    assert_same_run(folder, whole, share=0)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ["--fused_backward_pass", "--max_grad_norm", "0"],
            "`--fused_backward_pass` cannot be used with several",
        ),
        (["--num_processes", "3"], "the launcher started 2"),
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

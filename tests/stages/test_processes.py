"""Two processes on one cache: `--num_processes 2`, torchrun and `accelerate launch`, all on the CPU."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hyimg.cli.app import run
from hyimg.config.commands import CacheTextConfig
from hyimg.config.load import make
from hyimg.distributed.processes import Processes, Tally
from hyimg.errors import HyimgError
from hyimg.report import SilentReporter

STAGES = ["latents", "text"]
PYTHON = sys.executable
LAUNCHERS = {
    "num_processes": [PYTHON, "-m", "hyimg"],
    "torchrun": [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "hyimg"],
    "accelerate": [
        *(PYTHON, "-m", "accelerate.commands.launch"),
        *("--multi_gpu", "--num_processes=2", "--mixed_precision=no", "-m", "hyimg"),
    ],
}


def start(launcher: str, arguments: list[str], **options) -> subprocess.Popen[str]:
    more = ["--num_processes", "2"] if launcher == "num_processes" else []
    threads = str(torch.get_num_threads())  # the same bits as in this process need as many
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [*LAUNCHERS[launcher], *arguments, *more],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


@pytest.fixture
def cold(own_dataset) -> Path:
    """A dataset file without caches."""
    shutil.rmtree(own_dataset.parent / "hyimg-cache")
    return own_dataset


def contents(dataset: Path, stage: str) -> dict[str, bytes]:
    cache = dataset.parent / "hyimg-cache"
    return {str(p.relative_to(cache)): p.read_bytes() for p in (cache / stage).glob("*/*/*.safetensors")}


# each start imports torch three times; the two stages through each launcher are more than a minute
CASES = [("num_processes", "latents"), ("num_processes", "text"), ("torchrun", "latents")]
LONG = [("torchrun", "text"), ("accelerate", "latents"), ("accelerate", "text")]


@pytest.mark.parametrize(
    ("launcher", "stage"), CASES + [pytest.param(*case, marks=pytest.mark.long) for case in LONG]
)
def test_two_processes_share_the_work_and_finish_one_complete_cache(
    hyimg, fill, cold, cached_dataset, launcher, stage
):
    process = start(launcher, [*fill(stage, cold, "--device", "cpu")])
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert contents(cold, stage) == contents(cached_dataset, stage)
    num_entries = len(contents(cold, stage))
    told = f"latents: {num_entries} made" if stage == "latents" else f"text: {num_entries} prompts made"
    assert err.count(told) == 1
    if stage == "latents":
        assert f"cache latents: {num_entries}/{num_entries} " in err, "the progress is that of both"
    assert f"all {num_entries}" in hyimg(*fill(stage, cold))[2]


class Half(Processes):
    """The first of two processes, whose fellow is slow: it waits for nobody."""

    def __init__(self) -> None:
        super().__init__(0, 2, 0)

    def broadcast(self, value):
        return value

    def gather(self, value):
        return [value]

    def tally(self):
        return Tally(Processes(), "")


@pytest.mark.parametrize("stage", STAGES)
def test_each_process_makes_its_half(monkeypatch, hyimg, fill, cold, cached_dataset, stage):
    half = Half()
    with monkeypatch.context() as patched:
        patched.setattr(Processes, "current", lambda: half)
        assert hyimg(*fill(stage, cold, "--device", "cpu"))[0] == 0
    right = contents(cached_dataset, stage)
    made = contents(cold, stage)
    assert made.items() < right.items()
    assert len(made) == (len(right) + 1) // 2


@pytest.mark.parametrize("launcher", ["num_processes", pytest.param("torchrun", marks=pytest.mark.long)])
def test_an_error_of_input_is_told_once(fill, cold, launcher):
    (cold.parent / "images" / "3.png").write_bytes(b"no image")
    process = start(launcher, fill("latents", cold, "--device", "cpu"))
    _, err = process.communicate(timeout=300)
    assert err.count("error: cannot read the image") == 1
    if launcher == "num_processes":  # torchrun has its own code for whatever went wrong
        assert process.returncode == 2
    assert process.returncode != 0
    assert contents(cold, "latents") == {}


def test_an_error_that_every_process_finds_is_told_once(cold):
    missing = ["cache-latents", "--dataset_config", str(cold), "--vae", "nowhere.safetensors"]
    _, err = start("torchrun", missing).communicate(timeout=300)
    assert err.count("error: ") == 1
    assert "nowhere.safetensors" in err


def test_an_error_in_one_process_ends_all_with_its_message_and_code(fill, cold, tmp_path):
    """The second process finds a broken disk."""
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import os\n"
        "from pathlib import Path\n"
        "write = Path.write_bytes\n"
        "def write_bytes(self, data):\n"
        "    if os.environ.get('RANK') == '1' and len(self.parent.name) == 2:\n"
        "        raise OSError(28, 'No space left on device')\n"
        "    return write(self, data)\n"
        "Path.write_bytes = write_bytes\n"
        "from hyimg.stages.cache_latents import cache_latents\n",
        encoding="utf-8",
    )
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from broken import cache_latents\n"
        "import hyimg.stages.cache_latents as stage\n"
        "from hyimg.cli.app import run\n"
        "if __name__ == '__main__':\n"
        f"    sys.exit(run({[*fill('latents', cold, '--device', 'cpu', '--num_processes', '2')]!r}))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [PYTHON, script], stderr=subprocess.PIPE, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "error: the disk is full" in done.stderr
    assert "Traceback" not in done.stderr


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_stage(pid: int) -> bool:
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes in /proc")
@pytest.mark.parametrize("victim", ["a process", "the parent"])
def test_when_one_is_killed_all_end(fill, cold, victim):
    process = start("num_processes", fill("text", cold, "--device", "cpu"))
    deadline = time.monotonic() + 120
    stages: list[int] = []
    while len(stages) < 2 and time.monotonic() < deadline and process.poll() is None:
        stages = [pid for pid in children(process.pid) if is_stage(pid)]
        time.sleep(0.02)
    assert len(stages) == 2
    os.kill(process.pid if victim == "the parent" else stages[1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    if victim == "a process":
        assert process.returncode == 1
        assert "error: process 2 of 2 was killed by SIGKILL" in err
    while any(alive(pid) for pid in stages) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in stages)


def test_another_number_than_the_launchers_is_refused(monkeypatch, model, cached_dataset):
    from hyimg.stages.cache_text import cache_text

    monkeypatch.setattr(Processes, "current", lambda: Processes(0, 4, 0))
    options = {"dataset_config": cached_dataset, "text_encoder": model.text_encoder, "byt5": model.byt5}
    with pytest.raises(HyimgError, match="the launcher started 4"):
        cache_text(make(CacheTextConfig, {**options, "num_processes": 2}), SilentReporter())


def test_a_world_size_without_a_launcher_is_answered(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(HyimgError, match="no launcher started this process"):
        Processes(0, 2, 0).wait()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RANK", "first", "the environment variable `RANK` is `first`, not an integer"),
        ("WORLD_SIZE", "9" * 5000, "`WORLD_SIZE` is `9999"),
        ("LOCAL_RANK", "-1", "`LOCAL_RANK` is `-1`"),
        ("RANK", "3", "`RANK` is 3 and `WORLD_SIZE` is 1"),
    ],
)
def test_wrong_variables_of_a_launcher_are_one_error(name, value, words, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    Processes.current.cache_clear()
    assert run(["inspect-modules", "--arch", "tiny"]) == 2
    Processes.current.cache_clear()
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err
    assert len(err) < 400


SLOW_STAGE = """
import multiprocessing, os, time
from pathlib import Path

HERE = Path(__file__).parent
if multiprocessing.current_process().name != "MainProcess":
    (HERE / f"importing-{os.getpid()}").touch()
    time.sleep(1.5)

def stage(config, report):
    (HERE / "worked").touch()
"""
STARTER = """
import sys
from hyimg.distributed.launch import launch
from hyimg.report import SilentReporter
from slow import stage

if __name__ == "__main__":
    try:
        launch(stage, None, SilentReporter(), num_processes=2)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_a_ctrl_c_that_comes_while_the_processes_start_is_not_lost(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_STAGE, encoding="utf-8")
    (tmp_path / "starter.py").write_text(STARTER, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [PYTHON, tmp_path / "starter.py"], stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("importing-*"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert not (tmp_path / "worked").exists()
    assert "Traceback" not in err


RESTARTED = """
import os, sys, time
from pathlib import Path
from hyimg.distributed.processes import Processes

processes, attempt = Processes.current(), os.environ["TORCHELASTIC_RESTART_COUNT"]
if processes.is_main and attempt == "1":
    time.sleep(1)  # the other one is there to read what the attempt before has told
told = processes.broadcast(f"attempt {attempt}")
processes.wait()
if attempt == "0":
    sys.exit(1)
Path(__file__).with_name(f"told-{processes.rank}").write_text(f"{told}, {processes.is_first_to_fail()}")
"""


def test_processes_that_torchrun_starts_anew_hear_nothing_of_those_before(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(RESTARTED, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    torchrun = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, "--max-restarts=1", "--monitor-interval=0.1", script],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = [(tmp_path / f"told-{rank}").read_text().split(", ") for rank in range(2)]
    assert [text for text, _ in told] == ["attempt 1"] * 2
    assert sorted(is_first for _, is_first in told) == ["False", "True"]

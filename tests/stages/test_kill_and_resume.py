"""Real processes of `hyimg train` that are killed at any moment, inside a save too: the run that goes on ends in
the same bits. And processes that are asked to stop.

A process kills itself: a plugin counts what it does (steps, and every file of the run folder that is opened,
renamed or removed) and sends SIGKILL at a given count, so that a moment can be tried again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import select
import signal
import sys
import time
from pathlib import Path

import pytest

from hyimg.cache.atomic import TEMPORARY_SUFFIX
from hyimg.cli.app import main
from hyimg.training.metrics import COST_FIELDS
from hyimg.training.state import equal, read_state, unpack

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fork server is used on Linux only")

PLUGIN = """
import json, os, signal, sys
from pathlib import Path

from hyimg.hookspecs import hookimpl

folder, at = json.loads(Path(__file__).with_name("moment.json").read_text())
count = 0
started = False
marks = {}


def happens():
    global count
    count += started
    if started and count == at:
        os.kill(os.getpid(), signal.SIGKILL)


def watch(event, arguments):
    if event in ("os.remove", "os.rmdir") or (
        event in ("open", "os.rename", "os.mkdir") and os.fsdecode(str(arguments[0])).startswith(folder)
    ):
        happens()


sys.addaudithook(watch)


@hookimpl
def hyimg_run_start(run):
    global started
    started = True


@hookimpl
def hyimg_step_end(run, step):
    happens()
    marks[step] = count


@hookimpl
def hyimg_run_end(run):
    marks["end"] = count
    Path(__file__).with_name("marks.json").write_text(json.dumps(marks))
"""
STEPS = 9  # an epoch is four


@pytest.fixture(scope="module")
def server():
    """Starts command lines in fresh processes that have their imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hyimg.cli.app", "hyimg.stages.train", "torch.utils.tensorboard"])

    def start(arguments, target=main, *before):
        process = context.Process(target=target, args=(*before, [str(argument) for argument in arguments]))
        process.start()
        return process

    start(["--version"]).join(120)
    return start


@pytest.fixture
def command(model, cached_dataset):
    """A command line that trains 9 steps into a folder, or goes on there."""

    def write(folder: Path, *extra) -> list:
        return [
            *("train", "--dit", model.dit, "--dataset_config", cached_dataset, "--output_dir", folder),
            *f"--max_train_steps {STEPS} --seed 7 --mixed_precision no --device cpu --no_metadata".split(),
            *"--save_every_n_steps 2 --save_every_n_epochs 1 --save_last_n_steps 4 --save_state".split(),
            *("--resume", "latest", "--overwrite", *extra),
        ]

    return write


@pytest.fixture
def killed_at(server, command, tmp_path):
    """Runs the command until the plugin's count is `moment` (0: to its end); gives the exit code."""

    def run(folder: Path, moment: int, *extra) -> int:
        plugin = tmp_path / "killer.py"
        plugin.write_text(PLUGIN, encoding="utf-8")
        (tmp_path / "moment.json").write_text(json.dumps([str(folder), moment]), encoding="utf-8")
        process = server([*command(folder, *extra), "--plugin", plugin])
        process.join(120)
        return process.exitcode

    return run


def metrics(folder):
    lines = (folder / "lora.metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in COST_FIELDS} for line in lines]


def loras(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("lora*.safetensors")}


def assert_same_end(folder, expected):
    """Final files, all that is not rotated away, the state and the metrics are the same; nothing is left over."""
    assert loras(expected).items() <= loras(folder).items()
    first, second = (read_state(place / "lora-state") for place in (folder, expected))
    for part in second.document["parts"]:
        values = (unpack(state.document["parts"][part], state.tensors(part)) for state in (first, second))
        assert equal(*values), part
    assert metrics(folder) == metrics(expected)
    for state in folder.glob("*-state"):
        read_state(state)
    assert not [path for path in folder.rglob("*") if path.name.endswith((TEMPORARY_SUFFIX, ".lock"))]


@pytest.fixture
def marks(tmp_path):
    """The counts, after a run that nobody killed, at the end of each step ("1" and so on) and at the end."""
    return lambda: json.loads((tmp_path / "marks.json").read_text())


@pytest.fixture
def undisturbed(killed_at, tmp_path):
    """The folder of a run that nobody kills."""
    assert killed_at(tmp_path / "whole", 0) == 0
    return tmp_path / "whole"


def go_on_until_done(killed_at, folder, moments, *extra):
    """Runs that are killed at each of the moments in turn, and one that is not; gives how many were killed."""
    killed = 0
    for moment in [*moments, 0]:
        code = killed_at(folder, moment, *extra)
        # a moment may be past the end of what is left
        assert code == 0 or (moment and code == -signal.SIGKILL)
        killed += code != 0
    return killed


def test_a_run_that_is_killed_at_any_moment_ends_in_the_same_bits(killed_at, undisturbed, marks, tmp_path):
    end, draw = marks()["end"], random.Random(1)
    for number, first in enumerate((end // 8, end // 3, end // 2)):
        folder = tmp_path / f"killed{number}"
        assert go_on_until_done(killed_at, folder, [first, draw.randrange(1, end // 3)]) == 2
        assert_same_end(folder, undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit", "Adafactor"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_many_kills(killed_at, marks, tmp_path, capsys, optimizer, precision):
    extra = ["--optimizer_type", optimizer, "--mixed_precision", precision]
    extra += ["--optimizer_args", "min_8bit_size=64"] if optimizer == "AdamW8bit" else []
    assert killed_at(tmp_path / "whole", 0, *extra) == 0
    end, draw, killed, runs = marks()["end"], random.Random(optimizer + precision), 0, 0
    while killed < 20:
        folder = tmp_path / f"killed{runs}"
        moments = [draw.randint(1, end) for _ in range(draw.randint(1, 5))]
        killed += go_on_until_done(killed_at, folder, moments, *extra)
        assert_same_end(folder, tmp_path / "whole")
        runs += 1
    with capsys.disabled():
        print(f"\n{optimizer}, {precision}: killed {killed} times in {runs} runs, all exact")


@pytest.mark.long
def test_kills_all_along_a_save(killed_at, undisturbed, marks, tmp_path, capsys):
    # after step 8 LoRA and state are saved by step and by epoch, and older ones are removed
    moments = range(marks()["8"], marks()["9"] + 1, 5)
    for moment in moments:
        folder = tmp_path / f"killed{moment}"
        assert go_on_until_done(killed_at, folder, [moment]) == 1
        assert_same_end(folder, undisturbed)
    with capsys.disabled():
        print(f"\nkilled at {len(moments)} moments of a save, all exact")


# ---- asked to stop


def wait_for(condition, process, *, reads=None):
    """Returns once it is so; meanwhile what comes from a terminal's other end is read, as a window does."""
    started = time.monotonic()
    while not condition():
        if reads is not None and select.select([reads], [], [], 0)[0]:
            os.read(reads, 65536)
        assert process.is_alive()
        assert time.monotonic() - started < 300
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_that_is_asked_to_stop_saves_and_can_go_on(server, command, tmp_path, number, code):
    folder = tmp_path / "stopped"
    # a loader's process gets the terminal's Ctrl-C too, so the signal goes to the whole group
    many = ["--max_data_loader_n_workers", "1", "--max_train_steps", "100000"]
    process = server(command(folder, *many))
    wait_for(lambda: (folder / "lora.metrics.jsonl").is_file() and metrics(folder), process)
    for target in [process.pid, *children(process.pid)] if number == signal.SIGINT else [process.pid]:
        os.kill(target, number)
    process.join(300)
    assert process.exitcode == code
    (newest,) = {max(path.name for path in folder.glob("lora-step*-state"))}
    step = int(re.search(r"\d{8}", newest)[0])
    assert read_state(folder / newest).document["step"] == step == len(metrics(folder))
    again = server(command(folder, "--max_train_steps", step + 1))
    again.join(300)
    assert again.exitcode == 0
    assert len(metrics(folder)) == step + 1


def on_a_terminal(name, arguments):
    """A command line in a session whose terminal is the one of that name."""
    os.setsid()
    terminal = os.open(name, os.O_RDWR)  # becomes the session's
    for number in (0, 1, 2):
        os.dup2(terminal, number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under `nohup`
    main(arguments)


def test_a_run_whose_terminal_is_closed_saves_and_can_go_on(server, command, tmp_path):
    import pty  # not on Windows

    folder = tmp_path / "hung up"
    ours, theirs = pty.openpty()
    arguments = command(folder, "--max_data_loader_n_workers", "1", "--max_train_steps", "100000")
    process = server(arguments, on_a_terminal, os.ttyname(theirs))
    wait_for(lambda: (folder / "lora.metrics.jsonl").is_file() and metrics(folder), process, reads=ours)
    for child in children(process.pid):  # a shell sends it to all of a job
        os.kill(child, signal.SIGHUP)
    os.close(theirs)
    os.close(ours)
    process.join(60)
    assert process.exitcode == 129
    newest = max(folder.glob("lora-step*-state"))
    assert read_state(newest).document["step"] == len(metrics(folder))
    assert not list(folder.glob(".*")), "no lock is left"


def children(pid):
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


TERMINATED_WHILE_LOADING = """
import os, signal
import hyimg.memory.dit_loader as memory

def load(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)

memory.load_dit = load
"""


def test_sigterm_before_the_first_step_ends_the_process_in_order(server, command, tmp_path):
    (tmp_path / "terminated.py").write_text(TERMINATED_WHILE_LOADING, encoding="utf-8")
    process = server(command(tmp_path / "run", "--plugin", tmp_path / "terminated.py"))
    process.join(300)
    assert process.exitcode == 143
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lora.run.toml"], "and no lock"

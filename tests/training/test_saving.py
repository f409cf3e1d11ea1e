"""Which files a run leaves: rotation as in the reference tool, saves that are asked for, and stopping by signals."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from hyimg.distributed.processes import Processes
from hyimg.errors import RunError, StoppedError, Terminated
from hyimg.lora.files.conversion import convert
from hyimg.report import SilentReporter
from hyimg.training import saving, state
from hyimg.training.loop import StopRequest
from hyimg.training.state import read_state


def names(folder, ending):
    """What of the names ends so, without `lora` and the ending; the final file is ""."""
    own = (path.name for path in folder.iterdir() if path.name.endswith(ending) and path.name[0] != ".")
    return sorted(name.removeprefix("lora").removesuffix(ending) for name in own)


def loras(folder):
    """The numbers of the LoRA files, which are the same in both forms."""
    found = names(folder, ".safetensors")
    assert found == names(folder / "comfy", ".safetensors")
    return found


def steps(*numbers):
    return [f"-step{number:08}" for number in numbers]


def epochs(*numbers):
    return [f"-{number:06}" for number in numbers]


# ---- rotation; an epoch is four steps


def test_step_saves_are_kept_so_many_steps_and_not_so_many_files(train):
    # the reference tool's own example in tenths: every 10, last 30, at step 50 the file of step 10 goes
    run = train(max_train_steps=5, save_every_n_steps=1, save_last_n_steps=3)
    assert loras(run.folder.directory) == ["", *steps(2, 3, 4, 5)]


@pytest.mark.parametrize(
    ("last", "kept"), [(1, (6,)), (2, (4, 6)), (3, (4, 6)), (4, (2, 4, 6)), (9, (2, 4, 6))]
)
def test_steps_between_saves_count_too(train, last, kept):
    run = train(max_train_steps=7, save_every_n_steps=2, save_last_n_steps=last)
    assert loras(run.folder.directory) == ["", *steps(*kept)]


def test_epoch_saves_are_kept_so_many_files(train):
    run = train(max_train_epochs=7, save_every_n_epochs=2, save_last_n_epochs=2)
    assert loras(run.folder.directory) == ["", *epochs(4, 6)]


def test_states_go_with_the_files_unless_they_have_a_number_of_their_own(train):
    options = {"max_train_epochs": 2, "save_every_n_steps": 2, "save_last_n_steps": 4, "save_state": True}
    folder = train(**options).folder.directory
    assert names(folder, "-state") == loras(folder) == ["", *steps(4, 6, 8)]
    folder = train(**options, save_last_n_steps_state=1).folder.directory
    assert names(folder, "-state") == ["", *steps(8)]
    assert loras(folder) == ["", *steps(4, 6, 8)]
    options = {"max_train_epochs": 5, "save_every_n_epochs": 1, "save_state": True}
    folder = train(**options, save_last_n_epochs_state=1).folder.directory
    assert names(folder, "-state") == ["", *epochs(4)]
    assert loras(folder) == ["", *epochs(1, 2, 3, 4)]


def test_rotation_by_step_leaves_epochs_alone_and_other_names(train, tmp_path):
    folder = tmp_path / "run"
    (folder / "lora2-step00000001-state").mkdir(parents=True)
    (folder / "lora2-step00000001.safetensors").write_bytes(b"")
    train(
        output_dir=folder, max_train_steps=5, save_every_n_steps=1, save_every_n_epochs=1, save_last_n_steps=1
    )
    assert names(folder, ".safetensors") == ["", *epochs(1), *steps(4, 5), "2-step00000001"]
    assert (folder / "lora2-step00000001-state").is_dir()


def test_files_of_listed_steps_are_saved_and_stay(train, report):
    options = {"max_train_steps": 7, "save_at_steps": "1,4", "save_state": True}
    run = train(**options, save_every_n_steps=3, save_last_n_steps=1)
    assert loras(run.folder.directory) == ["", *steps(1, 4, 6)]
    assert names(run.folder.directory, "-state") == ["", *steps(6)], "states go as they would"
    assert report.warnings == []


def test_listed_steps_past_the_end_of_the_run_are_named(train, report):
    run = train(max_train_steps=3, save_at_steps=(3, 9, 5, 2))
    assert loras(run.folder.directory) == ["", *steps(2, 3)]
    assert report.warnings == ["`--save_at_steps`: the run ends after 3 steps, before 5, 9"]


def test_nothing_is_removed_before_the_new_one_is_whole(train, spy, monkeypatch):
    write = saving.write_state

    def full_at_step_2(path, document, *rest, **options):
        if document["step"] == 2:
            raise RunError("the disk is full")
        write(path, document, *rest, **options)

    monkeypatch.setattr(saving, "write_state", full_at_step_2)
    with pytest.raises(RunError, match="the disk is full"):
        train(max_train_steps=3, save_every_n_steps=1, save_last_n_steps_state=1, save_state=True)
    assert names(spy.runs[-1].folder.directory, "-state") == steps(1)


def test_a_state_at_the_end_needs_no_other_states(train):
    folder = train(max_train_steps=2, save_every_n_steps=1, save_state_on_train_end=True).folder.directory
    assert names(folder, "-state") == [""]
    assert read_state(folder / "lora-state").document["step"] == 2


# ---- saves that are asked for


def test_a_file_asks_for_a_save_after_the_next_step(train, spy):
    spy.on_start = lambda run: run.folder.save_now_path.touch()
    folder = train(max_train_steps=2).folder.directory
    assert loras(folder) == ["", *steps(1)]
    assert names(folder, "-state") == steps(1)
    assert not (folder / "lora.save-now").exists()


def test_a_save_that_is_due_is_not_made_twice_where_one_is_asked_for(train, spy):
    spy.on_start = lambda run: run.folder.save_now_path.touch()
    run = train(max_train_steps=1, save_every_n_steps=1)
    assert [path.name for path in run.saved if path.parent.name != "comfy"] == [
        "lora-step00000001.safetensors",
        "lora.safetensors",
    ]
    assert [path.name for path in run.saved_states] == ["lora-step00000001-state"]


@pytest.mark.parametrize(("save_format", "folder"), [("both", ""), ("kohya", ""), ("comfy", "comfy")])
def test_every_process_knows_what_was_saved_last_and_the_main_one_saves_it(train, save_format, folder):
    run = train(save_format=save_format)
    assert run.last_good == run.folder.directory / folder / "lora.safetensors"
    assert run.last_good.is_file()
    run.prepared = replace(run.prepared, processes=Processes(1, 2))
    run.save(step=7)
    assert run.last_good == run.folder.directory / folder / "lora-step00000007.safetensors"
    assert not run.last_good.exists()


@pytest.mark.parametrize("save_precision", [None, "bf16"])
@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_the_comfyui_file_of_a_save_is_the_other_file_converted(train, tmp_path, kind, save_precision):
    if kind == "dora":
        options = {"network_args": ("dora=True", "split_qkv=True")}
    else:
        options = {"network_module": kind, "network_args": ("full_matrix=True",) if kind == "lokr" else ()}
    run = train(**options, save_precision=save_precision, learning_rate=1e-2)
    saved, converted = run.folder.directory / "lora.safetensors", tmp_path / "converted.safetensors"
    convert(saved, converted, to="comfy")
    assert (saved.parent / "comfy" / saved.name).read_bytes() == converted.read_bytes()


# ---- signals


def interrupt_at(step, spy, number, times=1):
    """Sends the signal to this process while the loss of a step is computed, in the first run only."""
    left = [number] * times

    def loss(prediction, target, context):
        while left and spy.runs[-1].step == step - 1:
            os.kill(os.getpid(), left.pop())
        return (prediction - target).square().mean((1, 2, 3))

    spy.losses["interrupted"] = loss
    return {"loss_type": "interrupted"}


HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none


@pytest.fixture
def hangups():
    """SIGHUP is answered, as it is where the tests do not run under `nohup`."""
    before = signal.signal(HANGUP, signal.SIG_DFL)
    yield
    signal.signal(HANGUP, before)


SIGNALS = (signal.SIGINT, signal.SIGTERM, HANGUP)


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize(("number", "code"), [*zip(SIGNALS, (130, 143, 129), strict=True)])
def test_the_first_signal_finishes_the_step_and_says_how_to_go_on(train, spy, tmp_path, number, code):
    before = [signal.getsignal(which) for which in SIGNALS]
    folder = tmp_path / "run"
    with pytest.raises(StoppedError, match="after step 2 of 5") as caught:
        train(output_dir=folder, max_train_steps=5, **interrupt_at(2, spy, number))
    assert caught.value.exit_code == code
    assert f"--config {folder / 'lora.run.toml'} --resume latest" in caught.value.hint
    assert loras(folder) == names(folder, "-state") == steps(2)
    assert [signal.getsignal(which) for which in SIGNALS] == before
    whole = train(max_train_steps=5, loss_type="interrupted").folder.directory
    train(output_dir=folder, max_train_steps=5, loss_type="interrupted", resume="latest")
    first, second = (load_file(place / "lora.safetensors") for place in (whole, folder))
    assert all((first[name] == second[name]).all() for name in first)


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_the_second_signal_stops_at_once(train, spy, report, number, kind):
    with pytest.raises(kind):
        train(max_train_steps=5, save_every_n_steps=1, **interrupt_at(3, spy, number, times=2))
    folder = spy.runs[-1].folder.directory
    assert loras(folder) == steps(1, 2)
    assert names(folder, "-state") == []
    last = folder / "lora-step00000002.safetensors"
    assert f"stopped after step 2 of 5; the last saved file is {last}" in report.warnings[-1]


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize(
    "numbers",
    [
        (HANGUP, HANGUP),
        (HANGUP, signal.SIGTERM),
        (signal.SIGTERM, HANGUP),
        (signal.SIGINT, HANGUP),
    ],
    ids=lambda numbers: "-".join(number.name for number in numbers),
)
def test_what_comes_with_the_end_of_a_terminal_is_one_signal(numbers):
    with StopRequest(SilentReporter()) as stop:
        for number in numbers:
            os.kill(os.getpid(), number)
    assert stop.signal == numbers[0]


@pytest.mark.usefixtures("hangups")
def test_a_signal_that_insists_after_a_hangup_stops_at_once():
    with StopRequest(SilentReporter()):
        os.kill(os.getpid(), HANGUP)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Terminated) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_code == 143


@pytest.mark.usefixtures("hangups")
def test_under_nohup_a_hangup_is_ignored():
    signal.signal(HANGUP, signal.SIG_IGN)
    with StopRequest(SilentReporter()) as stop:
        os.kill(os.getpid(), HANGUP)
    assert stop.signal is None


def test_a_signal_in_the_last_step_changes_nothing(train, spy):
    run = train(max_train_steps=2, **interrupt_at(2, spy, signal.SIGINT))
    assert loras(run.folder.directory) == [""]


def test_in_another_thread_signals_stay_as_they_are():
    before, inside = signal.getsignal(signal.SIGINT), []

    def block():
        with StopRequest(SilentReporter()):
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert inside == [before]


# ---- several processes


def test_the_others_wait_for_a_save_as_long_as_it_takes_and_not_in_a_sum(train, spy):
    waits = []

    class Counting(Processes):
        def wait(self):
            waits.append(spy.runs[-1].step)

    def count(run):
        run.prepared = replace(run.prepared, processes=Counting())

    spy.on_start = count
    train(max_train_epochs=2, save_every_n_steps=3, save_every_n_epochs=1)
    assert waits == [3, 4, 6], "an epoch is four steps, and nobody steps after the last"


# ---- what is not finite


def breaking(spy, *bad):
    """A loss that is NaN in the steps of those numbers."""

    def loss(prediction, target, context):
        loss_B = (prediction - target).square().mean((1, 2, 3))
        return loss_B * float("nan") if spy.runs[-1].step + 1 in bad else loss_B

    spy.losses["breaking"] = loss
    return {"loss_type": "breaking"}


def test_a_loss_that_is_not_finite_names_image_timestep_and_module(train, spy, dataset):
    with pytest.raises(RunError) as caught:
        train(max_train_steps=5, save_every_n_steps=1, **breaking(spy, 3))
    message = caught.value.message
    assert message.startswith(f"the loss is not finite at step 3: `{dataset.parent / 'images'}")
    assert ".png` at timestep " in message
    assert message.endswith("first module with such a gradient: `double_blocks.0.img_mod.linear`")
    good = spy.runs[-1].folder.directory / "lora-step00000002.safetensors"
    assert f"; last saved: `{good}`" in caught.value.hint


def test_a_gradient_that_is_not_finite_names_the_module_that_it_begins_in(train, spy):
    def break_one(run):
        lora = dict(run.network.named_modules())["lora_unet_single_blocks_1_linear2"]
        lora.lora_up.weight.register_hook(lambda gradient: gradient * float("inf"))

    spy.on_start = break_one
    with pytest.raises(RunError) as caught:
        train()
    assert caught.value.message.startswith("the gradient is not finite at step 1: `")
    assert caught.value.message.endswith("first module with such a gradient: `single_blocks.1.linear2`")


def test_of_many_images_those_are_named_whose_loss_is_not_finite(train, spy):
    def loss(prediction, target, context):
        loss_B = (prediction - target).square().mean((1, 2, 3))
        return torch.cat([loss_B[:2], loss_B[2:] * float("nan")])

    spy.losses["last two"] = loss
    with pytest.raises(RunError) as caught:
        train(train_batch_size=4, loss_type="last two")
    assert caught.value.message.count(".png` at timestep ") == 2


def test_of_many_images_a_few_are_named_where_all_are_to_blame(train, spy, make_dataset):
    spy.on_start = lambda run: run.stepper.parameters[0].register_hook(
        lambda gradient: gradient * float("nan")
    )
    with pytest.raises(RunError) as caught:
        train(dataset_config=make_dataset("batch_size = 3"), gradient_accumulation_steps=2)
    assert caught.value.message.count(".png` at timestep ") == 4
    assert " more, " not in caught.value.message


def test_a_step_that_is_not_finite_can_be_left_out(train, spy, report):
    run = train(max_train_steps=4, on_nan="skip", **breaking(spy, 2, 3))
    lines = [json.loads(line) for line in run.folder.metrics_path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["loss"] is None for line in lines] == [False, True, True, False]
    assert [line["gradient_norm"] is None for line in lines] == [False, True, True, False]
    assert lines[2]["loss_smoothed"] == lines[0]["loss_smoothed"] == lines[0]["loss"]
    assert [warning.rpartition(": ")[2] for warning in report.warnings] == [
        "skipped (1 step so far)",
        "skipped (2 steps so far)",
    ]
    (group,) = run.optimizer.param_groups
    assert {int(run.optimizer.state[p]["step"]) for p in group["params"]} == {2}


def test_a_step_that_was_left_out_has_changed_no_weight(train, spy):
    with_bad = train(max_train_steps=2, on_nan="skip", **breaking(spy, 2)).folder.directory
    without = train(max_train_steps=1).folder.directory
    first, second = (load_file(folder / "lora.safetensors") for folder in (with_bad, without))
    assert all((first[name] == second[name]).all() for name in first)


def test_ten_in_a_row_stop_a_run_that_leaves_them_out(train, spy):
    bad = [step for step in range(2, 30) if step != 5]
    with pytest.raises(RunError, match="at step 15: .*; 10 such steps in a row"):
        train(max_train_steps=40, on_nan="skip", **breaking(spy, *bad))


def test_the_count_of_steps_left_out_is_part_of_the_state(train, spy, tmp_path):
    options = {"output_dir": tmp_path / "run", "on_nan": "skip", "save_state_on_train_end": True}
    options |= breaking(spy, *range(1, 40))
    train(**options, max_train_steps=6)
    with pytest.raises(RunError, match="at step 10: "):
        train(**options, max_train_steps=20, resume="latest")


# ---- what cannot be saved


def fails_to_write(train, spy, break_it, words, hint, **options):
    """A run whose writes fail from its start on: one sentence, exit code 1, and a way on. Gives its folder."""
    spy.on_start = break_it
    with pytest.raises(RunError, match=words) as caught:
        train(**options)
    assert caught.value.exit_code == 1
    folder = spy.runs[-1].folder
    command = f"`hyimg train --config {folder.config_path} --resume latest`"
    assert caught.value.hint == f"{hint}continue with {command}; earlier saves are intact"
    spy.on_start = lambda run: None
    return folder.directory


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_file_that_is_larger_than_allowed_is_a_sentence_and_the_run_can_go_on(train, spy, tmp_path):
    import resource

    whole = train(save_state=True).folder.directory
    largest_of_state = max(path.stat().st_size for path in (whole / "lora-state").iterdir())
    lora = (whole / "lora.safetensors").stat().st_size
    assert 4000 < lora < largest_of_state
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = {"save_state": True, "resume": "latest"}
    words, hint = "larger than a file may be", "raise the limit (`ulimit -f`), then "
    # not close to a size: times in the metadata differ by some digits from run to run
    assert lora + 2000 < largest_of_state
    for what, limit in (("metrics", 100), ("LoRA", lora // 2), ("state", (lora + largest_of_state) // 2)):
        options["output_dir"] = tmp_path / what

        def limit_size(run, limit=limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

        try:
            folder = fails_to_write(train, spy, limit_size, words, hint, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        saved = [path.name for path in folder.rglob("*.safetensors")]
        assert saved == (["lora.safetensors"] * 2 if what == "state" else [])
        assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
    train(**options)
    assert read_state(folder / "lora-state").document["step"] == 1


def test_a_folder_that_is_removed_while_a_state_is_saved_is_a_sentence(train, spy, tmp_path, monkeypatch):
    write, written = state.write_tensors, []

    def removed(path, *arguments, **options):
        write(path, *arguments, **options)
        written.append(path)
        if len(written) == 2:
            shutil.rmtree(path.parent)

    monkeypatch.setattr(state, "write_tensors", removed)
    options = {"output_dir": tmp_path / "run", "save_state": True, "resume": "latest"}
    folder = fails_to_write(
        train, spy, lambda run: None, "lora-state` was removed while it was written", "", **options
    )
    assert not (folder / "lora-state").exists()
    train(**options)
    assert read_state(folder / "lora-state").document["step"] == 1


def test_a_trackers_log_that_cannot_be_written_is_a_sentence(train, spy, tmp_path):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def break_log(run):
        run.accelerator.log = full

    words = f"the disk is full: `logs` could not be written in `{tmp_path / 'run'}`"
    options = {"output_dir": tmp_path / "run", "resume": "latest"}
    fails_to_write(train, spy, break_log, words, "free some space, then ", **options)


@pytest.mark.parametrize(("free", "saved"), [(300_000, False), (450_000, True)])
def test_a_full_disk_is_found_before_a_file_is_written(train, spy, tmp_path, monkeypatch, free, saved):
    whole = saving.free_bytes

    def full(run):
        monkeypatch.setattr(saving, "free_bytes", lambda folder: free)

    options = {"output_dir": tmp_path / "run", "save_state": True, "resume": "latest"}
    words = r"the disk is too full: `lora(.safetensors|-state)` needs .* kB, and .* kB are free in"
    folder = fails_to_write(train, spy, full, words, "free some space, then ", **options)
    assert (folder / "lora.safetensors").is_file() == saved
    assert not (folder / "lora-state").exists()
    monkeypatch.setattr(saving, "free_bytes", whole)
    train(**options)
    assert read_state(folder / "lora-state").document["step"] == 1


def test_a_save_that_does_not_fit_is_found_before_the_first_step(train, spy, tmp_path, monkeypatch, report):
    monkeypatch.setattr(saving, "free_bytes", lambda folder: 10_000)
    with pytest.raises(RunError, match=r"the disk is too full: a save needs .* kB, and 10.0 kB are free"):
        train(output_dir=tmp_path / "run")
    assert spy.runs == [], "before the run starts"
    monkeypatch.setattr(saving, "free_bytes", lambda folder: 2_000_000)
    train(max_train_steps=6, save_every_n_steps=1, output_dir=tmp_path / "many")
    assert any("the saves of this run need" in warning for warning in report.warnings)
    report.warnings.clear()
    train(max_train_steps=6, save_every_n_steps=1, save_last_n_steps=1, output_dir=tmp_path / "few")
    assert report.warnings == []


@pytest.mark.parametrize("usage", [(0, 0, 0), (10, 0, 20), OSError(5, "Input/output error")])
def test_a_file_system_that_reports_nonsense_is_not_believed(tmp_path, monkeypatch, usage):
    def reported(folder):
        if isinstance(usage, OSError):
            raise usage
        return shutil._ntuple_diskusage(*usage)

    monkeypatch.setattr(saving.shutil, "disk_usage", reported)
    saving.require_space(tmp_path / "not there yet", 10**18, "a save")


def test_states_elsewhere_are_compared_with_the_disk_where_they_are(train, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "_device", lambda folder: int("states" in str(folder)))
    monkeypatch.setattr(saving, "free_bytes", lambda folder: 10**9 if folder == tmp_path / "run" else 10_000)
    options = {"output_dir": tmp_path / "run", "state_dir": tmp_path / "states"}
    train(**options)
    with pytest.raises(RunError, match=f"are free in `{tmp_path / 'states'}`"):
        train(**options, output_name="other", save_state=True)

"""A run that goes on from a state ends in the same bits; a state of other settings is not taken unsaid."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hyimg.cache.atomic import TEMPORARY_SUFFIX, WriteError
from hyimg.checkpoints.safetensors_file import read_header
from hyimg.errors import HyimgError, RunError
from hyimg.plugins import load_plugins
from hyimg.plugins.builtins import OPTIMIZERS as BUILT_IN
from hyimg.report import SilentReporter
from hyimg.training import saving
from hyimg.training.ema import averaged_weights
from hyimg.training.metrics import COST_FIELDS
from hyimg.training.optimizers import resolve_optimizer
from hyimg.training.resume import OptimizerPart, Stateful, generators_part
from hyimg.training.state import equal, pack, read_state, unpack

STEPS = 7  # of epochs of four batches
WITH_STATES = {
    "max_train_steps": STEPS,
    "save_every_n_steps": 2,
    "save_every_n_epochs": 1,
    "save_state": True,
}


def contents(state):
    """Every part of a state, tensors and all."""
    return {name: unpack(tree, state.tensors(name)) for name, tree in state.document["parts"].items()}


def metrics(folder):
    lines = (folder / "lora.metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in COST_FIELDS} for line in lines]


def assert_same_end(folder, expected):
    first, second = (contents(read_state(place / "lora-state")) for place in (folder, expected))
    assert first.keys() == second.keys()
    for part in first:
        assert equal(first[part], second[part]), part
    assert metrics(folder) == metrics(expected)


def states(folder):
    return sorted(path.name for path in folder.glob("lora-*-state"))


OPTIMIZERS = {
    "AdamW": {},
    # small tensors would otherwise keep their state in 32 bits
    "AdamW8bit": {"optimizer_args": ("min_8bit_size=64",)},
    "Adafactor": {},
    "Adafactor of the guide": {
        "optimizer_type": "Adafactor",
        "optimizer_args": ("relative_step=False", "scale_parameter=False", "warmup_init=False"),
    },
    "SGDNesterov": {},
}


def assert_exact_from(names, train, tmp_path, options):
    whole = train(**options).folder.directory
    assert states(whole) == [
        "lora-000001-state",
        "lora-step00000002-state",
        "lora-step00000004-state",
        "lora-step00000006-state",
    ]
    for number, name in enumerate(names):
        folder = tmp_path / f"resumed{number}"
        shutil.copytree(whole, folder)
        shutil.rmtree(folder / "lora-state")
        train(**options, output_dir=folder, resume=str(folder / name))
        assert_same_end(folder, whole)
    return whole


def test_a_run_from_any_of_its_states_ends_in_the_same_bits(train, tmp_path):
    names = ["lora-000001-state", *(f"lora-step0000000{step}-state" for step in (2, 4, 6))]
    assert_exact_from(names, train, tmp_path, WITH_STATES)


EXTRAS = {
    "moving average, dropout and a schedule": {
        "ema_decay": 0.9,
        "network_dropout": 0.2,
        "network_args": ("rank_dropout=0.2", "module_dropout=0.2", "loraplus_lr_ratio=4"),
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
    },
    "DoRA, max-norm and a scaled loss": {
        "network_args": ("dora=True",),
        "scale_weight_norms": 0.05,
        "mixed_precision": "fp16",
        "learning_rate": 1e-2,
    },
    "averages of the optimiser": {"optimizer_type": "AdamWScheduleFree", "learning_rate": 1e-2},
    "schedulefree's wrapper": {
        "optimizer_type": "Lion8bit",
        "optimizer_args": ("min_8bit_size=64",),
        "optimizer_schedulefree_wrapper": True,
        "schedulefree_wrapper_args": ("momentum=0.8", "weight_decay_at_y=0.1"),
        "learning_rate": 1e-2,
    },
    "schedulefree's wrapper in bf16": {
        "network_args": ("module_dropout=0.2",),
        "optimizer_type": "AdamW",
        "optimizer_schedulefree_wrapper": True,
        "mixed_precision": "bf16",
        "full_bf16": True,
        "learning_rate": 1e-2,
    },
    "split q, k, v in bf16": {
        "network_args": ("split_qkv=True",),
        "mixed_precision": "bf16",
        "full_bf16": True,
        "gradient_checkpointing": True,
        "blocks_to_swap": 1,
    },
    "preservation": {"blank_prompt_preservation": 0.5, "fp8_scaled": True},
}


@pytest.mark.parametrize("extras", EXTRAS)
def test_every_part_that_an_option_adds_goes_on_exactly(train, tmp_path, extras):
    options = WITH_STATES | EXTRAS[extras]
    whole = assert_exact_from(["lora-step00000002-state", "lora-000001-state"], train, tmp_path, options)
    trained = read_header(whole / "lora.safetensors").metadata
    assert trained["ss_steps"] == str(STEPS)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimiser_goes_on_exactly(train, tmp_path, optimizer, precision):
    options = {"optimizer_type": optimizer, "mixed_precision": precision, "learning_rate": 1e-2}
    options |= WITH_STATES | OPTIMIZERS[optimizer]
    whole = assert_exact_from(["lora-step00000002-state"], train, tmp_path, options)
    if optimizer == "AdamW8bit":
        tensors = read_state(whole / "lora-state").tensors("optimizer").values()
        assert any(tensor.dtype == torch.uint8 for tensor in tensors)


@pytest.fixture
def stopped(train, tmp_path):
    """The folder of a run that has done 4 of 7 steps and has a state of step 2 and one of step 4."""
    folder = tmp_path / "stopped"
    train(**WITH_STATES | {"max_train_steps": 4}, output_dir=folder)
    shutil.rmtree(folder / "lora-state")
    return folder


def go_on(train, folder, **options):
    """The run after it was told to go on; of one image a step, so its epochs have four steps."""
    return train(**WITH_STATES | {"output_dir": folder, "resume": "latest"} | options)


def test_latest_is_the_newest_state_and_its_steps_are_not_done_again(train, stopped, spy):
    steps = []
    spy.on_start = lambda run: steps.append((run.step, run.epoch, run.resumed.saved.path.name))
    run = go_on(train, stopped)
    # the state of step 4 was saved before the epoch's end
    assert steps == [(4, 0, "lora-step00000004-state")]
    assert (run.step, run.epoch) == (STEPS, 1)


def test_latest_goes_by_the_time_of_saving_and_not_by_the_step(train, stopped):
    # a variant from step 2 that was stopped at step 3
    train(
        **WITH_STATES | {"max_train_steps": 3, "save_every_n_steps": 1},
        output_dir=stopped,
        resume=str(stopped / "lora-step00000002-state"),
    )
    shutil.rmtree(stopped / "lora-state")
    run = go_on(train, stopped)
    assert run.resumed.saved.path.name == "lora-step00000003-state"
    assert [line["step"] for line in metrics(stopped)] == list(range(1, STEPS + 1))


def test_a_half_written_or_damaged_state_is_left_out_with_a_warning(train, stopped, report):
    (stopped / "lora-step00000006-state").mkdir()
    next((stopped / "lora-step00000004-state").glob("optimizer-*")).write_bytes(b"")
    run = go_on(train, stopped)
    assert run.resumed.saved.path.name == "lora-step00000002-state"
    assert len(report.warnings) == 2
    assert "step00000006-state` is not a complete state: `manifest.json` is missing" in report.warnings[0]
    assert "step00000004-state` is not a complete state: `optimizer-" in report.warnings[1]


def test_states_in_a_folder_elsewhere_are_found_and_go_on_in_the_same_bits(train, tmp_path):
    whole = train(**WITH_STATES).folder.directory
    options = WITH_STATES | {
        "output_dir": tmp_path / "run",
        "state_dir": tmp_path / "elsewhere",
        "resume": "latest",
    }
    train(**options | {"max_train_steps": 4})
    assert not list((tmp_path / "run").glob("*-state"))
    shutil.rmtree(tmp_path / "elsewhere" / "lora-state")
    run = train(**options)
    assert run.resumed.saved.path == tmp_path / "elsewhere" / "lora-step00000004-state"
    first, second = (contents(read_state(place / "lora-state")) for place in (whole, tmp_path / "elsewhere"))
    assert all(equal(first[part], second[part]) for part in first)


def test_states_from_before_there_was_a_folder_for_them_are_found(train, stopped, tmp_path):
    run = go_on(train, stopped, state_dir=tmp_path / "elsewhere")
    assert run.resumed.saved.path == stopped / "lora-step00000004-state"
    assert (tmp_path / "elsewhere" / "lora-state").is_dir()


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("lora-step00000004-state/manifest.json", "`{folder}/lora-step00000004-state`"),
        ("lora-step00000004.safetensors", "`{folder}/lora-step00000004-state`"),
        ("comfy/lora-step00000004.safetensors", "`{folder}/lora-step00000004-state`"),
        ("lora.safetensors", "`--network_weights` starts from a LoRA file"),
        ("lora.run.toml", "or `latest`"),
    ],
)
def test_a_file_in_place_of_a_state_is_answered_with_the_folder(train, stopped, given, hint):
    with pytest.raises(HyimgError, match="is a file, but a state is a folder") as caught:
        go_on(train, stopped, resume=str(stopped / given))
    assert hint.format(folder=stopped) in caught.value.hint


def test_a_misspelt_state_is_answered_with_the_nearest(train, stopped):
    with pytest.raises(HyimgError, match="there is no state") as caught:
        go_on(train, stopped, resume=str(stopped / "lora-step0000004-state"))
    assert "`lora-step00000004-state`" in caught.value.hint


def test_of_a_finished_run_nothing_is_left(train, stopped, spy, monkeypatch):
    go_on(train, stopped)
    files = {path: path.stat().st_mtime_ns for path in stopped.rglob("*") if path.is_file()}
    notes = []
    monkeypatch.setattr(SilentReporter, "note", lambda self, text: notes.append(text))
    monkeypatch.setattr("hyimg.memory.dit_loader.load_dit", lambda *a, **k: pytest.fail("the model was read"))
    # as a kill between the last save and the end leaves them
    for left in (".lora.lock", f".lora.safetensors.1-{'0' * 8}{TEMPORARY_SUFFIX}"):
        (stopped / left).touch()
    count = len(spy.runs)
    go_on(train, stopped)
    assert len(spy.runs) == count
    (note,) = [note for note in notes if note.startswith("nothing left to train")]
    assert f"`{stopped / 'lora-state'}` is the state of the last step, {STEPS}" in note
    assert {path: path.stat().st_mtime_ns for path in stopped.rglob("*") if path.is_file()} == files


def test_a_run_folder_in_place_of_a_state_is_told_what_a_state_is(train, stopped):
    with pytest.raises(HyimgError, match="is not a complete state: `manifest.json` is missing") as told:
        go_on(train, stopped, resume=str(stopped))
    assert "a folder whose name ends in `-state`" in told.value.hint


def test_where_no_state_is_whole_nothing_is_started_over(train, stopped):
    for state in stopped.glob("*-state"):
        (state / "manifest.json").unlink()
    with pytest.raises(HyimgError, match="there is no complete state of `lora`"):
        go_on(train, stopped)


def test_a_save_that_a_kill_cut_short_is_completed_before_the_next_step(train, tmp_path, spy):
    options = WITH_STATES | {"output_dir": tmp_path / "run", "resume": "latest"}
    folder = train(**options | {"max_train_steps": 4}).folder.directory
    shutil.rmtree(folder / "lora-state")
    # a kill in the removal of the save of step 2, and of what came before
    (folder / "comfy" / "lora-step00000004.safetensors").unlink()
    (folder / "lora-step00000002.safetensors").unlink()
    found = []
    spy.losses["looks"] = lambda prediction, target, context: (
        found.append(sorted(path.name for path in folder.rglob("*") if "-step" in path.name))
        or (prediction - target).square().mean((1, 2, 3))
    )
    train(**options, save_last_n_steps=1, loss_type="looks", resume_force=True)
    of_step_4 = ["lora-step00000004-state", *["lora-step00000004.safetensors"] * 2]
    assert found[0] == of_step_4, "before the first step"


def test_a_first_save_without_its_state_is_kept_from_all_but_latest(train, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise WriteError("the disk is full")

    options = {"output_dir": tmp_path / "run", "save_state": True}
    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_state", full)
        with pytest.raises(RunError, match="the disk is full"):
            train(**options)
    with pytest.raises(HyimgError, match="holds a run named `lora` already") as caught:
        train(**options)
    assert "`--resume latest` to continue" in caught.value.hint
    run = train(**options, resume="latest")
    assert (run.resumed, run.step, run.folder.saves()) == (None, 1, (("lora",), None))


def test_latest_overwrites_only_what_cannot_go_on(train, stopped):
    run = go_on(train, stopped, overwrite=True)
    assert run.resumed.saved.path.name == "lora-step00000004-state"
    assert "lora-step00000002-state" in states(stopped)
    for state in stopped.glob("*-state"):
        (state / "manifest.json").unlink()
    run = go_on(train, stopped, overwrite=True, max_train_steps=2)
    assert run.resumed is None
    assert states(stopped) == ["lora-step00000002-state"]


def test_latest_starts_a_run_that_has_left_nothing(train, tmp_path, report):
    run = go_on(train, tmp_path / "fresh", max_train_steps=1)
    assert (run.step, run.resumed) == (1, None)
    assert any("starting from the first step" in warning for warning in report.warnings)


def test_a_named_state_that_is_damaged_is_refused(train, stopped):
    next((stopped / "lora-step00000004-state").glob("optimizer-*")).unlink()
    with pytest.raises(HyimgError, match="`optimizer-.*` is missing"):
        go_on(train, stopped, resume=str(stopped / "lora-step00000004-state"))


def test_the_end_of_an_epoch_that_was_not_reached_is_made_up_for(train, stopped, spy):
    shutil.rmtree(stopped / "lora-000001-state", ignore_errors=True)
    for path in stopped.rglob("lora-000001.safetensors"):
        path.unlink()
    go_on(train, stopped, resume=str(stopped / "lora-step00000004-state"))
    assert (stopped / "lora-000001.safetensors").is_file()
    assert read_state(stopped / "lora-000001-state").document["step"] == 4


def test_batches_of_the_epoch_that_are_done_are_not_loaded(train, stopped, spy):
    loaded = []

    def listen(run):
        load = run.loader.load
        run.loader.load = lambda batches, *, epoch: (
            loaded.append((epoch, len(batches))) or load(batches, epoch=epoch)
        )

    spy.on_start = listen
    go_on(train, stopped, resume=str(stopped / "lora-step00000002-state"))
    assert loaded == [(1, 2), (2, 3)]
    assert read_state(stopped / "lora-step00000002-state").document["batches_of_epoch"] == 2


def test_every_image_is_seen_as_often_as_its_repeats_say_resumed_or_not(train, make_dataset, tmp_path, spy):
    seen = []

    def listen(run):
        objective = run.objective

        def shown(batch, epoch):
            seen.extend((epoch, *turn) for turn in zip(batch.sample_keys, batch.repeats, strict=True))
            return objective(batch, epoch)

        run.objective = shown

    spy.on_start = listen
    dataset = make_dataset("num_repeats = 3\nbatch_size = 2")
    options = {"output_dir": tmp_path / "run", "save_state_on_train_end": True, "dataset_config": dataset}
    train(**options, max_train_steps=4)
    train(**options, max_train_epochs=2, resume="latest")
    assert len(seen) == len(set(seen)) == 2 * 4 * 3
    assert {repeat for _, _, repeat in seen} == {0, 1, 2}


def test_a_run_of_more_steps_goes_on_from_the_end_of_a_shorter_one(train, tmp_path):
    options = {"save_state_on_train_end": True, "max_train_steps": STEPS}
    whole = train(**options).folder.directory
    train(**options | {"max_train_steps": 3}, output_dir=tmp_path / "grown")
    train(**options, output_dir=tmp_path / "grown", resume="latest")
    assert_same_end(tmp_path / "grown", whole)


def test_a_state_past_the_end_of_the_run_is_refused(train, stopped):
    with pytest.raises(HyimgError, match="is at step 4, but the run has only 3"):
        go_on(train, stopped, max_train_steps=3)


def test_a_run_that_lacks_only_its_final_file_gets_it(train, stopped):
    (stopped / "lora.safetensors").unlink()
    assert go_on(train, stopped, max_train_steps=4).step == 4
    assert (stopped / "lora.safetensors").is_file()


def test_a_trackers_curve_and_the_time_of_the_start_go_on(train, stopped):
    folder = stopped.parent / "logged"
    options = WITH_STATES | {"output_dir": folder, "log_with": "tensorboard", "save_every_n_steps": 2}
    first = train(**options | {"max_train_steps": 5})
    run = train(**options, resume=str(folder / "lora-step00000002-state"))
    assert run.log_name == first.log_name
    (events,) = {path.parent for path in (folder / "logs").rglob("events.out.tfevents.*")}
    curve = EventAccumulator(str(events)).Reload().Scalars("loss")
    assert [event.step for event in curve] == list(range(1, STEPS + 1))
    started = [read_header(run.saved[0]).metadata["ss_training_started_at"] for run in (first, run)]
    assert started[0] == started[1]


def test_a_drawn_seed_goes_on(train, tmp_path):
    first = train(seed=None, output_dir=tmp_path / "run", save_state_on_train_end=True)
    again = train(seed=None, output_dir=tmp_path / "run", resume="latest", max_train_steps=2)
    assert first.seed == again.seed


def test_a_state_goes_on_under_another_name_and_in_another_folder(train, stopped, tmp_path):
    whole = train(**WITH_STATES).folder.directory
    state = str(stopped / "lora-step00000004-state")
    train(**WITH_STATES, resume=state, output_dir=tmp_path / "other")
    assert_same_end(tmp_path / "other", whole)


def test_a_log_that_is_not_the_states_is_reported_and_the_weights_are_exact(train, stopped, report, tmp_path):
    whole = train(**WITH_STATES).folder.directory
    lines = (stopped / "lora.metrics.jsonl").read_bytes().splitlines(keepends=True)
    edited = [lines[0].replace(b'"epoch": 1', b'"epoch": 9'), *lines[1:]]
    later, changed = b'{"step": 5}\n', "was changed after the state was saved"
    for number, (found, kept, words) in enumerate(
        [
            (None, [], "was not found; the log starts at step 5"),
            ([*edited, later], edited, changed),
            ([*lines[:2], lines[2][:20]], lines[:2], changed),
        ]
    ):
        folder = tmp_path / f"changed{number}"
        shutil.copytree(stopped, folder)
        log = folder / "lora.metrics.jsonl"
        log.unlink()
        if found is not None:
            log.write_bytes(b"".join(found))
        report.warnings.clear()
        go_on(train, folder)
        (warning,) = report.warnings
        assert words in warning
        assert log.read_bytes().startswith(b"".join(kept))
        assert [line["step"] for line in metrics(folder)[len(kept) :]] == [5, 6, 7]
        first, second = (contents(read_state(place / "lora-state")) for place in (folder, whole))
        assert all(equal(first[part], second[part]) for part in second)
    # the states saved since go with the log as it is now
    report.warnings.clear()
    go_on(train, folder, max_train_steps=STEPS + 1)
    assert report.warnings == []


def test_a_state_with_a_copy_of_the_metrics_goes_on_exactly(train, stopped, as_format_1, report):
    whole = train(**WITH_STATES).folder.directory
    log = stopped / "lora.metrics.jsonl"
    for step in (2, 4):
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)[:step]
        as_format_1(stopped / f"lora-step0000000{step}-state", "".join(lines))
    log.unlink()
    go_on(train, stopped)
    assert report.warnings == []
    assert_same_end(stopped, whole)


def test_a_used_name_is_free_for_its_own_states_only(train, stopped, tmp_path):
    train(output_dir=tmp_path / "used")
    state = str(stopped / "lora-step00000004-state")
    with pytest.raises(HyimgError, match="holds a run named `lora` already") as caught:
        train(**WITH_STATES, resume=state, output_dir=tmp_path / "used")
    assert "latest" not in caught.value.hint
    with pytest.raises(HyimgError, match="`--overwrite` would replace the run"):
        go_on(train, stopped, resume=state, overwrite=True)
    assert train(**WITH_STATES, resume=state, output_dir=tmp_path / "used", overwrite=True).step == STEPS


def test_states_alone_make_a_name_used_and_overwriting_replaces_them(train, stopped):
    for path in stopped.rglob("*.safetensors"):
        if path.parent.name in (stopped.name, "comfy"):
            path.unlink()
    with pytest.raises(HyimgError, match="--resume latest"):
        train(output_dir=stopped)
    train(output_dir=stopped, overwrite=True)
    assert states(stopped) == []


def test_a_state_says_nothing_of_where_files_lie(train, tmp_path, models):
    run = train(**WITH_STATES, vae=models[0].vae)
    for path in (run.folder.directory / "lora-state").glob("state-*.json"):
        text = path.read_text(encoding="utf-8")
        assert json.dumps(str(tmp_path))[1:-1] not in text
        assert str(models[0].dit.parent) not in text


# ---- other settings


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"learning_rate": 2e-4}, "`--learning_rate`: 0.0001 then, 0.0002 now"),
        (
            {"gradient_accumulation_steps": 2},
            "batches a step (`--gradient_accumulation_steps` times the number of processes): 1 then, 2 now",
        ),
        ({"latent_sampling": "mean"}, "`--latent_sampling`: sample then, mean now"),
        (
            {"optimizer_args": ("weight_decay=0.5",)},
            '`--optimizer_args`: not given then, "weight_decay=0.5" now',
        ),
        ({"seed": 2}, "`--seed`: 1 then, 2 now"),
        ({"mixed_precision": "bf16"}, "`--mixed_precision`: no then, bf16 now"),
        ({"ip_noise_gamma_random_strength": True}, "`--ip_noise_gamma_random_strength`: off then, on now"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_state_of_other_settings_is_refused_with_the_list(train, stopped, report, options, line):
    before = sorted(stopped.rglob("*"))
    with pytest.raises(HyimgError) as caught:
        go_on(train, stopped, **options)
    assert line in caught.value.message
    assert "--resume_force" in caught.value.hint
    assert sorted(stopped.rglob("*")) == before
    assert go_on(train, stopped, **options, resume_force=True).step == STEPS
    assert any(line in warning for warning in report.warnings)


@pytest.mark.parametrize(
    "options",
    [
        {"save_every_n_steps": 3, "save_state": False, "save_precision": "bf16"},
        {"gradient_checkpointing": True, "max_data_loader_n_workers": 1},
        {"training_comment": "x", "logging_dir": None, "log_config": True, "on_nan": "skip"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_changes_no_number_may_differ(train, stopped, report, options):
    whole = metrics(train(**WITH_STATES).folder.directory)
    go_on(train, stopped, **options)
    assert metrics(stopped) == whole
    assert report.warnings == []


def test_a_copy_of_the_files_elsewhere_may_go_on(train, stopped, models, dataset, tmp_path):
    whole = metrics(train(**WITH_STATES).folder.directory)
    shutil.copytree(dataset.parent, tmp_path / "data")
    shutil.copy(models[0].dit, tmp_path / "moved.safetensors")
    go_on(train, stopped, dit=tmp_path / "moved.safetensors", dataset_config=tmp_path / "data" / dataset.name)
    assert metrics(stopped) == whole


def test_another_base_model_is_refused(train, stopped, models):
    with pytest.raises(HyimgError, match="`--dit` is a different model"):
        go_on(train, stopped, dit=models[1].dit)


@pytest.mark.parametrize(
    ("line", "caches", "words"),
    [
        ("batch_size = 2", ((0, 0),), "4 images and 4 batches per epoch then, 4 images and 2 batches now"),
        ("network_multiplier = 0.5", ((0, 0),), "repeats, batch sizes, weights or dropout in"),
        ("", ((1, 0),), "the latent cache was made with another VAE"),
        ("", ((0, 1),), "the text cache was made with other text encoders"),
    ],
)
def test_another_dataset_is_a_difference(train, stopped, make_dataset, line, caches, words):
    with pytest.raises(HyimgError, match=words):
        go_on(train, stopped, dataset_config=make_dataset(line, caches))


def test_what_the_settings_say_anew_wins_over_the_state(train, stopped):
    run = go_on(train, stopped, learning_rate=0.5, resume_force=True)
    assert run.optimizer.param_groups[0]["lr"] == 0.5
    assert {line["learning_rate"] for line in metrics(stopped)} == {1e-4, 0.5}


def test_another_optimiser_starts_anew_and_another_network_never(train, stopped, report):
    with pytest.raises(HyimgError, match="the state belongs to a different network"):
        go_on(train, stopped, network_dim=8, resume_force=True)
    go_on(train, stopped, optimizer_type="Adafactor", resume_force=True)
    assert any("does not fit this run and is reset" in warning for warning in report.warnings)


# ---- parts that others add


def test_a_plugins_part_is_saved_and_put_back(train, tmp_path, spy):
    def count(start):
        def listen(run):
            run.counter = {"steps": start, "of": torch.full((2,), float(start))}
            run.register_state(Stateful("counter", lambda: dict(run.counter), run.counter.update))

        return listen

    spy.on_start = count(5)
    train(output_dir=tmp_path / "run", save_state_on_train_end=True)
    spy.on_start = count(0)
    again = train(output_dir=tmp_path / "run", resume="latest", max_train_steps=2)
    assert (again.counter["steps"], again.counter["of"].tolist()) == (5, [5, 5])


def test_a_part_that_the_state_lacks_is_refused_unless_forced(train, tmp_path, spy, report):
    train(output_dir=tmp_path / "run", save_state_on_train_end=True)
    spy.on_start = lambda run: run.remember(Stateful("counter", dict, dict))
    options = {"output_dir": tmp_path / "run", "resume": "latest", "max_train_steps": 2}
    with pytest.raises(HyimgError, match="does not contain `counter`"):
        train(**options)
    assert train(**options, resume_force=True).step == 2


def test_a_part_that_cannot_take_its_state_is_one_error(train, tmp_path, spy):
    def refuse(state):
        raise ValueError("no")

    spy.on_start = lambda run: run.register_state(Stateful("counter", dict, refuse))
    train(output_dir=tmp_path / "run", save_state_on_train_end=True)
    with pytest.raises(RunError, match="`counter` cannot be restored from .*: ValueError: no"):
        train(output_dir=tmp_path / "run", resume="latest", max_train_steps=2)


def steps_of(optimizer, parameters, numbers):
    for number in numbers:
        for place, parameter in enumerate(parameters):
            parameter.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(10 * number + place))
        optimizer.step()


# the others cannot be, which test_optimizers.py holds
WRAPPED = [name for name in BUILT_IN if name != "Prodigy" and not name.startswith("DAdapt")]


@pytest.mark.parametrize(
    ("name", "wrapper_pairs"),
    [*((name, None) for name in BUILT_IN), *((name, ()) for name in WRAPPED)],
    ids=lambda value: {None: "plain", (): "wrapped"}.get(value, value),
)
@pytest.mark.filterwarnings("ignore")
def test_every_built_in_optimiser_goes_on_in_the_same_bits(name, wrapper_pairs):
    pairs = ["relative_step=False"] if name == "Adafactor" and wrapper_pairs is not None else []
    make = resolve_optimizer(load_plugins(()), name, pairs, wrapper_pairs=wrapper_pairs)

    def made():
        parameters = [torch.nn.Parameter(torch.full((64, 64), start)) for start in (0.0, 0.1)]
        return make([{"params": parameters, "lr": 0.1}], 0.1), parameters

    report = SilentReporter()
    (whole, expected), (first, begun), (second, resumed) = made(), made(), made()
    saving, part = OptimizerPart(first, report), OptimizerPart(second, report)
    steps_of(whole, expected, range(6))
    steps_of(first, begun, range(3))
    tree, tensors = pack(saving.state_dict())
    part.load_state_dict(unpack(json.loads(json.dumps(tree)), {n: t.clone() for n, t in tensors.items()}))
    with torch.no_grad():
        for parameter, values in zip(resumed, begun, strict=True):
            parameter.copy_(values)
    steps_of(second, resumed, range(3, 6))
    assert report.warnings == []
    assert all(torch.equal(a, b) for a, b in zip(resumed, expected, strict=True))
    with averaged_weights(whole), averaged_weights(second):
        assert all(torch.equal(a, b) for a, b in zip(resumed, expected, strict=True))


def test_an_optimiser_keeps_the_type_of_its_state_beside_parameters_of_another():
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    optimizer.state[parameter]["momentum_buffer"] = torch.full((4,), 1 / 3)
    saved = OptimizerPart(optimizer, SilentReporter()).state_dict()
    other = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    report = SilentReporter()
    OptimizerPart(other, report).load_state_dict(saved)
    assert torch.equal(other.state[parameter]["momentum_buffer"], torch.full((4,), 1 / 3))
    assert report.warnings == []


def test_a_paged_optimiser_has_paged_state_again(monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    parameter = torch.nn.Parameter(torch.ones(128, 64))
    paged = []

    def make():
        optimizer = bitsandbytes.optim.PagedAdamW([parameter], lr=0.1)
        make_buffer = optimizer.get_state_buffer

        def get_state_buffer(p, dtype=torch.float32):
            paged.append(make_buffer(p, dtype))
            return paged[-1]

        monkeypatch.setattr(optimizer, "get_state_buffer", get_state_buffer)
        return optimizer

    optimizer, other, report = make(), make(), SilentReporter()
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    saved = OptimizerPart(optimizer, report).state_dict()
    paged.clear()
    OptimizerPart(other, report).load_state_dict(saved)
    for key in ("state1", "state2"):
        assert any(other.state[parameter][key] is buffer for buffer in paged), (
            "so that it lies where a full GPU pages it"
        )
        assert torch.equal(other.state[parameter][key], optimizer.state[parameter][key])
    assert report.warnings == []


def test_generators_go_on_where_they_were():
    part = generators_part(torch.device("cpu"))
    tree, tensors = pack(part.state_dict())

    def draw():
        return torch.rand(2).tolist(), random.random(), np.random.rand(2).tolist()

    first = draw()
    part.load_state_dict(unpack(json.loads(json.dumps(tree)), tensors))
    assert draw() == first

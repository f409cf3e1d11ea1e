"""The files of a run: what `--overwrite` replaces, in which type weights are saved, and lines of the metrics."""

from __future__ import annotations

import hashlib
import json
import math
import re

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from hyimg.cache.own_files import temporary_name
from hyimg.config.commands import TrainConfig
from hyimg.config.load import make
from hyimg.errors import HyimgError, RunError
from hyimg.training import run_folder, saves
from hyimg.training.metrics import MetricsLog, MovingAverage
from hyimg.training.run_folder import RunFolder
from hyimg.training.saves import ReplacedRun, Saves, read_saves, with_saves
from hyimg.training.state import read_state


def loras(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.safetensors"))


def test_overwriting_removes_the_whole_earlier_run_and_nothing_else(train, tmp_path):
    folder = tmp_path / "run"
    train(output_dir=folder, max_train_steps=5, save_every_n_steps=4, save_every_n_epochs=1)
    friends = [
        "lora-2.safetensors",
        "lora2.safetensors",
        "lora-of-a-friend.safetensors",
        "lora-0000001.safetensors",
        "my-lora.safetensors",
        "lora.safetensors.bak",
    ]
    for name in friends:
        (folder / name).write_bytes(b"keep me")
        (folder / "comfy" / name).write_bytes(b"keep me")
    (folder / "sample").mkdir()
    pictures = ["lora-step00000009-01.png", "lora-000003-12.png", "lora-2x-000003-01.png", "lora-cat.png"]
    for name in pictures:
        (folder / "sample" / name).write_bytes(b"a picture")
    train(output_dir=folder, overwrite=True, output_name="lora-2x", max_train_steps=1)
    assert (folder / "lora-000001.safetensors").is_file(), "another name's run"
    assert (folder / "sample" / pictures[0]).is_file()
    (folder / "sample" / pictures[2]).write_bytes(b"a picture")
    train(output_dir=folder, overwrite=True)
    assert sorted(path.name for path in (folder / "sample").iterdir()) == sorted(pictures[2:])
    for name in friends:
        assert (folder / name).read_bytes() == b"keep me"
        assert (folder / "comfy" / name).read_bytes() == b"keep me"
    kept = {name for name in friends if name.endswith(".safetensors")} | {"lora-2x.safetensors"}
    own = {"lora.safetensors"} | kept
    assert loras(folder) == sorted(own | {f"comfy/{name}" for name in own})


def test_a_save_is_never_replaced_by_what_it_was_to_replace(train, tmp_path):
    folder = tmp_path / "run"
    train(output_dir=folder)
    new = (folder / "lora.safetensors").read_bytes()
    aside = folder / ".lora.replaced"  # as a run leaves it that is killed right after its first save
    aside.mkdir()
    (aside / "lora.safetensors").write_bytes(b"the old one")
    (aside / "all").touch()
    config = make(TrainConfig, {"dit": "d", "dataset_config": "c", "output_dir": str(folder)})
    with RunFolder(folder, "lora").claim(config, overwrite=True):
        assert not (folder / "lora.safetensors").exists()
    assert (folder / "lora.safetensors").read_bytes() == new
    assert not aside.exists()


@pytest.mark.parametrize("moment", range(8))
@pytest.mark.parametrize("way", ["aside", "back"])
def test_a_kill_while_an_earlier_run_is_set_aside_or_put_back_loses_nothing(
    train, tmp_path, monkeypatch, way, moment
):
    folder, states = tmp_path / "run", tmp_path / "states"
    train(output_dir=folder, save_every_n_steps=1, save_state=True, state_dir=states)
    assert {path.name for path in states.iterdir()} == {"lora-step00000001-state", "lora-state"}

    def files():
        return {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    before, count, move = files(), iter(range(100)), ReplacedRun._move

    def killed(path, target, root):
        going_back = target.parent.name != ".lora.replaced" and ".lora.replaced" in path.parts
        if going_back == (way == "back") and next(count) == moment:
            raise KeyboardInterrupt
        move(path, target, root)

    def fail(config):
        raise OSError("the run fails before its first save")

    config = make(TrainConfig, {"dit": "d", "dataset_config": "c", "output_dir": str(folder)})
    with monkeypatch.context() as patch:
        patch.setattr(ReplacedRun, "_move", staticmethod(killed))
        patch.setattr(RunFolder, "write_config", lambda self, config, **options: fail(config))
        if way == "aside":
            # a killed process does not put them back
            patch.setattr(RunFolder, "_put_back", lambda self: None)
        with (
            pytest.raises((KeyboardInterrupt, OSError)),
            RunFolder(folder, "lora", state_dir=states).claim(config, overwrite=True),
        ):
            pass
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_config", lambda self, config, **options: fail(config))
        with (
            pytest.raises(OSError),
            RunFolder(folder, "lora", state_dir=states).claim(config, overwrite=True),
        ):
            pass
    assert files() == before


def test_a_kill_while_the_mark_of_a_replaced_run_is_written_leaves_no_temporary_file(train, tmp_path):
    folder = tmp_path / "run"
    train(output_dir=folder)
    before = {path.relative_to(folder) for path in folder.rglob("*")}
    aside = folder / ".lora.replaced"
    aside.mkdir()
    (folder / "lora.safetensors").rename(aside / "lora.safetensors")
    (aside / temporary_name("all")).touch()
    config = make(TrainConfig, {"dit": "d", "dataset_config": "c", "output_dir": str(folder)})
    with RunFolder(folder, "lora").claim(config, overwrite=True):
        pass  # it saves nothing, so the earlier run comes back
    assert {path.relative_to(folder) for path in folder.rglob("*")} == before


def test_a_kill_while_a_replaced_run_is_removed_brings_none_of_its_states_back(train, tmp_path, monkeypatch):
    folder, states = tmp_path / "run", tmp_path / "states"
    options = {"output_dir": folder, "save_state": True, "state_dir": states}
    train(**options)
    old = next((states / "lora-state").glob("network-*")).read_bytes()
    remove, removed = saves.remove_tree, []

    def killed(path, root):
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        remove(path, root=root)

    with monkeypatch.context() as patch:
        patch.setattr(saves, "remove_tree", killed)
        patch.setattr(RunFolder, "_put_back", lambda self: None)  # a killed process does not
        with pytest.raises(KeyboardInterrupt):
            train(**options, overwrite=True, seed=2)
    assert [path.name for path in states.iterdir() if path.name[0] != "."] == [], "its first save was a LoRA"
    with pytest.raises(HyimgError, match="holds a run named `lora` already"):
        train(**options, seed=3)
    assert [path for path in states.rglob("*") if path.is_file() and path.read_bytes() == old] == []


def test_one_folder_for_states_serves_one_run_of_a_name_at_a_time(train, tmp_path):
    with (
        FileLock(tmp_path / ".lora.lock"),
        pytest.raises(HyimgError, match=f"another process is training `lora` in `{tmp_path}`"),
    ):
        train(state_dir=tmp_path)


def test_the_run_folder_under_another_name_is_no_other_folder_for_states(train, tmp_path):
    (tmp_path / "x").mkdir()
    run = train(output_dir=tmp_path / "run", state_dir=tmp_path / "x" / ".." / "run", save_state=True)
    assert run.folder.state_path() == tmp_path / "run" / "lora-state"


def test_a_run_in_one_format_replaces_a_run_in_both(train, tmp_path):
    folder = tmp_path / "run"
    train(output_dir=folder)
    train(output_dir=folder, overwrite=True, save_format="comfy")
    assert loras(folder) == ["comfy/lora.safetensors"]
    with pytest.raises(HyimgError, match="holds a run named `lora` already") as caught:
        train(output_dir=folder)
    assert "latest" not in caught.value.hint  # there is no state to go on from
    train(output_dir=folder, overwrite=True, save_format="kohya")
    assert loras(folder) == ["lora.safetensors"]


def test_weights_are_saved_in_the_type_that_was_asked_for(train):
    whole = {}
    for name, dtype in (("float", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        run = train(save_precision=name)
        for path in ("lora.safetensors", "comfy/lora.safetensors"):
            state = load_file(run.folder.directory / path)
            whole.setdefault(path, state)
            weights = {key for key in state if not key.endswith("alpha")}
            assert {state[key].dtype for key in weights} == {dtype}
            assert all(torch.equal(state[key], whole[path][key].to(dtype)) for key in weights)


def test_what_is_not_finite_is_null_in_the_metrics_and_every_line_is_json(tmp_path):
    with MetricsLog(tmp_path / "lora.metrics.jsonl") as log:
        log.write({"step": 1, "loss": math.nan, "gradient_norm": math.inf, "learning_rate": 0.5})
        log.write({"step": 2, "loss": 0.25})
        lines = (tmp_path / "lora.metrics.jsonl").read_text().splitlines()

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    read = [json.loads(line, parse_constant=refuse) for line in lines]
    assert read == [
        {"step": 1, "loss": None, "gradient_norm": None, "learning_rate": 0.5},
        {"step": 2, "loss": 0.25},
    ]


def test_the_position_of_a_log_is_known_without_reading_it(tmp_path):
    path = tmp_path / "lora.metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"step": 1, "name": "ü"})
        first, data = log.position, path.read_bytes()
        path.unlink()
        log.write({"step": 2})
        second = log.position
    whole = data + b'{"step": 2}\n'
    assert first == ("lora.metrics.jsonl", len(data), hashlib.sha256(data).hexdigest())
    assert second == ("lora.metrics.jsonl", len(whole), hashlib.sha256(whole).hexdigest())


def test_a_moving_average_forgets_what_left_its_window():
    average = MovingAverage(window=3)
    assert [average.add(value) for value in (3.0, 5.0, 1.0, 9.0, 2.0)] == [3.0, 4.0, 3.0, 5.0, 4.0]


def test_a_run_that_fails_before_its_first_save_gives_the_earlier_one_back(train, spy, tmp_path):
    def files():
        paths = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        return {str(path.relative_to(tmp_path)): path.read_bytes() for path in paths}

    train(output_dir=tmp_path / "run")
    before = files()
    spy.losses["breaks"] = lambda prediction, target, context: prediction.mean((1, 2, 3)) * math.nan
    with pytest.raises(RunError, match="not finite"):
        train(output_dir=tmp_path / "run", overwrite=True, loss_type="breaks")
    assert files() == before


# ---- which files are a run's


def owned(folder, names):
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("name", ["lora-000002", "lora-step00000004"])
def test_a_name_that_could_be_a_checkpoints_is_refused(train, tmp_path, name):
    with pytest.raises(HyimgError, match=f"`{name}` ends like the checkpoints of another run"):
        train(output_dir=tmp_path / "run", output_name=name)
    assert train(output_dir=tmp_path / "run", output_name="lora-00002").step == 1


def test_a_run_of_an_earlier_release_that_is_called_like_a_checkpoint_is_never_touched(
    train, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "_CHECKPOINT", "(-never)")
        train(output_dir=folder, output_name="lora-000002", save_state=True)
    theirs = owned(
        folder, ["lora-000002.safetensors", "comfy/lora-000002.safetensors", "lora-000002.run.toml"]
    )
    with pytest.raises(HyimgError, match="lora-000002-state` is not a save of `lora`"):
        train(output_dir=folder)
    with pytest.raises(HyimgError, match="is not a save of `lora`"):
        train(output_dir=folder, overwrite=True)
    assert owned(folder, theirs) == theirs
    assert train(output_dir=folder, output_name="lora-000002", resume="latest", max_train_steps=2).step == 2


def test_only_what_the_run_file_lists_is_replaced_or_rotated_away(train, tmp_path):
    folder = tmp_path / "run"
    options = {"output_dir": folder, "save_every_n_steps": 1, "save_state": True}
    train(**options, max_train_steps=3)
    friend = folder / "lora-step00000009.safetensors"
    friend.write_bytes(b"keep me")
    for way in ({"overwrite": True}, {"resume": "latest", "max_train_steps": 4}):
        with pytest.raises(HyimgError, match="step00000009.safetensors` is not a save of `lora`") as caught:
            train(**options | way)
        assert "move it to another folder" in caught.value.hint
    friend.unlink()
    (folder / "lora-step00000001.safetensors").unlink()  # what the user removes is no trouble
    train(**options, resume="latest", max_train_steps=4, save_last_n_steps=1)
    kept = ["", "-step00000003", "-step00000004"]
    for place in (folder, folder / "comfy"):
        assert sorted(path.name for path in place.glob("*.safetensors")) == sorted(
            f"lora{n}.safetensors" for n in kept
        )


def test_a_run_file_names_saves_of_its_own_run_only(tmp_path):
    (tmp_path / "other.safetensors").write_bytes(b"")
    (tmp_path / "lora-000001.safetensors").write_bytes(b"")
    (tmp_path / "lora.run.toml").write_text(
        with_saves("seed = 1\n", Saves(("../x", "other", "lora-000001"), "other-state")), encoding="utf-8"
    )
    folder = RunFolder(tmp_path, "lora")
    assert folder.saves() == (("lora-000001",), None)
    assert [path.name for path in folder.saved_files()] == ["lora-000001.safetensors"]


def test_a_run_without_a_list_is_known_by_the_names_of_its_files(train, tmp_path):
    folder = tmp_path / "run"
    options = {"output_dir": folder, "save_every_n_steps": 1, "save_state": True}
    train(**options, max_train_steps=2)
    run_file = folder / "lora.run.toml"
    run_file.write_text(run_file.read_text().partition("\n# what the run has saved")[0], encoding="utf-8")
    assert read_saves(run_file) is None
    train(**options, resume="latest", max_train_steps=3)
    assert {"lora", *(f"lora-step0000000{n}" for n in (1, 2, 3))} == read_saves(run_file).names
    run_file.unlink()
    train(output_dir=folder, overwrite=True)
    assert loras(folder) == ["comfy/lora.safetensors", "lora.safetensors"]


def test_a_run_file_with_its_list_repeats_the_run(train, tmp_path):
    folder = train(save_state=True).folder
    assert "[saves]" in folder.config_path.read_text(encoding="utf-8")
    again = make(TrainConfig, {"output_name": "again"}, run_file=folder.config_path)
    assert (again.duration.seed, again.saving.output_name) == (1, "again")
    (tmp_path / "own.toml").write_text("[saves]\nsave_every_n_steps = 5\n", encoding="utf-8")
    given = {"dit": "d", "dataset_config": "c", "output_dir": "o"}
    own = make(TrainConfig, given, run_file=tmp_path / "own.toml")
    assert own.saving.save_every_n_steps == 5, "a table of that name is a heading elsewhere"
    folder.write_config(again)
    assert folder.saves() == (("lora",), None), "a dry run keeps the list"


# ---- links


@pytest.mark.parametrize(
    "name", ["comfy", "sample", ".lora.replaced", "lora-state", "lora-step00000001-state"]
)
def test_a_link_in_place_of_a_folder_is_refused_and_not_followed(train, tmp_path, name):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.mkdir()
    folder.mkdir()
    (victim / "lora-000001.safetensors").write_bytes(b"theirs")
    (victim / "manifest.json").write_text("{}")
    (folder / name).symlink_to(victim)
    for way in ({}, {"overwrite": True}, {"resume": "latest"}):
        with pytest.raises(HyimgError, match=re.escape(f"`{folder / name}` is a link")):
            train(output_dir=folder, **way)
    assert sorted(path.name for path in victim.iterdir()) == ["lora-000001.safetensors", "manifest.json"]
    assert [path.name for path in folder.iterdir()] == [name]


def test_a_link_in_place_of_a_file_is_replaced_and_its_target_stays(train, tmp_path, spy):
    victim, real, folder = tmp_path / "victim", tmp_path / "real", tmp_path / "run"
    victim.write_bytes(b"theirs")
    real.mkdir()
    folder.symlink_to(real)  # which is the user's, and followed
    for name in ("lora.metrics.jsonl", "lora.run.toml", "lora.save-now", "lora.safetensors"):
        (real / name).symlink_to(victim)
    train(output_dir=folder, overwrite=True, save_state=True)
    assert victim.read_bytes() == b"theirs"
    assert [path.name for path in real.iterdir() if path.is_symlink()] == []
    assert read_state(real / "lora-state").document["step"] == 1


def test_a_link_in_place_of_the_log_is_replaced_in_a_resumed_run_too(train, tmp_path):
    folder, victim = tmp_path / "run", tmp_path / "victim"
    options = {"output_dir": folder, "save_state": True}
    train(**options)
    log = folder / "lora.metrics.jsonl"
    log.rename(victim)
    before = victim.read_bytes() + b"more\n"
    victim.write_bytes(before)
    log.symlink_to(victim)
    train(**options, resume="latest", max_train_steps=2)
    assert victim.read_bytes() == before
    assert not log.is_symlink()


# ---- the lock


@pytest.mark.parametrize(
    ("kind", "words"), [("folder", "is a folder"), ("link", "is a link"), ("stale", None)]
)
def test_what_lies_in_place_of_the_lock_is_a_sentence_or_a_killed_run_s(train, tmp_path, kind, words):
    folder = tmp_path / "run"
    folder.mkdir()
    lock = folder / ".lora.lock"
    if kind == "folder":
        lock.mkdir()
    elif kind == "link":
        lock.symlink_to(tmp_path / "elsewhere")
    else:
        lock.touch()
    if words is None:
        train(output_dir=folder)
        assert not lock.exists()
        return
    with pytest.raises(HyimgError, match=words):
        train(output_dir=folder)
    assert not (tmp_path / "elsewhere").exists()

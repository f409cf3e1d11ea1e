"""The files of a run: what `--overwrite` replaces, in which type weights are saved, and lines of the metrics."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from hyimg.config.commands import TrainConfig
from hyimg.config.load import make
from hyimg.errors import HyimgError, RunError
from hyimg.training.metrics import MetricsLog, MovingAverage
from hyimg.training.run_folder import RunFolder


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
    folder = tmp_path / "run"
    train(output_dir=folder, save_every_n_steps=1, save_state=True)

    def files():
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    before, count, move = files(), iter(range(100)), RunFolder._move

    def killed(path, target):
        going_back = target.parent.name != ".lora.replaced" and ".lora.replaced" in path.parts
        if going_back == (way == "back") and next(count) == moment:
            raise KeyboardInterrupt
        move(path, target)

    def fail(config):
        raise OSError("the run fails before its first save")

    config = make(TrainConfig, {"dit": "d", "dataset_config": "c", "output_dir": str(folder)})
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_move", staticmethod(killed))
        patch.setattr(RunFolder, "write_config", lambda self, config: fail(config))
        if way == "aside":
            # a killed process does not put them back
            patch.setattr(RunFolder, "_put_back", lambda self: None)
        with (
            pytest.raises((KeyboardInterrupt, OSError)),
            RunFolder(folder, "lora").claim(config, overwrite=True),
        ):
            pass
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_config", lambda self, config: fail(config))
        with pytest.raises(OSError), RunFolder(folder, "lora").claim(config, overwrite=True):
            pass
    assert files() == before


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

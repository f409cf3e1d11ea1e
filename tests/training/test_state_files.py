"""A state as files: nested values come back with every bit, and what is not whole is never taken for a state."""

from __future__ import annotations

import enum
import json
import math
import re

import pytest
import torch

from hyimg.cache import atomic
from hyimg.errors import HyimgError
from hyimg.training import state_folder
from hyimg.training.state_folder import DamagedStateError, read_state, remove_state, write_state
from hyimg.training.state_tree import equal, pack, unpack


class Mode(enum.Enum):
    TRAIN = "train"
    EVAL = "eval"


def through_json(value):
    tree, tensors = pack(value)
    return unpack(json.loads(json.dumps(tree, allow_nan=False)), tensors)


@pytest.mark.parametrize(
    "value",
    [
        {"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "nested": [1, (2, [3.0, None])], "on": True, "name": "a"},
        {0: {"step": 3}, 1: {}, (1, "x"): "a key of two"},
        {"$tensor": "not a tensor", "$": 1},
        {"$float": math.inf, "x": [-math.inf, math.inf]},
        {"mode": Mode.EVAL, "dtype": torch.bfloat16, "big": 2**80},
        [],
        {},
        (),
    ],
    ids=str,
)
def test_plain_values_come_back_with_their_types(value):
    back = through_json(value)
    assert back == value
    assert repr(back) == repr(value)


def test_nan_comes_back():
    assert math.isnan(through_json({"x": math.nan})["x"])


def test_tensors_come_back_wherever_they_are():
    qmap = torch.arange(4.0)
    value = {
        "state": {
            0: {"step": torch.tensor(3), "moments": [torch.ones(2), (torch.zeros(1, dtype=torch.uint8),)]}
        },
        "param_groups": [{"params": [0], "shared": qmap, "again": qmap}],
        "a": {"b": torch.zeros(1)},
        "a.b": torch.ones(1),
    }
    back = through_json(value)
    assert equal(back, value)
    assert back["param_groups"][0]["shared"] is back["param_groups"][0]["again"]
    assert (back["a"]["b"].item(), back["a.b"].item()) == (0, 1)


@pytest.mark.parametrize(
    "other", [torch.tensor([0.0, -0.0]), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, 1)]
)
def test_equal_means_every_bit(other):
    assert equal({"x": torch.zeros(2)}, {"x": torch.zeros(2)})
    assert not equal({"x": torch.zeros(2)}, {"x": other})


@pytest.mark.parametrize("value", [{"f": [print]}, {"f": [object()]}, {"f": [{1, 2}]}])
def test_what_is_no_data_is_refused_with_its_place(value):
    with pytest.raises(HyimgError, match="`f.0`"):
        pack(value)


def test_a_state_imports_and_calls_nothing():
    for tree in ({"$enum": ["os", "system", "x"]}, {"$enum": ["antigravity", "X", "x"]}, {"$dtype": "load"}):
        with pytest.raises((ValueError, KeyError)):
            unpack(tree, {})


# ---- the folder

TENSORS = {"network": {"up": torch.arange(6.0).view(2, 3)}, "empty": {}}


def save(path, step=1):
    scaled = {name: tensor * step for name, tensor in TENSORS["network"].items()}
    write_state(path, {"step": step}, TENSORS | {"network": scaled}, f'{{"step": {step}}}\n')


def assert_state(path, step):
    state = read_state(path)
    assert state.document == {"step": step}
    assert torch.equal(state.tensors("network")["up"], TENSORS["network"]["up"] * step)
    assert state.tensors("empty") == {}
    assert state.metrics() == f'{{"step": {step}}}\n'


def test_a_state_comes_back_and_holds_safetensors_and_json_only(tmp_path):
    save(tmp_path / "state")
    assert_state(tmp_path / "state", 1)
    names = sorted(re.sub(r"-[0-9a-f]{8}", "", path.name) for path in (tmp_path / "state").iterdir())
    assert names == ["manifest.json", "metrics.jsonl", "network.safetensors", "state.json"]


def test_a_state_saved_again_replaces_the_files_of_the_old_one(tmp_path):
    save(tmp_path / "state", 1)
    save(tmp_path / "state", 2)
    assert_state(tmp_path / "state", 2)
    assert len(list((tmp_path / "state").iterdir())) == 4


def test_tensors_that_share_memory_are_saved(tmp_path):
    whole = torch.arange(4.0)
    write_state(
        tmp_path / "state",
        {},
        {"part": {"whole": whole, "half": whole[:2], "turned": whole.view(2, 2).T}},
        "",
    )
    back = read_state(tmp_path / "state").tensors("part")
    assert (back["half"].tolist(), back["turned"].tolist()) == ([0, 1], [[0, 2], [1, 3]])


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("moment", range(4))
def test_a_save_that_ends_at_any_file_leaves_the_state_before_it(tmp_path, monkeypatch, moment, again):
    path = tmp_path / "state"
    if again:
        save(path, 1)
    count = iter(range(100))
    replace = atomic.os.replace

    def killed(source, target):
        if next(count) == moment:
            raise KilledError
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", killed)
        # a killed process does not clean up
        patch.setattr(state_folder, "_remove_files", lambda *args: None)
        patch.setattr(state_folder.Path, "rmdir", lambda self: None)
        with pytest.raises(KilledError):
            save(path, 2)
    if again:
        assert_state(path, 1)
    else:
        with pytest.raises(DamagedStateError, match=r"`manifest.json` is missing \(the run ended while"):
            read_state(path)
    save(path, 3)
    assert_state(path, 3)
    assert len(list(path.iterdir())) == 4, "what was left of the killed save is gone"


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_folder, "save_file", full)
    with pytest.raises(HyimgError, match="the disk is full"):
        save(tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


def damage(path, kind):
    manifest = path / "manifest.json"
    network = next(path.glob("network-*"))
    if kind == "a flipped bit":
        data = bytearray(network.read_bytes())
        data[-1] ^= 1
        network.write_bytes(data)
        return "is damaged"
    if kind == "cut short":
        network.write_bytes(network.read_bytes()[:-1])
        return "bytes and should have"
    if kind == "a file is missing":
        network.unlink()
        return "is missing"
    if kind == "a damaged manifest":
        manifest.write_text(manifest.read_text()[:-5])
        return "JSON is damaged"
    if kind == "another manifest":
        manifest.write_text("[1]")
        return "JSON is damaged"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    return "has the format 2"


@pytest.mark.parametrize(
    "kind",
    [
        "a flipped bit",
        "cut short",
        "a file is missing",
        "a damaged manifest",
        "another manifest",
        "a later format",
    ],
)
def test_a_damaged_state_is_refused_with_the_reason(tmp_path, kind):
    save(tmp_path / "state")
    words = damage(tmp_path / "state", kind)
    with pytest.raises(DamagedStateError, match=words):
        read_state(tmp_path / "state")


def test_no_folder_is_no_state(tmp_path):
    with pytest.raises(DamagedStateError, match="there is no state"):
        read_state(tmp_path / "nothing")


def test_a_manifest_names_files_of_its_own_folder_only(tmp_path):
    save(tmp_path / "state")
    network = next((tmp_path / "state").glob("network-*"))
    (tmp_path / "elsewhere.safetensors").write_bytes(network.read_bytes())
    manifest = tmp_path / "state" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(network.name, "../elsewhere.safetensors"))
    with pytest.raises(DamagedStateError, match="is missing"):
        read_state(tmp_path / "state")


def test_a_removed_state_is_gone_with_its_folder(tmp_path):
    save(tmp_path / "state")
    remove_state(tmp_path / "state")
    assert list(tmp_path.iterdir()) == []

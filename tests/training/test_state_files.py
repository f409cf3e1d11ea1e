"""A state as files: nested values come back with every bit, and what is not whole is never taken for a state."""

from __future__ import annotations

import enum
import json
import math
import re

import pytest
import torch

from hyimg.cache import atomic
from hyimg.checkpoints import safetensors_writer
from hyimg.errors import HyimgError
from hyimg.report import SilentReporter
from hyimg.training import state as state_module
from hyimg.training.resume import find_state
from hyimg.training.state import DamagedStateError, equal, pack, read_state, unpack, write_state


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
    write_state(path, {"step": step}, TENSORS | {"network": scaled}, root=path.parent)


def assert_state(path, step):
    state = read_state(path)
    assert state.document == {"step": step}
    assert torch.equal(state.tensors("network")["up"], TENSORS["network"]["up"] * step)
    assert state.tensors("empty") == {}


def test_a_state_comes_back_and_holds_safetensors_and_json_only(tmp_path):
    save(tmp_path / "state")
    assert_state(tmp_path / "state", 1)
    names = sorted(re.sub(r"-[0-9a-f]{8}", "", path.name) for path in (tmp_path / "state").iterdir())
    assert names == ["manifest.json", "network.safetensors", "state.json"]


def test_a_state_saved_again_replaces_the_files_of_the_old_one(tmp_path):
    save(tmp_path / "state", 1)
    save(tmp_path / "state", 2)
    assert_state(tmp_path / "state", 2)
    assert len(list((tmp_path / "state").iterdir())) == 3


def test_tensors_that_share_memory_are_saved(tmp_path):
    whole = torch.arange(4.0)
    write_state(
        tmp_path / "state",
        {},
        {"part": {"whole": whole, "half": whole[:2], "turned": whole.view(2, 2).T}},
        root=tmp_path,
    )
    back = read_state(tmp_path / "state").tensors("part")
    assert (back["half"].tolist(), back["turned"].tolist()) == ([0, 1], [[0, 2], [1, 3]])


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("moment", range(3))
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
        patch.setattr(state_module, "_remove_files", lambda *args: None)
        patch.setattr(state_module.Path, "rmdir", lambda self: None)
        with pytest.raises(KilledError):
            save(path, 2)
    if again:
        assert_state(path, 1)
    else:
        with pytest.raises(DamagedStateError, match=r"`manifest.json` is missing \(the run ended while"):
            read_state(path)
    save(path, 3)
    assert_state(path, 3)
    assert len(list(path.iterdir())) == 3, "what was left of the killed save is gone"


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_writer, "_write_all", full)
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
        return "`manifest.json` is not valid JSON"
    if kind == "another manifest":
        manifest.write_text("[1]")
        return "`manifest.json` must be an object, not a list"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 3'))
    return "has format 3"


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


IDENTITY = {
    "options": {},
    "dataset": {"images": 1, "batches": 1, "pictures": "", "captions": "", "settings": ""},
    **dict.fromkeys(("latent cache", "text cache", "base model"), ""),
    "base weights": [],
    **dict.fromkeys(("length", "batches a step"), 1),
}
DOCUMENT = {
    **dict.fromkeys(("saved", "started"), 1.5),
    **dict.fromkeys(("seed", "step", "epoch"), 1),
    **{"log_name": "log", "identity": IDENTITY, "machine": {}, "parts": {}},
}


def places(document, *prefix):
    for key, value in document.items():
        yield (*prefix, key)
        if value and isinstance(value, dict):
            yield from places(value, *prefix, key)


@pytest.mark.parametrize("place", places(DOCUMENT), ids=".".join)
def test_a_document_of_other_types_is_no_state(tmp_path, place):
    path = tmp_path / "lora-state"
    for wrong in (None, [[]], "absent"):
        document = json.loads(json.dumps(DOCUMENT))
        table = document
        for key in place[:-1]:
            table = table[key]
        if wrong == "absent":
            del table[place[-1]]
        elif not isinstance(table[place[-1]], list) or wrong is None:
            table[place[-1]] = wrong
        else:
            continue
        write_state(path, document, {}, root=tmp_path)
        with pytest.raises(
            DamagedStateError, match=f"is not the state of a run: `{re.escape('.'.join(place))}"
        ):
            find_state(str(path), None, SilentReporter())
    write_state(path, DOCUMENT, {}, root=tmp_path)
    assert find_state(str(path), None, SilentReporter()).document["step"] == 1

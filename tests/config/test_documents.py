"""Files that users write: Windows paths, missing quotes, and files of another kind or of another tool."""

from __future__ import annotations

import difflib
import json
import os
import re
import socket
import sys
from pathlib import Path

import pytest

from hyimg.config import commands, documents
from hyimg.config.documents import (
    DOCUMENT_BYTES,
    MAX_DEPTH,
    MAX_JSON_BYTES,
    parse_document,
    parse_json,
    read_bounded,
)
from hyimg.config.load import make
from hyimg.data.dataset_file import load_dataset_file
from hyimg.errors import HyimgError
from hyimg.rendering.prompts import load_prompts

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX's")

TRAIN = {"dit": "dit.safetensors", "dataset_config": "data.toml", "output_dir": "out"}


@pytest.fixture
def refused(tmp_path):
    """The error about a file of that name and text, read as that kind."""

    def call(kind, text, name="given.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        readers = {
            "run file": lambda: make(commands.TrainConfig, TRAIN, run_file=path),
            "dataset file": lambda: load_dataset_file(path),
            "prompt file": lambda: load_prompts(path),
        }
        with pytest.raises(HyimgError) as caught:
            readers[kind]()
        return caught.value

    return call


@pytest.mark.parametrize("kind", ["run file", "dataset file", "prompt file"])
@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (r'vae = "C:\Users\me\vae"', r"in single quotes: `vae = 'C:\Users\me\vae'`"),
        (r'vae = "D:\data\vae"', r"in single quotes: `vae = 'D:\data\vae'`"),
        ('vae = "C:\\data\\new\\"', r"`vae = 'C:\data\new\'`"),
        ('vae = "C:\\new\\"', r"`vae = 'C:\new\'`"),
        (r"vae = C:\models\vae", r"text needs quotes: `vae = 'C:\models\vae'`"),
        ("vae = /models/vae  # mine", "text needs quotes: `vae = '/models/vae'`"),
        ("optimizer_type = AdamW", "text needs quotes: `optimizer_type = 'AdamW'`"),
        ("dim_from_weights = True", "write `dim_from_weights = true`"),
        ("vae = None", "omit `vae`"),
        ("ema_decay = .5", "`ema_decay = 0.5`"),
    ],
)
def test_a_line_that_cannot_be_read_is_answered_with_how_to_write_it(refused, kind, line, hint):
    error = refused(kind, f"# a comment\n{line}\n")
    assert f"the {kind} `" in error.message
    assert "not valid TOML" in error.message
    assert hint in (error.hint or "")


@pytest.mark.parametrize("name", ["a.toml", "a.json"])
def test_a_path_whose_backslash_became_a_control_character_is_refused(refused, tmp_path, name):
    toml = name.endswith(".toml")
    if toml:
        error = refused("run file", 'output_dir = "C:\\new\\train"\n')
        assert r"`output_dir` in " in error.message
        assert r"C:\new\train" in error.message
        assert r"`output_dir = 'C:\new\train'`" in error.hint
    text = '[[datasets]]\nresolution = 1024\n[[datasets.subsets]]\nimage_dir = "data\\new"\n'
    if not toml:
        text = '{"datasets": [{"resolution": 1024, "subsets": [{"image_dir": "data\\new"}]}]}'
    error = refused("dataset file", text, name)
    assert error.message.startswith("`image_dir` in ")
    assert r"data\new" in error.message
    assert "`/`" in error.hint


def test_text_that_is_no_path_may_have_line_breaks(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('training_comment = "C:\\nline"\n', encoding="utf-8")
    assert make(commands.TrainConfig, TRAIN, run_file=path).metadata.training_comment == "C:\nline"


def test_a_control_character_in_a_flags_path_is_refused():
    with pytest.raises(HyimgError, match=r"`--output_dir` must be a path, got `C:\\new`.* control character"):
        make(commands.TrainConfig, {**TRAIN, "output_dir": "C:\new"})


def test_a_path_of_thousands_of_levels_is_refused():
    with pytest.raises(
        HyimgError, match=r"`--output_dir` must be a path of at most 255 levels.*\(4001 characters\)"
    ):
        make(commands.TrainConfig, {**TRAIN, "output_dir": "a/" * 2000 + "b"})


@pytest.mark.parametrize("given", [" /x", "/x ", "\t/x\n"])
def test_blanks_around_a_path_are_taken_away_with_a_note(given):
    notes: list[str] = []
    config = make(
        commands.TrainConfig, {**TRAIN, "output_dir": given, "base_weights": [" a ", "b"]}, notes=notes
    )
    assert config.saving.output_dir == Path("/x")
    assert config.network_training.base_weights == (Path("a"), Path("b"))
    assert sorted(notes) == [
        "`--base_weights`: the spaces around `a` are removed",
        "`--output_dir`: the spaces around `/x` are removed",
    ]


def test_a_file_whose_name_has_a_blank_at_its_end_can_be_named(tmp_path):
    odd = tmp_path / "dit "
    odd.touch()
    notes: list[str] = []
    assert make(commands.TrainConfig, {**TRAIN, "dit": str(odd)}, notes=notes).dit.dit == odd
    assert notes == []


DATASET = "[[datasets]]\nresolution = 1024\n[[datasets.subsets]]\nimage_dir = 'x'\n"
RUN = "dit = 'a'\nnetwork_dim = 4\nlearning_rate = 1e-4\n"
PROMPTS = "[prompt]\nwidth = 1024\n[[prompt.subset]]\nprompt = 'a cat'\n"
DIFFUSION_PIPE = (
    "output_dir = 'x'\ndataset = 'd.toml'\n[model]\ntype = 'hunyuan_image'\n[adapter]\ntype = 'lora'\n"
)
MUSUBI = "[general]\nresolution = [960, 544]\n[[datasets]]\nimage_directory = 'x'\ncache_directory = 'y'\n"
AI_TOOLKIT = "---\njob: extension\nconfig:\n  name: cats\n  process:\n    - type: sd_trainer\n"


@pytest.mark.parametrize(
    ("kind", "text", "message", "hint"),
    [
        ("run file", DATASET, "is a dataset file, not a run file", "`--dataset_config`"),
        ("run file", PROMPTS, "is a prompt file, not a run file", "`--sample_prompts`"),
        ("dataset file", RUN, "is a run file, not a dataset file", "`--config`"),
        ("dataset file", PROMPTS, "is a prompt file, not a dataset file", "`--sample_prompts`"),
        ("prompt file", DATASET, "is a dataset file, not a prompt file", "`--dataset_config`"),
        ("prompt file", RUN, "is a run file, not a prompt file", "`--config`"),
        ("run file", DIFFUSION_PIPE, "is a diffusion-pipe configuration", "own keys"),
        (
            "dataset file",
            "resolutions = [1024]\n[[directory]]\npath = 'x'\n",
            "is a diffusion-pipe dataset",
            "own keys",
        ),
        ("dataset file", MUSUBI, "is a musubi-tuner dataset file", "own keys"),
        ("run file", AI_TOOLKIT, "is an ai-toolkit configuration", "own keys"),
        ("dataset file", "resolution: 1024\ndatasets:\n  - a\n", "is YAML", "own keys"),
    ],
)
def test_a_file_of_another_kind_is_one_sentence(refused, kind, text, message, hint):
    error = refused(kind, text)
    assert message in error.message
    assert "\n" not in error.message
    assert hint in error.hint


def test_files_of_the_right_kind_are_read(tmp_path):
    for kind, text in (("run file", RUN), ("dataset file", DATASET), ("prompt file", PROMPTS)):
        assert parse_document(text, tmp_path / "a.toml", kind)


def test_many_unknown_keys_are_the_first_few_and_a_number(refused):
    error = refused("run file", "".join(f"nonsense_{n} = {n}\n" for n in range(72)))
    assert re.search(
        r"unknown keys in `.*`: `nonsense_0`, `nonsense_1`, `nonsense_2` and 69 more$", error.message
    )


def test_keys_of_other_commands_are_passed_over_with_one_note(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        RUN + "vae = 'v'\ndataset_config = 'd'\nxformers = true\nmax_train_epochs = 3\n", encoding="utf-8"
    )
    notes: list[str] = []
    config = make(commands.CacheLatentsConfig, {}, run_file=path, notes=notes)
    assert config.vae.vae == Path("v")
    (note,) = [note for note in notes if "other commands" in note]
    assert note == (
        f"options of other commands in `{path}` are ignored: `dit`, `network_dim`, `learning_rate` and 2 more"
    )


def test_a_run_file_may_be_named_without_its_ending(tmp_path):
    (tmp_path / "run.toml").write_text("network_dim = 8\n", encoding="utf-8")
    assert make(commands.TrainConfig, TRAIN, run_file=tmp_path / "run").network.network_dim == 8


@pytest.fixture
def pipe(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


@needs_pipes
def test_a_bounded_read_refuses_what_is_no_regular_file(tmp_path, pipe):
    with pytest.raises(OSError, match="it is a pipe, not a file"):
        read_bounded(pipe, 10)
    with pytest.raises(OSError, match="it is a device, not a file"):
        read_bounded("/dev/zero", 10)
    with pytest.raises(IsADirectoryError):
        read_bounded(tmp_path, 10)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        with pytest.raises(OSError, match="it is a socket or a device, not a file"):
            read_bounded(tmp_path / "s", 10)


def test_a_bounded_read_holds_its_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    link = tmp_path / "link"
    link.symlink_to(path)
    assert read_bounded(link, 1000) == b"x" * 1000
    with pytest.raises(OSError, match=r"it is larger than 999 B, the limit"):
        read_bounded(path, 999)
    with path.open("r+b") as file:
        file.truncate(10**11)  # sparse: nothing on the disk, 100 GB to a reader
    with pytest.raises(OSError, match=r"larger than 32\.0 MB"):
        read_bounded(path, DOCUMENT_BYTES)


@pytest.mark.skipif(sys.platform != "linux", reason="files without a size are Linux's")
def test_a_bounded_read_of_a_file_without_a_size_stops_at_the_limit():
    assert os.stat("/proc/self/maps").st_size == 0
    assert read_bounded("/proc/self/maps", 10**7)
    with pytest.raises(OSError, match="larger than 100 B"):
        read_bounded("/proc/self/maps", 100)


HOSTILE_JSON = [
    ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    ('{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1), "nested too deeply"),
    ('{"a": 1, "a": 2}', "has the key `a` twice"),
    (r'{"a": "\ud800"}', "half of a surrogate pair"),
    (r'{"\udc00": 1}', "half of a surrogate pair"),
    ('{"a": "\udcff"}', "half of a surrogate pair"),
    ('{"a": %s}' % ("1" * 301), "whole number of more than 300 digits"),
    ('{"a": [-%s]}' % ("1" * 5000), "whole number of more than 300 digits"),
    ('{"a": 1e999}', "not finite"),
    ('{"a": NaN}', "not finite"),
    ("[1]", "must be an object, not a list"),
    ("null", "must be an object, not null"),
    ("{", "is not valid JSON"),
    ("", "is not valid JSON"),
    (b'{"a": "\xff"}', "is not UTF-8"),
    (" " * 1001 + "{}", "at most 1000 are read"),
]


@pytest.mark.parametrize(("text", "reason"), HOSTILE_JSON, ids=[reason for _, reason in HOSTILE_JSON])
def test_json_that_other_code_would_fail_on_is_refused(text, reason):
    limit = 1000 if "1000" in reason else MAX_JSON_BYTES
    with pytest.raises(HyimgError, match=f"^`it` .*{reason}"):
        parse_json(text, "`it`", limit=limit)


def test_unusual_json_is_read():
    deep = '{"a":' * MAX_DEPTH + "1" + "}" * MAX_DEPTH
    for text in (deep, '{"a": ' + "[[]," * 30 + "1" + "]" * 30 + "}", '{"a": %s}' % ("1" * 300)):
        assert parse_json(text, "`it`") == json.loads(text)
    assert parse_json('\ufeff{"a": "\\ud83d\\ude00", "b": "NaN"}'.encode(), "`it`") == {"a": "😀", "b": "NaN"}
    repeated: list[str] = []
    assert parse_json('{"a": 1, "a": 2, "b": 3}', "`it`", repeated=repeated) == {"a": 2, "b": 3}
    assert repeated == ["a"]


@pytest.mark.parametrize("kind", ["run file", "dataset file", "prompt file"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (".".join("a" * 20_000) + " = 1", "nested too deeply"),
        ("a = " + "[" * 20_000 + "]" * 20_000, "nested too deeply"),
        ("a = " + "1" * 5000, "whole number of more than 300 digits"),
        ("a = 1" + "0" * 320, "whole number of more than 300 digits"),
    ],
)
def test_toml_that_other_code_would_fail_on_is_refused(refused, kind, text, reason):
    assert reason in refused(kind, text).message


# Where our own processes read what they wrote themselves a moment before
OWN_JSON = {"rendering/decoding.py", "distributed/processes.py"}


def test_json_and_toml_are_decoded_in_one_place():
    hyimg = Path(documents.__file__).parents[1]
    decoders = re.compile(r"\bjson\.(loads?|JSONDecoder)\b|from json import|\btomli?(lib)?\.loads?\b")
    found = {
        path.relative_to(hyimg).as_posix()
        for path in hyimg.rglob("*.py")
        if decoders.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"config/documents.py", *OWN_JSON}


MANY = 5000
FAULTY = {
    "run file": "".join(f"key_{i} = {i}\n" for i in range(MANY)),
    "dataset file": "[[datasets]]\nresolution = 64\n"
    + "".join(f"key_{i} = {i}\n" for i in range(MANY))
    + "".join(f"[[datasets.subsets]]\nimage_dir = 'no {i}'\nflip_aug = 3\n" for i in range(500)),
    "prompt file": "[prompt]\n[[prompt.subset]]\nwidth = 'x'\n"
    + "".join(f"widht{i} = {i}\n" for i in range(MANY)),
}


@pytest.mark.parametrize("kind", FAULTY)
def test_thousands_of_faults_are_a_few_lines_and_names_are_compared_for_those_only(
    refused, monkeypatch, kind
):
    compared = []
    find = difflib.get_close_matches
    monkeypatch.setattr(
        difflib, "get_close_matches", lambda word, *a, **k: compared.append(word) or find(word, *a, **k)
    )
    message = refused(kind, FAULTY[kind]).message
    assert len(message.splitlines()) <= 15
    assert len(message) < 4000
    assert re.search(r"\d{3,} (more|problems|things)", message)
    assert len(compared) <= 1000

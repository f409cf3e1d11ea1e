from __future__ import annotations

import json
from pathlib import Path

import pytest

from hyimg.data.dataset_file import load_dataset_file, parse_dataset
from hyimg.data.dataset_keys import Dataset
from hyimg.errors import HyimgError


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)


def one(dataset: dict[str, object], subset: dict[str, object] | None = None) -> Dataset:
    document = {"datasets": [{**dataset, "subsets": [{"image_dir": "cats", **(subset or {})}]}]}
    return parse_dataset(document, Path("set.toml")).datasets[0]


def complaint(dataset: dict[str, object], subset: dict[str, object] | None = None) -> str:
    with pytest.raises(HyimgError) as told:
        one(dataset, subset)
    assert told.value.exit_code == 2
    return told.value.message


def test_a_folder_of_images_in_place_of_the_file_is_told() -> None:
    with pytest.raises(HyimgError) as told:
        load_dataset_file(Path("cats"))
    assert told.value.message == "`cats` is a folder, not a dataset file"
    assert "`image_dir`" in str(told.value.hint)


GUIDE = """
[general]
shuffle_caption = true
caption_extension = ".txt"

[[datasets]]
batch_size = 2
enable_bucket = true
resolution = [1024, 1024]

  [[datasets.subsets]]
  image_dir = "cats"
  num_repeats = 1

[[datasets]]
batch_size = 1
enable_bucket = true
resolution = [1280, 768]

  [[datasets.subsets]]
  image_dir = "dogs"
  num_repeats = 1
"""


def test_the_guides_multi_resolution_example_works_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "set.toml"
    path.write_text(GUIDE)
    read = load_dataset_file(path)
    assert [(d.resolution, d.batch_size) for d in read.datasets] == [((1024, 1024), 2), ((1280, 768), 1)]
    assert all(d.subsets[0].caption.shuffle_caption for d in read.datasets)
    assert read.datasets[1].subsets[0].caption_extensions == (".txt",)
    assert read.datasets[1].bucket_sizes.bounds == (256, 1280)
    assert "several resolutions" in read.notes[0]


def test_json_says_the_same_and_the_inner_value_wins(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    subsets = [{"image_dir": "cats"}, {"image_dir": "dogs", "num_repeats": 4}]
    tables = {
        "general": {"num_repeats": 2, "resolution": 512, "batch_size": 3},
        "datasets": [{"num_repeats": 3, "batch_size": 5, "subsets": subsets}],
    }
    path.write_text(json.dumps(tables))
    read = load_dataset_file(path, defaults={"resolution": 1024, "prior_loss_weight": 0.5})
    (dataset,) = read.datasets
    assert [subset.num_repeats for subset in dataset.subsets] == [3, 4]
    assert (dataset.resolution, dataset.batch_size, dataset.prior_loss_weight) == ((512, 512), 5, 0.5)


def test_bounds_that_are_no_multiple_of_the_step_are_moved_outwards_and_noted() -> None:
    table = {"resolution": 512, "enable_bucket": True, "min_bucket_reso": 100, "max_bucket_reso": 1000}
    read = parse_dataset({"datasets": [{**table, "subsets": [{"image_dir": "cats"}]}]}, Path("set.toml"))
    assert read.datasets[0].bucket_sizes.bounds == (96, 1024)
    assert read.notes == (
        "`min_bucket_reso` 100 is taken as 96, a multiple of 32: [[datasets]] 1",
        "`max_bucket_reso` 1000 is taken as 1024, a multiple of 32: [[datasets]] 1",
    )
    table |= {"min_bucket_reso": 96, "max_bucket_reso": 1024}
    assert parse_dataset({"datasets": [{**table, "subsets": [{"image_dir": "cats"}]}]}, Path("x")).notes == ()


@pytest.mark.parametrize(
    ("keys", "note"),
    [
        (
            {"min_bucket_reso": 64, "bucket_reso_steps": 64, "bucket_no_upscale": True},
            "`min_bucket_reso`, `bucket_reso_steps`, `bucket_no_upscale` without effect (there is no `enable_bucket`)",
        ),
        (
            {"enable_bucket": True, "bucket_no_upscale": True, "max_bucket_reso": 1000},
            "`max_bucket_reso` without effect (buckets follow the images with `bucket_no_upscale`)",
        ),
    ],
)
def test_bucket_keys_that_change_nothing_are_noted(keys: dict[str, object], note: str) -> None:
    document = {"datasets": [{"resolution": 64, **keys, "subsets": [{"image_dir": "cats"}]}]}
    assert parse_dataset(document, Path("set.toml")).notes == (f"{note}: [[datasets]] 1",)


def test_notes_of_a_kind_are_one_line_however_many_subsets() -> None:
    subsets: list[dict[str, object]] = [{"image_dir": "cats", "num_repeats": 0} for _ in range(20)]
    subsets += [{"image_dir": "dogs", "is_reg": True, "validation_split": 0.5}, {"image_dir": "dogs"}]
    general = {"keep_tokens": 1, "token_warmup_min": 3}
    read = parse_dataset(
        {"general": general, "datasets": [{"resolution": 64, "subsets": subsets}]}, Path("x")
    )
    places = "[[datasets]] 1, subset 1, [[datasets]] 1, subset 2, [[datasets]] 1, subset 3 and 19 more"
    assert read.notes == (
        f"`keep_tokens` without effect (no tag is shuffled or dropped): {places}",
        f"`token_warmup_min` without effect (there is no token warm-up): {places}",
        "`validation_split` without effect (regularisation images are never held back): [[datasets]] 1, subset 21",
        f"subset with `num_repeats = 0`, skipped: `{Path.cwd() / 'cats'}`",
        f"subset that is there twice in [[datasets]] 1, of which the first counts: `{Path.cwd() / 'dogs'}`",
    )
    plain = {"resolution": 64, "subsets": [{"image_dir": "cats"}]}
    shuffled = {"general": {"keep_tokens": 1, "shuffle_caption": True}, "datasets": [plain]}
    assert parse_dataset(shuffled, Path("x")).notes == ()


def test_bounds_of_buckets_follow_the_resolution() -> None:
    assert one({"resolution": 2048, "enable_bucket": True}).bucket_sizes.bounds == (256, 2048)
    assert one({"resolution": 64, "enable_bucket": True}).bucket_sizes.bounds == (32, 1024)
    assert one({"resolution": 1024, "enable_bucket": True}).bucket_sizes.steps == 32
    assert one({"resolution": 64}).bucket_sizes.predefined == ((64, 64),)


def test_all_problems_are_one_error() -> None:
    document = {
        "generall": {},
        "datasets": [
            {
                "batch_size": "2",
                "resolutoin": 512,
                "subsets": [
                    {"image_dir": "cats", "num_repeat": 3, "resolution": 512},
                    {"image_dir": "nowhere", "num_repeats": -1, "flip_aug": 1},
                    {"caption_prefix": "a"},
                ],
            }
        ],
    }
    with pytest.raises(HyimgError) as told:
        parse_dataset(document, Path("set.toml"))
    lines = told.value.message.split("\n  ")
    assert lines[0] == "`set.toml` has 10 problems:"
    assert lines[1:] == [
        "the top level: unknown key `generall`; did you mean `general`?",
        "[[datasets]] 1: unknown key `resolutoin`; did you mean `resolution`?",
        '[[datasets]] 1: `batch_size` must be a whole number, got `"2"`',
        "[[datasets]] 1, subset 1: unknown key `num_repeat`; did you mean `num_repeats`?",
        "[[datasets]] 1, subset 1: `resolution` belongs in [[datasets]] or [general]",
        "[[datasets]] 1, subset 2: `num_repeats` must be at least 0, got -1",
        "[[datasets]] 1, subset 2: `flip_aug` must be true or false, got `1`",
        f"[[datasets]] 1, subset 2: `image_dir` `nowhere` does not exist (looked for in `{Path.cwd()}`)",
        "[[datasets]] 1, subset 3: `image_dir` (or `metadata_file`) is missing",
        "[[datasets]] 1: `resolution` is missing",
    ]


def test_folders_that_are_not_there_are_one_line() -> None:
    subsets = [{"image_dir": f"gone{number}"} for number in range(20)]
    with pytest.raises(HyimgError) as told:
        parse_dataset({"datasets": [{"resolution": 64, "subsets": subsets}]}, Path("set.toml"))
    assert told.value.message == (
        f"`set.toml`, `image_dir` does not exist (looked for in `{Path.cwd()}`): "
        "`gone0` ([[datasets]] 1, subset 1), `gone1` ([[datasets]] 1, subset 2), "
        "`gone2` ([[datasets]] 1, subset 3) and 17 more"
    )


def test_a_refused_key_that_asks_for_nothing_is_taken() -> None:
    asked = {"color_aug": False, "random_crop": False, "token_warmup_step": 0, "token_warmup_min": 1}
    assert one({"resolution": 64}, {**asked, "cache_info": True}).subsets[0].num_repeats == 1


@pytest.mark.parametrize(
    ("dataset", "told"),
    [
        (
            {"resolution": 2048, "enable_bucket": True, "max_bucket_reso": 1024},
            "1024 is under the resolution",
        ),
        ({"resolution": 128, "enable_bucket": True, "min_bucket_reso": 256}, "256 is over the resolution"),
        ({"resolution": 64, "is_reg": True}, "`is_reg` belongs in [[datasets.subsets]]"),
    ],
)
def test_contradictions_are_named(dataset: dict[str, object], told: str) -> None:
    assert told in complaint(dataset)


@pytest.mark.parametrize("resolution", ["512", 1000, [1]])
def test_a_wrong_resolution_is_not_called_missing_too(resolution: object) -> None:
    assert "missing" not in complaint({"resolution": resolution})
    with pytest.raises(HyimgError) as told:
        parse_dataset(
            {"general": {"resolution": resolution}, "datasets": [{"subsets": [{"image_dir": "cats"}]}]},
            Path("set.toml"),
        )
    assert "missing" not in told.value.message


def test_paths_that_no_system_takes_are_problems_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name in ("x" * 5000, "circle", "a\0b", "\ud800", "~nobody-of-this-name/x"):
        assert "`image_dir`" in (told := complaint({"resolution": 64}, {"image_dir": name}))
        assert len(told) < 1000


def test_masks_and_metadata_cannot_be_combined_with_what_excludes_them(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text("{}")
    assert "two masks" in complaint({"resolution": 64}, {"alpha_mask": True, "conditioning_data_dir": "dogs"})
    assert "`is_reg` cannot be combined" in complaint(
        {"resolution": 64}, {"metadata_file": "m.json", "is_reg": True}
    )
    assert "`recursive` cannot be combined" in complaint(
        {"resolution": 64}, {"metadata_file": "m.json", "recursive": True}
    )
    assert "`metadata_file` `dogs` is a folder" in complaint({"resolution": 64}, {"metadata_file": "dogs"})


def test_a_path_may_start_at_the_current_folder_or_at_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "set.toml"
    path.write_text("[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'cats'\n")
    monkeypatch.chdir(tmp_path / "dogs")
    assert load_dataset_file(path).datasets[0].subsets[0].image_dir == tmp_path / "cats"
    (tmp_path / "dogs" / "cats").mkdir()
    assert load_dataset_file(path).datasets[0].subsets[0].image_dir == tmp_path / "dogs" / "cats"


def test_the_first_of_duplicate_subsets_counts_and_zero_repeats_leave_one_out() -> None:
    subsets = [
        {"image_dir": "cats", "num_repeats": 2},
        {"image_dir": "cats", "num_repeats": 3},
        {"image_dir": "dogs", "num_repeats": 0},
    ]
    read = parse_dataset({"datasets": [{"resolution": 64, "subsets": subsets}]}, Path("set.toml"))
    assert [subset.num_repeats for subset in read.datasets[0].subsets] == [2]
    assert ["there twice" in read.notes[0], "num_repeats = 0" in read.notes[1]] == [True, True]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deep.json", "[" * 200_000),
        ("deep.toml", "x = " + "[" * 200_000),
        ("a.toml", "x = ["),
        ("a.json", "{"),
        ("a.json", "[]"),
        ("b.toml", ""),
        ("c.toml", None),
    ],
)
def test_a_file_that_is_no_dataset_file_is_named(tmp_path: Path, name: str, text: str | None) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(HyimgError, match=name):
        load_dataset_file(tmp_path / name)


def test_of_many_problems_the_first_are_listed_and_the_rest_counted(tmp_path):
    path = tmp_path / "data.toml"
    path.write_text("\n".join(f"key{n} = {n}" for n in range(72)), encoding="utf-8")
    with pytest.raises(HyimgError) as caught:
        load_dataset_file(path)
    lines = caught.value.message.splitlines()
    assert len(lines) < 16
    assert "73 problems" in lines[0]
    assert "61 more" in lines[-1]

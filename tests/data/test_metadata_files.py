"""Captions from one file: the reference tool's `metadata_file`, and Hugging Face's `metadata.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hyimg.cache.index import Index
from hyimg.data.dataset_file import parse_dataset
from hyimg.data.dataset_keys import DatasetFile
from hyimg.data.scan import Scan, scan
from hyimg.errors import HyimgError

AddImage = Callable[..., Path]
MakeDataset = Callable[..., DatasetFile]


def scan_subset(tmp_path: Path, **subset: object) -> Scan:
    document = {"datasets": [{"resolution": 64, "subsets": [subset]}]}
    return scan(parse_dataset(document, tmp_path / "set.toml"))


def captions(found: Scan) -> dict[str, str]:
    return {sample.image_path.name: sample.caption for sample in found.samples}


def test_a_metadata_file_nested_without_end_is_a_sentence(tmp_path: Path, add_image: AddImage) -> None:
    add_image(tmp_path / "a.png", caption=None)
    (tmp_path / "m.json").write_text("[" * 200_000)
    subset = {"image_dir": str(tmp_path), "metadata_file": str(tmp_path / "m.json")}
    read = parse_dataset({"datasets": [{"resolution": 64, "subsets": [subset]}]}, tmp_path / "set.toml")
    with pytest.raises(HyimgError, match=r"m\.json`: it is nested too deeply"):
        scan(read, Index(None))


def test_a_metadata_file_gives_captions_and_tags(tmp_path: Path, add_image: AddImage) -> None:
    for name in ("a.png", "b.png", "c.png"):
        add_image(tmp_path / "images" / name, caption=None)
    listing = tmp_path / "listing.json"
    listing.write_text(json.dumps({"a.png": {"caption": "x", "tags": "y, z"}, "b.png": {"tags": "w"}}))
    subset = {"metadata_file": str(listing), "image_dir": str(tmp_path / "images")}
    document = {"datasets": [{"resolution": 64, "subsets": [subset]}]}
    found = scan(parse_dataset(document, tmp_path / "set.toml"))
    assert [sample.prompts for sample in found.samples] == [("x, y, z",), ("w",)]
    assert found.warnings == ["image that the metadata file does not name, skipped (1): `images/c.png`"]
    lines = tmp_path / "listing.jsonl"
    lines.write_text('{"image_path": "c.png", "caption": "猫"}\n')
    in_lines = {"resolution": 64, "subsets": [{**subset, "metadata_file": str(lines)}]}
    found = scan(parse_dataset({"datasets": [in_lines]}, tmp_path / "set.toml"))
    assert [sample.prompts for sample in found.samples] == [("猫",)]
    listing.write_text(json.dumps({"gone.png": {"caption": "x"}}))
    with pytest.raises(HyimgError, match=r"there is no image `.*gone\.png`"):
        scan(parse_dataset(document, tmp_path / "set.toml"))


def lines(*entries: dict[str, object]) -> str:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def test_an_image_folder_of_hugging_face_is_read_as_it_is(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    for name in ("a.png", "b.png", "c.png"):
        add_image(tmp_path / "images" / name, caption=None)
    (tmp_path / "images" / "c.txt").write_text("from its own file")
    entries = [
        {"file_name": "a.png", "text": "a cat\u2028asleep", "width": 64},
        {"file_name": "./b.png", "text": "a dog", "width": 64, "license": "CC0"},
        {"file_name": "c.png", "text": "from the list"},
        {"file_name": "gone.png", "text": "x"},
    ]
    (tmp_path / "images" / "metadata.jsonl").write_text(lines(*entries), encoding="utf-8")
    found = scan(dataset())
    assert captions(found) == {"a.png": "a cat\u2028asleep", "b.png": "a dog", "c.png": "from its own file"}
    assert found.warnings == [
        "`images/metadata.jsonl`: unused keys: `license`, `width`",
        "entry of `metadata.jsonl` without an image in the subset, skipped (1): `images/metadata.jsonl` (`gone.png`)",
        "image with several captions; the first is used (1): `images/c.png` (`c.txt`, `metadata.jsonl`)",
    ]
    # the same file by name: its images lie next to it, and one that is not there is an error
    with pytest.raises(HyimgError, match=r"no image `images/gone.png`, which `images/metadata.jsonl` names"):
        scan_subset(tmp_path, metadata_file="images/metadata.jsonl")
    (tmp_path / "images" / "metadata.jsonl").write_text(lines(*entries[:2]), encoding="utf-8")
    assert list(captions(scan_subset(tmp_path, metadata_file="images/metadata.jsonl"))) == ["a.png", "b.png"]


def test_each_subfolder_may_have_its_own_list(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    for name in ("x/a.png", "y/a.png", "y/z/b.png"):
        add_image(tmp_path / "images" / name, caption=None, seed=ord(name[0]))
    (tmp_path / "images" / "x" / "metadata.jsonl").write_text(lines({"file_name": "a.png", "text": "x"}))
    entries = lines({"file_name": "a.png", "text": "y"}, {"file_name": "z/b.png", "text": "z"})
    (tmp_path / "images" / "y" / "metadata.jsonl").write_text(entries)
    found = scan(dataset(subset_lines="recursive = true"))
    assert [sample.caption for sample in found.samples] == ["x", "y", "z"]
    assert found.warnings == []


def test_entries_without_a_caption_are_refused_as_an_empty_file_is(
    tmp_path: Path, add_image: AddImage
) -> None:
    for name in ("a.png", "b.png", "c.png"):
        add_image(tmp_path / "images" / name, caption=None)
    listing = tmp_path / "listing.json"
    listing.write_text(
        json.dumps({"a.png": {"caption": "x"}, "b.png": {}, "c.png": {"train_resolution": [1, 1]}})
    )
    subset = {"metadata_file": "listing.json", "image_dir": "images"}
    with pytest.raises(HyimgError, match=r"no caption for `images/b.png`, `images/c.png` in `listing.json`"):
        scan_subset(tmp_path, **subset)
    found = scan_subset(tmp_path, **subset, class_tokens="cat")
    assert captions(found) == {"a.png": "x", "b.png": "cat", "c.png": "cat"}
    for blank in (" \n", "\0"):
        listing.write_text(json.dumps({"a.png": {"caption": blank}}))
        with pytest.raises(
            HyimgError, match=r"caption of `images/a.png` in `listing.json`: it (is empty|has NUL)"
        ):
            scan_subset(tmp_path, **subset, class_tokens="cat")


def test_entries_that_are_overruled_or_of_another_form_are_named(tmp_path: Path, add_image: AddImage) -> None:
    add_image(tmp_path / "a.png", caption=None)
    (tmp_path / "m.json").write_text('{"a.png": {"caption": "x"}, "a.png": {"caption": "y"}}')
    found = scan_subset(tmp_path, metadata_file="m.json")
    assert captions(found) == {"a.png": "y"}
    assert found.warnings == ["`m.json`: names with several entries, of which the last is used: `a.png`"]
    for name, text, words in (
        ("m.json", "[]", "must map each image"),
        ("m.json", '{"a.png": "x"}', "must map each image"),
        ("m.json", "{}", "no image is named in `m.json`"),
        ("m.jsonl", '\n{"text": "x"}', "line 2 has neither `file_name` nor `image_path`"),
        ("m.jsonl", "{", "line 1 is not valid JSON"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(HyimgError, match=words):
            scan_subset(tmp_path, metadata_file=name)


def test_masks_of_a_list_follow_subfolders(tmp_path: Path, add_image: AddImage) -> None:
    for name in ("x/a.png", "y/a.png", "y/b.png"):
        add_image(tmp_path / "images" / name, caption=None, seed=ord(name[0]))
    for name in ("x/a.png", "y/a.png", "b.png"):
        add_image(tmp_path / "masks" / name, caption=None, seed=ord(name[0]) + 9)
    entries = {name: {"caption": name} for name in ("x/a.png", "y/a.png", "y/b.png")}
    (tmp_path / "m.json").write_text(json.dumps(entries))
    subset = {"metadata_file": "m.json", "image_dir": "images", "conditioning_data_dir": "masks"}
    found = scan_subset(tmp_path, **subset)
    masks = [
        str(sample.mask_path.relative_to(tmp_path / "masks")) for sample in found.samples if sample.mask_path
    ]
    assert masks == ["x/a.png", "y/a.png", "b.png"]

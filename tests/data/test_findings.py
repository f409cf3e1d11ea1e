"""What is skipped or assumed is counted and named, once, in the same words by every command."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from hyimg.cache.index import Index
from hyimg.data import findings
from hyimg.data.dataset_file import load_dataset_file, parse_dataset
from hyimg.data.dataset_keys import DatasetFile
from hyimg.data.scan import Scan, scan
from hyimg.errors import HyimgError, shown
from hyimg.training.metadata import tag_frequency

AddImage = Callable[..., Path]
MakeDataset = Callable[..., DatasetFile]


def found_kinds(found: Scan) -> dict[str, list[str]]:
    """kind -> names of the first files."""
    kinds: dict[str, list[str]] = {}
    for finding in found.findings:
        kinds.setdefault(finding.kind, []).append(Path(finding.images[0]).name)
    return {kind: sorted(names) for kind, names in kinds.items()}


def test_an_ordinary_folder_is_passed_without_a_word(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    for number in range(3):
        add_image(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "Thumbs.db").write_bytes(b"")
    (tmp_path / "images" / ".DS_Store").write_bytes(b"")
    (tmp_path / "images" / "._0.png").write_bytes(b"")
    assert scan(dataset()).warnings == []


def test_every_file_that_is_skipped_is_named(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    images = tmp_path / "images"
    add_image(images / "a.png")
    add_image(images / "deep" / "er" / "below.png")
    add_image(images / ".hidden.png", caption=None)
    (images / "a.caption").write_text("another")
    (images / "a.png.txt").write_text("near")
    (images / "lost.txt").write_text("whose?")
    (images / "film.mp4").write_bytes(b"")
    (images / "a.npz").write_bytes(b"")
    found = scan(dataset())
    assert found_kinds(found) == {
        "image_in_subfolder": ["below.png"],
        "hidden_image": [".hidden.png"],
        "second_caption": ["a.png"],
        "caption_near_miss": ["a.png.txt"],
        "caption_without_image": ["lost.txt"],
        "other_file": ["a.npz", "film.mp4"],
    }
    assert (
        "image with several captions; the first is used (1): `images/a.png` (`a.txt`, `a.caption`)"
        in found.warnings
    )
    assert (
        "text file named almost like the caption of an image, skipped (1): `images/a.png.txt` (`a.png`)"
        in found.warnings
    )
    assert found.notes == []


def test_many_files_of_a_kind_are_one_line(tmp_path: Path, add_image: AddImage, dataset: MakeDataset) -> None:
    add_image(tmp_path / "images" / "a.png")
    for number in range(20):
        (tmp_path / "images" / f"{number:02}.txt").write_text("x")
    (line,) = scan(dataset()).warnings
    assert line == (
        "caption file without an image (20): `images/00.txt`, `images/01.txt`, `images/02.txt` and 17 more"
    )


def test_problems_that_differ_in_a_name_only_are_one_line(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    for number in range(20):
        add_image(tmp_path / "images" / f"{number:02}.png", caption=None)
    with pytest.raises(HyimgError) as told:
        scan(dataset())
    assert "`images/00.png`, `images/01.png`, `images/02.png` and 17 more; " in told.value.message
    assert "03.png" not in told.value.message
    for number in range(20):
        (tmp_path / "images" / f"{number:02}.txt").write_text("x")
        (tmp_path / "images" / f"{number:02}.png").write_bytes(b"no picture")
    with pytest.raises(HyimgError, match=r"cannot read the image `images/00.png` \(.*\), .* and 17 more"):
        scan(dataset())
    with pytest.raises(HyimgError, match="no image can be read"):
        scan(dataset(), on_bad_image="skip")
    add_image(tmp_path / "images" / "00.png", caption=None)
    (line,) = scan(dataset(), on_bad_image="skip").warnings
    assert line.startswith("image that cannot be read, skipped (19): `images/01.png` (")


@pytest.mark.parametrize(
    ("image", "text", "lines", "near"),
    [
        ("IMG_1.JPG", "img_1.txt", "", "img_1.txt"),
        ("a.jpg", "a.jpg.txt", "", "a.jpg.txt"),
        ("a.jpg", "a.caption", "caption_extension = '.txt'", "a.caption"),
        ("a.jpg", "a .txt", "", "a .txt"),
    ],
)
def test_a_caption_of_almost_the_right_name_is_named(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset, image: str, text: str, lines: str, near: str
) -> None:
    add_image(tmp_path / "images" / image, caption=None)
    (tmp_path / "images" / text).write_text("a cat")
    with pytest.raises(HyimgError, match="there is no caption for") as told:
        scan(dataset(subset_lines=lines))
    assert f"`images/{image}`: found `{near}`" in told.value.message
    with_class = scan(dataset(subset_lines=f"{lines}\nclass_tokens = 'x'"))
    assert found_kinds(with_class) == {"caption_near_miss": [text]}


def test_an_ending_may_be_in_upper_case_and_without_its_dot(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    add_image(tmp_path / "images" / "IMG_1.JPG", caption=None)
    (tmp_path / "images" / "IMG_1.TXT").write_text("a cat")
    assert [sample.caption for sample in scan(dataset()).samples] == ["a cat"]
    found = scan(dataset(subset_lines="caption_extension = 'txt'"))
    assert [sample.caption for sample in found.samples] == ["a cat"]
    assert found.warnings == ['`caption_extension = "txt"` is taken as `.txt`: [[datasets]] 1, subset 1']
    (tmp_path / "images" / "IMG_1_tags.txt").write_text("tags")
    found = scan(dataset(subset_lines="caption_extension = '_tags.txt'"))
    assert [sample.caption for sample in found.samples] == ["tags"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are always plain text")
def test_odd_names_stay_on_one_line(tmp_path: Path, add_image: AddImage, dataset: MakeDataset) -> None:
    add_image(tmp_path / "images" / "a.png")
    for name in (b"line\nend.txt", b"\xce\xd2.txt"):
        Path(os.fsdecode(bytes(tmp_path / "images") + b"/" + name)).write_text("x")
    (line,) = scan(dataset()).warnings
    assert shown(line) == (
        r"caption file without an image (2): `images/line\nend.txt`, `images/\udcce\udcd2.txt`"
    )


def test_formats_that_share_a_caption_are_named(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    for name in ("a.jpg", "a.png"):
        add_image(tmp_path / "images" / name)
    (finding,) = scan(dataset()).findings
    assert finding.kind == "shared_caption"
    assert [Path(path).name for path in finding.images] == ["a.jpg", "a.png"]


def test_recursive_takes_subfolders_and_keeps_equal_names_apart(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    for folder in ("", "cats", "dogs/old"):
        add_image(tmp_path / "images" / folder / "a.png", seed=len(folder), caption=folder or "top")
        add_image(tmp_path / "masks" / folder / "a.png", seed=len(folder) + 9, caption=None, mode="L")
    add_image(tmp_path / "images" / ".trash" / "a.png")
    add_image(tmp_path / "masks" / "dogs" / "b.png", caption=None)
    (tmp_path / "images" / "dogs" / "loop").symlink_to(tmp_path / "images")
    lines = "recursive = true\nconditioning_data_dir = 'masks'"
    found = scan(dataset(subset_lines=lines))
    folders = [
        sample.image_path.relative_to(tmp_path / "images").parent.as_posix() for sample in found.samples
    ]
    assert folders == [".", "cats", "dogs/old"]
    assert [sample.caption for sample in found.samples] == ["top", "cats", "dogs/old"]
    masks = [sample.mask_path for sample in found.samples]
    assert masks == [tmp_path / "masks" / folder / "a.png" for folder in folders]
    assert len({sample.key for sample in found.samples}) == 3
    assert len({sample.recipe() for sample in found.samples}) == 3
    assert found_kinds(found) == {"mask_without_image": ["b.png"]}


def test_a_folder_that_is_a_subset_itself_is_taken_once(tmp_path: Path, add_image: AddImage) -> None:
    for name in ("a.png", "best/b.png", "masks/a.png"):
        add_image(tmp_path / "images" / name)
    subsets = [
        {"image_dir": "images", "recursive": True},
        {"image_dir": "images/best", "num_repeats": 5},
        {"image_dir": "images/best", "conditioning_data_dir": "images/masks"},
    ]
    document = {"datasets": [{"resolution": 64, "subsets": subsets[:2]}]}
    found = scan(parse_dataset(document, tmp_path / "set.toml"))
    assert [(s.image_path.name, s.num_repeats) for s in found.samples] == [
        ("a.png", 1),
        ("a.png", 1),
        ("b.png", 5),
    ]
    assert found.notes == ["the search of `images` skips `images/best`, which is a subset itself"]
    # without `recursive` such a folder is not said to be skipped, nor is a folder of masks
    add_image(tmp_path / "images" / "masks" / "a.png", caption=None, mode="L")
    subsets[0] = {"image_dir": "images", "conditioning_data_dir": "images/masks"}
    document = {"datasets": [{"resolution": 64, "subsets": subsets[:2]}]}
    assert scan(parse_dataset(document, tmp_path / "set.toml")).warnings == []


def test_captions_of_several_lines_are_named_and_can_be_taken_whole(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    path = add_image(tmp_path / "images" / "a.png", caption="A cat.\n\nIt sleeps.\nIt is old.")
    found = scan(dataset())
    assert found.samples[0].prompts == ("A cat.",)
    (finding,) = found.findings
    assert (finding.kind, finding.images, finding.count) == ("caption_lines_dropped", (str(path),), 2)
    assert "`images/a.png` (2 lines cut)" in found.warnings[0]
    whole = scan(dataset(subset_lines="multiline_caption = true"))
    assert whole.samples[0].prompts == ("A cat.\n\nIt sleeps.\nIt is old.",)
    assert whole.warnings == []
    assert scan(dataset(subset_lines="enable_wildcard = true")).warnings == []


def test_text_that_an_encoding_has_damaged_is_named(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    add_image(tmp_path / "images" / "a.png", caption="a caf\ufffd")
    add_image(tmp_path / "images" / "b.png", caption="a\x1bcat")
    add_image(tmp_path / "images" / "c.png", caption="a\tcat, 咖啡")
    assert found_kinds(scan(dataset())) == {"damaged_text": ["a.png", "b.png"]}


@pytest.mark.parametrize(
    ("size", "lines", "percent"),
    [
        ((80, 2000), "resolution = [32, 128]", 84),
        ((80, 2000), "resolution = 64\nenable_bucket = true\nmax_bucket_reso = 128", 84),
        ((128, 96), "resolution = 64", 25),
        ((128, 104), "resolution = 64", None),  # 19%
    ],
)
def test_a_crop_that_costs_a_fifth_is_named(
    tmp_path: Path,
    add_image: AddImage,
    dataset: MakeDataset,
    size: tuple[int, int],
    lines: str,
    percent: int | None,
) -> None:
    add_image(tmp_path / "images" / "a.png", size)
    found = scan(dataset(lines))
    assert [(one.kind, one.count) for one in found.findings] == [("cropped", percent)] * (percent is not None)
    assert found.samples[0].is_cropped == (percent is not None)


def write_mask(path: Path, fill: int, white: tuple[slice, slice] | None = None) -> None:
    path.parent.mkdir(exist_ok=True)
    mask = np.full((64, 128), fill, np.uint8)
    if white is not None:
        mask[white] = 255
    Image.fromarray(mask).save(path)


def test_masks_that_train_nothing_are_named_and_remembered(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        add_image(tmp_path / "images" / f"{name}.png", (128, 64))
    write_mask(tmp_path / "masks" / "a.png", 0)
    write_mask(tmp_path / "masks" / "b.png", 0, (slice(30, 34), slice(60, 70)))
    write_mask(
        tmp_path / "masks" / "c.png", 0, (slice(0, 64), slice(0, 20))
    )  # white where the crop cuts it off
    lines = "conditioning_data_dir = 'masks'"
    index = Index(tmp_path / "cache")
    assert found_kinds(scan(dataset(subset_lines=lines), index))["blank_mask"] == ["a.png", "c.png"]
    for name in ("load_mask", "traits_of"):
        monkeypatch.setattr(findings, name, lambda *_, **__: pytest.fail("a picture was read again"))
    warm = scan(dataset(subset_lines=lines), Index(tmp_path / "cache"))
    assert found_kinds(warm)["blank_mask"] == ["a.png", "c.png"]
    assert any("trains nothing" in line and "`images/a.png`" in line for line in warm.warnings)


def test_a_picture_without_an_opaque_pixel_is_named_under_alpha_mask(
    tmp_path: Path, dataset: MakeDataset
) -> None:
    (tmp_path / "images").mkdir()
    for name, alpha in (("seen", 255), ("unseen", 0)):
        Image.new("RGBA", (64, 64), (alpha, 0, 9, alpha)).save(tmp_path / "images" / f"{name}.png")
    lines = "class_tokens = 'x'\n"
    assert found_kinds(scan(dataset(subset_lines=lines))) == {"transparent_image": ["unseen.png"]}
    assert found_kinds(scan(dataset(subset_lines=f"{lines}alpha_mask = true"))) == {
        "blank_mask": ["unseen.png"],
        "opaque_image": ["seen.png"],
    }


def test_what_of_a_picture_is_not_used_as_it_stands_is_named(tmp_path: Path, dataset: MakeDataset) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red.save(images / "still.gif")
    red.save(images / "moving.gif", save_all=True, append_images=[blue])
    red.save(images / "pages.tiff", save_all=True, append_images=[blue])
    red.save(images / "phone.jpg", format="MPO", save_all=True, append_images=[blue])  # with a preview
    red.save(images / "sRGB.png", icc_profile=srgb)
    red.save(images / "broken.png", icc_profile=b"no profile")
    blue.convert("CMYK").save(images / "ink.jpg")
    for image in images.iterdir():
        Image.new("L", (64, 64), 255).save(masks / f"{image.stem}.png")
    red.save(masks / "still.png")
    Image.new("LA", (64, 64), (255, 9)).save(masks / "moving.png")
    found = scan(dataset(subset_lines="class_tokens = 'x'\nconditioning_data_dir = 'masks'"))
    kinds = found_kinds(found)
    kinds.pop("duplicate_image", None)
    assert kinds == {
        "first_frame": ["moving.gif", "pages.tiff"],
        "unusable_profile": ["broken.png"],
        "cmyk_without_profile": ["ink.jpg"],
        "mask_in_colors": ["still.gif"],
        "mask_with_transparency": ["moving.gif"],
    }


def test_copies_and_second_masks_are_named(tmp_path: Path, add_image: AddImage, dataset: MakeDataset) -> None:
    path = add_image(tmp_path / "images" / "a.png")
    shutil.copyfile(path, path.with_name("b.png"))
    path.with_name("b.txt").write_text("b")
    for name in ("a.png", "a.jpg", "b.png"):
        add_image(tmp_path / "masks" / name, caption=None, mode="L")
    found = scan(dataset(subset_lines="conditioning_data_dir = 'masks'"))
    assert found_kinds(found) == {"duplicate_image": ["a.png"], "second_mask": ["a.png"]}


def test_the_dataset_file_and_the_cache_in_the_folder_are_not_reported(
    tmp_path: Path, add_image: AddImage
) -> None:
    add_image(tmp_path / "a.png")
    path = tmp_path / "set.toml"
    subset = f"image_dir = '{tmp_path.as_posix()}'\nrecursive = true\n"
    path.write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n{subset}")
    add_image(tmp_path / "hyimg-cache" / "x.png")
    found = scan(load_dataset_file(path), Index(tmp_path / "hyimg-cache"))
    assert (len(found.samples), found.warnings) == (1, [])


def test_captions_and_masks_that_lead_out_of_the_dataset_are_named_and_kept_private(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    """A dataset of somebody else's may hold a link to any text of the user's; the LoRA's metadata go out."""
    images, outside, masks = tmp_path / "images", tmp_path / "outside", tmp_path / "masks"
    outside.mkdir()
    (outside / "token").write_text("secret")
    for name in ("a", "b", "inner"):
        add_image(images / f"{name}.png", caption=None)
        add_image(masks / f"{name}.png", caption=None)
    (images / "a.txt").symlink_to(outside / "token")
    (images / "b.txt").write_text("a cat")
    (images / "captions").mkdir()
    (images / "captions" / "own").write_text("a dog")
    (images / "inner.txt").symlink_to(images / "captions" / "own")
    add_image(outside / "folder" / "c.png", caption="secret too")
    add_image(masks / "folder" / "c.png", caption=None)
    (images / "folder").symlink_to(outside / "folder")
    (outside / "m.jsonl").write_text('{"file_name": "d.png", "text": "secret as well"}\n')
    add_image(images / "sub" / "d.png", caption=None)
    add_image(masks / "sub" / "d.png", caption=None)
    (images / "sub" / "metadata.jsonl").symlink_to(outside / "m.jsonl")
    (masks / "a.png").rename(outside / "mask.png")
    (masks / "a.png").symlink_to(outside / "mask.png")
    (images / "b.png").rename(outside / "picture.png")
    (images / "b.png").symlink_to(outside / "picture.png")  # people link images

    found = scan(dataset(subset_lines=f"recursive = true\nconditioning_data_dir = '{masks}'"))
    kinds = found_kinds(found)
    assert kinds["linked_caption"] == ["a.txt", "c.txt", "metadata.jsonl"]
    assert kinds["linked_mask"] == ["a.png"]
    (line,) = [line for line in found.warnings if line.startswith("caption that is a link out of")]
    assert f"(3): `images/a.txt` (`{outside}/token`)"[:60] in line
    assert {sample.caption for sample in found.samples} == {
        "secret", "a cat", "a dog", "secret too", "secret as well"
    }  # fmt: skip
    assert tag_frequency(found.samples) == {"images": {"a cat": 1, "a dog": 1}}


def test_a_dataset_that_is_given_by_a_link_is_an_ordinary_one(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    add_image(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "images").symlink_to(tmp_path / "elsewhere")
    found = scan(dataset())
    assert found.warnings == []
    assert tag_frequency(found.samples) == {"images": {"a cat": 1}}

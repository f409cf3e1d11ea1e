from __future__ import annotations

import os
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from hyimg.cache.index import Index
from hyimg.data.dataset_file import parse_dataset
from hyimg.data.dataset_keys import DatasetFile
from hyimg.data.samples import choose, epoch_batches
from hyimg.data.scan import scan
from hyimg.errors import HyimgError

AddImage = Callable[..., Path]
MakeDataset = Callable[..., DatasetFile]


def test_two_formats_of_one_name_are_two_images_with_one_caption(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    for name in ("a.jpg", "a.png", "猫.webp"):
        add_image(tmp_path / "images" / name, caption="一只猫")
    samples = scan(dataset()).samples
    assert [sample.image_path.name for sample in samples] == ["a.jpg", "a.png", "猫.webp"]
    assert len({sample.key for sample in samples}) == 3
    assert {sample.prompts for sample in samples} == {("一只猫",)}


def test_a_warm_scan_opens_no_image(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        add_image(tmp_path / "images" / f"{number}.png", (64 + number, 64))
    cold = scan(dataset(), Index(tmp_path / "cache")).samples
    opened: set[str] = set()

    def watched(path: str | Path, *arguments: object) -> int:
        opened.add(Path(path).name)
        return original(path, *arguments)

    original: Callable[..., int] = os.open
    monkeypatch.setattr(os, "open", watched)
    warm = scan(dataset(), Index(tmp_path / "cache")).samples
    assert warm == cold
    assert {Path(name).suffix for name in opened} == {".txt", ".toml"}
    add_image(tmp_path / "images" / "3.png", (80, 64), seed=1)
    assert scan(dataset(), Index(tmp_path / "cache")).samples[3].image_size == (80, 64)
    assert {name for name in opened if name.endswith(".png")} == {"3.png"}


def test_an_edited_file_of_equal_size_is_noticed(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    path = add_image(tmp_path / "images" / "a.bmp")
    index = Index(tmp_path / "cache")
    before = scan(dataset(), index).samples[0]
    add_image(path, seed=1)
    os.utime(path)
    after = scan(dataset(), index).samples[0]
    assert (before.image_size, before.caption) == (after.image_size, after.caption)
    assert before.image_hash != after.image_hash
    assert before.recipe() != after.recipe()
    assert before.key != after.key


def test_the_key_of_a_sample_outlasts_captions_names_and_neighbours(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    path = add_image(tmp_path / "images" / "b.png")
    key = scan(dataset()).samples[0].key
    path.with_suffix(".txt").write_text("another caption")
    path.rename(path.with_name("c.png"))
    path.with_suffix(".txt").rename(path.with_name("c.txt"))
    add_image(tmp_path / "images" / "a.png")
    assert scan(dataset()).samples[1].key == key
    (tmp_path / "images" / "d.png").write_bytes((tmp_path / "images" / "c.png").read_bytes())
    (tmp_path / "images" / "d.txt").write_text("the same picture again")
    assert len({sample.key for sample in scan(dataset()).samples}) == 3


def test_everything_that_is_wrong_on_disk_is_one_error(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    images = tmp_path / "images"
    add_image(images / "no_caption.png", caption=None)
    add_image(images / "empty.png", caption=" \n")
    with pytest.raises(HyimgError) as told:
        scan(dataset())
    assert "has 2 problems" in told.value.message
    assert "there is no caption for `images/no_caption.png`; " in told.value.message
    assert "the ending `.txt` or `.caption`" in told.value.message
    assert "the caption file `images/empty.txt`: it is empty" in told.value.message
    with_class = dataset(subset_lines="class_tokens = 'cat'\ncaption_extension = '.md'")
    assert {sample.prompts for sample in scan(with_class).samples} == {("cat",)}


def test_a_broken_image_is_named_or_left_out_and_listed(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    images = tmp_path / "images"
    good, bad = add_image(images / "good.png"), add_image(images / "truncated.jpg", (256, 256))
    bad.write_bytes(bad.read_bytes()[:-2000])
    with pytest.raises(HyimgError, match=r"cannot read the image `.*truncated\.jpg`"):
        scan(dataset())
    left = scan(dataset(), on_bad_image="skip")
    assert [sample.image_path for sample in left.samples] == [good]
    assert [path for path, _ in left.skipped] == [bad]
    good.unlink()
    with pytest.raises(HyimgError, match="no image can be read from `images`"):
        scan(dataset(), on_bad_image="skip")


def test_a_folder_without_images_is_an_error_that_looks_one_deeper(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    add_image(tmp_path / "images" / "10_cats" / "a.png")
    with pytest.raises(HyimgError, match=r"no image in `images`.*`10_cats`.*`recursive = true`"):
        scan(dataset())


def test_links_that_lead_nowhere_and_odd_names_are_named(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    images = tmp_path / "images"
    add_image(images / "good.png")
    for name, target in (("circle", "circle.png"), ("lost", "nowhere.png")):
        (images / f"{name}.png").symlink_to(images / target)
        (images / f"{name}.txt").write_text("a cat")
        with pytest.raises(HyimgError, match=f"`.*{name}.png`"):
            scan(dataset())
        (images / f"{name}.png").unlink()


def test_masks_belong_to_recipes_and_must_have_the_images_shape(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    add_image(tmp_path / "images" / "a.png", (128, 64))
    mask = add_image(tmp_path / "masks" / "a.jpg", (64, 32), caption=None)
    lines = "conditioning_data_dir = 'masks'"
    first = scan(dataset(subset_lines=lines)).samples[0]
    assert first.mask_path == mask
    add_image(mask, (64, 32), caption=None, seed=1)
    second = scan(dataset(subset_lines=lines)).samples[0]
    assert first.recipe() != second.recipe()
    add_image(mask, (64, 64), caption=None)
    with pytest.raises(HyimgError, match="another aspect ratio"):
        scan(dataset(subset_lines=lines))
    mask.rename(tmp_path / "masks" / "b.jpg")
    with pytest.raises(HyimgError, match="there is no mask"):
        scan(dataset(subset_lines=lines))


def test_validation_holds_images_back_and_never_all_or_none(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    for number in range(10):
        add_image(tmp_path / "images" / f"{number}.png")
    found = scan(dataset(subset_lines="validation_split = 0.3\nnum_repeats = 4"))
    assert (len(found.samples), len(found.validation)) == (7, 3)
    assert not {s.key for s in found.samples} & {s.key for s in found.validation}
    assert {s.num_repeats for s in found.samples} == {4}
    assert {s.num_repeats for s in found.validation} == {1}
    other = scan(dataset(subset_lines="validation_split = 0.3\nvalidation_seed = 1"))
    assert [s.key for s in other.validation] != [s.key for s in found.validation]
    for split, told in ((0.01, "none to validate"), (0.99, "none to train")):
        with pytest.raises(HyimgError, match=told):
            scan(dataset(subset_lines=f"validation_split = {split}"))


def test_a_subset_may_be_for_validation_only_where_another_one_trains(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    for name in ("images/a.png", "held/b.png", "held/c.png"):
        add_image(tmp_path / name)
    train, held = {"image_dir": "images"}, {"image_dir": "held", "validation_split": 1.0}

    def load(*datasets: list[dict[str, object]]) -> DatasetFile:
        tables = [{"resolution": 64, "subsets": subsets} for subsets in datasets]
        return parse_dataset({"datasets": tables}, tmp_path / "set.toml")

    for document in (load([train, held]), load([train], [held])):  # within a dataset, and a dataset by itself
        found = scan(document)
        assert [sample.image_path.name for sample in found.samples] == ["a.png"]
        assert [sample.image_path.name for sample in found.validation] == ["b.png", "c.png"]
        assert found.warnings == []
    with pytest.raises(HyimgError, match=r"no image to train on: `validation_split = 1`"):
        scan(load([held]))


@pytest.mark.parametrize(("num_regular", "repeats"), [(1, [8]), (3, [3, 3, 2]), (8, [1] * 8), (11, [1] * 8)])
def test_regularisation_images_are_as_many_as_the_others(
    tmp_path: Path, add_image: AddImage, num_regular: int, repeats: list[int]
) -> None:
    for number in range(4):
        add_image(tmp_path / "images" / f"{number}.png")
    for number in range(num_regular):
        add_image(tmp_path / "class" / f"{number:02}.png", seed=1)
    subsets = [
        {"image_dir": str(tmp_path / "images"), "num_repeats": 2},
        {"image_dir": str(tmp_path / "class"), "is_reg": True},
    ]
    document = {"datasets": [{"resolution": 64, "prior_loss_weight": 0.5, "subsets": subsets}]}
    found = scan(parse_dataset(document, tmp_path / "set.toml"))
    regular = [sample for sample in found.samples if sample.subset.is_reg]
    assert [sample.num_repeats for sample in regular] == repeats
    assert {sample.weight for sample in regular} == {0.5}
    assert any("not used" in note for note in found.notes) == (num_regular > 8)


def test_what_a_sample_shows_follows_from_its_key_and_turn(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    add_image(tmp_path / "images" / "a.png", caption="a, b, c, d")
    add_image(tmp_path / "images" / "b.png", caption="e, f, g, h")
    lines = "shuffle_caption = true\ncaption_dropout_rate = 0.25\nflip_aug = true"
    sample, other = scan(dataset(subset_lines=lines)).samples
    shown = [choose(sample, seed=1, epoch=epoch, repeat=0) for epoch in range(1, 401)]
    assert shown == [choose(sample, seed=1, epoch=epoch, repeat=0) for epoch in range(1, 401)]
    assert shown != [choose(sample, seed=2, epoch=epoch, repeat=0) for epoch in range(1, 401)]
    assert shown != [choose(sample, seed=1, epoch=epoch, repeat=1) for epoch in range(1, 401)]
    flips = [flipped for _, flipped in shown]
    assert flips != [choose(other, seed=1, epoch=epoch, repeat=0)[1] for epoch in range(1, 401)]
    # 400 draws: four standard deviations
    assert abs(sum(flips) - 200) < 40
    assert abs(sum(prompt == "" for prompt, _ in shown) - 100) < 35
    assert {prompt for prompt, _ in shown} == {"", *sample.prompts}


def test_every_nth_epoch_may_have_no_captions(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    add_image(tmp_path / "images" / "a.png")
    (sample,) = scan(dataset(subset_lines="caption_dropout_every_n_epochs = 2")).samples
    prompts = [choose(sample, seed=0, epoch=epoch, repeat=0)[0] for epoch in range(5)]
    assert prompts == ["", "a cat", "", "a cat", ""]  # golden captions.json: epochs 0, 1 and 4


def test_an_epoch_shows_every_image_its_times_and_mixes_no_buckets(
    tmp_path: Path, add_image: AddImage
) -> None:
    for number in range(7):
        add_image(tmp_path / "images" / f"{number}.png", (64, 128) if number % 2 else (128, 64))
    subset = {"image_dir": str(tmp_path / "images"), "num_repeats": 3}
    table = {"resolution": 96, "enable_bucket": True, "batch_size": 4, "subsets": [subset]}
    document = {"datasets": [table, {**table, "batch_size": 2}]}
    samples = scan(parse_dataset(document, tmp_path / "set.toml")).samples
    assert {sample.bucket for sample in samples} == {(64, 128), (128, 64)}
    batches = epoch_batches(samples, seed=3, epoch=1)
    turns = Counter(turn for batch in batches for turn in zip(batch.samples, batch.repeats, strict=True))
    assert turns == Counter((place, repeat) for place in range(14) for repeat in range(3))
    for batch in batches:
        shown = [samples[place] for place in batch.samples]
        assert {(sample.bucket, sample.dataset_index) for sample in shown} == {
            (batch.bucket, shown[0].dataset_index)
        }
        assert len(batch) <= shown[0].batch_size
    # 4 landscape and 3 portrait images three times: 12 and 9 turns, in batches of 4 and of 2
    assert sorted(len(batch) for batch in batches) == [1, 1] + [2] * 10 + [4] * 5
    shares = [batch for rank in range(2) for batch in batches[rank::2]]
    assert Counter(shares) == Counter(batches)


def test_the_order_is_a_function_of_seed_and_epoch(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    for number in range(8):
        add_image(tmp_path / "images" / f"{number}.png")
    samples = scan(dataset()).samples
    first = epoch_batches(samples, seed=1, epoch=1)
    assert first == epoch_batches(samples, seed=1, epoch=1)
    assert first != epoch_batches(samples, seed=1, epoch=2)
    assert first != epoch_batches(samples, seed=2, epoch=1)
    in_fours = scan(dataset("resolution = 64\nbatch_size = 4")).samples
    together = {
        frozenset(frozenset(batch.samples) for batch in epoch_batches(in_fours, seed=1, epoch=epoch))
        for epoch in range(5)
    }
    assert len(together) > 1  # other images meet in a batch, not only the batches another order
    in_order = epoch_batches(samples, seed=1, epoch=1, shuffle=False)
    assert [batch.samples for batch in in_order] == [(place,) for place in range(8)]


def test_the_same_folder_with_other_masks_is_another_subset(tmp_path: Path, add_image: AddImage) -> None:
    for folder in ("images", "masks", "other"):
        add_image(tmp_path / folder / "a.png", seed=len(folder))
    subsets = [
        {"image_dir": "images", "conditioning_data_dir": masks} for masks in ("masks", "masks", "other")
    ]
    document = {"datasets": [{"resolution": 64, "subsets": subsets}]}
    found = scan(parse_dataset(document, tmp_path / "set.toml"))
    assert [s.mask_path.parent.name for s in found.samples if s.mask_path] == ["masks", "other"]
    assert any("there twice" in note for note in found.notes)


def test_a_decompression_bomb_is_reported_by_name(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    add_image(tmp_path / "images" / "a.png")
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
    (tmp_path / "images" / "炸弹.png").write_bytes(bomb + chunk(b"IEND", b""))
    (tmp_path / "images" / "炸弹.txt").write_text("x")
    with pytest.raises(HyimgError, match="炸弹.png`: too many pixels"):
        scan(dataset())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are always text")
def test_names_that_are_not_utf8_are_read_and_remembered(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset
) -> None:
    # "我的" in GBK, as an old archive unpacks it
    path = tmp_path / "images" / os.fsdecode(b"\xce\xd2\xb5\xc4.png")
    os.rename(add_image(tmp_path / "images" / "a.png", caption=None), path)
    path.with_suffix(".txt").write_text("我的", encoding="utf-8")
    index = Index(tmp_path / "cache")
    (sample,) = scan(dataset(), index).samples
    assert (sample.image_path, sample.caption) == (path, "我的")
    path.write_bytes(path.read_bytes())  # another time of change: read again
    assert scan(dataset(), index).samples == [sample]

"""`hyimg dataset` and `--dry_run`: the report agrees with what the other commands then do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from hyimg.checkpoints import safetensors_file
from hyimg.data.dataset_file import load_dataset_file
from hyimg.data.samples import epoch_batches
from hyimg.data.scan import scan
from hyimg.encoders import tokenizer
from hyimg.training.steps import Schedule

MODELS = ["--vae", "{vae}", "--text_encoder", "{text_encoder}", "--byt5", "{byt5}"]


@pytest.fixture
def told(hyimg, model):
    """The report of a dataset as JSON; tokens are the tiny model's, whose tokenizer is read at once."""

    def call(*arguments, tokenizer=model.directory):
        named = [] if tokenizer is None else ["--tokenizer", tokenizer]
        code, out, err = hyimg("dataset", *arguments, *named, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


@pytest.fixture
def captioned(tmp_path):
    """Writes one small image a caption, none like another, and a dataset file over them."""

    def write(captions, lines="", folder="图像 一"):
        images = tmp_path / folder
        images.mkdir()
        for number, (name, caption) in enumerate(captions.items()):
            noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(noise).save(images / f"{name}.png")
            (images / f"{name}.txt").write_text(caption, encoding="utf-8")
        path = tmp_path / "set.toml"
        text = f"[[datasets]]\nresolution = 32\n[[datasets.subsets]]\nimage_dir = '{folder}'\n{lines}\n"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_the_report_counts_what_training_will_do(told, own_dataset):
    text = own_dataset.read_text(encoding="utf-8").replace("num_repeats = 1", "num_repeats = 3")
    own_dataset.write_text(text, encoding="utf-8")
    report = told(own_dataset, "--gradient_accumulation_steps", 4)
    samples = scan(load_dataset_file(own_dataset)).samples
    schedule = Schedule.plan(
        lambda epoch: epoch_batches(samples, seed=5, epoch=epoch),
        accumulation=4,
        max_train_steps=None,
        max_train_epochs=1,
    )
    epoch = report["epoch"]
    assert (epoch["turns"], epoch["batches"], epoch["steps"]) == (
        15,
        schedule.batches_per_epoch,
        schedule.max_steps,
    )
    rows = {tuple(row["size"]): row for row in report["buckets"]}
    assert {size: row["images"] for size, row in rows.items()} == {
        size: sum(sample.bucket == size for sample in samples) for size in {s.bucket for s in samples}
    }
    assert all(row["tokens"] == row["size"][0] * row["size"][1] // 1024 for row in rows.values())
    # 160x120 is to cover 128x128; the other images are larger than their buckets
    assert [os.path.basename(path) for path in report["images"]["upscaled"]] == ["0.png"]
    assert epoch["cost"] == pytest.approx(sum(r["turns"] * r["cost"] for r in rows.values()), abs=0.01)
    assert any("five native ones" in note for note in report["notes"])


def test_the_native_sizes_are_those_of_the_models_own_vae(told, own_dataset, model):
    assert not any("five native ones" in note for note in told(own_dataset, "--vae", model.vae)["notes"])


def test_the_batch_size_of_the_command_line_counts(told, own_dataset):
    text = own_dataset.read_text(encoding="utf-8").replace("batch_size = 2", "")
    own_dataset.write_text(text, encoding="utf-8")
    assert told(own_dataset)["epoch"]["batches"] == 5
    assert told(own_dataset, "--train_batch_size", 2)["epoch"]["batches"] == 4


def test_long_images_that_max_bucket_reso_makes_small_are_noted(told, captioned, tmp_path):
    path = captioned({"a": "x", "b": "y"})
    Image.new("RGB", (1200, 400)).save(tmp_path / "图像 一" / "a.png")
    text = path.read_text(encoding="utf-8")
    buckets = "resolution = 128\nenable_bucket = true\nmax_bucket_reso = "
    path.write_text(text.replace("resolution = 32", buckets + "128"), encoding="utf-8")
    noted = [note for note in told("--dataset_config", path)["notes"] if "`max_bucket_reso`" in note]
    assert len(noted) == 1
    assert noted[0].startswith("dataset 1: 1 images are trained at less than 75% of")
    path.write_text(text.replace("resolution = 32", buckets + "512"), encoding="utf-8")
    assert not any("`max_bucket_reso`" in note for note in told(path)["notes"])


def test_the_disk_that_is_foretold_is_the_disk_that_is_taken(told, hyimg, own_dataset):
    before = told(own_dataset, *MODELS)
    shutil.rmtree(own_dataset.parent / "hyimg-cache")
    after = told(own_dataset, *MODELS)
    for kind, entries in (("latents", 5), ("text", 6)):
        (full,), (empty,) = before[kind]["stores"], after[kind]["stores"]
        assert (full["cached"], full["missing"], full["bytes_missing"]) == (entries, 0, 0)
        assert (empty["cached"], empty["missing"], empty["bytes_cached"]) == (0, entries, 0)
        assert full["identity"] == empty["identity"]
        # the digits of offsets in the headers are not foretold
        assert abs(full["bytes_cached"] - empty["bytes_missing"]) < 100 * entries
    assert told(own_dataset)["latents"]["stores"][0]["identity"] is None


def test_what_is_cached_is_told_for_each_model(told, hyimg, own_dataset, tmp_path, model):
    entry = next((own_dataset.parent / "hyimg-cache" / "latents").rglob("*/*.safetensors"))
    entry.unlink()
    (own,) = told(own_dataset)["latents"]["stores"]
    assert (own["cached"], own["missing"], own["named"]) == (4, 1, False)
    other = tmp_path / "other.safetensors"
    data = bytearray(model.vae.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    (new,) = told(own_dataset, "--vae", other)["latents"]["stores"]
    assert (new["cached"], new["missing"], new["named"]) == (0, 5, True)
    assert hyimg("cache-latents", "--dataset_config", own_dataset, "--vae", other)[0] == 0
    stores = {store["identity"]: store["cached"] for store in told(own_dataset)["latents"]["stores"]}
    assert stores == {own["identity"]: 4, new["identity"]: 5}
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("another picture --n blurred\n", encoding="utf-8")
    text = told(own_dataset, "--sample_prompts", prompts)["text"]
    assert (text["entries"], text["stores"][0]["missing"]) == (8, 2)


def test_a_dry_run_prints_the_report_and_does_nothing(hyimg, own_dataset, tmp_path, monkeypatch):
    def read(self, name, device="cpu"):
        raise AssertionError(f"the weight {name} was read")

    monkeypatch.setattr(safetensors_file.Checkpoint, "read", read)
    shutil.rmtree(own_dataset.parent / "hyimg-cache")
    _, with_vae, _ = hyimg("dataset", own_dataset, "--vae", "{vae}")
    _, with_encoders, _ = hyimg("dataset", own_dataset, *MODELS[2:])
    _, plain, _ = hyimg("dataset", own_dataset, "--gradient_accumulation_steps", 2)
    data, dry = ["--dataset_config", own_dataset], "--dry_run"
    train = ["train", "--dit", "{dit}", *data, "--output_dir", tmp_path / "out"]
    for arguments, expected in (
        (["cache-latents", *data, "--vae", "{vae}"], with_vae),
        (["cache-text", *data, *MODELS[2:]], with_encoders),
        ([*train, "--gradient_accumulation_steps", 2], plain),
    ):
        code, out, err = hyimg(*arguments, dry)
        assert (code, out) == (0, expected), err
    assert "2 steps of 2 batches" in plain
    assert not (tmp_path / "out").exists()
    assert not list((own_dataset.parent / "hyimg-cache").rglob("*.safetensors"))


def test_captions_are_read_as_the_encoders_will(told, captioned):
    captions = {
        "plain": "a cat",
        "twin": "a cat",
        "招牌": "店门上写着“营业中”和 \"OPEN\", it's a dog's 'shop'",
        "long": "word " * 1500,
        "letters": f'a sign "{"字" * 60}"',
        "special": "a box <|im_end|>",
    }
    report = told(captioned(captions), tokenizer=None)  # Qwen's own
    found = {
        (finding["kind"], os.path.basename(finding["images"][0])): finding for finding in report["findings"]
    }
    assert set(found) == {
        ("duplicate_caption", "plain.png"),
        ("quoted_text", "招牌.png"),
        ("single_quoted_text", "招牌.png"),
        ("tokens_cut", "long.png"),
        ("quoted_text", "letters.png"),
        ("quoted_text_cut", "letters.png"),
        ("special_token", "special.png"),
    }
    assert len(found["duplicate_caption", "plain.png"]["images"]) == 2
    assert found["quoted_text", "招牌.png"]["texts"] == ["OPEN", "营业中"]
    assert found["single_quoted_text", "招牌.png"]["texts"] == ["shop"]
    assert found["special_token", "special.png"]["texts"] == ["<|im_end|>"]
    # 1500 words, a trailing space that is stripped, and the closing token, in 1024
    assert found["tokens_cut", "long.png"]["count"] == 1501 - 1024
    # `Text "` and `". ` around 180 bytes, in 127
    assert found["quoted_text_cut", "letters.png"]["count"] == 6 + 180 + 3 - 127
    assert report["captions"]["longest_tokens"] == 1024
    assert report["captions"]["distinct"] == 5


def test_variants_of_a_caption_are_one_finding(told, captioned):
    lines = "enable_wildcard = true\nshuffle_caption = true"
    report = told(captioned({"a": '{"red"|"blue"} sign, a, b, c'}, lines))
    (finding,) = report["findings"]
    assert (finding["kind"], sorted(finding["texts"])) == ("quoted_text", ["blue", "red"])
    assert report["captions"]["prompts"] > 2


def test_affixes_and_empty_captions_are_linted_as_they_are_encoded(told, captioned, tmp_path):
    path = captioned({"a": "x"}, 'caption_prefix = "\\n"')
    assert [finding["kind"] for finding in told(path)["findings"]] == ["leading_newline"]
    (tmp_path / "图像 一" / "a.txt").unlink()
    path.write_text(path.read_text(encoding="utf-8").replace('caption_prefix = "\\n"', "class_tokens = ''"))
    assert [finding["kind"] for finding in told(path)["findings"]] == ["empty_caption"]


def test_equal_images_are_found_within_a_dataset_only(told, captioned, tmp_path):
    path = captioned({"a": "x", "b": "y"})
    folder = tmp_path / "图像 一"
    shutil.copyfile(folder / "a.png", folder / "c.png")
    (folder / "c.txt").write_text("z")
    second = path.read_text(encoding="utf-8").replace("resolution = 32", "resolution = 64")
    path.write_text(path.read_text(encoding="utf-8") + second, encoding="utf-8")
    (finding,) = told(path)["findings"]
    assert finding["kind"] == "duplicate_image"
    assert [os.path.basename(name) for name in finding["images"]] == ["a.png", "c.png"]


def test_without_a_tokenizer_tokens_are_not_counted_and_it_says_so(told, hyimg, captioned, monkeypatch):
    monkeypatch.setattr(tokenizer, "_in_dashscope", lambda: None)
    asked = []

    def ask_hub(*names, local_files_only):
        asked.append(local_files_only)
        raise OSError("not in the cache")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", ask_hub)
    path = captioned({"a": 'a sign "OPEN"'})
    report = told(path, tokenizer=None)
    assert asked == [True]  # nothing is downloaded
    assert report["captions"]["longest_tokens"] is None
    assert "no Qwen tokenizer" in report["captions"]["not_counted"]
    assert "give `--tokenizer FOLDER`" in report["captions"]["not_counted"]
    assert report["text"]["stores"][0]["bytes_missing"] is None
    assert [finding["kind"] for finding in report["findings"]] == ["quoted_text"]
    _, out, _ = hyimg("dataset", path)
    assert "tokens not counted: no Qwen tokenizer" in out
    assert hyimg("dataset", path, "--tokenizer", path.parent / "nowhere")[0] == 2


def test_every_command_reports_what_is_skipped_in_the_same_words(told, hyimg, fill, own_dataset, tmp_path):
    images = own_dataset.parent / "images"
    (images / "sub").mkdir()
    for number in range(7):
        shutil.copyfile(images / "0.png", images / "sub" / f"{number}.png")
    (images / "lost.txt").write_text("whose?")
    (images / "4.txt").write_text("a cat\n\nIt sleeps.", encoding="utf-8")
    report = told(own_dataset)
    kinds = [finding["kind"] for finding in report["findings"]]
    assert (kinds.count("image_in_subfolder"), kinds.count("caption_without_image")) == (7, 1)
    lines = [
        "(7): `images/sub/0.png`, `images/sub/1.png`, `images/sub/2.png` and 4 more",
        "caption file without an image (1): `images/lost.txt`",
        "(1): `images/4.png` (1 line cut)",
        "crop (1): `images/0.png` (25%)",
    ]
    train = ["train", "--dit", "{dit}", "--dataset_config", own_dataset, "--output_dir", tmp_path / "out"]
    commands = (fill("latents", own_dataset), fill("text", own_dataset), [*train, "--max_train_steps", 1])
    for command in commands:
        code, _, err = hyimg(*command)
        assert code == 0, err
        warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
        assert [sum(end in line for line in warnings) for end in lines] == [1] * len(lines), err
    _, out, _ = hyimg("dataset", own_dataset)
    shown = out[out.index("skipped or assumed") :]
    assert "images/sub/4.png\n  and 2 more (`--json` lists all)" in shown
    assert "images/4.png (1 line cut)" in shown


def test_editing_any_line_of_a_whole_caption_encodes_it_again(told, hyimg, fill, own_dataset):
    text = own_dataset.read_text(encoding="utf-8")
    own_dataset.write_text(text.replace("num_repeats = 1", "multiline_caption = true"), encoding="utf-8")
    assert told(own_dataset)["text"]["stores"][0]["missing"] == 0  # captions of one line are as they were
    caption = own_dataset.parent / "images" / "4.txt"
    for paragraph in ("It sleeps.", "It is awake."):
        caption.write_text(f"a cat\n\n{paragraph}\n", encoding="utf-8")
        assert told(own_dataset)["text"]["stores"][0]["missing"] == 1
        code, _, err = hyimg(*fill("text", own_dataset))
        assert (code, "1 prompt made" in err) == (0, True), err
    assert not any(finding["kind"] == "caption_lines_dropped" for finding in told(own_dataset)["findings"])


def test_images_that_are_left_out_are_listed(told, hyimg, captioned, tmp_path):
    path = captioned({"a": "x", "b": "y"})
    (tmp_path / "图像 一" / "b.png").write_bytes(b"no picture")
    code, out, err = hyimg("dataset", path)
    assert (code, out) == (2, "")
    assert "b.png" in err
    (left_out,) = told(path, "--on_bad_image", "skip")["images"]["unreadable"]
    assert os.path.basename(left_out["path"]) == "b.png"
    assert left_out["reason"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("validation_split = 0.2", "leaves none to validate"),
        ("validation_split = 0.9", "leaves none to train"),
        ("num_repeats = 0", "there is no image to train on"),
    ],
)
def test_empty_training_or_validation_is_an_error(hyimg, captioned, lines, words):
    code, out, err = hyimg("dataset", captioned({"a": "x", "b": "y"}, lines))
    assert (code, out) == (2, "")
    assert words in err


def test_the_report_needs_no_torch_fits_80_columns_and_any_encoding(captioned):
    path = captioned({"猫": "一只猫“喵”", "b": "y", "c": "z"}, "validation_split = 0.4\nnum_repeats = 20000")
    path.write_text(path.read_text(encoding="utf-8") * 2, encoding="utf-8")  # a second dataset: more columns
    code = (
        "import sys\nfrom hyimg.cli.app import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    assert 'torch' not in sys.modules, 'torch was imported'"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", code, "dataset", str(path), "--contact_sheet", str(path.with_suffix(".png"))],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("dataset  size"))
    assert lines[start].split() == (
        "dataset size images valid. an epoch batches upscaled tokens cost".split()
    )
    assert lines[start + 1].split()[:2] == ["1", "32x32"]
    assert max(map(len, lines[start : start + 3])) <= 80
    assert "\\u732b" in done.stdout
    assert path.with_suffix(".png").is_file()


def test_the_contact_sheet_shows_the_crops(hyimg, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    picture = Image.new("RGB", (192, 64), "red")
    picture.paste("lime", (64, 0, 128, 64))  # what a square crop keeps
    picture.save(images / "龙.png")
    for number in range(8):
        Image.new("RGB", (64, 64), (0, 0, 255 - number)).save(images / f"甲{number}.png")
    path = tmp_path / "set.toml"
    path.write_text(
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'images'\nclass_tokens = 'x'\n"
    )
    code, _, err = hyimg("dataset", path, "--contact_sheet", tmp_path / "sheet.png")
    assert code == 0, err
    with Image.open(tmp_path / "sheet.png") as sheet:
        colours = [colour for _, colour in sheet.convert("RGB").getcolors(1 << 20)]
        blue = [colour for colour in colours if colour[2] > 200 and colour[:2] == (0, 0)]
        count = {colour: number for number, colour in sheet.convert("RGB").getcolors(1 << 20)}
    assert (255, 0, 0) not in colours
    assert len(blue) == 5  # of six tiles of the one bucket
    assert count[0, 255, 0] == 64 * 64  # the picture that loses most is among them
    assert all(count[colour] == 64 * 64 for colour in blue)
    code, _, err = hyimg("dataset", path, "--contact_sheet", tmp_path / "sheet.jpg")
    assert code == 2
    assert "`sheet.jpg`" in err
    assert not (tmp_path / "sheet.jpg").exists()

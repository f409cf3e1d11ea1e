"""Precision as a user meets it: what `auto` chooses is said and recorded, and cached texts are used or made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tomli
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from hyimg.cache.prompt_embeddings import TextStore
from hyimg.memory import precision

SHORT = "--max_train_steps 1 --seed 3 --save_precision float".split()
SMALL = "--image_size 32 64 --infer_steps 1 --guidance_scale 1 --seed 3".split()


@pytest.fixture
def cpu_has_bf16(monkeypatch):
    """Pretends a processor with or without instructions for bfloat16."""

    def pretend(answer: bool) -> None:
        monkeypatch.setattr(precision, "_cpu_multiplies_bf16", lambda: answer)
        monkeypatch.setattr(precision, "slowdown", lambda dtype: 35.2)

    return pretend


@pytest.fixture
def train(hyimg, tmp_path):
    """Trains two steps into a folder of that name; gives the run folder and what was said."""

    def call(name: str, dataset: Path, *extra: object, code: int = 0) -> tuple[Path, str]:
        folder = tmp_path / name
        given = [
            "train",
            "--dit",
            "{dit}",
            "--dataset_config",
            dataset,
            "--output_dir",
            folder,
            *SHORT,
            *extra,
        ]
        found, _, err = hyimg(*given, "--device", "cpu")
        assert found == code, err
        return folder, err

    return call


@pytest.fixture
def texts(own_dataset):
    """The number of entries in the text cache by their type."""

    def count() -> dict[str, int]:
        folder = own_dataset.parent / "hyimg-cache" / "text"
        found = dict.fromkeys(TextStore.dtypes(folder).values(), 0)
        for identity, dtype in TextStore.dtypes(folder).items():
            found[dtype] += len(TextStore(folder, identity).listing())
        return found

    return count


def run_file(folder: Path) -> tuple[str, dict[str, object]]:
    text = (folder / "lora.run.toml").read_text(encoding="utf-8")
    return text.splitlines()[1], tomli.loads(text)


@pytest.mark.parametrize(("has_bf16", "name", "dtype"), [(True, "bf16", "bf16"), (False, "no", "float32")])
def test_a_run_computes_in_what_the_processor_is_fast_at_and_says_so_everywhere(
    train, cached_dataset, cpu_has_bf16, has_bf16, name, dtype
):
    cpu_has_bf16(has_bf16)
    folder, err = train("auto", cached_dataset)
    (line,) = [line for line in err.splitlines() if line.startswith("precision: ")]
    assert line.startswith(f"precision: DiT {dtype}, adapters float32, cached texts ")
    assert line.endswith("(`--mixed_precision auto`)")
    assert "slower" not in err
    comment, options = run_file(folder)
    assert comment == f"# {line}"
    assert options["mixed_precision"] == name
    with safe_open(folder / "lora.safetensors", "pt") as file:
        assert file.metadata()["ss_mixed_precision"] == name
    asked, _ = train("asked", cached_dataset, "--mixed_precision", name)
    one, other = (load_file(path / "lora.safetensors") for path in (folder, asked))
    assert all(one[key].equal(other[key]) for key in one), "what auto chooses is what it is called"


def test_what_is_slow_here_is_done_where_it_is_asked_for_with_the_measured_ratio(
    train, cached_dataset, cpu_has_bf16
):
    cpu_has_bf16(False)
    folder, err = train("asked", cached_dataset, "--mixed_precision", "bf16")
    assert "this CPU is about 35 times slower in bf16 than in float32 (measured)" in err
    assert run_file(folder)[1]["mixed_precision"] == "bf16"
    _, err = train("full", cached_dataset, "--full_bf16")
    assert "precision: DiT bf16, adapters bf16" in err, "adapters of bf16 are a word on the precision"


def test_a_resumed_run_keeps_the_precision_that_it_began_with(train, cached_dataset, cpu_has_bf16, hyimg):
    cpu_has_bf16(False)
    whole, _ = train("whole", cached_dataset, "--max_train_steps", "2")
    folder, _ = train(
        "run", cached_dataset, "--max_train_steps", "2", "--save_state", "--save_every_n_steps", "1"
    )
    cpu_has_bf16(True)
    state = folder / "lora-step00000001-state"
    resumed, err = train("on", cached_dataset, "--max_train_steps", "2", "--resume", state)
    assert "resumed with `--mixed_precision no`, as the run started (`auto` would choose `bf16` here)" in err
    one, other = (load_file(path / "lora.safetensors") for path in (whole, resumed))
    assert all(one[key].equal(other[key]) for key in one)
    _, err = train(
        "no", cached_dataset, "--max_train_steps", "2", "--resume", state, "--mixed_precision", "bf16", code=2
    )
    assert "`--mixed_precision`: no then, bf16 now" in err


def test_cached_texts_of_any_type_serve_auto_and_an_explicit_type_has_its_own(
    hyimg, fill, train, texts, own_dataset, cpu_has_bf16
):
    cache = own_dataset.parent / "hyimg-cache" / "text"
    shutil.rmtree(cache)
    cpu_has_bf16(True)
    code, _, err = hyimg(*fill("text", own_dataset))
    assert code == 0, err
    assert "precision: text encoder bf16, byT5 float32 (`--mixed_precision auto`)" in err
    number = texts()["bf16"]
    assert texts() == {"bf16": number}
    cpu_has_bf16(False)
    code, _, err = hyimg(*fill("text", own_dataset))
    assert f"all {number} prompts are cached in {cache}, in bf16" in err, "made elsewhere, good here"
    _, err = train("any", own_dataset, "--mixed_precision", "no")
    assert "precision: DiT float32, adapters float32, cached texts bf16" in err
    _, err = train("only", own_dataset, "--text_encoder_dtype", "fp32", code=2)
    assert f"the text cache `{cache}` has entries in bf16, but `--text_encoder_dtype` is fp32" in err
    assert "--text_encoder_dtype fp32` with `--text_encoder`" in err
    code, _, err = hyimg(*fill("text", own_dataset), "--mixed_precision", "no")
    assert code == 0, err
    assert texts() == {"bf16": number, "fp32": number}, "float32 where float32 is asked for, the others kept"
    files = ["--text_encoder", "{text_encoder}", "--byt5", "{byt5}"]
    for has_bf16, own, name, given in ((False, "fp32", "float32", []), (True, "bf16", "bf16", files)):
        cpu_has_bf16(has_bf16)
        folder, err = train(f"own-{own}", own_dataset, *given)
        assert f"cached texts {name}" in err, "its own of the two"
        assert run_file(folder)[1]["text_encoder_dtype"] == own
    _, err = train("asked", own_dataset, *files, "--text_encoder_dtype", "fp32")
    assert "cached texts float32" in err


def test_entries_from_before_stores_said_their_type_are_bf16_ones(
    hyimg, fill, train, texts, own_dataset, cpu_has_bf16
):
    cpu_has_bf16(True)
    cache = own_dataset.parent / "hyimg-cache" / "text"
    shutil.rmtree(cache)
    assert hyimg(*fill("text", own_dataset))[0] == 0
    number = texts()["bf16"]
    (about,) = cache.glob("*/model.json")
    whole = json.loads(about.read_text())
    about.write_text(json.dumps({key: whole[key] for key in ("identity", "kind")}))
    cpu_has_bf16(False)
    assert texts() == {"bf16": number}
    err = hyimg(*fill("text", own_dataset), "--text_encoder_dtype", "bf16")[2]
    assert f"all {number} prompts are cached" in err
    assert hyimg(*fill("text", own_dataset), "--text_encoder_dtype", "fp32")[0] == 0
    _, err = train("either", own_dataset)
    assert "cached texts float32" in err, "and not: entries of 2 models"


def test_a_few_missing_texts_are_added_to_those_that_are_there(hyimg, fill, texts, own_dataset, cpu_has_bf16):
    shutil.rmtree(own_dataset.parent / "hyimg-cache" / "text")
    cpu_has_bf16(False)
    assert hyimg(*fill("text", own_dataset))[0] == 0
    number = texts()["fp32"]
    (own_dataset.parent / "images" / "0.txt").write_text("a new caption")
    cpu_has_bf16(True)
    code, _, err = hyimg(*fill("text", own_dataset))
    assert code == 0, err
    assert "text encoder float32" in err
    assert "text: 1 prompt made" in err
    assert texts() == {"fp32": number + 1}


def test_the_dataset_report_counts_entries_of_the_type_that_training_takes(
    hyimg, fill, own_dataset, cpu_has_bf16
):
    shutil.rmtree(own_dataset.parent / "hyimg-cache" / "text")
    cpu_has_bf16(True)
    assert hyimg(*fill("text", own_dataset))[0] == 0
    cpu_has_bf16(False)

    def missing(*extra: str) -> int:
        files = ["--text_encoder", "{text_encoder}", "--byt5", "{byt5}", "--json", *extra]
        code, out, err = hyimg("dataset", own_dataset, *files)
        assert code == 0, err
        (store,) = json.loads(out)["text"]["stores"]
        return int(store["missing"])

    assert missing() == 0
    assert missing("--text_encoder_dtype", "fp32") > 0


def test_a_picture_records_what_was_chosen_and_is_repeated_with_that(hyimg, tmp_path, cpu_has_bf16):
    cpu_has_bf16(False)
    files = ["--dit", "{dit}", "--vae", "{vae}", "--text_encoder", "{text_encoder}", "--byt5", "{byt5}"]

    def infer(name: str, *extra: object) -> tuple[dict[str, object], bytes, str]:
        path = tmp_path / f"{name}.png"
        code, _, err = hyimg("infer", *files, "--save_path", path, "--device", "cpu", *extra)
        assert code == 0, err
        with Image.open(path) as image:
            return json.loads(image.info["hyimg"]), image.tobytes(), err

    settings, pixels, err = infer("first", "--prompt", "a cat", *SMALL)
    line = (
        "precision: DiT float32, text encoder float32, byT5 float32, VAE float32 (`--mixed_precision auto`)"
    )
    assert line in err
    assert (settings["mixed_precision"], settings["text_encoder_dtype"]) == ("no", "fp32")
    cpu_has_bf16(True)
    assert infer("again", "--from_image", tmp_path / "first.png")[:2] == (settings, pixels)
    other, _, err = infer("other", "--prompt", "a cat", *SMALL)
    assert "precision: DiT bf16, text encoder bf16" in err
    assert (other["mixed_precision"], other["text_encoder_dtype"]) == ("bf16", "bf16")


def test_a_sheet_says_why_it_is_rendered_again_where_auto_chooses_otherwise(
    hyimg, tmp_path, own_dataset, fill, cpu_has_bf16
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --d 1")
    cache = own_dataset.parent / "hyimg-cache"
    shutil.rmtree(cache / "text")
    cpu_has_bf16(True)
    assert hyimg(*fill("text", own_dataset), "--sample_prompts", prompts)[0] == 0
    sample = ["sample", "--dit", "{dit}", "--vae", "{vae}", "--sample_prompts", prompts, "--device", "cpu"]
    sample += ["--output_dir", tmp_path / "sheet", "--cache_dir", cache, *SMALL]
    code, _, err = hyimg(*sample)
    assert code == 0, err
    assert "precision: DiT bf16, VAE float32, cached texts bf16" in err
    assert "1 image kept" in hyimg(*sample)[2]
    cpu_has_bf16(False)
    err = hyimg(*sample)[2]
    assert "rendered again: 001-base.png, made with other `mixed_precision`" in err
    assert "text_encoder_dtype" not in err, "the cached texts are those that they were"


def test_a_loss_that_is_not_finite_in_fp16_names_the_way_out(train, cached_dataset, tmp_path):
    plugin = tmp_path / "bad.py"
    plugin.write_text(
        "from hyimg.hookspecs import hookimpl\n"
        "def bad(prediction, target, context):\n"
        "    return (prediction - target).square().mean((1, 2, 3)) * float('nan')\n"
        "@hookimpl\ndef hyimg_losses():\n    return {'bad': bad}\n"
    )
    for name, expected in (("fp16", True), ("bf16", False)):
        given = ["--mixed_precision", name, "--plugin", plugin, "--loss_type", "bad"]
        _, err = train(name, cached_dataset, *given, code=1)
        assert ("overflowed in fp16: use `--mixed_precision bf16` or `no`" in err) is expected


def test_float16_for_the_text_encoder_is_refused_with_the_reason(hyimg, own_dataset, fill):
    code, _, err = hyimg(*fill("text", own_dataset), "--text_encoder_dtype", "fp16")
    assert code == 2
    assert "the hidden states of Qwen2.5-VL overflow in float16" in err

"""Both encoders together, their identity, and the tiny files that stand in for the real ones."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

from hyimg.encoders import text as text_module
from hyimg.encoders.text import TextEncoders, encode_prompts
from hyimg.encoders.tiny import make_tiny_byt5, make_tiny_qwen, train_tiny_tokenizer
from hyimg.encoders.tokenizer import load_qwen_tokenizer
from hyimg.errors import HyimgError
from hyimg.report import SilentReporter

PROMPTS = ['a sign "OPEN"', "a red fox", "", 'two signs: "A" and “B”', "snow " * 2000, f'"{"x" * 200}"']


def _open(models, **options):
    options = {"dtype": torch.float32, **options}
    return TextEncoders.open(models / "qwen.safetensors", models / "byt5.safetensors", **options)


def test_a_prompt_becomes_text_states_and_glyph_states_where_it_quotes(models):
    encoders = _open(models)
    encoded = encoders.encode(PROMPTS)
    assert [text.byt5_SE is not None for text in encoded] == [True, False, False, True, False, True]
    for prompt, text in zip(PROMPTS, encoded, strict=True):
        (states,) = encoders.qwen.encode([prompt])
        assert (text.text_TD - states).abs().max() < 1e-5
    assert encoded[3].byt5_SE is not None
    (glyphs,) = encoders.byt5.encode(['Text "A". Text "B". '])
    assert glyphs is not None
    assert torch.equal(encoded[3].byt5_SE, glyphs)


def test_long_prompts_are_cut_to_the_limits(models):
    long, quoting = _open(models).encode(PROMPTS[4:])
    assert long.text_TD.shape[0] == 1024
    assert quoting.byt5_SE is not None
    assert quoting.byt5_SE.shape[0] == 128


def test_prompts_over_a_limit_are_one_warning_before_encoding(models):
    report = SilentReporter()
    long = [f"{n} " + "snow " * 1500 for n in range(6)]
    quoting = [f'{n} "{"x" * 200}"' for n in range(2)]
    encoding = encode_prompts(_open(models), [*long, *quoting, "a red fox"], report)
    assert report.warnings == []  # nothing happens before the first prompt is asked for
    next(encoding)
    over, quoted = report.warnings
    assert over.startswith("prompt over 1024 tokens, truncated (6): `0 snow snow")
    assert over.endswith(" and 3 more")
    assert quoted == (
        "quoted text over byT5's limit, truncated (2): "
        f'`0 "{"x" * 57}…` (82 bytes), `1 "{"x" * 57}…` (82 bytes)'
    )


def test_each_prompt_comes_once_with_its_own_index_whatever_the_grouping(models, monkeypatch):
    expected = _open(models).encode(PROMPTS * 3)
    monkeypatch.setattr(text_module, "GLYPH_GROUP", 2)
    encoded = dict(_open(models).encode_each(PROMPTS * 3))
    assert sorted(encoded) == list(range(len(PROMPTS) * 3))
    for index, text in encoded.items():
        assert torch.equal(text.text_TD, expected[index].text_TD)
        assert (text.byt5_SE is None) == (expected[index].byt5_SE is None)


def test_the_identity_changes_with_all_that_changes_an_entry_and_nothing_else(models, tmp_path):
    for name in ("qwen.safetensors", "byt5.safetensors"):
        shutil.copy(models / name, tmp_path / name)
    shutil.copytree(models / "tokenizer", tmp_path / "tokenizer")
    first = _open(models).identity
    assert _open(tmp_path).identity == first
    assert _open(tmp_path, batch_size=1, device="meta", mmap=False).identity == first
    seen = {first, _open(tmp_path, dtype=torch.bfloat16).identity}
    seen.add(_open(tmp_path, byt5_dtype=torch.float32).identity)
    make_tiny_qwen(tmp_path / "qwen.safetensors", seed=1)
    seen.add(_open(tmp_path).identity)
    make_tiny_byt5(tmp_path / "byt5.safetensors", seed=1)
    seen.add(_open(tmp_path).identity)
    train_tiny_tokenizer(["other words"], tmp_path / "tokenizer")
    seen.add(_open(tmp_path).identity)
    assert len(seen) == 6


def test_files_given_in_each_other_s_place_are_named(models):
    with pytest.raises(HyimgError, match=r"`.*byt5\.safetensors` is a byT5 text encoder, not a Qwen"):
        TextEncoders.open(models / "byt5.safetensors", models / "qwen.safetensors", models / "tokenizer")


def test_tiny_files_are_the_same_in_every_process(models, tmp_path):
    """Their content is part of cache keys; hash seeds and thread counts must not show in it."""
    code = (
        "import sys; from hyimg.encoders.tiny import *; folder = sys.argv[1];"
        "make_tiny_qwen(folder + '/qwen.safetensors'); make_tiny_byt5(folder + '/byt5.safetensors');"
        "texts = ['a red fox in the snow', 'a sign that says “OPEN 24h”'];"
        "train_tiny_tokenizer(texts, folder + '/tokenizer')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    for name in ("qwen.safetensors", "byt5.safetensors", "tokenizer/tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (models / name).read_bytes(), name


def test_the_tiny_tokenizer_has_the_real_template_length_and_fits_the_tiny_encoder(tmp_path):
    texts = ["ünusual wörds 新年快乐 🦊", "the the the shape-shifting relationships"] * 300
    train_tiny_tokenizer(texts, tmp_path)
    tokenizer = load_qwen_tokenizer(tmp_path, None)  # refuses a template that is not 34 tokens long
    assert tokenizer.num_tokens <= 1024
    assert len(tokenizer.encode("新年快乐").ids) < 34 + 12 + 1  # merged, not bytes
    assert len(tokenizer.encode("<|endoftext|>").ids) == 34 + 1 + 1

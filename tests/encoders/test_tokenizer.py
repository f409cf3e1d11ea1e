"""The Qwen tokenizer against tests/golden/tokens.json, and where its vocabulary is looked for."""

from __future__ import annotations

import hashlib
import json
import random
import shutil

import pytest

from hyimg.encoders import tokenizer as tokenizer_module
from hyimg.encoders.tokenizer import (
    SPECIAL_TOKENS,
    TEMPLATE_PREFIX,
    TEMPLATE_TOKENS,
    PromptRows,
    QwenTokenizer,
    Vocabulary,
    build_tokenizer,
    byte_alphabet,
    fill_template,
    load_qwen_tokenizer,
    read_vocabulary,
)
from hyimg.errors import HyimgError


def _sha256(ids):
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


def test_golden_prompts_give_the_golden_ids(golden_json, true_tokenizer):
    golden = golden_json("tokens.json")
    assert golden["meta"]["template"] == fill_template("{}")
    assert golden["meta"]["drop"] == TEMPLATE_TOKENS
    for case in golden["prompts"]:
        repeat = case.get("prompt_repeat")
        prompt = repeat["unit"] * repeat["count"] if repeat else case["prompt"]
        tokenized = true_tokenizer.encode(prompt)
        assert _sha256(tokenized.ids) == case["qwen"]["sha256"], prompt
        assert len(tokenized.ids) == case["qwen"]["len"]
        assert (tokenized.num_cut > 0) == case["truncated"]


def test_special_tokens_have_their_published_ids(true_tokenizer):
    assert true_tokenizer.num_tokens == 151_665
    assert true_tokenizer.encode("<|file_sep|><|endoftext|>").ids[TEMPLATE_TOKENS:] == (
        151664,
        151643,
        151645,
    )


def test_every_file_form_gives_the_same_ids_and_identity(ranks_path, true_tokenizer, tmp_path):
    vocabulary = read_vocabulary(ranks_path)
    assert len(vocabulary.merges) == 151_387
    (tmp_path / "new").mkdir()
    build_tokenizer(vocabulary).save(str(tmp_path / "new" / "tokenizer.json"))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "vocab.json").write_text(json.dumps(vocabulary.ids), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in vocabulary.merges), ""]
    (tmp_path / "old" / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    for folder in (tmp_path / "new", tmp_path / "old"):
        other = load_qwen_tokenizer(folder, None)
        assert other.identity == true_tokenizer.identity
        assert (
            other.encode("“新年” it's 12 o'clock\n\n <|im_end|>x").ids
            == true_tokenizer.encode("“新年” it's 12 o'clock\n\n <|im_end|>x").ids
        )


def test_the_first_source_that_is_there_is_taken(tmp_path, models, monkeypatch):
    tiny = models / "tokenizer" / "tokenizer.json"
    given, beside, dashscope, hub = (tmp_path / name for name in ("given", "model", "dashscope", "hub"))
    for folder in (given, beside, dashscope / "resources", hub):
        folder.mkdir(parents=True)
        shutil.copy(tiny, folder / "tokenizer.json")
    _write_ranks(dashscope / "resources" / "qwen.tiktoken", tiny)
    (dashscope / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(hub / "tokenizer.json"))
    encoder = beside / "qwen.safetensors"

    assert load_qwen_tokenizer(given, encoder).source == str(given)
    (given / "Qwen_Qwen2.5-VL-7B-Instruct").mkdir()  # as the reference tool's cache folder has it
    (given / "tokenizer.json").rename(given / "Qwen_Qwen2.5-VL-7B-Instruct" / "tokenizer.json")
    assert load_qwen_tokenizer(given, encoder).source == str(given / "Qwen_Qwen2.5-VL-7B-Instruct")
    assert load_qwen_tokenizer(None, encoder).source == str(beside / "tokenizer.json")
    assert load_qwen_tokenizer(None, beside).source == str(beside / "tokenizer.json")
    (beside / "tokenizer").mkdir()
    (beside / "tokenizer.json").rename(beside / "tokenizer" / "tokenizer.json")
    assert load_qwen_tokenizer(None, encoder).source == str(beside / "tokenizer" / "tokenizer.json")
    (beside / "text_encoder").mkdir()  # the layout of diffusers: two folders side by side
    assert load_qwen_tokenizer(None, beside / "text_encoder").source == str(
        beside / "tokenizer" / "tokenizer.json"
    )
    shutil.rmtree(beside)
    ranks = load_qwen_tokenizer(None, encoder)
    assert ranks.source == str(dashscope / "resources" / "qwen.tiktoken")
    monkeypatch.setattr(tokenizer_module, "_in_dashscope", lambda: None)
    assert load_qwen_tokenizer(None, encoder).source == str(hub / "tokenizer.json")


def _write_ranks(path, tokenizer_json):
    """The byte pairs of a tokenizer.json as a ranks file."""
    import base64

    vocabulary = read_vocabulary(tokenizer_json)
    byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
    tokens = sorted(vocabulary.ids, key=vocabulary.ids.__getitem__)
    lines = (
        base64.b64encode(bytes(byte_of[c] for c in token)) + b" " + str(rank).encode()
        for rank, token in enumerate(tokens)
    )
    path.write_bytes(b"\n".join(lines) + b"\n")


def test_no_tokenizer_anywhere_is_one_sentence_with_the_ways_out(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(tokenizer_module, "_in_dashscope", lambda: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(HyimgError, match="no route to the hub") as caught:
        load_qwen_tokenizer(None, tmp_path / "qwen.safetensors")
    assert "--tokenizer" in str(caught.value.hint)
    assert "hyimg[tokenizer]" in str(caught.value.hint)


def test_a_given_tokenizer_that_is_not_there_is_not_replaced_by_another(tmp_path):
    with pytest.raises(HyimgError, match="no Qwen tokenizer in"):
        load_qwen_tokenizer(tmp_path, None)
    with pytest.raises(HyimgError, match="no Qwen tokenizer in"):
        load_qwen_tokenizer(tmp_path / "nowhere", None)


BPE = '{"model": {"type": "BPE", "vocab": %s, "merges": %s}, "added_tokens": []}'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": {"type": "Unigram"}, "added_tokens": []}'),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", BPE % ('{"a": 0, "b": 1}', '[["a", []]]')),
        ("tokenizer.json", BPE % ('{"a": 0, "b": 1}', '["a b"]')),
        ("tokenizer.json", BPE % ('{"a": -1}', "[]")),
        ("tokenizer.json", BPE % ('{"a": 4294967296}', "[]")),
        ("tokenizer.json", BPE % ("{}", "[]")),
        ("qwen.tiktoken", "IQ== 0\nno ranks here\n"),
        # three characters whose pairs are no tokens, or come later
        ("qwen.tiktoken", "IQ== 0\nIg== 1\nISIh 2\n"),
        ("qwen.tiktoken", "IQ== 0\nIg== 1\nISIh 2\nISI= 3\nIiE= 4\n"),
    ],
)
def test_a_damaged_tokenizer_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(HyimgError, match="is not a BPE tokenizer file"):
        load_qwen_tokenizer(tmp_path, None)


def test_a_tokenizer_of_another_model_is_refused():
    """Bytes only: the template would become hundreds of tokens, of which 34 would be dropped."""
    ids = {character: i for i, character in enumerate(byte_alphabet())}
    special = {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
    with pytest.raises(HyimgError, match=r"is not Qwen2\.5's"):
        QwenTokenizer(Vocabulary(ids, [], special), "somewhere")
    assert len(TEMPLATE_PREFIX) > TEMPLATE_TOKENS


def test_a_lone_surrogate_is_read_as_a_question_mark(tiny_tokenizer):
    assert tiny_tokenizer.encode("a\ud83d").ids == tiny_tokenizer.encode("a?").ids


def test_a_cut_prompt_keeps_the_limit_and_counts_what_is_lost(tiny_tokenizer):
    whole = tiny_tokenizer.encode("0" * 1023)
    assert (len(whole.ids), whole.num_cut) == (1024 + 34, 0)
    cut = tiny_tokenizer.encode("0" * 1030)
    assert (len(cut.ids), cut.num_cut) == (1024 + 34, 7)
    assert cut.ids[-1] == cut.ids[-2] != whole.ids[-1]


def test_of_a_long_prompt_the_same_ids_are_taken_from_its_beginning(true_tokenizer, monkeypatch):
    rng = random.Random(0)
    units = [
        "a red cat, ",
        " ",
        "\n",
        "\r\n",
        "a",
        "漢",
        "\u0301",
        "é",
        "1",
        "!!",
        "<|im_end|>",
        "don't",
        "가",
        "X" * 30,
    ]
    for _ in range(12):
        some = rng.sample(units, 3)
        prompt = "".join(rng.choice(some) * rng.choice([1, 2, 50]) for _ in range(500))
        monkeypatch.setattr(tokenizer_module, "COUNTED_CHARS", 10**9)
        whole = true_tokenizer.encode(prompt)
        monkeypatch.setattr(tokenizer_module, "COUNTED_CHARS", rng.choice([300, 3000, 7000]))
        assert true_tokenizer.encode(prompt).ids == whole.ids, some


def test_a_long_prompt_is_tokenized_in_part(true_tokenizer, monkeypatch):
    lengths = []

    def encode(self, text):
        lengths.append(len(text))
        return original(self, text)

    original = QwenTokenizer._encode
    monkeypatch.setattr(QwenTokenizer, "_encode", encode)
    assert true_tokenizer.encode("a red cat, " * 90_000).num_cut > 10_000
    assert lengths == [tokenizer_module.COUNTED_CHARS]


def test_rows_of_prompts_are_tokenized_when_they_are_asked_for(tiny_tokenizer):
    prompts = ["a cat", "a cat, " * 1000, ""]
    rows = PromptRows(tiny_tokenizer, prompts)
    encoded = [tiny_tokenizer.encode(prompt) for prompt in prompts]
    assert list(rows) == [one.ids for one in encoded] == rows[:]
    assert list(rows.lengths) == [len(one.ids) for one in encoded]
    assert list(rows.num_cut) == [one.num_cut for one in encoded]
    assert rows.num_cut[1] > 0
    kept = [value for value in vars(rows).values() if isinstance(value, (list, tuple, dict))]
    assert kept == [prompts]  # no ids

"""The quoted-text rule and byT5's tokens, against tests/golden/tokens.json and transformers."""

from __future__ import annotations

import pytest

from hyimg.encoders.glyph import (
    MAX_GLYPH_TOKENS,
    NUM_PLAIN_TOKENS,
    NUM_TOKENS,
    glyph_prompt,
    quoted_texts,
    single_quoted_texts,
    tokenize_glyphs,
)


def _prompts(golden_json):
    for case in golden_json("tokens.json")["prompts"]:
        repeat = case.get("prompt_repeat")
        yield (repeat["unit"] * repeat["count"] if repeat else case["prompt"]), case


def test_golden_prompts_give_the_golden_glyph_texts(golden_json):
    for prompt, case in _prompts(golden_json):
        assert glyph_prompt(prompt) == case["glyph_text"]


def test_golden_glyph_texts_give_the_golden_ids_in_both_vocabularies(golden_json):
    """The plain vocabulary is the reference tool's, the extended one the official code's and ours."""
    num_compared = 0
    for prompt, case in _prompts(golden_json):
        if (text := glyph_prompt(prompt)) is None:
            continue
        plain = tokenize_glyphs(text, num_rows=NUM_PLAIN_TOKENS)
        assert list(plain.ids) == case["byt5"]["ids"]
        assert (plain.num_cut > 0) == case["byt5"]["truncated"]
        extended = case.get("byt5_with_glyph_tokens_added", case["byt5"])
        assert list(tokenize_glyphs(text).ids) == extended["ids"]
        num_compared += 1
    assert num_compared > 10


def test_added_tokens_have_the_ids_that_the_file_s_rows_are_named_by(golden_json):
    rows = golden_json("byt5_keys.json")["shared_weight_rows"]
    assert rows["rows"] == NUM_TOKENS
    for token, row in rows["first_ids"].items():
        assert tokenize_glyphs(token).ids == (row, 1)
    # One past the last of a kind is no token
    assert len(tokenize_glyphs("<kr-font-122>").ids) == len("<kr-font-122>") + 1


@pytest.mark.parametrize(
    "text",
    [
        'Text "OPEN". ',
        "  spaces \t and\nlines ",
        "咖啡 café 🦊",
        "<color-0><color-137> <en-font-511> <kr-font-121> <color-138> <xx-font-1>",
        "<extra_id_0> <extra_id_124> <extra_id_125> <pad> <unk>\n a </s>b",
        "x" * 300,
        "",
    ],
)
def test_ids_equal_those_of_transformers_with_the_official_tokens_added(text):
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    fonts = {"en": 512, "cn": 143, "jp": 211, "kr": 122}
    added = [f"<color-{i}>" for i in range(138)]
    added += [f"<{language}-font-{i}>" for language, count in fonts.items() for i in range(count)]
    tokenizer.add_tokens(added, special_tokens=True)
    expected = tokenizer(text, truncation=True, max_length=MAX_GLYPH_TOKENS).input_ids
    assert list(tokenize_glyphs(text).ids) == expected


def test_a_long_text_says_how_much_was_cut():
    assert tokenize_glyphs("x" * 127).num_cut == 0
    assert tokenize_glyphs("x" * 130).num_cut == 3
    assert tokenize_glyphs("x" * 130).ids[-1] == 1


def test_a_lone_surrogate_is_read_as_a_question_mark():
    assert tokenize_glyphs("a\ud83d").ids == tokenize_glyphs("a?").ids


def test_ascii_single_quotes_are_seen_by_the_lint_only():
    prompt = "It's the dogs' sign, it says 'NO ENTRY' and 'x'"
    assert quoted_texts(prompt) == []
    assert single_quoted_texts(prompt) == ["NO ENTRY", "x"]
    assert single_quoted_texts("don't, can't, rock'n'roll") == []

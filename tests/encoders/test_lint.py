from __future__ import annotations

from hyimg.encoders.glyph import lint_prompt


def test_byt5s_special_tokens_count_only_where_byt5_sees_them() -> None:
    assert lint_prompt('a "<color-3>" sign', None).special == ("<color-3>",)
    assert lint_prompt('a <color-3> sign "x"', None).special == ()
    assert lint_prompt("<|im_start|> <tool_call>", None).special == ("<|im_start|>", "<tool_call>")


def test_what_needs_no_tokenizer_is_told_without_one() -> None:
    lint = lint_prompt("\n‘甲’ 'b'", None)
    assert (lint.num_tokens, lint.num_cut) == (None, None)
    assert (lint.quoted, lint.single_quoted, lint.begins_with_newline) == (("甲",), ("b",), True)
    assert lint.num_glyph_tokens == len('Text "甲". '.encode()) + 1

"""What the encoders will make of a prompt: tokens, what is cut, what byT5 sees, what acts unexpectedly. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from hyimg.encoders.byt5_tokens import NUM_TOKENS, special_tokens, tokenize_glyphs
from hyimg.encoders.glyph import glyph_prompt, quoted_texts, single_quoted_texts
from hyimg.encoders.template import TEMPLATE_TOKENS
from hyimg.encoders.tokenizer import QwenTokenizer
from hyimg.encoders.vocabulary import SPECIAL_TOKENS


@dataclass(frozen=True)
class PromptLint:
    """`num_tokens` are the text tokens that the DiT sees and `num_cut` those that are over the limit (None: there
    was no tokenizer); `num_glyph_tokens` those of byT5 (0 where nothing is quoted), `num_glyph_cut` the bytes of
    quoted text over its limit. `special` are special tokens that the prompt spells out: Qwen's, and byT5's
    in what is quoted. Texts are in the order of the prompt's quotes.
    """

    num_tokens: int | None
    num_cut: int | None
    num_glyph_tokens: int
    num_glyph_cut: int
    quoted: tuple[str, ...]
    single_quoted: tuple[str, ...]
    special: tuple[str, ...]
    begins_with_newline: bool


def lint_prompt(prompt: str, tokenizer: QwenTokenizer | None) -> PromptLint:
    """What becomes of a prompt; without a tokenizer its tokens are not counted."""
    tokenized = None if tokenizer is None else tokenizer.encode(prompt)
    glyphs = glyph_prompt(prompt)
    seen_by_byt5 = None if glyphs is None else tokenize_glyphs(glyphs)
    return PromptLint(
        num_tokens=None if tokenized is None else len(tokenized.ids) - TEMPLATE_TOKENS,
        num_cut=None if tokenized is None else tokenized.num_cut,
        num_glyph_tokens=0 if seen_by_byt5 is None else len(seen_by_byt5.ids),
        num_glyph_cut=0 if seen_by_byt5 is None else seen_by_byt5.num_cut,
        quoted=tuple(quoted_texts(prompt)),
        single_quoted=tuple(single_quoted_texts(prompt)),
        special=_special(prompt, glyphs),
        begins_with_newline=prompt.startswith("\n"),
    )


def _special(prompt: str, glyphs: str | None) -> tuple[str, ...]:
    if "<" not in prompt:
        return ()
    found = [token for token in SPECIAL_TOKENS if token in prompt]
    if glyphs is not None:
        found += [token for token in special_tokens(NUM_TOKENS) if token in glyphs]
    return tuple(found)

"""Text to render: the quoted texts of a prompt, and their byT5 tokens. No torch.

Straight double quotes and Chinese single and double quotes count. ASCII single quotes do not, because apostrophes
would match ("it's a dog's"); `lint_prompt` reports them.

A byT5 token is a byte of UTF-8, so no vocabulary file is needed:

    id         token
    0, 1, 2    <pad>, </s> (ends every text), <unk>
    3..258     bytes 0..255
    259..383   <extra_id_0> .. <extra_id_124>
    384..521   <color-0> .. <color-137>
    522..1509  <en-font-0>.. (512), <cn-font-0>.. (143), <jp-font-0>.. (211), <kr-font-0>.. (122)

Colours and fonts come from Glyph-SDXL-v2, on which this byT5 was trained; they are the file's 1510 embedding rows.
Only prompts that spell out such a token use it; nothing here adds colours or fonts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from hyimg.encoders.tokenizer import SPECIAL_TOKENS, TEMPLATE_TOKENS, QwenTokenizer, Tokenized

# In this order: the reference tool lists the texts of one kind of quote after the other. A quoted text is on one
# line, and may be empty
_QUOTES = (('"', '"'), ("‘", "’"), ("“", "”"))

# Apostrophes within words neither open nor close
_OPENING = re.compile(r"(?<!\w)'(?=\S)")
_CLOSING = re.compile(r"(?<=\S)'(?!\w)")


def quoted_texts(prompt: str) -> list[str]:
    """The texts in quotes, from left to right: first all in straight double quotes, then ‘ ’, then “ ”."""
    lines = prompt.split("\n")
    return [
        text for opening, closing in _QUOTES for line in lines for text in _between(opening, closing, line)
    ]


def _between(opening: str, closing: str, line: str) -> Iterator[str]:
    """The quoted texts of a line. A regular expression would search for the end again from each opening quote."""
    start = line.find(opening)
    while start >= 0 and (end := line.find(closing, start + 1)) >= 0:
        yield line[start + 1 : end]
        start = line.find(opening, end + 1)


def glyph_prompt(prompt: str) -> str | None:
    """byT5's prompt, such as `Text "SALE". Text "50% OFF". `, or None if nothing is quoted."""
    texts = quoted_texts(prompt)
    return "".join(f'Text "{text}". ' for text in texts) if texts else None


def single_quoted_texts(prompt: str) -> list[str]:
    """The texts in ASCII single quotes, which byT5 does not get although that may have been intended."""
    texts = []
    for line in prompt.split("\n"):
        after = 0
        ends = (match.start() for match in _CLOSING.finditer(line))
        end: int | None = next(ends, None)
        for start in (match.end() for match in _OPENING.finditer(line)):
            if start <= after:  # this quote closed the last text
                continue
            while end is not None and end <= start:  # a text has at least one character
                end = next(ends, None)
            if end is None:
                break
            texts.append(line[start:end])
            after = end + 1
    return texts


MAX_GLYPH_TOKENS = 128

NUM_PLAIN_TOKENS = 384
NUM_TOKENS = 1510

_BASIC_TOKENS = ("<pad>", "</s>", "<unk>")
_EOS_ID = 1
_FIRST_BYTE_ID = 3
_FONTS = {"en": 512, "cn": 143, "jp": 211, "kr": 122}


@lru_cache
def special_tokens(num_rows: int) -> dict[str, int]:
    """The spelt-out tokens among the first `num_rows` ids, with their ids."""
    ids = {name: i for i, name in enumerate(_BASIC_TOKENS)}
    added = [f"<extra_id_{i}>" for i in range(125)]
    added += [f"<color-{i}>" for i in range(138)]
    added += [f"<{language}-font-{i}>" for language, count in _FONTS.items() for i in range(count)]
    ids.update({name: _FIRST_BYTE_ID + 256 + i for i, name in enumerate(added)})
    return {name: i for name, i in ids.items() if i < num_rows}


@lru_cache
def _splitter(num_rows: int) -> re.Pattern[str]:
    """Splits at spelt-out tokens. Whitespace around the first three belongs to them, as in transformers."""
    numbers: defaultdict[str, list[str]] = defaultdict(list)
    for token in list(special_tokens(num_rows))[len(_BASIC_TOKENS) :]:
        stem, number = re.fullmatch(r"<(\D+)(\d+)>", token).groups()  # type: ignore[union-attr]
        numbers[stem].append(number)
    added = "".join(f"|<{stem}(?:{'|'.join(of_stem)})>" for stem, of_stem in numbers.items())
    basic = "|".join(map(re.escape, _BASIC_TOKENS))
    # whitespace matches only from its start, so that long whitespace without a token takes linear time
    return re.compile(rf"((?:(?<!\s)\s+)?(?:{basic})\s*{added})")


def tokenize_glyphs(text: str, *, num_rows: int = NUM_TOKENS) -> Tokenized:
    """The ids of `text` and `</s>`, at most 128 in all: a long text is truncated before its `</s>`.

    `num_rows` is the size of the model's vocabulary; tokens beyond it are encoded as bytes.
    """
    special = special_tokens(num_rows)
    ids: list[int] = []
    for part in _splitter(num_rows).split(text):
        if (token := part.strip()) in special:
            ids.append(special[token])
        else:
            # A lone surrogate, which a JSON caption can contain, has no UTF-8 form
            ids.extend(_FIRST_BYTE_ID + byte for byte in part.encode("utf-8", "replace"))
    limit = MAX_GLYPH_TOKENS - 1
    return Tokenized((*ids[:limit], _EOS_ID), max(0, len(ids) - limit))


@dataclass(frozen=True)
class PromptLint:
    """How the encoders treat a prompt.

    `num_tokens` are the text tokens that the DiT gets and `num_cut` those over the limit (None without a tokenizer);
    `num_glyph_tokens` byT5's (0 if nothing is quoted), `num_glyph_cut` the bytes of quoted text over its limit.
    `special` are spelt-out special tokens: Qwen's, and byT5's in quoted text. Texts are in the order of the quotes.
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
    """The lint of a prompt; without a tokenizer its tokens are not counted."""
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

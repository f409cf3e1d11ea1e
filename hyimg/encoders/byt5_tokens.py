"""byT5's tokens: a token is a byte of UTF-8, so no vocabulary file is needed. No torch.

    id         token
    0, 1, 2    <pad>, </s> (ends every text), <unk>
    3..258     bytes 0..255
    259..383   <extra_id_0> .. <extra_id_124>
    384..521   <color-0> .. <color-137>
    522..1509  <en-font-0>.. (512), <cn-font-0>.. (143), <jp-font-0>.. (211), <kr-font-0>.. (122)

Colours and fonts come from Glyph-SDXL-v2, on which this byT5 was trained; the file's 1510 embedding rows
are these. Only a prompt that spells such a token out has it: nothing here adds colours or fonts.
"""

from __future__ import annotations

import re
from functools import lru_cache

from hyimg.encoders.template import Tokenized

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
    """Splits at spelt-out tokens. White space around the first three goes with them, as in transformers."""
    added = list(special_tokens(num_rows))[len(_BASIC_TOKENS) :]
    basic = (rf"\s*{re.escape(token)}\s*" for token in _BASIC_TOKENS)
    return re.compile("(" + "|".join((*basic, *map(re.escape, added))) + ")")


def tokenize_glyphs(text: str, *, num_rows: int = NUM_TOKENS) -> Tokenized:
    """The ids of `text` and `</s>`, at most 128 in all: a long text is cut before its `</s>`.

    `num_rows` is the size of the model's vocabulary: tokens beyond it are spelt in bytes.
    """
    special = special_tokens(num_rows)
    ids: list[int] = []
    for part in _splitter(num_rows).split(text):
        if (token := part.strip()) in special:
            ids.append(special[token])
        else:
            # A lone surrogate, which a JSON caption can hold, has no UTF-8 form
            ids.extend(_FIRST_BYTE_ID + byte for byte in part.encode("utf-8", "replace"))
    limit = MAX_GLYPH_TOKENS - 1
    return Tokenized((*ids[:limit], _EOS_ID), max(0, len(ids) - limit))

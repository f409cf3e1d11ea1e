"""Text that a picture shall show: what stands in quotes in a prompt, as byT5 reads it. No torch.

Straight double quotes and Chinese single and double quotes count. ASCII single quotes do not, because
apostrophes would match ("it's a dog's"); `single_quoted_texts` lets a lint point them out.
"""

from __future__ import annotations

import re

# In this order, as the reference lists the texts of one kind of quote after the other. A quoted text does
# not run over a line's end, and may be empty
_QUOTES = (re.compile('"(.*?)"'), re.compile("‘(.*?)’"), re.compile("“(.*?)”"))

# Apostrophes within words neither open nor close
_SINGLE_QUOTES = re.compile(r"(?<!\w)'(?=\S)(.+?)(?<=\S)'(?!\w)")


def quoted_texts(prompt: str) -> list[str]:
    """The texts in quotes, from left to right: first all in straight double quotes, then ‘ ’, then “ ”."""
    return [str(text) for quotes in _QUOTES for text in quotes.findall(prompt)]


def glyph_prompt(prompt: str) -> str | None:
    """What byT5 reads, such as `Text "SALE". Text "50% OFF". `, or None where nothing is quoted."""
    texts = quoted_texts(prompt)
    return "".join(f'Text "{text}". ' for text in texts) if texts else None


def single_quoted_texts(prompt: str) -> list[str]:
    """The texts in ASCII single quotes, which look as if they were meant to be drawn and are not."""
    return [str(text) for text in _SINGLE_QUOTES.findall(prompt)]

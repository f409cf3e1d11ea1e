"""Text of any length takes time in proportion to it, and what replaced a regular expression finds the same."""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hyimg.checkpoints.model_files import unwrapped
from hyimg.config.documents import parse_document
from hyimg.data import captions
from hyimg.data.captions import CaptionSettings, variants
from hyimg.encoders import glyph
from hyimg.encoders.glyph import quoted_texts, single_quoted_texts
from hyimg.errors import HyimgError
from hyimg.lora.files.foreign import looks_like
from hyimg.lora.files.formats import parse_key
from hyimg.lora.patterns import parse_patterns
from hyimg.plugins import arguments
from hyimg.rendering.prompts import PromptFields

NUM_CHARS = 100_000
# A pattern that searches again from every character takes minutes for so many, and a linear one a tenth of a second
MOST_SECONDS = 8.0


def toml(text: str) -> None:
    with pytest.raises(HyimgError):
        parse_document(text, Path("run.toml"), "run file")


def wildcards(text: str) -> None:
    variants(
        f"a{text}",
        CaptionSettings(enable_wildcard=True, shuffle_caption=True, keep_tokens_separator="|||"),
        1,
    )


def patterns(text: str) -> None:
    with contextlib.suppress(HyimgError):
        parse_patterns(f"{text})=1", "rank")


def prompt_line(text: str) -> None:
    PromptFields("a prompt").read_line(f"a{text}")


def network_args(text: str) -> None:
    arguments.parse_arguments([f"a=b{text}"], "--network_args")


CASES: dict[str, tuple[Callable[[str], object], tuple[str, ...]]] = {
    "wildcards": (wildcards, ("{a", "{", "{a|", "}{", "|||")),
    "quotes": (quoted_texts, ('"', "“a", "‘", "“‘")),
    "single quotes": (single_quoted_texts, (" 'a", "'", "' ", "a' ")),
    "glyph tokens": (glyph.tokenize_glyphs, (" ", "<", "<pad> ", "<color-", "\n ")),
    "prompt lines": (prompt_line, (" ", " --", "— ", " -n ", "-- ")),
    "patterns": (patterns, ("(", "[^", "\\(")),
    "tensor names": (parse_key, (".lora_A.", "lora_unet_", "blocks.1", ".lora_A.weight")),
    "tensor names of other models": (lambda text: looks_like([text]), ("model.", "transformer_blocks.1", "te_")),
    "wrapped tensor names": (unwrapped, ("_orig_mod.", "module.", "_")),
    "a backslash in TOML": (lambda text: toml(f'a = "{text}'), ("\\",)),
    "white space in TOML": (lambda text: toml(f"a = x{text}y z"), (" ",)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_long_text_takes_time_in_proportion(name: str) -> None:
    function, units = CASES[name]
    for unit in units:
        text = (unit * NUM_CHARS)[:NUM_CHARS]
        start = time.process_time()
        function(text)
        assert time.process_time() - start < MOST_SECONDS, unit


def test_a_run_of_separators_in_an_argument_is_read_once() -> None:
    start = time.process_time()
    arguments.parse_arguments([f"a=b{',' * NUM_CHARS}c"], "--network_args")
    assert time.process_time() - start < MOST_SECONDS


SINGLE_QUOTES = re.compile(r"(?<!\w)'(?=\S)(.+?)(?<=\S)'(?!\w)")
NEXT_ARGUMENT = re.compile(r"[\s,;]+(?=[A-Za-z_]\w*\s*=)")
BASIC_TOKENS = re.compile(r"(\s*<pad>\s*|\s*</s>\s*|\s*<unk>\s*|<color-1>)")


def filled(text: str, rng: random.Random) -> str:
    """Wildcards by the pattern that finds them in text without escapes."""
    return re.sub(r"\{([^}]+)\}", lambda match: rng.choice(match[1].split("|")), text)


def test_short_texts_give_what_the_patterns_found() -> None:
    rng = random.Random(0)

    def text(characters: str | list[str]) -> str:
        return "".join(rng.choice(characters) for _ in range(rng.randrange(12)))

    for number in range(4000):
        quoted = text("'\"‘’“” ab\n\r\u2028_.")
        by_pattern = [
            found for quotes in ('"(.*?)"', "‘(.*?)’", "“(.*?)”") for found in re.findall(quotes, quoted)
        ]
        assert quoted_texts(quoted) == by_pattern, repr(quoted)
        assert single_quoted_texts(quoted) == SINGLE_QUOTES.findall(quoted), repr(quoted)
        braces = text("{}|ab\n")
        if "{{" not in braces and "}}" not in braces:
            expected = filled(braces, random.Random(number))
            assert captions._fill_wildcards(braces, random.Random(number)) == expected, repr(braces)
        glyphs = text(["<pad>", "</s>", "<unk>", "<color-1>", " ", "\n", "a", "<", ">"])
        assert glyph._splitter(1510).split(glyphs) == BASIC_TOKENS.split(glyphs), repr(glyphs)
        separated = text(" ,;ab=_1\n")
        assert arguments._NEXT_ARGUMENT.split(separated) == NEXT_ARGUMENT.split(separated), repr(separated)


def test_every_glyph_token_is_found_by_its_own_name() -> None:
    for num_rows in (384, 385, 1510):
        for token, number in glyph.special_tokens(num_rows).items():
            assert glyph.tokenize_glyphs(f"a{token}", num_rows=num_rows).ids == (100, number, 1)


def test_escapes_stay_where_a_text_holds_every_character_of_private_use() -> None:
    private = "".join(map(chr, range(0xE000, 0xF900)))
    assert captions._fill_wildcards("{{a}} {b}" + private, random.Random(0)) == "{a} b" + private

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hyimg.data.captions import (
    CaptionSettings,
    caption_from_metadata,
    compose,
    read_caption_file,
    variants,
    varies,
)
from hyimg.errors import HyimgError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "captions.json").read_text())
CASES = {case["name"]: case for case in GOLDEN["cases"]}

# What decisions.md ("captions") changes; the sets are of all texts that may come out.
OVERRIDDEN = {
    # tags are joined with the given separator
    "shuffle_keep2_sep_semicolon": {"a;b;c;d", "a;b;d;c"},
    "secondary_separator_custom_sep": {"a|b|c", "b|c|a"},
    # keep_tokens_separator is always removed
    "keep_tokens_separator_three": {"a, b, c, d, e", "a, c, b, d, e"},
    "keep_tokens_separator_no_shuffle": {"a, b, c"},
    # prefix and suffix stand on each line
    "prefix_suffix_multiline": {"PRE a SUF"},
    "prefix_suffix_multiline_wildcard": {"PRE a SUF", "PRE b SUF", "PRE c SUF"},
}
# These are not part of a caption's text here: dropping a whole caption is a draw of training
# (tests/data/test_samples.py), token warm-up is refused with cached text (tests/data/test_dataset_file.py).
ELSEWHERE = {name for name in CASES if name.startswith(("caption_dropout", "token_warmup"))}


def settings(case: dict[str, Any]) -> CaptionSettings:
    return CaptionSettings(**case["options"])


def texts(case: dict[str, Any], draws: int = 400) -> set[str]:
    return {compose(case["caption"], settings(case), random.Random(n)) for n in range(draws)}


@pytest.mark.parametrize("name", sorted(CASES.keys() - OVERRIDDEN.keys() - ELSEWHERE))
def test_captions_agree_with_the_reference_draw_for_draw(name: str) -> None:
    case = CASES[name]
    for seed, expected in case["exact_for_python_random_seed"].items():
        assert compose(case["caption"], settings(case), random.Random(int(seed))) == expected
    assert texts(case) == set(case["possible_outputs"])


@pytest.mark.parametrize("name", sorted(OVERRIDDEN))
def test_where_the_reference_loses_text_we_do_not(name: str) -> None:
    assert texts(CASES[name]) == OVERRIDDEN[name] != set(CASES[name]["possible_outputs"])


@pytest.mark.parametrize("case", GOLDEN["read_caption_file"]["cases"])
def test_caption_files_are_read_as_by_the_reference(case: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(case["file_content"].encode())
    if isinstance(case["caption"], dict):
        with pytest.raises(HyimgError, match="is empty"):
            read_caption_file(path)
        return
    caption = read_caption_file(path)
    if not case["enable_wildcard"]:
        caption = compose(caption, CaptionSettings(), random.Random(0))
    blank_first_line = case["caption"] == ""  # decisions.md: blank lines are skipped
    assert caption == ("a, b" if blank_first_line else case["caption"])


def test_caption_files_of_odd_encodings(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff一只猫，“咖啡”\n".encode())
    assert read_caption_file(path) == "一只猫，“咖啡”"
    path.write_bytes(b"\xff\xfeb\x00a\x00d\x00")
    with pytest.raises(HyimgError, match=r"`.*a\.txt` is UTF-16, not UTF-8"):
        read_caption_file(path)
    path.write_bytes("咖啡".encode("gbk"))
    with pytest.raises(HyimgError, match=r"`.*a\.txt` is not UTF-8"):
        read_caption_file(path)
    for data in ("a cat".encode("utf-16-le"), b"a cat\0"):
        path.write_bytes(data)
        with pytest.raises(HyimgError, match=r"`.*a\.txt` has NUL characters"):
            read_caption_file(path)


def test_a_variant_depends_on_caption_settings_and_number_only() -> None:
    shuffled = CaptionSettings(shuffle_caption=True)
    eight = variants("a, b, c, d, e", shuffled, 8)
    assert variants("a, b, c, d, e", shuffled, 3) == eight[:3]
    assert len(set(eight)) > 3
    assert {"".join(sorted(text)) for text in eight} == {"".join(sorted("a, b, c, d, e"))}
    assert variants("a, b, c, d, e", replace(shuffled, caption_suffix="f"), 8) != eight


def test_a_caption_without_randomness_has_one_variant() -> None:
    everything = CaptionSettings(shuffle_caption=True, enable_wildcard=True)
    assert variants("one tag", everything, 8) == ["one tag"]
    for caption in ("a, b", "{a|b}", "a\nb"):
        assert varies(caption, everything)
        assert varies("one tag", replace(everything, caption_suffix=caption))
        assert not varies(caption, CaptionSettings())


def test_what_does_not_vary_is_composed_without_drawing() -> None:
    for case in CASES.values():
        if case["name"] not in ELSEWHERE and not varies(case["caption"], settings(case)):
            assert len(texts(case, 30)) == 1, case["name"]


def test_metadata_gives_tags_to_every_line() -> None:
    entry = {"caption": "a cat\n\n a dog ", "tags": "pet, fur"}
    assert caption_from_metadata(entry, CaptionSettings()) == "a cat, pet, fur\na dog, pet, fur"
    assert caption_from_metadata({"tags": ["猫", "犬"]}, CaptionSettings(caption_separator=";")) == "猫;犬"
    whole = CaptionSettings(multiline_caption=True)
    assert caption_from_metadata(entry, whole) == "a cat\n\na dog, pet, fur"
    assert caption_from_metadata({"text": "a cat", "caption": None}, CaptionSettings()) == "a cat"
    assert caption_from_metadata({"file_name": "a.png"}, CaptionSettings()) is None
    for wrong, why in (({"caption": 3}, "not text"), ({"tags": [3]}, "`tags`"), ({"text": " "}, "empty")):
        with pytest.raises(ValueError, match=why):
            caption_from_metadata(wrong, CaptionSettings())


TWO_PARAGRAPHS = "\ufeff  A cat, asleep. \r\n on a {red|blue} chair \r\n\r\n\r\n\r\nIt is evening.\n\n"


def test_multiline_caption_takes_the_whole_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(TWO_PARAGRAPHS.encode())
    whole = CaptionSettings(multiline_caption=True, caption_prefix="photo:", caption_suffix="end")
    caption = read_caption_file(path, whole)
    assert caption == "A cat, asleep.\non a {red|blue} chair\n\nIt is evening."
    assert variants(caption, whole, 8) == [f"photo: {caption} end"]
    assert CaptionSettings().num_dropped_lines(read_caption_file(path)) == 2
    assert whole.num_dropped_lines(caption) == 0


def test_wildcards_in_a_whole_text_leave_its_lines_alone() -> None:
    whole = CaptionSettings(multiline_caption=True, enable_wildcard=True)
    assert set(variants("a\n{b|c}\n\nd", whole, 16)) == {"a\nb\n\nd", "a\nc\n\nd"}
    assert variants("a\nb", whole, 8) == ["a\nb"]
    assert whole.num_dropped_lines("a\nb") == 0

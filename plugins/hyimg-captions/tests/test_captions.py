"""The transforms and the command's function by themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hyimg.data.captions import CaptionContext
from hyimg.errors import HyimgError

CONTEXT = CaptionContext(Path("1.png"))


def test_underscores_become_blanks_in_words_alone():
    from hyimg_captions.transforms import underscores

    assert underscores("blue_eyes, ^_^, 1girl, >_<", CONTEXT) == "blue eyes, ^_^, 1girl, >_<"
    assert underscores("a_cat. b_b\nno_way", CONTEXT, separator=".") == "a cat. b_b\nno way"


def test_replace_needs_something_to_replace():
    from hyimg_captions.transforms import replace

    assert replace("sks dog, sks", CONTEXT, old="sks", new="my") == "my dog, my"
    with pytest.raises(HyimgError, match="`old`"):
        replace("x", CONTEXT, old="")


def test_tags_are_counted_over_all_subsets(tmp_path, capsys):
    from hyimg_captions.tags import tags

    (tmp_path / "images").mkdir()
    for number, caption in enumerate(("a cat, night", "a cat, day", "a dog")):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"not looked into")
        (tmp_path / "images" / f"{number}.txt").write_text(caption, encoding="utf-8")
    file = tmp_path / "data.toml"
    file.write_text(
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'images'\n", encoding="utf-8"
    )
    tags(file, most=1)
    assert capsys.readouterr().out == "      2 a cat\n"
    tags(file, most=9, json_=True)
    assert json.loads(capsys.readouterr().out) == {"a cat": 2, "night": 1, "day": 1, "a dog": 1}
    (tmp_path / "images" / "0.txt").unlink()
    with pytest.raises(HyimgError, match="caption"):
        tags(file)

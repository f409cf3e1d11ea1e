"""Caption transforms: what they are given, in which order they stand, and what is said when one does wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyimg.config.dataset_options import DatasetOptions
from hyimg.data.captions import CaptionTransforms, caption_transform_flags
from hyimg.data.workspace import open_workspace
from hyimg.errors import HyimgError
from hyimg.report import SilentReporter

PLUGIN = """
import itertools
from hyimg.hookspecs import hookimpl

count = itertools.count()

def upper(caption, context): return caption.upper()
def end(caption, context, *, tail: str, times: int = 1): return caption + tail * times
def tell(caption, context): return f"{caption} {context.image_path.name} {context.is_reg} {context.custom_attributes}"
def blank(caption, context): return "  " + caption + "\\n\\n"
def empty(caption, context): return " \\n "
def drifting(caption, context): return f"{caption} {next(count)}"
def nothing(caption, context): return None
def raising(caption, context): raise ValueError("no luck")

@hookimpl
def hyimg_caption_transforms():
    return {f.__name__: f for f in (upper, end, tell, blank, empty, drifting, nothing, raising)}
"""


@pytest.fixture
def prompts(tmp_path):
    """The prompts of a dataset of one image under transforms; `call.warnings` is what was reported."""
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "images" / "1.png")
    (tmp_path / "images" / "1.txt").write_text("a cat", encoding="utf-8")
    (tmp_path / "plugin.py").write_text(PLUGIN, encoding="utf-8")

    def call(*names, args=(), lines=""):
        (tmp_path / "data.toml").write_text(
            f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'images'\n{lines}",
            encoding="utf-8",
        )
        options = DatasetOptions(
            dataset_config=tmp_path / "data.toml", caption_transform=names, caption_transform_args=args
        )
        transforms = CaptionTransforms.of(options, [str(tmp_path / "plugin.py")])
        report = SilentReporter()
        (sample,) = open_workspace(options, report, transforms=transforms).found.samples
        call.warnings = report.warnings
        return sample.prompts

    return call


def test_they_apply_in_the_order_named_before_prefix_and_variants(prompts):
    assert prompts() == ("a cat",)
    assert prompts("Upper") == ("A CAT",)
    assert prompts("upper", "end", args=("tail=!", "times=2")) == ("A CAT!!",)
    assert prompts("end", "upper", args=("tail=x",), lines="caption_prefix = 'photo:'") == ("photo: A CATX",)
    variants = prompts("end", args=("tail=', on a mat, at night'",), lines="shuffle_caption = true")
    assert len(variants) == 8
    assert all(sorted(text.split(", ")) == ["a cat", "at night", "on a mat"] for text in variants)


def test_lines_are_cleaned_as_a_files_are(prompts):
    assert prompts("blank") == ("a cat",)
    assert prompts("blank", lines="multiline_caption = true") == ("a cat",)


def test_a_caption_that_a_transform_empties_is_reported(prompts):
    assert prompts("empty") == ("",)
    assert prompts.warnings == ["caption that `--caption_transform` leaves empty (1): `images/1.png`"]
    assert prompts("upper") == ("A CAT",)
    assert prompts.warnings == []


def test_the_image_and_its_subset_are_told(prompts):
    lines = "custom_attributes = { mood = 'calm' }"
    assert prompts("tell", lines=lines) == ("a cat 1.png False {'mood': 'calm'}",)


@pytest.mark.parametrize(
    ("names", "args", "words"),
    [
        (("uper",), (), "`--caption_transform` `uper` is unknown"),
        (("end",), (), "`end` needs the argument `tail`"),
        (("end",), ("tail=x", "times=two"), "must be a whole number, got `two`"),
        (("upper",), ("tail=x",), "unknown argument `tail` of `upper`"),
        ((), ("tail=x",), "`--caption_transform_args` without `--caption_transform`"),
        (("drifting",), (), "`drifting` returns a different text each time for `"),
        (("nothing",), (), "`nothing` returned `None` instead of text for the caption of `"),
        (("raising",), (), "`raising` failed on the caption of `"),
    ],
)
def test_what_is_wrong_is_one_sentence_before_any_work(prompts, names, args, words):
    with pytest.raises(HyimgError) as caught:
        prompts(*names, args=args)
    assert words in caught.value.message
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message


def test_the_flags_repeat_the_transforms_in_a_shells_words():
    options = DatasetOptions(
        dataset_config=Path("x"), caption_transform=("a", "b"), caption_transform_args=("x=1 2",)
    )
    assert caption_transform_flags(options, ["p.py"]) == (
        " --caption_transform a b --caption_transform_args 'x=1 2' --plugin p.py"
    )
    assert caption_transform_flags(DatasetOptions(dataset_config=Path("x")), ["p.py"]) == ""

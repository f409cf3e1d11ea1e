from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hyimg.data.buckets import BucketSizes, Placement

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "buckets.json").read_text())
SETTINGS = [setting for setting in GOLDEN["settings"] if "error" not in setting]


def bucket_sizes(setting: dict[str, Any]) -> BucketSizes:
    if setting.get("enable_bucket") is False:
        return BucketSizes(tuple(setting["resolution_wh"]))
    return BucketSizes(
        tuple(setting["resolution_wh"]),
        setting["bucket_reso_steps"],
        setting["min_bucket_reso"],
        setting["max_bucket_reso"],
        setting["bucket_no_upscale"],
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_buckets_resizes_and_crops_agree_with_the_reference(setting: dict[str, Any]) -> None:
    sizes = bucket_sizes(setting)
    if "predefined" in setting:
        assert [list(size) for size in sizes.predefined] == setting["predefined"]
    if "adjusted_min_max" in setting:
        assert list(sizes.bounds) == setting["adjusted_min_max"]
    num_compared = 0
    for image, *expected in setting["rows"]:
        placement = sizes.place(tuple(image))
        if len(expected) != 4:
            # the reference gives an empty bucket or divides by zero here (decisions.md, buckets)
            assert setting["bucket_no_upscale"]
            assert min(image) < setting["bucket_reso_steps"]
            continue
        bucket, resized, aspect_error, crop = expected
        assert placement == Placement(tuple(bucket), tuple(resized), tuple(crop))
        assert placement.aspect_error(tuple(image)) == pytest.approx(
            aspect_error, abs=1e-8
        )  # 9 digits stored
        num_compared += 1
    assert num_compared > 35


@pytest.mark.parametrize("no_upscale", [False, True])
@pytest.mark.parametrize("steps", [32, 64])
def test_no_bucket_is_ever_empty_or_larger_than_the_resized_image(steps: int, no_upscale: bool) -> None:
    sizes = BucketSizes((1280, 768), steps, 256, 1280, no_upscale)
    for width in (1, 20, 31, 33, 700, 1281, 50_000):
        for height in (1, 30, 64, 769, 3000, 40_000):
            placement = sizes.place((width, height))
            for side, resized, crop in zip(placement.bucket, placement.resized, placement.crop, strict=True):
                assert side >= steps
                assert side % steps == 0
                assert 0 <= crop <= resized - side
            assert placement.bucket[0] * placement.bucket[1] <= 1280 * 768


def test_an_image_under_one_step_is_enlarged_to_it_and_no_further() -> None:
    placement = BucketSizes((1024, 1024), 32, no_upscale=True).place((20, 300))
    assert placement == Placement((32, 480), (32, 480), (0, 0))

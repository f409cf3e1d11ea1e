"""The names of cache entries are a file format: a release that changed them would leave every user's caches unused.

They follow from the shipped micro model's files, from the picture's bytes and pixels, and from the settings, and so are
equal on every machine. Where a change makes entries with other values, their names must change too; then change these.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import hyimg
from hyimg.cli.app import run

LATENTS = [
    "d47f90831a90714a/57/577946640d54080c697a7e362157ca4899c6cbd9317ebc09fe5ee32e4cc47ae6.safetensors",
    "d47f90831a90714a/93/93515e8b7e235915d6a0cdecfb04e996b64008476f36261d07ab249550db0e8e.safetensors",
]
TEXTS = [
    "911747ee1c1c57a9/01/0133b0729ec496603e515c10d4bb689f47f95677534b95d440aebad84a221190.safetensors",
    "911747ee1c1c57a9/6f/6fecc169c41c71f71174b9d123a0ee5b07ad2833bfc2ae90a61be0e39f76625b.safetensors",
]


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A dataset file with one picture, in a format that is the same bytes whatever library writes it."""
    pixels = bytes((7 * x + 3 * y + 80 * c) % 256 for y in range(64) for x in range(96) for c in range(3))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.ppm").write_bytes(b"P6 96 64 255\n" + pixels)
    (tmp_path / "images" / "a.txt").write_text('a large red square, "GO"', encoding="utf-8")
    path = tmp_path / "data.toml"
    path.write_text(
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'images'\nflip_aug = true\n",
        encoding="utf-8",
    )
    return path


def test_the_names_of_cache_entries_are_those_of_earlier_releases(dataset):
    (dit,) = Path(hyimg.__file__).parent.rglob("hunyuanimage2.1.safetensors")
    model = {
        "--vae": dit.with_name("hunyuan_image_2.1_vae_fp16.safetensors"),
        "--text_encoder": dit.with_name("qwen_2.5_vl_7b.safetensors"),
        "--byt5": dit.with_name("byt5_small_glyphxl_fp16.safetensors"),
    }
    options = ["--dataset_config", str(dataset), "--device", "cpu", "--mixed_precision", "no"]
    encoders = [word for name in ("--text_encoder", "--byt5") for word in (name, str(model[name]))]
    assert run(["cache-latents", *options, "--vae", str(model["--vae"])]) == 0
    assert run(["cache-text", *options, *encoders]) == 0
    cache = dataset.parent / "hyimg-cache"
    names = {
        stage: sorted(
            path.relative_to(cache / stage).as_posix() for path in (cache / stage).rglob("*.safetensors")
        )
        for stage in ("latents", "text")
    }
    assert names == {"latents": LATENTS, "text": TEXTS}

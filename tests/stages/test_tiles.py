"""`--vae_tile_size` through the commands: the same entries, and the same pictures but for rounding."""

from __future__ import annotations

import shutil

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file


def test_latents_made_in_tiles_are_those_of_the_whole(hyimg, own_dataset, entries):
    whole = {path.name: load_file(path) for path in entries(own_dataset, "latents")}
    shutil.rmtree(own_dataset.parent / "hyimg-cache" / "latents")
    command = ["cache-latents", "--dataset_config", own_dataset, "--vae", "{vae}"]
    code, _, err = hyimg(*command, "--vae_tile_size", "128", "--vae_chunk_size", "16")
    assert code == 0, err
    tiled = {path.name: load_file(path) for path in entries(own_dataset, "latents")}
    assert tiled.keys() == whole.keys(), "tiles are no part of what an entry is made of"
    for name, tensors in tiled.items():
        # half precision's own rounding
        torch.testing.assert_close(tensors["mean"], whole[name]["mean"], rtol=2e-3, atol=2e-3)
    code, _, err = hyimg(*command)
    assert "all 5 are cached" in err, "and they serve a run without tiles"


def test_a_picture_decoded_in_tiles_is_that_of_the_whole(hyimg, tmp_path):
    pictures = []
    for name, options in (("whole", []), ("tiles", ["--vae_tile_size", "128"])):
        path = tmp_path / f"{name}.png"
        code, _, err = hyimg(
            *("infer", "--dit", "{dit}", "--text_encoder", "{text_encoder}", "--byt5", "{byt5}"),
            *("--vae", "{vae}", "--prompt", "a cat", "--seed", "1", "--infer_steps", "2"),
            *("--image_size", "160", "224", "--save_path", path, *options),
        )
        assert code == 0, err
        pictures.append(np.asarray(Image.open(path)).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_a_tile_size_that_does_not_divide_is_refused(hyimg, tmp_path):
    for size, reason in (("100", "at least 128"), ("130", "multiple of 32")):
        code, _, err = hyimg(
            "cache-latents", "--dataset_config", tmp_path, "--vae", "{vae}", "--vae_tile_size", size
        )
        assert code == 2
        assert "--vae_tile_size" in err
        assert reason in err

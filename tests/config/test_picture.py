from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hyimg.config import image_file
from hyimg.config.commands import InferConfig
from hyimg.config.load import make
from hyimg.config.rendering import NO_APG
from hyimg.errors import HyimgError

SETTINGS: dict[str, Any] = {
    "prompt": "a cat",
    "width": 96,
    "height": 64,
    "seed": 2**64 - 1,
    "sampler_args": ["a=1"],
    "fp8_scaled": True,
    "vae_tile_size": None,
    "loras": [
        {"file": "a.safetensors", "sha256": "0", "multiplier": 0.5, "exclude_pattern": "txt"},
        {"file": "b.safetensors", "sha256": "1", "multiplier": 1.0},
    ],
    "fingerprints": {"dit": "0"},
}
FILES = ["a.safetensors", "b.safetensors"]


@pytest.fixture
def png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a picture with SETTINGS; its LoRA files lie beside it."""
    monkeypatch.setattr(image_file, "read_settings", lambda path: SETTINGS)
    for name in FILES:
        (tmp_path / name).touch()
    return tmp_path / "a.png"


def test_settings_stand_between_flags_and_run_file(png: Path, tmp_path: Path) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text('seed = 1\ninfer_steps = 7\nvae_tile_size = 512\nlora_weight = "x"\ndit = "d"\n')
    config = make(InferConfig, {"from_image": str(png), "infer_steps": "9"}, run_file=run_file)
    assert config.prompt.prompt == "a cat"
    assert config.sampling.image_size == (64, 96)
    assert (config.sampling.seed, config.sampling.infer_steps, config.dit.dit) == (2**64 - 1, 9, Path("d"))
    assert config.sampling.sampler_args == ("a=1",)
    assert config.memory.fp8_scaled
    assert config.vae.vae_tile_size is None, "the run file's is not the picture's"
    assert config.lora.lora_weight == tuple(tmp_path / name for name in FILES)
    assert config.lora.lora_multiplier == (0.5, 1.0)
    assert config.lora.exclude_patterns == ("txt", "")
    assert config.lora.include_patterns == ()
    run_file.write_text(f'from_image = "{png.as_posix()}"\nseed = 1\n')
    config = make(InferConfig, {"fp8_scaled": False}, run_file=run_file)
    assert config.sampling.seed == 2**64 - 1
    assert not config.memory.fp8_scaled


def test_a_preset_stands_just_behind_what_is_given_with_it(png: Path, tmp_path: Path) -> None:
    def sampling(flags: dict[str, Any], text: str) -> tuple[object, ...]:
        run_file = tmp_path / "run.toml"
        run_file.write_text(text)
        got = make(InferConfig, flags, run_file=run_file).sampling
        return got.apg_start_step_general, got.sampler, got.sampler_args, got.flow_shift, got.guidance_rescale

    comfyui = (NO_APG, "euler", (), None, 0.0)
    own = 'apg_start_step_general = 3\nsampler = "heun"\nsampler_args = "a=1"\nflow_shift = 2\n'
    assert sampling({}, own)[:4] == (3, "heun", ("a=1",), 2.0)
    assert sampling({"preset": "comfyui"}, "guidance_rescale = 0.5\n" + own) == comfyui
    assert sampling({"preset": "comfyui", "flow_shift": "3"}, own) == (NO_APG, "euler", (), 3.0, 0.0)
    assert sampling({}, 'preset = "comfyui"\napg_start_step_general = 3') == (3, "euler", (), None, 0.0)
    assert sampling({"sampler": "heun"}, 'preset = "comfyui"') == (NO_APG, "heun", (), None, 0.0)
    # the picture has `sampler_args`, which the preset takes away
    assert sampling({"preset": "comfyui", "from_image": str(png)}, own) == comfyui
    with pytest.raises(HyimgError, match="`--preset`"):
        make(InferConfig, {"preset": "comfy"})


def test_a_picture_without_loras_takes_none_from_the_run_file(
    png: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        image_file, "read_settings", lambda path: SETTINGS | {"loras": [], "sampler_args": []}
    )
    run_file = tmp_path / "run.toml"
    run_file.write_text('lora_weight = "x"\nlora_multiplier = 0.5\nsampler_args = "b=1"\n')
    config = make(InferConfig, {"from_image": str(png)}, run_file=run_file)
    assert (config.lora.lora_weight, config.lora.lora_multiplier) == ((), ())
    assert config.sampling.sampler_args == ()


def test_loras_that_are_named_act_as_the_pictures_did(png: Path) -> None:
    config = make(InferConfig, {"from_image": str(png), "lora_weight": ["x", "y"]})
    assert config.lora.lora_weight == (Path("x"), Path("y"))
    assert config.lora.lora_multiplier == (0.5, 1.0)
    assert config.lora.exclude_patterns == ("txt", "")
    config = make(InferConfig, {"from_image": str(png), "lora_weight": ["x"]})
    assert config.lora.lora_multiplier == ()


def test_a_lora_that_is_a_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    assert image_file.find_lora({"file": "peft"}, tmp_path / "a.png") == tmp_path / "peft"


def test_a_picture_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").touch()
    (tmp_path / "pictures").mkdir()
    with pytest.raises(HyimgError, match="the LoRA `secret.safetensors`, which is neither next to it"):
        image_file.find_lora({"file": "../secret.safetensors"}, tmp_path / "pictures" / "a.png")

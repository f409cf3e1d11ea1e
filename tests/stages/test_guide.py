"""The texts of the reference tool's guide for this model, letter for letter but for program name and paths."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tomli
import tomli_w
import torch
from PIL import Image
from safetensors.torch import load_file

from hyimg.config.image_file import read_settings
from hyimg.config.load import make
from hyimg.config.tools import MakeTinyModelConfig
from hyimg.report import SilentReporter
from hyimg.stages.make_tiny_model import ModelFolder, make_tiny_model

# Section 4
COMMAND = r"""
accelerate launch --num_cpu_threads_per_process 1 hunyuan_image_train_network.py \
  --pretrained_model_name_or_path="<path to HunyuanDiT model>" \
  --text_encoder="<path to Qwen2.5-VL model>" \
  --byt5="<path to byT5 model>" \
  --vae="<path to VAE model>" \
  --dataset_config="my_hunyuan_dataset_config.toml" \
  --output_dir="<output directory>" \
  --output_name="my_hunyuan_lora" \
  --save_model_as=safetensors \
  --network_module=networks.lora_hunyuan_image \
  --network_dim=16 \
  --network_alpha=1 \
  --network_train_unet_only \
  --learning_rate=1e-4 \
  --optimizer_type="AdamW8bit" \
  --lr_scheduler="constant" \
  --attn_mode="torch" \
  --split_attn \
  --max_train_epochs=10 \
  --save_every_n_epochs=1 \
  --mixed_precision="bf16" \
  --gradient_checkpointing \
  --model_prediction_type="raw" \
  --discrete_flow_shift=5.0 \
  --blocks_to_swap=18 \
  --cache_text_encoder_outputs \
  --cache_latents
"""
# Section 6.1
ADAFACTOR = (
    '--optimizer_type adafactor --optimizer_args "relative_step=False" "scale_parameter=False" '
    '"warmup_init=False" --lr_scheduler constant_with_warmup --max_grad_norm 0.0'
)
# Section 6.3
PATTERNS = (
    '--network_args "network_reg_dims=attn.*.q_proj=4,attn.*.k_proj=4"',
    '--network_args "network_reg_lrs=down_blocks.1=1e-4,up_blocks.2=2e-4"',
)
# Section 6.4
DATASET = """
[general]
shuffle_caption = true
caption_extension = ".txt"

[[datasets]]
batch_size = 2
enable_bucket = true
resolution = [1024, 1024]

  [[datasets.subsets]]
  image_dir = "path/to/image/directory"
  num_repeats = 1

[[datasets]]
batch_size = 1
enable_bucket = true
resolution = [1280, 768]

  [[datasets.subsets]]
  image_dir = "path/to/another/directory"
  num_repeats = 1
"""

# Section 8
INFER = r"""
python hunyuan_image_minimal_inference.py \
  --dit "<path to hunyuanimage2.1.safetensors>" \
  --text_encoder "<path to qwen_2.5_vl_7b.safetensors>" \
  --byt5 "<path to byt5_small_glyphxl_fp16.safetensors>" \
  --vae "<path to hunyuan_image_2.1_vae_fp16.safetensors>" \
  --lora_weight "<path to your trained LoRA>" \
  --lora_multiplier 1.0 \
  --attn_mode "torch" \
  --prompt "A cute cartoon penguin in a snowy landscape" \
  --image_size 2048 2048 \
  --infer_steps 50 \
  --guidance_scale 3.5 \
  --flow_shift 5.0 \
  --seed 542017 \
  --save_path "output_image.png"
"""
# The options that the section lists, with values that act at a few steps
KEY_OPTIONS = (
    "--fp8_scaled",
    "--blocks_to_swap 1",
    "--image_size 96 64",
    "--guidance_scale 5",
    "--flow_shift 3",
    "--text_encoder_cpu",
    "--vae_chunk_size 16",
    "--apg_start_step_general 0 --apg_start_step_ocr 0",
    "--guidance_rescale 0.5",
    "--guidance_rescale_apg 0.5 --apg_start_step_general 0",
    "--split_attn",
    "--fp8_vl",
)


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> ModelFolder:
    folder = tmp_path_factory.mktemp("deep")
    return make_tiny_model(
        make(MakeTinyModelConfig, {"directory": folder, "depth": "full"}), SilentReporter()
    )


@pytest.mark.long
def test_the_command_of_section_4_trains(deep, own_dataset, tmp_path):
    # ten epochs in bf16, which many processors only emulate: of one image
    for number in range(1, 5):
        for ending in ("png", "txt"):
            (own_dataset.parent / "images" / f"{number}.{ending}").unlink()
    places = {
        "<path to HunyuanDiT model>": deep.dit,
        "<path to Qwen2.5-VL model>": deep.text_encoder,
        "<path to byT5 model>": deep.byt5,
        "<path to VAE model>": deep.vae,
        "my_hunyuan_dataset_config.toml": own_dataset,
        "<output directory>": tmp_path / "out",
    }
    # a shell joins the lines; shlex keeps what follows a backslash
    command = COMMAND.replace("\\\n", " ").replace("hunyuan_image_train_network.py", "-m hyimg train")
    for text, path in places.items():
        command = command.replace(text, str(path))
    launcher, *arguments = shlex.split(command)
    # the launcher of this environment, whatever the shell would find
    program = Path(sys.executable).with_name(launcher)
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert names == {f"my_hunyuan_lora-{epoch:06}.safetensors" for epoch in range(1, 10)} | {
        "my_hunyuan_lora.safetensors"
    }

    # the same run from a TOML file with those options, on the caches that are there
    seed = tomli.loads((tmp_path / "out" / "my_hunyuan_lora.run.toml").read_text())["seed"]
    options = {"seed": seed}
    for word in arguments[arguments.index("train") + 1 :]:
        name, has_value, value = word.removeprefix("--").partition("=")
        options[name] = _literal(value) if has_value else True
    options["blocks_to_swap"] = 0  # which changes nothing, and takes less time
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(options | {"output_dir": str(tmp_path / "again")}), encoding="utf-8")
    again = subprocess.run(
        [sys.executable, "-m", "hyimg", "train", "--config", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    first, second = (load_file(tmp_path / name / "my_hunyuan_lora.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def _literal(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


@pytest.mark.parametrize("text", [ADAFACTOR, *PATTERNS], ids=["adafactor", "ranks", "rates"])
def test_the_lines_of_section_6_train(hyimg, cached_dataset, tmp_path, text):
    code, _, err = hyimg(
        *("train", "--dit", "{dit}", "--dataset_config", cached_dataset, "--output_dir", tmp_path / "run"),
        *("--max_train_steps", "2", *shlex.split(text)),
    )
    assert code == 0, err
    assert (tmp_path / "run" / "lora.safetensors").is_file()
    if text in PATTERNS:
        assert "matches no module" in err, "the guide's patterns are of other models"


@pytest.mark.long
def test_the_dataset_file_of_section_6_4_trains(hyimg, own_dataset, tmp_path):
    images = own_dataset.parent / "images"
    text = DATASET.replace("path/to/image/directory", str(images))
    path = tmp_path / "guide.toml"
    path.write_text(text.replace("path/to/another/directory", str(images)), encoding="utf-8")
    files = [word for name in ("dit", "vae", "text_encoder", "byt5") for word in (f"--{name}", f"{{{name}}}")]
    code, _, err = hyimg(
        *(
            "train",
            *files,
            "--dataset_config",
            path,
            "--output_dir",
            tmp_path / "run",
            "--max_train_epochs",
            1,
        ),
        *(
            "--cache_latents",
            "--cache_text_encoder_outputs",
            "--caption_variants",
            2,
            "--gradient_checkpointing",
        ),
    )
    assert code == 0, err
    # five images in each dataset: by their shapes they make four batches of up to two, and five of one
    assert "10 images, 10 per epoch with repeats, 9 batches" in err
    assert (tmp_path / "run" / "lora.safetensors").is_file()


@pytest.fixture
def section_8(model, trained, tmp_path, monkeypatch):
    """The arguments of section 8, its places filled in; it saves into the working folder."""
    monkeypatch.chdir(tmp_path)
    places = {
        "<path to hunyuanimage2.1.safetensors>": model.dit,
        "<path to qwen_2.5_vl_7b.safetensors>": model.text_encoder,
        "<path to byt5_small_glyphxl_fp16.safetensors>": model.byt5,
        "<path to hunyuan_image_2.1_vae_fp16.safetensors>": model.vae,
        "<path to your trained LoRA>": trained / "lora.safetensors",
    }
    command = INFER.replace("\\\n", " ")
    for text, path in places.items():
        command = command.replace(text, str(path))
    python, script, *arguments = shlex.split(command)
    assert (python, script) == ("python", "hunyuan_image_minimal_inference.py")
    return ["infer", *arguments]


@pytest.mark.parametrize("extra", ["", *KEY_OPTIONS])
def test_the_command_of_section_8_renders_with_each_option_of_its_list(hyimg, section_8, tmp_path, extra):
    quick = ["--infer_steps", "2", "--image_size", "64", "64"]
    code, _, err = hyimg(*section_8, *quick, *shlex.split(extra))
    assert code == 0, err
    size = (64, 96) if "image_size" in extra else (64, 64)
    assert Image.open(tmp_path / "output_image.png").size == size
    if extra:
        return
    settings = read_settings(tmp_path / "output_image.png")
    assert settings["prompt"] == "A cute cartoon penguin in a snowy landscape"
    assert (settings["guidance_scale"], settings["flow_shift"], settings["seed"]) == (3.5, 5.0, 542017)
    assert settings["loras"][0]["multiplier"] == 1.0


@pytest.mark.long
def test_the_command_of_section_8_renders_as_written(hyimg, section_8, tmp_path):
    """Some three minutes on two cores: 100 calls of the tiny model on 4096 image tokens, and the tiny VAE."""
    code, _, err = hyimg(*section_8)
    assert code == 0, err
    assert Image.open(tmp_path / "output_image.png").size == (2048, 2048)
    assert read_settings(tmp_path / "output_image.png")["infer_steps"] == 50
    assert "is not one of the sizes" not in err

"""Small files of every kind that hyimg reads, made once by its own commands.

`make_world` runs in a process that has its imports done and has not yet run a backward pass: what trains is run in a
forked child (`tests.robustness.children`), because autograd's threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

GOLDEN = Path(__file__).parents[1] / "golden"

DATASET = """\
[general]
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 96
bucket_reso_steps = 32
caption_extension = ".txt"

[[datasets]]
resolution = [64, 64]
batch_size = 2

  [[datasets.subsets]]
  image_dir = "images"
  conditioning_data_dir = "masks"
  num_repeats = 1
  enable_wildcard = true
  shuffle_caption = false
  caption_prefix = ""
  validation_split = 0.0
"""
CAPTIONS = ["a red square", 'a sign with "GO"', "a {big|small} field, grass, sky"]
SIZES = [(64, 64), (80, 60), (60, 90)]
PROMPTS = {
    "prompts.txt": '# two\na cat --w 64 --h 64 --s 1 --d 5\na sign "GO" --n blurry --l 2 --w 64 --h 64 --s 1\n',
    "prompts.toml": (
        "[prompt]\nwidth = 64\nheight = 64\nsample_steps = 1\nnegative_prompt = ''\n"
        "[[prompt.subset]]\nprompt = 'a cat'\nseed = 3\n[[prompt.subset]]\nprompt = 'a dog'\nscale = 2.0\n"
    ),
    "prompts.json": json.dumps(
        [
            {"prompt": "a cat", "width": 64, "height": 64, "sample_steps": 1, "seed": 1},
            "a dog --w 64 --h 64 --s 1",
        ]
    ),
}
RUN_FILE = """\
[network]
network_dim = 2
network_alpha = 2.0
network_args = ["rank_dropout=0.1"]

[optimizer]
optimizer_type = "AdamW"
optimizer_args = ["weight_decay=0.1"]
lr_scheduler = "constant"
learning_rate = 1e-3

[duration]
max_train_steps = 1
seed = 3
mixed_precision = "no"
save_precision = "bf16"
"""
QWEN_CONFIG = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "text_config": {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 1024},
}
PLUGIN = """\
from hyimg.hookspecs import hookimpl


@hookimpl
def hyimg_step_end(run, step):
    pass
"""


class World:
    """Where each kind of file lies below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = root / "model"
        self.dit = self.model / "hunyuanimage2.1.safetensors"
        self.vae = self.model / "hunyuan_image_2.1_vae_fp16.safetensors"
        self.text_encoder = self.model / "qwen_2.5_vl_7b.safetensors"
        self.byt5 = self.model / "byt5_small_glyphxl_fp16.safetensors"
        self.tokenizer = self.model / "tokenizer.json"
        self.dataset = root / "set" / "data.toml"
        self.run = root / "run"
        self.loras = root / "loras"

    @property
    def encoders(self) -> list[str]:
        return [
            *("--text_encoder", str(self.text_encoder), "--byt5", str(self.byt5)),
            *("--text_encoder_batch_size", "1"),
        ]

    @property
    def renders(self) -> list[str]:
        """Options of a picture that costs next to nothing."""
        return [
            *("--dit", str(self.dit), "--vae", str(self.vae), *self.encoders[:4]),
            *"--image_size 64 64 --infer_steps 1 --guidance_scale 1 --mixed_precision no --device cpu".split(),
        ]

    @property
    def trains(self) -> list[str]:
        return [
            *("train", "--dit", str(self.dit)),
            *"--max_train_steps 1 --seed 7 --network_dim 2 --network_alpha 2 --learning_rate 1e-3".split(),
            *"--mixed_precision no --device cpu".split(),
        ]


def make_world(root: Path, run: Callable[[list[str]], None]) -> World:
    """Fills `root`; `run` runs a command line in a child and raises where it fails."""
    world = World(root)
    run(["make-tiny-model", str(world.model)])
    _write_dataset(world.dataset.parent)
    data = ["--dataset_config", str(world.dataset)]
    prompts = ["--sample_prompts", str(root / "prompts.txt")]
    for name, text in PROMPTS.items():
        (root / name).write_text(text, encoding="utf-8")
    run(["cache-latents", *data, "--vae", str(world.vae)])
    run(["cache-text", *data, *world.encoders, *prompts])
    two_steps = ["--max_train_steps", "2", "--save_every_n_steps", "1", "--save_state"]
    run([*world.trains, *data, "--output_dir", str(world.run), *two_steps])
    lora = world.run / "lora.safetensors"
    world.loras.mkdir()
    shutil.copy(lora, world.loras / "kohya.safetensors")
    for name in ("comfy", "diffusers", "peft"):
        run(["convert-comfy", str(lora), str(world.loras / f"{name}.safetensors"), "--to", name])
    peft = world.loras / "folder"
    peft.mkdir()
    shutil.copy(world.loras / "peft.safetensors", peft / "adapter_model.safetensors")
    (peft / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["linear1"]}),
        encoding="utf-8",
    )
    infer = [
        "infer",
        *world.renders,
        "--prompt",
        'a "GO" sign',
        "--seed",
        "3",
        "--output_type",
        "latent_images",
    ]
    run([*infer, "--lora_weight", str(lora), "--save_path", str(root / "picture.png")])
    run(["sample", *world.renders, *prompts, "--lora_weight", str(lora), "--output_dir", str(root / "sheet")])
    (root / "run.toml").write_text(RUN_FILE, encoding="utf-8")
    (root / "plugin.py").write_text(PLUGIN, encoding="utf-8")
    shutil.copy(GOLDEN / "lora_dpipe.safetensors", world.loras / "lora_dpipe.safetensors")
    _write_other_forms(world)
    _close_index(world.dataset.parent / "hyimg-cache" / "index.sqlite")
    return world


def _write_other_forms(world: World) -> None:
    """The model in shards, in fp8 and as a Hugging Face folder, and a LoHa."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(world.dit)
    names = sorted(weights)
    shards = world.root / "shards"
    shards.mkdir()
    places = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        name = f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"
        save_file({key: weights[key] for key in part}, shards / name)
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (shards / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps(index), encoding="utf-8"
    )

    fp8 = dict(weights)
    for name in names:
        if "_blocks." in name and name.endswith(".weight") and weights[name].ndim == 2:
            scale = weights[name].float().abs().max() / 448
            fp8[name] = (weights[name].float() / scale).to(torch.float8_e4m3fn)
            fp8[name.removesuffix("weight") + "weight_scale"] = scale
    save_file(fp8, world.model / "fp8.safetensors")

    qwen = world.root / "qwen"
    qwen.mkdir()
    # without its metadata, so that the folder's configuration is what tells the heads
    save_file(load_file(world.text_encoder), qwen / "model.safetensors")
    shutil.copy(world.tokenizer, qwen / "tokenizer.json")
    (qwen / "config.json").write_text(json.dumps(QWEN_CONFIG), encoding="utf-8")

    out, width = weights["single_blocks.0.linear2.weight"].shape
    module = "lora_unet_single_blocks_0_linear2"
    sides = {"w1_a": (out, 2), "w1_b": (2, width), "w2_a": (out, 2), "w2_b": (2, width)}
    loha = {f"{module}.hada_{side}": torch.full(shape, 0.01) for side, shape in sides.items()}
    save_file(loha | {f"{module}.alpha": torch.tensor(2.0)}, world.loras / "loha.safetensors")


def _close_index(path: Path) -> None:
    """Brings what stands in the journal into the database: the children that wrote it ended without closing it."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _write_dataset(folder: Path) -> None:
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number, (caption, (width, height)) in enumerate(zip(CAPTIONS, SIZES, strict=True)):
        pixels = np.random.default_rng(number).integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((width, height))
        picture.save(folder / "images" / f"{number}.png")
        picture.convert("L").save(folder / "masks" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text(caption, encoding="utf-8")
    (folder / "data.toml").write_text(DATASET, encoding="utf-8")

"""Every form in which the model's files are given away, through the commands: one picture, one set of cached texts.

The folders are written by the libraries whose forms they are: diffusers and transformers load the tiny model's weights
strictly and save them in shards.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hyimg.checkpoints.architecture import DIT_TINY, VAE_TINY
from hyimg.checkpoints.names import dit_key_map, vae_key_map
from hyimg.cli.app import run
from hyimg.encoders.tiny import TINY_BYT5, TINY_QWEN
from hyimg.stages.make_tiny_model import ModelFolder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def diffusers_transformer(model: ModelFolder, rename, folder: Path) -> None:
    from diffusers import HunyuanImageTransformer2DModel

    arch = DIT_TINY
    theirs = HunyuanImageTransformer2DModel(
        in_channels=arch.latent_channels,
        out_channels=arch.latent_channels,
        num_attention_heads=arch.heads,
        attention_head_dim=arch.head_dim,
        num_layers=arch.num_double,
        num_single_layers=arch.num_single,
        num_refiner_layers=arch.refiner_depth,
        text_embed_dim=arch.text_dim,
        text_embed_2_dim=arch.byt5_dim,
        rope_axes_dim=(16, 16),
    ).bfloat16()
    # diffusers fixes the hidden width of its byT5 projection
    state = theirs.state_dict()
    ours = load_file(model.dit)
    key_map = dit_key_map(list(state))
    with torch.no_grad():
        for index, name in ((1, "fc1"), (2, "fc2"), (3, "fc3")):
            weight = ours[f"byt5_in.{name}.weight"]
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
            setattr(theirs.context_embedder_2, f"linear_{index}", linear)
    state = theirs.state_dict()
    theirs.load_state_dict(rename(ours, key_map, state), strict=True)
    theirs.save_pretrained(folder, max_shard_size="300KB")


def diffusers_vae(model: ModelFolder, rename, folder: Path) -> None:
    from diffusers import AutoencoderKLHunyuanImage

    theirs = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=VAE_TINY.latent_channels,
        block_out_channels=VAE_TINY.channels,
        layers_per_block=VAE_TINY.layers_per_block,
        spatial_compression_ratio=32,
        sample_size=384,
    ).half()
    state = theirs.state_dict()
    theirs.load_state_dict(rename(load_file(model.vae), vae_key_map(list(state)), state), strict=True)
    theirs.save_pretrained(folder)


def huggingface_qwen(model: ModelFolder, folder: Path, *, tied: bool) -> None:
    """All of Qwen2.5-VL, with a small visual tower of its own."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    arch = TINY_QWEN
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": arch.hidden,
            "num_hidden_layers": arch.num_layers,
            "num_attention_heads": arch.num_heads,
            "num_key_value_heads": arch.num_kv_heads,
            "intermediate_size": arch.intermediate,
            "vocab_size": arch.vocab,
            "bos_token_id": None,
            "eos_token_id": None,
            "tie_word_embeddings": tied,
            "rope_scaling": {"type": "default", "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": arch.hidden,
        },
        tie_word_embeddings=tied,
    )
    theirs = Qwen2_5_VLForConditionalGeneration(config).bfloat16()
    ours = load_file(model.text_encoder)
    language = {
        name.removeprefix("model."): weight for name, weight in ours.items() if name.startswith("model.")
    }
    theirs.model.language_model.load_state_dict(language, strict=True)
    theirs.save_pretrained(folder, max_shard_size="200KB")


def huggingface_byt5(model: ModelFolder, folder: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    arch = TINY_BYT5
    theirs = T5EncoderModel(
        T5Config(
            vocab_size=arch.vocab,
            d_model=arch.d_model,
            d_kv=arch.head_dim,
            d_ff=arch.d_ff,
            num_layers=arch.num_layers,
            num_heads=arch.num_heads,
            feed_forward_proj="gated-gelu",
        )
    ).half()
    ours = load_file(model.byt5)
    theirs.load_state_dict(ours | {"encoder.embed_tokens.weight": ours["shared.weight"]}, strict=True)
    theirs.save_pretrained(folder, max_shard_size="50KB")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, model, rename) -> Path:
    """The tiny model as a diffusers pipeline, each part in shards or as its library saves it."""
    for package in ("diffusers", "transformers"):
        pytest.importorskip(package)
    root = tmp_path_factory.mktemp("pipeline")
    diffusers_transformer(model, rename, root / "transformer")
    diffusers_vae(model, rename, root / "vae")
    huggingface_qwen(model, root / "text_encoder", tied=False)
    huggingface_byt5(model, root / "text_encoder_2")
    (root / "tokenizer").mkdir()
    shutil.copy(model.tokenizer, root / "tokenizer")
    (root / "model_index.json").write_text('{"_class_name": "HunyuanImagePipeline"}')
    return root


@pytest.fixture(scope="module")
def forms(tmp_path_factory, model, pipeline, rename, golden) -> dict[str, dict[str, Path]]:
    """For each form, the options that take its files in place of the tiny model's own."""
    folder = tmp_path_factory.mktemp("forms")
    rows = json.loads((golden / "keymap.json").read_text())["weights"]
    comfyui = {row["original"]: row["comfyui"] for row in rows}
    dit, vae = load_file(model.dit), load_file(model.vae)
    qwen, byt5 = load_file(model.text_encoder), load_file(model.byt5)
    meta = {"meta": json.dumps({"config": {"hidden": TINY_QWEN.hidden, "heads": TINY_QWEN.num_heads}})}

    def write(name: str, tensors: dict[str, torch.Tensor], **kwargs) -> Path:
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name, **kwargs)
        return folder / name

    shutil.copy(model.tokenizer, folder)
    language = {name: weight for name, weight in qwen.items() if not name.startswith(("visual.", "lm_head"))}
    newer = {f"model.language_{name}": weight for name, weight in language.items()}
    table = byt5.pop("shared.weight")
    huggingface_qwen(model, folder / "tied", tied=True)
    shutil.copy(model.tokenizer, folder / "tied")
    return {
        "ComfyUI DiT": {"dit": write("comfyui.safetensors", {comfyui[k]: v for k, v in dit.items()})},
        "ComfyUI DiT, prefix": {
            "dit": write(
                "prefix.safetensors", {f"model.diffusion_model.{comfyui[k]}": v for k, v in dit.items()}
            )
        },
        "original DiT, prefix": {
            "dit": write("original.safetensors", {f"model.diffusion_model.{k}": v for k, v in dit.items()})
        },
        "diffusers DiT": {"dit": pipeline / "transformer"},
        "diffusers VAE": {"vae": pipeline / "vae"},
        "VAE with prefix": {"vae": write("vae.safetensors", {f"vae.{k}": v for k, v in vae.items()})},
        "Hugging Face Qwen": {"text_encoder": pipeline / "text_encoder"},
        "Hugging Face Qwen, tied": {"text_encoder": folder / "tied"},
        "Qwen without eyes": {"text_encoder": write("text.safetensors", language, metadata=meta)},
        "Qwen, newer names": {
            "text_encoder": write(
                "newer.safetensors",
                newer,
                metadata=meta,
            )
        },
        "Hugging Face byT5": {"byt5": pipeline / "text_encoder_2"},
        "byT5, tied table": {
            "byt5": write("tied.safetensors", byt5 | {"encoder.embed_tokens.weight": table})
        },
        "byT5, both tables": {
            "byt5": write(
                "both.safetensors",
                byt5 | {"encoder.embed_tokens.weight": table.clone(), "shared.weight": table},
            )
        },
        "pipeline": dict.fromkeys(("dit", "vae", "text_encoder", "byt5"), pipeline),
    }


FORMS = (
    *("ComfyUI DiT", "ComfyUI DiT, prefix", "original DiT, prefix", "diffusers DiT"),
    *("diffusers VAE", "VAE with prefix"),
    *("Hugging Face Qwen", "Hugging Face Qwen, tied", "Qwen without eyes", "Qwen, newer names"),
    *("Hugging Face byT5", "byT5, tied table", "byT5, both tables", "pipeline"),
)


def render_command(model: ModelFolder, files: dict[str, Path], path: Path) -> list[str]:
    options = [word for name, file in (model.files() | files).items() for word in (f"--{name}", str(file))]
    small = "--image_size 64 96 --infer_steps 2 --seed 3 --mixed_precision no --device cpu".split()
    return ["infer", *options, *small, "--prompt", 'a sign with "GO"', "--save_path", str(path)]


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def own_picture(model, tmp_path_factory) -> np.ndarray:
    path = tmp_path_factory.mktemp("own") / "own.png"
    assert run(render_command(model, {}, path)) == 0
    return pixels_of(path)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_renders_the_same_picture(hyimg, model, forms, own_picture, tmp_path, form):
    code, _, err = hyimg(*render_command(model, forms[form], tmp_path / "picture.png"))
    assert code == 0, err
    assert np.array_equal(pixels_of(tmp_path / "picture.png"), own_picture)
    if form == "pipeline":
        for option, part in (("dit", "transformer"), ("byt5", "text_encoder_2"), ("vae", "vae")):
            assert f"note: `--{option}`: `{forms[form][option]}` is a diffusers pipeline" in err
            assert f"is a diffusers pipeline; its `{part}` is read" in err


def test_other_weights_in_any_of_the_files_render_another_picture(hyimg, model, own_picture, tmp_path):
    """That the pictures above are equal says something of each file."""
    assert hyimg("make-tiny-model", tmp_path / "other", "--seed", "1")[0] == 0
    for option, file in ModelFolder(tmp_path / "other").files().items():
        path = tmp_path / f"{option}.png"
        assert hyimg(*render_command(model, {option: file}, path))[0] == 0
        assert not np.array_equal(pixels_of(path), own_picture), option


def cached(folder: Path) -> list[bytes]:
    """What the entries of a cache hold, whatever they are named."""
    return sorted(
        b"".join(name.encode() + tensor.view(torch.uint8).numpy().tobytes() for name, tensor in sorted(entry))
        for entry in (load_file(path).items() for path in folder.glob("*/*/*/*.safetensors"))
    )


@pytest.mark.parametrize("stage", ["text", "latents"])
def test_folders_fill_the_caches_with_the_same_bytes(hyimg, fill, pipeline, cached_dataset, tmp_path, stage):
    assert hyimg(*fill(stage, cached_dataset, "--cache_dir", tmp_path / "files"))[0] == 0
    parts = {"vae": pipeline} if stage == "latents" else {"text_encoder": pipeline, "byt5": pipeline}
    options = [word for name, root in parts.items() for word in (f"--{name}", root)]
    code, _, err = hyimg(*fill(stage, cached_dataset, "--cache_dir", tmp_path / "folders", *options))
    assert code == 0, err
    assert len(cached(tmp_path / "files")) == (5 if stage == "latents" else 6)
    assert cached(tmp_path / "folders") == cached(tmp_path / "files")


def test_training_on_a_pipeline_s_transformer_ends_in_the_same_weights(
    hyimg, pipeline, cached_dataset, tmp_path
):
    options = [
        "--dataset_config",
        cached_dataset,
        *"--max_train_steps 2 --seed 1 --learning_rate 1e-2".split(),
    ]
    for name, dit in (("file", "{dit}"), ("folder", pipeline)):
        code, _, err = hyimg("train", "--dit", dit, *options, "--output_dir", tmp_path / name)
        assert code == 0, err
    ours, theirs = (load_file(tmp_path / name / "lora.safetensors") for name in ("file", "folder"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_pipeline_without_a_part_says_which(hyimg, model, pipeline, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    shutil.copy(pipeline / "model_index.json", root)
    code, out, err = hyimg(*render_command(model, {"vae": root, "dit": root}, tmp_path / "x.png"))
    assert (code, out) == (2, "")
    assert f"`--dit`: there is no file `{root / 'transformer'}`" in err
    assert f"`--vae`: there is no file `{root / 'vae'}`" in err

"""Kinds of files with weights: LoRA files of every layout, and the models' own."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from tests.robustness import mutations as m
from tests.robustness.safetensors_mutations import damage_safetensors
from tests.robustness.setting import Setting, kind

# ---- LoRA files


def _lora_command(s: Setting, lora: Path) -> None:
    is_json = s.rng.random() < 0.3
    target = s.out / "b.safetensors"
    format = s.rng.choice(["comfy", "kohya", "diffusers", "peft"])
    s.one_of(
        lambda: s.runs("check", lora, *["--json"] * is_json, is_json=is_json),
        lambda: s.runs("check", lora, "--fp8", "--dit", s.world.dit, "--device", "cpu"),
        lambda: s.runs(
            "convert-comfy", lora, target, "--to", format, *s.rng.choice([[], ["--allow_partial"]])
        ),
        lambda: s.runs("convert-comfy", lora, target, "--max_rank", 1),
        lambda: s.runs("merge", lora, s.world.run / "lora.safetensors", "-o", target, "--to", format),
        lambda: s.infer("--lora_weight", lora, "--lora_mode", s.rng.choice(["live", "merge"])),
        lambda: s.train(s.dataset(), "--network_weights", lora, *s.rng.choice([[], ["--dim_from_weights"]])),
    )


def _lora_kind(name: str) -> None:
    @kind(f"LoRA, {name}")
    def _(s: Setting) -> None:
        lora = s.copy(s.world.loras / f"{name}.safetensors")
        s.damage(lora, damage_safetensors)
        _lora_command(s, lora)


for _name in ("kohya", "comfy", "diffusers", "peft", "loha", "lora_dpipe"):
    _lora_kind(_name)


@kind("LoRA, PEFT folder")
def _(s: Setting) -> None:
    folder = s.copy(s.world.loras / "folder")
    if s.rng.random() < 0.7:
        s.damage(folder / "adapter_config.json", m.damage_json)
    else:
        s.damage(folder / "adapter_model.safetensors", damage_safetensors)
    _lora_command(s, folder)


# ---- model files


def _with_dit(s: Setting, dit: Path) -> None:
    lora = s.world.run / "lora.safetensors"
    s.one_of(
        lambda: s.runs("inspect-modules", "--dit", dit),
        lambda: s.infer("--dit", dit),
        lambda: s.train(s.dataset(), "--dit", dit),
        lambda: s.runs("check", lora, "--fp8", "--dit", dit, "--device", "cpu"),
        lambda: s.infer("--dit", dit, "--lora_weight", lora, "--save_merged_model", s.out / "m.safetensors"),
    )


@kind("DiT")
def _(s: Setting) -> None:
    dit = s.copy(s.world.dit)
    s.damage(dit, damage_safetensors)
    _with_dit(s, dit)


@kind("DiT in fp8")
def _(s: Setting) -> None:
    dit = s.copy(s.world.model / "fp8.safetensors")
    s.damage(dit, damage_safetensors)
    _with_dit(s, dit)


@kind("DiT in shards")
def _(s: Setting) -> None:
    folder = s.copy(s.world.root / "shards")
    files = sorted(folder.iterdir())
    index = [path for path in files if path.suffix == ".json"]
    path = s.rng.choice([*index * 3, *files])
    s.damage(path, m.damage_json if path.suffix == ".json" else damage_safetensors)
    _with_dit(s, folder)


@kind("VAE")
def _(s: Setting) -> None:
    vae = s.copy(s.world.vae)
    s.damage(vae, damage_safetensors)
    s.one_of(
        lambda: s.cache_latents(s.dataset(), vae=vae),
        lambda: s.infer("--vae", vae),
        lambda: s.report(s.dataset(), "--vae", vae),
    )


def _with_encoders(s: Setting, **files: Path) -> None:
    world = s.world
    paths = {"text_encoder": world.text_encoder, "byt5": world.byt5, **files}
    flags: list[object] = [word for name, path in paths.items() for word in (f"--{name}", path)]
    s.one_of(
        lambda: s.cache_text(s.dataset(), encoders=flags),
        lambda: s.report(s.dataset(), *flags),
        lambda: s.infer(*flags),
    )


@kind("text encoder")
def _(s: Setting) -> None:
    s.copy(s.world.tokenizer)
    path = s.copy(s.world.text_encoder)
    s.damage(path, damage_safetensors)
    _with_encoders(s, text_encoder=path)


@kind("byT5")
def _(s: Setting) -> None:
    path = s.copy(s.world.byt5)
    s.damage(path, damage_safetensors)
    _with_encoders(s, byt5=path)


@kind("text encoder folder")
def _(s: Setting) -> None:
    folder = s.copy(s.world.root / "qwen")
    path = s.rng.choice([*[folder / "config.json"] * 3, *sorted(folder.iterdir())])
    s.damage(path, m.damage_json if path.suffix == ".json" else damage_safetensors)
    _with_encoders(s, text_encoder=folder)


@kind("tokenizer")
def _(s: Setting) -> None:
    path = s.copy(s.world.tokenizer)
    form = s.rng.choice(["tokenizer.json", "tokenizer.json", "vocab.json", "tiktoken"])
    content = json.loads(path.read_bytes())["model"]
    if form == "tiktoken":
        path.unlink()
        path = s.work / "qwen.tiktoken"
        path.write_text(_tiktoken(content["vocab"]), encoding="ascii")
    elif form == "vocab.json":
        path.unlink()
        path = s.work / "vocab.json"
        path.write_text(json.dumps(content["vocab"]), encoding="utf-8")
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in content["merges"]]
        path.with_name("merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
        path = s.rng.choice([path, path.with_name("merges.txt")])
    s.damage(path, m.damage_json if path.suffix == ".json" else s.rng.choice([m.damage_text, m.damage_bytes]))
    _with_encoders(s, tokenizer=s.work)


def _tiktoken(vocab: dict[str, int]) -> str:
    from hyimg.encoders.tokenizer import byte_alphabet

    values = {character: byte for byte, character in enumerate(byte_alphabet())}
    tokens = {rank: token for token, rank in vocab.items() if all(character in values for character in token)}
    encoded = {
        rank: base64.b64encode(bytes(map(values.__getitem__, tokens[rank]))).decode()
        for rank in sorted(tokens)
    }
    return "".join(f"{token} {rank}\n" for rank, token in encoded.items())

"""Kinds of files that users and hyimg write, but for weights: for each, damage and a command that reads it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.robustness import mutations as m
from tests.robustness.picture_mutations import damage_mask, damage_picture, damage_png_settings
from tests.robustness.safetensors_mutations import damage_safetensors
from tests.robustness.setting import Setting, entries, kind

# ---- what users write


@kind("dataset file")
def _(s: Setting) -> None:
    data = s.dataset()
    s.damage(data, m.damage_toml)
    s.any_stage(data)


@kind("dataset file, JSON")
def _(s: Setting) -> None:
    import tomli

    data = s.dataset()
    text = json.dumps(tomli.loads(data.read_text(encoding="utf-8")))
    data = data.with_suffix(".json")
    data.write_text(text, encoding="utf-8")
    s.damage(data, m.damage_json)
    s.any_stage(data)


@kind("run file")
def _(s: Setting) -> None:
    file = s.copy(s.world.root / "run.toml")
    s.damage(file, m.damage_toml)
    s.one_of(
        lambda: s.train(s.dataset(), "--config_file", file),
        lambda: s.train(s.dataset(), "--config_file", file, "--dry_run"),
        lambda: s.infer("--config_file", file),
        lambda: s.cache_text(s.dataset(), "--config_file", file),
    )


@kind("captions")
def _(s: Setting) -> None:
    data = s.dataset()
    path = s.rng.choice(sorted((data.parent / "images").glob("*.txt")))
    s.damage(path, s.rng.choice([m.damage_text, m.damage_text, m.damage_bytes]))
    if s.rng.random() < 0.3:
        data.write_text(
            data.read_text(encoding="utf-8").replace("shuffle_caption = false", "shuffle_caption = true")
        )
    s.one_of(lambda: s.report(data), lambda: s.cache_text(data), lambda: s.train(data))


@kind("metadata file, JSON")
def _(s: Setting) -> None:
    data = s.dataset()
    content = {f"{n}.png": {"caption": f"a picture {n}", "tags": "a, b"} for n in range(3)}
    path = data.parent / "meta.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    _with_metadata_file(data, "meta.json")
    s.damage(path, m.damage_json)
    s.one_of(lambda: s.report(data), lambda: s.cache_text(data))


@kind("metadata file, JSON lines")
def _(s: Setting) -> None:
    data = s.dataset()
    named = s.rng.random() < 0.5
    path = data.parent / ("meta.jsonl" if named else "images/metadata.jsonl")
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"a picture {n}", "width": 64}) for n in range(3)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if named:
        _with_metadata_file(data, "meta.jsonl")
    s.damage(path, m.damage_json_lines)
    s.one_of(lambda: s.report(data), lambda: s.cache_text(data))


def _with_metadata_file(data: Path, name: str) -> None:
    text = data.read_text(encoding="utf-8")
    data.write_text(
        text.replace('  image_dir = "images"', f'  image_dir = "images"\n  metadata_file = "{name}"')
    )


@kind("prompt file")
def _(s: Setting) -> None:
    name = s.rng.choice(["prompts.txt", "prompts.toml", "prompts.json"])
    file = s.copy(s.world.root / name)
    s.damage(file, {".txt": m.damage_text, ".toml": m.damage_toml, ".json": m.damage_json}[file.suffix])
    s.one_of(
        lambda: s.infer("--from_file", file, "--save_path", s.out, prompt=False),
        lambda: s.runs("sample", *s.world.renders, "--sample_prompts", file, "--output_dir", s.out),
        lambda: s.cache_text(s.dataset(), "--sample_prompts", file),
    )


@kind("plugin")
def _(s: Setting) -> None:
    file = s.copy(s.world.root / "plugin.py")
    s.damage(file, m.damage_python)
    s.case.runs_code = True
    s.one_of(
        lambda: s.runs("plugins", "--plugin", file),
        lambda: s.report(s.dataset(), "--plugin", file),
        lambda: s.train(s.dataset(), "--plugin", file),
    )


# ---- pictures


@kind("pictures")
def _(s: Setting) -> None:
    data = s.dataset(caches=False)
    s.damage(data.parent / "images" / s.rng.choice(["0.png", "1.png"]), damage_picture, times=(1,))
    skip = s.rng.choice([[], [], ["--on_bad_image", "skip"]])
    s.one_of(
        lambda: s.report(data, *skip, *s.rng.choice([[], ["--contact_sheet", s.out / "sheet.png"]])),
        lambda: s.cache_latents(data, *skip),
    )


@kind("masks")
def _(s: Setting) -> None:
    data = s.dataset()
    s.damage(data.parent / "masks" / "0.png", damage_mask, times=(1,))
    s.one_of(lambda: s.report(data), lambda: s.cache_latents(data), lambda: s.train(data))


@kind("picture with settings")
def _(s: Setting) -> None:
    picture = s.copy(s.world.root / "picture.png")
    s.copy(s.world.run / "lora.safetensors")  # that it was made with
    s.damage(picture, damage_png_settings, times=(1,))
    s.infer("--from_image", picture, prompt=False)


@kind("contact sheet's pictures")
def _(s: Setting) -> None:
    folder = s.copy(s.world.root / "sheet", "out")
    s.damage(s.rng.choice(sorted(folder.glob("*.png"))), damage_png_settings, times=(1,))
    prompts = s.world.root / "prompts.txt"
    lora = s.world.run / "lora.safetensors"
    s.runs(
        "sample", *s.world.renders, "--sample_prompts", prompts, "--lora_weight", lora, "--output_dir", s.out
    )


@kind("saved latent")
def _(s: Setting) -> None:
    latent = s.copy(s.world.root / "picture.safetensors")
    s.damage(latent, damage_safetensors)
    s.runs(
        "infer",
        "--vae",
        s.world.vae,
        "--latent_path",
        latent,
        "--device",
        "cpu",
        "--save_path",
        s.out / "a.png",
    )


# ---- what hyimg writes


@kind("cache entries, latents")
def _(s: Setting) -> None:
    data = s.dataset()
    s.damage(s.rng.choice(entries(data.parent, "latents")), damage_safetensors)
    upkeep = s.rng.choice([[], ["--verify"], ["--prune"]])
    s.one_of(lambda: s.train(data), lambda: s.cache_latents(data, *upkeep), lambda: s.report(data))


@kind("cache entries, text")
def _(s: Setting) -> None:
    data = s.dataset()
    s.damage(s.rng.choice(entries(data.parent, "text")), damage_safetensors)
    upkeep = s.rng.choice([[], ["--verify"], ["--prune"]])
    s.one_of(
        lambda: s.train(data),
        lambda: s.cache_text(data, *upkeep),
        lambda: s.runs(
            *(
                "sample",
                *s.world.renders,
                "--sample_prompts",
                s.world.root / "prompts.txt",
                "--output_dir",
                s.out,
            ),
            *("--cache_dir", data.parent / "hyimg-cache"),
            writes=("out", "set/hyimg-cache"),
        ),
    )


@kind("cache's model.json")
def _(s: Setting) -> None:
    data = s.dataset()
    files = sorted((data.parent / "hyimg-cache").glob("*/*/model.json"))
    s.damage(s.rng.choice(files), m.damage_json)
    s.any_stage(data)


@kind("cache index")
def _(s: Setting) -> None:
    data = s.dataset()
    s.damage(data.parent / "hyimg-cache" / "index.sqlite", m.damage_sqlite)
    s.any_stage(data)


def _resumes(s: Setting) -> None:
    source = s.rng.choice([["--resume", "latest"], ["--resume", s.out / "lora-state"]])
    s.train(
        s.dataset(), "--max_train_steps", 3, *source, *s.rng.choice([[], ["--overwrite"], ["--resume_force"]])
    )


@kind("state's manifest")
def _(s: Setting) -> None:
    run = s.copy(s.world.run, "out")
    files = sorted(run.glob("*-state/*.json"))
    s.damage(s.rng.choice(files), m.damage_json)
    _resumes(s)


@kind("state's tensors")
def _(s: Setting) -> None:
    run = s.copy(s.world.run, "out")
    s.damage(s.rng.choice(sorted(run.glob("*-state/*.safetensors"))), damage_safetensors)
    _resumes(s)


@kind("run folder's files")
def _(s: Setting) -> None:
    run = s.copy(s.world.run, "out")
    by_suffix = {".json": m.damage_json, ".jsonl": m.damage_json_lines, ".toml": m.damage_toml}
    files = [path for path in sorted(run.iterdir()) if path.suffix in by_suffix]
    path = s.rng.choice(files)
    s.damage(path, by_suffix[path.suffix])
    prompts = s.world.root / "prompts.txt"
    writes = ("sheet",)
    s.one_of(
        lambda: _resumes(s),
        lambda: s.train(s.dataset(), "--overwrite"),
        lambda: s.runs(
            *("sample", *s.world.renders, "--sample_prompts", prompts, "--run", run),
            *("--output_dir", s.work / "sheet"),
            writes=writes,
        ),
        lambda: s.train(s.dataset(), "--config", path),
    )


@kind("accelerate's settings")
def _(s: Setting) -> None:
    """`accelerate launch` hands its configuration file on as environment variables."""
    names = (
        *(
            "ACCELERATE_USE_DEEPSPEED",
            "ACCELERATE_USE_FSDP",
            "ACCELERATE_MIXED_PRECISION",
            "ACCELERATE_DYNAMO_BACKEND",
        ),
        *(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "WORLD_SIZE",
            "RANK",
            "LOCAL_RANK",
            "MASTER_PORT",
            "MASTER_ADDR",
        ),
        *(
            "OMP_NUM_THREADS",
            "HYIMG_LOAD_PLUGINS",
            "HF_HOME",
            "HF_TOKEN",
            "CUDA_VISIBLE_DEVICES",
            "COLUMNS",
            "LANG",
        ),
    )
    values = [text for text in m.NASTY_TEXTS if "\0" not in text and "/dev" not in text]
    name = s.rng.choice(names)
    value = s.rng.choice([*values, "0", "1", "2", "true", "bf16"])
    s.case.environment = {name: value}
    s.case.words = f"{name}={value[:30]!r}"
    s.one_of(lambda: s.train(s.dataset()), lambda: s.report(s.dataset()), lambda: s.runs("plugins"))


@kind("demo's folder")
def _(s: Setting) -> None:
    """What stands where a demo is to begin; the demo itself takes minutes and is not started."""
    marker = s.out / "hyimg-demo.txt"
    s.out.mkdir()
    s.one_of(
        lambda: marker.mkdir(),
        lambda: marker.symlink_to("/dev/zero"),
        lambda: (s.out / "a\x1b[31m.txt").write_text("x"),
        lambda: marker.write_bytes(b"\xff\0"),
    )
    s.case.words = str(sorted(path.name for path in s.out.iterdir()))
    s.runs("demo", s.out, writes=())

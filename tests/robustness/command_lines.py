"""Command lines with odd values: every option of every command, by its declaration."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

from hyimg.config.command_table import COMMAND_TABLE, config_of
from hyimg.config.option import Option, all_options
from tests.robustness.mutations import NASTY_TEXTS
from tests.robustness.setting import Setting, kind

_WHOLE = (
    "0",
    "-1",
    "1",
    "2",
    "1.5",
    "1e9",
    "2147483648",
    "9223372036854775808",
    "18446744073709551616",
    "9" * 5000,
    "",
)
_WHOLE += (" ", "nan", "٣", "1_000", "0x10", "+1", "--", "50%", "True")
_NUMBERS = (
    *_WHOLE,
    "inf",
    "-inf",
    "1e400",
    "1e-400",
    "-0.0",
    "0.5",
    "1,5",
    "1e308",
    "-1e308",
    "0x1p3",
    "120%",
)
_TEXTS = (
    *(text for text in NASTY_TEXTS if "\0" not in text),
    "\udcff\udc80",
    "latest",
    "=",
    "a=",
    "=b",
    "-",
    "--seed",
)
# `/` and what is above the case's folder are left out: a user who names them as outputs gets them
_PATHS = (
    *(
        "missing",
        ".",
        "/dev/null",
        "/dev/full",
        "/dev/null/x",
        "pipe",
        "loop",
        "folder",
        "set/data.toml",
        "",
        " ",
        "-",
    ),
    *(
        "run.toml",
        "prompts.txt",
        "x" * 300,
        "a/" * 2000 + "b",
        "\x1b[31m.png",
        "\udcff.toml",
        "out/new/a.png",
        "file.py",
    ),
    *("out/new/a.safetensors", "set/images/0.png", "lora.safetensors", "https://example.org/a", "file/below"),
)
_ARGUMENTS = (
    *(
        "weight_decay=0.1",
        "lr=nan",
        "betas=(0.9,",
        "betas=(1,2)",
        "eps='",
        "a=b=c",
        "network_reg_dims=.*=2,(a+)+$=4",
    ),
    *(
        "loraplus_lr_ratio=nan",
        "rank_dropout=2",
        "dora=True",
        "network_reg_dims=((((((=1",
        "foreach=[[[[",
        "lr=" + "9" * 400,
    ),
    *(
        "module_dropout=0.5",
        "split_qkv=maybe",
        "network_reg_lrs=.*=-1",
        "verbose=" + "[" * 500,
        "__class__=1",
        "params=3",
    ),
)
# More of these is more work, which was asked for: only what is refused, or little
_WORK = {
    **dict.fromkeys(
        ("max_train_steps", "max_train_epochs", "infer_steps", "max_validation_steps"), ("1", "2")
    ),
    **dict.fromkeys(("max_data_loader_n_workers", "text_encoder_batch_size", "vae_batch_size"), ("0", "1")),
    **dict.fromkeys(
        ("train_batch_size", "gradient_accumulation_steps", "initial_epoch", "initial_step"), ("1", "2")
    ),
    "num_processes": ("0", "1"),
}
_REFUSED = ("-1", "nan", "", "1.5", "9" * 5000, "x", "\x1b[31m")
_SIZES = ("32", "64", "96", "0", "31", "-32", "3200000", "9223372036854775808", "nan", "")
# These start compilers, accounts, or a demo of two minutes
_SKIPPED = {"torch_compile", "wandb_api_key", "directory", "lora", "source", "loras"}


def _base(s: Setting, command: str) -> list[object]:
    world = s.world
    lora = s.copy(world.run / "lora.safetensors")
    lines: dict[str, list[object]] = {
        "dataset": ["set/data.toml", *world.encoders[:4]],
        "cache-latents": ["--dataset_config", "set/data.toml", "--vae", world.vae],
        "cache-text": ["--dataset_config", "set/data.toml", *world.encoders],
        "train": [*world.trains[1:], "--dataset_config", "set/data.toml", "--output_dir", "out"],
        "sample": [*world.renders, "--sample_prompts", "prompts.txt", "--output_dir", "out"],
        "infer": [*world.renders, "--prompt", "a cat", "--save_path", "out/a.png"],
        "convert-comfy": [lora, "out/b.safetensors"],
        "merge": [lora, world.loras / "comfy.safetensors", "-o", "out/b.safetensors"],
        "inspect-modules": ["--dit", world.dit],
        "check": [lora],
        "download-models": ["out"],
        "make-tiny-model": ["out"],
        "demo": ["folder"],
        "plugins": [],
    }
    return lines[command]


def _values(option: Option, rng: random.Random, *, is_odd: bool) -> list[str]:
    """What stands behind an option's flag."""
    if option.kind == "bool":
        return []
    count = option.count or (rng.choice([1, 1, 2, 3]) if option.many else 1)
    pool: Sequence[str]
    if not is_odd and (plausible := _plausible(option)):
        return [rng.choice(plausible) for _ in range(count)]
    count = max(0, count + rng.choice([0] * 10 + [1, -1]))
    if option.name == "image_size":
        pool = _SIZES
    elif option.name in _WORK:
        pool = (*_WORK[option.name], *_REFUSED)
    elif option.choices:
        pool = [c for c in option.choices if c not in ("wandb", "all", "full")] + [
            *_TEXTS[:9],
            "",
            "nothing",
        ]
    elif option.kind == "path" or option.text == "path" or option.name == "resume":
        pool = _PATHS
    elif option.name.endswith("_args"):
        pool = (*_ARGUMENTS, *_TEXTS)
    else:
        pool = {"int": _WHOLE, "float": _NUMBERS, "str": _TEXTS}[option.kind]
    return [rng.choice(pool) for _ in range(count)]


def _plausible(option: Option) -> Sequence[str]:
    """Values that are mostly taken, so that a line comes further than to its check."""
    if option.choices:
        return [choice for choice in option.choices if choice not in ("wandb", "all", "full")]
    if option.name == "image_size":
        return _SIZES[:3]
    if option.name in _WORK:
        return _WORK[option.name]
    numbers = [str(value) for value in (option.minimum, option.maximum) if value is not None]
    return {"int": ("1", "2", "3"), "float": ("0.5", "1", "0.01", *numbers)}.get(option.kind, ())


def _surroundings(s: Setting) -> None:
    """Files and other things that a path may name."""
    s.dataset()
    s.copy(s.world.root / "run.toml")
    s.copy(s.world.root / "prompts.txt")
    s.copy(s.world.root / "plugin.py", "file.py")
    os.mkfifo(s.work / "pipe")
    (s.work / "loop").symlink_to("loop")
    (s.work / "folder").mkdir()
    (s.work / "folder" / "kept.txt").write_text("kept", encoding="utf-8")
    (s.work / "file").write_bytes(b"\xff")


def _kind(command: str) -> None:
    @kind(f"hyimg {command}")
    def _(s: Setting) -> None:
        _surroundings(s)
        line = [str(word) for word in _base(s, command)]
        options = [option for option in all_options(config_of(command)) if option.name not in _SKIPPED]
        chosen = s.rng.sample(options, min(len(options), s.rng.choice([1, 1, 2, 4])))
        for number, option in enumerate(chosen):
            dashes = s.rng.choice([option.name] * 9 + [option.name.replace("_", "-"), option.name.upper()])
            # one odd value a line, so that the others take it further than to the first check
            is_odd = number == 0 and s.rng.random() < 0.8
            if not is_odd and option.kind != "bool" and not _plausible(option):
                continue
            values = _values(option, s.rng, is_odd=is_odd)
            if len(values) == 1 and s.rng.random() < 0.3:
                line.append(f"--{dashes}={values[0]}")
            else:
                line += [s.rng.choice([f"--{dashes}"] * 20 + [f"--no_{dashes}", f"--{dashes}=true"]), *values]
        odd = s.rng.random()
        if odd < 0.05 and command != "demo":
            line.insert(
                s.rng.randrange(len(line) + 1), s.rng.choice([*_TEXTS, "--", "--help", "--nothing", "-x"])
            )
        elif odd < 0.1 and len(line) > 1 and command != "demo":
            del line[s.rng.randrange(len(line))]
        s.case.words = " ".join(line)[-200:]
        s.runs(command, *line, writes=("out", "set/hyimg-cache"), is_json="--json" in line)
        s.case.runs_code = "--plugin" in " ".join(line)
        s.case.makes_files_anywhere = True


for _command in COMMAND_TABLE:
    _kind(_command)

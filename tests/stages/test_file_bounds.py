"""Every file that a command reads, as a pipe, a device or 100 GB of nothing: refused by name, without being read."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="needs named pipes, /dev/zero and address-space limits"
)

TRAIN = ["train", "--dit", "{dit}", "--dataset_config", "{dataset}", "--output_dir", "{folder}/out"]
INFER = ["infer", "--dit", "{dit}", "--vae", "{vae}", "--text_encoder", "{text_encoder}", "--byt5", "{byt5}"]
INFER += ["--image_size", "64", "64", "--save_path", "{folder}/a.png"]
CACHE_TEXT = ["cache-text", "--dataset_config", "{dataset}", "--byt5", "{byt5}"]

# What is given in place of the file named here, by the command line that reads it
COMMANDS = {
    "run.toml": ["train", "--config", "{bad}"],
    "data.toml": ["dataset", "--dataset_config", "{bad}"],
    "data.json": ["cache-latents", "--vae", "{vae}", "--dataset_config", "{bad}"],
    "keep.toml": ["cache-latents", "--vae", "{vae}", "--dataset_config", "{dataset}", "--prune", "--keep_for", "{bad}"],
    "samples.txt": [*CACHE_TEXT, "--text_encoder", "{text_encoder}", "--sample_prompts", "{bad}"],
    "prompts.txt": [*INFER, "--from_file", "{bad}"],
    "prompts.toml": [*INFER, "--from_file", "{bad}"],
    "prompts.json": [*INFER, "--from_file", "{bad}"],
    "picture.png": [*INFER, "--from_image", "{bad}"],
    "plugin.py": ["plugins", "--plugin", "{bad}"],
    "qwen.tiktoken": [*CACHE_TEXT, "--text_encoder", "{text_encoder}", "--tokenizer", "{bad}"],
    "dit.safetensors": [*TRAIN[:2], "{bad}", *TRAIN[3:]],
    "vae.safetensors": ["cache-latents", "--dataset_config", "{dataset}", "--vae", "{bad}"],
    "text_encoder.safetensors": [*CACHE_TEXT, "--text_encoder", "{bad}", "--tokenizer", "{tokenizer}"],
    "byt5.safetensors": [*CACHE_TEXT[:-1], "{bad}", "--text_encoder", "{text_encoder}"],
    "network.safetensors": [*TRAIN, "--network_weights", "{bad}"],
    "base.safetensors": [*TRAIN, "--base_weights", "{bad}"],
    "lora.safetensors": [*INFER, "--prompt", "x", "--lora_weight", "{bad}"],
    "latent.safetensors": ["infer", "--vae", "{vae}", "--latent_path", "{bad}", "--save_path", "{folder}/a.png"],
    "source.safetensors": ["convert-comfy", "{bad}", "{folder}/out.safetensors"],
    "checked.safetensors": ["check", "{bad}"],
}  # fmt: skip
DATASET = ["cache-latents", "--vae", "{vae}", "--dataset_config"]
# In place of a file in a folder: the command line that reads it, what is said of 100 GB, and of a pipe or a device
IN_FOLDERS = {
    "qwen/tokenizer.json": (
        [*CACHE_TEXT, "--text_encoder", "{text_encoder}", "--tokenizer", "{folder}/qwen"],
        "tokenizer.json` cannot be read: it is larger than 100.0 MB",
        "there is no Qwen tokenizer",
    ),
    "qwen/qwen.tiktoken": (
        [*CACHE_TEXT, "--text_encoder", "{text_encoder}", "--tokenizer", "{folder}/qwen"],
        "qwen.tiktoken` cannot be read: it is larger than 100.0 MB",
        "qwen.tiktoken` cannot be read: it is a",
    ),
    "qwen/model.safetensors.index.json": (
        [*CACHE_TEXT, "--tokenizer", "{tokenizer}", "--text_encoder", "{folder}/qwen"],
        "model.safetensors.index.json` cannot be read: it is larger than 100.0 MB",
        "model.safetensors.index.json` cannot be read: it is a",
    ),
    "peft/adapter_config.json": (
        ["check", "{folder}/peft"],
        "adapter_config.json` cannot be read: it is larger than 32.0 MB",
        "there is no `adapter_config.json`",
    ),
    "own/images/1.png": ([*DATASET, "{folder}/own/data.toml"], "1.png`: it is larger than 1.0 GB", "/1.txt`"),
    "own/images/1.txt": ([*DATASET, "{folder}/own/data.toml"], "1.txt`: it cannot be read: it is larger", "no caption"),
    "own/images/metadata.jsonl": ([*DATASET, "{folder}/own/data.toml"], "metadata.jsonl`: it is larger", ""),
    "own/names.jsonl": (
        [*DATASET, "{folder}/own/named.toml"],
        "names.jsonl`: it is larger than 500.0 MB",
        "`names.jsonl` is a device or a pipe",
    ),
}  # fmt: skip


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 10**11)


@pytest.fixture
def watchdog():
    """Ends a test that waits for a pipe, and refuses it the memory that /dev/zero would fill."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 30), limits[1]))

    def give_up(*_: object) -> None:
        raise AssertionError("the command reads and reads")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture
def given(hyimg, model, cached_dataset, tmp_path) -> Callable[..., tuple[int, str]]:
    """Runs a command line of the tables; (exit code, stderr)."""

    def call(arguments: list[str], bad: Path) -> tuple[int, str]:
        names = {"{bad}": str(bad), "{dataset}": str(cached_dataset), "{tokenizer}": str(model.tokenizer)}
        code, _, err = hyimg(*(names.get(a, a.replace("{folder}", str(tmp_path))) for a in arguments))
        return code, err

    return call


REASONS = {pipe: ("a pipe",), device: ("a device",), sparse: ("larger than", "not a safetensors file")}


@pytest.mark.parametrize("kind", REASONS)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_that_is_given(name, kind, given, tmp_path, watchdog):
    bad = tmp_path / name
    kind(bad)
    code, err = given(COMMANDS[name], bad)
    assert code == 2, err
    assert name in err
    assert any(reason in err for reason in REASONS[kind]), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", REASONS)
@pytest.mark.parametrize("name", IN_FOLDERS)
def test_a_file_in_a_folder(name, kind, given, own_dataset, tmp_path, watchdog):
    command, of_sparse, of_others = IN_FOLDERS[name]
    text = own_dataset.read_text(encoding="utf-8")
    (own_dataset.parent / "named.toml").write_text(
        text.replace('image_dir = "images"', 'metadata_file = "names.jsonl"')
    )
    for folder in ("qwen", "peft"):
        (tmp_path / folder).mkdir()
    module = "base_model.model.double_blocks.0.img_attn_qkv"
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 8), f"{module}.lora_B.weight": torch.ones(24, 2)}
    save_file(tensors, tmp_path / "peft/adapter_model.safetensors")
    bad = tmp_path / name
    bad.unlink(missing_ok=True)
    kind(bad)
    code, err = given(command, bad)
    words = of_sparse if kind is sparse else of_others
    assert words in err, err
    assert code in ((2,) if kind is sparse else (0, 2))


@pytest.mark.parametrize("kind", REASONS)
def test_what_is_in_place_of_a_cache_entry_is_replaced(kind, hyimg, fill, own_dataset, entries, watchdog):
    entry = entries(own_dataset, "latents")[0]
    whole = entry.read_bytes()
    entry.unlink()
    kind(entry)
    code, _, err = hyimg(*fill("latents", own_dataset))
    assert code == 0, err
    assert entry.read_bytes() == whole
    assert entry.is_file()
    assert not entry.is_symlink()

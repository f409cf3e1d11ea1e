"""JSON that Python's reader fails on, or reads and other code fails on, wherever a command reads JSON."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

DOCUMENTS = {
    "deep": "[" * 100_000 + "]" * 100_000,
    "twice": '{"a": 1, "a": 2}',
    "half a character": r'{"a": "\ud800"}',
    "a list": "[1]",
}
RENDER = ["infer", "--dit", "{dit}", "--vae", "{vae}", "--text_encoder", "{text_encoder}", "--byt5", "{byt5}"]
RENDER += ["--image_size", "64", "64", "--infer_steps", "1", "--prompt", "x"]
SAVE = ["--save_path", "not-written.png"]
TRAIN = ["train", "--dit", "{dit}", "--max_train_steps", "1", "--network_dim", "2", "--mixed_precision", "no"]


def _lora(trained, path, metadata):
    state = {key: value for key, value in load_file(trained).items() if not key.endswith(".alpha")}
    save_file(state, path, metadata=metadata)
    return path


def lora_configuration(text, place):
    metadata = {"lora_adapter_metadata": text}
    return ["check", _lora(place.lora, place.folder / "lora.safetensors", metadata)]


def peft_folder(text, place):
    (place.folder / "peft").mkdir()
    _lora(place.lora, place.folder / "peft" / "adapter_model.safetensors", None)
    (place.folder / "peft" / "adapter_config.json").write_text(text)
    return ["check", place.folder / "peft"]


def network_arguments(text, place):
    path = place.folder / "lora.safetensors"
    save_file(load_file(place.lora), path, metadata={"ss_network_args": text, "ss_network_alpha": "1"})
    return ["check", path]


def header(text, place):
    path = place.folder / "lora.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode())
    return ["check", path]


def cache_entry(text, place):
    entry = next(iter(sorted((place.dataset.parent / "hyimg-cache" / "latents").glob("*/*/*.safetensors"))))
    data = entry.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8:start])["__metadata__"] | {"checksum": "0" * 64}
    forged = f'{{"__metadata__":{json.dumps(metadata, separators=(",", ":"))},"mean":{text}}}'
    whole = len(forged).to_bytes(8, "little") + forged.encode() + data[start:]
    checksum = hashlib.sha256(whole).hexdigest()
    entry.write_bytes(whole.replace(b"0" * 64, checksum.encode(), 1))
    return [*TRAIN, "--dataset_config", place.dataset, "--output_dir", place.folder / "run"]


def model_json(text, place):
    for path in (place.dataset.parent / "hyimg-cache").glob("*/*/model.json"):
        path.write_text(text)
    return [*TRAIN, "--dataset_config", place.dataset, "--output_dir", place.folder / "run"]


def _state(place, **files):
    """A folder that is a state but for what is in these files."""
    state = place.folder / "lora-state"
    state.mkdir()
    entries = {}
    for name, text in {"metrics.jsonl": "", **files}.items():
        (state / name).write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        entries[name] = {"file": name, "bytes": len(text), "sha256": digest}
    (state / "manifest.json").write_text(json.dumps({"format": 1, "files": entries}))
    resume = ["--resume", state, "--dataset_config", place.dataset]
    return state, [*TRAIN, *resume, "--output_dir", place.folder / "run"]


def manifest(text, place):
    state, command = _state(place)
    (state / "manifest.json").write_text(text)
    return command


def state_document(text, place):
    return _state(place, **{"state.json": text})[1]


def tokenizer(text, place):
    path = place.folder / "tokenizer.json"
    path.write_text(text)
    return ["dataset", place.dataset, "--tokenizer", path]


def text_encoder(text, place):
    path = place.folder / "qwen.safetensors"
    save_file(load_file(place.model.text_encoder), path, metadata={"meta": text})
    return [*RENDER, "--text_encoder", path, "--tokenizer", place.model.directory, *SAVE]


def text_encoder_folder(text, place):
    folder = place.folder / "qwen"
    folder.mkdir()
    save_file(load_file(place.model.text_encoder), folder / "model.safetensors")
    (folder / "config.json").write_text(text)
    return [*RENDER, "--text_encoder", folder, "--tokenizer", place.model.directory, *SAVE]


def index_of_shards(text, place):
    folder = place.folder / "shards"
    folder.mkdir()
    shutil.copy(place.model.dit, folder / "one.safetensors")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    return ["inspect-modules", "--dit", folder]


def metadata_file(text, place):
    path = place.dataset.parent / "captions.json"
    path.write_text(text)
    subset = "[[datasets.subsets]]\nimage_dir = 'images'\nmetadata_file = 'captions.json'\n"
    place.dataset.write_text(f"[[datasets]]\nresolution = 64\n{subset}")
    return ["dataset", place.dataset, "--tokenizer", place.model.directory]


def run_file(text, place):
    path = place.folder / "run.json"
    path.write_text(text)
    return ["train", "--config", path]


def prompt_file(text, place):
    path = place.folder / "prompts.json"
    path.write_text(text)
    return [*RENDER[:-2], "--from_file", path, "--save_path", place.folder / "out"]


def picture(text, place):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("hyimg", text)
    Image.new("RGB", (32, 32)).save(place.folder / "a.png", pnginfo=info)
    return [*RENDER[:-2], "--from_image", place.folder / "a.png", "--save_path", place.folder / "b.png"]


# Readers -> whether trouble is an error (2), or is told of and passed over
PLACES = {
    **dict.fromkeys((lora_configuration, peft_folder, header, cache_entry, manifest, state_document), 2),
    **dict.fromkeys((tokenizer, text_encoder, text_encoder_folder, index_of_shards, run_file), 2),
    **dict.fromkeys((metadata_file, prompt_file, picture), 2),
    network_arguments: 0,  # which only a guess about LyCORIS reads
    model_json: 2,  # without it nobody knows whose the cache is
}


class Place:
    def __init__(self, folder, model, dataset, lora):
        self.folder, self.model, self.dataset, self.lora = folder, model, dataset, lora


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_json_that_cannot_be_used_is_a_sentence(
    hyimg, model, own_dataset, trained, tmp_path, place, document
):
    arguments = place(DOCUMENTS[document], Place(tmp_path, model, own_dataset, trained / "lora.safetensors"))
    code, _, err = hyimg(*arguments)
    assert "unexpected" not in err
    assert code == PLACES[place], err
    assert code == 0 or sum(line.startswith("error: ") for line in err.splitlines()) == 1
    assert max((len(line) for line in err.splitlines()), default=0) < 2000

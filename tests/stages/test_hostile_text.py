"""A stranger's text, wherever it comes from, reaches pipe and terminal as printable text on a line of ours."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from hyimg.cli.app import show_python_plainly
from hyimg.errors import printable

# A forged line, a window's title, a colour in both forms, a cursor movement, text from right to left, rich's markup
HOSTILE = "x\nerror: forged\r\x1b]0;title\x07\x1b[99X\x9b31m\x85\u2028\u202e\u2066\x7f[/bold]:cat:"
ON_ONE_LINE = "".join(HOSTILE.splitlines())
ODD_BYTE = "\udcff"  # a byte of a file name that is not UTF-8
# What rich writes to a terminal itself: colours, cursor movements, the cursor shown and hidden
OURS_ON_A_TERMINAL = re.compile(r"\x1b\[[0-9;]*[mK]|\x1b\[[0-9]*[AG]|\x1b\[\?25[lh]|\r")
IN_TOML = json.dumps(HOSTILE)


class Place:
    """A folder in which a case puts its hostile files."""

    def __init__(self, folder, model, dataset, lora):
        self.folder, self.model, self.dataset, self.lora = folder, model, dataset, lora

    def file(self, name, content):
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def picture(self, name, **settings):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("hyimg", json.dumps(settings))
        path = self.folder / name
        Image.new("RGB", (32, 32)).save(path, format="png", pnginfo=info)
        return path

    def with_image(self, name, caption, more=""):
        """The dataset file, with one more image in its folder; `more` is added to its subset."""
        noise = np.random.default_rng(9).integers(0, 256, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(noise).save(self.dataset.parent / "images" / f"{name}.png", format="png")
        path = self.dataset.parent / "images" / f"{name}.txt"
        path.write_text(caption, encoding="utf-8", newline="")
        self.dataset.write_text(self.dataset.read_text(encoding="utf-8") + more, encoding="utf-8")
        return self.dataset

    def with_line(self, line):
        self.dataset.write_text(self.dataset.read_text(encoding="utf-8") + line, encoding="utf-8")
        return self.dataset

    def lora_with(self, *, key=None, metadata=None, alpha=True):
        state = {k: v for k, v in load_file(self.lora).items() if alpha or not k.endswith(".alpha")}
        if key is not None:
            state[key] = torch.zeros(4)
        path = self.folder / "hostile.safetensors"
        save_file(state, path, metadata=metadata)
        return path

    def header(self, **tensors):
        text = json.dumps(tensors).encode()
        return self.file("bad.safetensors", len(text).to_bytes(8, "little") + text + bytes(8))


RENDER = ["infer", "--dit", "{dit}", "--vae", "{vae}", "--text_encoder", "{text_encoder}", "--byt5", "{byt5}"]
SMALL = ["--image_size", "64", "64", "--infer_steps", "1", "--save_path", "{place}/out"]
TRAIN = ["train", "--dit", "{dit}", "--output_dir", "{place}/run", "--max_train_steps", "1"]
REPORT = ["dataset", "--tokenizer", "{tokenizer}"]
PLUGIN = (
    "import warnings\nfrom hyimg.hookspecs import hookimpl\n"
    "def shout():\n    {body}\n"
    "@hookimpl\ndef hyimg_commands():\n    return {{'shout': shout}}\n"
)

CASES: dict[str, Callable[[Place], list[object]]] = {
    # words on the command line
    "command": lambda p: [HOSTILE],
    "option": lambda p: ["train", f"--{HOSTILE}"],
    "surplus word": lambda p: ["cache-latents", HOSTILE + ODD_BYTE],
    "choice": lambda p: ["train", "--mixed_precision", HOSTILE],
    "number": lambda p: ["train", "--learning_rate", HOSTILE],
    "text that is not UTF-8": lambda p: ["train", "--training_comment", HOSTILE + ODD_BYTE],
    "output name": lambda p: [*TRAIN, "--dataset_config", p.dataset, "--output_name", HOSTILE],
    "flags of a dataset": lambda p: ["train", "--class_tokens", HOSTILE + ODD_BYTE, "--train_data_dir", HOSTILE],
    "pattern": lambda p: ["inspect-modules", "--network_args", f"network_reg_dims={ON_ONE_LINE}=4"],
    "sampler": lambda p: [*RENDER, *SMALL, "--prompt", "x", "--sampler", HOSTILE],
    "plugin's name": lambda p: ["plugins", "--plugin", HOSTILE],
    # names of files
    "LoRA that is not there": lambda p: ["check", HOSTILE + ODD_BYTE],
    "LoRA": lambda p: ["check", p.file(f"{HOSTILE}{ODD_BYTE}.safetensors".replace("/", "_"), p.lora.read_bytes())],
    "run file": lambda p: ["train", "--config", p.file("[red]\x1b\n.toml", "nope = 1")],
    "model": lambda p: [*RENDER, "--dit", p.file("\x1b\n.safetensors", b"no model at all"), "--prompt", "x"],
    "image": lambda p: [*REPORT, p.with_image("\x1b\n\u202e\x9b" + ODD_BYTE, "x")],
    "image that cannot be read": lambda p: [
        *("cache-latents", "--vae", "{vae}", "--dataset_config"),
        p.with_image("y", "x") if not p.file("own/images/\x1b\n\u202e.png", b"no image") else p.dataset,
    ],
    "caption without an image": lambda p: [*REPORT, p.file("own/images/\x1b\n\u202e.txt", b"x") and p.dataset],
    # captions
    "caption": lambda p: [*REPORT, p.with_image("y", f"a 'x {ON_ONE_LINE}' \"{ON_ONE_LINE}\" <|im_end|>")],
    "caption as JSON": lambda p: [*REPORT, p.with_image("y", f'a "{ON_ONE_LINE}"'), "--json"],
    "caption to encode": lambda p: [
        *("cache-text", "--text_encoder", "{text_encoder}", "--byt5", "{byt5}", "--dataset_config"),
        p.with_image("y", f'{ON_ONE_LINE} "{ON_ONE_LINE * 9}"' + " word" * 1100),
    ],
    "metadata file": lambda p: [
        *REPORT,
        p.with_line(
            "[[datasets.subsets]]\nimage_dir = 'images'\nmetadata_file = '"
            f"{p.file('m.json', json.dumps({HOSTILE: {HOSTILE: 1}}))}'\n"
        ),
    ],
    # keys and values of TOML files
    "key of a run file": lambda p: ["train", "--config", p.file("run.toml", f"{IN_TOML} = 1")],
    "value of a run file": lambda p: ["train", "--config", p.file("run.toml", f"seed = {IN_TOML}")],
    "path in a run file": lambda p: ["train", "--config", p.file("run.toml", f"dit = {IN_TOML}")],
    "line of a run file": lambda p: ["train", "--config", p.file("run.toml", f"dit = {ON_ONE_LINE}")],
    "key of a dataset file": lambda p: ["dataset", p.with_line(f"{IN_TOML} = 1\n")],
    "value of a dataset file": lambda p: ["dataset", p.with_line(f"flip_aug = {IN_TOML}\n")],
    "folder in a dataset file": lambda p: ["dataset", p.with_line(f"[[datasets.subsets]]\nimage_dir = {IN_TOML}\n")],
    "key of a prompt file": lambda p: [
        *RENDER, *SMALL, "--from_file",
        p.file("p.toml", f"[prompt]\n[[prompt.subset]]\nprompt = 'x'\n{IN_TOML} = 1\nwidth = {IN_TOML}"),
    ],
    "line of a prompt file": lambda p: [
        *RENDER, *SMALL, "--from_file", p.file("p.txt", f"x {ON_ONE_LINE} --w {ON_ONE_LINE}")
    ],
    # tensors and metadata
    "tensor of a LoRA": lambda p: ["check", p.lora_with(key=HOSTILE)],
    "tensor of a LoRA to convert": lambda p: [
        "convert-comfy", p.lora_with(key=HOSTILE), p.folder / "out.safetensors"
    ],
    "metadata of a LoRA": lambda p: [
        "check", p.lora_with(metadata={"ss_learning_rate": HOSTILE, "ss_output_name": HOSTILE * 1000})
    ],
    "metadata of a LoRA as JSON": lambda p: [
        "check", p.lora_with(metadata={"ss_learning_rate": HOSTILE, "ss_output_name": HOSTILE}), "--json"
    ],
    "dtype in a header": lambda p: ["check", p.header(x={"dtype": HOSTILE, "shape": [2], "data_offsets": [0, 8]})],
    "entry of a header": lambda p: ["check", p.header(**{HOSTILE: {"dtype": "F32"}})],
    "PEFT's configuration": lambda p: [
        "check",
        p.lora_with(metadata={"lora_adapter_metadata": json.dumps({"peft_type": HOSTILE})}, alpha=False),
    ],
    "picture's settings": lambda p: [
        *RENDER, "--from_image", p.picture("a.png", prompt="x", fingerprints={}, loras=[{"file": "\x1b\n"}])
    ],
    "picture's option": lambda p: [
        *RENDER, *SMALL, "--from_image", p.picture("a.png", prompt="x", fingerprints={}, sampler=HOSTILE)
    ],
    # plugins
    "plugin that fails": lambda p: [
        "--plugin", p.file("own.py", PLUGIN.format(body=f"raise ValueError({HOSTILE!r} * 999)")), "shout"
    ],
    "plugin that cannot be imported": lambda p: [
        "plugins", "--plugin", p.file("own.py", f"raise ValueError({HOSTILE!r})")
    ],
    "plugin that warns": lambda p: [
        "--plugin", p.file("own.py", PLUGIN.format(body=f"warnings.warn({HOSTILE!r})")), "shout"
    ],
    "plugin's file": lambda p: ["plugins", "--plugin", p.file("\x1b\n.py", "import hyimg")],
    # states and caches
    "state that is not there": lambda p: [*TRAIN, "--dataset_config", p.dataset, "--resume", HOSTILE],
}  # fmt: skip


@pytest.fixture
def place(tmp_path, model, own_dataset, trained):
    return Place(tmp_path, model, own_dataset, trained / "lora.safetensors")


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize("case", CASES)
def test_no_text_steers_a_terminal_or_forges_a_line(hyimg, place, monkeypatch, case, terminal):
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes a pipe for a terminal
        monkeypatch.setenv("TERM", "xterm-256color")
    names = {"{place}": str(place.folder), "{tokenizer}": str(place.model.directory)}
    arguments = [str(argument) for argument in CASES[case](place)]
    for name, value in names.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    with monkeypatch.context() as patch:
        patch.setattr("warnings.showwarning", None)  # pytest's own, put back afterwards
        patch.setattr("sys.excepthook", None)
        show_python_plainly()
        _, out, err = hyimg(*arguments)
    text = out + err
    assert "\x1b[99X" not in text
    plain = OURS_ON_A_TERMINAL.sub("", text) if terminal else text
    assert printable(plain.replace("\n", "")) == plain.replace("\n", "")
    assert not [line for line in plain.splitlines() if line.startswith("error: forged")]
    assert max(map(len, plain.splitlines())) <= 2100
    assert not re.search("error: unexpected [A-Z]", err)
    assert re.search(r"\\(x1b|u001b|udcff)", plain), plain

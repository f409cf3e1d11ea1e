"""Golden files, tiny encoders and the true vocabulary, made once for the tests of this folder."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hyimg.encoders.tiny import make_tiny_byt5, make_tiny_qwen, train_tiny_tokenizer
from hyimg.encoders.tokenizer import QwenTokenizer, load_qwen_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"


class Golden:
    """A golden safetensors file: tensors by name, its `config`, its `weights.*` as a file of their own."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / name, "pt") as file:
            self.metadata: dict[str, str] = dict(file.metadata())
            self.tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.config: dict[str, Any] = json.loads(self.metadata["meta"])["config"]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def weights(self) -> dict[str, Tensor]:
        return {k.removeprefix("weights."): t for k, t in self.tensors.items() if k.startswith("weights.")}

    def write_weights(self, path: Path) -> Path:
        save_file(self.weights, path, metadata=self.metadata)
        return path


@pytest.fixture(scope="session")
def golden_json() -> Any:
    return lambda name: json.loads((GOLDEN / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def qwen_golden() -> Golden:
    return Golden("qwen_tiny.safetensors")


@pytest.fixture(scope="session")
def byt5_golden() -> Golden:
    return Golden("byt5_tiny.safetensors")


@pytest.fixture(scope="session")
def ranks_path() -> Path:
    """The true vocabulary, which the package dashscope carries."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None or spec.origin is None:
        pytest.skip("the true Qwen vocabulary comes with the package dashscope, which is not installed")
    return Path(spec.origin).parent / "resources" / "qwen.tiktoken"


@pytest.fixture(scope="session")
def true_tokenizer(ranks_path: Path) -> QwenTokenizer:
    return load_qwen_tokenizer(ranks_path, None)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `qwen.safetensors`, `byt5.safetensors` and the folder `tokenizer`, all tiny."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny_qwen(folder / "qwen.safetensors")
    make_tiny_byt5(folder / "byt5.safetensors")
    train_tiny_tokenizer(["a red fox in the snow", "a sign that says “OPEN 24h”"], folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(models: Path) -> QwenTokenizer:
    return load_qwen_tokenizer(models / "tokenizer", None)


@pytest.fixture
def write_header(tmp_path: Path) -> Any:
    """Writes a safetensors file of true size that is all header: its tensors are a hole in the file."""

    def write(shapes: dict[str, list[int]], dtype: str, name: str = "real.safetensors") -> Path:
        header: dict[str, Any] = {}
        position = 0
        for key, shape in shapes.items():
            end = position + math.prod(shape) * {"BF16": 2, "F16": 2, "F8_E4M3": 1}[dtype]
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
            position = end
        text = json.dumps(header).encode()
        with (tmp_path / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + position)
        return tmp_path / name

    return write

"""Whatever writes a safetensors file: nothing gets its name that the reader would refuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hyimg.cache import entry_file
from hyimg.cache.entry_file import pack
from hyimg.checkpoints import safetensors_file
from hyimg.checkpoints.safetensors_writer import OutputTensor, write_tensors
from hyimg.encoders.tiny import make_tiny_byt5
from hyimg.errors import HyimgError
from hyimg.lora.files.conversion import save_lora
from hyimg.rendering.decoding import Rendered, write_latent
from hyimg.training.state import MANIFEST, write_state

LATENT = torch.zeros(1, 4, 2, 2)


def _lora(path: Path) -> None:
    save_lora(path, {"lora_unet_x.alpha": torch.tensor(1.0)}, {"ss_training_comment": "x" * 200})


WRITERS: dict[str, Callable[[Path], object]] = {
    "save_lora": _lora,
    "write_tensors": lambda path: write_tensors(
        path, [OutputTensor("a", "U8", (1,), 1, lambda: [b"\0"])], {"x": "y" * 200}
    ),
    "latent": lambda path: write_latent(Rendered(LATENT, {"prompt": "x" * 200}), path),
    "byt5": lambda path: make_tiny_byt5(path),
    "state": lambda path: write_state(path, {}, {"network": {"x" * 200: LATENT}}, root=path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_files_that_could_not_be_read_back_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    path = tmp_path / "new.safetensors"
    WRITERS[writer](path)
    written = sorted(tmp_path.rglob("*.safetensors"))
    assert written
    before = [file.read_bytes() for file in written if file.is_file()]
    monkeypatch.setattr(safetensors_file, "MAX_HEADER_BYTES", 150)
    with pytest.raises(HyimgError, match="header.* would have"):
        WRITERS[writer](path)
    assert sorted(tmp_path.rglob("*.safetensors")) == written, "what was there stays, and nothing else does"
    assert [file.read_bytes() for file in written if file.is_file()] == before
    assert not list(tmp_path.rglob("*hyimg-tmp"))
    assert not path.is_dir() or (path / MANIFEST).is_file()


def test_files_are_read_back_before_they_are_renamed(tmp_path: Path) -> None:
    misfit = OutputTensor("a", "F32", (2,), 4, lambda: [b"0000"])  # two values in four bytes
    with pytest.raises(
        HyimgError, match="was not saved, because it could not be read again: `new.safetensors` is damaged"
    ):
        write_tensors(tmp_path / "new.safetensors", [misfit], None)
    assert not list(tmp_path.iterdir())


def test_a_prompt_too_long_for_a_header_is_not_cached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(entry_file, "MAX_HEADER_BYTES", 400)
    tensors = {"text": torch.zeros(1)}
    pack("key", tensors, {"prompt": "short"})
    with pytest.raises(HyimgError, match="`aaaa.*header of"):
        pack("key", tensors, {"prompt": "a" * 400})


def test_cache_entries_have_the_formats_header_limit() -> None:
    assert entry_file.MAX_HEADER_BYTES == safetensors_file.MAX_HEADER_BYTES == 100_000_000


def test_every_use_of_the_library_to_write_is_read_back() -> None:
    """`safetensors.torch.save` and `save_file` do not check the size of the header."""
    root = Path(__file__).parents[2] / "hyimg"
    for source in root.rglob("*.py"):
        text = source.read_text(encoding="utf-8")
        if re.search(r"from safetensors\.\w+ import .*\bsave(_file)?\b", text):
            assert "read_header" in text, source

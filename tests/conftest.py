"""What every test needs: golden files, a tiny model made once, and no plugins of the machine."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parent / "golden"

# tests run side by side, on models too small for threads to help; they must pass with two as well
os.environ.setdefault("OMP_NUM_THREADS", "1")
# MKL's kernels round differently from one processor to another. Tests must pass with `MKL_CBWR=AUTO` as well; the
# same kernels everywhere only make a failure on another machine easier to repeat
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
# installed packages must not change what a test sees; the plugin tests ask for them by name
os.environ["HYIMG_LOAD_PLUGINS"] = ""
# a shell starts `make test &` with Ctrl-C ignored, which every process of a test would inherit
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# a machine with a hub and one without must act alike
os.environ["HF_HUB_OFFLINE"] = "1"
# nobody here has an account
os.environ["WANDB_MODE"] = "offline"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference numbers; its READMEs say where each comes from."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden_json() -> Callable[[str], Any]:
    """Reads a golden JSON file by its name without the suffix."""
    return lambda name: json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def rename() -> Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]:
    """Tensors under original names to those of another layout: the way back of a key map of `hyimg.checkpoints.names`.

    Takes the tensors, the key map of the other layout's names, and tensors of its shapes.
    """

    def renamed(
        tensors: Mapping[str, Any], key_map: Mapping[str, Any], like: Mapping[str, Any]
    ) -> dict[str, Any]:
        import torch

        other = {}
        for name, source in key_map.items():
            tensor = tensors[name]
            if source.swap_halves:
                tensor = torch.cat(tensor.chunk(2)[::-1])
            parts = tensor.split([len(like[part]) for part in source.parts])
            other.update(zip(source.parts, (part.clone() for part in parts), strict=True))
        return other

    return renamed


@pytest.fixture(scope="session")
def as_format_1() -> Callable[[Path, str], None]:
    """Turns a state into one of the releases that kept a copy of the metrics, those lines, in each."""
    import hashlib
    import json

    def convert(path: Path, metrics: str) -> None:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        document = json.loads((path / manifest["files"]["state.json"]["file"]).read_text(encoding="utf-8"))
        del document["metrics"]
        for name, text in (("state.json", json.dumps(document)), ("metrics.jsonl", metrics)):
            data = text.encode()
            file = path / f"{Path(name).stem}-0ld00000{Path(name).suffix}"
            file.write_bytes(data)
            sha256 = hashlib.sha256(data).hexdigest()
            manifest["files"][name] = {"file": file.name, "bytes": len(data), "sha256": sha256}
        (path / "manifest.json").write_text(json.dumps(manifest | {"format": 1}), encoding="utf-8")

    return convert

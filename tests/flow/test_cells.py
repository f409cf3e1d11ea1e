from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hyimg.errors import HyimgError
from hyimg.rendering.cells import columns_of, differing
from hyimg.rendering.loras import LoRAUse

WANTED: dict[str, Any] = {
    "prompt": "a cat",
    "sampler_args": (),
    "loras": [{"file": "a", "sha256": "1"}],
    "fingerprints": {"dit": "1", "text_encoder": "2"},
}


@pytest.mark.parametrize(
    ("recorded", "keys"),
    [
        ({}, []),
        ({"prompt": "a dog"}, ["prompt"]),
        ({"loras": [{"file": "a", "sha256": "2"}]}, ["loras"]),
        ({"fingerprints": {"dit": "3", "text_encoder": "2"}}, ["dit"]),
        # texts came from the cache, whose encoders nobody named
        ({"fingerprints": {"dit": "1"}}, []),
        ({"fingerprints": {"dit": "1", "text_encoder": "2", "byt5": "3"}}, []),
        ({"of another version": 1}, ["of another version"]),
    ],
)
def test_settings_differ_where_a_picture_would(recorded: dict[str, Any], keys: list[str]) -> None:
    assert differing({**WANTED, "sampler_args": [], **recorded}, WANTED) == keys


def labels(*loras: tuple[str, float], with_base: bool = True) -> list[str]:
    uses = [LoRAUse(Path(path), multiplier, "") for path, multiplier in loras]
    return [column.label for column in columns_of(uses, with_base=with_base)]


def test_columns_are_labelled_by_what_tells_them_apart() -> None:
    assert labels(("x/cat.safetensors", 1), ("x/v1.5.safetensors", 1)) == ["base", "cat", "v1.5"]
    assert labels(("x/cat.safetensors", 1), ("y/cat.safetensors", 1)) == ["base", "x-cat", "y-cat"]
    assert labels(("x/cat.safetensors", 1), ("x/cat.safetensors", 0.5)) == ["base", "cat@1", "cat@0.5"]
    assert labels(("x/base.safetensors", 1)) == ["base", "x-base"]
    assert labels(with_base=True) == ["base"]
    with pytest.raises(HyimgError, match="two columns would be named `cat`"):
        labels(("x/cat.safetensors", 1), ("x/cat.safetensors", 1))
    with pytest.raises(HyimgError, match="there is nothing to render"):
        labels(with_base=False)

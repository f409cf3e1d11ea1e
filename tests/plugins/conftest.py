"""Plugin files from their texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyimg.plugins import load_plugins

ROOT = Path(__file__).parents[2]


@pytest.fixture
def plugin(tmp_path):
    """Writes plugin files from their texts and loads them, `one.py`, `two.py` and so on."""

    def load(*texts):
        files = []
        for name, text in zip(("one", "two", "three"), texts, strict=False):
            (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
            files.append(str(tmp_path / f"{name}.py"))
        return load_plugins(files)

    return load

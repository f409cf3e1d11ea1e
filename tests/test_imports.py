"""The house plan holds: imports point one way, light rooms stay light, nothing heavy runs for a help page."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HYIMG = Path(__file__).parents[1] / "hyimg"

# From the roof to the ground; rooms of one row do not import each other
ROWS = [
    {"cli"},
    {"pipeline"},
    {"stages"},
    {"micro"},
    {"training"},
    {"flow"},
    {"lora", "encoders", "data"},
    {"memory"},
    {"model", "cache"},
    {"plugins"},
    {"hookspecs"},
    {"config"},
    {"report"},
    {"errors", "randomness"},
]
HEIGHT = {room: len(ROWS) - row for row, rooms in enumerate(ROWS) for room in rooms}
HEAVY = {
    "torch",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "diffusers",
    "numpy",
    "PIL",
    "safetensors",
    "tokenizers",
}


def _room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "hyimg" and len(parts) > 1 else None


def _imports(path: Path, *, top_only: bool) -> list[str]:
    """The modules that a file imports, those under TYPE_CHECKING left out."""
    found = []

    def visit(nodes):
        for node in nodes:
            if isinstance(node, ast.Import):
                found.extend(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                whole = [f"hyimg.{a.name}" for a in node.names if not a.name.startswith("__")]
                found.extend(whole if node.module == "hyimg" else [node.module])
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                continue
            elif not (top_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
                visit(ast.iter_child_nodes(node))

    visit(ast.parse(path.read_text(encoding="utf-8")).body)
    return found


FILES = sorted(path for path in HYIMG.rglob("*.py") if path.parent != HYIMG or path.stem in HEIGHT)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HYIMG)))
def test_imports_point_downwards(path):
    own = path.relative_to(HYIMG).with_suffix("").parts[0]
    for module in _imports(path, top_only=False):
        room = _room(module)
        if room is None or room == own:
            assert not (own == "stages" and module.startswith("hyimg.stages.")), (
                f"stages never import each other: {module}"
            )
        else:
            assert HEIGHT[room] < HEIGHT[own], f"{own} must not import {module}"


@pytest.mark.parametrize(
    "path",
    sorted(
        [
            *(HYIMG / "cli").glob("*.py"),
            *(HYIMG / "config").glob("*.py"),
            HYIMG / "report.py",
            HYIMG / "errors.py",
        ]
    ),
    ids=lambda p: p.name,
)
def test_light_rooms_import_nothing_heavy(path):
    assert not {m.split(".")[0] for m in _imports(path, top_only=True)} & HEAVY


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["inspect-modules", "--json"], ["plugins"]]
)
def test_answers_without_torch(arguments):
    code = (
        "import sys\nfrom hyimg.cli.app import run\n"
        f"code = run({arguments!r})\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout

"""Imports point one way and have no cycle, light packages stay light, and a help page imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

HYIMG = Path(__file__).parents[1] / "hyimg"

# From the roof to the ground; rooms of one row do not import each other
ROWS = [
    {"cli"},
    {"pipeline"},
    {"stages"},
    {"reports", "demo"},
    {"training"},
    {"rendering"},
    {"flow", "lora", "encoders", "data"},
    {"memory"},
    {"distributed"},
    {"model"},
    {"checkpoints"},
    {"cache"},
    {"plugins"},
    {"hookspecs"},
    {"config"},
    {"report"},
    {"errors", "randomness", "import_path"},
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


def _runs_later(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.dump(node.test)
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def _imports(path: Path, *, top_only: bool = False) -> list[str]:
    """The modules that a file imports; with `top_only` those that importing it runs, not those in functions or
    under TYPE_CHECKING."""
    found = []

    def visit(nodes):
        for node in nodes:
            if isinstance(node, ast.Import):
                found.extend(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                whole = [f"hyimg.{a.name}" for a in node.names if not a.name.startswith("__")]
                found.extend(whole if node.module == "hyimg" else [node.module])
            elif not (top_only and _runs_later(node)):
                visit(ast.iter_child_nodes(node))

    visit(ast.parse(path.read_text(encoding="utf-8")).body)
    return found


FILES = sorted(path for path in HYIMG.rglob("*.py") if path.parent != HYIMG or path.stem in HEIGHT)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HYIMG)))
def test_imports_point_downwards(path):
    own = path.relative_to(HYIMG).with_suffix("").parts[0]
    for module in _imports(path):
        room = _room(module)
        if room is None or room == own:
            assert not (own == "stages" and module.startswith("hyimg.stages.")), (
                f"stages never import each other: {module}"
            )
        else:
            assert HEIGHT[room] < HEIGHT[own], f"{own} must not import {module}"


def _cycle(imports: Mapping[str, Collection[str]]) -> list[str] | None:
    """Modules that import each other in a ring, the first one repeated at the end; None if there is no ring."""
    done: set[str] = set()
    trail: list[str] = []

    def visit(module: str) -> list[str] | None:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return None
        trail.append(module)
        for other in sorted(imports[module]):
            if found := visit(other):
                return found
        done.add(trail.pop())
        return None

    return next((found for module in sorted(imports) if (found := visit(module))), None)


def test_a_cycle_is_found():
    assert _cycle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert _cycle({"a": ["b", "c"], "b": ["c"], "c": []}) is None


def test_no_modules_import_each_other():
    """In functions and under TYPE_CHECKING neither."""
    files = {
        ".".join(path.relative_to(HYIMG.parent).with_suffix("").parts): path for path in HYIMG.rglob("*.py")
    }
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}
    imports = {}
    for name, path in modules.items():
        # a name that is no module belongs to the package or module before it
        found = {m if m in modules else m.rpartition(".")[0] for m in _imports(path)}
        imports[name] = (found & modules.keys()) - {name, "hyimg"}
    assert (ring := _cycle(imports)) is None, " -> ".join(ring)


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
    ("arguments", "modules"),
    [
        # the options of no command, and pydantic, with which Typer would check them
        (["--help"], {"torch", "pydantic", "hyimg.config.option"}),
        (["train", "--help"], {"torch", "pydantic"}),
        (["inspect-modules", "--json"], {"torch", "typer"}),
        (["plugins"], {"torch", "typer"}),
    ],
)
def test_answers_without_heavy_modules(arguments, modules, monkeypatch):
    monkeypatch.setenv("HYIMG_LOAD_PLUGINS", "")
    code = (
        "import sys\nfrom hyimg.cli.app import run\n"
        f"code = run({arguments!r})\n"
        f"assert not {modules!r} & sys.modules.keys(), {modules!r} & sys.modules.keys()\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_modules_and_public_types_have_names_of_their_own():
    modules, types = Counter(), Counter()
    for path in HYIMG.rglob("*.py"):
        modules[path.name] += 1
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                types[node.name] += 1
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                types[node.targets[0].id] += not node.targets[0].id.isupper()  # an alias, not a constant
    assert [name for name, number in modules.items() if number > 1 and name != "__init__.py"] == []
    assert [name for name, number in types.items() if number > 1 and name[0].isupper()] == []


def test_files_and_functions_fit_on_a_screen_or_two():
    for path in HYIMG.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 450, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 70, f"{path}: {node.name}"

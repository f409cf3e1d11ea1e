"""The project as it is installed: editable, as a wheel, and by which Python."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from benchmarks.micro.build import MANIFEST
from hyimg.demo.concept import WEIGHTS

PROJECT = Path(__file__).parents[1]


def copy_project(clone: Path, *ignored: str) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        clone.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, clone)
    shutil.copytree(
        PROJECT / "hyimg", clone / "hyimg", ignore=shutil.ignore_patterns("__pycache__", *ignored)
    )


def build(clone: Path, hook: str) -> zipfile.ZipFile:
    """Runs a hook of the build back end, as pip does, and opens the wheel that it made."""
    code = f"from setuptools import build_meta; build_meta.{hook}('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=clone, check=True, capture_output=True)
    (wheel,) = (clone / "dist").glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.fixture(scope="module")
def editable_install(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with an editable install of a clone named `hyimg`, whose version is 9.9.

    The clone lies in the folder of the environment. Dependencies come from the environment that runs the tests.
    """
    folder = tmp_path_factory.mktemp("folder")
    copy_project(folder / "hyimg", "weights")
    (folder / "hyimg/hyimg/__init__.py").write_text('__version__ = "9.9"\n')
    venv.create(folder / "environment", symlinks=os.name != "nt")
    python = folder / "environment" / ("Scripts" if os.name == "nt" else "bin") / "python"
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    with build(folder / "hyimg", "build_editable") as wheel:
        wheel.extractall(packages)
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(dependencies))
    return python


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param((), id="python"),
        pytest.param(("-m", "accelerate.commands.launch"), marks=pytest.mark.long, id="accelerate launch"),
        pytest.param(("-m", "torch.distributed.run"), marks=pytest.mark.long, id="torchrun"),
    ],
)
def test_an_editable_install_runs_from_the_folder_that_holds_the_clone(editable_install, launcher):
    folder = editable_install.parents[2]
    command = [editable_install, *launcher, "-m", "hyimg", "--version"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "hyimg 9.9"), done.stderr


@pytest.mark.long
def test_a_wheel_holds_the_package_whole(tmp_path):
    copy_project(tmp_path / "clone")
    with build(tmp_path / "clone", "build_wheel") as wheel:
        names = set(wheel.namelist())
        (entry_points,) = (wheel.read(name) for name in names if name.endswith("/entry_points.txt"))
    files = {p for p in (PROJECT / "hyimg").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {
        f"hyimg/demo/weights/{name}" for name in json.loads((WEIGHTS / MANIFEST).read_text())["files"]
    } <= names
    assert {path.relative_to(PROJECT).as_posix() for path in files} == {
        name for name in names if ".dist-info/" not in name
    }
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert b"hyimg = hyimg.cli.app:main" in entry_points


@pytest.mark.parametrize(
    ("version", "code", "said"),
    [
        ((3, 9), 2, "hyimg needs Python 3.10 or later, and `{python}` is 3.9"),
        ((3, 10), 0, ""),
        ((3, 14), 0, ""),
        ((3, 99), 0, "warning: hyimg was tested with Python 3.10 to 3.14, and `{python}` is 3.99"),
    ],
)
@pytest.mark.skipif(shutil.which("make") is None or os.name == "nt", reason="needs make and a Unix shell")
def test_make_takes_any_python_from_3_10_on(tmp_path, version, code, said):
    python, venv_folder = tmp_path / "python", tmp_path / "venv"
    pretend = f"import sys; sys.version_info = {version}; exec(sys.argv[2] if sys.argv[1] == '-c' else '')"
    python.write_text(f'#!/bin/sh\nmkdir -p {venv_folder}\nexec {sys.executable} -c "{pretend}" "$@"\n')
    python.chmod(0o755)
    make = ["make", f"PYTHON={python}", f"VENV={venv_folder}", str(venv_folder / "made")]
    done = subprocess.run(make, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == code
    output = done.stdout + done.stderr
    assert said.format(python=python) in output if said else "hyimg" not in output.replace(str(tmp_path), "")


def test_the_readme_names_the_versions_of_python_that_were_tested():
    tested = re.findall(r"Python :: 3\.(\d+)", (PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert f"tested with 3.{tested[0]} to 3.{tested[-1]}" in text
    assert f'requires-python = ">=3.{tested[0]}"' in (PROJECT / "pyproject.toml").read_text(encoding="utf-8")

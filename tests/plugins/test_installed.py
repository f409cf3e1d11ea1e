"""The packages under `plugins/`, installed as a user would: found by their entry points, in processes of their own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("hyimg-captions", "hyimg-frequency", "hyimg-midpoint", "hyimg-vera")
WITHOUT_TORCH = (
    "import sys\nfrom hyimg.cli.app import run\ncode = run({!r})\n"
    "assert 'torch' not in sys.modules\nsys.exit(code)"
)


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path | None:
    """Where the packages are, beside the environment; None where they are installed in it (`make test`)."""
    try:
        for package in PACKAGES:
            importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        folder = tmp_path_factory.mktemp("site")
        # a build leaves files beside its source
        sources = [shutil.copytree(ROOT / "plugins" / name, folder / "source" / name) for name in PACKAGES]
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*install, "--no-index", "--target", folder / "site", *sources], check=True)
        return folder / "site"
    return None


@pytest.fixture
def hyimg(site):
    """Runs a command line with the installed plugins; gives (exit code, stdout, stderr)."""
    environment = dict(os.environ)
    environment.pop("HYIMG_LOAD_PLUGINS")
    environment["PYTHONPATH"] = os.pathsep.join([*([str(site)] if site else []), str(ROOT)])

    def call(*arguments, code=None, **extra):
        what = ["-m", "hyimg", *map(str, arguments)] if code is None else ["-c", code]
        done = subprocess.run(
            [sys.executable, *what], env={**environment, **extra}, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    return call


def test_each_is_listed_with_package_version_hooks_and_names(hyimg):
    code, out, err = hyimg("plugins", "--json")
    assert code == 0, err
    found = {row["name"]: row for row in json.loads(out) if row["origin"] != "built in"}
    assert {name: row["origin"] for name, row in found.items()} == {
        "captions": "hyimg-captions 0.1.0",
        "frequency": "hyimg-frequency 0.1.0",
        "midpoint": "hyimg-midpoint 0.1.0",
        "vera": "hyimg-vera 0.1.0",
    }
    assert found["captions"]["hooks"] == ["hyimg_caption_transforms", "hyimg_commands"]
    assert found["captions"]["provides"] == {
        "caption_transforms": ["underscores", "replace"],
        "commands": ["tags"],
    }
    assert found["vera"]["provides"] == {"networks": ["vera"]}
    assert found["midpoint"]["provides"] == {"samplers": ["midpoint"]}


def test_they_are_chosen_by_name(hyimg):
    code, out, _ = hyimg("plugins", HYIMG_LOAD_PLUGINS="midpoint")
    assert code == 0
    assert "midpoint (hyimg-midpoint 0.1.0)\n  hooks: hyimg_samplers\n  samplers: midpoint" in out
    assert "frequency" not in out
    code, _, err = hyimg("plugins", HYIMG_LOAD_PLUGINS="frequence")
    assert code == 2
    assert "did you mean `frequency`" in err


def test_the_command_is_listed_helped_and_run(hyimg, tmp_path):
    code, out, err = hyimg(code=WITHOUT_TORCH.format(["--help"]))
    assert code == 0, err
    assert "Plugins" in out
    assert "tags" in out
    assert err == ""
    code, out, _ = hyimg("tags", "--help")
    assert code == 0
    assert "Count the tags of a dataset's captions" in out
    assert "--most" in out
    code, out, err = hyimg("tags", tmp_path / "none.toml")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "none.toml" in err

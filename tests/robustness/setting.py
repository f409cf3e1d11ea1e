"""A case while it is made: files to copy, damage to do, command lines to choose from."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.robustness.mutations import Mutation, damage_bytes
from tests.robustness.rules import Case
from tests.robustness.world import World

KINDS: dict[str, Callable[[Setting], None]] = {}


class Setting:
    """A case while it is made: the world to copy from, the draws, and what is easy to say."""

    def __init__(self, case: Case, world: World, rng: random.Random) -> None:
        self.case, self.world, self.rng = case, world, rng
        self.work = case.work
        self.out = self.work / "out"

    def copy(self, source: Path, name: str | None = None) -> Path:
        target = self.work / (name or source.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, target)
        return target

    def dataset(self, *, caches: bool = True) -> Path:
        """A copy of the dataset, by default with full caches; gives the dataset file."""
        folder = self.copy(self.world.dataset.parent)
        if not caches:
            shutil.rmtree(folder / "hyimg-cache")
        return folder / "data.toml"

    def damage(self, path: Path, mutation: Mutation, times: tuple[int, ...] = (1, 1, 1, 2)) -> None:
        """Damages a file, mostly once; a second time where the mutation can still read what the first has left."""
        if self.rng.random() < 0.07:
            self.case.words += f"{path.name}: {replace_file(path, self.rng)}; "
            return
        for number in range(self.rng.choice(times)):
            data = path.read_bytes()
            try:
                damaged, words = mutation(data, self.rng)
            except Exception:
                if number == 0:
                    raise
                damaged, words = damage_bytes(data, self.rng)
            path.write_bytes(damaged)
            self.case.words += f"{path.name}: {words}; "

    def runs(self, *arguments: object, writes: tuple[str, ...] = ("out",), is_json: bool = False) -> None:
        self.case.arguments = [str(argument) for argument in arguments]
        self.case.writable = writes
        self.case.is_json = is_json

    def one_of(self, *choices: Callable[[], None]) -> None:
        self.rng.choice(choices)()

    # the commands, each on files that stand in the case's folder unless it is given others

    def report(self, data: Path, *extra: object) -> None:
        is_json = self.rng.random() < 0.3
        json_flag = ["--json"] if is_json else []
        encoders = (
            [] if "--text_encoder" in extra else self.world.encoders[:4]
        )  # with a small tokenizer beside them
        self.runs(
            "dataset", data, *json_flag, *encoders, *extra, writes=("set/hyimg-cache", "out"), is_json=is_json
        )

    def cache_latents(self, data: Path, *extra: object, vae: Path | None = None) -> None:
        vae = vae or self.world.vae
        writes = ("set/hyimg-cache",)
        self.runs(
            "cache-latents", "--dataset_config", data, "--vae", vae, "--device", "cpu", *extra, writes=writes
        )

    def cache_text(self, data: Path, *extra: object, encoders: list[object] | None = None) -> None:
        encoders = [*self.world.encoders] if encoders is None else encoders
        writes = ("set/hyimg-cache",)
        self.runs("cache-text", "--dataset_config", data, *encoders, "--device", "cpu", *extra, writes=writes)

    def train(self, data: Path, *extra: object) -> None:
        # the index in the cache's folder is a memory that any command may fill
        writes = ("out", "set/hyimg-cache/index.sqlite", "set/hyimg-cache/index.sqlite-wal")
        writes += ("set/hyimg-cache/index.sqlite-shm",)
        self.runs(
            *self.world.trains, "--dataset_config", data, "--output_dir", self.out, *extra, writes=writes
        )

    def infer(self, *extra: object, prompt: bool = True) -> None:
        words = ["--prompt", 'a "GO" sign'] if prompt else []
        self.runs("infer", *self.world.renders, *words, "--save_path", self.out / "a.png", *extra)

    def any_stage(self, data: Path) -> None:
        """A command that reads the dataset: the report, the two caches, training."""
        self.one_of(
            lambda: self.report(data),
            lambda: self.cache_latents(data),
            lambda: self.cache_text(data),
            lambda: self.train(data),
        )


def replace_file(path: Path, rng: random.Random) -> str:
    """Puts something in a file's place that is no file, or one without an end."""
    what = rng.choice(["folder", "pipe", "device", "loop", "nowhere", "sparse", "sparse behind it"])
    if what == "sparse behind it":
        os.truncate(path, 100 * 2**30)
        return what
    path.unlink()
    if what == "folder":
        path.mkdir()
        (path / "kept.txt").write_text("kept", encoding="utf-8")
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "sparse":
        path.touch()
        os.truncate(path, 100 * 2**30)
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path.name, "nowhere": "nowhere"}[what])
    return what


def kind(name: str) -> Callable[[Callable[[Setting], None]], Callable[[Setting], None]]:
    def register(make: Callable[[Setting], None]) -> Callable[[Setting], None]:
        KINDS[name] = make
        return make

    return register


def entries(folder: Path, stage: str) -> list[Path]:
    return sorted((folder / "hyimg-cache" / stage).glob("*/*/*.safetensors"))

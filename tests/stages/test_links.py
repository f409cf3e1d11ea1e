"""Links in folders that somebody else supplied: no command writes, renames, removes or lists where they lead.

Each command runs once in a clean folder, while an audit hook notes every place that it writes, removes or lists. Then
a link is planted in each of these places, and the command must leave what the links lead to as it is: it replaces a
link in place of a file, and refuses one in place of a folder. A new place is found, and so tested, by itself.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hyimg.cache.download import HubFile
from hyimg.cache.own_files import temporary_name, temporary_of
from hyimg.checkpoints.model_files import ModelFolder
from hyimg.demo.concept import DemoFolder
from hyimg.training.run_folder import RunFolder

Arguments = Callable[[Path], list[object]]

_PATHS = {  # how many paths begin the arguments of an event
    **dict.fromkeys(("os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "os.truncate"), 1),
    **dict.fromkeys(("os.utime", "os.chmod", "shutil.rmtree", "sqlite3.connect"), 1),
    **dict.fromkeys(("os.rename", "os.link", "os.symlink"), 2),
}
_FOLLOWING = ("os.listdir", "os.scandir", "os.truncate", "os.utime", "os.chmod", "sqlite3.connect")
_OF_FOLDERS = ("os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree")
# What trackers write has names with the time
_TIMED = re.compile(r"tfevents|/logs/.*\d{8}-\d{6}")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """What the process writes, renames, removes and lists while it is on, as the paths that are really meant."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str]] | None = None
        sys.addaudithook(self._hook)  # which stays until the process ends

    @contextmanager
    def on(self) -> Iterator[set[tuple[str, str]]]:
        self._seen = seen = set()
        try:
            yield seen
        finally:
            self._seen = None

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self._seen is None:
            return
        if event == "open":
            path, mode, flags = arguments
            assert isinstance(flags, int)
            if not flags & _WRITING and not set(str(mode or "")) & set("wax+"):
                return
            follows = not flags & getattr(os, "O_NOFOLLOW", 0)
            paths = [path]
        elif event in _PATHS:
            count = _PATHS[event]
            if any(isinstance(fd, int) and fd >= 0 for fd in arguments[count:]) and event in (
                "os.remove",
                "os.rmdir",
            ):
                return  # in a folder that `shutil.rmtree` has named
            paths, follows = list(arguments[:count]), event in _FOLLOWING
        else:
            return
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)) and str(path):
                self._seen.add((event, self._real(os.fsdecode(path), follows)))

    @staticmethod
    def _real(path: str, follows: bool) -> str:
        if follows:
            return os.path.realpath(path)
        head, name = os.path.split(os.path.abspath(path))
        return os.path.join(os.path.realpath(head), name)


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


def small_dataset(folder: Path, cached: Path) -> None:
    """One image of the cached dataset, with a cache of its own to come."""
    (folder / "images").mkdir(parents=True)
    for name in ("1.png", "1.txt"):
        shutil.copy(cached.parent / "images" / name, folder / "images")
    shutil.copy(cached, folder)


def _marked(folder: Path) -> list[object]:
    """Makes a folder that of an earlier demo."""
    DemoFolder(folder).marker.write_text("")
    return []


QUICK = "--image_size 32 32 --infer_steps 1 --guidance_scale 1 --seed 1 --mixed_precision no".split()
ENCODERS = ["--text_encoder", "{text_encoder}", "--byt5", "{byt5}"]
LORA = Path(__file__).parents[1] / "golden" / "lora_kohya.safetensors"
COMMANDS: dict[str, Arguments] = {
    "cache-latents": lambda own: [
        "cache-latents",
        "--dataset_config",
        own / "data.toml",
        "--vae",
        "{vae}",
        "--prune",
    ],
    "cache-text": lambda own: ["cache-text", "--dataset_config", own / "data.toml", *ENCODERS, "--prune"],
    "dataset": lambda own: ["dataset", own / "data.toml", "--vae", "{vae}", *ENCODERS],
    "infer": lambda own: [
        *("infer", "--dit", "{dit}", *ENCODERS, "--vae", "{vae}", "--prompt", "a cat", *QUICK),
        *("--save_path", own / "out", "--output_type", "latent_images"),
    ],
    "infer-files": lambda own: [
        *("infer", "--dit", "{dit}", *ENCODERS, "--vae", "{vae}", "--from_file", own / "two.txt", *QUICK),
        *("--save_path", own / "a.png", "--output_type", "latent_images", "--overwrite"),
    ],
    "sample": lambda own: [
        *("sample", "--dit", "{dit}", *ENCODERS, "--vae", "{vae}", "--prompts", own / "one.txt", *QUICK),
        *("--output_dir", own / "out"),
    ],
    "train": lambda own: [
        *(
            "train",
            "--dit",
            "{dit}",
            "--vae",
            "{vae}",
            "--dataset_config",
            "{cached}",
            "--output_dir",
            own / "out",
        ),
        *"--max_train_steps 2 --save_every_n_steps 1 --save_last_n_steps 1 --save_state --seed 1".split(),
        *("--sample_every_n_steps", 2, "--sample_prompts", own / "sized.txt"),
        *("--network_dim", 2, "--log_with", "tensorboard", "--overwrite", "--mixed_precision", "no"),
    ],
    "make-tiny-model": lambda own: ["make-tiny-model", own / "out", "--overwrite"],
    "download-models": lambda own: ["download-models", own / "out", "--overwrite"],
    "demo": lambda own: [*_marked(own / "out"), "demo", own / "out", "--overwrite"],
}


@pytest.fixture
def no_network_and_no_children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Downloads without a hub, and the demo without its commands, which are tested by themselves."""

    def get(url: str, file: object, *, expected_size: int, resume_size: int = 0, **_: object) -> None:
        file.write(b"x" * (expected_size - resume_size))  # type: ignore[attr-defined]

    monkeypatch.setattr(
        "hyimg.stages.download_models.look_up",
        lambda repository, path, **_: HubFile(repository, path, "http://nowhere", 10, "no hash"),
    )
    monkeypatch.setattr("huggingface_hub.file_download.http_get", get)
    shipped = ModelFolder(tmp_path / "shipped")
    shipped.directory.mkdir()
    for path in (*shipped.files().values(), shipped.tokenizer):
        path.write_text("weights")
    monkeypatch.setattr("hyimg.demo.concept.WEIGHTS", shipped.directory)
    for few in ("NUM_PICTURES", "NUM_KNOWN"):
        monkeypatch.setattr(f"hyimg.demo.concept.{few}", 1)
    monkeypatch.setattr("hyimg.stages.demo._run", lambda *_: None)


class World:
    """A folder of the user's, one of somebody else's files that links lead to, and a command between them."""

    def __init__(self, folder: Path, cached: Path) -> None:
        self.own, self.victim = folder / "own", folder / "victim"
        small_dataset(self.own, cached)
        (self.own / "one.txt").write_text("a cat\n")
        (self.own / "two.txt").write_text("a cat\na dog\n")
        (self.own / "sized.txt").write_text("a cat --w 32 --h 32 --s 1 --l 1\n")
        (self.own / "out").mkdir()
        self.before = set(self.paths())
        self.victim.mkdir()

        self.cached = cached

    def line(self, arguments: Arguments) -> list[object]:
        """A command in this world."""
        return [self.cached if one == "{cached}" else one for one in arguments(self.own)]

    def paths(self) -> list[str]:
        """The files and folders that are there, relative to the user's folder."""
        found = (Path(top) / name for top, folders, files in os.walk(self.own) for name in (*folders, *files))
        return [str(path.relative_to(self.own)) for path in found]

    def plant(self, name: str, *, folder: bool) -> None:
        """A link in the place of a file or a folder."""
        target = self.victim / re.sub(r"\W", "_", name)
        link = self.own / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if folder:
            target.mkdir()
            (target / "theirs.txt").write_text("theirs")
        else:
            target.write_text("theirs")
        link.symlink_to(target)

    def taken(self) -> dict[str, bytes | None]:
        """What somebody else's folder holds."""
        return {str(p): p.read_bytes() if p.is_file() else None for p in self.victim.rglob("*")}


def places(world: World, seen: set[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """The files and folders that a command made in a clean folder, those too that it removed again.

    Of folders and files whose names are hashes, one stands for all.
    """
    own = os.path.realpath(world.own)
    noted = {os.path.relpath(path, own) for _, path in seen if path.startswith(own + os.sep)}
    there = set(world.paths())
    made = {name for name in noted | there if not any(temporary_of(part) for part in Path(name).parts)}
    made = {name for name in made - world.before if not _TIMED.search(name)}
    folders = {str(parent) for name in made for parent in Path(name).parents} - world.before - {"."}
    listed = {os.path.relpath(path, own) for event, path in seen if event in _OF_FOLDERS}
    folders |= {name for name in made if (world.own / name).is_dir() or name in listed}
    files = made - folders
    return _one_of_each(files), _one_of_each(folders)


def _one_of_each(names: set[str]) -> list[str]:
    return list(
        {
            re.sub(r"\b[0-9a-f]{2}(?:[0-9a-f]{14})?(?:[0-9a-f]{48})?\b", "*", n): n for n in sorted(names)
        }.values()
    )


def _rows(names: Iterable[str]) -> list[object]:
    """The commands, without `train` where run folders still follow links."""
    return [name for name in names if name != "train" or hasattr(RunFolder, "root_of")]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
@pytest.mark.parametrize("name", _rows(COMMANDS))
def test_no_command_goes_where_a_link_leads(
    tmp_path, hyimg, cached_dataset, watch, no_network_and_no_children, name
) -> None:
    line = COMMANDS[name]
    numbers = iter(range(1000))

    def run(planted: list[str], *, folder: bool) -> tuple[int, str, World, set[tuple[str, str]]]:
        world = World(tmp_path / str(next(numbers)), cached_dataset)
        for one in planted:
            world.plant(one, folder=folder)
        before = world.taken()
        with watch.on() as seen:
            code, _, err = hyimg(*world.line(line))
        assert world.taken() == before, planted
        strange = [one for one in seen if one[1].startswith(str(world.victim) + os.sep)]
        assert strange == [], planted
        return code, err, world, seen

    code, err, world, seen = run([], folder=False)
    assert code == 0, err
    files, folders = places(world, seen)
    assert files
    files = [one for one in files if one != "out/hyimg-demo.txt"]  # says whose folder it is
    locks = [one for one in files if one.endswith("lock")]
    for planted in [[one for one in files if one not in locks], *([lock] for lock in locks)]:
        code, err, world, _ = run(planted, folder=False)
        if planted[0] in locks:
            assert (code, "is a link, and a lock file belongs there" in err) == (2, True), err
        else:
            assert code == 0, err
            left = [one for one in planted if (world.own / one).is_symlink()]
            # a folder of numbered pictures is filled up after the highest number, whatever has it
            assert left == (["out/0001.png", "out/0001.safetensors"] if name == "infer" else [])
    for planted in folders:
        code, err, world, _ = run([planted], folder=True)
        if code == 0:
            assert not (world.own / planted).is_symlink(), planted
        else:
            assert (code, "is a link" in err) == (2, True), (planted, err)


# What they write is a path that the user gives, so that a link there is followed
FILE_COMMANDS: dict[str, Arguments] = {
    "convert-comfy": lambda own: ["convert-comfy", LORA, own / "out" / f"{'long' * 60}.safetensors"],
    "merge": lambda own: ["merge", LORA, LORA, "--output", own / "out" / "merged.safetensors"],
    "dataset-sheet": lambda own: [*COMMANDS["dataset"](own), "--contact_sheet", own / "out" / "sheet.png"],
}


# Downloads grow under names of their own, and the report is printed
WRITERS = [name for name in COMMANDS | FILE_COMMANDS if name not in ("download-models", "dataset")]


@pytest.mark.parametrize("name", _rows(WRITERS))
def test_what_a_killed_run_left_half_written_goes_when_the_same_line_runs_again(
    tmp_path, hyimg, cached_dataset, watch, no_network_and_no_children, name
) -> None:
    line = (COMMANDS | FILE_COMMANDS)[name]
    first, second = World(tmp_path / "1", cached_dataset), World(tmp_path / "2", cached_dataset)
    with watch.on() as seen:
        code, _, err = hyimg(*first.line(line))
    assert code == 0, err
    written = [Path(path) for event, path in seen if event in ("os.rename", "os.link")]
    left = [
        second.own / path.relative_to(os.path.realpath(first.own)).with_name(temporary_name(path.name))
        for path in written
        if temporary_of(path.name) is None
    ]
    assert left
    theirs = [path.with_name(temporary_name("letter.txt")) for path in left]
    for path in [*left, *theirs]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    code, _, err = hyimg(*second.line(line))
    assert code == 0, err
    assert [path for path in left if path.exists()] == []
    # an earlier demo's folders, a state that `--overwrite` replaces and the hidden folder of a render that is complete
    # go with what is in them
    replaced = {"demo": "/out/", "train": "-state/"}.get(name, "/.hyimg-infer-")
    assert [path for path in theirs if not path.exists() and replaced not in path.as_posix()] == []

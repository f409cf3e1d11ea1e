from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hyimg.cache import atomic, own_files
from hyimg.cache.atomic import atomic_path, atomic_write_bytes, atomic_write_text, require_writable_folder
from hyimg.cache.own_files import (
    LinkError,
    list_folder,
    make_folder,
    open_to_append,
    remove_file,
    remove_leftovers,
    remove_tree,
    rename,
    temporary_name,
    temporary_of,
    temporary_stem,
    walk_files,
)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder outside of the root, with a file in it."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "a.txt").write_text("theirs")
    return folder


@pytest.fixture
def root(tmp_path: Path, victim: Path) -> Path:
    """A folder of ours, given by a link, with a link to the other folder in it."""
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "link").symlink_to(victim)
    (tmp_path / "real" / "own.txt").write_text("ours")
    return tmp_path / "root"


OPERATIONS: dict[str, Callable[[Path, Path], object]] = {
    "write": lambda path, root: atomic_write_text(path, "text", root=root),
    "write without replacing": lambda path, root: atomic_write_bytes(path, b"", root=root, replace=False),
    "make a folder": lambda path, root: make_folder(path, root=root),
    "list": lambda path, root: list_folder(path.parent, root=root),
    "walk": lambda path, root: list(walk_files(path.parent, root=root)),
    "rename from": lambda path, root: rename(path, root / "b.txt", root=root),
    "rename to": lambda path, root: rename(root / "own.txt", path, root=root),
    "remove a file": lambda path, root: remove_file(path, root=root),
    "remove a folder": lambda path, root: remove_tree(path, root=root),
    "append": lambda path, root: open_to_append(path, root=root),
    "clean up": lambda path, root: remove_leftovers(path.parent, lambda stem: True, root=root),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("inner", ["a.txt", "deep/er/a.txt"])
def test_no_operation_follows_a_link_to_a_folder(
    root: Path, victim: Path, operation: str, inner: str
) -> None:
    (victim / f"{temporary_name('x')}").write_text("a stranger's")
    before = sorted((path, path.read_text()) for path in victim.iterdir())
    with pytest.raises(
        LinkError, match="`.*/root/link` is a link, and links below `.*/root` are not"
    ) as told:
        OPERATIONS[operation](root / "link" / inner, root)
    assert told.value.exit_code == 2
    assert told.value.hint is not None
    assert sorted((path, path.read_text()) for path in victim.iterdir()) == before
    assert (root / "own.txt").read_text() == "ours"


def test_a_link_in_place_of_a_file_is_replaced_or_removed_itself(root: Path, victim: Path) -> None:
    for name in ("written", "appended", "removed", "removed_tree"):
        (root / name).symlink_to(victim / "a.txt")
    (root / "folder").symlink_to(victim)
    (root / "new").symlink_to(victim / "new.txt")  # a link that leads nowhere yet
    atomic_write_text(root / "written", "new", root=root)
    atomic_write_text(root / "new", "new", root=root)
    atomic_write_text(root / "folder", "new", root=root)
    with open_to_append(root / "appended", root=root) as file:
        file.write(b"new")
    remove_file(root / "removed", root=root)
    remove_tree(root / "removed_tree", root=root)
    for name in ("written", "appended", "new", "folder"):
        assert not (root / name).is_symlink()
        assert (root / name).read_text() == "new"
    assert not os.path.lexists(root / "removed")
    assert not os.path.lexists(root / "removed_tree")
    assert [path.read_text() for path in victim.iterdir()] == ["theirs"]


def test_the_root_itself_may_be_a_link_and_folders_are_walked_without_links(root: Path, victim: Path) -> None:
    make_folder(root / "one" / "two", root=root)
    atomic_write_text(root / "one" / "two" / "b.txt", "text", root=root)
    (root / "one" / "inner").symlink_to(victim)
    assert [str(path.relative_to(root)) for path in walk_files(root / "one", root=root)] == [
        "one/inner",
        "one/two/b.txt",
    ]
    rename(root / "one" / "two", root / "three" / "two", root=root)
    remove_tree(root / "one", root=root)
    assert sorted(os.listdir(root)) == ["link", "own.txt", "three"]
    remove_tree(root / "gone", root=root)
    assert (victim / "a.txt").read_text() == "theirs"


def test_a_temporary_file_is_made_where_nothing_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "victim").write_text("theirs")
    names = iter(["taken", "free"])
    monkeypatch.setattr(own_files, "temporary_name", lambda name: next(names))
    (tmp_path / "taken").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        own_files.create_temporary(tmp_path / "a")
    assert (tmp_path / "victim").read_text() == "theirs"


@pytest.mark.parametrize(
    "name", ["a.txt", "x" * 100, "x" * 101, "y" * 60 + "-step00000100.safetensors", "ü" * 120]
)
def test_a_temporary_name_tells_whose_it_is(name: str) -> None:
    temporary = temporary_name(name)
    assert temporary_of(temporary) == temporary_stem(name)
    assert len(os.fsencode(temporary)) <= 150
    assert temporary_name(name) != temporary
    assert temporary_stem(name) != temporary_stem(name[:-1] + "z")
    assert temporary_of(name) is None


def test_leftovers_of_a_killed_run_go_and_those_of_others_stay(tmp_path: Path) -> None:
    long = "x" * 240 + ".png"
    for name in ("a.png", long):
        (tmp_path / temporary_name(name)).write_text("half")
    (tmp_path / temporary_name("folder")).mkdir()
    (tmp_path / temporary_name("folder") / "file").parent.mkdir()
    stay = [tmp_path / temporary_name("another.png"), tmp_path / ".a.png.hyimg-tmp", tmp_path / "a.png"]
    for path in stay:
        path.write_text("a stranger's")
    link = tmp_path / temporary_name("a.png")
    link.symlink_to(tmp_path / "a.png")
    ours = {temporary_stem(name) for name in ("a.png", long, "folder")}
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # who alone can make another user's file
        stay.append(tmp_path / temporary_name("a.png"))
        stay[-1].write_text("another user's")
        os.chown(stay[-1], 65534, 65534)
    with atomic_path(tmp_path / "a.png") as living:
        os.utime(living, (0, 0))  # however long it takes
        remove_leftovers(tmp_path, ours.__contains__, root=tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([*stay, link, living])
        living.write_text("whole")
    assert (tmp_path / "a.png").read_text() == "whole"


@pytest.mark.parametrize("moment", ["before it is locked", "before it has its name"])
def test_a_file_is_no_leftover_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """What another run's cleaning up does between two operations of ours."""

    def cleaning(function: Callable[..., object]) -> Callable[..., object]:
        calls = iter(range(100))

        def call(*arguments: object) -> object:
            if next(calls) == 0:
                monkeypatch.setattr(own_files, "try_lock", try_lock)
                remove_leftovers(tmp_path, {"a"}.__contains__, root=tmp_path)
            return function(*arguments)

        return call

    try_lock = own_files.try_lock
    if moment == "before it is locked":
        monkeypatch.setattr(own_files, "try_lock", cleaning(try_lock))
    else:
        monkeypatch.setattr(atomic.os, "replace", cleaning(os.replace))
    atomic_write_text(tmp_path / "a", "whole")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.skipif(not hasattr(os, "kill"), reason="no signals")
def test_a_file_that_another_process_writes_is_no_leftover_until_it_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys; from hyimg.cache.atomic import atomic_path\n"
        f"with atomic_path({str(tmp_path / 'a.png')!r}): print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for path in tmp_path.iterdir():
            os.utime(path, (0, 0))
        remove_leftovers(tmp_path, {"a.png"}.__contains__, root=tmp_path)
        assert len(os.listdir(tmp_path)) == 1
        process.kill()
        process.wait()
    remove_leftovers(tmp_path, {"a.png"}.__contains__, root=tmp_path)
    assert os.listdir(tmp_path) == []


def test_where_no_file_can_be_locked_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_files, "try_lock", lambda descriptor: None)
    young, old = tmp_path / temporary_name("a"), tmp_path / temporary_name("a")
    young.write_text("")
    old.write_text("")
    os.utime(old, (time.time() - 7200,) * 2)
    remove_leftovers(tmp_path, {"a"}.__contains__, root=tmp_path)
    assert list(tmp_path.iterdir()) == [young]


def test_the_trial_of_a_folder_touches_nothing_and_cleans_up(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("theirs")
    (tmp_path / ".write-test.hyimg-tmp").symlink_to(tmp_path / "victim")  # the name in earlier releases
    (tmp_path / temporary_name(".write-test")).write_text("")
    require_writable_folder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".write-test.hyimg-tmp", "victim"]
    assert (tmp_path / "victim").read_text() == "theirs"


HYIMG = Path(own_files.__file__).parents[1]
CHANGES = {
    *(
        "unlink",
        "rmtree",
        "rename",
        "rmdir",
        "mkdir",
        "makedirs",
        "touch",
        "symlink_to",
        "hardlink_to",
        "link",
    ),
    *(
        "write_text",
        "write_bytes",
        "copyfile",
        "copy",
        "copytree",
        "move",
        "FileLock",
        "remove",
        "replace",
        "open",
    ),
}
OF_MODULES = {"remove": {"os"}, "replace": {"os"}, "link": {"os"}, "copy": {"shutil"}}
THE_PLACE = {"cache/own_files.py", "cache/atomic.py", "cache/index.py"}
# Others, each where no link can be on the way, or the folder is not the user's
ELSEWHERE = {
    "cache/entries.py": {"unlink", "replace"},  # after `require_no_links`
    "cache/download.py": {"unlink", "replace"},  # of the file that `open_to_append` has opened
    "stages/sample.py": {"rmdir"},
    "rendering/outputs.py": {"rmdir"},  # which does not follow a link
    "training/trackers.py": {"mkdir"},  # after `require_no_links`
    "benchmarks/micro/judge.py": {"write_text"},  # in a temporary folder of the system
    "memory/compilation.py": {"mkdir"},  # in the system's temporary folder
    "distributed/launch.py": {"rmtree", "open"},  # of its own folders in the temporary one
    "training/saves.py": {"touch"},
    "training/run_folder.py": {"mkdir", "FileLock", "unlink", "touch", "rmtree", "rename", "open"},
    "training/state.py": {"write_text", "rmdir", "rename", "rmtree", "unlink"},
    "training/saving.py": {"unlink"},
    "training/metrics.py": {"open"},
}


def _changes(path: Path) -> set[str]:
    """The names of calls in a module that write, make, rename or remove a file, but for what `atomic_path` gave."""
    found = set()
    for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
        # a bare name is a function of `own_files`, but for these
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        if isinstance(call.func, ast.Name) and name not in ("open", "FileLock"):
            continue
        of = getattr(getattr(call.func, "value", None), "id", None)
        arguments = [getattr(argument, "id", getattr(argument, "value", "")) for argument in call.args]
        modes = [*arguments, *(getattr(k.value, "value", "") for k in call.keywords if k.arg == "mode")]
        if name not in CHANGES or "temporary" in (of, *arguments) or of not in OF_MODULES.get(name, {of}):
            continue
        if name != "open" or any(
            re.fullmatch(r"[rwax]b?\+?b?", str(mode)) and set(mode) & set("wax+") for mode in modes
        ):
            found.add(name)
    return found


def test_files_are_changed_in_one_place() -> None:
    found = {path.relative_to(HYIMG).as_posix(): _changes(path) for path in HYIMG.rglob("*.py")}
    assert found["cache/own_files.py"] >= {"unlink", "rmtree", "rename", "mkdir"}
    strange = {
        name: calls - ELSEWHERE.get(name, set()) for name, calls in found.items() if name not in THE_PLACE
    }
    assert {name: calls for name, calls in strange.items() if calls} == {}

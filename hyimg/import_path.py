"""Python's import path: modules are never imported from the working directory.

It may contain somebody else's dataset, with a file named like a module that we import. Python puts it first on the path
of `python -m` and `python -c`, which is also how `multiprocessing` starts processes.
"""

# Python has imported these two before any code of ours runs; other imports would search the working directory
import os
import sys


def leave_out_working_folder() -> None:
    """Removes the entry that `python -m` adds, unless hyimg itself is there; called before other imports."""
    if getattr(sys.flags, "safe_path", False) or not sys.path or _is_root(sys.path[0] or os.curdir):
        return
    try:
        is_working_folder = os.path.samefile(sys.path[0] or os.curdir, os.curdir)
    except OSError:
        return
    if is_working_folder:
        del sys.path[0]


def keep_working_folder_out_of_children() -> None:
    """The same for child processes, by an environment variable that Python 3.10 ignores."""
    os.environ.setdefault("PYTHONSAFEPATH", "1")


def python_command(code: str) -> list[str]:
    """The start of a command line that runs `code` with this Python and hyimg on its path."""
    # our root last, since a folder of packages may contain one named like a standard module
    path = f"import sys; sys.path = [place for place in sys.path if place] + [{_ROOT!r}]; "
    return [sys.executable, "-c", path + code]


_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _is_root(folder: str) -> bool:
    try:
        return os.path.samefile(folder, _ROOT)
    except OSError:
        return False

"""What the modules of the command line share: names of flags, and what a command line requests."""

from __future__ import annotations

from dataclasses import dataclass

TRACEBACK_FLAG = "--traceback"
HELP_FLAGS = ("--help", "-h")


@dataclass
class Requests:
    """What a command line asks for that is no option of its command."""

    traceback: bool = False
    help: bool = False


def normalized(name: str) -> str:
    """A flag or a command's name as it is compared: with dashes."""
    return name.replace("_", "-")


def flag_of(name: str) -> str:
    """`--name`, and `-n` for a single letter."""
    return f"--{name}" if len(name) > 1 else f"-{name}"

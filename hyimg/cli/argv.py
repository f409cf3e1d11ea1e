"""A command line in one pass: options, their values, positional arguments, and the reference tool's flags.

Values stay text: `hyimg.config.load` converts and checks them, as it does those of a run file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from hyimg.cli.flag_names import HELP_FLAGS, TRACEBACK_FLAG, Requests, flag_of, normalized
from hyimg.config.command_table import COMMAND_TABLE, config_of
from hyimg.config.legacy import LEGACY, answer_flags
from hyimg.config.option import Option, all_options
from hyimg.errors import HyimgError, did_you_mean, first_few

_SWITCH_VALUES = {None: True, "true": True, "1": True, "false": False, "0": False}


class _Value(NamedTuple):
    """A value of `option`, which takes several; of None where it belongs to no flag.

    One that is `free`, not right behind its flag, is a positional argument while there is a place for one.
    """

    option: Option | None
    text: str
    free: bool


def read_arguments(
    command: str, words: Sequence[str], requests: Requests, notes: list[str]
) -> dict[str, Any]:
    """The options that the words after `hyimg COMMAND` give: text, a list of texts, True or False by name.

    Several values may follow one flag, and a flag given again adds to them; of another option the last value counts.
    The first words that are not right behind a flag are the positional arguments. A command with only one of these
    takes it as `--NAME VALUE` too. `--no_NAME` and `--NAME=false` switch off what a run file switches on.

    Fills in `requests`: where these include help, nothing is an error. Appends notes about flags of the reference tool
    to `notes`. Raises HyimgError for what the command does not take.
    """
    reader = _Reader(config_of(command), requests)
    reader.read(words)
    if not requests.help:
        for name, value in answer_flags(reader.legacy, reader.given, notes):
            reader.take_flag(flag_of(name), value)
        reader.place_values()
        reader.check(command)
    return {name: value for name, value in reader.given.items() if value != []}


class _Reader:
    def __init__(self, config: type, requests: Requests) -> None:
        self.given: dict[str, Any] = {}
        self.legacy: list[tuple[str, list[str]]] = []
        self._requests = requests
        self._positional = [opt for opt in all_options(config) if opt.argument]
        self._options = {
            normalized(flag_of(name)): opt
            for opt in all_options(config)
            if not opt.argument or len(self._positional) == 1
            for name in opt.names
        }
        self._words: deque[str] = deque()
        self._values: list[_Value] = []
        self._unknown: list[str] = []
        self._problems: list[str] = []
        self._surplus: list[str] = []

    def read(self, words: Sequence[str]) -> None:
        self._words.extend(words)
        listed: Option | None = None  # the flag of several values that was last
        while self._words:
            word = self._words.popleft()
            if word == "--":
                self._values += [_Value(None, value, free=True) for value in self._words]
                return
            if not word.startswith("-") or _is_number(word) or word == "-":
                self._values.append(_Value(listed, word, free=True))
            elif word == TRACEBACK_FLAG:
                self._requests.traceback = True
            elif word in HELP_FLAGS:
                self._requests.help = True
            elif not word.startswith("--"):
                listed = self.take_flag(word[:2], word[2:] or None)
            else:
                flag, equals, value = word.partition("=")
                listed = self.take_flag(flag, value if equals else None)

    def take_flag(self, flag: str, value: str | None) -> Option | None:
        """Takes a flag with its value, the next word if None; returns its option if more values may follow."""
        opt = self._options.get(normalized(flag))
        switch = self._options.get(f"--{normalized(flag).removeprefix('--no-')}")
        if opt is None and switch is not None and switch.kind == "bool" and value is None:
            self.given[switch.name] = False
        elif opt is None:
            self._take_other(flag, value)
        elif opt.kind == "bool":
            self._take_switch(opt, flag, value)
        elif (text := self._words.popleft() if value is None and self._words else value) is None:
            self._problems.append(f"`{flag}` needs a value")
        elif opt.many or opt.argument:
            self.given.setdefault(opt.name, [])
            self._values.append(_Value(opt, text, free=False))
            return opt if value is None and opt.many else None
        else:
            self.given[opt.name] = text
        return None

    def _take_switch(self, opt: Option, flag: str, value: str | None) -> None:
        state = _SWITCH_VALUES.get(value.lower() if value is not None else None)
        if state is None:
            self._problems.append(f"`{flag}` takes no value, got `{value}`")
        else:
            self.given[opt.name] = state

    def _take_other(self, flag: str, value: str | None) -> None:
        """A flag that the command does not have: one of the reference tool, or an unknown one."""
        name = flag.removeprefix("--").replace("-", "_")
        answer = LEGACY.get(name)
        if answer is None:
            self._unknown.append(flag if flag.startswith("--") else flag + (value or ""))
            return
        values = [] if value is None else [value]
        if answer.takes_value and not values and self._words and not self._words[0].startswith("--"):
            values.append(self._words.popleft())
        # `--text_encoder_lr 0 0`
        while (
            answer.takes_value and answer.answer == "refused" and self._words and _is_number(self._words[0])
        ):
            values.append(self._words.popleft())
        self.legacy.append((name, values))

    def place_values(self) -> None:
        """Gives the values to the options of several, and to the positional arguments."""
        named = [value.text for value in self._values if value.option in self._positional]
        places = sum(not opt.many for opt in self._positional) - len(named)
        positional = named
        for option, text, free in self._values:
            if option in self._positional:
                continue
            if option is None or (free and places > 0):
                positional.append(text)
                places -= 1
            else:
                self.given[option.name].append(text)
        for opt in self._positional:
            taken = positional if opt.many else positional[:1]
            if taken:
                self.given[opt.name] = taken if opt.many else taken[0]
            positional = positional[len(taken) :]
        self._surplus = positional

    def check(self, command: str) -> None:
        """Raises HyimgError for the first thing that is wrong."""
        listing = f"`hyimg {command} --help` lists the options"
        if self._unknown:
            name = self._unknown[0].lstrip("-").replace("-", "_")
            known = [flag_of(name) for opt in self._options.values() for name in opt.names]
            hint = _commands_with(name) or did_you_mean(f"--{name}", known) or listing
            raise HyimgError(f"no such option: `--{name}`", hint=hint)
        if self._problems:
            raise HyimgError(self._problems[0], hint=listing)
        if self._surplus:
            hint = f"quote a value that contains spaces, and put it after its option; {listing}"
            if self.given.get("output_config"):
                hint = (
                    "`--output_config` takes no value: it writes `OUTPUT_NAME.run.toml` into `--output_dir`"
                )
            elif (
                len(self._surplus) == 1
                and self._surplus[0].endswith(".toml")
                and "--dataset-config" in self._options
            ):
                hint = f"give it with its option: `--dataset_config {self._surplus[0]}`"
            unexpected = first_few([f"`{word}`" for word in self._surplus])
            raise HyimgError(f"unexpected argument: {unexpected}", hint=hint)


def _commands_with(name: str) -> str | None:
    """A hint that names the commands that have an option of that name, if there are any."""
    commands = [
        f"`hyimg {command}`"
        for command in COMMAND_TABLE
        if any(name in opt.names for opt in all_options(config_of(command)))
    ]
    return f"it is an option of {first_few(commands)}" if commands else None


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True

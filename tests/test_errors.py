"""Messages show any text on one line, and name many things in a few words."""

from __future__ import annotations

import errno
import pickle
import sys
import unicodedata

import pytest

from hyimg.errors import (
    MAX_LINE_CHARS,
    MAX_VALUE_CHARS,
    HyimgError,
    RunError,
    StoppedError,
    SystemLimitError,
    first_few,
    first_lines,
    printable,
    raise_system_limit,
    shown,
    system_limit,
    work_has_begun,
)

# What may steer a terminal or hide text, by Unicode's own tables; the joiners are part of Persian words and emoji
STEERING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI", "BN", "B", "S"}
JOINERS = "\u200c\u200d"


def test_every_character_that_steers_a_terminal_is_spelt_out() -> None:
    for char in map(chr, range(sys.maxunicode + 1)):
        category = unicodedata.category(char)
        steers = category in ("Cc", "Cs", "Zl", "Zp") or (
            category == "Cf" and unicodedata.bidirectional(char) in STEERING
        )
        if steers and char not in JOINERS:
            assert printable(char).isascii(), ascii(char)
            assert printable(char).startswith("\\"), ascii(char)
        elif category not in ("Cf", "Cn"):
            assert printable(char) == char, ascii(char)


def test_letters_of_every_script_are_shown_as_they_are() -> None:
    for text in ("naïve café", "猫　と 犬", "می\u200cخواهم", "שלום", "👩\u200d💻", r"C:\new\x1b"):
        assert printable(text) == text


def test_an_error_is_one_line_with_its_details_below() -> None:
    hostile = "a\nerror: forged\x1b]0;x\x07\u202e\udcff"
    escaped = r"a\nerror: forged\x1b]0;x\x07\u202e\udcff"
    error = RunError(f"`{hostile}` is bad:", details=[hostile, "second"], hint=["give", f"`{hostile}`"])
    assert error.message == f"`{escaped}` is bad:\n  {escaped}\n  second"
    assert error.hint == f"give\n`{escaped}`"
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back)) == (RunError, str(error))
    assert HyimgError(back.message, hint=back.hint).message == error.message
    assert HyimgError(f"again: {back.message}").message.count("\n") == 0


@pytest.mark.parametrize("length", [MAX_VALUE_CHARS, MAX_VALUE_CHARS + 1, 10**6])
@pytest.mark.parametrize("char", ["a", "\x1b", "\U000e0001"])
def test_a_long_value_is_cut_to_its_ends_and_length(length: int, char: str) -> None:
    message = HyimgError(f"`{char * length}` of `short` is bad").message
    assert message.endswith(" of `short` is bad")
    value = message.removesuffix(" of `short` is bad")
    assert len(value) <= MAX_VALUE_CHARS + 2
    assert (value == f"`{'a' * length}`") == (char == "a" and length == MAX_VALUE_CHARS)
    assert value.endswith(f" ({length} characters)`") or length == MAX_VALUE_CHARS == len(value) - 2
    assert shown(message) == message


def test_a_long_line_is_cut_and_a_command_is_not() -> None:
    line = shown("word " * 10_000)
    assert len(line) == MAX_LINE_CHARS
    assert line.endswith("(50000 characters)")
    command = f"`hyimg train --config '{'long/' * 200}run.toml'`"
    assert HyimgError("stopped", hint=f"go on with {command}").hint == f"go on with {command}"


def test_long_lists_name_the_first_and_count_the_rest() -> None:
    names = [f"`{n}.png`" for n in range(20)]
    assert first_few(names) == "`0.png`, `1.png`, `2.png` and 17 more"
    assert first_few(names, limit=1, separator="; ") == "`0.png`; and 19 more"
    assert first_lines(names, limit=2) == ["`0.png`", "`1.png`", "and 18 more"]


def test_a_rest_of_one_is_named() -> None:
    assert first_few(["a", "b", "c", "d"]) == "a, b, c, d"
    assert first_few(["a"]) == "a"
    assert first_few([]) == ""
    assert first_lines(["a", "b", "c"], limit=2) == ["a", "b", "c"]


def _chained(inner: BaseException, outer: BaseException, *, hide: bool = False) -> BaseException:
    try:
        try:
            raise inner
        except BaseException as error:
            raise outer from (None if hide else error)
    except BaseException as error:
        return error


@pytest.mark.parametrize("hide", [False, True])
def test_an_error_behind_which_the_system_has_a_limit_blames_no_file(hide: bool) -> None:
    blame = HyimgError("cannot read `a.png`")
    found = system_limit(_chained(OSError(errno.EMFILE, "Too many open files", "a.png"), blame, hide=hide))
    assert found is not None
    assert found.exit_code == 1
    assert found.message == "this process has too many open files (to open `a.png`)"
    assert "ulimit -n" in str(found.hint)
    with pytest.raises(SystemLimitError):
        raise_system_limit(_chained(found, HyimgError("is damaged"), hide=hide))
    assert system_limit(_chained(RuntimeError("can't start new thread"), blame)).exit_code == 1
    assert system_limit(_chained(FileNotFoundError(errno.ENOENT, "no"), blame)) is None
    failed = RunError("cannot be mapped into memory")
    assert system_limit(_chained(OSError(errno.ENOMEM, "Cannot allocate memory"), failed)) is None


def test_what_goes_wrong_after_the_work_has_begun_is_a_failed_run() -> None:
    class OwnError(HyimgError):
        pass

    for error, code in ((OwnError("gone"), 1), (StoppedError("stopped", signal_number=15), 143)):
        with pytest.raises(type(error)) as caught, work_has_begun():
            raise error
        assert caught.value.exit_code == code
        assert pickle.loads(pickle.dumps(caught.value)).exit_code == code
    assert OwnError("another").exit_code == 2

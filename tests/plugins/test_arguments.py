"""Arguments from the command line: names, types and missing ones, by the function's signature."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import pytest

from hyimg.errors import HyimgError
from hyimg.plugins import bind_arguments, parse_arguments

if TYPE_CHECKING:
    from nowhere import Unknown


def function(
    first,
    *,
    number: float = 1.0,
    count: int = 1,
    word: str = "",
    switch: bool = False,
    maybe: int | None = None,
    kind: Literal["soft", "hard", 2] = "soft",
    other: Unknown = None,
    pair: tuple[float, float] = (0, 1),
    free=3,
): ...


def needs(first, *, must: float): ...


def bind(*pairs, to=function):
    return bind_arguments(to, parse_arguments(pairs, "--x_args"), option="--x_args", name="it")


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("number=2", 2.0),
        ("number=1e-3", 0.001),
        ("count=3", 3),
        ("word=three words here", "three words here"),
        ("word='3'", "3"),
        ("switch=True", True),
        ("switch=false", False),
        ("maybe=none", None),
        ("maybe=7", 7),
        ("kind=hard", "hard"),
        ("kind=2", 2),
        ("other=[1, 2]", [1, 2]),
        ("pair=(1, 2)", (1, 2)),
        ("free=text", "text"),
    ],
)
def test_a_value_of_its_type_passes(pair, value):
    (bound,) = bind(pair).values()
    assert (bound, type(bound)) == (value, type(value))


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("number=abc", "`it` takes a number for `number`, got `abc`"),
        ("number=true", "`it` takes a number for `number`, got `True`"),
        ("number=none", "`it` takes a number for `number`, got `None`"),
        ("count=1.5", "`it` takes a whole number for `count`, got `1.5`"),
        ("word=3", "`it` takes text for `word`, got `3`"),
        ("switch=1", "`it` takes true or false for `switch`, got `1`"),
        ("maybe=x", "`it` takes a whole number or none for `maybe`, got `x`"),
        ("kind=medium", "`it` takes `soft` or `hard` or `2` for `kind`, got `medium`"),
        ("nubmer=1", "`it` takes no argument `nubmer`"),
        ("first=1", "`it` takes no argument `first`"),
        ("number", "`--x_args` takes `name=value`, got `number`"),
    ],
)
def test_another_is_refused_in_one_sentence(pair, words):
    with pytest.raises(HyimgError) as caught:
        bind(pair)
    assert words in caught.value.message
    assert "--x_args" in caught.value.message


def test_the_nearest_name_and_the_way_to_quote_are_told():
    with pytest.raises(HyimgError) as caught:
        bind("nubmer=1")
    assert caught.value.hint == "did you mean `number`?"
    with pytest.raises(HyimgError) as caught:
        bind("word=3")
    assert caught.value.hint == "quote a text that looks like a number: `word='3'`"


def test_a_missing_argument_is_named():
    assert bind("must=2", to=needs) == {"must": 2.0}
    with pytest.raises(HyimgError, match="`it` needs the argument `must`") as caught:
        bind(to=needs)
    assert caught.value.hint == 'give `--x_args "must=VALUE"`'


def test_a_class_is_asked_by_its_constructor():
    class Thing:
        def __init__(self, first, *, number: float = 1.0): ...

    assert bind("number=2", to=Thing) == {"number": 2.0}
    with pytest.raises(HyimgError, match="takes a number"):
        bind("number=x", to=Thing)

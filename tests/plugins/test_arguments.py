"""Arguments from the command line: names, types and missing ones, by the function's signature."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import pytest

from hyimg.errors import HyimgError
from hyimg.plugins.arguments import bind_arguments, check_kinds, parse_arguments

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
    with pytest.raises(HyimgError, match="must be a number"):
        bind("number=x", to=Thing)


@pytest.mark.parametrize(
    ("pairs", "words", "hint"),
    [
        # as the shell hands over `weight_decay=0.5, betas=0.9,0.99,` with and without quotes
        (
            ["weight_decay=0.5,", "betas=0.9,0.99,"],
            "stray comma in `weight_decay=0.5,`",
            "`weight_decay=0.5`",
        ),
        (["betas=0.9,0.99,"], "stray comma in `betas=0.9,0.99,`", "`betas=0.9,0.99`"),
        ([",betas=0.9,0.99"], "stray comma in `,betas=0.9,0.99`", "`betas=0.9,0.99`"),
        (["betas=0.9,", "0.99"], "stray comma in `betas=0.9,`", "`betas=0.9,0.99`"),
        (
            ["weight_decay=0.5, betas=0.9,0.99,"],
            "several arguments in one text: `weight_decay=0.5, betas=0.9,0.99,`",
            '`--x_args "weight_decay=0.5" "betas=0.9,0.99"`',
        ),
        (["eps=1e-8 amsgrad=True"], "several arguments in one text", '"eps=1e-8" "amsgrad=True"'),
        (["eps=1e-8,amsgrad=True"], "several arguments in one text", '"eps=1e-8" "amsgrad=True"'),
        (["betas=0.9 0.99"], "the numbers of `betas` are not separated by commas", "`betas=0.9,0.99`"),
        (["betas=0.9", "0.99"], "takes `name=value`, got `0.99`", "`betas=0.9,0.99`"),
        (["weight_decay 0.5"], "takes `name=value`, got `weight_decay 0.5`", "`weight_decay=0.5`"),
        (["weight_decay: 0.5"], "takes `name=value`, got `weight_decay: 0.5`", "`weight_decay=0.5`"),
        (["eps=1", ","], "takes `name=value`, got `,`", '`--x_args "name=value" "name=value"`'),
        (["eps=1", "eps=2"], "`--x_args` gives `eps` twice", "keep one"),
    ],
)
def test_a_slip_in_the_form_is_named_with_the_text_as_it_should_be(pairs, words, hint):
    with pytest.raises(HyimgError) as caught:
        parse_arguments(pairs, "--x_args")
    assert words in caught.value.message
    assert "--x_args" in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("a=0.9,0.99", (0.9, 0.99)),
        ("a=0.9, 0.99", (0.9, 0.99)),
        ("a=(1,)", (1,)),
        ("a='x, b=1'", "x, b=1"),
        ("a=1:10,0.5:20,0.1", "1:10,0.5:20,0.1"),
        ("a=double.*=4, single_blocks=8,", "double.*=4, single_blocks=8,"),
        ("a={1, 2}", {1, 2}),
    ],
)
def test_commas_and_blanks_inside_a_value_stay(pair, value):
    assert parse_arguments([pair], "--x_args") == {"a": value}


def packaged(
    params, betas=(0.9, 0.99), lr=1e-3, steps=10, amsgrad=False, milestones=(), other=None, open_=(1.0, 2.0)
): ...


packaged.__annotations__["open_"] = "tuple[float, ...]"


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("lr=0,5", "`lr` of `it` in `--x_args` must be a number, got `0,5`"),
        ("lr=fast", "`lr` of `it` in `--x_args` must be a number, got `fast`"),
        ("lr=true", "`lr` of `it` in `--x_args` must be a number, got `True`"),
        ("betas=0.9", "`betas` of `it` in `--x_args` must be numbers like `0.9,0.99`, got `0.9`"),
        (
            "betas=0.9,0.99,0.999",
            "`betas` of `it` in `--x_args` must be numbers like `0.9,0.99`, got `0.9,0.99,0.999`",
        ),
        ("amsgrad=yes", "`amsgrad` of `it` in `--x_args` must be true or false, got `yes`"),
    ],
)
def test_a_value_of_another_kind_than_the_default_is_named(pair, words):
    with pytest.raises(HyimgError) as caught:
        check_kinds(packaged, parse_arguments([pair], "--x_args"), option="--x_args", name="it")
    assert words in caught.value.message


@pytest.mark.parametrize(
    "pair",
    [
        "lr=1",
        "lr=none",
        "lr=[0.1, 0.2]",
        "steps=2.5",
        "betas=[0.9, 0.8]",
        "amsgrad=1",
        "milestones=1,2",
        "other=x",
        "open_=1,2,3",
    ],
)
def test_a_value_that_may_fit_the_default_passes(pair):
    check_kinds(packaged, parse_arguments([pair], "--x_args"), option="--x_args", name="it")

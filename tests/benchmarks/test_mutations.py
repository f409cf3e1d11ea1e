"""The list of mutations fits the tree, and a tried mutation is told as what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.mutations import Copy, Mutation, Outcome, load, problems


def test_every_mutation_has_its_snippet_once_and_its_tests() -> None:
    assert problems(load()) == []


CODE = """def total(values):
    result = sum(
        values,
    )
    return result


def largest(values):
    return max(values)
"""
TESTS = """from hyimg.numbers_of_a_list import largest, total


def test_total():
    assert total([1, 2]) == 3


def test_largest():
    assert largest([1]) == 1
"""
TEST_TOTAL = "tests/lists/test_lists.py::test_total"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small project of one module and its tests."""
    root = tmp_path / "tree"
    for path, text in (
        ("hyimg/__init__.py", ""),
        ("hyimg/numbers_of_a_list.py", CODE),
        ("tests/lists/test_lists.py", TESTS),
        (
            "pyproject.toml",
            '[tool.pytest.ini_options]\naddopts = "--import-mode=importlib"\npythonpath = ["."]\n',
        ),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def mutation() -> Callable[..., Mutation]:
    def made(old: str, new: str, **others: object) -> Mutation:
        entry = {"room": "lists", "what": "sums", "tests": ["test_lists.py"], "old": old, "new": new}
        return Mutation(**{**entry, **others})

    return made


def test_a_mutation_is_killed_or_survives_and_the_tree_stays_as_it_is(
    tree: Path, tmp_path: Path, mutation: Callable[..., Mutation]
) -> None:
    copy = Copy(tmp_path / "copy", root=tree, timeout=60)
    assert copy.try_out(mutation("sum(values)", "sum(values) + 1")) == Outcome("killed", TEST_TOTAL)
    assert copy.try_out(mutation("return max(values)", "return min(values)")).result == "survived"
    assert copy.try_out(mutation("max(values)", "0", select="total")).result == "survived"
    assert copy.try_out(mutation("max(values)", "0", select="no_such_test")).result.startswith("not tested")
    assert copy.try_out(mutation("values", "others")).result.startswith("snippet found")
    assert copy.fail_anyway([TEST_TOTAL]) == [], "the copy is as it was"
    assert (tree / "hyimg/numbers_of_a_list.py").read_text(encoding="utf-8") == CODE


def test_a_mutation_that_hangs_is_killed_only_where_that_is_expected(
    tree: Path, tmp_path: Path, mutation: Callable[..., Mutation]
) -> None:
    copy = Copy(tmp_path / "copy", root=tree, timeout=1)
    endless = mutation("return max(values)", "while True:\n    pass")
    assert copy.try_out(endless).result == "timed out"
    assert copy.try_out(mutation(endless.old, endless.new, hangs=True)).result == "killed"


def test_a_test_that_fails_anyway_kills_nothing(tree: Path, tmp_path: Path) -> None:
    tests = tree / "tests/lists/test_lists.py"
    tests.write_text(TESTS.replace("== 3", "== 4"), encoding="utf-8")
    both = [TEST_TOTAL, TEST_TOTAL.replace("total", "largest")]
    assert Copy(tmp_path / "copy", root=tree, timeout=60).fail_anyway(both) == [TEST_TOTAL]


def test_an_entry_that_does_not_fit_the_tree_is_named(tree: Path, mutation: Callable[..., Mutation]) -> None:
    found = problems(
        [
            mutation("sum(values)", "sum(values) + 1"),
            mutation("sum(others)", "0"),
            mutation("values", "others"),
            mutation("max(values)", "max(values"),
            mutation("max(values)", "0", tests=["test_tuples.py"]),
            mutation("max(values)", "0", select="largest and not smallest"),
        ],
        tree,
    )
    assert [line[0] for line in found] == ["2", "3", "4", "5", "6"]
    assert "0 times" in found[0]
    assert "no Python" in found[2]
    assert "`test_tuples.py`" in found[3]
    assert found[4].endswith("`smallest`")

"""What a plugin's function raises or returns becomes an error that names it; what it calls of ours keeps its own."""

from __future__ import annotations

import pytest
import torch

from hyimg.errors import HyimgError, RunError
from hyimg.plugins.guard import check_tensor, guarded


@pytest.mark.parametrize("error", [ValueError("no\nway"), SystemExit("no way")])
def test_an_exception_is_one_sentence_with_its_cause(error):
    with (
        pytest.raises(RunError, match=f"^it failed: {type(error).__name__}: no way\nhint: fix it$") as caught,
        guarded("it failed", hint="fix it", error=RunError),
    ):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [HyimgError("known"), MemoryError(), torch.OutOfMemoryError("CUDA out of memory")]
)
def test_errors_of_ours_and_a_lack_of_memory_pass(error):
    with pytest.raises(type(error)) as caught, guarded("it failed", hint="fix it"):
        raise error
    assert caught.value is error


def test_what_a_plugin_calls_is_not_blamed_on_it_but_a_wrong_call_is():
    def ours(x):
        raise ValueError("ours")

    with pytest.raises(ValueError, match="^ours$"), guarded("it failed", hint="fix it") as guard:
        guard.unblamed(ours)(1)
    with pytest.raises(HyimgError, match="^it failed: TypeError"), guarded("it failed", hint="") as guard:
        guard.unblamed(ours)()


@pytest.mark.parametrize(
    ("value", "given"),
    [
        ([1.0, 2.0], "list"),
        (torch.ones(2, 1), r"float32 of shape \(2, 1\)"),
        (torch.ones(2).int(), "int32 of shape"),
    ],
)
def test_a_wrong_result_is_described_with_what_is_expected(value, given):
    with pytest.raises(HyimgError, match=rf"^it returned {given}.*, not a float tensor of shape \(2,\)"):
        check_tensor(value, (2,), "it returned", hint="")
    right = torch.ones(2)
    assert check_tensor(right, (2,), "it returned", hint="") is right

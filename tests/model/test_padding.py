from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from hyimg.model.attention import pack, stack_padded, unpack


def rows(lengths: list[int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 2, (length, 3, 2), generator=generator).to(dtype) for length in lengths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("lengths", [[4, 2, 0, 4], [3], [0, 0], [2, 2]])
def test_stacking_equals_torchs_padding(lengths: list[int], dtype: torch.dtype) -> None:
    given = rows(lengths, dtype)
    stacked = stack_padded(given)
    assert stacked.dtype == dtype
    assert torch.equal(stacked, pad_sequence(given, batch_first=True))
    assert torch.equal(unpack(pack(stacked, lengths), lengths), stacked)


def test_the_backward_pass_of_stacking_grows_linearly_with_the_batch() -> None:
    """What is written to new memory grows with the batch, and not with its square."""

    class Written(TorchDispatchMode):
        num_values = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result._base is None:
                Written.num_values += result.numel()
            return result

    def written(num_rows: int) -> int:
        x = torch.ones(num_rows, 8, 4, requires_grad=True)
        lengths = [8, *[5] * (num_rows - 1)]
        out = unpack(pack(x, lengths), lengths)
        Written.num_values = 0
        with Written():
            out.backward(torch.ones_like(out))
        assert x.grad is not None
        assert x.grad.sum() == 4 * sum(lengths)
        return Written.num_values

    assert written(32) < 5 * written(8)

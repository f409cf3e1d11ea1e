from __future__ import annotations

import pytest

from hyimg.checkpoints.architecture import DIT_2_1
from hyimg.checkpoints.names import linear_modules
from hyimg.reports.dataset_stats import image_tokens, relative_cost


@pytest.mark.parametrize("size", [(256, 256), (1024, 1024), (2560, 1536)])
def test_the_cost_is_that_of_the_models_linear_layers_and_attention(size: tuple[int, int]) -> None:
    blocks = DIT_2_1.num_double + DIT_2_1.num_single
    weights = sum(
        module.in_features * module.out_features
        for module in linear_modules(DIT_2_1)
        if "txt" not in module.name and "mod" not in module.name
    )

    def operations(num_tokens: int) -> int:
        return 2 * weights * num_tokens + 4 * blocks * DIT_2_1.hidden * num_tokens**2

    expected = operations(image_tokens(size)) / operations(image_tokens((2048, 2048)))
    assert relative_cost(size) == pytest.approx(expected)

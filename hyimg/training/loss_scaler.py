"""Loss scaling, which keeps small float16 gradients from rounding to zero (Micikevicius et al., arXiv 1710.03740).

torch's `GradScaler` refuses gradients that are float16 themselves, which `--full_fp16` makes, and looks for
infinities on its own; here the norm that every step has anyway says whether there is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# The constants of torch.amp.GradScaler
_GROWTH = 2.0
_BACKOFF = 0.5
_GROWTH_INTERVAL = 2000


class LossScaler:
    """The factor on the loss: halved after a gradient that is not finite, doubled after 2000 that are.

    It is a power of two, so that scaling and unscaling round nothing.
    """

    def __init__(self, scale: float = 65536.0) -> None:
        self.scale = scale
        self._finite_steps = 0

    def overflowed(self, norm: float) -> bool:
        """Whether a gradient's norm is not finite because of the scale, which a smaller one may mend.

        At a scale of 1 or less the gradient itself is at fault.
        """
        return not math.isfinite(norm) and self.scale > 1

    def update(self, *, finite: bool) -> None:
        """Chooses the next step's scale; `finite` says whether this step's gradient was."""
        self._finite_steps = self._finite_steps + 1 if finite else 0
        if not finite:
            self.scale *= _BACKOFF
        elif self._finite_steps == _GROWTH_INTERVAL:
            self.scale *= _GROWTH
            self._finite_steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "finite_steps": self._finite_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scale = state["scale"]
        self._finite_steps = state["finite_steps"]

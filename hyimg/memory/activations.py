"""What autograd keeps of the blocks between forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hyimg.model.dit import DiT


def enable_gradient_checkpointing(dit: DiT) -> None:
    """Recomputes each block in the backward pass instead of keeping its activations."""
    run = dit.run_block

    def run_checkpointed(block: nn.Module, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(block, *args)
        return checkpoint(run, block, *args, use_reentrant=False)

    dit.run_block = run_checkpointed

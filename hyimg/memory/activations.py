"""What autograd keeps of the blocks between forward and backward: recomputation, and the ways to soften it.

Every option gives the same gradients, bit for bit; they trade time for memory:

- checkpointing keeps the inputs of a block and runs it again in the backward pass
- keeping attention stores the attention's output too, so that the second run skips its dearest kernel
- offloading moves the kept inputs to host memory in between (`hyimg.memory.offload`)
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hyimg.memory.offload import Offloader
from hyimg.model.attention import Attend
from hyimg.model.dit import DiT, RunBlock

# The operators that compute an attention, without their namespace: torch's own (of every device), and those that
# flash-attn and xformers register (whose namespaces have changed over the years)
_ATTENTION_OPERATOR = re.compile(
    r"_scaled_dot_product_\w+"
    r"|_?(efficient|flash)_attention_forward\w*"
    r"|_?flash_attn(_varlen)?_forward"
    r"|flash_fwd"
)


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Which activations of the blocks are kept, and where.

    `keep_attention` and `offload` say how to checkpoint, so that either of them switches it on.
    """

    enabled: bool = False
    keep_attention: bool = False
    offload: bool = False

    @property
    def active(self) -> bool:
        """Whether blocks are recomputed at all."""
        return self.enabled or self.keep_attention or self.offload


def checkpointed(run: RunBlock, options: CheckpointOptions, device: torch.device) -> RunBlock:
    """`run`, but recomputing a block in the backward pass instead of keeping its activations.

    Nothing changes without gradients. `run` is called again for the recomputation, in the middle of the
    backward pass and in reverse order, and may be left by an exception there, as soon as all is recomputed.
    """
    if not options.active:
        return run
    offloader = Offloader.for_device(device) if options.offload else None

    def run_checkpointed(block: nn.Module, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(block, *args)
        contexts: dict[str, Any] = {}
        if options.keep_attention:
            kept = _KeptAttention(attend=args[-1])
            args, contexts = (*args[:-1], kept), {"context_fn": kept.contexts}
        with offloader.inputs() if offloader else contextlib.nullcontext():
            return checkpoint(
                run,
                block,
                *args,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing in a block draws from torch's generators
                **contexts,
            )

    return run_checkpointed


def enable_gradient_checkpointing(dit: DiT) -> None:
    """Recomputes each block in the backward pass instead of keeping its activations."""
    dit.run_block = checkpointed(dit.run_block, CheckpointOptions(enabled=True), dit.device)


class _KeptAttention:
    """A block's attention whose operators run in the forward pass only; the recomputation gets their results.

    torch's selective checkpointing does it, with its modes confined to the attention: they would slow down
    every other operator of a block, and the compiler does not run under them.
    """

    def __init__(self, attend: Attend) -> None:
        self.attend = attend
        self.mode: AbstractContextManager[Any] = contextlib.nullcontext()

    def __call__(self, q_BTNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor) -> Tensor:
        with self.mode:
            return self.attend(q_BTNK, k_BTNK, v_BTNK)

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What the forward pass and the recomputation run under."""
        keeping, replaying = create_selective_checkpoint_contexts(  # type: ignore[no-untyped-call]
            _keep_attention
        )
        return self._within(keeping), self._within(replaying)

    @contextlib.contextmanager
    def _within(self, mode: AbstractContextManager[Any]) -> Iterator[None]:
        self.mode = mode
        try:
            yield
        finally:
            self.mode = contextlib.nullcontext()


def _keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(operator).split(".")[-2:-1]  # namespace.name.overload
    is_attention = bool(name) and _ATTENTION_OPERATOR.fullmatch(name[0]) is not None
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE

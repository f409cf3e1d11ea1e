"""What every kind of adapter offers: the whole of what the network, the loop, states, saving and rendering ask for.

The built-in `LoRA` and the kinds that plugins give through `hyimg_networks` are subclasses. A kind needs three
things of its own: parameters made in `__init__`, their first values in `initialize`, and the change of the
weight that they stand for in `delta`. All else follows, and may be overridden where a kind does it better.

Shapes: P tokens, I input features, O output features
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hyimg.lora.dropout import Dropout
from hyimg.model.layers import Linear

if TYPE_CHECKING:
    from hyimg.lora.plan import ModulePlan


class Adapter(nn.Module, ABC):
    """What is trained beside one frozen Linear: it adds multiplier * x @ delta().T to the Linear's output.

    It is one of `hyimg.model.layers.Linear.adapters`. `alpha` and `multiplier` are plain numbers, so that the
    forward pass never waits for the device to read them; with a multiplier of 0 the output is the base's, bit
    for bit. `dropout` acts only while it has a key. Parameters are float32 (16 bits with `--full_bf16`), and are
    saved, resumed and averaged under their own names: `NAME` becomes `lora_unet_..._img_attn_qkv.NAME` in a file.
    """

    honours: ClassVar[frozenset[str]] = frozenset()
    """The options that not every kind can follow and this one does, out of `OPTIONAL`; others are refused."""

    OPTIONAL: ClassVar[Mapping[str, str]] = {
        "network_dropout": "`--network_dropout`",
        "rank_dropout": '`--network_args "rank_dropout=..."`',
        "split_qkv": '`--network_args "split_qkv=True"`',
        "dora": '`--network_args "dora=True"`',
        "loraplus_lr_ratio": '`--network_args "loraplus_lr_ratio=..."`',
        "scale_weight_norms": "`--scale_weight_norms`",
        "dim_from_weights": "`--dim_from_weights`",
        "torch_compile": "`--torch_compile`",
    }

    def __init__(self, in_features: int, out_features: int, *, rank: int, alpha: float) -> None:
        """A subclass may take further keyword arguments: they are what `--network_args` may set."""
        super().__init__()
        assert rank > 0
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.alpha = alpha
        self.multiplier = 1.0
        self.dropout: Dropout | None = None

    @classmethod
    def create(cls, plan: ModulePlan, **arguments: Any) -> Adapter:
        """The adapter that a module's plan asks for; its values are set by `initialize` or `load_tensors`."""
        return cls(plan.in_features, plan.out_features, rank=plan.rank, alpha=plan.alpha, **arguments)

    @property
    def scale(self) -> float:
        """alpha/rank."""
        return self.alpha / self.rank

    # ---- what a kind must have

    def initialize(self, *key: object) -> None:
        """Sets the first values, so that a fresh adapter does nothing.

        Drawn from `hyimg.randomness.keyed_generator(*key, "a word for each parameter")`, never from torch's
        global generator: then they are the same whatever else is drawn, and on every process. Kinds that are only read
        from files have none.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `initialize`")

    @abstractmethod
    def delta(self) -> Tensor:
        """What is added to the base weight at a multiplier of 1, `scale` in it: float32 (O, I), with its graph."""

    # ---- what follows

    def forward(self, x_PI: Tensor, y_PO: Tensor) -> Tensor:
        """Adds the update for the input x (P, I) to the base layer's output y (P, O), in place where it can."""
        dropout = self.dropout if self.dropout is not None and self.dropout.is_on else None
        if self.multiplier == 0 or (dropout is not None and dropout.drops_module()):
            return y_PO
        return self.add_update(x_PI, y_PO, dropout)

    def add_update(self, x_PI: Tensor, y_PO: Tensor, dropout: Dropout | None = None) -> Tensor:
        """multiplier times the update into y, computed in the dtype of x; here by the whole of `delta`.

        A kind that need not make a matrix of the weight's size says so here.
        """
        delta_OI = (self.delta() * self.multiplier).to(x_PI.dtype)
        return y_PO.addmm_(x_PI, delta_OI.t())

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of the adapter, detached, by the ends of the names (`alpha` among them)."""
        own = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return {**own, "alpha": torch.tensor(self.alpha)}

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over the values of `tensors()`; an alpha that is not there stays as it is."""
        for name, parameter in self.named_parameters():
            parameter.copy_(tensors[name])
        if "alpha" in tensors:
            self.alpha = float(tensors["alpha"])

    def misfit(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Why tensors of the right names and shapes cannot be loaded, as the end of a sentence; None where they can."""
        return None

    def roles(self) -> list[tuple[str, list[nn.Parameter]]]:
        """The parameters by what they are: `down` and `up` tell apart what LoRA+ gives other rates."""
        return [("", list(self.parameters()))]

    @torch.no_grad()
    def merged(self, weight_OI: Tensor, multiplier: float = 1.0, *, base_OI: Tensor | None = None) -> Tensor:
        """The weight with which a Linear does what `weight_OI` and the adapter do together; float32.

        `base_OI` is the weight as it was before other adapters were merged into it, where any were.
        """
        return weight_OI.float() + multiplier * self.delta().to(weight_OI.device)

    @torch.no_grad()
    def update_norm(self) -> Tensor:
        """The Frobenius norm of `delta()`, a float32 scalar where the adapter is."""
        norm: Tensor = torch.linalg.vector_norm(self.delta())
        return norm

    def shrink(self, factor: float) -> None:
        """Makes the update `factor` times what it is; for kinds that honour `scale_weight_norms`."""
        raise NotImplementedError(f"{type(self).__name__} has no `shrink`")

    def attached(self, linear: Linear) -> None:
        """Called when the adapter begins to act on a Linear."""

    def detached(self) -> None:
        """Called when it no longer does."""

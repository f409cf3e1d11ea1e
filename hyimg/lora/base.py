"""The base class of adapters, which the network, the loop, states, saving and rendering rely on, and their dropout.

The built-in kinds and those that plugins register through `hyimg_networks` are subclasses. A kind must define its
parameters in `__init__`, their initial values in `initialize`, and the change of the weight in `delta`. All else
has a default, which a kind may override with something faster.

Dropout masks depend on (seed, step, micro-batch, module) alone. There are three kinds, as in the reference tool
(its networks/lora_flux.py):

    dropout   each value of down(x) is 0 with probability p, otherwise multiplied by 1/(1-p)
    rank      each rank of each image is dropped with probability p, the others are multiplied by 1/(1-p)
    module    the adapter is skipped for the batch with probability p, without rescaling

Because a mask depends on its key alone, it is the same in the second forward pass of gradient checkpointing and
after a resume. Masks are drawn on the CPU, since devices draw differently.

Shapes: B images, P tokens of all images, I input features, O output features, R rank
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hyimg.model.layers import Linear
from hyimg.randomness import keyed_generator, keyed_random

if TYPE_CHECKING:
    from hyimg.lora.rank_plan import ModulePlan


DrawKey = tuple[object, ...]


@dataclass(frozen=True)
class DropoutRates:
    """The probabilities of the three kinds, each in [0, 1)."""

    dropout: float = 0.0
    rank: float = 0.0
    module: float = 0.0

    @property
    def any(self) -> bool:
        return bool(self.dropout or self.rank or self.module)


@dataclass
class Dropout:
    """The dropout of the adapter of one module. It is off while `key` is None."""

    rates: DropoutRates
    module: str
    key: DrawKey | None = None
    num_images: int = 1

    @property
    def is_on(self) -> bool:
        return self.key is not None

    def drops_module(self) -> bool:
        """Whether the adapter is skipped under this key."""
        assert self.key is not None
        draw = keyed_random(*self.key, self.module, "module dropout").random()
        return draw < self.rates.module

    def __call__(self, hidden: Tensor, part: int = 0) -> Tensor:
        """Drops values and ranks of down(x), (P, R) of any floating dtype, whose rows are grouped by image.

        `part` is the number of the adapter in a split module.
        """
        assert self.key is not None
        if p := self.rates.dropout:
            hidden = hidden * self._mask(hidden, tuple(hidden.shape), p, "dropout", part)
        if p := self.rates.rank:
            shape = (self.num_images, 1, hidden.shape[-1])
            mask_B1R = self._mask(hidden, shape, p, "rank dropout", part)
            hidden = (hidden.view(self.num_images, -1, hidden.shape[-1]) * mask_B1R).flatten(0, 1)
        return hidden

    def _mask(self, like: Tensor, shape: tuple[int, ...], p: float, kind: str, part: int) -> Tensor:
        """0 where something is dropped, 1/(1-p) elsewhere."""
        assert self.key is not None
        generator = keyed_generator(*self.key, self.module, kind, part)
        return _kept(shape, p, generator).to(like.device).to(like.dtype) / (1 - p)


def _kept(shape: tuple[int, ...], p: float, generator: torch.Generator) -> Tensor:
    """True with probability 1-p, to 1/65536: four draws from each 64-bit word, 4 times as fast as bernoulli_."""
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    threshold = min(round(p * 2**16), 2**16 - 1) - 2**15
    return (words.view(torch.int16)[:count] >= threshold).view(shape)


def at_least_float32(tensor: Tensor, device: torch.device | str | None = None) -> Tensor:
    """A tensor on `device` (None: where it is) in float32, or in float64 if it has that."""
    return tensor.to(device, torch.promote_types(tensor.dtype, torch.float32))


class Adapter(nn.Module, ABC):
    """Trained next to one frozen Linear: it adds multiplier * x @ delta().T to the Linear's output.

    It is one of `hyimg.model.layers.Linear.adapters`. `alpha` and `multiplier` are Python numbers, so that the
    forward pass never waits for the device; with a multiplier of 0 the output is the base's, bit for bit. `dropout`
    is active only while it has a key. Parameters are float32 (16 bits with `--full_bf16`), and are saved, resumed
    and averaged under their own names: `NAME` becomes `lora_unet_..._img_attn_qkv.NAME` in a file.
    """

    supports: ClassVar[frozenset[str]] = frozenset()
    """The options out of `OPTIONAL_FEATURES` that this kind supports; the others are refused."""

    OPTIONAL_FEATURES: ClassVar[Mapping[str, str]] = {
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
        """Further keyword arguments of a subclass can be set through `--network_args`."""
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
        """The adapter for a module's plan; `initialize` or `load_tensors` sets its values."""
        return cls(plan.in_features, plan.out_features, rank=plan.rank, alpha=plan.alpha, **arguments)

    @property
    def scale(self) -> float:
        """alpha/rank."""
        return self.alpha / self.rank

    # ---- required

    def initialize(self, *key: object) -> None:
        """Sets the initial values, so that a fresh adapter does nothing.

        Draw from `hyimg.randomness.keyed_generator(*key, "a word for each parameter")`, never from torch's
        global generator: the values are then the same on every process, whatever else is drawn.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `initialize`")

    @abstractmethod
    def delta(self) -> Tensor:
        """The change of the base weight at a multiplier of 1, `scale` included: float32 (O, I), with its graph."""

    # ---- with defaults

    def delta_rows(self, rows: slice, device: torch.device | str | None = None) -> Tensor:
        """Some rows of `delta()`, computed on `device` (None: where the adapter is)."""
        return self.delta()[rows].to(device)

    def forward(self, x_PI: Tensor, y_PO: Tensor) -> Tensor:
        """Adds the update for the input x (P, I) to the base layer's output y (P, O), in place where possible."""
        dropout = self.dropout if self.dropout is not None and self.dropout.is_on else None
        if self.multiplier == 0 or (dropout is not None and dropout.drops_module()):
            return y_PO
        return self.add_update(x_PI, y_PO, dropout)

    def add_update(self, x_PI: Tensor, y_PO: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Adds multiplier times the update to y, computed in the dtype of x; by default with all of `delta`.

        Override it in a kind that can do without a matrix of the weight's size.
        """
        delta_OI = (self.delta() * self.multiplier).to(x_PI.dtype)
        return y_PO.addmm_(x_PI, delta_OI.t())

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors in a file, detached, by the ends of their names, with a scalar `alpha`."""
        own = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return {**own, "alpha": torch.tensor(self.alpha)}

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the values of `tensors()`; without an `alpha` the adapter's own remains."""
        for name, parameter in self.named_parameters():
            parameter.copy_(tensors[name])
        if "alpha" in tensors:
            self.alpha = float(tensors["alpha"])

    def mismatch(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Why tensors with the right names and shapes cannot be loaded, as the end of a sentence; None if they can."""
        return None

    def roles(self) -> list[tuple[str, list[nn.Parameter]]]:
        """The parameters by role: LoRA+ gives `down` and `up` different learning rates."""
        return [("", list(self.parameters()))]

    @torch.no_grad()
    def merged(self, weight_OI: Tensor, multiplier: float = 1.0, *, base_OI: Tensor | None = None) -> Tensor:
        """The weight with which a Linear does what `weight_OI` and the adapter do together; float32 (O, I).

        `base_OI` is the weight before other adapters were merged into it, if any were.
        """
        return weight_OI.float() + multiplier * self.delta().to(weight_OI.device)

    @torch.no_grad()
    def update_norm(self) -> Tensor:
        """The Frobenius norm of `delta()`: a scalar of its dtype, on the adapter's device."""
        norm: Tensor = torch.linalg.vector_norm(self.delta())
        return norm

    def shrink(self, factor: float) -> None:
        """Multiplies the update by `factor`; required of kinds that support `scale_weight_norms`."""
        raise NotImplementedError(f"{type(self).__name__} has no `shrink`")

    @property
    def factor_rank(self) -> int:
        """The inner size of `factors()`."""
        raise NotImplementedError(f"{type(self).__name__} has no factors")

    def factors(self) -> tuple[Tensor, Tensor]:
        """(up, down) of shapes (O, factor_rank) and (factor_rank, I), whose product is `delta()`; for file conversion.

        Float32, or float64 if the parameters are. Only the kinds that hyimg reads from files have them.
        """
        raise NotImplementedError(f"{type(self).__name__} has no factors")

    def attached(self, linear: Linear) -> None:
        """Called when the adapter is attached to a Linear."""

    def detached(self) -> None:
        """Called when it is detached."""

    def _set_frozen(self, tensors: Mapping[str, Tensor], prefix: str, dtype: torch.dtype) -> None:
        """Makes parameters of the tensors whose names begin with `prefix`."""
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                self.register_parameter(name, nn.Parameter(tensor.to(dtype), requires_grad=False))

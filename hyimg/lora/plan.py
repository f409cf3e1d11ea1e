"""Which modules get an adapter, of which rank and learning rate: decided before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hyimg.errors import HyimgError, did_you_mean
from hyimg.lora.formats import lora_name
from hyimg.lora.patterns import Rule, match, parse_patterns, unmatched
from hyimg.model.keys import ModuleInfo

# Arguments of the reference tool's network that are known here and not honoured
REFUSED_ARGS = {
    "rank_dropout": "it comes with the training work",
    "module_dropout": "it comes with the training work",
    "split_qkv": "it comes with the training work",
    "loraplus_lr_ratio": "it comes with the training work",
    "loraplus_unet_lr_ratio": "it comes with the training work",
    "loraplus_text_encoder_lr_ratio": "text encoders are never trained for this model",
    "ggpo_beta": "this regularisation is not implemented",
    "ggpo_sigma": "this regularisation is not implemented",
    "conv_dim": "this model's blocks have no convolutions",
    "conv_alpha": "this model's blocks have no convolutions",
}
KNOWN_ARGS = ("network_reg_dims", "network_reg_lrs", "verbose")


@dataclass(frozen=True)
class NetworkArgs:
    """`--network_args`, read: rules for ranks and learning rates, and whether to list the modules."""

    rank_rules: tuple[Rule, ...] = ()
    learning_rate_rules: tuple[Rule, ...] = ()
    verbose: bool = False

    @staticmethod
    def parse(pairs: Sequence[str]) -> NetworkArgs:
        """Reads `"name=value"` pairs; raises `HyimgError` for an unknown name or a value that is none."""
        values: dict[str, str] = {}
        for pair in pairs:
            name, equals, value = pair.partition("=")
            name = name.strip()
            if not equals:
                raise HyimgError(f"`{pair}` in `--network_args` is not of the form `NAME=VALUE`")
            if name in REFUSED_ARGS:
                raise HyimgError(f"`{name}` in `--network_args` cannot be used: {REFUSED_ARGS[name]}")
            if name not in KNOWN_ARGS:
                raise HyimgError(
                    f"`{name}` in `--network_args` is not known",
                    hint=did_you_mean(name, KNOWN_ARGS)
                    or f"known are {', '.join(f'`{k}`' for k in KNOWN_ARGS)}",
                )
            if name in values:
                raise HyimgError(
                    f"`{name}` stands twice in `--network_args`", hint="join the two with a comma"
                )
            values[name] = value.strip()
        verbose = values.get("verbose", "False").lower()
        if verbose not in ("true", "false"):
            raise HyimgError(
                f"`verbose={values['verbose']}` in `--network_args` is neither `True` nor `False`"
            )
        return NetworkArgs(
            tuple(parse_patterns(values.get("network_reg_dims", ""), "rank")),
            tuple(parse_patterns(values.get("network_reg_lrs", ""), "learning rate")),
            verbose == "true",
        )

    def warnings(self, modules: Sequence[ModuleInfo], *, strict: bool = False) -> list[str]:
        """A sentence for each pattern that matches no module; with `strict` the first is an error."""
        names = [module.name for module in modules]
        sentences = unmatched(names, self.rank_rules, "rank")
        sentences += unmatched(names, self.learning_rate_rules, "learning rate")
        if strict and sentences:
            raise HyimgError(
                sentences[0], hint="`hyimg inspect-modules` lists the names that a pattern can meet"
            )
        return sentences


@dataclass(frozen=True)
class ModulePlan:
    """What a module gets. Rank 0 is no adapter; `learning_rate` None is the run's, 0 freezes the adapter."""

    name: str
    in_features: int
    out_features: int
    rank: int
    alpha: float
    learning_rate: float | None = None

    @property
    def lora_name(self) -> str:
        """The reference tool's name of the adapter."""
        return lora_name(self.name)

    @property
    def trainable_parameters(self) -> int:
        """Values in down and up that the optimiser moves."""
        return 0 if self.learning_rate == 0 else self.num_values

    @property
    def num_values(self) -> int:
        """Values in down and up."""
        return self.rank * (self.in_features + self.out_features)


def plan_network(
    modules: Sequence[ModuleInfo],
    *,
    dim: int = 4,
    alpha: float = 1.0,
    args: NetworkArgs | None = None,
) -> tuple[ModulePlan, ...]:
    """A plan for each of `modules`, in their order; alpha stays global whatever the rank."""
    args = args or NetworkArgs()
    names = [module.name for module in modules]
    ranks = match(names, args.rank_rules).values
    rates = match(names, args.learning_rate_rules).values
    return tuple(
        ModulePlan(
            module.name,
            module.in_features,
            module.out_features,
            dim if rank is None else int(rank),
            alpha,
            rate,
        )
        for module, rank, rate in zip(modules, ranks, rates, strict=True)
    )

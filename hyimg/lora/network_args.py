"""`--network_args`, read and checked: what of the reference tool's is known here, and what lies beyond it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hyimg.errors import HyimgError, did_you_mean
from hyimg.lora.patterns import Rule, parse_patterns, unmatched
from hyimg.model.keys import ModuleInfo

# Arguments of the reference tool's network that are known here and not honoured
REFUSED_ARGS = {
    "loraplus_text_encoder_lr_ratio": "text encoders are never trained for this model",
    "ggpo_beta": "this regularisation is not implemented",
    "ggpo_sigma": "this regularisation is not implemented",
    "conv_dim": "this model's blocks have no convolutions",
    "conv_alpha": "this model's blocks have no convolutions",
}
KNOWN_ARGS = (
    "network_reg_dims",
    "network_reg_lrs",
    "rank_dropout",
    "module_dropout",
    "split_qkv",
    "loraplus_lr_ratio",
    "loraplus_unet_lr_ratio",
    "dora",
    "rslora",
    "verbose",
)


@dataclass(frozen=True)
class NetworkArgs:
    """`--network_args`, read.

    The rules are for ranks and learning rates. Dropouts are probabilities. `split_qkv` gives the parts of
    fused weights adapters of their own, `dora` learns the lengths of rows apart, `rslora` scales by
    alpha/sqrt(rank) (Kalajdzievski, arXiv 2312.03732). `loraplus_lr_ratio` multiplies the rate of up
    matrices (Hayou et al., arXiv 2402.12354). `verbose` lists the modules.
    """

    rank_rules: tuple[Rule, ...] = ()
    learning_rate_rules: tuple[Rule, ...] = ()
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    split_qkv: bool = False
    loraplus_lr_ratio: float = 1.0
    dora: bool = False
    rslora: bool = False
    verbose: bool = False

    @staticmethod
    def parse(pairs: Sequence[str], *, also: Sequence[str] = ()) -> NetworkArgs:
        """Reads `"name=value"` pairs; raises `HyimgError` for an unknown name or a value that is none.

        `also` are arguments of the kind of network, read elsewhere: they are named among those that are known.
        """
        values = _named_values(pairs, (*also, *KNOWN_ARGS))
        ratio = _ratio(values, "loraplus_unet_lr_ratio") or _ratio(values, "loraplus_lr_ratio")
        return NetworkArgs(
            rank_rules=tuple(parse_patterns(values.get("network_reg_dims", ""), "rank")),
            learning_rate_rules=tuple(parse_patterns(values.get("network_reg_lrs", ""), "learning rate")),
            rank_dropout=_probability(values, "rank_dropout"),
            module_dropout=_probability(values, "module_dropout"),
            split_qkv=_flag(values, "split_qkv"),
            loraplus_lr_ratio=ratio or 1.0,
            dora=_flag(values, "dora"),
            rslora=_flag(values, "rslora"),
            verbose=_flag(values, "verbose"),
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


def _named_values(pairs: Sequence[str], known: Sequence[str]) -> dict[str, str]:
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
                hint=did_you_mean(name, known) or f"known are {', '.join(f'`{k}`' for k in known)}",
            )
        if name in values:
            raise HyimgError(f"`{name}` stands twice in `--network_args`", hint="join the two with a comma")
        values[name] = value.strip()
    return values


def _flag(values: Mapping[str, str], name: str) -> bool:
    text = values.get(name, "False").lower()
    if text not in ("true", "false"):
        raise HyimgError(f"`{name}={values[name]}` in `--network_args` is neither `True` nor `False`")
    return text == "true"


def _probability(values: Mapping[str, str], name: str) -> float:
    number = _number(values, name)
    if number is not None and not 0 <= number < 1:
        raise HyimgError(
            f"`{name}={values[name]}` in `--network_args` is no probability from 0 to below 1",
            hint="0 is off; 0.1 leaves out one in ten",
        )
    return number or 0.0


def _ratio(values: Mapping[str, str], name: str) -> float | None:
    number = _number(values, name)
    if number is not None and number <= 0:
        raise HyimgError(
            f"`{name}={values[name]}` in `--network_args` is not above 0",
            hint="it multiplies the learning rate of the up matrices; 16 is usual",
        )
    return number


def _number(values: Mapping[str, str], name: str) -> float | None:
    if name not in values or values[name].lower() == "none":
        return None
    try:
        number = float(values[name])
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise HyimgError(f"`{name}={values[name]}` in `--network_args` is not a number")
    return number

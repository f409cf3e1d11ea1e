"""What is in a LoRA file: ranks, alphas and norms by layer kind, broken modules, who loads it, how it was made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from hyimg.lora.consumers import Verdict, verdicts
from hyimg.lora.contents import LoRAContents
from hyimg.lora.file import MERGED_FROM
from hyimg.lora.fp8_survival import Survival, total
from hyimg.lora.pieces import KIND_TITLES
from hyimg.lora.updates import AnyUpdate
from hyimg.memory.fp8_report import layer_kind

# Of a file's metadata, what a reader asks first; the reference tool's keys
_TRAINING = {
    "name": "ss_output_name",
    "title": "modelspec.title",
    "trigger_phrase": "modelspec.trigger_phrase",
    "base_model": "ss_sd_model_name",
    "model_version": "ss_base_model_version",
    "network_module": "ss_network_module",
    "network_dim": "ss_network_dim",
    "network_alpha": "ss_network_alpha",
    "images": "ss_num_train_images",
    "epoch": "ss_epoch",
    "steps": "ss_steps",
    "learning_rate": "ss_learning_rate",
    "optimizer": "ss_optimizer",
    "seed": "ss_seed",
    "comment": "ss_training_comment",
    "merged_from": MERGED_FROM,
}


@dataclass(frozen=True)
class KindReport:
    """The modules of one kind (`linear1`), or all of them; `fp8` where that was asked for."""

    kind: str
    num_modules: int
    ranks: Mapping[int, int]
    alphas: Mapping[float, int]
    norm: float
    fp8: Survival | None

    def as_json(self) -> dict[str, object]:
        entry: dict[str, object] = {
            "kind": self.kind,
            "modules": self.num_modules,
            "ranks": {str(rank): count for rank, count in self.ranks.items()},
            "alphas": {f"{alpha:g}": count for alpha, count in self.alphas.items()},
            "norm": self.norm,
        }
        if self.fp8 is not None:
            entry["fp8"] = {"survives": self.fp8.share, "relative_error": self.fp8.relative_error}
        return entry


@dataclass(frozen=True)
class LoRAReport:
    """What `check` found.

    `adapters` counts modules by the kind of adapter (LoRA, DoRA, LoHa, LoKr); `not_finite` are the modules with
    values that are no numbers, which `kinds` leave out, `zero` those that change nothing, `unmapped` the tensors
    that stand on no module a LoRA of this model can.
    """

    file: str
    formats: tuple[str, ...]
    adapters: Mapping[str, int]
    dtypes: Mapping[str, int]
    kinds: tuple[KindReport, ...]
    all: KindReport
    not_finite: tuple[str, ...]
    zero: tuple[str, ...]
    unmapped: tuple[str, ...]
    consumers: tuple[Verdict, ...]
    training: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """The report as `--json` prints it."""
        return {
            "file": self.file,
            "formats": list(self.formats),
            "adapters": dict(self.adapters),
            "dtypes": dict(self.dtypes),
            "kinds": [kind.as_json() for kind in self.kinds],
            "all": self.all.as_json(),
            "not_finite": list(self.not_finite),
            "zero": list(self.zero),
            "unmapped": list(self.unmapped),
            "consumers": [
                {
                    "name": verdict.consumer,
                    "loads": verdict.loads,
                    "applied": len(verdict.applied),
                    "dropped": dict(verdict.dropped),
                    "dropped_tensors": verdict.num_dropped_tensors,
                    "notes": list(verdict.notes),
                }
                for verdict in self.consumers
            ],
            "training": dict(self.training),
        }


def report_file(
    contents: LoRAContents, updates: Sequence[AnyUpdate], survivals: Mapping[str, Survival]
) -> LoRAReport:
    """The report on a file whose updates were read; `survivals` by module, empty where fp8 was not asked for."""
    finite = [update for update in updates if update.is_finite]
    by_kind = sorted(finite, key=lambda update: layer_kind(update.name))
    kinds = tuple(
        _report(kind, list(group), survivals)
        for kind, group in groupby(by_kind, key=lambda update: layer_kind(update.name))
    )
    metadata = contents.header.metadata
    titles = [
        KIND_TITLES[module.pieces[0].kind] if not module.pieces[0].is_dora else "DoRA"
        for module in contents.modules
    ]
    return LoRAReport(
        str(contents.path),
        contents.formats,
        Counter(titles),
        Counter(info.dtype for info in contents.header.tensors.values()),
        kinds,
        _report("all", finite, survivals),
        tuple(update.name for update in updates if not update.is_finite),
        tuple(update.name for update in finite if update.norm() == 0),
        contents.unmapped,
        tuple(verdicts(contents)),
        {
            name: metadata[key]
            for name, key in _TRAINING.items()
            if metadata.get(key) not in (None, "None", "")
        },
    )


def _report(kind: str, updates: Sequence[AnyUpdate], survivals: Mapping[str, Survival]) -> KindReport:
    return KindReport(
        kind,
        len(updates),
        dict(sorted(Counter(update.rank for update in updates).items())),
        dict(sorted(Counter(update.alpha for update in updates).items())),
        sum(update.norm() ** 2 for update in updates) ** 0.5,
        total(survivals[update.name] for update in updates) if survivals else None,
    )

"""The LoRA files of a rendering: which of their modules act, how strongly, beside the weights or merged into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hyimg.cache.identity import file_identity
from hyimg.config.rendering import LoRAFiles
from hyimg.errors import HyimgError
from hyimg.flow.renderer import attach_lora, check_loras, lora_multipliers
from hyimg.lora.contents import LoRAContents
from hyimg.lora.merge import MergingPlacement
from hyimg.lora.network import LoRANetwork
from hyimg.lora.patterns import compile_pattern, matches, nearest_names
from hyimg.model.architecture import DiTArch
from hyimg.model.dit import DiT
from hyimg.model.loading import Placement
from hyimg.report import Reporter, count_text


@dataclass(frozen=True)
class LoRAUse:
    """A LoRA file with the multiplier that it acts by, and the hash of its content.

    Of its modules those act that `include` matches and `exclude` does not, as `patterns.matches` has it; an empty
    pattern is as if not given.
    """

    path: Path
    multiplier: float
    sha256: str
    include: str = ""
    exclude: str = ""

    @property
    def record(self) -> dict[str, object]:
        """As an image's settings tell it."""
        record: dict[str, object] = {
            "file": self.path.name,
            "sha256": self.sha256,
            "multiplier": self.multiplier,
        }
        patterns = {"include_pattern": self.include, "exclude_pattern": self.exclude}
        return record | {name: pattern for name, pattern in patterns.items() if pattern}

    def takes(self, module: str) -> bool:
        """Whether a module (`double_blocks.0.img_attn_qkv`) is one of those that act."""
        include, exclude = (compile_pattern(pattern, "") for pattern in (self.include, self.exclude))
        return matches(include, module) and not (self.exclude and matches(exclude, module))

    def read(self, arch: DiTArch) -> LoRANetwork:
        """The network of the modules that act, not attached. Raises as `LoRANetwork.read`."""
        network = LoRANetwork.read(self.path, arch)
        if self.include or self.exclude:
            network.keep(self.takes)
        return network

    def attach(self, dit: DiT, report: Reporter) -> LoRANetwork:
        """Lets the file act on a DiT; `detach` on what is returned takes it off again. Raises as `read`."""
        return attach_lora(dit, self.path, self.multiplier, report, network=self.read(dit.arch))


def plan_loras(options: LoRAFiles, arch: DiTArch) -> list[LoRAUse]:
    """The LoRA files of a command, checked from their headers, and hashed.

    Raises HyimgError for counts that differ, an invalid pattern, and files and patterns that leave nothing to apply.
    """
    paths = options.lora_weight
    multipliers = lora_multipliers(paths, options.lora_multiplier)
    includes = _patterns(paths, options.include_patterns, "--include_patterns")
    excludes = _patterns(paths, options.exclude_patterns, "--exclude_patterns")
    check_loras(paths, arch)
    uses = [
        LoRAUse(path, multiplier, "", include, exclude)
        for path, multiplier, include, exclude in zip(paths, multipliers, includes, excludes, strict=True)
    ]
    for use in uses:
        _require_some(use)
    hashes = {path: file_identity(path) for path in dict.fromkeys(paths)}
    return [replace(use, sha256=hashes[use.path]) for use in uses]


def check_values(loras: Sequence[LoRAUse], arch: DiTArch) -> None:
    """Reads LoRA files for what their headers do not tell, before the text encoders and the DiT take their time.

    Raises HyimgError as `LoRANetwork.read`: for a NaN above all.
    """
    for path in dict.fromkeys(lora.path for lora in loras):
        LoRANetwork.read(path, arch)


def merging(placement: Placement, loras: Sequence[LoRAUse], arch: DiTArch, report: Reporter) -> Placement:
    """The placement that merges LoRA files, in their order, before `placement`; that itself where there are none."""
    merges = []
    for lora in loras:
        network = lora.read(arch)
        merges.append((network, lora.multiplier))
        report.note(
            f"merging {lora.path}: {count_text(len(network.plan), 'module')}, multiplier {lora.multiplier:g}"
        )
    return MergingPlacement(placement, merges) if merges else placement


def _patterns(paths: Sequence[Path], patterns: Sequence[str], option: str) -> Sequence[str]:
    """A pattern for each file, all of them valid expressions."""
    if not patterns:
        return [""] * len(paths)
    if len(patterns) != len(paths):
        raise HyimgError(
            f"{count_text(len(patterns), 'value')} of `{option}` for {count_text(len(paths), 'LoRA file')}",
            hint='give one for each file, `""` for a file that needs none; `|` joins patterns',
        )
    for pattern in patterns:
        compile_pattern(pattern, option)
    return patterns


def _require_some(use: LoRAUse) -> None:
    """Raises HyimgError where patterns leave nothing of a file."""
    if not (use.include or use.exclude):
        return
    modules = [module.name for module in LoRAContents.open(use.path).modules]
    if not any(use.takes(module) for module in modules):
        said = [f"`--include_patterns` `{use.include}`"] * bool(use.include)
        said += [f"`--exclude_patterns` `{use.exclude}`"] * bool(use.exclude)
        raise HyimgError(
            f"{' and '.join(said)} {'leave' if len(said) > 1 else 'leaves'} none of the "
            f"{count_text(len(modules), 'module')} of `{use.path}`{nearest_names(use.include or use.exclude, modules)}",
            hint="`hyimg inspect-modules` lists the names; `.*` matches all of them",
        )

"""The LoRA files of a rendering: which modules they adapt, how strongly, and whether live or merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hyimg.cache.hashing import file_identity
from hyimg.checkpoints.architecture import DiTArch
from hyimg.config.rendering import LoRAFiles
from hyimg.errors import HyimgError, first_few
from hyimg.lora.files.foreign import lora_identity
from hyimg.lora.files.stored import LoRAFile
from hyimg.lora.merging import MergingPlacement
from hyimg.lora.network import AdapterNetwork
from hyimg.lora.patterns import compile_pattern, matches, nearest_names
from hyimg.model.dit import DiT
from hyimg.model.loading import WeightPlacement
from hyimg.rendering.renderer import attach_lora, check_loras
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

    def read(self, arch: DiTArch) -> AdapterNetwork:
        """The network of the modules that act, not attached. Raises as `AdapterNetwork.read`."""
        network = AdapterNetwork.read(self.path, arch)
        if self.include or self.exclude:
            network.keep(self.takes)
        return network

    def attach(self, dit: DiT, report: Reporter) -> AdapterNetwork:
        """Lets the file act on a DiT; `detach` on what is returned takes it off again. Raises as `read`."""
        return attach_lora(dit, self.path, self.multiplier, report, network=self.read(dit.arch))


def multipliers_of(
    paths: Sequence[Path],
    multipliers: Sequence[float],
    report: Reporter,
    *,
    option: str,
    files_option: str = "",
) -> list[float]:
    """A multiplier for each LoRA file, in order; 1 for those without, as in the reference tool, with a warning.

    `option` is the multipliers' (`--lora_multiplier`), `files_option` the files'. Raises HyimgError for more
    multipliers than files.
    """
    if multipliers and not paths:
        raise HyimgError(f"`{option}` without `{files_option}`", hint="name the LoRA file too")
    if len(multipliers) > len(paths):
        raise HyimgError(
            f"{count_text(len(multipliers), 'value')} of `{option}` for {count_text(len(paths), 'LoRA file')}",
            hint="give one for each file; a file without one gets 1",
        )
    if multipliers and (rest := paths[len(multipliers) :]):
        names = first_few([f"`{path}`" for path in rest])
        report.warning(
            f"`{option}` has {count_text(len(multipliers), 'value')} for {count_text(len(paths), 'LoRA file')}: "
            f"1 for {names}"
        )
    return [*multipliers, *[1.0] * (len(paths) - len(multipliers))]


def plan_loras(options: LoRAFiles, arch: DiTArch, report: Reporter) -> list[LoRAUse]:
    """The LoRA files of a command, checked from their headers, and hashed.

    Raises HyimgError for counts that differ, an invalid pattern, and files and patterns that leave nothing to apply.
    """
    paths = options.lora_weight
    multipliers = multipliers_of(
        paths, options.lora_multiplier, report, option="--lora_multiplier", files_option="--lora_weight"
    )
    includes = _patterns(paths, options.include_patterns, "--include_patterns")
    excludes = _patterns(paths, options.exclude_patterns, "--exclude_patterns")
    check_loras(paths, arch, report)
    uses = [
        LoRAUse(path, multiplier, "", include, exclude)
        for path, multiplier, include, exclude in zip(paths, multipliers, includes, excludes, strict=True)
    ]
    for use in uses:
        _require_some(use)
    hashes = {path: lora_identity(path, file_identity) for path in dict.fromkeys(paths)}
    return [replace(use, sha256=hashes[use.path]) for use in uses]


def check_values(loras: Sequence[LoRAUse], arch: DiTArch) -> None:
    """Reads LoRA files for what their headers do not tell, before the text encoders and the DiT take their time.

    Raises HyimgError as `AdapterNetwork.read`: for a NaN above all.
    """
    for path in dict.fromkeys(lora.path for lora in loras):
        AdapterNetwork.read(path, arch)


def merging(
    placement: WeightPlacement, loras: Sequence[LoRAUse], arch: DiTArch, report: Reporter
) -> WeightPlacement:
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
    modules = LoRAFile.open(use.path).module_names
    if not any(use.takes(module) for module in modules):
        said = [f"`--include_patterns` `{use.include}`"] * bool(use.include)
        said += [f"`--exclude_patterns` `{use.exclude}`"] * bool(use.exclude)
        raise HyimgError(
            f"{' and '.join(said)} {'leave' if len(said) > 1 else 'leaves'} none of the "
            f"{count_text(len(modules), 'module')} of `{use.path}`{nearest_names(use.include or use.exclude, modules)}",
            hint="`hyimg inspect-modules` lists the names; `.*` matches all of them",
        )

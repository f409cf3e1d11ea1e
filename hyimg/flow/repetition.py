"""A picture rendered again: whether the files of the command are those that it was made with."""

from __future__ import annotations

from pathlib import Path

from hyimg.config.picture import FINGERPRINTS, lora_records, read_settings
from hyimg.errors import HyimgError
from hyimg.flow.plan import RenderPlan
from hyimg.report import Reporter


def check_repetition(path: Path, plan: RenderPlan, report: Reporter) -> None:
    """Warns where a plan with the settings of the picture `path` has other files than the picture had.

    Raises HyimgError for a LoRA file that was found by its name and has another content: what the command names
    itself is its own affair.
    """
    settings = read_settings(path)
    assert settings is not None, "the config was made of them"
    before, now = settings[FINGERPRINTS], plan.facts[FINGERPRINTS]
    assert isinstance(now, dict)
    others = [f"`--{name}`" for name in now if before.get(name) != now[name]]
    records = lora_records(settings, path)
    for lora, record in zip(plan.loras, records, strict=False):
        name = Path(str(record["file"])).name
        if lora.sha256 != record.get("sha256") and lora.path in (path.parent / name, Path(name)):
            raise HyimgError(
                f"`{lora.path}` is not the LoRA that `{path}` was made with: its content is another",
                hint="name the right file with `--lora_weight`",
            )
    if [lora.sha256 for lora in plan.loras] != [record.get("sha256") for record in records]:
        others.append("`--lora_weight`")
    if others:
        report.warning(
            f"`{path}` was made with other files for {', '.join(others)}: this will not be the same picture"
        )

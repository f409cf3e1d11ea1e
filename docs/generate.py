"""The generated parts of the reference pages; `make docs` runs it through cog, `make check` compares."""

from __future__ import annotations

import dataclasses
import inspect
import json

from hyimg import hookspecs
from hyimg.checkpoints.architecture import DIT_2_1
from hyimg.checkpoints.model_files import VARIANTS
from hyimg.cli.flag_names import TRACEBACK_FLAG, flag_of
from hyimg.config.command_table import COMMAND_TABLE, config_of
from hyimg.config.legacy import LEGACY
from hyimg.config.option import ABSENT, SAME, Option, all_options, groups_of, options_of
from hyimg.config.training import NetworkArgs
from hyimg.data.dataset_keys import KEYS, LEVEL_KEYS, UNSUPPORTED_KEYS, Level
from hyimg.data.findings import FINDING_KINDS, Finding
from hyimg.demo.concept import WEIGHTS
from hyimg.memory.budget import weight_bytes
from hyimg.report import size_text
from hyimg.reports import dataset_report

CONFIGS = {name: config_of(name) for name in COMMAND_TABLE}


def commands_page() -> str:
    """Every command with its options, a table for each group."""
    parts = []
    for name, config in CONFIGS.items():
        parts.append(f"## hyimg {name}\n\n{COMMAND_TABLE[name].help}\n")
        for group in groups_of(config).values():
            options = options_of(group)
            parts.append(f"### {options[0].panel}\n")
            parts.append("| option | value | default | meaning |\n|---|---|---|---|")
            parts += [_row(option) for option in options]
            parts.append("")
    return "\n".join(parts)


def common_options() -> str:
    """What all commands take, and which take a run file."""
    with_file = [f"`{name}`" for name, config in CONFIGS.items() if _has(config, "config")]
    without = [f"`{name}`" for name, config in CONFIGS.items() if not _has(config, "config")]
    return (
        f"Every command takes `{TRACEBACK_FLAG}`, which shows where an error came from. A run file (`--config`) is "
        f"taken by {', '.join(with_file)}; {', '.join(without)} take flags only."
    )


def _has(config: type, name: str) -> bool:
    return any(option.name == name for option in all_options(config))


def defaults_table() -> str:
    """Every default that differs from the reference tool's, as the options and the dataset's keys declare it."""
    rows = ["| option or key | here | sd-scripts | |", "|---|---|---|---|"]
    listed = set()
    for config in (CONFIGS["train"], CONFIGS["infer"]):
        for option in all_options(config):
            if option.reference_default is SAME or option.name in listed:
                continue
            listed.add(option.name)
            reference = (
                "no such option" if option.reference_default is ABSENT else _value(option.reference_default)
            )
            cells = (f"`--{option.name}`", _value(option.default), reference, _cell(option.differs or ""))
            rows.append(f"| {' | '.join(cells)} |")
    for key in KEYS.values():
        if key.reference_default is not SAME:
            values = _value(key.default), _value(key.reference_default)
            rows.append(
                f"| `{key.name}` (dataset file) | {' | '.join(values)} | {_cell(key.differs or '')} |"
            )
    return "\n".join(rows)


def _value(value: object) -> str:
    if value is None:
        return "not given"
    return ("on" if value else "off") if isinstance(value, bool) else f"`{value}`"


def weights_table() -> str:
    """What the real model's weights take under the guide's settings."""
    settings = [
        (False, 0),
        (False, 18),
        (False, 37),
        (True, 0),
        (True, 9),
        (True, 24),
        (True, 32),
        (True, 37),
    ]
    rows = ["| options | on the device | of it the ring | in host memory |", "|---|---|---|---|"]
    for fp8, blocks_to_swap in settings:
        options = ["`--fp8_scaled`"] * fp8
        options += [f"`--blocks_to_swap {blocks_to_swap}`"] * (blocks_to_swap > 0)
        taken = weight_bytes(DIT_2_1, blocks_to_swap=blocks_to_swap, fp8=fp8)
        cells = [size_text(size) if size else "" for size in (taken.device, taken.ring, taken.host)]
        rows.append(f"| {' '.join(options) or 'none (bf16)'} | {' | '.join(cells)} |")
    return "\n".join(rows)


def release_table() -> str:
    """What `download-models` fetches."""
    rows = [
        "| file | repository | path in it | size | taken by | with `--variant` |",
        "|---|---|---|---|---|---|",
    ]
    for file in dict.fromkeys(file for files in VARIANTS.values() for file in files):
        variants = [name for name, files in VARIANTS.items() if file in files]
        cells = (
            file.what,
            f"[{file.repository}](https://huggingface.co/{file.repository})",
            f"`{file.path}`",
            size_text(file.about_bytes) if file.about_bytes is not None else "some MB",
            f"`--{file.option}`" if file.option is not None else "",
            "any" if len(variants) == len(VARIANTS) else ", ".join(variants),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def legacy_table() -> str:
    """How flags of the reference tool are answered."""
    rows = ["| flags | answer | |", "|---|---|---|"]
    answered = [(flag.answer, flag.text) for flag in LEGACY.values()]
    for answer, text in dict.fromkeys(answered):  # in the order of the first flag that is answered so
        names = ", ".join(
            f"`--{name}`" for name, flag in LEGACY.items() if (flag.answer, flag.text) == (answer, text)
        )
        rows.append(f"| {names} | {answer} | {_cell(text)} |")
    return "\n".join(rows)


def dataset_keys_table(level: Level) -> str:
    """The keys of a dataset file that are about `level`, "dataset" or "subset"."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for key in LEVEL_KEYS[level].values():
        reason = UNSUPPORTED_KEYS.get(key.name)
        meaning = f"{key.help}: {reason}" if reason is not None else key.help
        default = "" if key.default in (None, ()) else f"`{json.dumps(key.default)}`"
        rows.append(f"| `{key.name}` | {default} | {_cell(meaning)} |")
    return "\n".join(rows)


def network_args_table() -> str:
    """The arguments of the network that `--network_args` takes."""
    rows = ["| argument | value | default | meaning |", "|---|---|---|---|"]
    for option in options_of(NetworkArgs):
        cells = (f"`{option.name}`", option.metavar or "True, False", _default(option), _cell(option.help))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def findings_table() -> str:
    """Every kind of finding of the dataset report."""
    rows = ["| `kind` | |", "|---|---|"]
    return "\n".join([*rows, *(f"| `{kind}` | {_cell(text)} |" for kind, text in FINDING_KINDS.items())])


def report_table() -> str:
    """The objects of the dataset report's JSON with their keys."""
    objects = {
        "report": dataset_report.DatasetReport,
        "`images`": dataset_report.Images,
        "`images.unreadable[]`": dataset_report.Unreadable,
        "`epoch`": dataset_report.EpochCost,
        "`datasets[]`": dataset_report.DatasetRow,
        "`datasets[].subsets[]`": dataset_report.SubsetRow,
        "`buckets[]`": dataset_report.BucketRow,
        "`latents`, `text`": dataset_report.CacheState,
        "`latents.stores[]`, `text.stores[]`": dataset_report.StoreState,
        "`captions`": dataset_report.Captions,
        "`findings[]`": Finding,
    }
    rows = ["| object | keys |", "|---|---|"]
    for name, cls in objects.items():
        keys = ", ".join(f"`{field.name}`" for field in dataclasses.fields(cls))
        about = _cell(inspect.getdoc(cls) or "")
        rows.append(f"| {name} | {keys}. {about} |")
    return "\n".join(rows)


def micro_measures_table() -> str:
    """What `python -m benchmarks.micro measure` found of the model that ships."""
    found = json.loads((WEIGHTS / "measures.json").read_text(encoding="utf-8"))
    rows = [
        f"| of {found['prompts']} held-out prompts | with the prompt | empty prompt |",
        "|---|---|---|",
    ]
    names = {
        "shape_and_colors": "shape and both colours right (goal: 85%)",
        "shape": "shape",
        "color": "colour of the shape",
        "background": "colour of the background",
        "position": "position",
        "size": "size",
        "letter": "letter, where one is asked for",
        "no_letter_unasked": "no letter, where none is",
    }
    for key, what in names.items():
        rows.append(
            f"| {what} | {_share(found['with_prompt'][key])} | {_share(found['prompt_emptied'][key])} |"
        )
    return "\n".join(rows)


def micro_proof_table() -> str:
    """What `python -m benchmarks.micro prove` found of the demo's LoRA on that model."""
    found = json.loads((WEIGHTS / "proof.json").read_text(encoding="utf-8"))
    trigger, known = found["trigger"], found["without_trigger"]
    rows = [f"| of {found['seeds']} images | base | LoRA | ComfyUI's file |", "|---|---|---|---|"]
    for key, what in {
        "shape": "the trigger word: a heart (goals: base under 10%, LoRA at least 70%)",
        "shape_and_colors": "the trigger word: a heart in both colours that were asked for",
    }.items():
        shares = (_share(trigger[who][key]) for who in ("base", "lora", "comfy_lora"))
        rows.append(f"| {what} | {' | '.join(shares)} |")
    shares = (_share(known[who]["shape_and_colors"]) for who in ("base", "lora"))
    rows.append(
        f"| known shapes: shape and both colours right (goal: at most 10 points less) | {' | '.join(shares)} | |"
    )
    return "\n".join(rows)


def _share(share: float) -> str:
    return f"{round(100 * share, 1):g}%"


def hooks_page() -> str:
    """Every hook with its signature, paragraph and example, in the order in which they are declared."""
    parts = []
    for name, function in vars(hookspecs).items():
        if name.startswith("hyimg_"):
            parameters = ", ".join(inspect.signature(function).parameters)
            parts.append(f"### {name}({parameters})\n\n{inspect.getdoc(function)}\n")
    return "\n".join(parts)


def _row(option: Option) -> str:
    name = f"`{option.name.upper()}`" if option.argument else f"`--{option.name}`"
    names = ", ".join([name, *(f"`{flag_of(alias)}`" for alias in option.aliases)])
    metavar = option.metavar.replace("|", " \\| ") + (" ..." if option.many else "")
    default = "required" if option.required else _default(option)
    meaning = option.help
    for value, reason in option.refused.items():
        typed = f"--no_{option.name}" if value is False else f"{value}"
        meaning += f"; `{typed}` is refused: {reason}"
    for name, value in option.synonyms.items():
        meaning += f"; `{name}` is `{value}`"
    return f"| {names} | {metavar} | {default} | {_cell(meaning)} |"


def _default(option: Option) -> str:
    if option.default in (None, (), ""):
        return ""
    if option.kind == "bool":
        return "on" if option.default else "off"
    return " ".join(map(str, option.default)) if option.many else f"{option.default}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

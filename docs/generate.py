"""The generated parts of the reference pages; `make docs` runs it through cog, `make check` compares."""

from __future__ import annotations

import inspect

from hyimg import hookspecs
from hyimg.cli import commands as cli_commands
from hyimg.config import commands as configs
from hyimg.config.legacy import LEGACY
from hyimg.config.option import Option, groups_of, options_of

COMMANDS = {
    "cache-latents": configs.CacheLatentsConfig,
    "cache-text": configs.CacheTextConfig,
    "train": configs.TrainConfig,
    "sample": configs.SampleConfig,
    "infer": configs.InferConfig,
    "convert-comfy": configs.ConvertComfyConfig,
    "inspect-modules": configs.InspectModulesConfig,
    "make-tiny-model": configs.MakeTinyModelConfig,
    "demo": configs.DemoConfig,
    "plugins": configs.PluginsConfig,
}


def commands_page() -> str:
    """Every command with its options, a table for each group."""
    parts = []
    for name, config in COMMANDS.items():
        function = getattr(cli_commands, {"plugins": "list_plugins"}.get(name, name.replace("-", "_")))
        parts.append(f"## hyimg {name}\n\n{inspect.getdoc(function)}\n")
        required = getattr(config, "REQUIRED", ())
        for group in groups_of(config).values():
            options = options_of(group)
            parts.append(f"### {options[0].panel}\n")
            parts.append("| option | value | default | meaning |\n|---|---|---|---|")
            parts += [_row(option, option.name in required) for option in options]
            parts.append("")
    return "\n".join(parts)


def legacy_table() -> str:
    """How flags of the reference tool are answered."""
    rows = ["| flag | answer | |", "|---|---|---|"]
    rows += [f"| `--{name}` | {flag.answer} | {_cell(flag.text)} |" for name, flag in LEGACY.items()]
    return "\n".join(rows)


def hooks_page() -> str:
    """Every hook with its signature and paragraph."""
    parts = []
    for name, function in inspect.getmembers(hookspecs, inspect.isfunction):
        if name.startswith("hyimg_"):
            parameters = ", ".join(inspect.signature(function).parameters)
            parts.append(f"### {name}({parameters})\n\n{inspect.getdoc(function)}\n")
    return "\n".join(parts)


def _row(option: Option, required: bool) -> str:
    traits = option.traits
    name = f"`{option.name.upper()}`" if traits.argument else f"`--{option.name}`"
    names = ", ".join([name, *(f"`--{alias}`" for alias in traits.aliases)])
    metavar = option.metavar.replace("|", " \\| ") + (" ..." if option.many else "")
    default = "required" if required else _default(option)
    meaning = traits.help
    if traits.later is not None:
        usable = [v for v in (option.default, *traits.available) if v not in (None, False, (), "")]
        only = (
            f", but for {' and '.join(f'`{v}`' for v in usable)}" if usable and option.kind == "str" else ""
        )
        meaning += f" (**not yet{only}**: {traits.later})"
    for value, reason in traits.refused.items():
        meaning += f"; `{value}` is refused: {reason}"
    return f"| {names} | {metavar} | {default} | {_cell(meaning)} |"


def _default(option: Option) -> str:
    if option.default in (None, (), ""):
        return ""
    if option.kind == "bool":
        return "on" if option.default else "off"
    return " ".join(map(str, option.default)) if option.many else f"{option.default}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

"""Options without effect in a run: each declared condition both ways, and the one rule that says so."""

from __future__ import annotations

import pytest

from hyimg.config import commands
from hyimg.config.command_table import COMMAND_TABLE, config_of
from hyimg.config.load import make, replace, select
from hyimg.config.option import (
    Fact,
    Given,
    Never,
    Only,
    Unless,
    all_options,
    idle_lines,
    idle_options,
    needs_of,
    warn_of_idle,
)
from hyimg.config.values import check_value
from hyimg.report import SilentReporter

TRAIN = {"dit": "dit.safetensors", "dataset_config": "data.toml", "output_dir": "out"}


def value_of(opt):
    """A legal value that is not "off"."""
    for value in (opt.default, *opt.choices, True, 32, 256, 1, 0.5, "x"):
        if value in (None, False, (), "") or value in opt.refused:
            continue
        try:
            make_one(opt, value)
        except Exception:
            continue
        return value
    raise AssertionError(f"no value found for {opt.name}")


def make_one(opt, value):
    check_value(opt, [value] * (opt.count or 1) if opt.many else value)


def cases():
    for command in COMMAND_TABLE:
        config = config_of(command)
        for opt in all_options(config):
            for index, condition in enumerate(needs_of(config, opt)):
                yield pytest.param(config, opt, index, condition, id=f"{command}-{opt.name}-{index}")


def settings_for(config, condition, *, met):
    """Values of other options with which a condition is met, or is not; None where that cannot be."""
    options = {opt.name: opt for opt in all_options(config)}
    match condition:
        case Given():
            there = [name for name in condition.options if name in options]
            required = {name for name in there if options[name].required}
            if met:
                return {there[0]: value_of(options[there[0]])} if there else {}
            return dict.fromkeys(there) if there and not required else None
        case Unless() | Only() if condition.option not in options:
            return {} if met else None
        case Unless():
            other = options[condition.option]
            if not met:
                return {other.name: condition.values[0] if condition.values else value_of(other)}
            if not condition.values:
                return {}
            free = next(c for c in (*other.choices, "a_plugin") if c not in condition.values)
            return {other.name: free}
        case Only():
            other = options[condition.option]
            if met:
                return {other.name: condition.values[0]}
            others = [c for c in other.choices if c not in condition.values]
            return {other.name: others[0]} if others else {other.name: "another"}
        case Never():
            return None if met else {}
    raise AssertionError(condition)


@pytest.mark.parametrize(("config", "opt", "index", "condition"), list(cases()))
def test_each_condition_is_said_where_it_is_not_met_and_only_there(config, opt, index, condition):
    every = needs_of(config, opt)
    own = condition.when[0] if condition.when else value_of(opt)
    given = {opt.name: [own] * (opt.count or 1) if opt.many and not isinstance(own, tuple) else own}
    required = {other.name: "x" for other in all_options(config) if other.required}
    others: dict = {}
    for other in every:
        if other is not condition and not isinstance(other, (Fact, Never)):
            others |= settings_for(config, other, met=True) or {}
    if isinstance(condition, Fact):
        # facts are the stages' to find: what was given is named where one is not so
        made = make(config, {**required, **others, **given})
        for holds in (True, False, [opt.name], []):
            report = Recorder()
            warn_of_idle(made, report, **{condition.name: holds})
            said = [text for text in report.warnings if text.startswith(f"`--{opt.name}` ")]
            expected = [] if holds else [f"`--{opt.name}` has no effect: {condition.reason}"]
            assert said == expected
        return
    met, unmet = (settings_for(config, condition, met=met) for met in (True, False))
    assert met is not None or unmet is not None
    if met is not None and not any(isinstance(other, Never) for other in every):
        assert opt.name not in idle_options(make(config, {**required, **others, **met, **given}))
    if unmet is not None:
        sentence = idle_options(make(config, {**required, **others, **unmet, **given})).get(opt.name)
        assert sentence is not None
        assert sentence.startswith(f"`--{opt.name}` has no effect")


class Recorder(SilentReporter):
    def __init__(self):
        self.warnings = []

    def warning(self, text):
        self.warnings.append(text)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"huber_c": "0.1"}, "`--huber_c` has no effect with `--loss_type l2`"),
        ({"sigmoid_scale": "1"}, "`--sigmoid_scale` has no effect with `--timestep_sampling sigma`"),
        ({"logit_mean": "0.5"}, "`--logit_mean` has no effect with `--weighting_scheme uniform`"),
        (
            {"mode_scale": "1", "weighting_scheme": "mode", "timestep_sampling": "Shift"},
            "`--mode_scale` has no effect with `--timestep_sampling Shift`",
        ),
        (
            {"ip_noise_gamma_random_strength": True},
            "`--ip_noise_gamma_random_strength` has no effect without `--ip_noise_gamma`",
        ),
        (
            {"discrete_flow_shift": "3", "timestep_sampling": "uniform"},
            "`--discrete_flow_shift` has no effect with `--timestep_sampling uniform`",
        ),
        (
            {"persistent_data_loader_workers": True},
            "`--persistent_data_loader_workers` has no effect without `--max_data_loader_n_workers`",
        ),
        ({"sampler": "heun"}, "`--sampler` has no effect without `--sample_prompts`"),
        ({"byt5": "a"}, "`--byt5` has no effect without `--text_encoder`"),
        ({"text_encoder": "a"}, "`--text_encoder` has no effect without `--byt5`"),
        (
            {"schedulefree_wrapper_args": ["momentum=0.7"]},
            "`--schedulefree_wrapper_args` has no effect without `--optimizer_schedulefree_wrapper`",
        ),
        ({"log_config": True}, "`--log_config` has no effect without `--log_with` or `--logging_dir`"),
        ({"log_prefix": "a"}, "`--log_prefix` has no effect without `--log_with` or `--logging_dir`"),
        ({"wandb_run_name": "a"}, "`--wandb_run_name` has no effect without `--log_with wandb`"),
        ({"lr_warmup_steps": "10"}, "`--lr_warmup_steps` has no effect with `--lr_scheduler constant`"),
        (
            {"save_last_n_epochs": "2"},
            "`--save_last_n_epochs` has no effect without `--save_every_n_epochs` or `--save_n_epoch_ratio`",
        ),
        ({"ddp_static_graph": True}, "`--ddp_static_graph` has no effect: the adapter's gradients"),
    ],
)  # fmt: skip
def test_an_option_without_effect_is_one_line(given, line):
    name = next(iter(given))
    lines = idle_lines(make(commands.TrainConfig, {**TRAIN, **given}))
    (found,) = [text for text in lines if text.startswith(f"`--{name}` ")]
    assert found.startswith(line)


def test_nothing_is_said_of_what_was_not_given_or_is_off():
    assert idle_lines(make(commands.TrainConfig, TRAIN)) == []
    off = {
        "log_config": False,
        "lr_warmup_steps": "0",
        "lr_decay_steps": "0",
        "log_prefix": "",
        "blocks_to_swap": "0",
    }
    config, report = make(commands.TrainConfig, {**TRAIN, **off}), Recorder()
    assert idle_lines(config) == []
    warn_of_idle(config, report, on_gpu=False)
    assert report.warnings == []


def test_many_options_at_their_defaults_in_a_file_share_a_line(tmp_path):
    path = tmp_path / "run.toml"
    lines = [
        "huber_c = 0.1",
        "huber_scale = 1.0",
        "sigmoid_scale = 1.0",
        "logit_mean = 0.0",
        "mode_scale = 2.0",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    mode_scale, shared = idle_lines(make(commands.TrainConfig, TRAIN, run_file=path))
    assert mode_scale.startswith("`--mode_scale` has no effect")
    names = "`--sigmoid_scale`, `--logit_mean`, `--huber_c`, `--huber_scale`"
    assert shared == f"4 options at their defaults have no effect in this run: {names}"
    path.write_text("huber_c = 0.1", encoding="utf-8")
    assert len(idle_lines(make(commands.TrainConfig, TRAIN, run_file=path))) == 1


def test_what_was_given_outlives_a_derived_config():
    config = make(commands.TrainConfig, {**TRAIN, "vae_batch_size": "1", "huber_c": "0.1"})
    assert (
        set(idle_options(config))
        == set(idle_options(replace(config, seed=1)))
        == {"vae_batch_size", "huber_c"}
    )
    selected = select(commands.CacheLatentsConfig, replace(config, vae="v"))
    assert selected.given == {"dataset_config", "vae_batch_size"}


def test_a_run_file_that_a_run_wrote_gives_only_what_is_not_a_default(tmp_path):
    from hyimg.training.run_folder import RunFolder

    folder = RunFolder(tmp_path, "lora", heading="precision: DiT bf16")
    folder.write_config(make(commands.TrainConfig, {**TRAIN, "network_dim": 8}))
    assert "\n# precision: DiT bf16\n" in folder.config_path.read_text(encoding="utf-8")
    again = make(commands.TrainConfig, {}, run_file=folder.config_path)
    assert again.given == {*TRAIN, "network_dim"}
    assert idle_lines(again) == []


def test_a_refused_value_without_effect_is_passed_over():
    notes: list[str] = []
    config = make(commands.TrainConfig, {**TRAIN, "huber_schedule": "snr"}, notes=notes)
    assert config.loss.huber_schedule == "constant"
    assert notes == [
        "ignored, since it changes nothing in this run: `--huber_schedule snr` (with `--loss_type l2`)"
    ]
    assert idle_lines(config) == [], "one line is enough"


def test_a_default_that_is_typed_needs_no_note():
    notes: list[str] = []
    make(commands.TrainConfig, {**TRAIN, "lr_warmup_steps": "0"}, notes=notes)
    assert notes == []

"""The network's options in a run: what is trained from what, in which groups, and what is refused or said."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hyimg.checkpoints.architecture import DIT_TINY
from hyimg.checkpoints.names import linear_modules
from hyimg.config.commands import TrainConfig
from hyimg.config.load import make
from hyimg.errors import HyimgError
from hyimg.lora.files.conversion import convert, read_lora, save_lora
from hyimg.lora.merging import delta
from hyimg.lora.network import AdapterNetwork
from hyimg.lora.rank_plan import parse_network_args, plan_network
from hyimg.model.dit import collate
from hyimg.report import SilentReporter
from hyimg.stages.train import train as train_stage
from hyimg.training.preparation import prepare


class Listener(SilentReporter):
    """Keeps what is said."""

    def __init__(self):
        self.notes, self.warnings = [], []

    def note(self, text):
        self.notes.append(text)

    def warning(self, text):
        self.warnings.append(text)


@pytest.fixture
def lora_file(tmp_path):
    """A LoRA of mixed ranks with random weights for the tiny model, in ComfyUI's names."""
    args = parse_network_args(["network_reg_dims=txt=0,linear1=6"])
    network = AdapterNetwork(plan_network(linear_modules(DIT_TINY), dim=3, alpha=1.5, args=args))
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    save_lora(tmp_path / "kohya.safetensors", network.state(), {})
    convert(tmp_path / "kohya.safetensors", tmp_path / "comfy.safetensors")
    return tmp_path / "comfy.safetensors"


@pytest.fixture
def prepared(models, dataset, tmp_path):
    """Checks a run without starting it; gives (preparation, reporter)."""

    def call(**options):
        own = {
            "dit": models[0].dit,
            "dataset_config": dataset,
            "output_dir": tmp_path / "out",
            "device": "cpu",
        }
        report = Listener()
        return prepare(make(TrainConfig, {**own, **options}), report), report

    return call


# ---- starting from files


def test_modules_ranks_and_alphas_come_from_the_weights_file(train, lora_file):
    run = train(network_weights=lora_file, dim_from_weights=True, learning_rate=0.0, save_format="kohya")
    start, saved = read_lora(lora_file), load_file(run.folder.lora_path())
    assert saved.keys() == start.keys()
    assert all(torch.equal(saved[name], start[name]) for name in saved)
    assert {(lora.rank, lora.alpha) for _, lora in run.network.adapters()} == {(3, 1.5), (6, 1.5)}


def test_base_weights_are_merged_before_training(train, lora_file, models):
    loss = train(base_weights=(lora_file, lora_file), base_weights_multiplier=(-0.25,)).objective
    plain = train().objective
    deltas = delta(AdapterNetwork.read(lora_file, DIT_TINY))
    before, after = plain.dit.state_dict(), loss.dit.state_dict()
    for name, tensor in after.items():
        expected = before[name]
        if name in deltas:
            expected = (expected - 0.25 * deltas[name]) + deltas[name]
        assert torch.equal(tensor, expected), name


def test_base_weights_without_a_multiplier_get_1_and_are_named(prepared, lora_file):
    other = lora_file.with_name("other.safetensors")
    shutil.copyfile(lora_file, other)
    _, report = prepared(base_weights=(lora_file, other), base_weights_multiplier=(0.5,))
    said = f"`--base_weights_multiplier` has 1 value for 2 LoRA files: 1 for `{other}`"
    assert [line for line in report.warnings if "multiplier`" in line] == [said]


def test_a_dora_goes_on_from_its_file(train, tmp_path):
    options = {"network_args": ("dora=True",), "learning_rate": 1e-2, "save_format": "kohya"}
    first = train(max_train_steps=2, **options)
    path = first.folder.lora_path()
    again = train(**options | {"network_weights": path, "learning_rate": 0.0})
    saved, start = load_file(again.folder.lora_path()), load_file(path)
    assert any(name.endswith("dora_scale") for name in saved)
    assert all(torch.equal(saved[name], start[name]) for name in saved)
    by_file = train(network_weights=path, dim_from_weights=True, learning_rate=0.0)
    assert all(lora.magnitude is not None for _, lora in by_file.network.adapters())


@pytest.mark.parametrize(
    "args", [("dora=True",), ("split_qkv=True",), ("rslora=True",), ("dora=True", "split_qkv=True")]
)
def test_each_kind_of_adapter_is_in_its_file_as_it_was_trained(train, args):
    run = train(network_args=args, max_train_steps=3, learning_rate=1e-2, save_format="kohya")
    run.batch = next(run.loader.load(run.schedule.epoch_batches(1)[:1], epoch=1))
    state = run.network.state()
    assert all(bool(tensor.any()) for tensor in state.values()), "all of it was trained"
    read = AdapterNetwork.read(run.folder.lora_path(), DIT_TINY)
    assert read.state().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in read.state().items())
    drawn = run.objective.draw(run.batch, 1)
    text = collate(run.batch.text)
    with torch.no_grad():
        live_B = run.objective.evaluate(drawn, text)
        run.network.detach(run.objective.dit)
        read.attach(run.objective.dit)
        torch.testing.assert_close(run.objective.evaluate(drawn, text), live_B, rtol=1e-5, atol=0)


@pytest.mark.parametrize("options", [{"network_dropout": 0.5}, {"network_args": ("rank_dropout=0.5",)}, {"network_args": ("module_dropout=0.5",)}])  # noqa: E501  # fmt: skip
def test_dropout_changes_training_the_same_way_each_time_and_is_off_after_it(train, options):
    settings = {"max_train_steps": 4, "learning_rate": 1e-2, "gradient_accumulation_steps": 2}
    plain, one, two = train(**settings), train(**settings, **options), train(**settings, **options)
    state, again, without = one.network.state(), two.network.state(), plain.network.state()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert not all(torch.equal(state[name], without[name]) for name in state)
    assert all(not lora.dropout.is_on for _, lora in one.network.adapters())


# ---- groups, norms and what is said


def test_groups_stand_in_a_note_and_in_the_metrics_by_the_same_names(models, dataset, tmp_path):
    own = {"dit": models[0].dit, "dataset_config": dataset, "output_dir": tmp_path / "out", "device": "cpu"}
    own |= {"mixed_precision": "no", "max_train_steps": 1, "seed": 1, "learning_rate": 1e-3}
    args = ("network_reg_lrs=single=1e-4", "loraplus_lr_ratio=16")
    report = Listener()
    train_stage(make(TrainConfig, {**own, "network_args": args}), report)
    (note,) = [note for note in report.notes if "parameter group" in note]
    assert note == (
        "4 parameter groups: learning_rate 0.001 for 20 tensors (down), learning_rate_1 0.016 for 20 tensors (up), "
        "learning_rate_2 0.0001 for 12 tensors (down), learning_rate_3 0.0016 for 12 tensors (up)"
    )
    line = json.loads((tmp_path / "out" / "lora.metrics.jsonl").read_text())
    rates = {name: value for name, value in line.items() if name.startswith("learning_rate")}
    assert list(rates.values()) == pytest.approx([1e-3, 1.6e-2, 1e-4, 1.6e-3])


def test_norms_are_limited_after_each_step_and_told(train):
    run = train(max_train_steps=2, learning_rate=1e-2, scale_weight_norms=1e-3)
    norms = [float(tensor.norm()) for tensor in delta(run.network).values()]
    assert max(norms) == pytest.approx(1e-3, rel=1e-4)
    line = json.loads(run.folder.metrics_path.read_text().splitlines()[-1])
    assert line["max_norm/keys_scaled"] == 32
    assert line["max_norm/max_key_norm"] == pytest.approx(max(norms), rel=1e-4)
    assert line["norm/avg_key_norm"] == pytest.approx(sum(norms) / 32, rel=1e-4)


def test_rank_and_alpha_are_told_with_their_quotient(prepared):
    made, _ = prepared(
        network_dim=8, network_alpha=4, network_args=("network_reg_dims=linear1=16", "dora=True")
    )
    assert "rank 8 to 16, alpha 4 (alpha/rank 0.25 to 0.5), DoRA" in made.network.describe()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"network_dim": 16},
            "alpha 1 with rank 16 makes the update 16 times weaker than `--network_alpha 16` would",
        ),
        ({"network_dim": 16, "network_alpha": 2}, None),
        (
            {"network_dim": 4, "network_args": ("network_reg_dims=linear1=64",)},
            "of 4 modules 64 times weaker",
        ),
        ({"network_dim": 64, "network_args": ("rslora=True",)}, None),
        ({"network_dim": 256, "network_args": ("rslora=True",)}, "16 times weaker"),
    ],
)
def test_an_alpha_that_makes_the_update_weak_is_warned_of(prepared, options, words):
    _, report = prepared(**options)
    weak = [warning for warning in report.warnings if "weaker" in warning]
    assert len(weak) == (words is not None)
    assert words is None or words in weak[0]
    if words is not None:
        assert "--network_alpha 16" in weak[0] or "--network_alpha 64" in weak[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim_from_weights": True}, "`--dim_from_weights` needs `--network_weights`"),
        ({"network_dropout": 1.0}, "drops everything"),
        ({"ema_decay": 1.0}, "would never update the average"),
        ({"base_weights": ["{lora}"], "base_weights_multiplier": (1.0, 2.0)}, "2 values .* for 1 LoRA file"),
        ({"base_weights": ["{dit}"]}, "is not a LoRA but"),
        ({"network_weights": "{lora}"}, "does not fit the network"),
        (
            {"network_weights": "{lora}", "dim_from_weights": True, "network_args": ("network_reg_dims=a=1",)},
            "both set the ranks",
        ),
        (
            {"network_weights": "{lora}", "dim_from_weights": True, "network_args": ("dora=True",)},
            "is not a DoRA",
        ),
        (
            {"network_weights": "{lora}", "dim_from_weights": True, "network_args": ("split_qkv=True",)},
            "the rank 6 of `single_blocks.0.linear1` is no multiple of 4",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_the_model_is_read(prepared, lora_file, models, options, words):
    files = {"{lora}": lora_file, "{dit}": models[0].dit}

    def named(value):
        if isinstance(value, list):
            return tuple(named(item) for item in value)
        return files.get(value, value) if isinstance(value, str) else value

    with pytest.raises(HyimgError, match=words):
        prepared(**{name: named(value) for name, value in options.items()})


def test_base_weights_that_are_not_finite_are_refused_before_the_model_is_read(
    train, lora_file, tmp_path, monkeypatch
):
    state = load_file(lora_file)
    next(iter(state.values())).fill_(torch.nan)
    save_file(state, tmp_path / "bad.safetensors")
    monkeypatch.setattr(
        "hyimg.memory.dit_loader.load_dit", lambda *args, **kwargs: pytest.fail("the model was read")
    )
    with pytest.raises(HyimgError, match="holds NaN or infinity"):
        train(base_weights=(tmp_path / "bad.safetensors",))

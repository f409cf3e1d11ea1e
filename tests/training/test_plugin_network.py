"""A network of a plugin's kind: trained, resumed to the bit, saved, shown, and refused where it cannot follow."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hyimg.data.samples import epoch_batches
from hyimg.errors import HyimgError
from hyimg.hookspecs import hookimpl
from hyimg.lora.base import Adapter
from hyimg.model.dit import collate
from hyimg.training.state import equal, read_state, unpack

NAME = "lora_unet_double_blocks_0_img_attn_qkv"
COMFY_MLP = "lora_unet_double_blocks_0_img_mlp_0"


@pytest.fixture
def train_kind(train):
    """Trains a network of LoHas or LoKrs."""

    def call(kind="loha", **options):
        own = {"network_module": kind, "network_dim": 2, "network_alpha": 2, "learning_rate": 0.05}
        return train(**{"plugin": ("spy",), **own, **options})

    return call


def contents(folder):
    state = read_state(folder / "lora-state")
    return {name: unpack(tree, state.tensors(name)) for name, tree in state.document["parts"].items()}


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_resumed_run_ends_in_the_same_bits(train_kind, tmp_path, kind):
    options = {
        "max_train_steps": 4,
        "save_every_n_steps": 2,
        "save_state": True,
        "ema_decay": 0.5,
        "scale_weight_norms": 0.5,
        "network_args": ("module_dropout=0.3", "network_reg_lrs=single_blocks=0.01"),
    }
    whole = train_kind(kind, **options).folder.directory
    state = str(whole / "lora-step00000002-state")
    resumed = train_kind(kind, **options, output_dir=tmp_path / "resumed", resume=state).folder.directory
    first, second = contents(whole), contents(resumed)
    assert first.keys() == second.keys()
    for part in first:
        assert equal(first[part], second[part]), part
    one, other = load_file(whole / "lora.safetensors"), load_file(resumed / "lora.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_checkpointing_and_streaming_change_no_bit(train_kind, kind):
    options = {"max_train_steps": 2, "mixed_precision": "bf16"}
    runs = [
        train_kind(kind, **options),
        train_kind(kind, **options, gradient_checkpointing=True, blocks_to_swap=1),
    ]
    one, other = (load_file(run.folder.lora_path()) for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_the_parameters_may_be_of_16_bits(train_kind, kind):
    run = train_kind(kind, max_train_steps=2, mixed_precision="bf16", full_bf16=True)
    assert {parameter.dtype for parameter in run.network.parameters()} == {torch.bfloat16}


def test_the_file_has_lycoris_names_in_both_forms(train_kind):
    folder = train_kind(max_train_steps=2).folder.directory
    own, comfy = load_file(folder / "lora.safetensors"), load_file(folder / "comfy" / "lora.safetensors")
    roles = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"}
    assert {key.split(".")[1] for key in own} == {key.split(".")[1] for key in comfy} == roles
    assert own[f"{NAME}.alpha"] == 2
    assert bool(own[f"{NAME}.hada_w2_a"].any()), "it was trained"
    kohya_mlp = "lora_unet_double_blocks_0_img_mlp_fc1"
    assert torch.equal(comfy[f"{COMFY_MLP}.hada_w1_a"], own[f"{kohya_mlp}.hada_w1_a"])


def test_it_starts_from_its_own_file_and_from_no_other(train_kind, spy, train):
    run = train_kind(max_train_steps=2)
    path = run.folder.lora_path()
    start = {}
    spy.on_start = lambda run: start.update({name: t.clone() for name, t in run.network.state().items()})
    train_kind(network_weights=path)
    assert all(torch.equal(start[name], tensor) for name, tensor in load_file(path).items())
    start.clear()
    train_kind(network_weights=path.parent / "comfy" / path.name)
    assert all(torch.equal(start[name], tensor) for name, tensor in load_file(path).items())
    with pytest.raises(HyimgError, match="does not fit the network") as told:
        train_kind("lokr", network_weights=path)
    assert "--dim_from_weights" not in told.value.hint, "which this kind does not have"
    lora = train().folder.lora_path()
    with pytest.raises(HyimgError, match="does not fit the network"):
        train_kind(network_weights=lora)


def test_an_alpha_that_came_from_a_file_goes_on_in_a_resumed_run(train_kind, tmp_path):
    path = train_kind(network_alpha=4).folder.lora_path()
    options = {"network_alpha": 2, "max_train_steps": 2, "save_state": True, "save_every_n_steps": 1}
    whole = train_kind(network_weights=path, **options)
    assert {adapter.alpha for _, adapter in whole.network.adapters()} == {4}
    state = whole.folder.directory / "lora-step00000001-state"
    resumed = train_kind(**options, output_dir=tmp_path / "resumed", resume=str(state))
    assert {adapter.alpha for _, adapter in resumed.network.adapters()} == {4}


def test_arguments_reach_it_and_are_checked(train_kind):
    run = train_kind("LoKr", network_args=("factor=2", "network_reg_dims=single_blocks=0"))
    _, adapter = next(run.network.adapters())
    assert adapter.lokr_w1.shape == (2, 2)
    assert all(module.name.startswith("double_blocks") for module, _ in run.network.adapters())
    assert run.config.network_training.network_module == "LoKr"
    for pair, words in (
        ("factor=two", "must be a whole number, got `two`"),
        ("factro=2", "unknown argument `factro` in `--network_args`"),
        ("factor=0", "`factor` of `lokr` is 0"),
    ):
        with pytest.raises(HyimgError, match=re.escape(words)):
            train_kind("lokr", network_args=(pair,))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"network_args": ("dora=True",)}, '`--network_args "dora=True"` cannot be used'),
        ({"network_args": ("split_qkv=True",)}, '`--network_args "split_qkv=True"` cannot be used'),
        ({"network_args": ("loraplus_lr_ratio=4",)}, '`--network_args "loraplus_lr_ratio=...`'),
        ({"network_args": ("rank_dropout=0.1",)}, '`--network_args "rank_dropout=...`'),
        ({"network_dropout": 0.1}, "`--network_dropout` cannot be used"),
        ({"torch_compile": True}, "`--torch_compile` cannot be used"),
        ({"dim_from_weights": True}, "`--dim_from_weights` needs `--network_weights`"),
    ],
)
def test_what_it_cannot_follow_is_refused_with_the_reason(train_kind, options, words):
    with pytest.raises(HyimgError) as caught:
        train_kind(**options)
    assert words.rstrip("`") in caught.value.message
    if "cannot" in words:
        assert "with `--network_module loha`: this kind of adapter does not have it" in caught.value.message


def test_a_state_of_another_kind_is_refused(train_kind, tmp_path):
    options = {"max_train_steps": 2, "save_state_on_train_end": True}
    folder = train_kind(**options).folder.directory
    other = {**options, "output_dir": tmp_path / "other", "resume": str(folder / "lora-state")}
    with pytest.raises(HyimgError, match="`--network_module`: loha then, lokr now"):
        train_kind("lokr", **other)
    with pytest.raises(HyimgError, match="the state belongs to a different network"):
        train_kind("lokr", **other, resume_force=True)


# ---- what a kind may do wrong, before the DiT is read


class Good(Adapter):
    def __init__(self, in_features, out_features, *, rank, alpha):
        super().__init__(in_features, out_features, rank=rank, alpha=alpha)
        self.whole = nn.Parameter(torch.zeros(out_features, in_features))

    def initialize(self, *key):
        nn.init.zeros_(self.whole)

    def delta(self):
        return self.whole


class OfAnotherShape(Good):
    def delta(self):
        return self.whole[:1]


class Raising(Good):
    def initialize(self, *key):
        raise ValueError("no\nluck")


class WithoutFirstValues(Good):
    initialize = Adapter.initialize


class WithoutDelta(Good):
    delta = Adapter.delta


class Untrained(Good):
    def delta(self):
        return self.whole.detach()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (OfAnotherShape, "`--network_module kind` does not work on `"),
        (Raising, "ValueError: no luck"),
        (WithoutFirstValues, "WithoutFirstValues has no `initialize`"),
        (WithoutDelta, "abstract method"),
        (Untrained, "it has nothing to train"),
        (nn.Linear, "`--network_module` `kind` is no kind of adapter"),
    ],
)
def test_a_kind_that_does_not_work_is_one_error(train, spy, monkeypatch, kind, words):
    @hookimpl
    def hyimg_networks():
        return {"kind": kind}

    monkeypatch.setattr(spy, "hyimg_networks", hyimg_networks, raising=False)
    with pytest.raises(HyimgError) as caught:
        train(network_module="kind")
    assert words in caught.value.message
    assert caught.value.exit_code == 2


def test_a_kind_without_names_in_comfyui_is_saved_in_one_form(train, spy, monkeypatch):
    @hookimpl
    def hyimg_networks():
        return {"kind": Good}

    monkeypatch.setattr(spy, "hyimg_networks", hyimg_networks, raising=False)
    folder = train(network_module="kind", learning_rate=0.1).folder.directory
    assert bool(load_file(folder / "lora.safetensors")[f"{NAME}.whole"].any())
    assert not (folder / "comfy").exists()
    with pytest.raises(HyimgError, match="`--save_format comfy` cannot hold .* no name for `whole`"):
        train(network_module="kind", save_format="comfy")


def test_a_silenced_network_is_the_base_model_bit_for_bit(train_kind, spy):
    answers = {}

    def look(run):
        dit = run.objective.dit
        (batch,) = run.loader.load(epoch_batches(run.loader.data.samples, seed=1, epoch=1)[:1], epoch=1)
        drawn, text = run.objective.draw(batch, 1), collate(batch.text)

        def ask(name):
            with torch.no_grad():
                answers[name] = run.objective.predict(drawn.noisy(), drawn.sigma_B, text)

        for _, adapter in run.network.adapters():
            nn.init.ones_(adapter.hada_w2_a)
        ask("live")
        with run.network.disabled():
            ask("silenced")
        run.network.detach(dit)
        ask("base")
        run.network.attach(dit)

    spy.on_start = look
    run = train_kind(blank_prompt_preservation=1.0)
    assert run.measured["loss_preservation"] > 0
    assert torch.equal(answers["silenced"], answers["base"])
    assert not torch.equal(answers["live"], answers["base"])

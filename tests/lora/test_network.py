"""The network on a model: the golden training step, precision, attaching, loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hyimg.checkpoints.architecture import DiTArch
from hyimg.checkpoints.names import linear_modules
from hyimg.config.models import TrainingMemory
from hyimg.errors import HyimgError
from hyimg.lora.adapter import LoRA
from hyimg.lora.files.conversion import read_lora, save_lora
from hyimg.lora.merging import MergingPlacement, delta, merge_into
from hyimg.lora.network import AdapterNetwork
from hyimg.lora.rank_plan import parse_network_args, plan_network
from hyimg.memory.checkpointing import checkpointed
from hyimg.model.dit import DiT
from hyimg.model.loading import WeightPlacement, load_dit

Inputs = tuple[Tensor, Tensor, Any]


@pytest.fixture
def step_network(train_step: dict[str, Tensor], step_dit: DiT) -> AdapterNetwork:
    """The golden training step's network with its initial weights, attached."""
    network = AdapterNetwork.create(step_dit, rank=4, alpha=2.0)
    start = "lora_init."
    network.load_state({n.removeprefix(start): t for n, t in train_step.items() if n.startswith(start)})
    network.attach(step_dit)
    return network


def _fill(network: AdapterNetwork) -> AdapterNetwork:
    """Random up weights, since a fresh network does nothing."""
    generator = torch.Generator().manual_seed(5)
    for _, lora in network.adapters():
        torch.nn.init.normal_(lora.lora_up.weight, std=0.1, generator=generator)
    return network


# The golden training step


def test_prediction_and_gradients_are_those_of_the_golden_training_step(
    train_step: dict[str, Tensor], step_dit: DiT, step_network: AdapterNetwork, step_inputs: Inputs
) -> None:
    prediction = step_dit(*step_inputs)
    torch.testing.assert_close(prediction, train_step["pred"], rtol=0, atol=2e-5)
    loss = (prediction - train_step["target"]).square().mean(dim=(1, 2, 3)).mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in step_network.named_parameters()}
    for name, expected in train_step.items():
        if name.startswith("grad."):
            gradient = gradients[name.removeprefix("grad.")]
            assert gradient is not None
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_changes_no_bit_of_the_gradients(
    step_dit: DiT, step_network: AdapterNetwork, step_inputs: Inputs
) -> None:
    step_dit(*step_inputs).square().mean().backward()
    plain = [parameter.grad for parameter in step_network.parameters()]
    step_network.zero_grad()
    step_dit.run_block = checkpointed(
        step_dit.run_block, TrainingMemory(gradient_checkpointing=True), step_dit.device
    )
    step_dit(*step_inputs).square().mean().backward()
    for gradient, parameter in zip(plain, step_network.parameters(), strict=True):
        assert gradient is not None
        assert torch.equal(gradient, parameter.grad if parameter.grad is not None else torch.tensor(0.0))


def test_multiplier_zero_is_the_base_model_bit_for_bit(
    train_step: dict[str, Tensor], step_dit: DiT, step_network: AdapterNetwork, step_inputs: Inputs
) -> None:
    step_network.set_multiplier(0)
    with torch.no_grad():
        for _, lora in step_network.adapters():
            lora.lora_up.weight.fill_(torch.inf)  # times 0 this would be NaN
        silent = step_dit(*step_inputs)
        step_network.detach(step_dit)
        base = step_dit(*step_inputs)
    assert torch.equal(silent, base)
    torch.testing.assert_close(base, train_step["pred_lora_multiplier0"], rtol=0, atol=2e-5)


# Precision


def test_a_bf16_model_adds_the_update_in_one_rounding_and_trains_float32_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    lora = LoRA(64, 48, rank=4, alpha=1.0)
    lora.initialize(0, "module")
    torch.nn.init.normal_(lora.lora_up.weight, generator=generator)
    x = torch.randn(15, 64, generator=generator).bfloat16()
    y = torch.randn(15, 48, generator=generator).bfloat16()
    out = lora(x, y.clone())
    inner = (x @ lora.lora_down.weight.bfloat16().T).double()
    exact = y.double() + inner @ (0.25 * lora.lora_up.weight).bfloat16().double().T
    assert out.dtype == torch.bfloat16
    # one rounding to bf16 is at most half of its `eps`, which is reached; `atol` is for the float32 sum inside
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-6)
    out.float().sum().backward()
    assert {p.dtype for p in lora.parameters()} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lora.parameters())


# Creation


def test_modules_names_ranks_and_order_are_those_of_the_golden_network(golden: Path, lora_dit: DiT) -> None:
    expected = json.loads((golden / "lora_network.json").read_text())
    turned = ",".join(reversed(expected["network_reg_dims"].split(",")))  # see test_patterns
    args = parse_network_args([f"network_reg_dims={turned}"])
    plan = plan_network(linear_modules(lora_dit.arch), dim=4, alpha=2.0, args=args)
    network = AdapterNetwork.create(lora_dit, plan=plan)
    ours = [
        {"lora_name": m.lora_name, "module": m.name, "rank": lora.rank, "alpha": lora.alpha}
        for m, lora in network.adapters()
    ]
    assert ours == expected["modules"]
    state = network.state()
    theirs = read_lora(golden / "lora_kohya.safetensors")
    assert {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in theirs.items()}
    weights = [name for m in expected["modules"] for name in (f"{m['lora_name']}.lora_down.weight", f"{m['lora_name']}.lora_up.weight")]  # noqa: E501  # fmt: skip
    assert [name for name, _ in network.named_parameters()] == weights


def test_initial_weights_depend_on_seed_and_module_alone(lora_dit: DiT) -> None:
    before = torch.get_rng_state()
    whole = AdapterNetwork.create(lora_dit, seed=3).state()
    assert torch.equal(torch.get_rng_state(), before)
    args = parse_network_args(["network_reg_dims=.*=0,single_blocks_2_linear1=4"])
    one = AdapterNetwork.create(
        lora_dit, seed=3, plan=plan_network(linear_modules(lora_dit.arch), args=args)
    ).state()
    assert len(one) == 3
    assert all(torch.equal(tensor, whole[name]) for name, tensor in one.items())
    other = AdapterNetwork.create(lora_dit, seed=4).state()
    downs = [name for name in whole if name.endswith("lora_down.weight")]
    assert not any(torch.equal(whole[name], other[name]) for name in downs)
    assert len({tensor.sum().item() for name, tensor in whole.items() if name in downs}) == len(downs)
    for name in downs:
        bound = whole[name].shape[1] ** -0.5
        assert 0.9 * bound < whole[name].abs().max() <= bound
        assert not whole[name.replace("down", "up")].any()


def test_the_base_model_keeps_its_own_parameters_and_state(lora_dit: DiT) -> None:
    names = list(lora_dit.state_dict())
    network = AdapterNetwork.create(lora_dit)
    network.attach(lora_dit)
    assert list(lora_dit.state_dict()) == names
    assert len(list(lora_dit.modules())) == len(list(DiT(lora_dit.arch).modules()))


def test_two_networks_add_up_and_each_is_taken_off_alone(lora_dit: DiT, inputs: Inputs) -> None:
    one, two = _fill(AdapterNetwork.create(lora_dit, seed=1)), _fill(AdapterNetwork.create(lora_dit, seed=2))
    with torch.no_grad():
        base = lora_dit(*inputs)
        one.attach(lora_dit)
        only_one = lora_dit(*inputs)
        two.attach(lora_dit)
        both = lora_dit(*inputs)
        two.detach(lora_dit)
        assert torch.equal(lora_dit(*inputs), only_one)
        one.detach(lora_dit)
        assert torch.equal(lora_dit(*inputs), base)
    assert not torch.allclose(both, only_one)
    assert not torch.allclose(only_one, base)


def test_parameter_groups_follow_the_rates_and_a_rate_of_zero_freezes(lora_dit: DiT) -> None:
    args = parse_network_args(["network_reg_lrs=single=1e-3,linear2=0"])
    network = AdapterNetwork.create(lora_dit, plan=plan_network(linear_modules(lora_dit.arch), args=args))
    groups = network.parameter_groups(1e-4)
    sizes = {group["lr"]: len(group["params"]) for group in groups}
    assert sizes == {1e-4: 2 * 20, 1e-3: 2 * 8}  # two weights for each of 2x10 double, 4x2 single modules
    frozen = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    assert len(frozen) == 8
    assert all("linear2" in name for name in frozen)
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in network.parameters() if parameter.requires_grad}


def test_loraplus_multiplies_the_rate_of_up_matrices_each_rate_by_itself(lora_dit: DiT) -> None:
    args = parse_network_args(["network_reg_lrs=single=1e-3,linear2=0", "loraplus_lr_ratio=16"])
    network = AdapterNetwork.create(lora_dit, plan=plan_network(linear_modules(lora_dit.arch), args=args))
    groups = network.rate_groups(1e-4, args.loraplus_lr_ratio)
    told = [(group.role, group.lr, len(group.parameters)) for group in groups]
    assert told == [("down", 1e-4, 20), ("up", 16e-4, 20), ("down", 1e-3, 8), ("up", 16e-3, 8)]
    ups = {id(lora.lora_up.weight) for _, lora in network.adapters()}
    assert all(id(p) in ups for group in groups if group.role == "up" for p in group.parameters)


@pytest.mark.parametrize(
    ("pairs", "ratio"),
    [
        (["loraplus_lr_ratio=4"], 4),
        (["loraplus_unet_lr_ratio=8", "loraplus_lr_ratio=4"], 8),
        (["loraplus_lr_ratio=None"], 1),
    ],
)
def test_the_unets_loraplus_ratio_wins(pairs: list[str], ratio: float) -> None:
    assert parse_network_args(pairs).loraplus_lr_ratio == ratio


def test_silenced_is_the_base_and_gives_every_multiplier_back(lora_dit: DiT, inputs: Inputs) -> None:
    network = _fill(AdapterNetwork.create(lora_dit))
    with torch.no_grad():
        base = lora_dit(*inputs)
        network.attach(lora_dit)
        network.set_multiplier(0.5)
        with network.disabled():
            assert torch.equal(lora_dit(*inputs), base)
    assert {lora.multiplier for _, lora in network.adapters()} == {0.5}


def test_a_network_without_a_module_is_refused(lora_dit: DiT) -> None:
    plan = plan_network(linear_modules(lora_dit.arch), args=parse_network_args(["network_reg_dims=.*=0"]))
    with pytest.raises(HyimgError, match="the network is empty"):
        AdapterNetwork.create(lora_dit, plan=plan)


# Files


@pytest.mark.parametrize("file", ["lora_kohya", "lora_comfy", "lora_dpipe", "lora_diffusers"])
def test_a_file_in_any_form_becomes_the_golden_deltas(
    golden: Path, load: Any, lora_dit: DiT, file: str
) -> None:
    network = AdapterNetwork.read(golden / f"{file}.safetensors", lora_dit.arch)
    expected = load(golden / "lora_deltas.safetensors")[0]
    deltas = delta(network)
    assert deltas.keys() == expected.keys()
    for name, tensor in deltas.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_a_network_is_saved_and_read_back_bit_for_bit(tmp_path: Path, lora_dit: DiT) -> None:
    network = _fill(AdapterNetwork.create(lora_dit, rank=3, alpha=1.5))
    save_lora(tmp_path / "lora.safetensors", network.state(), {"ss_seed": "0"})
    again = AdapterNetwork.read(tmp_path / "lora.safetensors", lora_dit.arch)
    ours, theirs = network.state(), again.state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_merged_model_is_the_live_one(golden: Path, lora_dit: DiT, inputs: Inputs) -> None:
    network = AdapterNetwork.read(golden / "lora_kohya.safetensors", lora_dit.arch)
    network.set_multiplier(0.7)
    with torch.no_grad():
        base = lora_dit(*inputs)
        network.attach(lora_dit)
        live = lora_dit(*inputs)
        network.detach(lora_dit)
        merge_into(lora_dit, network, 0.7)
        merged = lora_dit(*inputs)
    assert (live - base).abs().max() > 1e-3
    # One product of the sum against the sum of two: float32 rounding through six blocks
    torch.testing.assert_close(merged, live, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loras_are_merged_while_the_model_is_read_and_rounded_once(
    golden: Path, lora_dit: DiT, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tmp_path / "dit.safetensors"
    base = {name: tensor.bfloat16() for name, tensor in lora_dit.state_dict().items()}
    save_file(base, path)
    loras = [golden / "lora_kohya.safetensors", golden / "lora_dpipe.safetensors"]
    merges = [(AdapterNetwork.read(lora, lora_dit.arch), 0.7 - i) for i, lora in enumerate(loras)]
    merged = load_dit(path, placement=MergingPlacement(WeightPlacement("cpu", dtype), merges))
    by_file = load_dit(path, placement=MergingPlacement(WeightPlacement("cpu", None), merges))
    assert by_file.dtype == torch.bfloat16, "the file's"
    deltas = delta(merges[0][0]), delta(merges[1][0])
    for name, tensor in merged.state_dict().items():
        expected = base[name].float()
        if name in deltas[0]:
            expected = expected + 0.7 * deltas[0][name] + (0.7 - 1) * deltas[1][name]
            assert not torch.equal(tensor, base[name].to(dtype))
        assert torch.equal(tensor, expected.to(dtype)), name
        assert not tensor.requires_grad


# Wrong input


def test_a_lora_of_a_model_of_another_size_is_refused(
    golden: Path, step_dit: DiT, lora_arch: DiTArch
) -> None:
    with pytest.raises(HyimgError, match=r"does not fit the model: .*(is|are) not in the model"):
        AdapterNetwork.read(golden / "lora_kohya.safetensors", step_dit.arch)
    wide = DiT(_wider(lora_arch))
    with pytest.raises(HyimgError, match=r"has the shape \[576, 96\], not \[1152, 192\]"):
        AdapterNetwork.read(golden / "lora_kohya.safetensors", wide.arch)


def test_a_lora_of_blocks_that_the_model_does_not_have_is_refused(tmp_path: Path, lora_dit: DiT) -> None:
    name = "lora_unet_double_blocks_9_img_attn_proj"
    save_file({f"{name}.lora_down.weight": torch.zeros(2, 96), f"{name}.lora_up.weight": torch.zeros(96, 2)}, tmp_path / "l.safetensors")  # noqa: E501  # fmt: skip
    with pytest.raises(HyimgError, match="none of its modules is in the model"):
        AdapterNetwork.read(tmp_path / "l.safetensors", lora_dit.arch)


def test_loaded_weights_bring_their_alpha(lora_dit: DiT) -> None:
    network = AdapterNetwork.create(lora_dit, alpha=1.0)
    network.load_state(AdapterNetwork.create(lora_dit, alpha=3.0).state())
    assert {lora.alpha for _, lora in network.adapters()} == {3.0}
    assert {lora.scale for _, lora in network.adapters()} == {0.75}


def test_weights_of_another_rank_are_refused_and_nothing_is_changed(lora_dit: DiT) -> None:
    network, other = AdapterNetwork.create(lora_dit, rank=4), _fill(AdapterNetwork.create(lora_dit, rank=8))
    before = {name: tensor.clone() for name, tensor in network.state().items()}
    with pytest.raises(HyimgError, match=r"do not fit the network: .*\[8, 96\], not \[4, 96\]"):
        network.load_state(other.state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state().items())
    partial = dict(list(before.items())[3:])
    with pytest.raises(HyimgError, match=" and `.*` are missing|, `.*` are missing"):
        network.load_state(partial)


def _wider(arch: DiTArch) -> DiTArch:
    from dataclasses import replace

    return replace(arch, hidden=2 * arch.hidden, heads=2 * arch.heads, mlp_hidden=2 * arch.mlp_hidden)

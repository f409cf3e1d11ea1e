"""The golden training step: our objective, network, optimiser and loop on the reference tool's numbers.

Tolerances are those of tests/golden/README-lora-math.md, whose implementations differ by less.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hyimg.checkpoints.architecture import DiTArch
from hyimg.config.training import FlowMatching, NetworkTraining
from hyimg.distributed.processes import Processes
from hyimg.flow.losses import l2
from hyimg.flow.timesteps import uniform
from hyimg.lora.network import AdapterNetwork
from hyimg.model.dit import DiT, TextCondition
from hyimg.plugins import load_plugins
from hyimg.report import SilentReporter
from hyimg.training.loop import train_step
from hyimg.training.objective import NoisedBatch, Objective, OutputPreservation
from hyimg.training.optimizers import resolve_optimizer
from hyimg.training.stepping import NonFiniteGuard, Stepper
from hyimg.training.steps import Step


def part(tensors, prefix):
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


class Golden:
    """The golden file as a model, a network with its first weights, and one batch."""

    def __init__(self, folder):
        path = folder / "train_step.safetensors"
        self.tensors = load_file(path)
        with safe_open(path, "pt") as file:
            self.metadata = file.metadata()
        base = part(self.tensors, "base.")
        self.dit = DiT(DiTArch.from_shapes({name: tuple(t.shape) for name, t in base.items()}))
        self.dit.load_state_dict(base)
        self.dit.requires_grad_(False)
        self.network = AdapterNetwork.create(self.dit, rank=4, alpha=2.0)
        self.network.load_state(part(self.tensors, "lora_init."))
        self.network.attach(self.dit)
        given = part(self.tensors, "in.")
        self.drawn = NoisedBatch(given["latents"], given["noise"], given["noise"], given["sigma"])
        self.text = TextCondition(
            given["text_states"], given["text_mask"].bool(), given["byt5_states"], given["byt5_mask"].bool()
        )
        self.objective = Objective(self.dit, l2, uniform, FlowMatching(), seed=0)

    def train(self, num_steps, max_grad_norm):
        """The loss before each step, through the loop's own step."""
        make = resolve_optimizer(load_plugins(), "AdamW", ["weight_decay=0.01"])
        run = SimpleNamespace(
            network=self.network,
            objective=lambda batch, epoch: (
                self.objective.evaluate(self.drawn, self.text),
                self.drawn.sigma_B,
            ),
            guard=NonFiniteGuard(),
            last_good=None,
            report=SilentReporter(),
            stepper=Stepper(make(self.network.parameter_groups(1e-3), 1e-3), max_grad_norm=max_grad_norm),
            config=SimpleNamespace(network_training=NetworkTraining()),
            seed=0,
            preservation=OutputPreservation(self.objective, self.network, [], lambda prompt: None),
            ema=None,
            processes=Processes(),
            device=torch.device("cpu"),
            loader=SimpleNamespace(keys=lambda batch: ["first", "second"]),
        )
        losses = []
        for number in range(1, num_steps + 1):
            step = Step(number, [[0, 1]])  # one batch of two images
            batch = SimpleNamespace(network_multiplier=1.0, sample_keys=("first", "second"))
            result = train_step(run, step, [batch], epoch=1)
            losses.append(float(result.loss_B.mean()))
        return losses


@pytest.fixture
def reference(golden):
    return Golden(golden)


def test_prediction_loss_and_gradients_agree(reference):
    golden = reference.tensors
    loss_B = reference.objective.evaluate(reference.drawn, reference.text)
    prediction = reference.objective.predict(golden["noisy"], golden["in.sigma"], reference.text)
    torch.testing.assert_close(prediction, golden["pred"], atol=2e-5, rtol=0)
    torch.testing.assert_close(loss_B, golden["loss_per_sample"], atol=0, rtol=1e-5)
    loss_B.mean().backward()
    parameters = dict(reference.network.named_parameters())
    for name, gradient in part(golden, "grad.").items():
        torch.testing.assert_close(parameters[name].grad, gradient, atol=1e-6, rtol=1e-4)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters.values()))
    assert norm == pytest.approx(float(reference.metadata["grad_norm"]), rel=1e-4)


@pytest.mark.parametrize(("clip", "name"), [(0.0, "losses_float_t"), (0.03, "losses_float_t_clip0.03")])
def test_five_steps_agree(reference, clip, name):
    losses = reference.train(5, clip)
    losses.append(float(reference.objective.evaluate(reference.drawn, reference.text).detach().mean()))
    torch.testing.assert_close(torch.tensor(losses), reference.tensors[name], atol=0, rtol=1e-5)
    if clip == 0:
        state = reference.network.state()
        for key, expected in part(reference.tensors, "lora_after5.").items():
            torch.testing.assert_close(state[key], expected, atol=2e-5, rtol=0)


def test_multiplier_zero_is_the_base_model(reference):
    reference.network.set_multiplier(0)
    prediction = reference.objective.predict(
        reference.tensors["noisy"], reference.tensors["in.sigma"], reference.text
    )
    torch.testing.assert_close(prediction, reference.tensors["pred_lora_multiplier0"], atol=2e-5, rtol=0)

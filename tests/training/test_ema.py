"""The moving average of the adapter: its formula, its swap, its state, and what a run saves of it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hyimg.errors import HyimgError
from hyimg.training.ema import AdapterEMA


class TwoWeights(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.trained = torch.nn.Parameter(torch.zeros(3))
        self.frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)


def walk(network, ema, steps):
    """Sets the trained weight to each number of `steps`, as an optimiser would."""
    for value in steps:
        with torch.no_grad():
            network.trained.fill_(value)
        ema.update()


def average(ema):
    (values,) = ema.state_dict()["averages"].values()
    return values


def test_the_average_warms_up_to_its_decay():
    network = TwoWeights()
    ema = AdapterEMA(network, 0.3)
    expected = 0.0
    for number, value in enumerate((1.0, 5.0, -2.0, 4.0), start=1):
        walk(network, ema, [value])
        decay = min(0.3, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * value
        assert average(ema).tolist() == pytest.approx([expected] * 3)


def test_a_block_has_the_average_and_gives_the_weights_back_after_an_error_too():
    network = TwoWeights()
    ema = AdapterEMA(network, 0.5)
    walk(network, ema, [1.0, 5.0])
    averaged = average(ema).clone()
    inside = []

    def fail():
        inside.append(network.trained.detach().clone())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), ema.swapped_in():
        fail()
    assert torch.equal(inside[0], averaged)
    assert network.trained.tolist() == [5.0] * 3
    assert torch.equal(average(ema), averaged)


def test_half_precision_weights_have_a_float32_average():
    network = TwoWeights().bfloat16()
    ema = AdapterEMA(network, 0.999)
    walk(network, ema, [1.0] * 50)
    assert average(ema).dtype == torch.float32
    with ema.swapped_in():
        assert network.trained.dtype == torch.float32
    assert network.trained.dtype == torch.bfloat16


def test_a_resumed_average_goes_on_bit_for_bit(tmp_path):
    steps = torch.randn(20, generator=torch.Generator().manual_seed(0)).tolist()
    network = TwoWeights()
    whole = AdapterEMA(network, 0.9)
    walk(network, whole, steps)

    network = TwoWeights()
    first = AdapterEMA(network, 0.9)
    walk(network, first, steps[:7])
    state = first.state_dict()
    save_file(state["averages"], tmp_path / "ema.safetensors")
    number = json.loads(json.dumps(state["num_updates"]))

    network = TwoWeights()
    second = AdapterEMA(network, 0.9)
    second.load_state_dict({"num_updates": number, "averages": load_file(tmp_path / "ema.safetensors")})
    walk(network, second, steps[7:])
    assert torch.equal(average(second), average(whole))


def test_an_average_of_another_network_is_refused():
    state = AdapterEMA(torch.nn.Linear(2, 2), 0.9).state_dict()
    with pytest.raises(HyimgError, match="a different network"):
        AdapterEMA(TwoWeights(), 0.9).load_state_dict(state)


def test_a_run_saves_the_average_and_trains_as_without_it(train):
    options = {"max_train_steps": 3, "learning_rate": 1e-2, "save_format": "kohya"}
    plain, averaged = train(**options), train(**options, ema_decay=0.9)
    weights, trained = plain.network.state(), averaged.network.state()
    assert all(torch.equal(weights[name], trained[name]) for name in weights)
    saved = load_file(averaged.folder.lora_path())
    with averaged.ema.swapped_in():
        state = averaged.network.state()
        assert all(torch.equal(saved[name], state[name]) for name in saved)
    ups = [name for name in saved if name.endswith("lora_up.weight")]
    assert not any(torch.equal(saved[name], weights[name]) for name in ups)

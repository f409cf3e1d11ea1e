"""How long a run is and what a step holds; and that each option reaches the part of the run that it is for."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections import Counter

import pytest
import torch

from hyimg.checkpoints.architecture import DIT_TINY
from hyimg.errors import HyimgError
from hyimg.flow.losses import LossContext, huber, smooth_l1
from hyimg.memory import compilation
from hyimg.plugins import load_plugins
from hyimg.training.optimizers import resolve_optimizer
from hyimg.training.steps import Schedule


def plan(batches, **given):
    """A schedule of epochs of batches of one image, each named by epoch and place ("2.0")."""
    asked = {"accumulation": 1, "max_train_steps": None, "max_train_epochs": None} | given
    return Schedule.plan(lambda epoch: [[f"{epoch}.{place}"] for place in range(batches)], **asked)


def steps(schedule):
    """(epoch, number, images) of every step."""
    return [
        (epoch.number, step.number, " ".join(image for batch in step.batches for image in batch))
        for epoch in schedule.epochs()
        for step in epoch.steps
    ]


@pytest.mark.parametrize(
    ("given", "num_steps", "num_epochs"),
    [
        ({}, 1600, 320),
        ({"max_train_steps": 7}, 7, 2),
        ({"max_train_steps": 10}, 10, 2),
        ({"max_train_epochs": 3}, 15, 3),
        ({"max_train_epochs": 3, "max_train_steps": 7}, 15, 3),
        ({"max_train_epochs": 3, "accumulation": 2}, 9, 3),
        ({"max_train_steps": 4, "accumulation": 2}, 4, 2),
        ({"max_train_epochs": 2, "accumulation": 9}, 2, 2),
    ],
)
def test_epochs_win_over_steps_and_neither_means_1600(given, num_steps, num_epochs):
    schedule = plan(5, **given)
    assert (schedule.max_steps, schedule.num_epochs) == (num_steps, num_epochs)
    assert len(steps(schedule)) == num_steps


def test_what_is_left_of_an_epoch_makes_a_smaller_step():
    schedule = plan(3, accumulation=2, max_train_epochs=2)
    assert steps(schedule) == [(1, 1, "1.0 1.1"), (1, 2, "1.2"), (2, 3, "2.0 2.1"), (2, 4, "2.2")]
    assert [len(step.batches) for epoch in schedule.epochs() for step in epoch.steps] == [2, 1, 2, 1]


def test_processes_share_the_batches_of_each_step_and_one_of_them_may_be_idle():
    (epoch,) = plan(5, accumulation=3, max_train_epochs=1).epochs()
    assert [[list(step.share(rank, 3)) for step in epoch.steps] for rank in range(3)] == [
        [[0], [0]],
        [[1], [1]],
        [[2], []],
    ]


def test_an_epoch_that_the_steps_cut_short_is_not_complete_and_loads_no_more_than_its_steps():
    schedule = plan(3, accumulation=2, max_train_steps=3)
    assert [
        (e.complete, [batch for step in e.steps for batch in step.batches]) for e in schedule.epochs()
    ] == [
        (True, [["1.0"], ["1.1"], ["1.2"]]),
        (False, [["2.0"], ["2.1"]]),
    ]


def test_an_epoch_that_the_steps_just_fill_is_complete():
    assert [epoch.complete for epoch in plan(3, max_train_steps=6).epochs()] == [True, True]


def test_the_adapters_rate_is_unet_lr_where_it_is_given(train):
    groups = train(learning_rate=1e-2, unet_lr=3e-4).optimizer.param_groups
    assert [group["lr"] for group in groups] == [3e-4]
    groups = train(learning_rate=1e-2).optimizer.param_groups
    assert [group["lr"] for group in groups] == [1e-2]


def test_gradient_checkpointing_runs_every_block_twice(train, spy):
    calls = Counter()

    def watch_blocks(run):
        for block in [*run.objective.dit.double_blocks, *run.objective.dit.single_blocks]:
            # before the call: the second forward ends as soon as it has what the gradient needs
            block.register_forward_pre_hook(lambda block, _: calls.update([block]))

    spy.on_start = watch_blocks
    for checkpointing, times in ((False, 1), (True, 2)):
        calls.clear()
        train(gradient_checkpointing=checkpointing)
        assert list(calls.values()) == [times] * (DIT_TINY.num_double + DIT_TINY.num_single)


def test_torch_compile_compiles_both_halves_of_every_block(train, monkeypatch):
    calls = Counter()

    def counting(half, **options):
        def run(*arguments):
            calls.update([half])
            return half(*arguments)

        return run

    monkeypatch.setattr(compilation.torch, "compile", counting)
    train(torch_compile=True)
    assert list(calls.values()) == [1] * 2 * (DIT_TINY.num_double + DIT_TINY.num_single)


def first_batch(run):
    return next(run.loader.load(run.schedule.epoch_batches(1), epoch=1))


def test_flow_options_and_the_seed_reach_the_objective(train):
    run, other = train(seed=1, max_timestep=10), train(seed=2, max_timestep=10)
    drawn, others = run.objective.draw(first_batch(run), 1), other.objective.draw(first_batch(run), 1)
    assert 0 < float(drawn.sigma_B) <= 0.01
    assert not torch.equal(drawn.noise_BCHW, others.noise_BCHW)


def test_latent_sampling_mean_trains_on_the_caches_mean(train):
    run = train(latent_sampling="mean")
    batch = first_batch(run)
    assert torch.equal(run.objective.draw(batch, 1).latent_BCHW, batch.mean_BCHW)
    run = train()
    assert not torch.equal(run.objective.draw(batch, 1).latent_BCHW, batch.mean_BCHW)


def test_the_datasets_multiplier_scales_the_first_gradient(train, make_dataset):
    def first_norm(dataset):
        run = train(dataset_config=dataset)
        return json.loads(run.folder.metrics_path.read_text())["gradient_norm"]

    half = make_dataset("network_multiplier = 0.5")
    # a fresh LoRA adds 0 at any multiplier, so only the gradient of its up matrices tells; halving is exact
    assert first_norm(half) == pytest.approx(0.5 * first_norm(make_dataset()), rel=1e-6)


def test_train_batch_size_is_for_datasets_that_give_none(train, make_dataset):
    assert train(train_batch_size=3).schedule.batches_per_epoch == 2
    own = make_dataset("batch_size = 1")
    run = train(train_batch_size=3, dataset_config=own)
    assert run.schedule.batches_per_epoch == 4


def test_regularisation_images_have_the_weight_that_is_given(train, make_dataset):
    dataset = make_dataset()
    # the same pictures and captions, so that they are cached
    shutil.copytree(dataset.parent / "images", dataset.parent / "class")
    with dataset.open("a", encoding="utf-8") as file:
        file.write("[[datasets.subsets]]\nimage_dir = 'class'\nis_reg = true\n")
    run = train(dataset_config=dataset, prior_loss_weight=0.25)
    batches = run.loader.load(run.schedule.epoch_batches(1), epoch=1)
    assert sorted(float(batch.weights_B) for batch in batches) == [0.25] * 4 + [1.0] * 4


@pytest.fixture
def forkserver():
    """Processes are started as Python 3.14 starts them on Linux."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("forkserver")
@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="POSIX only")
def test_workers_that_are_no_forks_load_the_same_and_stay_between_epochs(train, make_dataset, spy):
    options = {
        "dataset_config": make_dataset("batch_size = 2\ncustom_attributes = {a = 1}"),
        "max_train_epochs": 2,
    }
    plain = train(**options)
    workers = []
    spy.on_start = lambda run: workers.append(run.loader._loader.persistent_workers)
    loaded = train(**options, max_data_loader_n_workers=1)
    assert workers == [True]
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.stepper.parameters, plain.stepper.parameters, strict=True)
    )


def test_a_masked_loss_without_a_mask_is_warned_of(train, report):
    train(masked_loss=True)
    (warning,) = report.warnings
    assert "`--masked_loss` has no effect" in warning


def test_a_cache_of_another_vae_or_other_encoders_is_not_taken(train, models):
    other = models[1]
    with pytest.raises(HyimgError, match="no latent cache") as caught:
        train(vae=other.vae)
    assert "or add `--cache_latents` to this command" in caught.value.hint
    with pytest.raises(HyimgError, match="no text cache") as caught:
        train(text_encoder=other.text_encoder, byt5=other.byt5)
    assert "or add `--cache_text_encoder_outputs` to this command" in caught.value.hint
    train(vae=models[0].vae, text_encoder=models[0].text_encoder, byt5=models[0].byt5)


def test_of_two_caches_the_one_of_the_models_named_is_taken(train, models, make_dataset):
    dataset = make_dataset(caches=((0, 0), (1, 1)))
    with pytest.raises(HyimgError, match="the latent cache .* complete entries of 2 models") as caught:
        train(dataset_config=dataset)
    assert "give `--vae`" in caught.value.hint
    with pytest.raises(HyimgError, match="the text cache .* complete entries of 2 models") as caught:
        train(dataset_config=dataset, vae=models[0].vae)
    assert "give `--text_encoder` and `--byt5`, and `--fp8_vl`" in caught.value.hint
    batches = []
    for of in models:
        files = {"vae": of.vae, "text_encoder": of.text_encoder, "byt5": of.byt5}
        batches.append(first_batch(train(dataset_config=dataset, **files)))
    first, second = batches
    assert first.sample_keys == second.sample_keys
    assert not torch.equal(first.mean_BCHW, second.mean_BCHW)
    assert not torch.equal(first.text[0][0], second.text[0][0])


@pytest.mark.parametrize("loss", [huber, smooth_l1], ids=lambda f: f.__name__)
def test_huber_options_reach_the_loss_and_loss_args_win(train, loss):
    prediction, target = torch.linspace(-2, 2, 8).view(2, 1, 2, 2).requires_grad_(), torch.zeros(2, 1, 2, 2)
    context = LossContext(torch.tensor([0.2, 0.7]), torch.tensor([200.0, 700.0]))
    options = {"huber_c": 0.3, "huber_scale": 2.0, "huber_schedule": "exponential"}
    run = train(loss_type=loss.__name__, **options)
    expected = loss(prediction, target, context, **options)
    torch.testing.assert_close(run.objective.loss(prediction, target, context), expected)
    run = train(loss_type=loss.__name__, **options, loss_args=("huber_c=0.6",))
    expected = loss(prediction, target, context, **{**options, "huber_c": 0.6})
    torch.testing.assert_close(run.objective.loss(prediction, target, context), expected)


def test_loss_args_reach_a_plugins_loss_and_are_checked(train, spy):
    def tilted(prediction, target, context, *, slope=1.0):
        return slope * prediction.mean((1, 2, 3))

    spy.losses["tilted"] = tilted
    image = torch.ones(1, 1, 2, 2)
    run = train(loss_type="tilted", loss_args=("slope=3",))
    assert run.objective.loss(image, image, None).tolist() == [3.0]
    with pytest.raises(HyimgError, match="unknown argument `slop` of `tilted`"):
        train(loss_type="tilted", loss_args=("slop=3",))


@pytest.mark.parametrize(
    ("name", "pairs", "expected"),
    [
        ("torch.optim.RMSprop", ["alpha=0.5", "momentum=0.25"], {"alpha": 0.5, "momentum": 0.25}),
        ("adamw", ["weight_decay=0.125", "betas=(0.5, 0.75)"], {"weight_decay": 0.125, "betas": (0.5, 0.75)}),
        ("SGDNesterov", [], {"nesterov": True, "momentum": 0.9}),
        ("SGDNesterov", ["momentum=0.5"], {"nesterov": True, "momentum": 0.5}),
    ],
)
def test_an_optimiser_by_name_or_place_has_its_arguments_and_the_rate(name, pairs, expected):
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = resolve_optimizer(load_plugins(), name, pairs)([{"params": [parameter]}], 0.5)
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in expected} == expected
    assert group["lr"] == 0.5
    if "." in name:
        assert isinstance(optimizer, torch.optim.RMSprop)


@pytest.mark.parametrize(
    ("name", "pairs", "message"),
    [
        ("torch.optim.RMSprop", ["alhpa=0.5"], "unknown argument `alhpa` of `torch.optim.RMSprop`"),
        ("AdamW", ["momentum=0.5"], "unknown argument `momentum` of `AdamW`"),
        ("AdamW", ["weight_decay"], "takes `name=value`, got `weight_decay`"),
        ("torch.optim.Adamm", [], "`torch.optim.Adamm` cannot be imported"),
        ("AdamWW", [], "`AdamWW` is unknown"),
    ],
)
def test_an_optimiser_that_cannot_be_made_is_one_sentence(name, pairs, message):
    with pytest.raises(HyimgError, match=message):
        resolve_optimizer(load_plugins(), name, pairs)

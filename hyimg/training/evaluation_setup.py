"""The validation and the samples of a run, from its options, its data and its model."""

from __future__ import annotations

from dataclasses import replace

from hyimg.data.training_data import TrainingData
from hyimg.data.workspace import Workspace
from hyimg.model.architecture import SPATIAL_FACTOR
from hyimg.training.evaluation import Evaluation
from hyimg.training.objective import Objective
from hyimg.training.preparation import Preparation
from hyimg.training.samples import SampleCadence, SampleRenderer, sampling_of
from hyimg.training.validation import Cadence, Validator, familiar_samples


def make_evaluation(
    prepared: Preparation, workspace: Workspace, data: TrainingData, objective: Objective
) -> Evaluation:
    """What is to be asked between the steps, and when."""
    options = prepared.config.validation
    return Evaluation(
        validator=_validator(prepared, workspace, data, objective),
        validation_cadence=Cadence.of(options),
        samples=_samples(prepared, workspace, data, objective),
        sample_cadence=SampleCadence.of(options),
    )


def _validator(
    prepared: Preparation, workspace: Workspace, data: TrainingData, objective: Objective
) -> Validator | None:
    held_back = workspace.found.validation
    if not held_back:
        return None
    familiar = familiar_samples(workspace.found.samples, len(held_back), seed=prepared.seed)
    held_back_data, familiar_data = (
        TrainingData(samples, data.latent_store, data.text_store, seed=prepared.seed, plain=True)
        for samples in (held_back, familiar)
    )
    return Validator(
        objective,
        held_back_data,
        familiar_data,
        max_batches=prepared.config.validation.max_validation_steps,
        processes=prepared.processes,
    )


def _samples(
    prepared: Preparation, workspace: Workspace, data: TrainingData, objective: Objective
) -> SampleRenderer | None:
    if prepared.sample_plan is None:
        return None
    config = prepared.config
    assert config.dit.dit is not None
    width, height = (
        max(SPATIAL_FACTOR, side // SPATIAL_FACTOR * SPATIAL_FACTOR)
        for side in workspace.dataset_file.datasets[0].resolution
    )
    # prompts that do not say a size are rendered at that of the training
    plan = replace(prepared.sample_plan, options=sampling_of(config.validation, (height, width)))
    return SampleRenderer(
        plan,
        objective.dit,
        data.text_store,
        config.vae,
        config.compute,
        config.dit.dit,
        processes=prepared.processes,
    )

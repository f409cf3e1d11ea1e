"""Which groups of options each command takes: its config is one frozen dataclass of groups.

The configs of small commands are in `hyimg.config.tools`, so that these load no other groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hyimg.config.dataset_options import (
    CachesInTraining,
    CacheUpkeep,
    DatasetFileOptions,
    DatasetOptions,
    DryRun,
    LatentCaching,
    NamedDataset,
    ReportModels,
    ReportOutput,
    ReportTraining,
    TextCaching,
)
from hyimg.config.models import (
    Compute,
    DiTFile,
    Memory,
    PromptEncoders,
    RequiredDiT,
    RequiredTextEncoders,
    RequiredVAE,
    TextEncoderFiles,
    TrainingMemory,
    VAEFile,
)
from hyimg.config.option import CommandOptions, Condition, Given, Unless
from hyimg.config.rendering import InferOutput, LoRAFiles, Prompt, Sampling, SheetOptions
from hyimg.config.run_options import Duration, Hub, Logging, Metadata, ProcessCount, Saving, Validation
from hyimg.config.tools import (
    Common,
    Forecast,
    InspectionOptions,
)
from hyimg.config.training import (
    ClassCaptions,
    FlowMatching,
    LearningRate,
    LossOptions,
    NetworkShape,
    NetworkTraining,
    Optimizer,
    Preservation,
)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(CommandOptions):
    NEEDS: ClassVar[Mapping[str, tuple[Condition, ...]]] = {"byt5": (Given("text_encoder"),)}

    dataset: NamedDataset
    output: ReportOutput
    models: ReportModels
    training: ReportTraining
    common: Common


@dataclass(frozen=True, kw_only=True)
class CacheLatentsConfig(CommandOptions):
    dataset: DatasetFileOptions
    vae: RequiredVAE
    caching: LatentCaching
    upkeep: CacheUpkeep
    processes: ProcessCount
    compute: Compute
    report: DryRun
    common: Common


@dataclass(frozen=True, kw_only=True)
class CacheTextConfig(CommandOptions):
    dataset: DatasetOptions
    encoders: RequiredTextEncoders
    caching: TextCaching
    class_captions: ClassCaptions
    upkeep: CacheUpkeep
    processes: ProcessCount
    compute: Compute
    report: DryRun
    common: Common


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CommandOptions):
    NEEDS: ClassVar[Mapping[str, tuple[Condition, ...]]] = {
        # named alone, an encoder does not even say which cache is meant
        "text_encoder": (Given("byt5"),),
        "byt5": (Given("text_encoder"),),
        "tokenizer": (Given("text_encoder"),),
    }

    dit: RequiredDiT
    encoders: TextEncoderFiles
    vae: VAEFile
    dataset: DatasetOptions
    latent_caching: LatentCaching
    caching: CachesInTraining
    network: NetworkShape
    network_training: NetworkTraining
    preservation: Preservation
    class_captions: ClassCaptions
    rate: LearningRate
    optimizer: Optimizer
    flow: FlowMatching
    loss: LossOptions
    duration: Duration
    saving: Saving
    logging: Logging
    metadata: Metadata
    validation: Validation
    memory: Memory
    training_memory: TrainingMemory
    compute: Compute
    hub: Hub
    report: DryRun
    common: Common


@dataclass(frozen=True, kw_only=True)
class InferConfig(CommandOptions):
    dit: DiTFile
    encoders: PromptEncoders
    vae: VAEFile
    lora: LoRAFiles
    prompt: Prompt
    sampling: Sampling
    output: InferOutput
    memory: Memory
    compute: Compute
    common: Common


@dataclass(frozen=True, kw_only=True)
class SampleConfig(CommandOptions):
    NEEDS: ClassVar[Mapping[str, tuple[Condition, ...]]] = {"text_encoder_cpu": (Unless("cache_dir"),)}

    dit: RequiredDiT
    encoders: PromptEncoders
    vae: RequiredVAE
    sheet: SheetOptions
    sampling: Sampling
    memory: Memory
    compute: Compute
    common: Common


@dataclass(frozen=True, kw_only=True)
class InspectModulesConfig(CommandOptions):
    dit: DiTFile
    inspection: InspectionOptions
    network: NetworkShape
    rate: LearningRate
    forecast: Forecast

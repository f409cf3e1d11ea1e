"""Which groups of options each command takes; a command's config is one frozen dataclass of groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from hyimg.config.dataset import (
    CachesInTraining,
    CacheUpkeep,
    DatasetOptions,
    DryRun,
    LatentCaching,
    NamedDataset,
    ReportModels,
    ReportOutput,
    ReportTraining,
    TextCaching,
)
from hyimg.config.flow import FlowMatching, LossOptions
from hyimg.config.models import Compute, DiTFile, Memory, TextEncoderFiles, TrainingMemory, VAEFile
from hyimg.config.network import ClassCaptions, NetworkShape, NetworkTraining, Preservation
from hyimg.config.optimizer import LearningRate, Optimizer
from hyimg.config.rendering import InferOutput, LoRAFiles, Prompt, Sampling, SheetOptions
from hyimg.config.run import Duration, Hub, Logging, Metadata, ProcessCount, Saving, Validation
from hyimg.config.tools import (
    Check,
    Common,
    Conversion,
    Demo,
    Download,
    Forecast,
    Inspection,
    Merging,
    PluginList,
    TinyModel,
)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    REQUIRED: ClassVar[tuple[str, ...]] = ("dataset_config",)

    dataset: NamedDataset = field(default_factory=NamedDataset)
    output: ReportOutput = field(default_factory=ReportOutput)
    models: ReportModels = field(default_factory=ReportModels)
    training: ReportTraining = field(default_factory=ReportTraining)
    common: Common = field(default_factory=Common)


@dataclass(frozen=True, kw_only=True)
class CacheLatentsConfig:
    REQUIRED: ClassVar[tuple[str, ...]] = ("dataset_config", "vae")

    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    vae: VAEFile = field(default_factory=VAEFile)
    caching: LatentCaching = field(default_factory=LatentCaching)
    upkeep: CacheUpkeep = field(default_factory=CacheUpkeep)
    processes: ProcessCount = field(default_factory=ProcessCount)
    compute: Compute = field(default_factory=Compute)
    report: DryRun = field(default_factory=DryRun)
    common: Common = field(default_factory=Common)


@dataclass(frozen=True, kw_only=True)
class CacheTextConfig:
    REQUIRED: ClassVar[tuple[str, ...]] = ("dataset_config", "text_encoder", "byt5")

    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    encoders: TextEncoderFiles = field(default_factory=TextEncoderFiles)
    caching: TextCaching = field(default_factory=TextCaching)
    class_captions: ClassCaptions = field(default_factory=ClassCaptions)
    upkeep: CacheUpkeep = field(default_factory=CacheUpkeep)
    processes: ProcessCount = field(default_factory=ProcessCount)
    compute: Compute = field(default_factory=Compute)
    report: DryRun = field(default_factory=DryRun)
    common: Common = field(default_factory=Common)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    REQUIRED: ClassVar[tuple[str, ...]] = ("dit", "dataset_config", "output_dir")

    dit: DiTFile = field(default_factory=DiTFile)
    encoders: TextEncoderFiles = field(default_factory=TextEncoderFiles)
    vae: VAEFile = field(default_factory=VAEFile)
    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    latent_caching: LatentCaching = field(default_factory=LatentCaching)
    caching: CachesInTraining = field(default_factory=CachesInTraining)
    network: NetworkShape = field(default_factory=NetworkShape)
    network_training: NetworkTraining = field(default_factory=NetworkTraining)
    preservation: Preservation = field(default_factory=Preservation)
    class_captions: ClassCaptions = field(default_factory=ClassCaptions)
    rate: LearningRate = field(default_factory=LearningRate)
    optimizer: Optimizer = field(default_factory=Optimizer)
    flow: FlowMatching = field(default_factory=FlowMatching)
    loss: LossOptions = field(default_factory=LossOptions)
    duration: Duration = field(default_factory=Duration)
    saving: Saving = field(default_factory=Saving)
    logging: Logging = field(default_factory=Logging)
    metadata: Metadata = field(default_factory=Metadata)
    validation: Validation = field(default_factory=Validation)
    memory: Memory = field(default_factory=Memory)
    training_memory: TrainingMemory = field(default_factory=TrainingMemory)
    compute: Compute = field(default_factory=Compute)
    hub: Hub = field(default_factory=Hub)
    report: DryRun = field(default_factory=DryRun)
    common: Common = field(default_factory=Common)


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    dit: DiTFile = field(default_factory=DiTFile)
    encoders: TextEncoderFiles = field(default_factory=TextEncoderFiles)
    vae: VAEFile = field(default_factory=VAEFile)
    lora: LoRAFiles = field(default_factory=LoRAFiles)
    prompt: Prompt = field(default_factory=Prompt)
    sampling: Sampling = field(default_factory=Sampling)
    output: InferOutput = field(default_factory=InferOutput)
    memory: Memory = field(default_factory=Memory)
    compute: Compute = field(default_factory=Compute)
    common: Common = field(default_factory=Common)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    REQUIRED: ClassVar[tuple[str, ...]] = ("dit", "vae", "sample_prompts", "output_dir")

    dit: DiTFile = field(default_factory=DiTFile)
    encoders: TextEncoderFiles = field(default_factory=TextEncoderFiles)
    vae: VAEFile = field(default_factory=VAEFile)
    sheet: SheetOptions = field(default_factory=SheetOptions)
    sampling: Sampling = field(default_factory=Sampling)
    memory: Memory = field(default_factory=Memory)
    compute: Compute = field(default_factory=Compute)
    common: Common = field(default_factory=Common)


@dataclass(frozen=True, kw_only=True)
class ConvertComfyConfig:
    REQUIRED: ClassVar[tuple[str, ...]] = ("source", "destination")

    conversion: Conversion = field(default_factory=Conversion)


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    REQUIRED: ClassVar[tuple[str, ...]] = ("loras", "output")

    merging: Merging = field(default_factory=Merging)


@dataclass(frozen=True, kw_only=True)
class InspectModulesConfig:
    dit: DiTFile = field(default_factory=DiTFile)
    inspection: Inspection = field(default_factory=Inspection)
    network: NetworkShape = field(default_factory=NetworkShape)
    rate: LearningRate = field(default_factory=LearningRate)
    forecast: Forecast = field(default_factory=Forecast)


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    REQUIRED: ClassVar[tuple[str, ...]] = ("lora",)

    check: Check = field(default_factory=Check)
    dit: DiTFile = field(default_factory=DiTFile)


@dataclass(frozen=True, kw_only=True)
class DownloadModelsConfig:
    REQUIRED: ClassVar[tuple[str, ...]] = ("directory",)

    download: Download = field(default_factory=Download)


@dataclass(frozen=True, kw_only=True)
class MakeTinyModelConfig:
    REQUIRED: ClassVar[tuple[str, ...]] = ("directory",)

    tiny: TinyModel = field(default_factory=TinyModel)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    REQUIRED: ClassVar[tuple[str, ...]] = ("directory",)

    demo: Demo = field(default_factory=Demo)


@dataclass(frozen=True, kw_only=True)
class PluginsConfig:
    listing: PluginList = field(default_factory=PluginList)
    common: Common = field(default_factory=Common)

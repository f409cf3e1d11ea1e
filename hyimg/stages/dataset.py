"""`hyimg dataset`: a report on a dataset before any model is loaded. No torch unless encoders are given.

It reads the dataset, counts it, checks the caches, lints every caption, and prints the report.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hyimg.cache.entry_file import EntryShapes
from hyimg.cache.hashing import file_identity
from hyimg.checkpoints.architecture import DIT_2_1, NATIVE_SIZES, VAE_2_1
from hyimg.checkpoints.header_check import open_vae
from hyimg.config.commands import DatasetConfig
from hyimg.config.models import Compute
from hyimg.config.option import warn_of_idle
from hyimg.data.caching import prompts_of
from hyimg.data.captions import CaptionTransforms
from hyimg.data.findings import Finding, duplicate_captions
from hyimg.data.workspace import Workspace, open_workspace, options_left_to_flags
from hyimg.encoders.glyph import PromptLint, lint_prompt
from hyimg.encoders.tokenizer import QwenTokenizer, load_qwen_tokenizer
from hyimg.errors import HyimgError
from hyimg.rendering.prompts import load_prompts
from hyimg.report import Reporter, SilentReporter, plain_console, say_json
from hyimg.reports.dataset_report import (
    JSON_FORMAT,
    BucketRow,
    CacheState,
    Captions,
    DatasetReport,
    print_report,
)
from hyimg.reports.dataset_stats import (
    bounded_sizes,
    bucket_rows,
    count_epoch,
    count_images,
    dataset_rows,
    latent_cache_state,
    text_cache_state,
)
from hyimg.reports.sheets import write_bucket_sheet

_MANY_PROMPTS = 2000
_BYT5_NORM = "encoder.final_layer_norm.weight"


def dataset(config: DatasetConfig, report: Reporter) -> DatasetReport:
    """Prints the report on stdout, as tables or JSON, and writes the contact sheet if requested.

    Apart from that, only the cache folder's index is written. Raises HyimgError for everything that would stop caching
    or training: errors in the dataset file, its images and captions, an empty training or validation set, a file that
    is not the model it should be.
    """
    sheet = config.output.contact_sheet
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise HyimgError(
            f"`--contact_sheet` writes a PNG file, not `{sheet.name}`", hint="use the ending `.png`"
        )
    # the notes are part of the report
    training = config.training
    opening = SilentReporter()
    workspace = open_workspace(
        config.dataset,
        opening,
        transforms=CaptionTransforms.of(config.dataset, config.common.plugin),
        batch_size=training.train_batch_size,
        validation_split=training.validation_split,
        validation_seed=training.validation_seed,
    )
    for line in opening.warnings:
        if line not in workspace.found.warnings:
            report.warning(line)
    warn_of_idle(
        config,
        report,
        random_captions=workspace.has_random_captions,
        validates=bool(workspace.found.validation),
        left_to_flags=options_left_to_flags(workspace.dataset_file.path),
    )
    result = _build_report(config, workspace, report)
    if config.output.json:
        say_json(asdict(result))
    else:
        print_report(result, plain_console(soft_wrap=False))
    if sheet is not None:
        if not write_bucket_sheet(workspace.all_samples, sheet):
            report.warning("no installed font has Chinese, Japanese and Korean glyphs: labels show boxes")
        report.note(f"contact sheet: {sheet}")
    return result


def _build_report(config: DatasetConfig, workspace: Workspace, report: Reporter) -> DatasetReport:
    samples = workspace.all_samples
    extra = _sample_prompts(config.training.sample_prompts, report)
    tokenizer, not_counted = _tokenizer(config)
    lints = _lint_all(prompts_of(samples, extra), tokenizer, report)
    buckets = bucket_rows(workspace)
    return DatasetReport(
        format=JSON_FORMAT,
        dataset_config=str(workspace.dataset_file.path.absolute()),
        cache_dir=str(workspace.cache_dir.absolute()),
        images=count_images(workspace),
        epoch=count_epoch(buckets, config.training.gradient_accumulation_steps),
        datasets=dataset_rows(workspace),
        buckets=buckets,
        latents=_latents(config, workspace),
        text=_text(config, workspace, extra, lints, tokenizer),
        captions=_captions(workspace, lints, tokenizer, not_counted),
        findings=(*workspace.found.findings, *_findings(workspace, lints), *duplicate_captions(samples)),
        notes=(*workspace.found.notes, *bounded_sizes(workspace), *_notes(config, buckets)),
    )


def _sample_prompts(path: Path | None, report: Reporter) -> list[str]:
    specs = [] if path is None else load_prompts(path, report)
    return [text for spec in specs for text in (spec.prompt, spec.negative_prompt or "")]


# captions -----------------------------------------------------------------------------------------------


def _tokenizer(config: DatasetConfig) -> tuple[QwenTokenizer | None, str | None]:
    """The tokenizer, or why there is none. One given by `--tokenizer` must be usable; otherwise none is needed."""
    named = config.models.tokenizer
    try:
        return load_qwen_tokenizer(named, config.models.text_encoder, download=False), None
    except HyimgError as error:
        if named is not None:
            raise
        return None, error.message + (f" ({error.hint})" if error.hint else "")


def _lint_all(
    prompts: Sequence[str], tokenizer: QwenTokenizer | None, report: Reporter
) -> dict[str, PromptLint]:
    if len(prompts) < _MANY_PROMPTS:
        return {prompt: lint_prompt(prompt, tokenizer) for prompt in prompts}
    lints: dict[str, PromptLint] = {}
    with report.task("read captions", len(prompts), unit="caption") as task:
        for prompt in prompts:
            lints[prompt] = lint_prompt(prompt, tokenizer)
            task.advance()
    return lints


def _captions(
    workspace: Workspace,
    lints: Mapping[str, PromptLint],
    tokenizer: QwenTokenizer | None,
    not_counted: str | None,
) -> Captions:
    lengths = [lint.num_tokens for prompt, lint in lints.items() if prompt and lint.num_tokens is not None]
    return Captions(
        distinct=len({sample.caption for sample in workspace.all_samples}),
        prompts=len(lints),
        tokenizer=None if tokenizer is None else tokenizer.source,
        not_counted=not_counted,
        mean_tokens=round(sum(lengths) / len(lengths), 1) if lengths else None,
        longest_tokens=max(lengths, default=None),
    )


def _findings(workspace: Workspace, lints: Mapping[str, PromptLint]) -> list[Finding]:
    """The findings about captions; one per kind for all images and variants of a caption."""
    images: defaultdict[tuple[str, ...], dict[str, None]] = defaultdict(dict)
    for sample in workspace.all_samples:
        images[sample.prompts][str(sample.image_path)] = None
    return [
        finding
        for prompts, paths in images.items()
        for finding in _findings_of(prompts, [lints[prompt] for prompt in prompts], tuple(paths))
    ]


def _findings_of(
    prompts: Sequence[str], lints: Sequence[PromptLint], images: tuple[str, ...]
) -> Iterable[Finding]:
    if "" in prompts:
        yield Finding(kind="empty_caption", images=images)
    if cut := max(lint.num_cut or 0 for lint in lints):
        yield Finding(kind="tokens_cut", images=images, count=cut)
    if quoted := _distinct(lint.quoted for lint in lints):
        yield Finding(kind="quoted_text", images=images, texts=quoted)
    if cut := max(lint.num_glyph_cut for lint in lints):
        yield Finding(kind="quoted_text_cut", images=images, texts=quoted, count=cut)
    if texts := _distinct(lint.single_quoted for lint in lints):
        yield Finding(kind="single_quoted_text", images=images, texts=texts)
    if texts := _distinct(lint.special for lint in lints):
        yield Finding(kind="special_token", images=images, texts=texts)
    if any(lint.begins_with_newline for lint in lints):
        yield Finding(kind="leading_newline", images=images)


def _distinct(texts: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for some in texts for text in some))


# caches -------------------------------------------------------------------------------------------------


def _latents(config: DatasetConfig, workspace: Workspace) -> CacheState:
    vae, identity = config.models.vae, None
    channels = VAE_2_1.latent_channels
    basis = f"assuming HunyuanImage-2.1's VAE ({channels} channels), since `--vae` is not given"
    if vae is not None:
        channels = open_vae(vae).arch.latent_channels
        identity = file_identity(vae, workspace.index)
        basis = f"{channels} channels, from `{vae.name}`"
    return latent_cache_state(
        workspace.latents_dir,
        workspace.all_samples,
        index=workspace.index,
        identity=identity,
        channels=channels,
        basis=basis,
    )


@dataclass(frozen=True)
class _Widths:
    """Values per token and dtypes, of Qwen and of byT5; `basis` says where they come from."""

    text: int = DIT_2_1.text_dim
    byt5: int = DIT_2_1.byt5_dim
    text_dtype: str = "BF16"
    byt5_dtype: str = "F16"
    basis: str = "assuming HunyuanImage-2.1's encoders, since `--text_encoder` and `--byt5` are not given"


def _text(
    config: DatasetConfig,
    workspace: Workspace,
    extra: Sequence[str],
    lints: Mapping[str, PromptLint],
    tokenizer: QwenTokenizer | None,
) -> CacheState:
    identities, widths = _text_encoders(config, workspace, tokenizer)
    return text_cache_state(
        workspace.text_dir,
        workspace.all_samples,
        extra,
        index=workspace.index,
        identities=identities,
        shapes=_shapes(lints, widths),
        basis=widths.basis if tokenizer is not None else "unknown without a tokenizer",
    )


def _text_encoders(
    config: DatasetConfig, workspace: Workspace, tokenizer: QwenTokenizer | None
) -> tuple[list[str] | None, _Widths]:
    text_encoder, byt5 = config.models.text_encoder, config.models.byt5
    if text_encoder is None or byt5 is None:
        return None, _Widths()
    # torch, which knows the device and its dtypes
    from hyimg.encoders.text import TextEncoders
    from hyimg.memory.device import resolve_device
    from hyimg.memory.precision import decide_precision

    precision = decide_precision(
        Compute(), resolve_device(None), text_encoder_dtype=config.models.text_encoder_dtype
    )
    encoders = TextEncoders.open(
        text_encoder,
        byt5,
        tokenizer or config.models.tokenizer,
        dtype=precision.text_encoder,
        fp8=config.models.fp8_vl,
        byt5_dtype=precision.byt5,
        memo=workspace.index,
    )
    widths = _Widths(
        encoders.qwen.arch.hidden,
        encoders.byt5.arch.d_model,
        "BF16" if precision.text_entries[0] == "bf16" else "F32",
        "F32" if precision.byt5 is not None else encoders.byt5.checkpoint.tensors[_BYT5_NORM].dtype,
        basis=f"{encoders.qwen.arch.hidden} and {encoders.byt5.arch.d_model} values per token, from the encoders",
    )
    return [own.identity for own in encoders.in_dtypes(precision.text_entries)], widths


def _shapes(lints: Mapping[str, PromptLint], widths: _Widths) -> Callable[[str], EntryShapes | None]:
    def shapes(prompt: str) -> EntryShapes | None:
        lint = lints[prompt]
        if lint.num_tokens is None:
            return None
        tensors: EntryShapes = {"text": (widths.text_dtype, (lint.num_tokens, widths.text))}
        if lint.num_glyph_tokens:
            tensors = {**tensors, "byt5": (widths.byt5_dtype, (lint.num_glyph_tokens, widths.byt5))}
        return tensors

    return shapes


# notes --------------------------------------------------------------------------------------------------


def _notes(config: DatasetConfig, buckets: Sequence[BucketRow]) -> Iterable[str]:
    vae, sizes = config.models.vae, {row.size: row.native for row in buckets}
    others = sum(not native for native in sizes.values())
    if others and (vae is None or open_vae(vae).arch == VAE_2_1):  # other models have other native sizes
        native = ", ".join(f"{width}x{height}" for width, height in NATIVE_SIZES)
        yield f"bucket sizes that are not among the model's five native ones ({native}): {others} of {len(sizes)}"
    if (config.models.text_encoder is None) != (config.models.byt5 is None):
        yield "`--text_encoder` and `--byt5` select a text cache only if both are given"

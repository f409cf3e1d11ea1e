"""fp8 checkpoints of other tools: which tensors are scales, and of which weights. No torch.

All values are e4m3; a weight is its value times a scale. With a weight `X.weight` come

- `X.weight_scale`, one float32: Tencent's own quantiser (HunyuanImage-2.1, `hyimage/models/utils/
  fp8_quantization.py`), and ComfyUI (its `QUANTIZATION.md`), which adds `X.input_scale`, `X.comfy_quant` or
  `_quantization_metadata`. Scales of activations are ignored: activations are never quantised here.
- `X.scale_weight`: ComfyUI's older form with `X.scale_input` and a marker `scaled_fp8`, one value; the
  reference tool's (`library/fp8_optimization_utils.py`), one value, one a row, or one a block of a row.
- nothing: values were cast to e4m3 without scaling. Tencent's separate file of scales
  (`NAME_fp8_scale.safetensors`, keys `X`) is found next to the weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from hyimg.checkpoints.safetensors_file import Checkpoint, TensorInfo, read_header
from hyimg.config.documents import parse_json
from hyimg.errors import HyimgError

E4M3 = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16", "F16")

_SCALE_SUFFIXES = (".weight_scale", ".scale_weight")
# For activations, or redundant with the dtypes
_IGNORED_SUFFIXES = (".input_scale", ".scale_input", ".comfy_quant")
_MARKER = "scaled_fp8"
# ComfyUI's name for the recipe above
_KNOWN_RECIPE = "float8_e4m3fn"
# The bytes of +448 and -448
_LARGEST = (b"\x7e", b"\xfe")


@dataclass(frozen=True)
class Fp8Tensors:
    """The weights of an fp8 checkpoint, and the scales of those that have some, by names in the file."""

    weights: Collection[str]
    scales: Mapping[str, str]

    @property
    def quantization(self) -> str:
        """How the weights of an fp8 checkpoint are stored, for a message."""
        if not self.scales:
            return "e4m3 without scales"
        suffix = next(iter(self.scales.values())).rpartition(".")[2]
        return f"e4m3 with `{suffix}`" if suffix in ("weight_scale", "scale_weight") else "e4m3 with scales"


def with_scale_file(checkpoint: Checkpoint) -> Checkpoint:
    """Adds the separate file of scales next to an fp8 checkpoint that has none inside."""
    if len(checkpoint.headers) != 1 or not is_fp8(checkpoint.tensors):
        return checkpoint
    path = checkpoint.headers[0].path
    scale_path = path.with_name(f"{path.stem}_scale.safetensors")
    if any(name.endswith(_SCALE_SUFFIXES) for name in checkpoint.tensors) or not scale_path.is_file():
        return checkpoint
    return replace(checkpoint, headers=(*checkpoint.headers, read_header(scale_path)))


def is_fp8(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether any tensor holds fp8 values."""
    return any(info.dtype == E4M3 for info in tensors.values())


def split_scales(tensors: Mapping[str, TensorInfo]) -> Fp8Tensors:
    """Separates the weights of an fp8 checkpoint from their scales and markers."""
    scales = {}
    extras = {name for name in tensors if name.endswith(_IGNORED_SUFFIXES) or _is_marker(name)}
    for name, info in tensors.items():
        module = name.removesuffix(".weight")
        if info.dtype != E4M3 or module == name:
            continue
        # The last is that of a file of scales
        for scale in (module + _SCALE_SUFFIXES[0], module + _SCALE_SUFFIXES[1], module):
            if scale in tensors:
                scales[name] = scale
                break
    extras.update(scales.values())
    return Fp8Tensors([name for name in tensors if name not in extras], scales)


def scale_problems(tensors: Mapping[str, TensorInfo], found: Fp8Tensors) -> dict[str, str]:
    """A sentence for each weight, by its name in the file, whose scales are missing or have a wrong dtype or shape.

    Either all matrices of blocks have scales, or none.
    """
    problems = {}
    for name in found.weights:
        info = tensors[name]
        if info.dtype != E4M3 or not name.endswith(".weight"):
            continue
        scale = found.scales.get(name)
        if scale is None:
            if found.scales and len(info.shape) == 2 and "blocks." in name:
                problems[name] = f"`{name}` is {E4M3} and its scales are missing"
        elif tensors[scale].dtype not in SCALE_DTYPES:
            problems[name] = (
                f"`{scale}` is {tensors[scale].dtype}, and scales must be {', '.join(SCALE_DTYPES)}"
            )
        elif not _fits(tensors[scale].shape, info.shape):
            problems[name] = (
                f"`{scale}` has the shape {list(tensors[scale].shape)}, which for {list(info.shape)} is neither "
                "one value, nor one a row, nor one a block of a row"
            )
    return problems


def refuse_other_recipes(checkpoint: Checkpoint) -> None:
    """Raises `HyimgError` if the metadata names another quantisation than the one above."""
    try:
        recorded = parse_json(checkpoint.metadata.get("_quantization_metadata", "{}"), "it")
        layers = recorded.get("layers", {}).values()
        recipes = {str(config["format"] if isinstance(config, dict) else config) for config in layers}
    except (HyimgError, KeyError, AttributeError):
        raise HyimgError(
            f"the `_quantization_metadata` of `{checkpoint.path}` cannot be read",
            hint="give the bf16 or fp16 file of this model",
        ) from None
    if others := sorted(recipes - {_KNOWN_RECIPE}):
        raise HyimgError(
            f"`{checkpoint.path}` is quantised as `{others[0]}`, and only `{_KNOWN_RECIPE}` is read",
            hint="give the bf16 or fp16 file of this model",
        )


def refuse_lost_scales(checkpoint: Checkpoint, found: Fp8Tensors) -> None:
    """Raises `HyimgError` if fp8 weights were scaled but their scales are missing.

    Scaling maps the largest value of a weight to 448, e4m3's largest; weights cast without scaling have no value near
    it. Reads one weight.
    """
    matrices = [
        name
        for name in found.weights
        if checkpoint.tensors[name].dtype == E4M3 and len(checkpoint.tensors[name].shape) == 2
    ]
    if found.scales or not matrices:
        return
    smallest = min(matrices, key=lambda name: checkpoint.tensors[name].end - checkpoint.tensors[name].start)
    values = checkpoint.read_bytes(smallest)
    if any(value in values for value in _LARGEST):
        raise HyimgError(
            f"`{checkpoint.path}` has fp8 weights that were scaled, but no scales",
            hint="put the file of scales next to it, with the same name plus `_scale`, or give the bf16 file",
        )


def _is_marker(name: str) -> bool:
    return name == _MARKER or name.endswith("." + _MARKER)


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    if all(size == 1 for size in scale):
        return True
    if len(weight) != 2:
        return False
    rows, columns = weight
    is_by_block = len(scale) == 3 and scale[0] == rows and scale[1] > 0 and scale[2] == 1
    return scale in ((rows,), (rows, 1)) or (is_by_block and columns % scale[1] == 0)

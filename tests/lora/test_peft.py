"""PEFT's folders against PEFT itself: the same update, whatever says its strength; and what is not understood."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hyimg.errors import HyimgError
from hyimg.lora import patterns
from hyimg.lora.files.conversion import convert, merge, read_adapters
from hyimg.lora.files.foreign import CONFIG_NAME, METADATA_KEY, WEIGHTS_NAME, lora_identity
from hyimg.lora.files.stored import LoRAFile

HIDDEN = 8
SHAPES = {  # (I, O) of a model of width 8
    "double_blocks.0.img_attn_qkv": (8, 24),
    "double_blocks.1.img_attn_qkv": (8, 24),
    "double_blocks.1.img_attn_proj": (8, 8),
    "single_blocks.0.linear1": (8, 56),
    "single_blocks.11.linear2": (40, 8),
}
NAMES = ["img_attn_qkv", "img_attn_proj", "linear1", "linear2"]


class Block(nn.Module):
    """Holds what it is given under dotted names."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        for first in dict.fromkeys(name.partition(".")[0] for name in shapes):
            own = {n.partition(".")[2]: s for n, s in shapes.items() if n.partition(".")[0] == first}
            self.add_module(first, nn.Linear(*own[""], bias=False) if "" in own else Block(own))


class Compiled(nn.Module):
    """Names as those of `torch.compile(model)`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


LORA: dict[str, dict[str, Any]] = {
    "alpha": {"r": 4, "lora_alpha": 16},
    "rslora": {"r": 4, "lora_alpha": 16, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 16, "use_dora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 16,
        # a regular expression, a whole name, the end of a name; the first that matches wins
        "rank_pattern": {r"double_blocks\.\d+\.img_attn_qkv": 3, "^single_blocks.0.linear1": 1},
        "alpha_pattern": {"1.linear2": 5, "linear2": 6, r"double_blocks\.[1-9].*": 7, "img_attn_qkv": 8},
    },
}


def _saved(folder: Path, config: Any, *, compiled: bool = False) -> dict[str, Tensor]:
    """PEFT's folder with random weights, and its own updates by the model's names."""
    peft = pytest.importorskip("peft", reason="peft is in the test extra")
    torch.manual_seed(0)
    model: nn.Module = Block(SHAPES)
    wrapped = peft.get_peft_model(Compiled(model) if compiled else model, config)
    for name, parameter in wrapped.named_parameters():
        if "magnitude" not in name and "base_layer" not in name:
            nn.init.normal_(parameter)
    wrapped.save_pretrained(str(folder))
    return {name: model.get_submodule(name).get_delta_weight("default").detach() for name in SHAPES}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Tensor]]]:
    made: dict[str, tuple[Path, dict[str, Tensor]]] = {}

    def make(case: str) -> tuple[Path, dict[str, Tensor]]:
        peft = pytest.importorskip("peft", reason="peft is in the test extra")
        if case not in made:
            config = {
                "loha": lambda: peft.LoHaConfig(r=4, alpha=16, target_modules=NAMES),
                "lokr": lambda: peft.LoKrConfig(r=1, alpha=16, decompose_both=True, target_modules=NAMES),
                "whole lokr": lambda: peft.LoKrConfig(r=64, alpha=16, target_modules=NAMES),
            }.get(case, lambda: peft.LoraConfig(**LORA.get(case, LORA["alpha"]), target_modules=NAMES))()
            folder = tmp_path_factory.mktemp("peft")
            made[case] = folder, _saved(folder, config, compiled=case == "compiled")
        return made[case]

    return make


def _require_equal(path: Path, expected: Mapping[str, Tensor]) -> None:
    updates = dict(read_adapters(path))
    assert updates.keys() == expected.keys()
    for name, delta in expected.items():
        # float32 sums of at most 64 terms, in another order
        torch.testing.assert_close(updates[name].delta_rows(slice(None)), delta, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
@pytest.mark.parametrize("case", [*LORA, "loha", "lokr", "whole lokr", "compiled"])
def test_a_folder_acts_as_strongly_as_peft_says(
    folder_of: Callable[[str], tuple[Path, dict[str, Tensor]]], tmp_path: Path, case: str
) -> None:
    folder, expected = folder_of(case)
    assert LoRAFile.open(folder).warnings() == []
    _require_equal(folder, expected)
    _require_equal(folder / WEIGHTS_NAME, expected)
    convert(folder, tmp_path / "kohya.safetensors", to="kohya")
    _require_equal(tmp_path / "kohya.safetensors", expected)
    if case in ("alpha", "rslora", "patterns", "compiled"):  # what can be added
        merge([(folder, 0.5), (folder / WEIGHTS_NAME, 0.5)], tmp_path / "merged.safetensors")
        _require_equal(tmp_path / "merged.safetensors", expected)


def test_the_same_configuration_in_the_metadata_is_read_alike(
    folder_of: Callable[[str], tuple[Path, dict[str, Tensor]]], tmp_path: Path
) -> None:
    folder, expected = folder_of("patterns")
    config = json.loads((folder / CONFIG_NAME).read_text())
    text = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    state = load_file(folder / WEIGHTS_NAME)
    renamed = {name.replace("base_model.model.", "transformer."): tensor for name, tensor in state.items()}
    save_file(renamed, tmp_path / "diffusers.safetensors", {METADATA_KEY: text})
    _require_equal(tmp_path / "diffusers.safetensors", expected)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model._orig_mod.module."])
def test_names_of_wrapped_and_compiled_models_are_read(tmp_path: Path, golden: Path, prefix: str) -> None:
    """In front, in the middle, and in the reference tool's underscores."""
    state = load_file(golden / "lora_dpipe.safetensors")
    bare = {name.removeprefix("diffusion_model."): tensor for name, tensor in state.items()}
    inner = {prefix + name.replace("_blocks.0.", "_blocks.0._orig_mod."): t for name, t in bare.items()}
    save_file(inner, tmp_path / "peft.safetensors")
    kohya = load_file(golden / "lora_kohya.safetensors")
    renamed = {
        name.replace("lora_unet_", "lora_unet__orig_mod_").replace("_blocks_0_", "_blocks_0__orig_mod_"): t
        for name, t in kohya.items()
    }
    save_file(renamed, tmp_path / "kohya.safetensors")
    expected = {name: update.delta() for name, update in read_adapters(golden / "lora_kohya.safetensors")}
    for name in ("peft", "kohya"):
        # the same matrices stored in other forms, as far apart as `lora_deltas` allows
        for module, update in read_adapters(tmp_path / f"{name}.safetensors"):
            torch.testing.assert_close(update.delta_rows(slice(None)), expected[module], rtol=0, atol=1e-6)
    assert LoRAFile.open(tmp_path / "kohya.safetensors").formats == (), "no other program knows the names"


# What is not said


def _plain(folder: Path, config: object, *, name: str = WEIGHTS_NAME) -> Path:
    """A folder with one adapter of rank 4, and the configuration unless it is None."""
    folder.mkdir(exist_ok=True)
    stem = "base_model.model.double_blocks.0.img_attn_qkv"
    state = {f"{stem}.lora_A.weight": torch.ones(4, 8), f"{stem}.lora_B.weight": torch.ones(24, 4)}
    save_file(state, folder / name)
    if config is not None:
        (folder / CONFIG_NAME).write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def test_pefts_names_without_any_alpha_are_a_warning(tmp_path: Path) -> None:
    folder = _plain(tmp_path / "peft", None)
    (warning,) = LoRAFile.open(folder).warnings()
    assert "there is no `adapter_config.json`" in warning
    ((_, update),) = read_adapters(folder)
    assert update.alpha == 4
    # a configuration in a folder of several files may be of any of them
    _plain(folder, {"lora_alpha": 16}, name="other.safetensors")
    (warning,) = LoRAFile.open(folder / "other.safetensors").warnings()
    assert "is not read, since there are several" in warning
    assert LoRAFile.open(folder).warnings() == []
    state = load_file(folder / WEIGHTS_NAME)
    state["base_model.model.double_blocks.0.img_attn_qkv.alpha"] = torch.tensor(8.0)
    save_file(state, folder / "other.safetensors")
    assert LoRAFile.open(folder / "other.safetensors").warnings() == [], "alpha in the file is enough"


def test_a_file_without_alphas_is_not_written_where_a_configuration_would_scale_it_again(
    tmp_path: Path,
) -> None:
    source = _plain(tmp_path / "peft", {"r": 4, "lora_alpha": 16})
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(source / CONFIG_NAME, other)
    for name in (WEIGHTS_NAME, "lora.safetensors"):
        with pytest.raises(HyimgError, match="would be read with the strength in"):
            convert(source, other / name, to="peft")
        convert(source, other / name, to="kohya")  # alphas in the file win
        ((_, update),) = read_adapters(other / name)
        assert update.alpha == 16
        (other / name).unlink()
    convert(source, source / "lora.safetensors", to="peft")  # the configuration is of the other file
    ((_, update),) = read_adapters(source / "lora.safetensors")
    assert (update.alpha, float(update.lora_up.weight[0, 0])) == (4, 4)


def test_what_a_configuration_does_not_say_is_pefts_default(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is in the test extra")
    ((_, update),) = read_adapters(_plain(tmp_path / "peft", {"r": 4}))
    assert update.alpha == peft.LoraConfig().lora_alpha == 8


def test_an_alpha_of_zero_is_a_warning(tmp_path: Path, golden: Path) -> None:
    state = load_file(golden / "lora_kohya.safetensors")
    name = "lora_unet_double_blocks_0_img_attn_qkv.alpha"
    save_file({**state, name: torch.zeros(1)}, tmp_path / "zero.safetensors")
    (warning,) = LoRAFile.open(tmp_path / "zero.safetensors").warnings()
    assert "the alpha of 1 adapters is 0" in warning
    assert name in warning


REFUSED: dict[str, tuple[object, str]] = {
    "kind": ({"peft_type": "OFT", "r": 4}, "PEFT's OFT, which is not supported"),
    "kind of another type": ({"peft_type": ["LORA"], "r": 4}, "PEFT's .'LORA'., which is not supported"),
    "pissa": ({"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa_niter_4"}, "`pissa_niter_4`, which took"),
    "variant": ({"r": 4, "lora_alpha": 4, "use_qalora": True}, "`use_qalora`, a variant"),
    "rank": ({"r": 8, "lora_alpha": 16}, "says rank 8 for .*img_attn_qkv.*, whose tensors have rank 4"),
    "rank of a pattern": ({"r": 4, "lora_alpha": 4, "rank_pattern": {"img_attn_qkv": 2}}, "says rank 2"),
    "dora": ({"r": 4, "lora_alpha": 4, "use_dora": True}, "holds no magnitude"),
    "text": ({"r": 4, "lora_alpha": "16"}, "the `lora_alpha` '16', which is not a number"),
    "pattern": ({"r": 4, "lora_alpha": 4, "alpha_pattern": ["a"]}, "is not a JSON object"),
    "damaged": ("{", "is not valid JSON"),
    "another type of kind": ({"peft_type": ["LORA"]}, "is of PEFT's"),
    "list": ("[]", "must be an object, not a list"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_configuration_that_is_not_understood_is_refused(tmp_path: Path, case: str) -> None:
    config, named = REFUSED[case]
    folder = _plain(tmp_path / "peft", config)
    with pytest.raises(HyimgError, match=named):
        LoRAFile.open(folder)


def test_a_pattern_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MOST_SECONDS", 0.01)
    endless = {"r": 4, "lora_alpha": 4, "rank_pattern": {r"([\w.]|[\w.]{2})+[A-Z]": 4}}
    with pytest.raises(HyimgError, match="takes more than"):
        LoRAFile.open(_plain(tmp_path / "peft", endless))


def test_a_folder_that_holds_no_single_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HyimgError, match="folder with no safetensors file"):
        LoRAFile.open(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(HyimgError, match="is a pickle"):
        LoRAFile.open(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        _plain(tmp_path, None, name=name)
    with pytest.raises(
        HyimgError, match="folder with `a.safetensors`, `b.safetensors`, and a LoRA is one file"
    ):
        LoRAFile.open(tmp_path)


def test_the_configuration_is_part_of_what_a_lora_is(tmp_path: Path) -> None:
    folder = _plain(tmp_path / "peft", {"r": 4, "lora_alpha": 16})

    def identity(path: Path) -> str:
        return lora_identity(path, lambda file: str(file.stat().st_size))

    before = identity(folder)
    assert identity(folder / WEIGHTS_NAME) == before
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert identity(copy) == before
    (folder / CONFIG_NAME).write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    assert identity(folder) != before

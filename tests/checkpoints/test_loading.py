"""Files to models: the three name layouts, shards, dtypes, and everything that can be wrong with a file."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hyimg.checkpoints.architecture import DIT_2_1, DIT_2_1_DISTILLED, DIT_TINY, VAE_2_1, VAE_TINY, DiTArch
from hyimg.checkpoints.header_check import open_dit
from hyimg.checkpoints.model_files import identify
from hyimg.checkpoints.names import dit_key_map, dit_shapes
from hyimg.checkpoints.safetensors_file import Checkpoint, read_header
from hyimg.errors import HyimgError
from hyimg.model.dit import DiT
from hyimg.model.loading import (
    WeightPlacement,
    check_vae,
    init_random,
    load_dit,
    load_vae,
    set_parameter,
)
from hyimg.model.vae import VAE


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    model = DiT(DIT_TINY)
    init_random(model, seed=1)
    return dict(model.state_dict())


@pytest.fixture
def dit_path(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    path = tmp_path / "dit.safetensors"
    save_file(weights, path, metadata={"made": "here"})
    return path


def assert_same(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert list(state) == list(weights)
    for name, weight in weights.items():
        assert torch.equal(state[name], weight), name


@pytest.mark.parametrize("mmap", [True, False])
def test_a_file_is_loaded_bit_by_bit_and_frozen(
    dit_path: Path, weights: dict[str, Tensor], mmap: bool
) -> None:
    before = dit_path.read_bytes()
    model = load_dit(dit_path, mmap=mmap)
    assert_same(model, weights)
    assert model.arch == DIT_TINY == open_dit(dit_path).arch
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    # Writing to a weight, as a merge does, must never reach the file
    with torch.no_grad():
        model.img_in.proj.weight.add_(1)
    assert dit_path.read_bytes() == before


def test_comfyui_names_give_the_same_model(
    tmp_path: Path, weights: dict[str, Tensor], golden_json: Callable[[str], Any]
) -> None:
    comfyui = {row["original"]: row["comfyui"] for row in golden_json("keymap")["weights"]}
    renamed = {"model.diffusion_model." + comfyui[name]: weight for name, weight in weights.items()}
    save_file(renamed, tmp_path / "comfyui.safetensors")
    assert_same(load_dit(tmp_path / "comfyui.safetensors"), weights)


def test_a_sharded_folder_is_one_checkpoint(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    names = list(weights)
    shards = {"a-00001.safetensors": names[::2], "a-00002.safetensors": names[1::2]}
    for file_name, part in shards.items():
        save_file({name: weights[name] for name in part}, tmp_path / file_name)
    weight_map = {name: file_name for file_name, part in shards.items() for name in part}
    index = tmp_path / "a.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(load_dit(tmp_path), weights)
    assert [path.name for path in Checkpoint.open(tmp_path).files] == sorted(shards)

    (tmp_path / "a-00002.safetensors").unlink()
    with pytest.raises(
        HyimgError, match=r"1 of 2 files in `.*index\.json` are missing: `a-00002\.safetensors`"
    ):
        open_dit(tmp_path)
    index.unlink()
    save_file(weights, tmp_path / "a-00002.safetensors")
    with pytest.raises(HyimgError, match="0 index files and 2 safetensors files"):
        open_dit(tmp_path)


def test_shards_that_do_not_match_their_index_are_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """Nothing is guessed: which of two tensors of one name is meant, or what one is that the index leaves out."""
    first, second, *rest = weights
    index = tmp_path / "a.safetensors.index.json"

    def write(left: list[str], right: list[str], weight_map: object) -> None:
        save_file({name: weights[name] for name in left}, tmp_path / "left.safetensors")
        save_file({name: weights[name] for name in right}, tmp_path / "right.safetensors")
        index.write_text(json.dumps({"weight_map": weight_map}))

    right_map = {first: "left.safetensors"} | dict.fromkeys([second, *rest], "right.safetensors")
    write([first], [second, *rest], right_map)
    assert_same(load_dit(tmp_path), weights)
    for left, right, weight_map, problem in (
        (
            [first, second],
            [second, *rest],
            right_map,
            f"`{second}` is in `left.safetensors`, but in `right.safetensors`",
        ),
        ([first], rest, right_map, f"`{second}` is in no file"),
        (
            [first],
            [second, *rest],
            right_map | {first: "right.safetensors"},
            f"`{first}` is in no file",
        ),
        (
            [first, second],
            rest,
            {name: file for name, file in right_map.items() if name != second},
            f"`{second}` is in `left.safetensors`, but in no file according",
        ),
    ):
        write(left, right, weight_map)
        with pytest.raises(HyimgError, match="does not match the files next to it") as error:
            open_dit(tmp_path)
        assert problem in error.value.message
    for weight_map in (
        {},
        [],
        {first: 1},
        {first: ["left.safetensors"]},
        {first: ""},
        {first: "../left.safetensors"},
        "x",
    ):
        write([first], rest, weight_map)
        with pytest.raises(HyimgError, match="is not a safetensors index"):
            open_dit(tmp_path)
    write([first], rest, {f"x{n}": "left.safetensors" for n in range(30)})
    with pytest.raises(HyimgError, match=" and 21 more"):
        open_dit(tmp_path)


def test_a_part_of_a_sharded_folder_is_refused_with_the_folder(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    for name, words in (
        ("model-00001-of-00004.safetensors", "is one of 4 shards"),
        ("model.safetensors.index.json", "is the index of a sharded checkpoint"),
    ):
        save_file(weights, tmp_path / name)
        with pytest.raises(HyimgError, match=words) as error:
            open_dit(tmp_path / name)
        assert error.value.hint == f"give its folder, `{tmp_path}`"
    whole = tmp_path / "model-00001-of-00001.safetensors"
    save_file(weights, whole)
    assert_same(load_dit(whole), weights)


def test_tensors_of_several_dtypes_make_one_model(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """As files have them whose norms or embedders were kept wider."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    mixed = {name: weight.to(dtypes[n % 4]) for n, (name, weight) in enumerate(weights.items())}
    save_file(mixed, tmp_path / "mixed.safetensors")
    assert_same(load_dit(tmp_path / "mixed.safetensors"), mixed)
    bf16 = load_dit(tmp_path / "mixed.safetensors", dtype=torch.bfloat16)
    assert_same(bf16, {name: weight.bfloat16() for name, weight in mixed.items()})


def test_parts_of_several_dtypes_become_one_tensor(
    tmp_path: Path, weights: dict[str, Tensor], golden_json: Callable[[str], Any], rename: Any
) -> None:
    rows = {row["original"]: row["diffusers"] for row in golden_json("keymap")["weights"]}
    key_map = dit_key_map([part["name"] for name in weights for part in rows[name]])
    like = {}
    for name, source in key_map.items():
        heights = [DIT_TINY.hidden] * 3 + [DIT_TINY.mlp_hidden]
        for part, height in zip(source.parts, heights, strict=False):
            like[part] = range(len(weights[name]) if len(source.parts) == 1 else height)
    theirs = rename(weights, key_map, like)
    save_file(theirs, tmp_path / "diffusers.safetensors")
    assert_same(load_dit(tmp_path / "diffusers.safetensors"), weights)
    name = "transformer_blocks.0.attn.to_{}.weight"
    for part, dtype in (("q", torch.float16), ("k", torch.bfloat16)):
        theirs[name.format(part)] = theirs[name.format(part)].to(dtype)
    save_file(theirs, tmp_path / "mixed.safetensors")
    joined = load_dit(tmp_path / "mixed.safetensors").double_blocks[0].img_attn_qkv.weight
    assert torch.equal(joined, torch.cat([theirs[name.format(part)].float() for part in "qkv"]))


@pytest.mark.parametrize("layout", ["original", "comfyui", "diffusers"])
@pytest.mark.parametrize("distilled", [False, True], ids=["base", "distilled"])
def test_headers_of_the_real_size_are_accepted_in_every_layout(
    tmp_path: Path, golden_json: Callable[[str], Any], layout: str, distilled: bool
) -> None:
    keys = golden_json("dit_keys")
    shapes = keys["keys"] | (keys["distilled"]["extra_keys"] if distilled else {})
    keymap = golden_json("keymap")
    named: dict[str, list[int]] = {}
    for row in keymap["weights"] + (keymap["extra"] if distilled else []):
        shape = shapes[row["original"]]
        if layout != "diffusers":
            named[row[layout]] = shape
            continue
        for part in row["diffusers"]:
            start, end = part.get("rows", (0, shape[0]))
            named[part["name"]] = [end - start, *shape[1:]]
    path = write_hole(tmp_path / "real.safetensors", named)
    assert open_dit(path).arch == (DIT_2_1_DISTILLED if distilled else DIT_2_1)
    # a fault at the full size is found as at any other
    left_out = next(iter(named))
    with pytest.raises(HyimgError, match="is missing"):
        open_dit(write_hole(path, {k: v for k, v in named.items() if k != left_out}))


@pytest.mark.parametrize("prefix", ["", "vae."])
def test_the_real_vae_s_header_is_accepted(
    tmp_path: Path, golden_json: Callable[[str], Any], prefix: str
) -> None:
    shapes = {prefix + name: shape for name, shape in golden_json("vae_keys")["keys"].items()}
    assert check_vae(write_hole(tmp_path / "vae.safetensors", shapes)) == VAE_2_1


def write_hole(path: Path, shapes: dict[str, list[int]]) -> Path:
    """A bf16 file of true size that is all header: its tensors are a hole in the file."""
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    write(path, len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + position)
    return path


def test_a_placement_decides_where_each_tensor_goes(dit_path: Path) -> None:
    seen = []

    class HalfOfOne(WeightPlacement):
        def put(self, model: nn.Module, name: str, tensor: Tensor, scale: Tensor | None = None) -> None:
            seen.append((name, tensor.dtype))
            super().put(model, name, tensor, scale)
            if name.endswith("linear1.weight"):
                set_parameter(model, name, tensor.half())

    model = load_dit(dit_path, placement=HalfOfOne("cpu", torch.bfloat16))
    assert seen == [(name, torch.float32) for name, _ in model.named_parameters()]
    assert model.dtype == torch.bfloat16
    assert model.single_blocks[0].linear1.weight.dtype == torch.float16
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_vae_is_loaded_in_the_requested_dtype(tmp_path: Path) -> None:
    vae = VAE(VAE_TINY)
    init_random(vae, seed=0)
    path = tmp_path / "vae.safetensors"
    save_file({f"vae.{name}": tensor.half() for name, tensor in vae.state_dict().items()}, path)
    assert check_vae(path) == VAE_TINY
    assert load_vae(path).dtype == torch.float16
    assert_same(
        load_vae(path, dtype=torch.float32), {k: v.half().float() for k, v in vae.state_dict().items()}
    )
    with pytest.raises(HyimgError, match="is a VAE, not a diffusion transformer") as error:
        load_dit(path)
    assert error.value.hint is not None
    assert "--dit" in error.value.hint


def test_every_missing_surplus_and_misshapen_tensor_is_in_one_error(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    changed = dict(weights)
    del changed["time_in.mlp.0.bias"]
    changed["single_blocks.1.linear2.weight"] = torch.zeros(64, 7)
    changed["single_blocks.1.linear9.weight"] = torch.zeros(1)
    save_file(changed, tmp_path / "bad.safetensors")
    with pytest.raises(HyimgError) as error:
        open_dit(tmp_path / "bad.safetensors")
    assert "`time_in.mlp.0.bias` is missing" in error.value.message
    assert (
        "`single_blocks.1.linear2.weight` has the shape [64, 7] instead of [64, 320]" in error.value.message
    )
    assert "`single_blocks.1.linear9.weight` is not known" in error.value.message

    changed |= {f"surplus_{n}": torch.zeros(1) for n in range(20)}
    save_file(changed, tmp_path / "worse.safetensors")
    with pytest.raises(HyimgError, match=r"; and 13 more\n") as error:
        load_dit(tmp_path / "worse.safetensors")
    assert error.value.message.count("`") == 2 * 11


def test_a_split_tensor_without_a_part_and_a_foreign_transformer_are_named(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(
        {
            "transformer_blocks.0.attn.to_q.weight": torch.zeros(8, 8),
            "single_transformer_blocks.0.x": torch.zeros(1),
        },
        path,
    )
    with pytest.raises(
        HyimgError, match=r"no tensor `img_in.proj.weight`; `transformer_blocks.0.attn.to_k.weight` is"
    ):
        open_dit(path)
    save_file(weights | {"img_in.proj.weight": torch.zeros(64, 16, 2, 2)}, path)
    with pytest.raises(HyimgError, match=r"cannot be a HunyuanImage-2\.1 DiT: its patches are 2x2"):
        open_dit(path)


def test_a_truncated_file_is_refused_with_both_sizes(dit_path: Path) -> None:
    size = dit_path.stat().st_size
    with dit_path.open("r+b") as file:
        file.truncate(size - 1000)
    with pytest.raises(
        HyimgError,
        match=f"is truncated: according to its header it has {size} bytes, and the file has {size - 1000}",
    ):
        read_header(dit_path)
    with dit_path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(HyimgError, match=r"is truncated: its header alone needs .* and the file has 100"):
        read_header(dit_path)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("new_zipfile", [True, False])
def test_a_pickle_is_refused_with_the_reason_whatever_its_name(
    tmp_path: Path, name: str, new_zipfile: bool
) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / name, _use_new_zipfile_serialization=new_zipfile)
    with pytest.raises(HyimgError, match="is a pickle, which can run any code when opened"):
        open_dit(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has only 0 bytes"),
        (b"\x00" * 4096, "is not a safetensors file$"),
        (pickle.dumps([1] * 50, protocol=4), "is a pickle"),
        ((10).to_bytes(8, "little") + b"{not json}", "its header is not valid JSON"),
        ((2**40).to_bytes(8, "little") + b"{}" * 50, "its header would have 1099511627776 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a git LFS pointer"),
    ],
)
def test_other_file_formats_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(HyimgError, match=message):
        read_header(write(tmp_path / "file.safetensors", content))


ENTRIES = {
    "three offsets": (
        '{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}',
        "a dtype, a shape and two offsets",
    ),
    "no offsets": ('{"dtype":"F32","shape":[2]}', "a dtype, a shape and two offsets"),
    "offsets that are true": ('{"dtype":"F32","shape":[2],"data_offsets":[false,8]}', "two offsets"),
    "offsets as text": ('{"dtype":"F32","shape":[2],"data_offsets":["0","8"]}', "two offsets"),
    "fractions": ('{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}', "two offsets"),
    "infinity": ('{"dtype":"F32","shape":[2],"data_offsets":[0,1e999]}', "not finite"),
    "70 dimensions": ('{"dtype":"F32","shape":[2%s],"data_offsets":[0,8]}' % (",1" * 69), "70 dimensions"),
    "an overflow": (
        '{"dtype":"F32","shape":[0,4294967296,4294967296],"data_offsets":[0,0]}',
        "larger than any",
    ),
    "a list": ("[]", "a dtype, a shape and two offsets"),
    "a tensor twice": ('{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{}', "the key `x` twice"),
    "a key twice": (
        '{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}',
        "the key `dtype` twice",
    ),
    "deep metadata": ('{},"__metadata__":{"a":%s}' % ("[" * 100_000 + "]" * 100_000), "nested too deeply"),
    "metadata that are numbers": ('{},"__metadata__":{"a":1}', "not a table of texts"),
    "half a character": (r'{},"__metadata__":{"a":"\ud800"}', "half of a surrogate pair"),
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_a_header_that_other_readers_refuse_is_refused(tmp_path: Path, kind: str) -> None:
    entry, reason = ENTRIES[kind]
    header = f'{{"x":{entry}}}'.encode()
    path = write(tmp_path / "x.safetensors", len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(HyimgError, match=f"`{path}` is not a safetensors file: .*{reason}"):
        read_header(path)
    if kind != "70 dimensions":  # which numpy and torch refuse only when the values are read
        with pytest.raises(SafetensorError):
            safe_open(path, "np").__enter__()


@pytest.mark.parametrize(("start", "end"), [(4, 12), (0, 12), (-4, 4)])
def test_offsets_that_do_not_fit_are_refused(tmp_path: Path, start: int, end: int) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [start, end]}}).encode()
    path = write(tmp_path / "x.safetensors", len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(HyimgError, match="is damaged: the header's offsets of `x`"):
        read_header(path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HyimgError, match="there is no file"):
        load_vae(tmp_path / "none.safetensors")
    with pytest.raises(HyimgError, match="is a folder"):
        read_header(tmp_path)


@pytest.mark.parametrize("mmap", [True, False])
def test_a_checkpoint_reads_what_the_safetensors_library_reads(tmp_path: Path, mmap: bool) -> None:
    tensors = {
        "b": torch.randn(2, 3),
        "c": torch.randn(4).bfloat16(),
        "d": torch.tensor(3.5),
        "e": torch.zeros(0, 4),
        "f": torch.randn(5).to(torch.float8_e4m3fn),
        "g": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"k": "v"})
    checkpoint = Checkpoint.open(tmp_path / "x.safetensors", mmap=mmap)
    assert checkpoint.metadata == {"k": "v"}
    for name, tensor in tensors.items():
        found = checkpoint.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


@pytest.mark.parametrize("mmap", [True, False])
def test_a_tensor_at_an_odd_offset_is_read(tmp_path: Path, mmap: bool) -> None:
    header = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "x": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(3) + torch.tensor([1.5, -2.0]).numpy().tobytes()
    checkpoint = Checkpoint.open(write(tmp_path / "x.safetensors", data), mmap=mmap)
    assert checkpoint.read("x").tolist() == [1.5, -2.0]
    assert checkpoint.read("x").data_ptr() % 4 == 0


def test_a_dtype_that_torch_lacks_is_named(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    path = write(tmp_path / "x.safetensors", len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(HyimgError, match=r"`x` in .* has the dtype F4"):
        Checkpoint.open(path).read("x")


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("dit_keys", "dit"),
        ("vae_keys", "vae"),
        ("qwen_keys", "qwen"),
        ("byt5_keys", "byt5"),
    ],
)
def test_kinds_of_models_are_recognised_by_tensor_names(
    golden_json: Callable[[str], Any], file: str, kind: str
) -> None:
    assert identify(golden_json(file)["keys"]) == kind


def test_lora_files_of_all_formats_are_recognised() -> None:
    golden = Path(__file__).parents[1] / "golden"
    for name in ("kohya", "comfy", "comfy_reversed", "dpipe", "diffusers"):
        assert identify(read_header(golden / f"lora_{name}.safetensors").tensors) == "lora"
    assert (
        identify(
            row["diffusers"][0]["name"] for row in json.loads((golden / "keymap.json").read_text())["weights"]
        )
        == "dit"
    )
    assert identify(["some.weight"]) == "unknown"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(HyimgError, match="device or a pipe"):
        read_header(tmp_path / "pipe.safetensors")


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        (torch.int8, "has the dtype I8"),
        (torch.uint8, "has the dtype U8"),
        (torch.int64, "has the dtype I64"),
        (torch.bool, "has the dtype BOOL"),
        (torch.float8_e5m2, "is F8_E5M2: "),
    ],
)
def test_quantised_and_integer_weights_are_refused(
    tmp_path: Path, weights: dict[str, Tensor], dtype: torch.dtype, reason: str
) -> None:
    name = "double_blocks.1.img_mlp.fc1.weight"
    save_file({**weights, name: weights[name].to(dtype)}, tmp_path / "dit.safetensors")
    with pytest.raises(HyimgError, match=f"`{name}` in .*{reason}"):
        open_dit(tmp_path / "dit.safetensors")
    vae = dict(VAE(VAE_TINY).state_dict())
    name = "decoder.conv_in.weight"
    save_file({**vae, name: vae[name].to(dtype)}, tmp_path / "vae.safetensors")
    with pytest.raises(HyimgError, match=f"`{name}` in .*{reason}"):
        check_vae(tmp_path / "vae.safetensors")


@pytest.mark.parametrize(
    "name", ["double_blocks.0.img_attn_q_norm.weight", "img_in.proj.weight", "byt5_in.fc1.weight"]
)
def test_an_empty_tensor_is_named(tmp_path: Path, weights: dict[str, Tensor], name: str) -> None:
    save_file({**weights, name: weights[name][:0].clone()}, tmp_path / "dit.safetensors")
    with pytest.raises(HyimgError, match=f"`{name}` is empty"):
        open_dit(tmp_path / "dit.safetensors")


def test_empty_tensors_of_a_vae_are_named(tmp_path: Path) -> None:
    state = dict(VAE(VAE_TINY).state_dict())
    for name in ("encoder.down.1.block.0.conv1.weight", "decoder.conv_in.weight"):
        save_file({**state, name: state[name][:, :0].clone()}, tmp_path / "vae.safetensors")
        with pytest.raises(HyimgError, match=f"`{name}` is empty"):
            check_vae(tmp_path / "vae.safetensors")


@pytest.mark.parametrize(
    "arch",
    [DIT_2_1_DISTILLED, replace(DIT_TINY, text_dim=96, byt5_dim=40, byt5_hidden=80, mlp_hidden=512)],
    ids=["distilled", "odd"],
)
def test_computed_shapes_equal_the_models_parameters(arch: DiTArch) -> None:
    with torch.device("meta"):
        model = DiT(arch)
    assert dit_shapes(arch) == {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    """A compiled and a plain copy of the same weight: neither is more right than the other."""
    save_file(
        {"img_in.proj.weight": torch.zeros(1), "_orig_mod.img_in.proj.weight": torch.ones(1)},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(HyimgError, match="holds `img_in.proj.weight` twice"):
        _ = Checkpoint.open(tmp_path / "x.safetensors").tensors

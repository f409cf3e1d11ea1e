"""The Qwen encoder against tests/golden/qwen_tiny, transformers, and itself run whole.

Tolerances: 2e-5 against the golden file, as its README says (implementations differ by 2e-6 in float32);
1e-5 where batches differ in shape, since matrix kernels round by shape; bit-equal elsewhere.
"""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from hyimg.checkpoints.safetensors_file import Checkpoint
from hyimg.encoders import qwen as qwen_module
from hyimg.encoders.qwen import QwenEncoder, check_qwen, decoder_layer, rotation
from hyimg.encoders.tokenizer import TEMPLATE_TOKENS
from hyimg.errors import HyimgError

PROMPTS = ["a red fox", "", "a red dog", "a sign that says “OPEN 24h”", "snow " * 40, "a red fox in snow"]


@pytest.fixture(scope="module")
def golden_file(qwen_golden, tmp_path_factory):
    return qwen_golden.write_weights(tmp_path_factory.mktemp("qwen") / "qwen.safetensors")


@pytest.fixture
def open_tiny(models, tiny_tokenizer):
    def open_encoder(**options):
        options = {"dtype": torch.float32, **options}
        return QwenEncoder.open(models / "qwen.safetensors", tokenizer=tiny_tokenizer, **options)

    return open_encoder


@pytest.fixture
def golden_encoder(golden_file, tiny_tokenizer):
    return QwenEncoder.open(golden_file, tokenizer=tiny_tokenizer, dtype=torch.float32)


@pytest.mark.parametrize("case", ["a", "b"])
def test_states_equal_the_golden_ones(qwen_golden, golden_encoder, case):
    mask = qwen_golden[f"{case}.attention_mask"].bool()
    rows = [ids[valid].tolist() for ids, valid in zip(qwen_golden[f"{case}.input_ids"], mask, strict=True)]
    states = dict(golden_encoder.hidden_states(rows))
    embeds = dict(golden_encoder.encode_each(rows))
    for i, row in enumerate(rows):
        expected = qwen_golden[f"{case}.hidden"][i, : len(row)]
        assert (states[i] - expected).abs().max() < 2e-5
        num_left = len(row) - TEMPLATE_TOKENS
        expected = qwen_golden[f"{case}.prompt_embeds"][i, :num_left]
        assert embeds[i].shape == expected.shape
        assert (embeds[i] - expected).abs().max() < 2e-5


# The two gave equal bits when this was written; another release may sum in another order. In bfloat16, a
# unit in the last place is 0.03 at the largest values
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.07)])
def test_states_equal_those_of_transformers(qwen_golden, golden_file, tiny_tokenizer, dtype, tolerance):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextModel

    sizes = qwen_golden.config
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": sizes["hidden"],
            "num_hidden_layers": sizes["layers"],
            "num_attention_heads": sizes["heads"],
            "num_key_value_heads": sizes["kv_heads"],
            "intermediate_size": sizes["intermediate"],
            "vocab_size": sizes["vocab"],
            "bos_token_id": None,
            "eos_token_id": None,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "default", "mrope_section": sizes["mrope_section"]},
        }
    ).text_config
    model = Qwen2_5_VLTextModel(config).eval()
    weights = {k.removeprefix("model."): t for k, t in qwen_golden.weights.items() if k.startswith("model.")}
    model.load_state_dict(weights)
    frequencies = model.rotary_emb.inv_freq.clone()
    model.to(dtype)
    model.rotary_emb.inv_freq = frequencies
    ids = torch.randint(0, sizes["vocab"], (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states[-3]
    ours = dict(
        QwenEncoder.open(golden_file, tokenizer=tiny_tokenizer, dtype=dtype).hidden_states(ids.tolist())
    )
    assert (torch.stack([ours[0], ours[1]]) - expected).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_by_layer_equals_the_whole_encoder_at_once(open_tiny, dtype):
    encoder = open_tiny(dtype=dtype)
    rows = [encoder.tokenizer.encode(prompt).ids for prompt in PROMPTS]
    states = dict(encoder.hidden_states(rows))
    arch, tensors = encoder.arch, encoder.checkpoint
    layers = [
        {name: tensors.read(arch.layer_prefix(i) + name).to(dtype) for name in arch.layer_shapes()}
        for i in range(arch.num_layers - 2)
    ]
    table = tensors.read("model.embed_tokens.weight").to(dtype)
    for index, row in enumerate(rows):
        # Those of equal length pass together in the encoder too
        batch = [i for i, other in enumerate(rows) if len(other) == len(row)]
        hidden = F.embedding(torch.tensor([rows[i] for i in batch]), table)
        rotary = rotation(arch, len(row), device=torch.device("cpu"), dtype=dtype)
        for weights in layers:
            hidden = decoder_layer(hidden, weights, arch, rotary)
        assert torch.equal(states[index], hidden[batch.index(index)])


def test_rotations_are_computed_in_float32_whatever_the_dtype(open_tiny):
    """At position 1057 a frequency rounded to bfloat16 is off by a radian."""
    arch, cpu = open_tiny().arch, torch.device("cpu")
    exact = rotation(arch, 1058, device=cpu, dtype=torch.float32)
    rounded = rotation(arch, 1058, device=cpu, dtype=torch.bfloat16)
    assert torch.equal(rounded.cos_TK, exact.cos_TK.bfloat16())
    assert torch.equal(rounded.sin_TK, exact.sin_TK.bfloat16())


def test_several_sweeps_and_waiting_on_the_host_change_no_bit(open_tiny, monkeypatch):
    seen = []
    one_sweep = open_tiny(batch_size=1).encode(PROMPTS)
    monkeypatch.setattr(qwen_module, "SWEEP_BYTES", 12_000)
    monkeypatch.setattr(qwen_module, "RESIDENT_BYTES", 0)
    encoder = open_tiny(batch_size=1, on_layer=lambda done, total: seen.append((done, total)))
    for ours, expected in zip(encoder.encode(PROMPTS), one_sweep, strict=True):
        assert torch.equal(ours, expected)
    total = seen[0][1]
    assert total > 2 * 2  # layers that are read, times more than two sweeps
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_states_of_one_sweep_are_yielded_before_the_next_begins(open_tiny, monkeypatch):
    monkeypatch.setattr(qwen_module, "SWEEP_BYTES", 1)
    done = []
    encoder = open_tiny(batch_size=1, on_layer=lambda n, _: done.append(n))
    states = encoder.encode_each([encoder.tokenizer.encode(p).ids for p in PROMPTS])
    next(states)
    assert done == [1, 2]


def test_one_sweep_reads_each_weight_once_and_no_unused_one(open_tiny, monkeypatch):
    reads = []
    read = Checkpoint.read
    monkeypatch.setattr(
        Checkpoint, "read", lambda self, name, *rest: reads.append(name) or read(self, name, *rest)
    )
    encoder = open_tiny()
    encoder.encode(PROMPTS)
    assert sorted(reads) == sorted(encoder.arch.read_shapes())
    unused = ("model.layers.2.", "model.layers.3.", "model.norm", "lm_head", "visual")
    assert not [name for name in reads if name.startswith(unused)]


def test_neighbours_do_not_influence_an_entry(open_tiny):
    encoder = open_tiny()
    together = encoder.encode(PROMPTS)
    for prompt, states in zip(PROMPTS, together, strict=True):
        (alone,) = encoder.encode([prompt])
        assert states.shape == alone.shape
        assert (states - alone).abs().max() < 1e-5


def test_only_the_prompt_s_tokens_are_left_on_the_cpu_in_the_encoder_s_dtype(open_tiny):
    encoder = open_tiny(dtype=torch.bfloat16)
    for prompt, states in zip(PROMPTS, encoder.encode(PROMPTS), strict=True):
        assert states.shape == (len(encoder.tokenizer.encode(prompt).ids) - 34, 64)
        assert (states.dtype, states.device.type) == (torch.bfloat16, "cpu")
        assert not states.is_inference()  # a training step saves it for backward
    assert encoder.encode([]) == []


def test_a_sharded_folder_with_newer_names_gives_the_same_states(
    qwen_golden, golden_encoder, tmp_path, tiny_tokenizer
):
    """Head sizes then come from config.json; names begin with `model.language_model.`."""
    renamed = {
        name.replace("model.", "model.language_model.").replace("visual.", "model.visual."): tensor
        for name, tensor in qwen_golden.weights.items()
    }
    names = sorted(renamed)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: renamed[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(HyimgError, match="do not divide into heads of 128"):
        check_qwen(tmp_path)
    config = {"hidden_size": 64, "num_attention_heads": 4}
    for content in (config, {"text_config": config}):
        (tmp_path / "config.json").write_text(json.dumps(content))
        encoder = QwenEncoder.open(tmp_path, tokenizer=tiny_tokenizer, dtype=torch.float32)
        assert torch.equal(encoder.encode(["a fox"])[0], golden_encoder.encode(["a fox"])[0])


def test_the_real_checkpoint_s_header_is_accepted(golden_json, write_header):
    golden = golden_json("qwen_keys.json")
    path = write_header(golden["keys"], "BF16")
    arch, config = check_qwen(path), golden["config"]
    assert (arch.hidden, arch.num_layers, arch.vocab) == (3584, 28, config["vocab_size"])
    assert (arch.num_heads, arch.num_kv_heads) == (
        config["num_attention_heads"],
        config["num_key_value_heads"],
    )
    assert (arch.rms_eps, arch.rope_theta) == (config["rms_norm_eps"], config["rope_theta"])
    assert len(arch.read_shapes()) == 1 + 12 * 26


def test_every_misfit_stands_in_one_error(golden_json, write_header):
    shapes = dict(golden_json("qwen_keys.json")["keys"])
    del shapes["model.layers.3.mlp.up_proj.weight"]
    shapes["model.layers.25.self_attn.q_proj.bias"] = [7]
    shapes["model.layers.0.self_attn.q_proj.scale_weight"] = [1]
    del shapes["model.layers.26.mlp.up_proj.weight"]  # not read, so not missed
    with pytest.raises(HyimgError) as caught:
        check_qwen(write_header(shapes, "BF16"))
    message = caught.value.message
    assert "`model.layers.3.mlp.up_proj.weight` is missing" in message
    assert "`model.layers.25.self_attn.q_proj.bias` has the shape [7], not [3584]" in message
    assert "`model.layers.0.self_attn.q_proj.scale_weight` is not known" in message
    assert "layers.26" not in message


def test_a_layer_of_a_huge_number_is_refused(golden_json, write_header):
    shapes = dict(golden_json("qwen_keys.json")["keys"])
    shapes["model.layers.999999999999.mlp.up_proj.weight"] = [7]
    with pytest.raises(HyimgError, match=r"model\.layers\.28\..* is missing"):
        check_qwen(write_header(shapes, "BF16"))


def test_an_fp8_file_is_refused_and_a_long_list_is_cut(golden_json, write_header):
    with pytest.raises(HyimgError, match=r"is stored as F8_E4M3; .*and 303 more") as caught:
        check_qwen(write_header(golden_json("qwen_keys.json")["keys"], "F8_E4M3"))
    assert "bf16" in str(caught.value.hint)


def test_another_model_is_named(models, byt5_golden, tmp_path):
    with pytest.raises(HyimgError, match=r"a byT5 text encoder, not a Qwen2\.5-VL text encoder"):
        check_qwen(models / "byt5.safetensors")


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(models, true_tokenizer):
    with pytest.raises(HyimgError, match=r"has 151665 tokens, but the text encoder .* only 1024"):
        QwenEncoder.open(models / "qwen.safetensors", tokenizer=true_tokenizer)


def test_unreadable_head_sizes_are_refused(qwen_golden, tmp_path):
    path = tmp_path / "qwen.safetensors"
    save_file(qwen_golden.weights, path, metadata={"meta": '{"config": {"hidden": 64}}'})
    with pytest.raises(HyimgError, match="the attention heads given in .* cannot be read"):
        check_qwen(path)

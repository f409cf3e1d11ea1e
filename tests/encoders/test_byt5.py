"""The byT5 encoder against tests/golden/byt5_tiny. Tolerance 1e-5 in float32, as its README says."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from hyimg.encoders.byt5 import ByT5Encoder, check_byt5
from hyimg.errors import HyimgError

GLYPHS = ['Text "OPEN". ', None, 'Text "SHUT". ', 'Text "咖啡". ', 'Text "' + "x" * 200 + '". ']


@pytest.fixture
def encoder(models):
    return ByT5Encoder.open(models / "byt5.safetensors", dtype=torch.float32)


@pytest.mark.parametrize("case", ["a", "b"])
def test_states_equal_the_golden_ones(byt5_golden, tmp_path, case):
    path = byt5_golden.write_weights(tmp_path / "byt5.safetensors")
    encoder = ByT5Encoder.open(path, dtype=torch.float32)
    mask = byt5_golden[f"{case}.attention_mask"].bool()
    rows = [ids[valid].tolist() for ids, valid in zip(byt5_golden[f"{case}.input_ids"], mask, strict=True)]
    for i, (row, states) in enumerate(zip(rows, encoder.hidden_states(rows), strict=True)):
        expected = byt5_golden[f"{case}.out"][i, : len(row)]
        assert states.shape == expected.shape
        assert (states - expected).abs().max() < 1e-5


def test_a_prompt_has_its_valid_tokens_and_none_where_nothing_is_quoted(encoder):
    states = encoder.encode(GLYPHS)
    assert [None if s is None else tuple(s.shape) for s in states] == [
        (14, 48),
        None,
        (14, 48),
        (16, 48),
        (128, 48),
    ]
    for glyph, together in zip(GLYPHS, states, strict=True):
        (alone,) = encoder.encode([glyph])
        assert (alone is None) == (together is None)
        # Batches of other shapes round otherwise
        assert alone is None or together is None or (alone - together).abs().max() < 1e-5


def test_prompts_without_quotes_read_no_weight(models, monkeypatch):
    encoder = ByT5Encoder.open(models / "byt5.safetensors")
    monkeypatch.setattr("hyimg.checkpoints.safetensors_file.Checkpoint.read", lambda *_: pytest.fail("read"))
    assert encoder.encode([None, None]) == [None, None]


def test_weights_keep_the_file_s_dtype_but_for_wo(models):
    encoder = ByT5Encoder.open(models / "byt5.safetensors")
    (states,) = encoder.encode(GLYPHS[:1])
    assert states is not None
    assert states.dtype == torch.float16
    wide = {name for name, p in encoder._model.named_parameters() if p.dtype == torch.float32}
    assert wide == {f"encoder.block.{i}.layer.1.DenseReluDense.wo.weight" for i in range(2)}
    (exact,) = ByT5Encoder.open(models / "byt5.safetensors", dtype=torch.float32).encode(GLYPHS[:1])
    assert exact is not None
    # Ten bits of mantissa, values of order 1 through two layers
    assert (states.float() - exact).abs().max() < 2e-2


def test_the_real_checkpoint_s_header_is_accepted_and_fits_the_model(golden_json, write_header):
    golden = golden_json("byt5_keys.json")
    path = write_header(golden["keys"], "F16")
    arch, config = check_byt5(path), golden["config"]
    assert (arch.d_model, arch.head_dim, arch.num_heads, arch.d_ff, arch.num_layers, arch.vocab) == (
        config["d_model"],
        config["d_kv"],
        config["num_heads"],
        config["d_ff"],
        config["num_layers"],
        config["vocab_size"],
    )
    model = ByT5Encoder.open(path, device="meta")._model
    names = set(model.state_dict()) - {"encoder.embed_tokens.weight"}
    assert names == set(golden["keys"])
    assert {name: list(model.state_dict()[name].shape) for name in names} == golden["keys"]


def test_every_misfit_stands_in_one_error(golden_json, write_header):
    shapes = dict(golden_json("byt5_keys.json")["keys"])
    del shapes["encoder.final_layer_norm.weight"]
    shapes["encoder.block.11.layer.1.DenseReluDense.wo.weight"] = [3, 4]
    shapes["decoder.final_layer_norm.weight"] = [1472]
    with pytest.raises(HyimgError) as caught:
        check_byt5(write_header(shapes, "F16"))
    message = caught.value.message
    assert "`encoder.final_layer_norm.weight` is missing" in message
    assert "`encoder.block.11.layer.1.DenseReluDense.wo.weight` has the shape [3, 4]" in message
    assert "`decoder.final_layer_norm.weight` is not known" in message


def test_a_layer_of_a_huge_number_is_refused(golden_json, write_header):
    shapes = dict(golden_json("byt5_keys.json")["keys"])
    shapes["encoder.block.999999999999.layer.0.layer_norm.weight"] = [1472]
    with pytest.raises(HyimgError, match=r"encoder\.block\.12\..* is missing"):
        check_byt5(write_header(shapes, "F16"))


def test_another_model_or_vocabulary_is_refused(models, byt5_golden, tmp_path):
    with pytest.raises(HyimgError, match=r"a Qwen2\.5-VL text encoder, not a byT5 text encoder"):
        check_byt5(models / "qwen.safetensors")
    weights = byt5_golden.weights
    weights["shared.weight"] = weights["shared.weight"][:300].clone()
    save_file(weights, tmp_path / "small.safetensors")
    with pytest.raises(HyimgError, match="a vocabulary of 300 tokens"):
        check_byt5(tmp_path / "small.safetensors")


def test_the_table_may_have_either_of_its_names_or_both(byt5_golden, tmp_path):
    """T5 ties `encoder.embed_tokens` to `shared`, and libraries differ in which of the two they write."""
    weights = dict(byt5_golden.weights)
    table = weights.pop("shared.weight")
    tied = weights | {"encoder.embed_tokens.weight": table}
    save_file(byt5_golden.weights, tmp_path / "shared.safetensors")
    save_file(tied, tmp_path / "tied.safetensors")
    save_file(tied | {"shared.weight": table.clone()}, tmp_path / "both.safetensors")
    rows = [[60, 61, 62]]
    (expected,) = ByT5Encoder.open(tmp_path / "shared.safetensors").hidden_states(rows)
    for name in ("tied", "both"):
        (states,) = ByT5Encoder.open(tmp_path / f"{name}.safetensors").hidden_states(rows)
        assert torch.equal(states, expected)
    save_file(tied | {"shared.weight": table[:-1].clone()}, tmp_path / "other.safetensors")
    with pytest.raises(HyimgError, match=r"`encoder\.embed_tokens\.weight` is not known"):
        check_byt5(tmp_path / "other.safetensors")

"""The DiT against tests/golden/dit_base and dit_distilled, and against diffusers' class on equal weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hyimg.checkpoints.architecture import DIT_2_1, DIT_2_1_DISTILLED, DIT_TINY, DiTArch
from hyimg.config.models import TrainingMemory
from hyimg.errors import HyimgError
from hyimg.memory.checkpointing import checkpointed
from hyimg.model.dit import DiT, TextCondition, collate
from hyimg.model.layers import Linear
from hyimg.model.loading import init_random, load_dit

Golden = Callable[[str], dict[str, Tensor]]

# Largest difference seen between four implementations: 1e-6; kernels of other processors round differently
BASE_TOLERANCE = 1e-5
# The same, with the kernels that tests/conftest.py chooses; without them exp() differs by an ulp in some
# frequencies, which guidance 6016 turns into 2e-5 in the output
DISTILLED_TOLERANCE = 1e-5


def run_case(model: DiT, tensors: Mapping[str, Tensor], case: str, text: TextCondition) -> Tensor:
    return model(
        tensors[f"{case}.latent"],
        tensors[f"{case}.timestep"],
        text,
        guidance_B=tensors.get(f"{case}.guidance"),
        timestep_r_B=tensors.get(f"{case}.timestep_r"),
    )


@pytest.mark.parametrize(
    ("name", "case", "tolerance"),
    [("dit_base", case, BASE_TOLERANCE) for case in "abc"]
    + [("dit_distilled", case, DISTILLED_TOLERANCE) for case in "ab"],
)
def test_velocity_agrees_with_the_golden_file(
    golden_tensors: Golden, make_dit: Any, make_text: Any, name: str, case: str, tolerance: float
) -> None:
    tensors = golden_tensors(name)
    with torch.no_grad():
        out = run_case(make_dit(tensors), tensors, case, make_text(tensors, case))
    torch.testing.assert_close(out, tensors[f"{case}.out"], rtol=0, atol=tolerance)


def test_gradients_agree_with_the_golden_file_and_padding_gets_none(
    golden_tensors: Golden, make_dit: Any, make_text: Any, under: Any
) -> None:
    tensors = golden_tensors("dit_base")
    model, text = make_dit(tensors), make_text(tensors, "b")
    latent = tensors["b.latent"].clone().requires_grad_()
    text.text_BTD.requires_grad_()
    text.byt5_BSE.requires_grad_()
    loss = model(latent, tensors["b.timestep"], text).square().mean()
    loss.backward()

    torch.testing.assert_close(loss.detach(), tensors["b.loss"][0], rtol=1e-5, atol=0)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    found |= {"latent": latent.grad, "text_states": text.text_BTD.grad, "byt5_states": text.byt5_BSE.grad}
    for name, expected in under(tensors, "b.grad.").items():
        torch.testing.assert_close(
            found[name], expected, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not text.text_BTD.grad[~text.text_mask_BT].any()
    assert not text.byt5_BSE.grad[~text.byt5_mask_BS].any()


def test_padding_never_influences_a_result(golden_tensors: Golden, make_dit: Any, make_text: Any) -> None:
    tensors = golden_tensors("dit_base")
    model, text = make_dit(tensors), make_text(tensors, "b")
    expected = run_case(model, tensors, "b", text)
    expected.square().mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    # Other contents, even NaN, and more of it
    text.text_BTD[~text.text_mask_BT] = torch.nan
    text.byt5_BSE[~text.byt5_mask_BS] = torch.nan
    wider = TextCondition(
        torch.nn.functional.pad(text.text_BTD, (0, 0, 0, 5), value=3.0),
        torch.nn.functional.pad(text.text_mask_BT, (0, 5)),
        text.byt5_BSE,
        text.byt5_mask_BS,
    )
    out = run_case(model, tensors, "b", wider)
    out.square().mean().backward()
    assert torch.equal(out, expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name


def test_a_batch_of_unequal_prompts_equals_its_prompts_one_by_one(
    golden_tensors: Golden, make_dit: Any, make_text: Any
) -> None:
    tensors = golden_tensors("dit_base")
    model, text = make_dit(tensors), make_text(tensors, "c")
    lengths = zip(text.text_mask_BT.sum(1).tolist(), text.byt5_mask_BS.sum(1).tolist(), strict=True)
    items = [
        (text.text_BTD[i, :num_text], text.byt5_BSE[i, :num_byt5] if num_byt5 else None)
        for i, (num_text, num_byt5) in enumerate(lengths)
    ]
    with torch.no_grad():
        together = model(tensors["c.latent"], tensors["c.timestep"], collate(items))
        for i, item in enumerate(items):
            alone = model(tensors["c.latent"][i : i + 1], tensors["c.timestep"][i : i + 1], collate([item]))
            # Matrix kernels round by shape; 1e-6 seen in the golden's README
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, tensors["c.out"], rtol=0, atol=BASE_TOLERANCE)


def test_a_backend_gets_lengths_only_with_padding() -> None:
    model = DiT(DIT_TINY)
    init_random(model, seed=0)
    heard: list[Sequence[int] | None] = []

    def record(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None) -> Tensor:
        heard.append(lengths)
        return v

    model.attention = record
    latent, timestep = torch.zeros(2, 16, 2, 3), torch.tensor([500.0, 100.0])
    model(latent, timestep, collate([(torch.ones(4, 64), None), (torch.ones(4, 64), None)]))
    assert heard == [None] * (2 + 6), "two refiner blocks and six blocks"
    heard.clear()
    model(latent, timestep, collate([(torch.ones(4, 64), None), (torch.ones(3, 64), torch.ones(2, 48))]))
    assert heard == [[4, 3]] * 2 + [[6 + 4, 6 + 5]] * 6


def test_gradient_checkpointing_gives_bit_equal_gradients(
    golden_tensors: Golden, make_dit: Any, make_text: Any
) -> None:
    tensors = golden_tensors("dit_base")
    gradients, saved = [], []
    for checkpointing in (False, True):
        model = make_dit(tensors)
        if checkpointing:
            model.run_block = checkpointed(
                model.run_block, TrainingMemory(gradient_checkpointing=True), model.device
            )
        num_bytes = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal num_bytes
            num_bytes += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            out = run_case(model, tensors, "b", make_text(tensors, "b"))
        out.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        saved.append(num_bytes)
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    assert saved[1] < saved[0] / 3, "and keeps far fewer activations"


@pytest.mark.parametrize("arch", [DIT_2_1, DIT_2_1_DISTILLED], ids=["base", "distilled"])
def test_the_full_model_has_exactly_the_real_checkpoints_tensors(
    golden_json: Callable[[str], Any], arch: DiTArch
) -> None:
    golden = golden_json("dit_keys")
    expected = golden["keys"] | (golden["distilled"]["extra_keys"] if arch.meanflow else {})
    with torch.device("meta"):
        model = DiT(arch)
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert DiTArch.from_shapes({name: tuple(shape) for name, shape in expected.items()}) == arch


@pytest.mark.parametrize("distilled", [False, True], ids=["base", "distilled"])
def test_diffusers_model_gives_the_same_velocity_on_its_own_file(tmp_path: Any, distilled: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.HunyuanImageTransformer2DModel(
        in_channels=16, out_channels=16, num_attention_heads=3, attention_head_dim=24, num_layers=2,
        num_single_layers=3, text_embed_dim=40, text_embed_2_dim=48, rope_axes_dim=(12, 12),
        guidance_embeds=distilled, use_meanflow=distilled,
    ).eval()  # fmt: skip
    save_file(theirs.state_dict(), tmp_path / "diffusers.safetensors")
    ours = load_dit(tmp_path / "diffusers.safetensors")
    text = collate([(torch.randn(9, 40), torch.randn(4, 48)), (torch.randn(5, 40), torch.randn(6, 48))])
    latent, timestep = torch.randn(2, 16, 5, 8), torch.tensor([371.25, 908.5])
    extra = {"guidance": torch.tensor([3250.0, 1000.0]), "timestep_r": torch.tensor([120.5, 0.0])}
    with torch.no_grad():
        expected = theirs(
            latent,
            timestep,
            text.text_BTD,
            text.text_mask_BT,
            encoder_hidden_states_2=text.byt5_BSE,
            encoder_attention_mask_2=text.byt5_mask_BS,
            return_dict=False,
            **(extra if distilled else {}),
        )[0]
        out = ours(latent, timestep, text, **({f"{k}_B": v for k, v in extra.items()} if distilled else {}))
    # fp32 rounding of two orders of operations; sinusoids of guidance 3250 are the most sensitive
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_bfloat16_weights_keep_fractions_of_a_timestep() -> None:
    model = DiT(DIT_TINY)
    init_random(model, seed=0)
    model.bfloat16()
    text = collate([(torch.ones(3, 64), None)])
    latent = torch.ones(1, 16, 4, 4)
    with torch.no_grad():
        rounded, fraction = (model(latent, torch.tensor([t]), text) for t in (372.0, 371.25))
        whole = model.float()(latent, torch.tensor([371.25]), text)
    assert fraction.dtype == torch.bfloat16
    assert not torch.equal(rounded, fraction)
    # Eight bits of mantissa through six blocks, outputs of order 1
    torch.testing.assert_close(fraction.float(), whole, rtol=0, atol=0.1)


def test_adapters_get_input_and_output_and_are_not_in_the_state_dict() -> None:
    layer = Linear(3, 2)
    x = torch.ones(1, 3)
    base = layer(x)
    layer.adapters = (lambda x, y: y + x.sum(), lambda x, y: 2 * y)
    assert torch.equal(layer(x), 2 * (base + 3))
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    assert len(list(layer.parameters())) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 30}, "do not divide into heads of 30"),
        ({"heads": 32, "head_dim": 2}, "cannot carry a rotary position"),
        ({"num_double": 0}, "0 double and 4 single"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(HyimgError, match=message):
        replace(DIT_TINY, **change)


def test_collate_pads_with_zeros_and_rows_without_quotes_have_no_glyph_tokens() -> None:
    text = collate([(torch.ones(2, 4), None), (torch.ones(3, 4), torch.ones(1, 5))])
    assert text.text_mask_BT.tolist() == [[True, True, False], [True, True, True]]
    assert not text.text_BTD[0, 2].any()
    assert text.byt5_mask_BS is not None
    assert text.byt5_mask_BS.tolist() == [[False], [True]]
    assert collate([(torch.ones(2, 4), None)]).byt5_BSE is None
    moved = text.to("cpu", torch.bfloat16)
    assert moved.text_BTD.dtype == torch.bfloat16
    assert moved.byt5_mask_BS is not None
    assert moved.byt5_mask_BS.dtype == torch.bool

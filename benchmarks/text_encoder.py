"""What the layer-by-layer text encoder costs beside the whole encoder at once.

A Qwen2.5-VL language model of several hundred megabytes with random weights encodes 64 captions on the CPU in
bfloat16, each way in a process of its own:

- `streamed`: as `cache-text` does, one layer after the other from the file (mapped, or read);
- `whole`: the same layers, all loaded first; `transformers`: its model with all layers, as is usual.

Memory is what the process has more than before the encoder was opened, at its peak. `own` is memory that the
system cannot take back (anonymous pages: weights that were read, and activations); `mapped` are pages of the
file itself, which count as used and are given back whenever they are wanted. The mapped way has no weights of
its own, so what another way has more than it is the weights: the memory in the table.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, Options
from benchmarks.peaks import ProcessPeaks

NUM_CAPTIONS = 64
BATCH_SIZE = 8
WAYS = ("streamed, mapped", "transformers", "whole", "streamed")
# The reference tool's mean for captions of 15 to 120 words: float32, and 754 kB where no text is quoted
REFERENCE_BYTES = 1_630_000
_REAL_WIDTH, _GLYPH_WIDTH, _MOST_GLYPHS = 3584, 1472, 128
_WORDS = """a the of with in on under beside small large red blue golden wooden bright dark soft old young
portrait photograph painting street river mountain cat woman man child house table window light shadow morning
evening rain snow detailed realistic blurred background foreground standing sitting holding looking walking
colourful quiet busy wide close camera lens film warm cold reflection""".split()


def captions() -> list[str]:
    """64 captions of 15 to 120 words, every third with a text in quotes; always the same."""
    draw = random.Random(0)
    texts = []
    for number in range(NUM_CAPTIONS):
        words = draw.choices(_WORDS, k=draw.randint(15, 120))
        if number % 3 == 0:
            words += ["with", "the", "words", f'"{" ".join(draw.choices(_WORDS, k=4))}"']
        texts.append(" ".join(words))
    return texts


def measure(options: Options) -> Iterator[Figure]:
    """Time and memory of each way, and the bytes of a caption's cache entry at the real width."""
    from hyimg.encoders.qwen import check_qwen

    path = options.scratch / "encoder.safetensors"
    make_encoder(path)
    arch = check_qwen(path)
    embeddings = arch.vocab * arch.hidden * 2 / 1e6
    layers = path.stat().st_size / 1e6 - 2 * embeddings
    goal = layers * 3 / arch.num_layers + embeddings
    yield Figure(f"the encoder: {arch.num_layers} layers, {layers:.0f} MB", None, layers + embeddings)
    best: dict[str, dict[str, float]] = {}
    for way in WAYS:
        results = [_in_a_process(way, path) for _ in range(max(1, options.runs // 2))]
        best[way] = min(results, key=lambda result: result["seconds"])
        seconds, own = best[way]["seconds"], best[way]["own_mb"]
        activations = best["streamed, mapped"]["own_mb"]
        beside = f"{1e3 * seconds / NUM_CAPTIONS:.0f} ms a caption"
        if way == "streamed, mapped":
            beside += f", activations {activations:.0f} MB, {best[way]['mapped_mb']:.0f} MB of pages mapped"
        if way == "streamed":
            beside += f"; time {seconds / best['whole']['seconds']:.2f} of whole, "
            beside += f"{seconds / best['transformers']['seconds']:.2f} of transformers; goal {goal:.0f} MB"
        yield Figure(f"64 captions, {way}", seconds, max(0.0, own - activations), beside)
    ours, theirs = entry_bytes()
    yield Figure(
        "a caption's entry, width 3584",
        None,
        ours / 1e6,
        f"{ours / theirs:.2f} of the reference tool's on these captions (goal 0.35), "
        f"{ours / REFERENCE_BYTES:.2f} of its mean of 1.63 MB on shorter ones",
    )


def make_encoder(path: Path) -> None:
    """14 layers of 30 MB, 16,384 tokens of width 1024, in the layout of the real file."""
    from hyimg.encoders.qwen_checkpoint import QwenArch
    from hyimg.encoders.tiny import make_tiny_qwen, train_tiny_tokenizer

    arch = QwenArch(
        hidden=1024,
        num_layers=14,
        num_heads=8,
        num_kv_heads=2,
        head_dim=128,
        intermediate=4096,
        vocab=16_384,
    )
    make_tiny_qwen(path, arch=arch)
    train_tiny_tokenizer(captions(), path.parent)


def entry_bytes() -> tuple[float, float]:
    """Mean bytes of a caption's cache entry at the real widths: ours, and the reference tool's."""
    from hyimg.cache.entry_file import file_size
    from hyimg.encoders.glyph import glyph_prompt
    from hyimg.encoders.tokenizer import TEMPLATE_TOKENS, load_qwen_tokenizer

    tokenizer = load_qwen_tokenizer(None, Path("no encoder"))
    ours = theirs = 0
    for caption in captions():
        num_tokens = len(tokenizer.encode(caption).ids) - TEMPLATE_TOKENS
        tensors = {"text": ("BF16", (num_tokens, _REAL_WIDTH))}
        if (glyph := glyph_prompt(caption)) is not None:
            num_glyphs = min(len(glyph.encode()) + 1, _MOST_GLYPHS)
            tensors["byt5"] = ("F16", (num_glyphs, _GLYPH_WIDTH))
        ours += file_size(tensors, {"prompt": caption})
        theirs += 4 * num_tokens * _REAL_WIDTH + 4 * _MOST_GLYPHS * _GLYPH_WIDTH
    return ours / NUM_CAPTIONS, theirs / NUM_CAPTIONS


def _in_a_process(way: str, path: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.text_encoder", way, str(path)], check=True, stdout=subprocess.PIPE
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def encode_one_way(way: str, path: Path) -> dict[str, float]:
    """Seconds from the open file to the last state, and the peaks of memory, of this process."""
    from hyimg.encoders.qwen import QwenEncoder
    from hyimg.encoders.tokenizer import load_qwen_tokenizer

    tokenizer = load_qwen_tokenizer(path.parent, path)
    rows = [tokenizer.encode(caption).ids for caption in captions()]
    run: Callable[[], Any]
    if way == "transformers":
        run = _transformers(path, rows)
    elif way == "whole":
        run = _whole(path, tokenizer, rows)
    else:
        encoder = QwenEncoder.open(
            path, tokenizer=tokenizer, batch_size=BATCH_SIZE, mmap=way == "streamed, mapped"
        )

        def run() -> Any:
            return list(encoder.hidden_states(rows))

    _warm_up()
    with ProcessPeaks() as peaks:
        started = time.perf_counter()
        states = run()
        seconds = time.perf_counter() - started
        del states
    return {"seconds": seconds, "own_mb": peaks.own / 1e6, "mapped_mb": peaks.mapped / 1e6}


def _warm_up() -> None:
    """torch's own memory for threads and kernels is nobody's weights."""
    import torch

    a = torch.randn(512, 1024).bfloat16()
    torch.nn.functional.scaled_dot_product_attention(
        a.view(1, 8, 64, -1), a.view(1, 8, 64, -1), a.view(1, 8, 64, -1)
    )
    _ = a @ a.T


def _whole(path: Path, tokenizer: Any, rows: Sequence[Sequence[int]]) -> Callable[[], Any]:
    """Every layer read before the first caption; the sums are the same."""
    import hyimg.encoders.qwen as qwen

    encoder = qwen.QwenEncoder.open(path, tokenizer=tokenizer, batch_size=BATCH_SIZE, mmap=False)

    def run() -> Any:
        layers = [encoder._read_layer(layer) for layer in range(encoder.arch.num_layers)]
        object.__setattr__(encoder, "_read_layer", lambda layer: layers[layer])
        return list(encoder.hidden_states(rows))

    return run


def _transformers(path: Path, rows: Sequence[Sequence[int]]) -> Callable[[], Any]:
    import torch
    from transformers import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    from hyimg.checkpoints.safetensors_file import Checkpoint
    from hyimg.encoders.qwen import check_qwen, equal_length_batches

    arch = check_qwen(path)
    config = Qwen2_5_VLTextConfig(
        hidden_size=arch.hidden,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_heads,
        num_key_value_heads=arch.num_kv_heads,
        intermediate_size=arch.intermediate,
        vocab_size=arch.vocab,
        rms_norm_eps=arch.rms_eps,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": arch.rope_theta,
            "mrope_section": [16, 24, 24],
        },
    )

    def run() -> Any:
        checkpoint = Checkpoint.open(path, mmap=False)
        with torch.device("meta"):
            model = Qwen2_5_VLTextModel(config).eval()
        names = [name for name in checkpoint.tensors if name.startswith("model.")]
        state = {name.removeprefix("model."): checkpoint.read(name) for name in names}
        model.load_state_dict(state, assign=True)
        model.rotary_emb = type(model.rotary_emb)(config)
        states = []
        with torch.no_grad():
            for batch in equal_length_batches([len(row) for row in rows], BATCH_SIZE):
                ids_BT = torch.tensor([rows[i] for i in batch])
                out = model(input_ids=ids_BT, output_hidden_states=True, use_cache=False)
                states.append(out.hidden_states[-3].clone())
        return states

    return run


if __name__ == "__main__":
    print(json.dumps(encode_one_way(sys.argv[1], Path(sys.argv[2]))))

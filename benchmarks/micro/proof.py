"""`python -m benchmarks.micro prove`: whether the demo's LoRA has taught what it was to teach, as `proof.json`.

The trigger word is rendered in colours, places and sizes that the demo's pictures do not have together, prompts of
known shapes beside it, each with and without the LoRA, all by `hyimg infer`; the judge counts.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from benchmarks.micro.judge import judge, render, score
from hyimg.cache.atomic import atomic_write_text
from hyimg.demo.concept import DemoFolder, concept_prompt, new_concept_scenes
from hyimg.demo.world import NUM_FULL_PHRASINGS, Scene, held_out_scenes, phrase
from hyimg.errors import HyimgError
from hyimg.report import Reporter

PROOF = "proof.json"

NUM_EQUAL = 8
"""Pictures that are compared, bit for bit, at multiplier 0."""


def prove(directory: Path, report: Reporter, *, num_seeds: int = 100) -> dict[str, object]:
    """Measures the demo of a folder, writes the measures there, and returns them.

    Raises HyimgError where the folder holds no demo that was run to its end, RunError where rendering fails.
    """
    demo = DemoFolder(directory)
    for path in (demo.lora, demo.comfy_lora, demo.metrics):
        if not path.is_file():
            flag = "--overwrite " if demo.marker.is_file() else ""
            again = f"hyimg demo {flag}{shlex.quote(str(directory))}"
            raise HyimgError(f"there is no `{path}`", hint=f"run the demo to its end: `{again}`")
    new, known = new_concept_scenes(num_seeds), held_out_scenes(num_seeds)
    new_prompts = [concept_prompt(scene, number) for number, scene in enumerate(new)]
    known_prompts = [phrase(scene, number % NUM_FULL_PHRASINGS) for number, scene in enumerate(known)]
    lora, comfy = ["--lora_weight", str(demo.lora)], ["--lora_weight", str(demo.comfy_lora)]
    renderings: dict[str, tuple[Sequence[str], Sequence[str]]] = {
        "trigger word, base": (new_prompts, []),
        "trigger word, LoRA": (new_prompts, [*lora, "--lora_multiplier", "1"]),
        "trigger word, ComfyUI's file": (new_prompts, [*comfy, "--lora_multiplier", "1"]),
        "trigger word, multiplier 0": (new_prompts[:NUM_EQUAL], [*lora, "--lora_multiplier", "0"]),
        "known shapes, base": (known_prompts, []),
        "known shapes, LoRA": (known_prompts, [*lora, "--lora_multiplier", "1"]),
    }
    pictures = {}
    for number, (name, (prompts, arguments)) in enumerate(renderings.items(), 1):
        report.note(f"{number} of {len(renderings)}: {name}")
        pictures[name] = render(demo.model, prompts, *arguments)

    def scored(name: str, scenes: Sequence[Scene]) -> dict[str, float]:
        return score(scenes, [judge(picture) for picture in pictures[name]])

    losses = validation_losses(demo.metrics)
    proof: dict[str, object] = {
        "seeds": num_seeds,
        "trigger": {
            "base": scored("trigger word, base", new),
            "lora": scored("trigger word, LoRA", new),
            "comfy_lora": scored("trigger word, ComfyUI's file", new),
        },
        "without_trigger": {
            "base": scored("known shapes, base", known),
            "lora": scored("known shapes, LoRA", known),
        },
        "multiplier_0_equals_base": all(
            muted.tobytes() == base.tobytes()
            for muted, base in zip(
                pictures["trigger word, multiplier 0"], pictures["trigger word, base"], strict=False
            )
        ),
        "validation_loss": {"first": losses[0], "last": losses[-1]},
    }
    text = json.dumps(proof, indent=1, allow_nan=False)
    atomic_write_text(directory / PROOF, text + "\n", root=directory)
    report.note(text)
    return proof


def validation_losses(metrics: Path) -> list[float]:
    """The validation losses of a run in their order, the first before any step."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [line["validation_loss"] for line in lines if "validation_loss" in line]

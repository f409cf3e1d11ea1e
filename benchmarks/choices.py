"""Whether training options change what the demo's LoRA learns: the micro model, one option at a time, several seeds.

The demo's training is repeated from the demo's caches, and the LoRA is judged as by `benchmarks.micro prove`, on fewer
images. The spread over seeds shows what a difference between two options is worth.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.figures import HYIMG, Figure, Options, apart

_NUM_SEEDS = 3
_NUM_EPOCHS = 30
"""Half of the demo's: where a training is not yet at its end, options differ more."""
_NUM_PROMPTS = 40
"""With the trigger word, and as many without; each a picture of a seed of its own."""
_STEPS = ("--infer_steps", "16")


@dataclass(frozen=True)
class Choice:
    """One way to train: flags of `hyimg train`, or a line for the dataset file's `[general]`."""

    name: str
    flags: str = ""
    general_line: str = ""


CHOICES = (
    Choice("as the demo: sigma"),
    Choice("bf16", "--mixed_precision bf16"),
    Choice("float32", "--mixed_precision no"),
    Choice("fp8_scaled", "--fp8_scaled"),
    Choice("blocks_to_swap", "--blocks_to_swap 1"),
    Choice("caption dropout 0.1, cached", general_line="caption_dropout_rate = 0.1"),
    Choice("timesteps uniform", "--timestep_sampling uniform"),
    Choice("timesteps sigmoid", "--timestep_sampling sigmoid"),
    Choice("timesteps shift", "--timestep_sampling shift"),
    Choice("timesteps flux_shift", "--timestep_sampling flux_shift"),
    Choice("EMA 0.98", "--ema_decay 0.98"),
)


def measure(options: Options) -> Iterator[Figure]:
    """A figure a choice: shares of pictures that are right, the validation loss, and their spread over seeds.

    As many runs at a time as there are cores, each on one of them.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    demo = options.scratch / "demo"
    run("demo", str(demo))
    chosen = [choice for choice in CHOICES if options.only in choice.name]
    seeds = range(2 if options.toy else _NUM_SEEDS)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        asked = [
            [
                pool.submit(apart, outcome, demo, CHOICES.index(choice), seed, toy=options.toy)
                for seed in seeds
            ]
            for choice in chosen
        ]
        try:
            for choice, futures in zip(chosen, asked, strict=True):
                yield _figure(choice, [future.result() for future in futures])
        finally:
            pool.shutdown(cancel_futures=True)


def _figure(choice: Choice, outcomes: Sequence[dict[str, float]]) -> Figure:
    values = {name: [outcome[name] for outcome in outcomes] for name in outcomes[0]}
    told = ", ".join(f"{name} {fmean(all_):.3f} ± {stdev(all_):.3f}" for name, all_ in values.items())
    return Figure(choice.name, beside=told, values=values)


def outcome(demo: Path, number: int, seed: int, *, toy: bool) -> dict[str, float]:
    """Trains as the choice of this number says, and judges. For a process of its own: it imports torch."""
    from benchmarks.micro.judge import score, verdicts
    from benchmarks.micro.proof import validation_losses
    from hyimg.demo.concept import DemoFolder, concept_prompt, new_concept_scenes
    from hyimg.demo.world import NUM_FULL_PHRASINGS, held_out_scenes, phrase
    from hyimg.stages.demo import TRAINING

    choice, source = CHOICES[number], DemoFolder(demo)
    own = DemoFolder(demo / f"choice-{number}-{seed}")
    own.directory.mkdir()
    # beside the demo's dataset file, and so with its caches
    dataset = demo / f"choice-{number}-{seed}.toml"
    general = f"[general]\n{choice.general_line}"
    text = source.dataset.read_text(encoding="utf-8").replace("[general]", general)
    dataset.write_text(text, encoding="utf-8")
    model = source.model
    encoders = ["--text_encoder", str(model.text_encoder), "--byt5", str(model.byt5)]
    run("cache-text", "--dataset_config", str(dataset), *encoders)
    places = {**own.places(), "dataset": dataset, "dit": model.dit}
    training = [word.format_map(places) for word in shlex.split(TRAINING)]
    training[training.index("--max_train_epochs") + 1] = "1" if toy else str(_NUM_EPOCHS)
    run(*training, "--seed", str(seed), *shlex.split(choice.flags))

    arguments = [
        "--lora_weight",
        str(own.lora),
        "--lora_multiplier",
        "1",
        *(("--infer_steps", "1") if toy else _STEPS),
    ]
    num_prompts = 2 if toy else _NUM_PROMPTS
    new, known = new_concept_scenes(num_prompts), held_out_scenes(num_prompts)
    new_prompts = [concept_prompt(scene, number) for number, scene in enumerate(new)]
    known_prompts = [phrase(scene, number % NUM_FULL_PHRASINGS) for number, scene in enumerate(known)]
    with_trigger = score(new, verdicts(model, new_prompts, *arguments, quiet=True))
    without = score(known, verdicts(model, known_prompts, *arguments, quiet=True))
    losses = validation_losses(own.metrics)
    shutil.rmtree(own.directory)
    return {
        "with trigger": with_trigger["shape_and_colors"],
        "without": without["shape_and_colors"],
        "validation loss": losses[-1],
    }


def run(*arguments: str) -> None:
    """Runs `hyimg`; where it fails, its message is the error's."""
    done = subprocess.run([*HYIMG, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"hyimg {shlex.join(arguments)}\n{done.stderr}")

"""`--resume DIR|latest`: finding the state to resume from, checking it, and restoring its parts.

Network, optimiser and global generators are parts of every state; LR scheduler, loss scaler, moving average and
plugins register their own `Stateful`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from hyimg.distributed.processes import Processes
from hyimg.errors import HyimgError, RunError, exception_text
from hyimg.hookspecs import Stateful as Stateful
from hyimg.lora.network import AdapterNetwork
from hyimg.memory.device import rng_state, set_rng_state
from hyimg.report import Reporter
from hyimg.training.fingerprint import (
    differences,
    environment,
    environment_differences,
    option_differences,
)
from hyimg.training.optimizers import base_of
from hyimg.training.run_folder import RunFolder
from hyimg.training.state import DamagedStateError, SavedState, equal, read_state, unpack

LATEST = "latest"


@dataclass(frozen=True)
class Resumed:
    """The state that a run resumes from. `force` allows different settings."""

    saved: SavedState
    force: bool
    report: Reporter

    @property
    def step(self) -> int:
        """The last completed step."""
        return int(self.saved.document["step"])

    @property
    def epoch(self) -> int:
        """The last completed epoch, its files saved."""
        return int(self.saved.document["epoch"])

    @property
    def seed(self) -> int:
        return int(self.saved.document["seed"])

    @property
    def validation_seed(self) -> int | None:
        """The seed of earlier validations, None if there were none. Earlier releases used the run's seed."""
        metrics = self.saved.metrics
        if metrics is None:
            seed = self.saved.document.get("validation_seed")
            return None if seed is None else int(seed)
        if '"validation_loss"' not in metrics:
            return None
        return int(self.saved.document.get("validation_seed", self.seed))

    def restore_log(self, path: Path) -> None:
        """Restores the metrics up to the state in `path`; warns if their lines are missing."""
        if (warning := self.saved.restore_log(path)) is not None:
            self.report.warning(warning)

    @property
    def mixed_precision(self) -> str | None:
        """The precision of the run."""
        options: Mapping[str, Any] = self.saved.document["identity"]["options"]
        return options.get("mixed_precision")

    @property
    def text_cache(self) -> str:
        """The identity of the text cache that the run used."""
        return str(self.saved.document["identity"]["text cache"])

    @property
    def started(self) -> float:
        """The time of the run's first start, in seconds since the epoch."""
        return float(self.saved.document["started"])

    @property
    def log_name(self) -> str:
        """The name of the trackers' folder, which a resumed run keeps."""
        return str(self.saved.document["log_name"])

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises HyimgError for options that would change the result; with `force` it warns."""
        self._judge(option_differences(self.saved.document["identity"]["options"], options))

    def check(self, identity: Mapping[str, Any], processes: Processes) -> None:
        """Like `check_options` for the rest of the fingerprint; also warns of a different environment."""
        if self.step > identity["length"]:
            raise HyimgError(
                f"`{self.saved.path}` is at step {self.step}, but the run has only {identity['length']}",
                hint="raise `--max_train_steps` or `--max_train_epochs`",
            )
        self._judge(differences(self.saved.document["identity"], identity))
        others = environment_differences(self.saved.document["machine"], environment(processes))
        if others:
            self.report.warning(f"results may round differently than before: {', '.join(others)}")

    def _judge(self, found: list[str]) -> None:
        if found and not self.force:
            raise HyimgError(
                f"`{self.saved.path}` is the state of a run with different settings:",
                details=found,
                hint="use the earlier settings, or continue with these by `--resume_force`",
            )
        for line in found:
            self.report.warning(f"resumed with a different setting: {line}")

    def restore(self, part: Stateful) -> None:
        """Restores a part. Raises HyimgError if the state does not contain it, or it does not fit."""
        trees = self.saved.document["parts"]
        if part.name not in trees:
            if not self.force:
                raise HyimgError(
                    f"`{self.saved.path}` does not contain `{part.name}`, which this run needs",
                    hint="use the earlier settings, or reset that part by `--resume_force`",
                )
            self.report.warning(f"the state does not contain `{part.name}`, which is reset")
            return
        try:
            part.load_state_dict(unpack(trees[part.name], self.saved.tensors(part.name)))
        except HyimgError:
            raise
        except Exception as error:
            raise RunError(
                f"`{part.name}` cannot be restored from `{self.saved.path}`: {exception_text(error)}",
                hint="`--traceback` shows where; a different package version may use a different state",
            ) from error


# The types in a state's document
_DOCUMENT: Mapping[str, Any] = {
    **dict.fromkeys(("saved", "started"), (int, float)),
    **dict.fromkeys(("seed", "step", "epoch"), int),
    "log_name": str,
    "identity": {
        "options": dict,
        "dataset": {"images": int, "batches": int, "pictures": str, "captions": str, "settings": str},
        **dict.fromkeys(("latent cache", "text cache", "base model"), str),
        "base weights": list,
        **dict.fromkeys(("length", "batches a step"), int),
    },
    "machine": dict,
    "parts": dict,
}


def _checked(state: SavedState) -> SavedState:
    """The state. Raises DamagedStateError if its document was not written by a run."""
    if (wrong := _mismatch(state.document, _DOCUMENT, "")) is not None:
        raise DamagedStateError(
            f"`{state.path}` is not the state of a run: `{wrong}` in its document is missing or wrong"
        )
    return state


def _mismatch(found: object, wanted: Mapping[str, Any], place: str) -> str | None:
    """The first key of `found` that is missing or does not have the type in `wanted`."""
    if not isinstance(found, Mapping):
        return place
    for key, kind in wanted.items():
        name, value = f"{place}.{key}".lstrip("."), found.get(key)
        if isinstance(kind, Mapping):
            if (wrong := _mismatch(value, kind, name)) is not None:
                return wrong
        elif not isinstance(value, kind):
            return name
    return None


def find_state(
    given: str, folder: RunFolder, report: Reporter, *, overwrite: bool = False
) -> SavedState | None:
    """The state that `--resume` names: a folder, or the newest complete one of the run in `folder`.

    None for `latest` if the run has left nothing, or nothing but what is to be overwritten: one command line can
    start and restart a run. Raises HyimgError if a named state is not complete or would be overwritten, or if
    `latest` finds none.
    """
    if given != LATEST:
        state = _checked(read_state(Path(given)))
        if overwrite and folder.holds(state.path):
            raise HyimgError(
                f"`--overwrite` would replace the run that `{given}` belongs to",
                hint="leave out `--overwrite` to continue it, or choose another `--output_name`",
            )
        return state
    states = folder.states()
    found: list[SavedState] = []
    for path in states:
        try:
            found.append(_checked(read_state(path, verify=False)))
        except DamagedStateError as error:
            report.warning(f"skipped: {error.message}")
    for state in sorted(
        found, key=lambda state: (state.document["saved"], state.document["step"]), reverse=True
    ):
        try:
            return _checked(read_state(state.path))
        except DamagedStateError as error:
            report.warning(f"skipped: {error.message}")
    if folder.saved_files(complete=True) and not overwrite:
        raise HyimgError(
            f"there is no complete state of `{folder.name}` in `{folder.states_directory}`",
            hint="give `--resume` the folder of a state, or start over with `--overwrite`",
        )
    report.warning(
        f"there is no state of `{folder.name}` in `{folder.states_directory}` yet: starting from the first step"
    )
    return None


def network_part(network: AdapterNetwork) -> Stateful:
    """The trained parameters, in their own dtype, and each adapter's alpha."""

    def state_dict() -> dict[str, Any]:
        return {
            "weights": network.state_dict(),
            "alphas": {module.lora_name: lora.alpha for module, lora in network.adapters()},
        }

    def load_state_dict(state: Mapping[str, Any]) -> None:
        if problem := _tensor_mismatch(network.state_dict(), state["weights"]):
            raise HyimgError(
                f"the state belongs to a different network: {problem}",
                hint="use the ranks, patterns and kinds of adapter that it was saved with",
            )
        network.load_state_dict(state["weights"])
        for module, lora in network.adapters():
            lora.alpha = state["alphas"][module.lora_name]

    return Stateful("network", state_dict, load_state_dict)


class OptimizerPart:
    """The optimiser's state and its groups' numbers, which some optimisers change during training.

    Create it right after the optimiser, while its groups hold the configured values: a value that was configured
    differently when the state was saved (`--resume_force`) keeps its new setting, all others are restored. For
    another kind of optimiser, or other groups, nothing is restored.
    """

    def __init__(self, optimizer: Optimizer, report: Reporter) -> None:
        self.optimizer = optimizer
        self.report = report
        self.base = base_of(optimizer)
        kinds = [self.base] if self.base is optimizer else [optimizer, self.base]
        self.kind = " of ".join(f"{type(one).__module__}.{type(one).__name__}" for one in kinds)
        self.built = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]

    @property
    def part(self) -> Stateful:
        return Stateful("optimizer", self.state_dict, self.load_state_dict)

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "built": self.built, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = state["optimizer"]
        counts = [len(group["params"]) for group in self.optimizer.param_groups]
        if state["kind"] != self.kind or [len(group["params"]) for group in saved["param_groups"]] != counts:
            self.report.warning(f"the optimiser's state ({state['kind']}) does not fit this run and is reset")
            return
        self.optimizer.load_state_dict(saved)
        self._restore_dtypes(saved["state"])
        self._page_again()
        if not equal(self.optimizer.state_dict()["state"], saved["state"]):
            self.report.warning(
                f"`{self.kind}` does not restore its state exactly: the run continues, but not bit for bit"
            )
        for group, before, now in zip(self.optimizer.param_groups, state["built"], self.built, strict=True):
            group.update({key: value for key, value in now.items() if before.get(key) != value})

    def _restore_dtypes(self, saved: Mapping[int, Any]) -> None:
        """Undoes torch's cast of floating-point state to the parameter's dtype, if the optimiser uses another."""
        parameters = list(chain.from_iterable(group["params"] for group in self.optimizer.param_groups))
        for number, values in saved.items():
            own = self.base.state.get(parameters[number], {})
            for key, value in values.items():
                there = own.get(key)
                if isinstance(value, Tensor) and isinstance(there, Tensor) and there.dtype != value.dtype:
                    own[key] = value.to(there.device)

    def _page_again(self) -> None:
        """Moves state into paged memory: bitsandbytes' paged optimisers page what they create, not what they load."""
        optimizer: Any = self.base
        if not getattr(optimizer, "is_paged", False):
            return
        for parameter, own in optimizer.state.items():
            for key in ("state1", "state2"):
                loaded = own.get(key)
                if isinstance(loaded, Tensor) and loaded.shape == parameter.shape:  # AdEMAMix has two in one
                    own[key] = optimizer.get_state_buffer(parameter, dtype=loaded.dtype)
                    own[key].copy_(loaded)


def generators_part(device: torch.device) -> Stateful:
    """The global generators, which hyimg does not use, but plugins may."""

    def state_dict() -> dict[str, Any]:
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        numbers = dict(np.random.get_state(legacy=False))
        inner = dict(numbers.pop("state"))
        state["numpy"] = numbers | {"state": inner | {"key": torch.from_numpy(inner["key"].astype(np.int64))}}
        of_device = rng_state(device)
        if of_device is not None:
            state[device.type] = of_device
        return state

    def load_state_dict(state: Mapping[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        inner = state["numpy"]["state"]
        key = inner["key"].numpy().astype(np.uint32)
        np.random.set_state(state["numpy"] | {"state": inner | {"key": key}})
        if device.type in state:
            set_rng_state(device, state[device.type])

    return Stateful("generators", state_dict, load_state_dict)


def _tensor_mismatch(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> str | None:
    for names, what in (
        (saved.keys() - own.keys(), "is of no adapter"),
        (own.keys() - saved.keys(), "is missing"),
    ):
        if names:
            return f"`{min(names)}` {what}"
    for name, tensor in own.items():
        if saved[name].shape != tensor.shape:
            return f"`{name}` has the shape {list(saved[name].shape)} and not {list(tensor.shape)}"
    return None

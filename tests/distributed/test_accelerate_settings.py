"""What accelerate is configured for and cannot be used is refused before anything is read, the rest is said."""

from __future__ import annotations

import os

import pytest

from hyimg.distributed.processes import refuse_sharding, warn_of_accelerate, without_settings
from hyimg.errors import HyimgError
from hyimg.report import SilentReporter

OURS = {"mixed_precision": "bf16", "torch_compile": False, "gradient_accumulation_steps": 1}


def warnings(environment, **options):
    report = SilentReporter()
    warn_of_accelerate(report, **OURS | options, environment=environment)
    return report.warnings


@pytest.mark.parametrize("value", ["true", "True", "1", "yes"])
@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism configuration"),
    ],
)
def test_sharding_is_refused_with_a_hint(variable, name, value):
    with pytest.raises(
        HyimgError, match=f"configured for {name} .`{variable}`., which is not supported"
    ) as caught:
        refuse_sharding({variable: value})
    assert "--num_processes N" in caught.value.hint
    refuse_sharding({variable: "false"})


@pytest.mark.parametrize(
    ("environment", "option"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "`--mixed_precision` of `hyimg train` applies (`bf16`)"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "`--torch_compile` of `hyimg train` applies (`no`)"),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "`--gradient_accumulation_steps` of `hyimg train` applies",
        ),
    ],
)
def test_ignored_accelerate_settings_are_a_warning(environment, option):
    (warning,) = warnings(environment)
    assert option in warning
    assert f"accelerate's `{next(iter(environment))}=" in warning


def test_values_that_accelerate_rejects_are_hidden_from_it():
    from accelerate import Accelerator

    environment = {"ACCELERATE_DYNAMO_BACKEND": "inf", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "many"}
    environment |= {"WORLD_SIZE": ""}
    with pytest.MonkeyPatch.context() as patched:
        for name, value in environment.items():
            patched.setenv(name, value)
        with without_settings():
            assert Accelerator(cpu=True, mixed_precision="no").gradient_accumulation_steps == 1
        assert os.environ.items() >= environment.items()


def test_accelerate_settings_that_agree_cause_no_warning():
    by_itself = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_DYNAMO_MODE": "default",
    }
    assert warnings(by_itself) == []
    agreed = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    }
    assert warnings(agreed, torch_compile=True, gradient_accumulation_steps=4) == []

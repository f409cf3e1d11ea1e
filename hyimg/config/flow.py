"""Flow matching: which noise levels are drawn, what is predicted, how the error is measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hyimg.config.option import option


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """Flow matching."""

    timestep_sampling: str = option(
        "sigma",
        help="how noise levels are drawn: sigma, uniform, sigmoid, shift, flux_shift, or a plugin's name",
    )
    timestep_sampling_args: tuple[str, ...] = option(
        (), help='arguments of a plugin\'s timestep sampling: `"name=value"`'
    )
    sigmoid_scale: float = option(1.0, help="scale for sigmoid, shift and flux_shift")
    discrete_flow_shift: float = option(5.0, minimum=0, exclusive_minimum=True, help="shift of the schedule")
    model_prediction_type: str = option(
        "raw", choices=("raw", "additive", "sigma_scaled"), help="what the model's output means"
    )
    weighting_scheme: str = option(
        "uniform",
        choices=("uniform", "none", "sigma_sqrt", "logit_normal", "mode", "cosmap"),
        help="draw (with `sigma` sampling) and loss weight (with `sigma_scaled`) by noise level",
    )
    logit_mean: float = option(0.0, help="mean for logit_normal")
    logit_std: float = option(
        1.0, minimum=0, exclusive_minimum=True, help="standard deviation for logit_normal"
    )
    mode_scale: float = option(1.29, help="scale for mode")
    min_timestep: float = option(0, minimum=0, maximum=1000, help="lowest timestep that is drawn")
    max_timestep: float = option(1000, minimum=0, maximum=1000, help="highest timestep that is drawn")
    show_timesteps: Path | None = option(
        None, help="draw the noise levels that training would see into this PNG, and train nothing"
    )
    ip_noise_gamma: float | None = option(None, minimum=0, help="input perturbation (try 0.1)")
    ip_noise_gamma_random_strength: bool = option(
        False, help="draw its strength between 0 and `--ip_noise_gamma`"
    )


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Loss."""

    loss_type: str = option("l2", help="l1, l2, huber, smooth_l1, or a plugin's name")
    loss_args: tuple[str, ...] = option((), help='arguments of a plugin\'s loss: `"name=value"`')
    huber_schedule: str = option(
        "constant",
        choices=("constant", "exponential", "snr"),
        help="how the Huber threshold follows the noise level (snr does not exist for flow models)",
        refused={"snr": "a flow model has no signal-to-noise schedule; use constant or exponential"},
    )
    huber_c: float = option(0.1, minimum=0, exclusive_minimum=True, help="Huber threshold")
    huber_scale: float = option(1.0, minimum=0, exclusive_minimum=True, help="scale of the Huber threshold")
    masked_loss: bool = option(
        False, help="expect masks in the dataset (where there are some they always count)"
    )
    prior_loss_weight: float = option(1.0, minimum=0, help="weight of regularisation images")

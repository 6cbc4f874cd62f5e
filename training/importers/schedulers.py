"""diffusers' DDIM scheduler configurations, as a card says the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saccade.errors import ModelError
from training.importers.reading import read_json

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
FAMILY = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler")
"""Of one forward process, which is all that is taken of them; every one is then walked by DDIM steps."""


@dataclass(frozen=True)
class Scheduler:
    """`noise`: fields of the card's Noise. `spacing`: of the timesteps."""

    noise: dict[str, Any]
    spacing: str


def scheduler_of(folder: Path) -> Scheduler:
    """Of scheduler/scheduler_config.json. Raises ModelError for what a DDIM step of ours does not do."""
    said = read_json(folder / "scheduler_config.json")
    kind = said.get("_class_name")
    if kind not in FAMILY:
        raise ModelError(f"{kind}: only these schedulers' models can be served: {', '.join(FAMILY)}")
    schedule = said.get("beta_schedule", "linear")
    if schedule not in SCHEDULES or said.get("trained_betas") is not None:
        raise ModelError(
            f"a beta_schedule of {schedule!r}, or trained betas: only {', '.join(SCHEDULES)} can be served"
        )
    _refuse_clipping(said, kind)
    spacing = said.get("timestep_spacing", "leading")
    if spacing not in ("leading", "linspace", "trailing"):
        raise ModelError(f"a timestep_spacing of {spacing!r} is not supported")
    cosine = schedule == "squaredcos_cap_v2"
    noise = {
        "schedule": SCHEDULES[schedule],
        "timesteps": said.get("num_train_timesteps", 1000),
        "beta_start": None if cosine else said.get("beta_start", 0.0001),
        "beta_end": None if cosine else said.get("beta_end", 0.02),
        "zero_terminal_snr": bool(said.get("rescale_betas_zero_snr", False)),
        "prediction": said.get("prediction_type", "epsilon"),
        "steps_offset": said.get("steps_offset", 0),
        "final": "clean" if said.get("set_alpha_to_one", kind != "PNDMScheduler") else "first",
    }
    return Scheduler(noise, spacing)


def _refuse_clipping(said: dict[str, Any], kind: str) -> None:
    """DDIM and DDPM clip their estimates unless told not to."""
    clips = said.get("clip_sample", kind in ("DDIMScheduler", "DDPMScheduler"))
    if clips or said.get("thresholding", False):
        raise ModelError("a scheduler that clips its estimates (clip_sample, thresholding) is not supported")

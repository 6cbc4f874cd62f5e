"""A model's facts. They ride as JSON in the denoiser's config.pbtxt, under parameters["saccade_card"]."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from saccade import ddim
from saccade.errors import ModelError
from saccade.schedule import CLEAN, NoiseSchedule, Spacing, pairs, timesteps
from saccade.tasks import AmodalCoding, Coding, DepthCoding, FlowCoding, TaskName

PARAMETER = "saccade_card"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Defaults(Part):
    """What a caller gets who asks for nothing."""

    steps: int = Field(ge=1)
    ensemble_size: int = Field(ge=1)
    reduction: Literal["mean", "median", "aligned_median"]
    spacing: Literal["leading", "linspace", "trailing"] = "trailing"
    processing_resolution: int = Field(ge=0, description="longer edge in pixels; 0 keeps the picture's own")


class TaskCard(Part):
    """One task of the model: the label that selects it, how its target is coded, what callers get by default."""

    label: int = Field(ge=0)
    passes: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=list, description="labels of further runs: a flow in two has u under `label` and v under this"
    )
    blank: float = Field(default=0.0, description="what fills the prompt of a task that takes none")
    coding: dict[str, Any] = Field(default_factory=dict, description="fields of saccade.tasks.<Task>Coding")
    defaults: Defaults

    @property
    def labels(self) -> tuple[int, ...]:
        """A label for each run."""
        return (self.label, *self.passes)


class Latent(Part):
    """`stride` picture pixels per latent cell; the denoiser works on latents times `scale`; sizes are multiples of
    `multiple` pixels."""

    channels: int = Field(ge=1)
    stride: int = Field(ge=1)
    scale: float = Field(gt=0)
    multiple: int = Field(ge=1)


class Noise(Part):
    """The forward process the model was trained with, what it predicts, and where a sampler starts and ends.

    `start` zeros: the way begins at zero instead of noise (one-step models, E2E-FT), so all members would be one.
    `steps_offset`: of `leading` timesteps. `final` first: the last step ends at the noise of timestep 0 (diffusers'
    set_alpha_to_one = false), not at the clean latent.
    """

    schedule: Literal["linear", "scaled_linear", "cosine"]
    timesteps: int = Field(default=1000, ge=2)
    zero_terminal_snr: bool = False
    beta_start: float | None = None
    beta_end: float | None = None
    prediction: ddim.Prediction
    start: Literal["noise", "zeros"] = "noise"
    steps_offset: int = Field(default=0, ge=0)
    final: Literal["clean", "first"] = "clean"

    def walk(self, steps: int, spacing: Spacing) -> list[tuple[int, int]]:
        """(t, t_prev) of every step. Raises InvalidInput where the spacing cannot take so many."""
        visited = timesteps(steps, spacing, self.timesteps, steps_offset=self.steps_offset)
        return pairs(visited, CLEAN if self.final == "clean" else 0)


class Training(Part):
    """On what, for how long, on which machine."""

    data: list[str]
    samples: int = Field(ge=0)
    wall_clock_s: float = Field(ge=0)
    device: str
    configuration: str = ""


class QualityPoint(Part):
    """One measured point of the dial: `metric` over `pictures` pictures of `set`."""

    task: TaskName
    steps: int
    ensemble_size: int
    metric: str
    value: float
    pictures: int
    set: str


class Card(Part):
    """Everything a gateway needs to run a model and to say what it ran."""

    version: Literal[1] = 1
    name: str
    summary: str
    licence: str
    parameters: int = Field(ge=0, description="of the three graphs together")
    encoder: str
    decoder: str
    conditioning: list[str] = Field(description="the encoder's outputs, which are inputs of the denoiser")
    tasks: dict[TaskName, TaskCard] = Field(description="none for a class-conditional generator")
    classes: int = Field(default=0, ge=0, description="class labels 0 .. classes - 1 that the raw denoiser knows")
    latent: Latent
    noise: Noise
    training: Training
    quality: list[QualityPoint] = Field(default_factory=list)
    digests: dict[str, Sha256] = Field(default_factory=dict, description="model name -> sha256 of its model.onnx")

    @model_validator(mode="after")
    def _consistent(self) -> Card:
        ddim.check(self.schedule, self.noise.prediction)
        for name, task in self.tasks.items():
            self.coding(name)
            if task.passes and (name != "flow" or len(task.passes) != 1):
                raise ValueError(f"task {name}: only flow takes two runs, one for u and one for v")
        return self

    @property
    def labels(self) -> set[int]:
        """Every label that the denoiser may be asked with; {0} where the card names none."""
        told = {label for task in self.tasks.values() for label in task.labels} | set(range(self.classes))
        return told or {0}

    @property
    def largest(self) -> int:
        """The largest default size of its tasks, px; 0 where none is told."""
        return max((task.defaults.processing_resolution for task in self.tasks.values()), default=0)

    @property
    def schedule(self) -> NoiseSchedule:
        noise = self.noise
        return NoiseSchedule(noise.schedule, noise.timesteps, noise.zero_terminal_snr, noise.beta_start, noise.beta_end)

    @property
    def digest(self) -> str:
        """The model's identity: sha256 over the names and digests of all its files; empty where the card has none."""
        lines = "".join(f"{name} {digest}\n" for name, digest in sorted(self.digests.items()))
        return hashlib.sha256(lines.encode()).hexdigest() if lines else ""

    def coding(self, task: TaskName) -> Coding:
        """The task's target coding with the card's parameters."""
        kinds: dict[TaskName, type[Coding]] = {"depth": DepthCoding, "flow": FlowCoding, "amodal": AmodalCoding}
        try:
            return kinds[task](**self.tasks[task].coding)
        except TypeError as error:
            raise ValueError(f"task {task}: unknown target coding field: {error}") from error


def parse(text: str) -> Card:
    """JSON -> Card. Raises ModelError that names what is wrong."""
    try:
        return Card.model_validate_json(text)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ModelError(f"the model's card is malformed: {problems}") from error

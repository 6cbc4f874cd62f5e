"""What an import gives, what may be told by hand, and what all sources share in making it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from saccade.card import Latent, Noise
from saccade.errors import InvalidInput
from training.codecs import CodecConfig
from training.importers.autoencoders import Autoencoder, Scaled, open_autoencoder
from training.importers.reading import State, locate
from training.models.dit import DiT, DiTConfig
from training.models.routing import Routing
from training.objectives import DiffusionConfig
from training.perception import CONDITION, Conditioner, Denoiser, PerceptionConfig, load_weights
from training.servable import Servable, Spec

UNKNOWN_LICENCE = "unknown: see where the weights come from"


@dataclass(frozen=True)
class Choices:
    """What files do not tell, or tell wrongly; None believes them.

    `dtr`: the transformer was trained with task routing (DTR), for files without its tables; `dtr_alpha`, `dtr_beta`
    say so too, and with which window. `active`: how many experts see a token. `codec`: folder or hub name of the
    autoencoder, for sources without one. `heads`, `grid` (tokens per edge of training): of a transformer.
    `schedule` .. `start`: of the card's `noise`. `spacing`, `steps`, `resolution`: what callers get who ask for
    nothing. `licence`: of the weights. Raises InvalidInput for counts that cannot be.
    """

    dtr: bool = False
    dtr_alpha: float | None = None
    dtr_beta: float | None = None
    active: int | None = None
    codec: str | None = None
    heads: int | None = None
    grid: int | None = None
    schedule: str | None = None
    prediction: str | None = None
    zero_terminal_snr: bool | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    start: Literal["noise", "zeros"] | None = None
    spacing: str | None = None
    steps: int | None = None
    resolution: int | None = None
    licence: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("active", 1), ("heads", 1), ("grid", 1), ("steps", 1), ("resolution", 0)):
            told = getattr(self, name)
            if told is not None and told < least:
                raise InvalidInput(f"{name} must be at least {least}, not {told}", param=name)

    def routing(self) -> Routing | None:
        """As told. Raises InvalidInput for a window that cannot be."""
        told = {"alpha": self.dtr_alpha, "beta": self.dtr_beta}
        given = {name: value for name, value in told.items() if value is not None}
        return Routing(**given) if self.dtr or given else None

    def refuse(self, what: str, *names: str) -> None:
        """Raises InvalidInput where one of these was told: `what` has no use for it."""
        for name in names:
            if getattr(self, name) not in (None, False):
                raise InvalidInput(f"{what} has no use for {name}", param=name)

    def noise(self, **found: Any) -> Noise:
        """The card's, of what a source says and what was told by hand. Raises InvalidInput for what cannot be."""
        if self.schedule is not None and self.schedule != found["schedule"]:
            found |= {"beta_start": None, "beta_end": None}
        told = {"schedule", "prediction", "zero_terminal_snr", "beta_start", "beta_end", "start"}
        found |= {name: getattr(self, name) for name in told if getattr(self, name) is not None}
        try:
            noise = Noise.model_validate(found)
        except ValueError as error:
            wrong = [str(e["loc"][0]) for e in getattr(error, "errors", list)()]
            raise InvalidInput(f"noise cannot be {found}: look at {', '.join(wrong)}", param="schedule") from error
        diffusion_of(noise)
        return noise


@dataclass(frozen=True)
class Imported:
    """`config`, `state`: the transformer in our names; None and empty for what is none of ours (Marigold's U-Net).

    `servable` is None where no autoencoder is known. `facts`: what a card says of it but for its name. `about`: what a
    run's config.json says, so that stages can start from it; None where they cannot.
    """

    kind: str
    config: DiTConfig | None
    state: dict[str, Tensor]
    servable: Servable | None
    facts: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] | None = None


def filled(config: DiTConfig, state: State) -> DiT:
    """A transformer with these weights. Raises ModelError that lists what is missing, left over or of another shape."""
    dit = DiT(config)
    load_weights(dit, state)
    return dit.requires_grad_(False).eval()


def diffusion_of(noise: Noise) -> DiffusionConfig:
    """The same process, as stages are configured."""
    return DiffusionConfig(
        noise.schedule,
        noise.timesteps,
        noise.zero_terminal_snr,
        noise.beta_start,
        noise.beta_end,
        noise.prediction,
    )


def autoencoder_of(choices: Choices, beside: Path | None = None) -> Autoencoder | None:
    """As told, else the one beside the model."""
    if choices.codec is not None:
        return open_autoencoder(locate(choices.codec))
    return open_autoencoder(beside) if beside is not None and beside.is_dir() else None


def codec_config(choices: Choices, beside: Path | None = None) -> CodecConfig:
    """Where stages find the autoencoder; an empty path where none is known yet."""
    path = choices.codec or (str(beside) if beside is not None and beside.is_dir() else "")
    return CodecConfig("autoencoder", path)


def latent_of(autoencoder: Autoencoder, patch: int) -> Latent:
    return Latent(
        channels=autoencoder.channels,
        stride=autoencoder.stride,
        scale=autoencoder.scale,
        multiple=autoencoder.stride * patch,
    )


def check_channels(autoencoder: Autoencoder, channels: int) -> None:
    if autoencoder.channels != channels:
        raise InvalidInput(
            f"the autoencoder has latents of {autoencoder.channels} channels, the model of {channels}", param="codec"
        )


class ImageLatent(nn.Module):
    """image, prompt [B, 3, H, W], task [B] -> the image's latent [B, C, h, w], scaled."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.codec = Scaled(autoencoder)

    def forward(self, image: Tensor, prompt: Tensor, task: Tensor) -> Tensor:
        return self.codec.encode(image)


class ClassDenoiser(nn.Module):
    """latent [B, C, h, w], timestep [B], class label [B] -> prediction [B, C, h, w]."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.dit, self.channels = dit, dit.config.channels

    def forward(self, latent: Tensor, timestep: Tensor, task: Tensor) -> Tensor:
        return self.dit(latent, timestep, task)[:, : self.channels]


def generator(
    kind: str, config: DiTConfig, state: State, noise: Noise, choices: Choices, summary: str, beside: Path | None = None
) -> Imported:
    """A class-conditional transformer: it has no task; its graphs can be asked raw, and stages can start from it.

    Raises InvalidInput for options that it has no use for, and for routing where the schedule has not 1000 timesteps.
    """
    choices.refuse("a generator, which has no tasks,", "spacing", "steps", "resolution")
    if config.experts is None:
        choices.refuse("a transformer without experts", "active")
    if config.routing is not None and noise.timesteps != 1000:
        raise InvalidInput(f"task routing is of 1000 timesteps, not of {noise.timesteps}", param="dtr")
    dit = filled(config, state)
    autoencoder = autoencoder_of(choices, beside)
    servable = None
    if autoencoder is not None:
        check_channels(autoencoder, config.channels)
        servable = Servable(
            ImageLatent(autoencoder),
            ClassDenoiser(dit),
            autoencoder,
            (),
            latent_of(autoencoder, config.patch),
            noise,
            Autoencoder.planes,
            tuple(range(config.labels)),
        ).eval()
    edge = config.grid * config.patch * 8
    said = {
        "model": asdict(config),
        "codec": asdict(codec_config(choices, beside)),
        "diffusion": asdict(diffusion_of(noise)),
        "classes": config.labels - 1,
        "size": [edge, edge],
    }
    facts = facts_of(summary, choices) | {"tasks": {}, "classes": config.labels}
    return Imported(kind, config, dict(dit.state_dict()), servable, facts, {"classes": said})


def perceiver(
    kind: str,
    config: DiTConfig,
    state: State,
    noise: Noise,
    choices: Choices,
    summary: str,
    tasks: dict[str, dict[str, Any]],
    coding: dict[str, dict[str, Any]],
) -> Imported:
    """A transformer that sees the latents of image and prompt. `tasks`: the card's; `coding`: for stages that go on."""
    dit = filled(config, state)
    autoencoder = autoencoder_of(choices)
    servable = None
    if autoencoder is not None:
        check_channels(autoencoder, config.channels)
        labels = [label for task in tasks.values() for label in (task["label"], *task.get("passes", ()))]
        servable = Servable(
            Conditioner(Scaled(autoencoder)),
            Denoiser(dit),
            autoencoder,
            (Spec(CONDITION, config.condition, autoencoder.stride),),
            latent_of(autoencoder, config.patch),
            noise,
            Autoencoder.planes,
            tuple(labels),
        ).eval()
    edge = config.grid * config.patch * 8
    said = PerceptionConfig(
        config,
        codec_config(choices),
        diffusion_of(noise),
        {task: facts["label"] for task, facts in tasks.items()},
        coding,
        (edge, edge),
    )
    facts = facts_of(summary, choices) | {"tasks": tasks}
    return Imported(kind, config, dict(dit.state_dict()), servable, facts, {"perception": asdict(said)})


def facts_of(summary: str, choices: Choices) -> dict[str, Any]:
    """What every imported card says."""
    training = {"data": ["imported: see where the weights come from"], "samples": 0, "wall_clock_s": 0.0}
    return {
        "summary": summary,
        "licence": choices.licence or UNKNOWN_LICENCE,
        "training": {**training, "device": "unknown"},
    }

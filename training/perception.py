"""A diffusion transformer as a perception model, the paper's way: the latents of image and prompt are concatenated in
front of the noisy latent of the answer.

The transformer (`training.models.dit.DiT`) is what is trained and what checkpoints hold. Everything around it is fixed
and said in `PerceptionConfig`, which rides in a run's config.json: codecs, the deviations of their latents, schedule,
labels, target codings.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.errors import InvalidInput
from training.codecs import Codec, CodecConfig, pictures_of, targets_of
from training.models.dit import DiT, DiTConfig
from training.objectives import DiffusionConfig, Uncertainty
from training.servable import Servable, Spec

if TYPE_CHECKING:
    from collections.abc import Mapping

CONDITION = "condition"
TASKS = ("depth", "flow", "amodal")
COND_PICTURES = 2
"""The image and its prompt (the next frame, the visible mask, or nothing)."""


@dataclass(frozen=True)
class PerceptionConfig:
    """`tasks`: the label of each task. `coding`: for each task the fields of its coding (`saccade.tasks`) that differ
    from their defaults. `size`: of the pictures (H, W) that it was trained on last."""

    model: DiTConfig
    codec: CodecConfig
    diffusion: DiffusionConfig
    tasks: dict[str, int]
    coding: dict[str, dict[str, Any]] = field(default_factory=dict)
    size: tuple[int, int] = (256, 256)

    def __post_init__(self) -> None:
        if strange := set(self.tasks) - set(TASKS):
            raise InvalidInput(
                f"no such task: {', '.join(sorted(strange))}; there are {', '.join(TASKS)}", param="tasks"
            )
        if any(not 0 <= label < self.model.labels for label in self.tasks.values()):
            raise InvalidInput(f"the labels {self.tasks} are not rows of a table of {self.model.labels}", param="tasks")


class WeightedDiT(DiT):
    """A DiT that learns the log-variance of its loss at every timestep beside it; `doubt` is the last forward's."""

    def __init__(self, config: DiTConfig, timesteps: int = 1000) -> None:
        super().__init__(config, timesteps)
        self.uncertainty = Uncertainty(timesteps)
        self.doubt: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.doubt = self.uncertainty(t)
        return super().forward(x, t, y)


def network(config: DiTConfig, diffusion: DiffusionConfig) -> DiT:
    """The transformer to train, with new weights; what its loss needs to learn beside it is a part of it."""
    kind = WeightedDiT if diffusion.weighting == "uncertainty" else DiT
    return kind(config, diffusion.timesteps)


def load_weights(dit: DiT, state: Mapping[str, Tensor]) -> None:
    """A checkpoint's weights into a transformer; the loss's own are left out where the transformer has none, and begin
    anew where the checkpoint has none. Raises ModelError that names what is missing, left over or of another shape."""
    from saccade.errors import ModelError

    own = dit.state_dict()
    given = {key: value for key, value in state.items() if key in own or not key.startswith("uncertainty.")}
    missing = [key for key in own if key not in given and not key.startswith("uncertainty.")]
    strange = [key for key in given if key not in own]
    wrong = [f"{key} {tuple(v.shape)}" for key, v in given.items() if key in own and v.shape != own[key].shape]
    for told, keys in (("lacks", missing), ("has what the model has not", strange), ("has of another shape", wrong)):
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            raise ModelError(f"the checkpoint {told}: {', '.join(keys[:5])}{more}")
    dit.load_state_dict(given, strict=False)


class Conditioner(nn.Module):
    """image, prompt [B, 3, H, W], task [B] -> their latents, concatenated [B, 2 C, h, w]."""

    def __init__(self, pictures: Codec) -> None:
        super().__init__()
        self.pictures = pictures

    def forward(self, image: Tensor, prompt: Tensor, task: Tensor) -> Tensor:
        return torch.cat([self.pictures.encode(image), self.pictures.encode(prompt)], 1)


class Denoiser(nn.Module):
    """The transformer as it is served: latent [B, C, h, w], timestep [B], task [B], condition -> prediction."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.dit, self.channels = dit, dit.config.channels

    def forward(self, latent: Tensor, timestep: Tensor, task: Tensor, condition: Tensor) -> Tensor:
        return self.dit(torch.cat([condition, latent], 1), timestep, task)[:, : self.channels]


class Decoder(nn.Module):
    """Latent [B, C, h, w] -> target picture [B, K, H, W]."""

    def __init__(self, targets: Codec) -> None:
        super().__init__()
        self.targets = targets

    def forward(self, latent: Tensor) -> Tensor:
        return self.targets.decode(latent)


class Perception(nn.Module):
    """A transformer between its codecs."""

    def __init__(self, config: PerceptionConfig, dit: DiT | None = None) -> None:
        super().__init__()
        self.config = config
        self.pictures, self.targets = pictures_of(config.codec), targets_of(config.codec)
        self.dit = dit or network(config.model, config.diffusion)
        wanted = COND_PICTURES * self.pictures.channels, self.targets.channels
        if (config.model.condition, config.model.channels) != wanted:
            raise InvalidInput(
                f"the codec wants a model of {wanted[0]} condition and {wanted[1]} channels, not "
                f"{config.model.condition} and {config.model.channels}",
                param="model",
            )

    @torch.no_grad()
    def encode(self, image: Tensor, prompt: Tensor, target: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures and coded targets -> condition [B, 2 C, h, w] and clean latent [B, C', h, w], float32."""
        self.pictures.to(image.device), self.targets.to(image.device)  # and not the transformer, which may be sharded
        with torch.autocast(image.device.type, enabled=False):
            condition = torch.cat([self.pictures.encode(image), self.pictures.encode(prompt)], 1)
            return condition, self.targets.encode(self.targets.planes_of(target, self.task_of(label)))

    def task_of(self, label: Tensor) -> Tensor:
        """Labels [B] -> places in `TASKS` [B]."""
        places = torch.zeros(self.config.model.labels, dtype=torch.long, device=label.device)
        for task, row in self.config.tasks.items():
            places[row] = TASKS.index(task)
        return places[label]

    def servable(self) -> Servable:
        from saccade.card import Latent, Noise

        config, process = self.config, self.config.diffusion
        stride = self.targets.stride
        latent = Latent(channels=self.targets.channels, stride=stride, scale=1.0, multiple=stride * config.model.patch)
        noise = Noise(
            schedule=process.schedule,
            timesteps=process.timesteps,
            zero_terminal_snr=process.zero_terminal_snr,
            beta_start=process.beta_start,
            beta_end=process.beta_end,
            prediction=process.prediction,
        )
        return Servable(
            Conditioner(self.pictures),
            Denoiser(self.dit),
            Decoder(self.targets),
            (Spec(CONDITION, config.model.condition, self.pictures.stride),),
            latent,
            noise,
            self.targets.planes,
            tuple(config.tasks.values()),
        ).eval()


def about(config: PerceptionConfig) -> dict[str, Any]:
    """The configuration as JSON holds it; `training.config.build` reads it back."""
    return asdict(config)

"""Train the default model: `python -m training.train CONFIG.toml [--out DIR]`, or the same under torchrun.

One step draws the same number of samples of every task at one size, encodes them, and denoises each from several noise
levels at once, so that the encoder's work is paid once (as it is when serving). A killed run goes on from its last
checkpoint with the same command (`training.loop`).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from saccade.errors import InvalidInput, ModelError, SaccadeError
from saccade.repository import Repository
from saccade.schedule import NoiseSchedule
from saccade.tasks import DepthCoding
from training import weights
from training.data import Batch, Scenes
from training.loop import Loop, LoopConfig, Objective, Progress, checkpoint
from training.losses import Seen, denoising_error, see
from training.models.codec import DCTCodec
from training.models.perceiver import TASKS, Config, Model

log = logging.getLogger(__name__)
STAGE = "train"
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Stage:
    """`steps` steps on pictures of one of `sizes` (H, W), `per_task` samples of each task a step (one number for all or
    one for each), `draws` noise levels a sample; the learning rate falls from `lr` to `lr_end` along a cosine."""

    steps: int
    sizes: tuple[tuple[int, int], ...]
    per_task: int | dict[str, int]
    lr: float
    lr_end: float
    draws: int = 2

    def samples(self, task: str) -> int:
        return self.per_task[task] if isinstance(self.per_task, dict) else self.per_task


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on but the shards.

    `start`: a model repository whose weights the run begins with; what is new in the network begins as it always does.
    `shift`: how much the draw of timesteps leans to the noisy ones. `own_weight`, `own_l1`: of the encoder's own
    estimate, which is compared pixel by pixel (L1) or latent by latent (squares). `unroll`: share of the samples whose
    noisy latent is made of the model's own answer from pure noise in place of the truth, as it will be when serving.
    `depth_knee`: of the depth code (`saccade.tasks.DepthCoding`; 0: linear); the card must say the same.
    """

    scenes: str
    stages: tuple[Stage, ...]
    start: str = ""
    real: tuple[str, ...] = ()
    real_share: float = 0.1
    in_front: float = 0.25
    seed: int = 0
    schedule: str = "cosine"
    zero_terminal_snr: bool = True
    shift: float = 2.5
    ema: float = 0.9995
    warmup: int = 300
    weight_decay: float = 0.02
    task_weights: dict[str, float] = field(default_factory=lambda: {"depth": 1.5, "flow": 4.0, "amodal": 0.6})
    own_weight: float = 1.0
    own_l1: bool = True
    unroll: float = 0.5
    matching_weight: float = 1.0
    depth_knee: float = 0.2
    bf16: bool = True
    accumulate: int = 1
    compile: bool = False
    checkpoint_s: float = 240
    model: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Raises InvalidInput for what is no recipe."""
        try:
            return cls.from_table(tomllib.loads(path.read_text()))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InvalidInput(f"{path}: {error}", param="recipe") from None

    @classmethod
    def from_table(cls, raw: dict[str, Any]) -> Recipe:
        """What TOML or JSON holds. Raises InvalidInput for a name that no recipe has."""
        raw = dict(raw)
        try:
            stages = tuple(Stage(**{**s, "sizes": tuple(tuple(x) for x in s["sizes"])}) for s in raw.pop("stages"))
            return cls(stages=stages, **{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})
        except KeyError as error:
            raise InvalidInput(f"a recipe needs {error.args[0]}", param=str(error.args[0])) from None
        except TypeError as error:
            raise InvalidInput(f"not a recipe: {error}", param="recipe") from None

    @property
    def noise(self) -> NoiseSchedule:
        return NoiseSchedule(self.schedule, 1000, self.zero_terminal_snr)  # type: ignore[arg-type]

    def at(self, step: int) -> tuple[Stage, float]:
        """The stage of a step and the learning rate there; past the end, the last stage's."""
        begun = 0
        for stage in self.stages[:-1]:
            if step < begun + stage.steps:
                break
            begun += stage.steps
        else:
            stage = self.stages[-1]
        share = min(1.0, (step - begun) / stage.steps)
        lr = stage.lr_end + (stage.lr - stage.lr_end) * (1 + np.cos(np.pi * share)) / 2
        return stage, float(lr * min(1.0, (step + 1) / max(1, self.warmup)))

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def loop(self) -> LoopConfig:
        """How the loop runs it; rates and rows are the stages' own."""
        return LoopConfig(
            steps=self.steps,
            batch=sum(self.stages[0].samples(task) for task in TASKS),
            accumulate=self.accumulate,
            weight_decay=self.weight_decay,
            betas=(0.9, 0.98),
            ema=self.ema,
            seed=self.seed,
            bf16=self.bf16,
            compile=self.compile,
            checkpoint_s=self.checkpoint_s,
        )

    def open_scenes(self) -> Scenes:
        """Raises FileNotFoundError where there are none."""
        real, coding = tuple(Path(p) for p in self.real), DepthCoding(knee=self.depth_knee or None)
        return Scenes(Path(self.scenes), real, self.real_share, self.seed, self.in_front, coding)


def begin(model: Model, repository: Repository) -> None:
    """Give the model the weights of an exported one."""
    card = repository.card(repository.default())
    weights.read(repository.graph(card.encoder), model.encoder, partial=True)
    weights.read(repository.graph(card.name), model.denoiser, partial=True)


def measure_latent_std(scenes: Scenes, codec: DCTCodec, size: tuple[int, int] = (128, 128)) -> tuple[float, ...]:
    """Root mean square of every latent channel over 64 targets of each task."""
    latents = [codec.encode(torch.from_numpy(scenes.batch(0, task, 64, size).target)) for task in TASKS]
    return tuple(torch.cat(latents).pow(2).mean((0, 2, 3)).sqrt().clamp(min=0.03).tolist())


class Learner(Model):
    """The model, with a forward that lets a step ask it several things at once: a sharded model gathers what the
    encoder and the denoiser do not keep in `blocks` on its way into its forward, and only there."""

    def forward(self, ask: Callable[[Model], Answer]) -> Answer:
        return ask(self)


class Perceive(Objective):
    """All three tasks at once, of a recipe."""

    def __init__(self, recipe: Recipe, model: Learner, scenes: Scenes) -> None:
        self.recipe, self.model, self.scenes = recipe, model, scenes
        self.seen: tuple[Seen, ...] = ()

    def batch(self, step: int, part: int, parts: int) -> dict[str, Batch]:
        stage, _ = self.recipe.at(step)
        size = stage.sizes[int(np.random.default_rng([self.recipe.seed, step]).integers(len(stage.sizes)))]
        counts = {task: stage.samples(task) for task in TASKS}
        if odd := [task for task, count in counts.items() if count % parts]:
            raise InvalidInput(f"{counts[odd[0]]} samples of {odd[0]} do not come to {parts} equal parts")
        row = step * parts + part
        return {task: self.scenes.batch(row, task, count // parts, size) for task, count in counts.items()}

    def rows(self, step: int) -> int:
        stage, _ = self.recipe.at(step)
        return sum(stage.samples(task) for task in TASKS)

    def rate(self, step: int) -> float:
        return self.recipe.at(step)[1]

    def loss(
        self, model: Callable[..., Any], batch: dict[str, Batch], generator: torch.Generator, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Beside the loss: the denoiser's by task, the encoder's own estimate's, the matcher's."""
        recipe, (stage, _) = self.recipe, self.recipe.at(step)

        def ask(model: Model) -> tuple[Tensor, Tensor, Seen]:
            seen = see(model, batch, recipe.task_weights, recipe.own_l1)
            noise = (stage.draws, recipe.shift, recipe.unroll, generator)
            return *denoising_error(model, recipe.noise, seen, *noise), seen

        error, y, seen = model(ask)
        self.seen = (*self.seen, Seen(*(rows.detach() for rows in seen)))
        parts = {task: error[y == TASKS.index(task)].mean() for task in batch}
        loss = error.mean() + recipe.own_weight * seen.own + recipe.matching_weight * seen.matching
        return loss, {**parts, "own": seen.own, "matching": seen.matching}

    def after(self, model: Any, step: int) -> None:
        """Keep up the denoiser's idea of how wrong the encoder's estimates are, over all parts."""
        estimate, latent, weight, y = (
            torch.cat([getattr(seen, name) for seen in self.seen]) for name in ("estimate", "latent", "weight", "y")
        )
        self.seen, denoiser = (), self.model.denoiser
        denoiser.learn_doubt(estimate - latent, weight, y)
        if dist.is_initialized():
            dist.all_reduce(denoiser.doubt)
            denoiser.doubt /= dist.get_world_size()


class Run:
    """A recipe's run in a folder."""

    def __init__(self, recipe: Recipe, out: Path, device: str | None = None, scenes: Scenes | None = None) -> None:
        self.recipe, self.out = recipe, out
        scenes = scenes or recipe.open_scenes()
        started = (out / checkpoint.CONFIG).exists()
        if started:
            check_same(recipe, checkpoint.read_config(out))
        std = latent_std(checkpoint.read_config(out)) if started else measure_latent_std(scenes, DCTCodec())
        torch.manual_seed(recipe.seed)
        self.model = Learner(Config(latent_channels=len(std), latent_std=std, **recipe.model), recipe.noise)
        if recipe.start and not started:
            begin(self.model, Repository(Path(recipe.start)))
        self.model.encoder.to(memory_format=torch.channels_last)
        self.objective = Perceive(recipe, self.model, scenes)
        about = {"recipe": asdict(recipe), "latent_std": list(std)}
        self.loop = Loop(self.objective, recipe.loop, out, STAGE, about, device)

    def train(self) -> Progress:
        """To the end. Raises what `Loop.run` does."""
        return self.loop.run()


def check_same(recipe: Recipe, config: dict[str, Any]) -> None:
    """Raises InvalidInput that names the field in which a run's configuration is of another model."""
    begun, asked = config["about"].get("recipe", {}), json.loads(json.dumps(asdict(recipe)))
    for name in ("model", "schedule", "zero_terminal_snr", "depth_knee"):
        if name in begun and begun[name] != asked[name]:
            raise InvalidInput(
                f"the run was begun with {name} = {begun[name]}, not {asked[name]}: begin another folder", param=name
            )


def latent_std(config: dict[str, Any]) -> tuple[float, ...]:
    """Of a run's configuration. Raises ModelError where it has none."""
    std = config["about"].get("latent_std")
    if not isinstance(std, list) or not all(isinstance(value, float | int) for value in std):
        raise ModelError("the run's configuration has no latent_std: it is not a run of the default model")
    return tuple(std)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="train the default model")
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/default"))
    parser.add_argument("--threads", type=int, default=0, help="0: every core this process may use")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1; CUDA where it is")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    Run(Recipe.read(args.config), args.out, args.device).train()


if __name__ == "__main__":
    try:
        main()
    except SaccadeError as error:
        sys.stderr.write(f"train: {error}\n")
        raise SystemExit(2 if isinstance(error, InvalidInput) else 1) from error

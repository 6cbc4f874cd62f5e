"""Train the default model: `python -m training.train CONFIG.toml [--out DIR]`.

One step draws the same number of samples of every task at one size, encodes them, and denoises each from several noise
levels at once, so that the encoder's work is paid once (as it is when serving). A killed run goes on from its last
checkpoint with the same command.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
import tomllib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saccade.repository import Repository
from saccade.schedule import NoiseSchedule
from saccade.tasks import DepthCoding
from training import weights
from training.data import Batch, Scenes
from training.losses import Seen, denoising_error, see
from training.models.codec import DCTCodec
from training.models.perceiver import TASKS, Config, Model

log = logging.getLogger(__name__)


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
    checkpoint_s: float = 240
    model: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Recipe:
        return cls.from_table(tomllib.loads(path.read_text()))

    @classmethod
    def from_table(cls, raw: dict[str, Any]) -> Recipe:
        """What TOML holds. Raises TypeError for a name that no recipe has."""
        raw = dict(raw)
        stages = tuple(Stage(**{**s, "sizes": tuple(tuple(x) for x in s["sizes"])}) for s in raw.pop("stages"))
        return cls(stages=stages, **{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})

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


def begin(model: Model, repository: Repository) -> None:
    """Give the model the weights of an exported one."""
    card = repository.card(repository.default())
    weights.read(repository.graph(card.encoder), model.encoder, partial=True)
    weights.read(repository.graph(card.name), model.denoiser, partial=True)


def measure_latent_std(scenes: Scenes, codec: DCTCodec, size: tuple[int, int] = (128, 128)) -> tuple[float, ...]:
    """Root mean square of every latent channel over 64 targets of each task."""
    latents = [codec.encode(torch.from_numpy(scenes.batch(0, task, 64, size).target)) for task in TASKS]
    return tuple(torch.cat(latents).pow(2).mean((0, 2, 3)).sqrt().clamp(min=0.03).tolist())


class Run:
    """A training run in a folder: checkpoint.pt, log.jsonl."""

    def __init__(self, recipe: Recipe, out: Path, device: str = "cpu") -> None:
        self.recipe, self.out, self.device = recipe, out, torch.device(device)
        out.mkdir(parents=True, exist_ok=True)
        self.scenes = self.open_scenes()
        torch.manual_seed(recipe.seed)
        state = self.load()
        std = state["latent_std"] if state else measure_latent_std(self.scenes, DCTCodec())
        config = Config(latent_channels=len(std), latent_std=tuple(std), **recipe.model)
        self.model, self.average = Model(config, recipe.noise), Model(config, recipe.noise)
        if recipe.start and not state:
            begin(self.model, Repository(Path(recipe.start)))
        self.average.load_state_dict(self.model.state_dict())
        for model in (self.model, self.average):
            model.to(self.device)
        self.model.encoder.to(memory_format=torch.channels_last)
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        rest = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        self.step, self.seconds, self.samples = 0, 0.0, 0
        if state:
            self.resume(state)

    def open_scenes(self) -> Scenes:
        recipe = self.recipe
        real, coding = tuple(Path(p) for p in recipe.real), DepthCoding(knee=recipe.depth_knee or None)
        return Scenes(Path(recipe.scenes), real, recipe.real_share, recipe.seed, recipe.in_front, coding)

    def load(self) -> dict[str, Any] | None:
        path = self.out / "checkpoint.pt"
        return torch.load(path, weights_only=True, map_location=self.device) if path.exists() else None

    def resume(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.samples = state["step"], state["seconds"], state["samples"]
        log.info("resumed at step %d", self.step)

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "latent_std": list(self.model.config.latent_std),
            "step": self.step,
            "seconds": self.seconds,
            "samples": self.samples,
        }
        draft = self.out / "checkpoint.part"
        torch.save(state, draft)
        os.replace(draft, self.out / "checkpoint.pt")
        self.scenes = self.open_scenes()  # shards may have been added

    def draw(self, step: int) -> tuple[Stage, dict[str, Batch]]:
        stage, _ = self.recipe.at(step)
        size = stage.sizes[int(np.random.default_rng([self.recipe.seed, step]).integers(len(stage.sizes)))]
        return stage, {task: self.scenes.batch(step, task, stage.samples(task), size) for task in TASKS}

    def train(self) -> None:
        saved = time.monotonic()
        with ThreadPoolExecutor(1) as ahead:
            coming: Future[tuple[Stage, dict[str, Batch]]] = ahead.submit(self.draw, self.step)
            while self.step < self.recipe.steps:
                began = time.monotonic()
                stage, batches = coming.result()
                coming = ahead.submit(self.draw, self.step + 1)
                losses = self.update(stage, batches)
                self.seconds += time.monotonic() - began
                if self.step % 20 == 0:
                    self.report(losses)
                if time.monotonic() - saved > self.recipe.checkpoint_s:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def update(self, stage: Stage, batches: dict[str, Batch]) -> dict[str, float]:
        _, lr = self.recipe.at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            loss, losses, seen = self.loss(stage, batches)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.step}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        length = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not torch.isfinite(length):
            raise FloatingPointError(f"the gradient's length is {length} at step {self.step}")
        self.optimizer.step()
        self.model.denoiser.learn_doubt(seen.estimate - seen.latent, seen.weight, seen.y)
        decay = min(self.recipe.ema, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            mine, theirs = list(self.average.parameters()), list(self.model.parameters())
            torch._foreach_lerp_(mine, theirs, 1 - decay)
            self.average.denoiser.doubt.copy_(self.model.denoiser.doubt)
        self.step += 1
        self.samples += sum(stage.samples(task) for task in batches)
        return losses

    def loss(self, stage: Stage, batches: dict[str, Batch]) -> tuple[Tensor, dict[str, float], Seen]:
        """The step's loss, its parts (the denoiser's by task, the encoder's own estimate, the matcher) and its rows."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.step)
        seen = see(self.model, batches, recipe.task_weights, recipe.own_l1)
        error, y = denoising_error(self.model, recipe.noise, seen, stage.draws, recipe.shift, recipe.unroll, generator)
        losses = {task: float(error[y == TASKS.index(task)].detach().mean()) for task in batches}
        losses |= {"own": float(seen.own.detach()), "matching": float(seen.matching.detach())}
        return error.mean() + recipe.own_weight * seen.own + recipe.matching_weight * seen.matching, losses, seen

    def report(self, losses: dict[str, float]) -> None:
        row = {"step": self.step, "samples": self.samples, "seconds": round(self.seconds, 1), **losses}
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        parts = " ".join(f"{k} {v:.4f}" for k, v in losses.items())
        log.info("step %d/%d %s %.1f samples/s", self.step, self.recipe.steps, parts, self.samples / self.seconds)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="train the default model")
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/default"))
    parser.add_argument("--threads", type=int, default=0, help="0: every core this process may use")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    recipe = Recipe.read(args.config)
    run = Run(recipe, args.out, args.device)
    (args.out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1))
    run.train()


if __name__ == "__main__":
    main()

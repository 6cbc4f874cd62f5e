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
from torch.nn import functional as F

from saccade.schedule import NoiseSchedule
from saccade.tasks import FlowCoding
from training.data import Batch, Scenes
from training.models.codec import DCTCodec
from training.models.perceiver import TASKS, Config, Denoiser, Encoder, Motion

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """`steps` steps on pictures of one of `sizes` (H, W), `per_task` samples of each task a step, `draws` noise levels
    a sample; the learning rate falls from `lr` to `lr_end` along a cosine."""

    steps: int
    sizes: tuple[tuple[int, int], ...]
    per_task: int
    lr: float
    lr_end: float
    draws: int = 2


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on but the shards."""

    scenes: str
    stages: tuple[Stage, ...]
    real: tuple[str, ...] = ()
    real_share: float = 0.1
    seed: int = 0
    schedule: str = "cosine"
    zero_terminal_snr: bool = True
    shift: float = 2.5
    ema: float = 0.9995
    warmup: int = 300
    weight_decay: float = 0.02
    task_weights: dict[str, float] = field(default_factory=lambda: {"depth": 1.5, "flow": 4.0, "amodal": 0.6})
    own_weight: float = 1.0
    matching_weight: float = 1.0
    bf16: bool = True
    checkpoint_s: float = 240
    model: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Recipe:
        raw = tomllib.loads(path.read_text())
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


class Model(nn.Module):
    """Encoder and denoiser, trained together; the codec is fixed."""

    def __init__(self, config: Config, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.denoiser = Denoiser(config, torch.tensor(schedule.alphas_cumprod))
        self.codec = DCTCodec()


def measure_latent_std(scenes: Scenes, codec: DCTCodec, size: tuple[int, int] = (128, 128)) -> tuple[float, ...]:
    """Root mean square of every latent channel over 64 targets of each task."""
    latents = [codec.encode(torch.from_numpy(scenes.batch(0, task, 64, size).target)) for task in TASKS]
    return tuple(torch.cat(latents).pow(2).mean((0, 2, 3)).sqrt().clamp(min=0.03).tolist())


def timesteps(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Stratified draws of 0 .. 999, [count] int64, more of them noisy.

    u -> shift u / (1 + (shift - 1) u) (Esser et al. 2403.03206, eq. 23).
    """
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    t = shift * u / (1 + (shift - 1) * u)
    return (t * 1000).long().clamp(max=999)[torch.randperm(count, generator=generator)]


def loss_of(
    model: Model, batches: dict[str, Batch], recipe: Recipe, stage: Stage, step: int
) -> tuple[Tensor, dict[str, float]]:
    """The step's loss and its parts: the denoiser's by task, the encoder's own estimate, the matcher."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    contexts, details, latents, weights = [], [], [], []
    own, matching = torch.zeros(()), torch.zeros(())
    for task, batch in batches.items():
        target, weight = torch.from_numpy(batch.target), torch.from_numpy(batch.weight) * recipe.task_weights[task]
        pictures = (torch.from_numpy(p) for p in (batch.image, batch.prompt))
        image, prompt = (p.contiguous(memory_format=torch.channels_last) for p in pictures)
        context, detail, motion = model.encoder.of_task(image, prompt, task)
        latent = model.codec.encode(target)
        estimate = detail[:, model.config.detail :].float()
        own = own + (((estimate - latent) ** 2).sum(1) * weight).mean() / len(batches)
        if motion is not None:
            matching = matching_loss(motion, target[:, :2], max(image.shape[-2:]))
        contexts.append(context)
        details.append(detail)
        latents.append(latent)
        weights.append(weight)
    n = stage.draws
    z0, c, d, w = (torch.cat(parts).repeat_interleave(n, 0) for parts in (latents, contexts, details, weights))
    y = torch.tensor([TASKS.index(task) for task in batches]).repeat_interleave(stage.per_task * n)
    t = torch.cat([timesteps(stage.per_task * n, recipe.shift, generator) for _ in batches])
    abar = torch.tensor(recipe.noise.alphas_cumprod).float()[t][:, None, None, None]
    noise = torch.randn(z0.shape, generator=generator)
    v = abar.sqrt() * noise - (1 - abar).sqrt() * z0
    predicted = model.denoiser(abar.sqrt() * z0 + (1 - abar).sqrt() * noise, t, y, c, d)
    error = ((predicted.float() - v) ** 2).sum(1) * w
    losses = {task: float(error[y == TASKS.index(task)].detach().mean()) for task in batches}
    losses |= {"own": float(own.detach()), "matching": float(matching.detach())}
    return error.mean() + recipe.own_weight * own + recipe.matching_weight * matching, losses


def matching_loss(motion: Motion, coded: Tensor, longer_edge: int) -> Tensor:
    """What the matcher should have found: the true places' likelihood, and L1 of the local reading."""
    far = unlikelihood(motion.log_match, flow_in_cells(coded, longer_edge))
    near = (motion.coded.float() - F.avg_pool2d(coded, 4)).abs().mean()
    return 0.2 * far + near


def flow_in_cells(coded: Tensor, longer_edge: int) -> Tensor:
    """Coded flow [B, 2, H, W] -> displacement [B, 2, H/8, W/8] in eighth-cells."""
    cells, coding = F.avg_pool2d(coded, 8), FlowCoding()
    share = torch.expm1(cells.abs() * np.log1p(coding.reach / coding.knee)) * coding.knee
    return cells.sign() * share * longer_edge / 8


def unlikelihood(log_match: Tensor, flow: Tensor) -> Tensor:
    """Mean negative log-probability [B, N, N] of where cells went by flow [B, 2, h, w]; the four cells around a place
    share it bilinearly, and cells that leave the picture do not count."""
    height, width = flow.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    to_x, to_y = (x + flow[:, 0]).flatten(1), (y + flow[:, 1]).flatten(1)
    stays = (to_x >= 0) & (to_x <= width - 1) & (to_y >= 0) & (to_y <= height - 1)
    total = torch.zeros_like(to_x)
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        at_x, at_y = (to_x.floor() + dx).clamp(0, width - 1), (to_y.floor() + dy).clamp(0, height - 1)
        share = (1 - (to_x - at_x).abs()).clamp(min=0) * (1 - (to_y - at_y).abs()).clamp(min=0)
        total = total + share * log_match.gather(2, (at_y * width + at_x).long()[..., None])[..., 0]
    return -(total * stays).sum() / stays.sum().clamp(min=1)


class Run:
    """A training run in a folder: checkpoint.pt, log.jsonl."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self.recipe, self.out = recipe, out
        out.mkdir(parents=True, exist_ok=True)
        self.scenes = self.open_scenes()
        torch.manual_seed(recipe.seed)
        state = self.load()
        std = state["latent_std"] if state else measure_latent_std(self.scenes, DCTCodec())
        config = Config(latent_channels=len(std), latent_std=tuple(std), **recipe.model)
        self.model, self.average = Model(config, recipe.noise), Model(config, recipe.noise)
        self.average.load_state_dict(self.model.state_dict())
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
        return Scenes(Path(recipe.scenes), tuple(Path(p) for p in recipe.real), recipe.real_share, recipe.seed)

    def load(self) -> dict[str, Any] | None:
        path = self.out / "checkpoint.pt"
        return torch.load(path, weights_only=True) if path.exists() else None

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
        return stage, {task: self.scenes.batch(step, task, stage.per_task, size) for task in TASKS}

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
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
            loss, losses = loss_of(self.model, batches, self.recipe, stage, self.step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.step}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        length = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not torch.isfinite(length):
            raise FloatingPointError(f"the gradient's length is {length} at step {self.step}")
        self.optimizer.step()
        decay = min(self.recipe.ema, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            mine, theirs = list(self.average.parameters()), list(self.model.parameters())
            torch._foreach_lerp_(mine, theirs, 1 - decay)
        self.step += 1
        self.samples += stage.per_task * len(batches)
        return losses

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
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    recipe = Recipe.read(args.config)
    run = Run(recipe, args.out)
    (args.out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1))
    run.train()


if __name__ == "__main__":
    main()

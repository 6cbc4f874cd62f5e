"""Training speed of the default model: samples a second, and the share of the machine's matrix-product rate.

    python -m bench.training training/configs/saccade-s-3.toml [--threads 2] [--device cpu] [--steps 8]

One run measures both sides, turn about: steps of every size of the recipe's stages on batches of noise (reading scenes
is done ahead, in a thread of its own, and not counted), and square matrix products in the recipe's precision.
Operations are counted by torch's own counter over a whole step: forwards, backwards, and the unrolling without
gradient. What the counter does not know (normalisation, activations, lookups, fused attention on the CPU) counts as
nothing, so the share is a lower bound.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.machine import describe
from training.data import Batch, Scenes
from training.models.perceiver import TASKS
from training.train import Recipe, Run

EDGE = 2048


class Noise(Scenes):
    """Batches of the right shapes: what is in them does not change how long they take."""

    def __init__(self) -> None:
        """Reads nothing."""

    def batch(self, step: int, task: str, count: int, size: tuple[int, int]) -> Batch:
        target = np.random.default_rng(step).uniform(-1, 1, (count, 4, *size)).astype(np.float32)
        return Batch(target[:, :3], target[:, :3], target, np.ones((count, size[0] // 8, size[1] // 8), np.float32))


class Bare(Run):
    """A run on noise."""

    def open_scenes(self) -> Scenes:
        return Noise()


def seconds(work: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


class Operations(TorchDispatchMode):
    """Counts by torch's own formulas, without its module tracker, which does not bear the unrolling."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        return out


def operations(work: Callable[[], object]) -> int:
    with Operations() as counted:
        work()
    return counted.total


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="training speed against the machine's matrix-product rate")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of every size, each beside a matrix product")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    recipe = Recipe.read(args.recipe)
    kind = torch.bfloat16 if recipe.bf16 else torch.float32
    one, two = (torch.randn(EDGE, EDGE, device=args.device).to(kind) for _ in range(2))
    print(f"{describe()}, {args.threads} threads, {args.device}, {str(kind).removeprefix('torch.')}\n")
    print("| size | samples a step | GFLOP a sample | samples/s | GFLOP/s | matrix product, GFLOP/s | share |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        run = Bare(Recipe(**{**vars(recipe), "start": ""}), Path(folder), args.device)
        for stage in recipe.stages:
            for size in dict.fromkeys(stage.sizes):
                batches = {task: run.scenes.batch(0, task, stage.samples(task), size) for task in TASKS}
                total = operations(lambda s=stage, b=batches: run.update(s, b))
                steps, products = [], []
                for _ in range(args.steps + 2):
                    steps.append(seconds(lambda s=stage, b=batches: run.update(s, b), args.device))
                    products.append(seconds(lambda: one @ two, args.device))
                step, product = float(np.median(steps[2:])), float(np.median(products[2:]))
                rows = sum(len(b.image) for b in batches.values())
                rate, roof = total / step / 1e9, 2 * EDGE**3 / product / 1e9
                print(
                    f"| {size[1]} x {size[0]} | {rows} | {total / rows / 1e9:.1f} | {rows / step:.1f} | {rate:.0f} | "
                    f"{roof:.0f} | {rate / roof:.0%} |"
                )


if __name__ == "__main__":
    main()

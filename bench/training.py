"""Training speed of the default model: samples a second, and the share of the machine's matrix-product rate.

    python -m bench.training training/configs/saccade-s-3.toml [--threads 2] [--device cpu] [--steps 8]

One run measures both sides, turn about: steps of every size of the recipe's stages on batches of noise (reading scenes
is done ahead, in a thread of its own, and not counted), and square matrix products in the recipe's precision.
Operations are counted over a whole step, as the loop's MFU is (`training.loop.speed`): forwards, backwards, and the
unrolling without gradient. Normalisation, activations and lookups count as nothing, so the share is a lower bound.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.machine import describe
from training.data import Batch, Scenes
from training.loop.speed import operations
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


def seconds(work: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def starts(recipe: Recipe) -> list[int]:
    """The first step of every stage."""
    return [sum(stage.steps for stage in recipe.stages[:place]) for place in range(len(recipe.stages))]


def advance(run: Run, step: int, batches: dict[str, Batch]) -> None:
    """One step of the loop, as if it stood at `step`."""
    run.loop.step = step
    run.loop.advance([(0, batches)])


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
        run = Run(replace(recipe, start=""), Path(folder), args.device, Noise())
        for begun, stage in zip(starts(recipe), recipe.stages, strict=True):
            for size in dict.fromkeys(stage.sizes):
                batches = {task: Noise().batch(0, task, stage.samples(task), size) for task in TASKS}
                work = partial(advance, run, begun, batches)
                work()  # and the loop has counted for itself
                total = operations(work)
                steps, products = [], []
                for _ in range(args.steps + 2):
                    steps.append(seconds(work, args.device))
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

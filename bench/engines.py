"""Which engine should be the CPU's default: milliseconds and error of each, for the three graphs of a model.

    python -m bench.engines [--repository model_repository] [--edge 256] [--rounds 30] [--out docs/engines.md]

Every engine runs alone in a process of its own, because idle thread pools of one slow the next; engines take turns, two
blocks of forwards each at batch 1, and medians are printed. Error: root mean square of the difference from eager torch
in fp32, relative to the output's deviation, on Gaussian inputs. "Fixed size": as with the server's setting `ratios`.
The encoder is asked for two tasks: exported, it leaves out what matches two frames where no flow is wanted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from bench.machine import describe
from saccade.backends.engines import default_threads, has_bf16, open_engine
from saccade.repository import Repository, find_repository
from saccade.tasks import TaskName
from training.backend import TorchBackend
from training.servable import Part

Feeds = dict[str, np.ndarray]
Outputs = list[np.ndarray]
Runner = Callable[[Feeds], Outputs]

EAGER = ("torch eager", "fp32")
FIXED = ", fixed size"
BLOCKS, WARM_UP = 2, 5
GRAPHS: list[tuple[Part, TaskName | None]] = [
    ("encoder", "depth"), ("encoder", "flow"), ("denoiser", None), ("decoder", None)
]  # fmt: skip
"""And the task that they are asked for, where that matters."""


def engines() -> list[tuple[str, str]]:
    """Engine and precision of every candidate that this machine can run, eager torch first."""
    precisions = ("fp32", "bf16") if has_bf16() else ("fp32",)
    openvino = [("openvino", precision + size) for precision in precisions for size in ("", FIXED)]
    return [EAGER, ("onnxruntime", "fp32"), *openvino]


def block(
    path: Path, part: Part, task: TaskName | None, engine: tuple[str, str], edge: int, count: int
) -> tuple[list[float], Outputs]:
    """Milliseconds of `count` forwards of one graph, and what they answered. Runs in a process of its own."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    repository = Repository(path)
    backend = TorchBackend.load(repository)
    inputs = backend.servable.examples(1, edge, edge, seed=0)[part]
    feeds = {name: value.numpy() for name, value in zip(backend.servable.names[part][0], inputs, strict=True)}
    if task is not None:
        feeds["task"][:] = backend.card.tasks[task].label
    run = eager(backend, part) if engine == EAGER else compiled(repository, backend, part, *engine, feeds)
    for _ in range(WARM_UP):
        outputs = run(feeds)
    times = []
    for _ in range(count):
        began = time.perf_counter()
        run(feeds)
        times.append((time.perf_counter() - began) * 1e3)
    return times, outputs


def eager(backend: TorchBackend, part: Part) -> Runner:
    module = backend.servable.module(part)

    def run(feeds: Feeds) -> Outputs:
        with torch.inference_mode():
            outputs = module(*(torch.from_numpy(value) for value in feeds.values()))
        return [o.numpy() for o in (outputs if isinstance(outputs, tuple) else (outputs,))]

    return run


def compiled(
    repository: Repository, backend: TorchBackend, part: Part, engine: str, precision: str, feeds: Feeds
) -> Runner:
    card = backend.card
    name = {"encoder": card.encoder, "denoiser": card.name, "decoder": card.decoder}[part]
    opened = open_engine(repository.graph(name), engine, precision.removesuffix(FIXED), default_threads())
    if precision.endswith(FIXED):
        opened.specialise({name: value.shape for name, value in feeds.items()})

    def run(feeds: Feeds) -> Outputs:
        outputs = opened.run(feeds)
        return [outputs[output] for output in backend.servable.names[part][1]]

    return run


def alone(*given: object) -> tuple[list[float], Outputs]:
    """`block` in a fresh process."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(block, given)


def measure(
    path: Path, part: Part, task: TaskName | None, edge: int, rounds: int
) -> dict[tuple[str, str], tuple[float, float]]:
    """Engine -> median milliseconds, relative error."""
    times: dict[tuple[str, str], list[float]] = {engine: [] for engine in engines()}
    outputs: dict[tuple[str, str], Outputs] = {}
    for _ in range(BLOCKS):
        for engine in engines():
            took, outputs[engine] = alone(path, part, task, engine, edge, -(-rounds // BLOCKS))
            times[engine] += took
    return {e: (statistics.median(times[e]), error(outputs[e], outputs[EAGER])) for e in engines()}


def error(outputs: Outputs, expected: Outputs) -> float:
    return max(float(np.sqrt(np.mean((a - b) ** 2)) / b.std()) for a, b in zip(outputs, expected, strict=True))


def bench(path: Path, edge: int, rounds: int) -> str:
    repository = Repository(path)
    card = repository.card(repository.default())
    rows = []
    for part, task in GRAPHS:
        found, asked = measure(path, part, task, edge, rounds), part if task is None else f"{part}, {task}"
        slowest = found[EAGER][0]
        for engine, (ms, off) in found.items():
            rows.append(f"| {asked} | {' '.join(engine)} | {ms:.1f} | {slowest / ms:.2f} | {off:.1e} |")
    return "\n".join(
        [
            f"Model {card.name} ({card.digest[:12]}), {edge} x {edge} px, batch 1, medians of {rounds} forwards.",
            f"Machine: {describe('onnxruntime', 'openvino', 'torch')}.",
            "",
            "| graph | engine | ms | times as fast as eager torch | relative error |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="engines side by side")
    parser.add_argument("--repository", type=Path)
    parser.add_argument("--edge", type=int, default=256, help="pixels, a multiple of 16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    table = bench(find_repository(args.repository), args.edge, args.rounds)
    sys.stdout.write(table + "\n")
    if args.out:
        args.out.write_text(f"# Engines side by side\n\nMade by `python -m bench.engines`.\n\n{table}\n")


if __name__ == "__main__":
    main()

"""Which engine should be the CPU's default: milliseconds and error of each, for the three graphs of a model.

    python -m bench.engines [--repository model_repository] [--edge 256] [--rounds 30] [--out docs/engines.md]

Engines take turns, one forward each a round, at batch 1; medians are printed. Error: root mean square of the difference
from eager torch in fp32, relative to the output's deviation, on Gaussian inputs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from bench.machine import describe
from saccade.backends.engines import default_threads, has_bf16, open_engine
from saccade.card import Card
from saccade.repository import Repository, find_repository
from training.backend import TorchBackend
from training.export import NAMES, examples

Feeds = dict[str, np.ndarray]
Runner = Callable[[Feeds], list[np.ndarray]]


def runners(repository: Repository, card: Card, backend: TorchBackend, part: str) -> dict[str, Runner]:
    """Every engine that this machine can run, by name; eager torch first."""
    torch_model = backend.model
    model, module = {
        "encoder": (card.encoder, torch_model.encoder),
        "denoiser": (card.name, torch_model.denoiser),
        "decoder": (card.decoder, torch_model.codec),
    }[part]
    kinds = [("onnxruntime", "fp32"), ("openvino", "fp32"), *([("openvino", "bf16")] if has_bf16() else [])]
    made: dict[str, Runner] = {"torch eager fp32": lambda feeds: _torch(module, feeds)}
    for engine, precision in kinds:
        opened = open_engine(repository.graph(model), engine, precision, default_threads())
        made[f"{engine} {precision}"] = lambda feeds, opened=opened: [opened.run(feeds)[n] for n in NAMES[part][1]]
    return made


def _torch(module: torch.nn.Module, feeds: Feeds) -> list[np.ndarray]:
    with torch.inference_mode():
        outputs = module(*(torch.from_numpy(value) for value in feeds.values()))
    return [o.numpy() for o in (outputs if isinstance(outputs, tuple) else (outputs,))]


def measure(made: dict[str, Runner], feeds: Feeds, rounds: int) -> dict[str, tuple[float, float]]:
    """name -> median milliseconds, relative error."""
    truth = made["torch eager fp32"](feeds)
    errors = {name: _error(run(feeds), truth) for name, run in made.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, run in made.items():
            began = time.perf_counter()
            run(feeds)
            times[name].append((time.perf_counter() - began) * 1e3)
    return {name: (statistics.median(times[name]), errors[name]) for name in made}


def _error(outputs: list[np.ndarray], truth: list[np.ndarray]) -> float:
    return max(float(np.sqrt(np.mean((a - b) ** 2)) / b.std()) for a, b in zip(outputs, truth, strict=True))


def bench(path: Path, edge: int, rounds: int) -> str:
    repository = Repository(path)
    backend = TorchBackend.load(repository)
    card = backend.card
    rows = []
    for part in NAMES:
        inputs = examples(backend.model, 1, edge, edge, seed=0)[part]
        feeds = {name: value.numpy() for name, value in zip(NAMES[part][0], inputs, strict=True)}
        found = measure(runners(repository, card, backend, part), feeds, rounds)
        eager = found["torch eager fp32"][0]
        rows += [f"| {part} | {n} | {ms:.1f} | {eager / ms:.2f} | {e:.1e} |" for n, (ms, e) in found.items()]
    return "\n".join(
        [
            f"Model {card.name} ({card.digest[:12]}), {edge} x {edge} px, batch 1, medians of {rounds} rounds.",
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
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    table = bench(find_repository(args.repository), args.edge, args.rounds)
    sys.stdout.write(table + "\n")
    if args.out:
        args.out.write_text(f"# Engines side by side\n\nMade by `python -m bench.engines`.\n\n{table}\n")


if __name__ == "__main__":
    main()

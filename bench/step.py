"""Speed of one training step (forward, backward, AdamW) against the reference recipe restated plainly.

    python -m bench.step [--models a1 a2 S/2-8E2A] [--batch 8] [--threads 1] [--device cpu] [--turns 5] [--ways ...]

Every model is trained on the same noise from the same weights in several ways, which take turns: one step of each,
again and again, so that what else the machine does falls on all alike. Reported are medians, and the ratio to the plain
one turn by turn, with its quartiles. With one thread on a CPU the clock is the process's own time, so that what else
the machine does hardly counts; elsewhere it is the wall's. Before it starts, ours and the plain model must give the
same answer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.machine import describe
from bench.plain import PlainDiT, plain_state
from training.models.dit import DiT, DiTConfig, named

PLAIN = "plain"
WAYS = ("fp32", "fp32 compiled", "bf16", "bf16 compiled")
AGREEMENT = 1e-4
WARM_UP = 2


class Step:
    """One way to train. Called: one optimizer step on the batch."""

    def __init__(self, model: nn.Module, way: str, batch: tuple[Tensor, ...]) -> None:
        self.model, self.batch = model, batch
        self.half = way.startswith("bf16")
        self.device = batch[0].device.type
        if way.endswith("compiled"):
            for block in model.blocks:
                block.compile(fullgraph=True)
        fused = {} if way == PLAIN else {"fused": True}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, **fused)

    def __call__(self) -> None:
        x, t, y, target = self.batch
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            loss = F.mse_loss(self.model(x, t, y).float(), target)
            balance = self.model.balance()
        (loss if balance is None else loss + balance).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def noise(config: DiTConfig, rows: int, device: str) -> tuple[Tensor, ...]:
    """Latents of the grid's size, timesteps, labels, targets."""
    draw = torch.Generator().manual_seed(0)
    edge = config.grid * config.patch
    x, target = (torch.randn(rows, config.channels, edge, edge, generator=draw) for _ in range(2))
    t, y = (torch.randint(high, (rows,), generator=draw) for high in (1000, config.labels))
    return tuple(part.to(device) for part in (x, t, y, target))


def shaken(model: nn.Module) -> nn.Module:
    """No layer at zero, so that every one has work to do."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def sides(config: DiTConfig, ways: Sequence[str], rows: int, device: str) -> dict[str, Step]:
    """The plain step and ours, from the same weights. Raises SystemExit where they do not answer alike."""
    torch.manual_seed(0)
    ours = shaken(DiT(config)).to(device)
    plain = PlainDiT(config).to(device)
    plain.load_state_dict(plain_state(ours.state_dict()))
    batch = noise(config, rows, device)
    with torch.no_grad():
        one, two = ours(*batch[:3]), plain(*batch[:3])
    error = (one - two).abs().max() / two.std()
    if not error < AGREEMENT:
        sys.exit(f"ours and the plain model differ by {error:.1e} of a deviation")
    found = {PLAIN: Step(plain, PLAIN, batch)}
    for way in ways:
        model = DiT(config).to(device)
        model.load_state_dict(ours.state_dict())
        found[way] = Step(model, way, batch)
    return found


def seconds(work: Callable[[], object], device: str) -> float:
    """Of one step: of the process on one thread of a CPU, of the wall elsewhere."""
    if device == "cpu":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        began = clock()
        work()
        return clock() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="training step speed against the reference recipe restated plainly")
    parser.add_argument("--models", nargs="+", default=["a1", "a2", "S/2-8E2A"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--grid", type=int, default=16, help="tokens per edge; 16 is 256-pixel pictures at patch 2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    where = f"{args.threads} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{describe('torch')}, {where}; batch {args.batch}, {args.grid**2} tokens, {args.turns} turns\n")
    print("| model | way | ms a step | samples/s | times the plain one (quartiles) |")
    print("|---|---|---|---|---|")
    for name in args.models:
        steps = sides(named(name, grid=args.grid), args.ways, args.batch, args.device)
        for step in steps.values():
            for _ in range(WARM_UP):
                step()
        taken = {way: np.array([0.0] * args.turns) for way in steps}
        for turn in range(args.turns):
            for way, step in steps.items():
                taken[way][turn] = seconds(step, args.device)
        for way, times in taken.items():
            low, middle, high = np.quantile(taken[PLAIN] / times, (0.25, 0.5, 0.75))
            step_s = np.median(times)
            print(
                f"| {name} | {way} | {1e3 * step_s:.0f} | {args.batch / step_s:.1f} | "
                f"{middle:.2f} ({low:.2f} to {high:.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""An objective of a few hundred weights, and runs of it in forked processes that are killed, starved and resumed.

`python -m tests.training.tiny OUT SCENARIO ...` plays scenarios one after another; torch is imported once for all.
"""

from __future__ import annotations

import importlib
import mmap
import os
import random
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.loop import Loop, LoopConfig, Objective, checkpoint

STEPS = 40
LAZY = ("torch._dynamo", "torch.distributed.fsdp", "tensorboard.summary.writer.record_writer", "rich.progress")
REACHED = mmap.mmap(-1, 1)  # the step that a forked run has come to


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.dropout(F.relu(self.into(x)), 0.1))


class Net(nn.Module):
    """Parameters of no, one, two and four dimensions, some of them with fewer rows than processes; one that is frozen,
    one buffer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.into = nn.Conv2d(3, width, 3, padding=1).to(memory_format=torch.channels_last)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.out = nn.Linear(width, 1)
        self.gain, self.base = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("met", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x).mean((2, 3))
        for block in self.blocks:
            x = block(x)
        return self.out(x)[:, 0] * self.gain * self.base.mean()


class Tiny(Objective):
    """The mean of a picture, from its noisy pixels."""

    def __init__(self, width: int = 16) -> None:
        torch.manual_seed(0)
        self.model: Any = Net(width)

    def batch(self, step: int, part: int, parts: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(step * parts + part)
        return {"picture": torch.randn(8 // parts, 3, 4, 4, generator=draw)}

    def loss(
        self, model: nn.Module, batch: Any, generator: torch.Generator, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        picture = batch["picture"]
        answer = model(picture + 0.1 * torch.randn(picture.shape, generator=generator))
        return (answer - picture.mean((1, 2, 3))).square().mean(), {"size": answer.abs().mean()}

    def after(self, model: nn.Module, step: int) -> None:
        self.model.met += 1


CONFIG = LoopConfig(
    steps=STEPS, batch=8, lr=1e-2, lr_end=1e-3, decay="cosine", warmup=3, weight_decay=0.1, ema=0.9, log_every=3,
    checkpoint_s=0.02,
)  # fmt: skip


class Slow(Tiny):
    """Time enough in steps for a kill to fall anywhere."""

    def after(self, model: nn.Module, step: int) -> None:
        super().after(model, step)
        REACHED[0] = step
        time.sleep(0.005)


class Full(Slow):
    """From step 8 to step 24 no file may grow beyond 3,000 bytes, as on a disk that is full."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.out, self.good = out, list[str]()

    def after(self, model: nn.Module, step: int) -> None:
        super().after(model, step)
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        if step == 8:
            self.good = [folder.name for folder in checkpoint.all_of(self.out)]
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, most))
        if step == 24:
            left = [folder.name for folder in checkpoint.all_of(self.out)]
            checkpoint.read(self.out)
            (self.out / "survived").write_text(f"{self.good[-1]} {left[-1]}")
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


class Experts(Tiny):
    """A transformer with experts whose balance counts, its activations recomputed, and with a layer that the loss asks
    after the model has answered."""

    def __init__(self) -> None:
        super().__init__()
        from training.models.dit import DiT, DiTConfig
        from training.models.moe import Experts as Mixture

        torch.manual_seed(0)
        self.model = DiT(DiTConfig(16, 2, 2, labels=4, grid=4, experts=Mixture(count=3, active=2)))
        self.model.doubt = nn.Linear(1, 1)
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, std=0.05)

    def batch(self, step: int, part: int, parts: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(step * parts + part)
        row = torch.arange(8 // parts)
        return {"x": torch.randn(len(row), 4, 8, 8, generator=draw), "t": row * 100, "y": row % 4}

    def after(self, model: nn.Module, step: int) -> None:
        """Nothing to keep up."""

    def loss(self, model: Any, batch: Any, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        answer = model(batch["x"], batch["t"], batch["y"])
        doubt = model.doubt(batch["t"][:, None] / 1000)[:, 0]
        off = (answer - batch["x"].roll(1, 2)).square().mean((1, 2, 3))
        return (off * torch.exp(-doubt) + doubt).mean() + 10 * model.balance(), {"balance": model.balance_value}


def train(objective: Objective, out: Path, until: int | None = None) -> None:
    """One process's part of a run; a step is of two parts, whoever computes them."""
    torch.set_num_threads(1)
    again = hasattr(objective.model, "checkpointing")
    config = replace(CONFIG, accumulate=2 // int(os.environ["WORLD_SIZE"]), checkpoint_activations=again)
    Loop(objective, config, out, "tiny", {"width": 16}).run(until)


def forked(size: int, work: Callable[[], None]) -> list[int]:
    """Processes 0 to size - 1 of one run; what they say of being killed is not told."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{size}"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        try:
            work()
        except BaseException as error:
            sys.stderr.write(f"process {rank}: {error!r}\n")
            os._exit(1)
        if size > 1:
            torch.distributed.destroy_process_group()
        os._exit(0)
    return children


def finish(children: list[int]) -> None:
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        raise SystemExit(f"processes ended with {statuses}")


def kill(children: list[int], step: int, after_s: float) -> None:
    """`kill -9` one of them some time after a step has begun, and then, as torchrun does, the others."""
    while REACHED[0] < step:
        time.sleep(0.001)
    time.sleep(after_s)
    for child in random.sample(children, len(children)):
        os.kill(child, signal.SIGKILL)
        time.sleep(random.random() * 0.01)
    for child in children:
        os.waitpid(child, 0)


def killed(out: Path, size: int, kills: int = 3) -> None:
    """A run that nothing disturbs, and one that is killed at random moments: in a third of its steps each time."""
    finish(forked(size, lambda: train(Slow(), out / "whole")))
    for number in range(kills):
        step, after_s = (
            random.randrange(number * STEPS // kills, (number + 1) * STEPS // kills - 1),
            random.random() / 20,
        )
        REACHED[0] = 0
        kill(forked(size, lambda: train(Slow(), out / "killed")), step, after_s)
        left = [checkpoint.step_of(folder) for folder in checkpoint.all_of(out / "killed")]
        sys.stdout.write(f"{size} processes killed {1000 * after_s:.0f} ms after step {step}; checkpoints {left}\n")
    finish(forked(size, lambda: train(Slow(), out / "killed")))


def resharded(out: Path, first: int, second: int) -> None:
    """Begun by some processes, ended by others."""
    finish(forked(first, lambda: train(Slow(), out, until=17)))
    finish(forked(second, lambda: train(Slow(), out)))


def alike(out: Path, objective: Callable[[], Objective]) -> None:
    """The same by one process and by two."""
    for size in (1, 2):
        finish(forked(size, partial(lambda size: train(objective(), out / f"{size}", until=6), size)))


SCENARIOS: dict[str, Callable[[Path], object]] = {
    "one": lambda out: killed(out, 1),
    "two": lambda out: killed(out, 2),
    "one-then-two": lambda out: resharded(out, 1, 2),
    "two-then-one": lambda out: resharded(out, 2, 1),
    "experts": lambda out: alike(out, Experts),
    "full": lambda out: finish(forked(1, lambda: train(Full(out), out))),
    "full-two": lambda out: finish(forked(2, lambda: train(Full(out), out))),
}


def torchrun() -> None:
    """What torchrun starts: the first time, process 1 kills itself on the way."""
    out = Path(os.environ["TINY_OUT"])

    class Doomed(Slow):
        def after(self, model: nn.Module, step: int) -> None:
            super().after(model, step)
            if step == 13 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)

    train(Doomed(), out)


if __name__ == "__main__":
    if "TINY_OUT" in os.environ:
        torchrun()
    for name in LAZY:
        importlib.import_module(name)
    for name in sys.argv[2:]:
        SCENARIOS[name](Path(sys.argv[1]) / name)

"""The figures of a run between two rows of its log: means of what was noted, speed, share of the machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from training.loop import speed
from training.loop.config import LoopConfig
from training.loop.log import Events, Line, Rows
from training.loop.world import World

Window = dict[str, list[float]]


class Report:
    """What a run has noted since its last row: of every name a sum and a count. The first process writes."""

    def __init__(self, config: LoopConfig, world: World) -> None:
        self.config, self.world = config, world
        self.window: Window = {}
        self.operations = 0.0
        self.writes = False

    def open(self, out: Path, stage: str, step: int, samples: int, seconds: float) -> None:
        """Begin to write; rows beyond `step` go."""
        self.told = (step, samples, seconds)
        if not self.world.first:
            return
        self.writes = True
        self.rows, self.events = Rows(out / "log.jsonl", step), Events(out / "tensorboard", step)
        self.line = Line(stage, step, self.config.steps)
        kind = torch.bfloat16 if self.config.bf16 else torch.float32
        self.peak = speed.peak(self.world.device, kind) * self.world.size

    def close(self) -> None:
        if self.writes:
            self.line.close()
            self.events.close()
        self.writes = False

    def note(self, values: Mapping[str, float]) -> None:
        """Remember values for the next row, which has their means."""
        for name, value in values.items():
            total = self.window.setdefault(name, [0.0, 0])
            total[0] += value
            total[1] += 1

    def noted(self) -> Window:
        """The window, summed over the processes."""
        merged: Window = {}
        for window in self.world.gather(self.window):
            for name, (total, count) in window.items():
                old = merged.get(name, [0.0, 0])
                merged[name] = [old[0] + total, old[1] + count]
        return merged

    def restore(self, window: Window) -> None:
        """What a checkpoint has of `noted`."""
        self.window = window if self.world.first else {}

    def tell(self, step: int, samples: int, seconds: float, end: int) -> None:
        """A row, all processes together."""
        window, spent = self.noted(), self.operations
        self.window, self.operations = {}, 0.0
        if not self.writes:
            return
        earlier, old_samples, old_seconds = self.told
        took = max(seconds - old_seconds, 1e-9)
        row: dict[str, Any] = {"step": step, "samples": samples, "seconds": round(seconds, 2)}
        row |= {name: total / count for name, (total, count) in window.items()}
        row["samples_per_s"] = (samples - old_samples) / took
        row["mfu"] = spent / took / self.peak if math.isfinite(spent) else None
        self.told = (step, samples, seconds)
        self.rows.add(row)
        self.events.add(row)
        self.line.show(row, (end - step) * took / (step - earlier))

    def event(self, step: int, what: str, **facts: Any) -> None:
        """A row that is no figures."""
        if self.writes:
            self.rows.add({"step": step, "event": what, **facts})

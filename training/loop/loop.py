"""The loop itself: steps, checkpoints, and where they go on."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.errors import InvalidInput
from training.loop import checkpoint, speed, tree
from training.loop.ahead import ahead, parts_of
from training.loop.config import LoopConfig
from training.loop.diverged import Diverged, keep_batches
from training.loop.objective import Objective
from training.loop.optimiser import Average, Optimiser
from training.loop.report import Report
from training.loop.sharding import prepare
from training.loop.world import World, alone_in

log = logging.getLogger(__name__)
SHAPES = 32  # kinds of batches whose operations are counted


class Progress(NamedTuple):
    """Where a run stands: steps done, rows seen, seconds spent in steps, the last step's loss."""

    step: int
    samples: int
    seconds: float
    loss: float


class Loop:
    """A run in the folder `out`, which goes on where its newest checkpoint ends.

    `stage` and `about` say in config.json what the weights are. Raises InvalidInput for a configuration that cannot be
    or a folder of another stage, ModelError for a checkpoint that is broken or another model's.
    """

    def __init__(
        self,
        objective: Objective,
        config: LoopConfig,
        out: Path,
        stage: str,
        about: dict[str, Any],
        device: str | None = None,
    ) -> None:
        self.objective, self.config, self.out, self.stage = objective, config, out, stage
        self.world = World.join(device)
        _, parts = parts_of(config, self.world)
        if config.batch % parts:
            raise InvalidInput(f"a batch of {config.batch} does not come to {parts} equal parts", param="batch")
        self.model = objective.model
        prepare(self.model, config, self.world)
        self.optimiser, self.average = Optimiser(self.model, config, self.world), Average(self.model)
        self.generator = torch.Generator(self.world.device)
        self.report = Report(config, self.world)
        self.step, self.samples, self.seconds, self.loss = 0, 0, 0.0, math.nan
        self.operations: dict[Any, float] = {}
        self.counted = 0
        self.saved: int | None = None
        self.stopping = False
        self._open({"stage": stage, "about": about, "loop": asdict(config)})

    # Where it goes on.

    def _open(self, facts: dict[str, Any]) -> None:
        if (self.out / checkpoint.CONFIG).exists():
            earlier = checkpoint.read_config(self.out)["stage"]
            if earlier != self.stage:
                raise InvalidInput(f"{self.out} holds a run of the stage {earlier}, not {self.stage}", param="out")
        newest = self.world.gather([folder.name for folder in checkpoint.all_of(self.out)])[0][-1:]
        for name in newest:  # as the first process sees it: a network's file system may be late elsewhere
            state = checkpoint.load(self.out / "checkpoints" / name, self._tensors(), self.world)
            self.step, self.samples, self.seconds = state["step"], state["samples"], float(state["seconds"])
            self.loss, self.saved = state["loss"], self.step
            self.report.restore(state["window"])
            log.info("%s: resumed at step %d", self.stage, self.step)
        if self.world.first:
            self.out.mkdir(parents=True, exist_ok=True)
            checkpoint.write_config(self.out, facts)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint holds: the tensors themselves."""
        model = dict(self.model.state_dict())
        return {"model": model, "average": self.average.values, "optimizer": self.optimiser.state()}

    # The run.

    def run(self, until: int | None = None) -> Progress:
        """Train to step `until` (the configuration's `steps`), save, and say where that is.

        Raises Diverged where a loss or a gradient is not finite, NotSaved where the last checkpoint cannot be written,
        SystemExit after SIGTERM.
        """
        end = self.config.steps if until is None else min(until, self.config.steps)
        if self.step < end:
            with alone_in(self.out, self.world):
                self._tell_what_begins()
                self.report.open(self.out, self.stage, self.step, self.samples, self.seconds)
                try:
                    with self._listening():
                        self._steps(end)
                finally:
                    self.report.close()
        elif self.saved == self.config.steps:
            log.info("%s: all %d steps are done; more loop.steps go on", self.stage, self.config.steps)
        if self.saved != self.step:
            self._save_last()
        if self.stopping:
            raise SystemExit(128 + signal.SIGTERM)
        return Progress(self.step, self.samples, self.seconds, self.loss)

    def _tell_what_begins(self) -> None:
        if self.world.first:
            count = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
            where = f"{self.world.size} x {self.world.device}"
            told = "%s: %.2f M parameters on %s, step %d of %d, in %s"
            log.info(told, self.stage, count, where, self.step, self.config.steps, self.out)

    def _steps(self, end: int) -> None:
        saved, stop = time.monotonic(), False
        coming = ahead(self.objective, self.config, self.world, self.step, end)
        try:
            while self.step < end and not stop:
                began = time.perf_counter()
                self.advance([next(coming) for _ in range(self.config.accumulate)])
                self.seconds += time.perf_counter() - began
                if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                    self.report.tell(self.step, self.samples, self.seconds, end)
                due, stop = self.world.any(time.monotonic() - saved >= self.config.checkpoint_s, self.stopping)
                self.stopping = stop
                if due and self.step < end:
                    self._try_save()
                    saved = time.monotonic()
        finally:
            coming.close()

    def advance(self, batches: Sequence[tuple[int, Any]]) -> None:
        """One step on this process's parts of it: (part, batch). Raises Diverged, with the weights as they were."""
        on_device = [(part, tree.mapped(batch, self._to_device)) for part, batch in batches]
        self._count(on_device)
        losses, beside = [], []
        for part, batch in on_device:
            loss, extra = self._forward(self.objective, part, batch)
            (loss / len(batches)).backward()
            losses.append(loss.detach())
            beside.append({name: value.detach() for name, value in extra.items()})
        length = float(self.optimiser.length())
        self.loss = float(self.world.mean(torch.stack(losses).mean().float()))
        if not (math.isfinite(self.loss) and math.isfinite(length)):
            self._give_up(batches, losses, length)
        own = self.objective.rate(self.step)
        rate = self.config.rate(self.step) if own is None else own
        self.optimiser.step(rate)
        self.objective.after(self.model, self.step)
        self.average.follow(self.config.ema_at(self.step))
        if self.world.first:  # the same everywhere
            self.report.note({"loss": self.loss, "gradient": length, "lr": rate})
        for extra in beside:
            self.report.note({name: float(value) for name, value in extra.items()})
        rows = self.objective.rows(self.step)
        self.samples += self.config.batch if rows is None else rows
        self.step += 1

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.world.device, non_blocking=True)

    def _forward(self, objective: Objective, part: int, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        seed = seed_of(self.config.seed, self.step, part)
        torch.manual_seed(seed)
        self.generator.manual_seed(seed)
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.bf16):
            return objective.loss(self.model, batch, self.generator, self.step)

    def _give_up(self, batches: Sequence[tuple[int, Any]], losses: Sequence[Tensor], length: float) -> None:
        """Keep the batches at fault (all, where only the gradient is) and raise Diverged."""
        self.optimiser.forget()
        bad = [place for place, loss in zip(batches, losses, strict=True) if not torch.isfinite(loss)]
        (anywhere,) = self.world.any(bool(bad))
        where = keep_batches(self.out, self.step, bad if anywhere else batches, self.world)
        what = f"gradient's length is {length}" if math.isfinite(self.loss) else f"loss is {self.loss}"
        raise Diverged(f"the {what} at step {self.step}{where}")

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """SIGTERM ends the run after its step, with a checkpoint."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        earlier = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopping", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, earlier)

    # Checkpoints.

    def _save(self) -> None:
        """Raises OSError where there is no room, even after the older ones have made some."""
        state = {"samples": self.samples, "seconds": self.seconds, "loss": self.loss, "window": self.report.noted()}
        try:
            checkpoint.save(self.out, self.step, self._tensors(), state, self.world)
        except OSError:
            self._prune(1)
            checkpoint.save(self.out, self.step, self._tensors(), state, self.world)
        self._prune(self.config.keep)
        self.saved = self.step

    def _prune(self, keep: int) -> None:
        if self.world.first:
            checkpoint.prune(self.out, keep)

    def _try_save(self) -> None:
        """A disk that is full does not end the run."""
        try:
            self._save()
        except OSError as error:
            log.warning("no checkpoint at step %d: %s; %s", self.step, error, self._last())
            self.report.event(self.step, "no checkpoint", why=str(error), last=self.saved)

    def _save_last(self) -> None:
        try:
            self._save()
        except OSError as error:
            why = f"the run came to step {self.step}, and its checkpoint could not be written: {error}; {self._last()}"
            raise checkpoint.NotSaved(why) from None

    def _last(self) -> str:
        return "there is none yet" if self.saved is None else f"the last one is of step {self.saved}"

    # Operations.

    def _count(self, batches: Sequence[tuple[int, Any]]) -> None:
        """Note what this step costs. The first batch of every shape is computed once more, to count its operations: by
        all processes where it is new to one, as they compute together."""
        kinds = [tree.shapes(batch) for _, batch in batches]
        new = self.world.any(*(kind not in self.operations for kind in kinds))
        for is_new, kind, place in zip(new, kinds, batches, strict=True):
            if is_new:
                self.operations[kind] = self._counted(*place) if self.counted < SHAPES else math.nan
                self.counted += 1
            self.report.operations += self.operations[kind] * self.world.size

    def _counted(self, part: int, batch: Any) -> int:
        began = time.perf_counter()
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        objective = copy.copy(self.objective)  # what it keeps for `after` is not of this call
        with torch.compiler.set_stance("force_eager"), speed.Operations() as counter:
            loss, _ = self._forward(objective, part, batch)
            forward = counter.total
            loss.backward()
        self.optimiser.forget()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        self.seconds -= time.perf_counter() - began
        return counter.total - forward * self.config.checkpoint_activations


def seed_of(seed: int, step: int, part: int) -> int:
    """Of one part of one step, from 0 to below 2^63."""
    digest = hashlib.blake2b(f"{seed}/{step}/{part}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

"""Budgets kept and what they cost: `budget_ms` under load, `target_uncertainty` against ensembles of one size.

    python -m bench.budget DATA [--requests 200] [--load 0.8] [--seed 0] [--items 0] [--out REPORT.md]

DATA is a folder of pictures with truth (`training.evalset`), for measuring only. Two parts, one run:

*Budgets.* A `saccade serve` in a process of its own with the default model. Each budget of `BUDGETS_MS` is asked once
of each task on the idle server, which says what a request of the mix takes; then `--requests` requests (tasks, pictures
and budgets drawn with `--seed`) come at random times (Poisson), so often that their idle times would fill `--load` of
the server. Counted are those that were answered within their budget and 10%, from the first byte sent to the last one
read; those cut off at the deadline, and those refused at once. Quality is the benchmark's own measure of each answer,
against that of the same picture with `quality=best` and all the time it wants.

*Target.* Every picture with 2 .. 10 members, in this process; each answer's uncertainty is the one that
`target_uncertainty` goes by. For each target this says how many members each picture would have got, the mean error
then, and how many members for all, the same for each, come to that error.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.gateway import gateway
from bench.machine import describe
from saccade.asking import Retries
from saccade.calls import Choices
from saccade.client import Client
from saccade.dial import Plan
from saccade.errors import ServerError
from saccade.local import Local
from saccade.tasks import TaskName
from training import evalset
from training.evalset import DepthItem, FlowItem, Item
from training.evaluate import AmodalTrial, DepthTrial, FlowTrial, Trial
from training.report import METRICS, MORE_IS_BETTER, NAMES

BUDGETS_MS = (100, 200, 400, 800, 1600)
TASKS: tuple[TaskName, ...] = ("depth", "flow", "amodal")
MEMBERS = range(2, 11)
GRACE = 1.1
NEVER = 1e-6
"""A target that is never reached."""
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """One request: `ratio` of its time to its budget, and the measure of its answer; None: refused."""

    task: TaskName
    name: str
    budget_ms: int
    ratio: float | None
    plan: Plan | None
    value: float | None

    @property
    def kept(self) -> bool:
        return self.ratio is not None and self.ratio <= GRACE


def trial(item: Item) -> Trial:
    if isinstance(item, DepthItem):
        return DepthTrial(item)
    return FlowTrial(item) if isinstance(item, FlowItem) else AmodalTrial(item)


def measured(one: Trial, task: TaskName, prediction: np.ndarray) -> float:
    return one.measure(prediction)[METRICS[task][0]]


def some(items: Sequence[Item], most: int) -> list[Item]:
    """The first of each task, at most so many together; 0: all."""
    share = -(-most // len(TASKS)) if most else len(items)
    return [item for task in TASKS for item in [one for one in items if one.task == task][:share]]


class Load:
    """Requests at random times, each in a thread that waits for its answer."""

    def __init__(self, url: str, items: Sequence[Item], seed: int) -> None:
        self.client = Client(url, retries=Retries(most=0))
        self.trials = {(item.task, item.name): trial(item) for item in items}
        self.random = np.random.default_rng(seed)
        self.best: dict[tuple[TaskName, str], float] = {}

    def ask(self, key: tuple[TaskName, str], budget_ms: int) -> Outcome:
        task, name = key
        began = time.perf_counter()
        try:
            answer = self.trials[key].ask(self.client, {"budget_ms": budget_ms})
        except ServerError as error:
            if error.status != 429:
                raise
            return Outcome(task, name, budget_ms, None, None, None)
        ratio = (time.perf_counter() - began) * 1e3 / budget_ms
        return Outcome(task, name, budget_ms, ratio, answer.plan, measured(self.trials[key], task, answer.prediction))

    def idle_s(self, tell: Tell) -> float:
        """Mean seconds of a request of the mix, alone."""
        spent = []
        for task in TASKS:
            key = next(key for key in self.trials if key[0] == task)
            for budget_ms in (*BUDGETS_MS[:1], *BUDGETS_MS):  # the first once more: it finds nothing warm
                ratio = self.ask(key, budget_ms).ratio
                spent.append((ratio or 0.0) * budget_ms / 1e3)
            del spent[-len(BUDGETS_MS) - 1]
            tell(f"{task}, idle: " + ", ".join(f"{s * 1e3:.0f} ms" for s in spent[-len(BUDGETS_MS) :]))
        return statistics.mean(spent)

    def unlimited(self, tell: Tell) -> None:
        """What every picture comes to with all the time it wants."""
        for number, (key, one) in enumerate(self.trials.items(), 1):
            answer = one.ask(self.client, Choices(quality="best"))
            self.best[key] = measured(one, key[0], answer.prediction)
            tell(f"quality=best: {number} of {len(self.trials)}")

    def run(self, requests: int, gap_s: float, tell: Tell) -> list[Outcome]:
        keys = list(self.trials)
        drawn = [(keys[i], BUDGETS_MS[b]) for i, b in zip(
            self._tasks_first(keys, requests), self.random.integers(0, len(BUDGETS_MS), requests), strict=True
        )]  # fmt: skip
        times = np.cumsum(self.random.exponential(gap_s, requests))
        began, done = time.perf_counter(), 0

        def one(at: float, key: tuple[TaskName, str], budget_ms: int) -> Outcome:
            nonlocal done
            time.sleep(max(0.0, began + at - time.perf_counter()))
            found = self.ask(key, budget_ms)
            done += 1
            if done % 20 == 0:
                tell(f"{done} of {requests} answered")
            return found

        with ThreadPoolExecutor(requests) as pool:
            return list(pool.map(lambda parts: one(float(parts[0]), *parts[1]), zip(times, drawn, strict=True)))

    def _tasks_first(self, keys: Sequence[tuple[TaskName, str]], count: int) -> Iterator[int]:
        """Pictures such that every task is asked equally often."""
        for task in self.random.integers(0, len(TASKS), count):
            yield int(self.random.choice([i for i, key in enumerate(keys) if key[0] == TASKS[task]]))


def budget_rows(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield "| budget | requests | refused at once | within budget + 10% | cut off | time / budget, p50 | p95 | p99 |"
    yield "|---|---|---|---|---|---|---|---|"
    for budget in (*BUDGETS_MS, None):
        found = [one for one in outcomes if budget in (None, one.budget_ms)]
        answered = [one for one in found if one.ratio is not None]
        if not answered:
            continue
        ratios = np.percentile([one.ratio for one in answered if one.ratio is not None], [50, 95, 99])
        cut = sum(one.plan is not None and not one.plan.complete for one in answered)
        kept = sum(one.kept for one in answered)
        name = "all" if budget is None else f"{budget} ms"
        yield (
            f"| {name} | {len(found)} | {len(found) - len(answered)} | {kept / len(answered):.1%} of those answered | "
            f"{cut / len(answered):.1%} | {ratios[0]:.2f} | {ratios[1]:.2f} | {ratios[2]:.2f} |"
        )


def quality_rows(outcomes: Sequence[Outcome], best: dict[tuple[TaskName, str], float]) -> Iterator[str]:
    yield ("| task | measure | " + " | ".join(f"{budget} ms" for budget in BUDGETS_MS) + " | all | unlimited |")
    yield "|---|---|" + "---|" * (len(BUDGETS_MS) + 2)
    for task in TASKS:
        cells = []
        for budget in (*BUDGETS_MS, None):
            found = [one for one in outcomes if one.task == task and budget in (None, one.budget_ms)]
            told = [(one.value, best[task, one.name]) for one in found if one.value is not None]
            if not told:
                cells.append("")
                continue
            ours, theirs = np.mean(told, axis=0)
            cells.append(f"{ours:.4f} ({ours / theirs - 1:+.1%})")
        metric = METRICS[task][0]
        arrow = "more is better" if metric in MORE_IS_BETTER else "less is better"
        theirs = np.mean([best[task, one.name] for one in outcomes if one.task == task and one.value is not None])
        yield f"| {task} | {NAMES[metric]}, {arrow} | {' | '.join(cells)} | {theirs:.4f} |"


@dataclass(frozen=True)
class Sure:
    """Of one task: uncertainty and error of every picture, [pictures, members 2 .. 10]."""

    task: TaskName
    uncertainty: np.ndarray
    error: np.ndarray

    def members(self, target: float) -> np.ndarray:
        """[pictures]: how many `target_uncertainty` would have taken."""
        reached = self.uncertainty <= target
        return np.where(reached.any(1), reached.argmax(1), len(MEMBERS) - 1) + MEMBERS[0]

    def rows(self) -> Iterator[str]:
        """Targets from loose to strict, and the ensemble of one size that does as well."""
        fixed = self.error.mean(0)
        for target in np.quantile(self.uncertainty, [0.9, 0.7, 0.5, 0.3, 0.1]):
            taken = self.members(float(target))
            reached = float(np.mean(self.error[np.arange(len(taken)), taken - MEMBERS[0]]))
            as_good = np.flatnonzero(fixed <= reached + 1e-12)
            needed = MEMBERS[int(as_good[0])] if len(as_good) else None
            saved = "" if needed is None else f"{1 - taken.mean() / needed:+.0%}"
            told = "none of 2 .. 10" if needed is None else str(needed)
            yield f"| {self.task} | {target:.4g} | {taken.mean():.1f} | {reached:.4f} | {told} | {saved} |"


def surely(local: Local, items: Iterable[Item], task: TaskName, tell: Tell) -> Sure:
    uncertainty, error = [], []
    for item in [one for one in items if one.task == task]:
        one = trial(item)
        sure, wrong = [], []
        for members in MEMBERS:
            answer = one.ask(local, Choices(target_uncertainty=NEVER, ensemble_size=members))
            assert answer.plan is not None
            assert answer.plan.uncertainty is not None
            value = measured(one, task, answer.prediction)
            sure.append(answer.plan.uncertainty)
            wrong.append(1 - value if METRICS[task][0] in MORE_IS_BETTER else value)
        uncertainty.append(sure)
        error.append(wrong)
        tell(f"target, {task}: {len(error)} pictures")
    return Sure(task, np.array(uncertainty), np.array(error))


def target_rows(found: Sequence[Sure]) -> Iterator[str]:
    yield "| task | target_uncertainty | members, mean | error | members for all that do as well | compute saved |"
    yield "|---|---|---|---|---|---|"
    for one in found:
        yield from one.rows()


async def budgets(items: Sequence[Item], requests: int, share: float, seed: int, tell: Tell) -> list[str]:
    async with gateway() as served:
        load = Load(str(served.base_url), items, seed)
        idle_s = await asyncio.to_thread(load.idle_s, tell)
        gap_s = idle_s / share
        tell(f"a request of the mix takes {idle_s * 1e3:.0f} ms alone; the load takes {requests * gap_s:.0f} s")
        await asyncio.to_thread(load.unlimited, tell)
        outcomes = await asyncio.to_thread(load.run, requests, gap_s, tell)
    head = f"{requests} requests at {share:.0%} load, one every {gap_s * 1e3:.0f} ms in the mean."
    return [head, "", *budget_rows(outcomes), "", *quality_rows(outcomes, load.best)]


def targets(items: Sequence[Item], tell: Tell) -> list[str]:
    with Local() as local:
        return list(target_rows([surely(local, items, task, tell) for task in TASKS]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="budgets kept, and compute saved by a target")
    parser.add_argument("data", type=Path, help="folder of pictures with truth")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--load", type=float, default=0.8, help="of what the server can do")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=int, default=0, help="only about so many pictures; 0: all")
    parser.add_argument("--out", type=Path, help="Markdown file")
    args = parser.parse_args(argv)
    began = time.perf_counter()

    def tell(text: str) -> None:
        sys.stderr.write(f"[{time.perf_counter() - began:6.1f} s] {text}\n")

    items = some(evalset.find(args.data), args.items)
    tell(f"{len(items)} pictures; the targets take about {len(items) * len(MEMBERS) * 0.25:.0f} s")
    report = ["## Budgets", "", *asyncio.run(budgets(items, args.requests, args.load, args.seed, tell))]
    report += ["", "## Target uncertainty", "", *targets(items, tell), "", describe("numpy", "openvino"), ""]
    text = "\n".join(report)
    sys.stdout.write(text)
    if args.out is not None:
        args.out.write_text(text)


if __name__ == "__main__":
    main()

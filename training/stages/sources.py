"""Where a stage's samples come from: a list of datasets with their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saccade.errors import InvalidInput
from saccade.tasks import AmodalCoding, DepthCoding
from training.config import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, explained, within
from training.data import READERS, Folders, Mixture, Scenes, Source, open_reader
from training.perception import TASKS

PERIOD = 1024


@dataclass(frozen=True)
class DataConfig:
    """One dataset."""

    kind: str = explained(
        "what lies in the folder: scenes (generated), recorded (batches of them), or a dataset: " + ", ".join(READERS),
        "scenes",
    )
    path: str = explained("its folder", "")
    options: dict[str, Any] = explained("the dataset's own: split, pass, ... (docs/datasets.md)", factory=dict)
    tasks: tuple[str, ...] = explained("which of its tasks are used; empty: all it has", ())
    weight: float = explained("how often it is drawn, beside the others of the same task", 1.0)
    limit: int = explained("for recorded: only the first so many samples of each task; 0: all", 0)
    broken_share: float = explained("share of its files that may be missing or broken before the run stops", 0.01)
    threads: int = explained("for datasets: threads that read and decode; batches come out the same", 1)
    real: tuple[str, ...] = explained("for scenes: folders of NAME.jpg + NAME_depth_mm.png", ())
    real_share: float = explained("for scenes: how many of the depth samples are drawn from those", 0.1)
    in_front: float = explained("for scenes: share of depth samples into which a cut-out is put", 0.25)

    def __post_init__(self) -> None:
        within(self, POSITIVE, "weight")
        within(self, SHARE, "broken_share", "real_share", "in_front")
        within(self, COUNT, "threads")
        within(self, NOT_NEGATIVE, "limit")


@dataclass(frozen=True)
class Codings:
    """How targets are coded; the card says the same."""

    depth: DepthCoding
    amodal: AmodalCoding


def open_sources(configs: tuple[DataConfig, ...], tasks: Mapping[str, float], codings: Codings, seed: int) -> Source:
    """One source of every task of `tasks`. Raises InvalidInput where one has no dataset."""
    parts: dict[str, list[tuple[Source, float]]] = {task: [] for task in tasks}
    for config in configs:
        source, has = _open(config, codings, seed)
        if strange := set(config.tasks) - set(has):
            raise InvalidInput(f"{config.kind} has no {', '.join(sorted(strange))}", param="data")
        for task in config.tasks or has:
            if task in parts:
                parts[task].append((source, config.weight))
    if lacking := [task for task, sources in parts.items() if not sources]:
        raise InvalidInput(f"no dataset has {', '.join(lacking)}: add one to `data`", param="data")
    only = {id(source): source for sources in parts.values() for source, _ in sources}
    return next(iter(only.values())) if len(only) == 1 else Mixture(parts, seed)


def _open(config: DataConfig, codings: Codings, seed: int) -> tuple[Source, tuple[str, ...]]:
    path = Path(config.path)
    if not config.path or not path.is_dir():
        raise InvalidInput(f"{config.kind}: no such folder: {config.path or '(path is not given)'}", param="data")
    if config.kind == "scenes":
        try:
            real = tuple(map(Path, config.real))
            return Scenes(path, real, config.real_share, seed, config.in_front, codings.depth), TASKS
        except FileNotFoundError as error:
            raise InvalidInput(str(error), param="data") from error
    if config.kind == "recorded":
        from training.recorded import Recorded

        return Recorded(path, seed, config.limit), TASKS
    reader = open_reader(config.kind, path, **config.options)
    source = Folders([reader], seed, config.broken_share, codings.depth, codings.amodal, threads=config.threads)
    return source, (reader.task,)


class Shares:
    """Which task each row of a run is of: exact shares over every 1024 rows, shuffled, and the count of rows of each
    task before any row known without counting."""

    def __init__(self, tasks: Mapping[str, float], seed: int) -> None:
        weights = np.array(list(tasks.values()), float)
        if not len(weights) or not np.isfinite(weights).all() or (weights <= 0).any():
            raise InvalidInput("tasks have shares above 0, and there is one at least", param="tasks")
        if strange := set(tasks) - set(TASKS):
            raise InvalidInput(
                f"no such task: {', '.join(sorted(strange))}; there are {', '.join(TASKS)}", param="tasks"
            )
        self.tasks, self.seed = tuple(tasks), seed
        ends = np.rint(np.cumsum(weights / weights.sum()) * PERIOD).astype(int)
        self.shares = np.diff(ends, prepend=0)

    def rows(self, first: int, count: int) -> dict[str, tuple[int, int]]:
        """Task -> (its rows among `count` rows from row `first` on, its rows before); without rows it is left out."""
        before, until = self._before(first), self._before(first + count)
        return {t: (int(b - a), int(a)) for t, a, b in zip(self.tasks, before, until, strict=True) if b > a}

    def _before(self, row: int) -> np.ndarray:
        period, offset = divmod(row, PERIOD)
        order = np.random.default_rng([self.seed, period, 7]).permutation(
            np.repeat(np.arange(len(self.shares)), self.shares)
        )
        return self.shares * period + np.bincount(order[:offset], minlength=len(self.shares))

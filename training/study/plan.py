"""What a study asks for, from TOML to a list of runs.

    about = "..."
    data = "runs/study"                  # what {data} stands for in values
    [judge]                              # see `judge`
    [base.finetune]                      # values of every run of that stage
    [axes.experts]                       # one table of results: every choice of every list of `grid`, with each seed
    stage = "finetune"
    grid.experts.none = {}
    grid.experts.eight = { "model.experts" = { count = 8 } }

A value `run:AXIS` or `run:AXIS/CHOICE-CHOICE` is the folder of an earlier run, for a stage that starts from one. The
value `macs` is a budget: it sets `loop.steps` so that training costs as many multiply-accumulates. Values whose names
begin with `held.` are of the judging alone, where they replace what was trained on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saccade.errors import InvalidInput
from training import config as configs
from training.config import explained

RUN = "run:"
HELD = "held."
Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """How runs are judged when they are done: the loss on held-out data, and the metrics of held-out scenes."""

    held: dict[str, dict[str, Any]] = explained("stage -> values that replace the data by held-out data", factory=dict)
    batches: int = explained("of held-out data, with noise that is the same for every run", 8)
    pictures: str = explained("folder of training.validation; empty: no metrics", "")
    options: dict[str, Any] = explained("how each picture is asked about: steps, ensemble_size, ...", factory=dict)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Runs that are compared with each other."""

    stage: str = explained("pretrain, finetune, upcycle or adapt")
    about: str = explained("one line for the report", "")
    values: dict[str, Any] = explained("of each of its runs, over those of base", factory=dict)
    grid: dict[str, dict[str, dict[str, Any]]] = explained("dimension -> choice -> values", factory=dict)
    seeds: tuple[int, ...] = explained("each choice is run with each", (0,))
    skip: tuple[str, ...] = explained("CHOICE-CHOICE of the grid that are left out", ())
    again: dict[str, tuple[int, ...]] = explained("CHOICE-CHOICE -> seeds of that run beside `seeds`", factory=dict)
    beside: tuple[str, ...] = explained("runs of axes before this one that its table and plot show too", ())
    law: str = explained("fit L(C) over this dimension of the grid, the other being the model's size", "")
    fit: str = explained("fit the loss over this dimension, whose choices are numbers", "")


@dataclass(frozen=True, kw_only=True)
class Study:
    """A whole study."""

    about: str = ""
    data: str = explained("what {data} stands for in all values", "")
    judge: Judge = explained("", factory=Judge)
    base: dict[str, dict[str, Any]] = explained("stage -> values of every run of it", factory=dict)
    axes: dict[str, Axis] = explained("in the order in which they are run", factory=dict)


@dataclass(frozen=True)
class Run:
    """One run. `point`: dimension -> choice. `values`: nested, as the stage's configuration file would have them, with
    folders of other runs still as `run:...`; `macs` and `held` (flat, what replaces them when it is judged) apart."""

    axis: str
    stage: str
    point: dict[str, str]
    seed: int
    values: Values
    macs: float | None = None
    held: Values = field(default_factory=dict)
    reads: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """AXIS/CHOICE-CHOICE, with the seed where it is not 0; of the letters that a folder's name may have."""
        choices = "-".join(re.sub(r"[^\w.]+", "_", choice) for choice in self.point.values())
        name = f"{self.axis}/{choices}" if choices else self.axis
        return name if self.seed == 0 else f"{name}-seed{self.seed}"

    @property
    def key(self) -> str:
        """Of what it does: runs of one key are the same run."""
        said = json.dumps([self.stage, self.seed, self.macs, self.values, self.held], sort_keys=True, default=str)
        return hashlib.sha256(said.encode()).hexdigest()[:16]


def read(path: Path, data: str = "") -> Study:
    """The study of a TOML file, with `data` in place of its own. Raises InvalidInput for what no study has."""
    return configs.load(Study, path, [f"data={data}"] if data else [])


def runs_of(study: Study) -> list[Run]:
    """Every run, in order, cheap ones of an axis first. Raises InvalidInput for a name that no run before it has."""
    runs: list[Run] = []
    for name, axis in study.axes.items():
        found = list(_runs_of(study, name, axis))
        runs += sorted(found, key=lambda run: (run.macs or 0, run.seed))
    names = [run.name for run in runs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InvalidInput(f"two runs have the name {', '.join(sorted(twice))}", param="axes")
    if strange := [name for axis in study.axes.values() for name in axis.beside if name not in names]:
        raise InvalidInput(f"no run is called {strange[0]}", param="beside")
    for place, run in enumerate(runs):
        if unknown := [other for other in run.reads if other not in names[:place]]:
            raise InvalidInput(f"{run.name} begins with {unknown[0]}, which no run before it is called", param="axes")
    return runs


def check_folders(study: Study, runs: Iterable[Run]) -> None:
    """Raises InvalidInput that names every folder that these runs read or are judged by and that is not there, with
    the command that makes it."""
    needed: dict[str, str] = {}
    for run in runs:
        flat = flattened(run.values)
        for values in (flat, flat | run.held):
            needed |= _folders_of(values)
        if study.judge.pictures and run.stage != "pretrain":
            pictures = _filled(study.judge.pictures, study.data)
            needed[pictures] = f"python -m training.validation {pictures} --scenes SCENES"
    lacking = [f"{path} ({how})" if how else path for path, how in needed.items() if not Path(path).is_dir()]
    if lacking:
        raise InvalidInput(f"the study's data is not there: {'; '.join(lacking)}", param="data")


def _folders_of(values: Values) -> dict[str, str]:
    """Folder -> the command that makes it, where one does."""
    size = max((values.get("sizes") or [[64]])[0])

    def made(kind: str, path: str) -> str:
        if kind == "recorded":
            return f"python -m training.recorded SCENES {path} --size {size}"
        return f"python -m training.scenes.make {path} --kind solid, and --kind layered" if kind == "scenes" else ""

    sources = [*values.get("data", ()), {"kind": values.get("images.kind"), "path": values.get("images.path")}]
    found = {s["path"]: made(s.get("kind", "scenes"), s["path"]) for s in sources if s.get("path")}
    start = values.get("start", "")
    return found if not start or start.startswith(RUN) else {**found, start: ""}


def _runs_of(study: Study, name: str, axis: Axis) -> Iterator[Run]:
    for choices in itertools.product(*(options.items() for options in axis.grid.values())):
        point = dict(zip(axis.grid, (choice for choice, _ in choices), strict=True))
        if "-".join(point.values()) in axis.skip:
            continue
        flat: Values = {}
        for part in (study.base.get(axis.stage, {}), axis.values, *(values for _, values in choices)):
            flat |= flattened(part)
        flat = {key: _filled(value, study.data) for key, value in flat.items()}
        macs = flat.pop("macs", None)
        held = flattened(_filled(study.judge.held.get(axis.stage, {}), study.data))
        held |= {key.removeprefix(HELD): flat.pop(key) for key in list(flat) if key.startswith(HELD)}
        reads = tuple(v.removeprefix(RUN) for v in flat.values() if isinstance(v, str) and v.startswith(RUN))
        for seed in (*axis.seeds, *axis.again.get("-".join(point.values()), ())):
            yield Run(name, axis.stage, point, seed, nested({**flat, "loop.seed": seed}), macs, held, reads)


def flattened(values: Mapping[str, Any], before: str = "") -> Values:
    """{"a": {"b": 1}, "c.d": 2} -> {"a.b": 1, "c.d": 2}. A table of its own that is empty stays one."""
    flat: Values = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{before}{key}.")
        else:
            flat[f"{before}{key}"] = value
    return flat


def nested(flat: Mapping[str, Any]) -> Values:
    """The way back."""
    values: Values = {}
    for key, value in flat.items():
        *tables, last = key.split(".")
        place = values
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise InvalidInput(f"{key}: {table} is not a table", param=key)
        if value == {} and isinstance(place.get(last), dict):
            continue
        place[last] = value
    return values


def _filled(value: Any, data: str) -> Any:
    """{data} replaced wherever text has it."""
    if isinstance(value, str):
        return value.replace("{data}", data)
    if isinstance(value, list | tuple):
        return [_filled(part, data) for part in value]
    if isinstance(value, dict):
        return {key: _filled(part, data) for key, part in value.items()}
    return value


def resolved(values: Any, folders: Mapping[str, Path]) -> Any:
    """Every `run:NAME` replaced by that run's folder."""
    if isinstance(values, dict):
        return {key: resolved(value, folders) for key, value in values.items()}
    if isinstance(values, str) and values.startswith(RUN):
        return str(folders[values.removeprefix(RUN)])
    return values

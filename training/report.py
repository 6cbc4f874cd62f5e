"""What an evaluation found: every picture's values, their means beside every baseline, tables, figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from saccade.card import QualityPoint
from saccade.tasks import TaskName
from training import sheets

WARNING = (
    "These pictures are far too few for leaderboard claims: "
    "compare the values with the baselines beside them and with nothing else."
)
METRICS: dict[TaskName, tuple[str, ...]] = {"depth": ("abs_rel", "delta1"), "flow": ("epe_px",), "amodal": ("iou",)}
NAMES = {"abs_rel": "AbsRel", "delta1": "delta1", "epe_px": "EPE, px", "iou": "IoU"}
MORE_IS_BETTER = frozenset({"delta1", "iou"})
LABELS = {metric: f"{name} {'↑' if metric in MORE_IS_BETTER else '↓'}" for metric, name in NAMES.items()}
ALL = "all"
SHEET_LIMIT = 48
_LEGENDS: dict[TaskName, str] = {
    "depth": "picture; prediction, fitted to the truth by scale and shift; truth (black: not known)",
    "flow": "first frame; prediction; truth (black: not known); full colour is the truth's 99% quantile",
    "amodal": "visible part given (blue); predicted whole (red); true whole (green)",
}

Values = dict[str, float]


@dataclass(frozen=True)
class PictureScore:
    """One picture: the model's `values` by metric, every baseline's, the sets that it counts for.

    `share`: depth and flow, of pixels with truth; amodal, of the object that is hidden. `strip`: [h, w, 3] uint8.
    """

    task: TaskName
    name: str
    groups: tuple[str, ...]
    share: float
    values: Values
    baselines: dict[str, Values]
    seconds: float
    strip: NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Mean:
    """Mean over the pictures of one set; `baselines` likewise."""

    task: TaskName
    group: str
    metric: str
    pictures: int
    value: float
    baselines: dict[str, float]

    def beats(self, baseline: str) -> bool:
        """Whether the model is strictly the better of the two."""
        better = self.value - self.baselines[baseline]
        return better > 0 if self.metric in MORE_IS_BETTER else better < 0


@dataclass(frozen=True)
class Report:
    """`data`: the evaluation folder's name; `options`: what was used, by task."""

    data: str
    model: str
    digest: str
    options: dict[TaskName, dict[str, Any]]
    pictures: tuple[PictureScore, ...]

    @property
    def tasks(self) -> list[TaskName]:
        return list(dict.fromkeys(picture.task for picture in self.pictures))

    def of(self, task: TaskName) -> list[PictureScore]:
        return [picture for picture in self.pictures if picture.task == task]

    def means(self) -> list[Mean]:
        """Every task, set and metric, in that order; the set "all" first."""
        return [mean for task in self.tasks for mean in _means(task, self.of(task))]

    def quality(self) -> list[QualityPoint]:
        """The means as points of a card's quality curve."""
        return [quality_point(mean, self.options[mean.task]) for mean in self.means()]

    def summary(self) -> str:
        """Markdown: the means beside every baseline, and in words which of them are not beaten."""
        return "\n\n".join([self._heading(), f"**{WARNING}**", *(self._means_section(task) for task in self.tasks)])

    def markdown(self) -> str:
        """The summary, then every picture's value."""
        return "\n\n".join([self.summary(), *(self._pictures_section(task) for task in self.tasks)]) + "\n"

    def json(self) -> str:
        """Everything but the strips, as JSON text."""
        document = {
            "warning": WARNING,
            "data": self.data,
            "model": self.model,
            "digest": self.digest,
            "options": self.options,
            "means": [vars(mean) for mean in self.means()],
            "pictures": [{k: v for k, v in vars(p).items() if k != "strip"} for p in self.pictures],
        }
        return json.dumps(document, indent=1)

    def figures(self, out: Path) -> list[Path]:
        """Write one contact sheet for each task to `out`/TASK.png."""
        out.mkdir(parents=True, exist_ok=True)
        return [self._figure(task, out / f"{task}.png") for task in self.tasks]

    def save(self, out: Path) -> list[Path]:
        """Write report.md, report.json and the contact sheets."""
        out.mkdir(parents=True, exist_ok=True)
        texts = {"report.md": self.markdown(), "report.json": self.json()}
        return [*(_write(out / name, text) for name, text in texts.items()), *self.figures(out)]

    def _heading(self) -> str:
        used = "\n".join(f"- {task}: {_options(chosen)}" for task, chosen in self.options.items())
        return f"# Evaluation of {self.model} on {self.data}\n\nDigest `{self.digest or 'none'}`. Options:\n\n{used}"

    def _means_section(self, task: TaskName) -> str:
        means = _means(task, self.of(task))
        rows = [
            [f"{m.group} ({m.pictures})", LABELS[m.metric], *_marked(m.value, m.baselines, m.metric)] for m in means
        ]
        head = ["pictures", "metric", self.model, *means[0].baselines]
        seconds = float(np.mean([picture.seconds for picture in self.of(task)]))
        table = table_markdown(head, rows)
        return f"## {task.capitalize()}, means\n\n{table}\n\n{_verdict(means)} {seconds:.2f} s per answer."

    def _pictures_section(self, task: TaskName) -> str:
        scores = self.of(task)
        share = "hidden" if task == "amodal" else "with truth"
        head = ["picture", share]
        for metric in METRICS[task]:
            head += [f"{LABELS[metric]} {self.model}", *scores[0].baselines]
        rows = [[s.name, f"{s.share:.1%}", *_score_cells(s)] for s in scores]
        return f"## {task.capitalize()}, every picture\n\n{table_markdown(head, rows)}"

    def _figure(self, task: TaskName, path: Path) -> Path:
        scores = self.of(task)
        strips = [(_caption(score), score.strip) for score in scores[:SHEET_LIMIT] if score.strip is not None]
        means = ", ".join(f"{NAMES[m.metric]} {m.value:.3f}" for m in _means(task, scores) if m.group == ALL)
        title = f"{self.model}, {task}: mean {means} over {len(scores)} pictures (too few for leaderboard claims)"
        legend = _LEGENDS[task] + f"; the first {SHEET_LIMIT}" * (len(scores) > SHEET_LIMIT)
        sheets.sheet(title, legend, strips).save(path)
        return path


@dataclass(frozen=True)
class SweepPoint:
    """One mean at one place of the dial, and the mean seconds of an answer there."""

    mean: Mean
    steps: int
    ensemble_size: int
    seconds: float


@dataclass(frozen=True)
class Sweep:
    """Quality against steps and members."""

    data: str
    model: str
    digest: str
    points: tuple[SweepPoint, ...]

    @property
    def steps(self) -> list[int]:
        return sorted({point.steps for point in self.points})

    @property
    def ensemble_sizes(self) -> list[int]:
        return sorted({point.ensemble_size for point in self.points})

    def curves(self) -> list[tuple[Mean, list[SweepPoint]]]:
        """Points by task, set and metric, each with one of its means to name it."""
        curves: dict[tuple[str, str, str], list[SweepPoint]] = {}
        for point in self.points:
            curves.setdefault((point.mean.task, point.mean.group, point.mean.metric), []).append(point)
        return [(points[0].mean, points) for points in curves.values()]

    def quality(self) -> list[QualityPoint]:
        """Every point in the form that a card keeps."""
        return [
            quality_point(p.mean, {"steps": p.steps, "ensemble_size": p.ensemble_size}, self.data) for p in self.points
        ]

    def markdown(self) -> str:
        """A table for each task: rows are set, metric and members, columns are steps."""
        tasks = dict.fromkeys(point.mean.task for point in self.points)
        heading = f"# Quality of {self.model} against steps and members, on {self.data}"
        return "\n\n".join([heading, f"**{WARNING}**", *(self._section(task) for task in tasks)]) + "\n"

    def json(self) -> str:
        """Every point, as JSON text."""
        points = [{**vars(p), "mean": vars(p.mean)} for p in self.points]
        document = {"warning": WARNING, "data": self.data, "model": self.model, "digest": self.digest, "points": points}
        document["quality"] = [point.model_dump() for point in self.quality()]
        return json.dumps(document, indent=1)

    def plot(self, path: Path) -> Path:
        """One panel for each task, set and metric: the metric against steps, a line for each ensemble size, the
        baselines dashed. A PNG."""
        rows: dict[TaskName, list[tuple[Mean, list[SweepPoint]]]] = {}
        for mean, points in self.curves():
            rows.setdefault(mean.task, []).append((mean, points))
        width = max(map(len, rows.values()))
        figure = Figure(figsize=(3.4 * width, 3.1 * len(rows) + 0.5), layout="constrained")
        panels = figure.subplots(len(rows), width, squeeze=False)
        for row, curves in zip(panels, rows.values(), strict=True):
            for panel, curve in zip(row, curves, strict=False):
                _draw_curve(panel, *curve)
            for unused in row[len(curves) :]:
                unused.set_axis_off()
        figure.suptitle(f"{self.model} on {self.data}: too few pictures for leaderboard claims", fontsize=10)
        figure.savefig(path, dpi=110)
        return path

    def save(self, out: Path) -> list[Path]:
        """Write sweep.md, sweep.json and sweep.png."""
        out.mkdir(parents=True, exist_ok=True)
        texts = {"sweep.md": self.markdown(), "sweep.json": self.json()}
        return [*(_write(out / name, text) for name, text in texts.items()), self.plot(out / "sweep.png")]

    def _section(self, task: TaskName) -> str:
        curves = [(mean, points) for mean, points in self.curves() if mean.task == task]
        head = ["pictures", "metric", "members", *(f"{n} step{'s' * (n > 1)}" for n in self.steps)]
        rows = [row for curve in curves for row in self._rows(*curve)]
        times = {(p.steps, p.ensemble_size): p.seconds for p in curves[0][1]}
        rows += [
            ["", "s per answer", str(members), *(f"{times[n, members]:.2f}" for n in self.steps)]
            for members in self.ensemble_sizes
        ]
        return f"## {task.capitalize()}\n\n{table_markdown(head, rows)}\n\n{_baselines_line([m for m, _ in curves])}"

    def _rows(self, mean: Mean, points: Sequence[SweepPoint]) -> Iterator[list[str]]:
        values = {(p.steps, p.ensemble_size): p.mean.value for p in points}
        best = (max if mean.metric in MORE_IS_BETTER else min)(values.values())
        for members in self.ensemble_sizes:
            row = [values[n, members] for n in self.steps]
            cells = [f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in row]
            yield [f"{mean.group} ({mean.pictures})", LABELS[mean.metric], str(members), *cells]


def mean_of(task: TaskName, group: str, metric: str, scores: Sequence[PictureScore]) -> Mean:
    """The mean over those of `scores` that belong to `group`; at least one must."""
    members = [score for score in scores if group in score.groups]
    baselines = {
        name: float(np.mean([score.baselines[name][metric] for score in members])) for name in members[0].baselines
    }
    value = float(np.mean([score.values[metric] for score in members]))
    return Mean(task, group, metric, len(members), value, baselines)


def quality_point(mean: Mean, options: dict[str, Any], data: str = "") -> QualityPoint:
    """A mean as a card keeps it."""
    return QualityPoint(
        task=mean.task,
        steps=options["steps"],
        ensemble_size=options["ensemble_size"],
        metric=mean.metric,
        value=round(mean.value, 4),
        pictures=mean.pictures,
        set=f"{data}: {mean.group}" if data else mean.group,
    )


def table_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _means(task: TaskName, scores: Sequence[PictureScore]) -> list[Mean]:
    groups = dict.fromkeys([ALL, *(group for score in scores for group in score.groups)])
    return [mean_of(task, group, metric, scores) for group in groups for metric in METRICS[task]]


def _score_cells(score: PictureScore) -> Iterator[str]:
    for metric, value in score.values.items():
        yield from _marked(value, {name: values[metric] for name, values in score.baselines.items()}, metric)


def _marked(value: float, baselines: dict[str, float], metric: str) -> list[str]:
    """The model's value, then the baselines', the best bold."""
    values = [value, *baselines.values()]
    best = (max if metric in MORE_IS_BETTER else min)(values)
    return [f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in values]


def _verdict(means: Sequence[Mean]) -> str:
    """Which baselines the model does not beat, and where."""
    lost = {
        name: [f"{NAMES[m.metric].removesuffix(', px')} {m.group}" for m in means if not m.beats(name)]
        for name in means[0].baselines
    }
    told = "; ".join(f"{name} ({', '.join(where)})" for name, where in lost.items() if where)
    return f"Does not beat: {told}." if told else "Beats every baseline in every mean."


def _baselines_line(means: Sequence[Mean]) -> str:
    parts = [
        f"{mean.group}, {LABELS[mean.metric]}: " + ", ".join(f"{name} {v:.3f}" for name, v in mean.baselines.items())
        for mean in means
    ]
    return "Baselines. " + "; ".join(parts) + "."


def _draw_curve(panel: Any, mean: Mean, points: Sequence[SweepPoint]) -> None:
    for members in sorted({point.ensemble_size for point in points}):
        line = sorted((p.steps, p.mean.value) for p in points if p.ensemble_size == members)
        panel.plot(*zip(*line, strict=True), marker="o", markersize=3, label=f"{members} member{'s' * (members > 1)}")
    for name, value in mean.baselines.items():
        panel.axhline(value, color="gray", linestyle=":", linewidth=0.8)
        place = {"transform": panel.get_yaxis_transform(), "ha": "right", "va": "bottom"}
        panel.text(1, value, name, color="gray", fontsize=6, **place)
    steps = sorted({point.steps for point in points})
    panel.set_xscale("log")
    panel.set_xticks(steps, labels=[str(n) for n in steps])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_title(f"{mean.task}, {mean.group} ({mean.pictures})", fontsize=9)
    panel.set_xlabel("steps", fontsize=8)
    panel.set_ylabel(LABELS[mean.metric], fontsize=8)
    panel.tick_params(labelsize=7)
    panel.legend(fontsize=6, loc="best")


def _caption(score: PictureScore) -> str:
    return f"{score.name}: " + ", ".join(f"{NAMES[metric]} {value:.3f}" for metric, value in score.values.items())


def _options(chosen: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in chosen.items())


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path

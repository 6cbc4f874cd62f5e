"""How well a model answers: the evaluation protocol over a folder of pictures with ground truth.

The command `saccade evaluate` and `python -m training.evaluate` both call

    main(data, *, url=None, repository=None, model=None, tasks=("depth", "flow", "amodal"), steps=None,
         ensemble_size=None, reduction=None, seed=0, processing_resolution=None, out=None, run_sweep=False,
         torch=None) -> Report

Predictions are at the picture's own size. Depth: least-squares scale and shift of the prediction onto the true depth
over valid pixels, clipped at 1e-3, then AbsRel and delta1. Flow: mean end-point error over valid pixels, nothing
fitted. Amodal: intersection over union with the whole object. Means are over pictures, for these sets: depth, all and
`dense` (truth on at least half of the pixels, which sparse lidar and subsampled points have not); flow, all and each
benchmark; amodal, all and those objects of which more than 5% is hidden.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Unpack

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from saccade import metrics
from saccade.calls import Choices
from saccade.errors import InvalidInput, ModelError, SaccadeError
from saccade.pipeline import Answer, Options
from saccade.repository import Repository, find_repository
from saccade.tasks import TaskName
from training import baselines, evalset, sheets
from training.config import read
from training.evalset import ALL_TASKS, AmodalItem, DepthItem, FlowItem, Item
from training.report import ALL, METRICS, WARNING, PictureScore, Report, Sweep, SweepPoint, Values, mean_of

if TYPE_CHECKING:
    from training.backend import Eager

Progressed = Callable[[int, int, str], None]
"""Called with (done, total, what comes next)."""

DENSE = "dense"
HIDDEN = "hidden > 5%"
SWEEP_STEPS = (1, 2, 5, 10, 20)
SWEEP_ENSEMBLE_SIZES = (1, 2, 5, 10)


class Seer(Protocol):
    """What can be evaluated: `saccade.local.Local`, `saccade.client.Client`, or anything with their three methods."""

    def depth(self, image: Path, /, **choices: Unpack[Choices]) -> Answer: ...
    def flow(self, image: Path, next_image: Path, /, **choices: Unpack[Choices]) -> Answer: ...
    def amodal(self, image: Path, mask: Path, /, **choices: Unpack[Choices]) -> Answer: ...


@dataclass(frozen=True)
class OnTorch:
    """A torch backend: of a run's folder (the default model's with `facts`, JSON of its tasks), or without one of the
    default model in the repository. `batch_size`: members denoised together."""

    run: Path | None = None
    facts: Path | None = None
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_size: int = 1

    def open(self, repository: Path | None, model: str | None) -> Eager:
        """Raises InvalidInput and ModelError as `TorchBackend.of_run` does."""
        from training.backend import Eager, TorchBackend

        if self.run is not None:
            if repository is not None or model is not None:
                raise InvalidInput("a run is no model of a repository: leave one of them out", param="run")
            facts = None if self.facts is None else read(self.facts)
            how = {"device": self.device, "precision": self.precision}
            return Eager(TorchBackend.of_run(self.run, facts=facts, **how), self.batch_size)
        found = Repository(find_repository(repository))
        return Eager(TorchBackend.load(found, model, self.device, self.precision), self.batch_size)


class Trial(Protocol):
    """One item, loaded: how to ask about it, and how an answer is judged."""

    groups: tuple[str, ...]
    share: float
    size: tuple[int, ...]

    def ask(self, seer: Seer, choices: Choices) -> Answer: ...
    def measure(self, prediction: NDArray[Any]) -> Values: ...
    def baselines(self) -> dict[str, Values]: ...
    def strip(self, prediction: NDArray[Any]) -> NDArray[np.uint8]: ...


class DepthTrial:
    def __init__(self, item: DepthItem) -> None:
        self.item = item
        self.picture, self.truth, self.valid = item.load()
        self.size = self.truth.shape
        self.share = float(self.valid.mean())
        self.groups: tuple[str, ...] = (ALL, DENSE) if self.share >= evalset.DENSE_FROM else (ALL,)

    def ask(self, seer: Seer, choices: Choices) -> Answer:
        return seer.depth(self.item.image, **choices)

    def measure(self, prediction: NDArray[Any]) -> Values:
        return self.judge(self.fitted(prediction))

    def fitted(self, prediction: NDArray[Any]) -> NDArray[np.float64]:
        return metrics.align_depth(prediction, self.truth, self.valid)

    def judge(self, depth: NDArray[np.floating]) -> Values:
        """Values of a depth that is in the truth's scale."""
        return {
            "abs_rel": metrics.abs_rel(depth, self.truth, self.valid),
            "delta1": metrics.delta1(depth, self.truth, self.valid),
        }

    def baselines(self) -> dict[str, Values]:
        return {
            "constant (mean)": self.measure(baselines.constant_depth(self.truth.shape)),
            "constant (median)": self.judge(baselines.median_depth(self.truth, self.valid)),
            "vertical ramp": self.measure(baselines.vertical_ramp(self.truth.shape)),
        }

    def strip(self, prediction: NDArray[Any]) -> NDArray[np.uint8]:
        return sheets.depth_strip(self.picture, self.fitted(prediction), self.truth, self.valid)


class FlowTrial:
    def __init__(self, item: FlowItem) -> None:
        self.item = item
        self.picture, self.next_picture, self.truth, self.valid = item.load()
        self.size = self.truth.shape
        self.share = float(self.valid.mean())
        self.groups: tuple[str, ...] = (ALL, item.set)

    def ask(self, seer: Seer, choices: Choices) -> Answer:
        return seer.flow(self.item.image, self.item.next_image, **choices)

    def measure(self, prediction: NDArray[Any]) -> Values:
        return {"epe_px": metrics.epe(prediction, self.truth, self.valid)}

    def baselines(self) -> dict[str, Values]:
        frames = self.picture, self.next_picture
        predictions = {
            "zero": baselines.zero_flow(self.valid.shape),
            "median": baselines.median_flow(self.truth, self.valid),
            "Farneback": baselines.farneback_flow(*frames),
            "DIS (fast)": baselines.dis_flow(*frames, "fast"),
            "DIS (medium)": baselines.dis_flow(*frames, "medium"),
        }
        return {name: self.measure(flow) for name, flow in predictions.items()}

    def strip(self, prediction: NDArray[Any]) -> NDArray[np.uint8]:
        return sheets.flow_strip(self.picture, prediction, self.truth, self.valid)


class AmodalTrial:
    def __init__(self, item: AmodalItem) -> None:
        self.item = item
        self.picture, self.visible, self.whole = item.load()
        self.size = self.whole.shape
        self.share = evalset.hidden_share(self.visible, self.whole)
        self.groups: tuple[str, ...] = (ALL, HIDDEN) if self.share > evalset.HIDDEN_FROM else (ALL,)

    def ask(self, seer: Seer, choices: Choices) -> Answer:
        return seer.amodal(self.item.image, self.item.visible, **choices)

    def measure(self, prediction: NDArray[Any]) -> Values:
        return {"iou": metrics.iou(prediction.astype(bool), self.whole)}

    def baselines(self) -> dict[str, Values]:
        return {
            "visible mask": self.measure(baselines.visible_mask(self.visible)),
            "convex hull": self.measure(baselines.convex_hull(self.visible)),
        }

    def strip(self, prediction: NDArray[Any]) -> NDArray[np.uint8]:
        return sheets.amodal_strip(self.picture, self.visible, prediction.astype(bool), self.whole)


def evaluate(
    data: Path,
    seer: Seer,
    *,
    tasks: Sequence[TaskName] = ALL_TASKS,
    options: Options | None = None,
    progress: Progressed | None = None,
) -> Report:
    """Ask `seer` about every item of the folder `data` (form: `training.evalset`) and judge what it says.

    Raises InvalidInput that names every missing or broken file before the first question is asked, ModelError where an
    answer is not of the picture's size or not finite, and whatever the seer raises, with the item's name as a note.
    """
    scores: list[PictureScore] = []
    answers: dict[TaskName, Answer] = {}
    for item in _reported(evalset.find(data, tasks), progress):
        trial = _trial(item)
        answers[item.task], seconds = _ask(item, trial, seer, options or Options())
        scores.append(_score(item, trial, answers[item.task].prediction, seconds))
    last = list(answers.values())[-1]
    used = {task: asdict(answer.options) for task, answer in answers.items()}
    return Report(data.resolve().name, last.model, last.digest, used, tuple(scores))


def sweep(
    data: Path,
    seer: Seer,
    *,
    tasks: Sequence[TaskName] = ALL_TASKS,
    steps: Sequence[int] = SWEEP_STEPS,
    ensemble_sizes: Sequence[int] = SWEEP_ENSEMBLE_SIZES,
    options: Options | None = None,
    progress: Progressed | None = None,
) -> Sweep:
    """Evaluate at every pair of `steps` and `ensemble_sizes`; `options` says the rest. Raises as `evaluate` does."""
    dial = [(n, members) for n in steps for members in ensemble_sizes]
    scores: dict[tuple[int, int], list[PictureScore]] = {place: [] for place in dial}
    for item in _reported(evalset.find(data, tasks), progress):
        trial = _trial(item)
        compared = trial.baselines()
        for n, members in dial:
            chosen = replace(options or Options(), steps=n, ensemble_size=members)
            answer, seconds = _ask(item, trial, seer, chosen)
            values = trial.measure(answer.prediction)
            scores[n, members].append(
                PictureScore(item.task, item.name, trial.groups, trial.share, values, compared, seconds)
            )
    points = tuple(point for place, found in scores.items() for point in _points(*place, found))
    return Sweep(data.resolve().name, answer.model, answer.digest, points)


def main(
    data: Path,
    *,
    url: str | None = None,
    repository: Path | None = None,
    model: str | None = None,
    tasks: Sequence[TaskName] = ALL_TASKS,
    steps: int | None = None,
    ensemble_size: int | None = None,
    reduction: str | None = None,
    seed: int = 0,
    processing_resolution: int | None = None,
    out: Path | None = None,
    run_sweep: bool = False,
    torch: OnTorch | None = None,
) -> Report:
    """Evaluate a server at `url`, or a model of `repository` in this process, with a progress bar; print the summary.

    `torch`: its torch modules, or a run's, in place of the repository's graphs; of the tasks, those that it has.

    `out`: a folder for report.md, report.json and a contact sheet for each task; with `run_sweep` also sweep.md,
    sweep.json and sweep.png. Raises InvalidInput for files or options that cannot be used, and what the seer raises.
    """
    options = Options(
        steps=steps,
        ensemble_size=ensemble_size,
        reduction=reduction,  # type: ignore[arg-type]
        seed=seed,
        processing_resolution=processing_resolution,
    )
    console = Console(stderr=True)
    with open_seer(url, repository, model, torch) as seer:
        tasks = tasks if torch is None else _known(tasks, seer)
        with _bar(console, "evaluate") as progress:
            report = evaluate(data, seer, tasks=tasks, options=options, progress=progress)
        _publish(report.summary(), report.save(out) if out else [])
        if run_sweep:
            with _bar(console, "sweep") as progress:
                swept = sweep(data, seer, tasks=tasks, options=options, progress=progress)
            _publish(swept.markdown(), swept.save(out) if out else [])
    console.print(WARNING, style="yellow", soft_wrap=True)
    return report


@contextmanager
def open_seer(
    url: str | None, repository: Path | None, model: str | None, torch: OnTorch | None = None
) -> Iterator[Seer]:
    """A client of the server at `url`, which chooses its model itself, or the model in this process."""
    if torch is not None:
        if url is not None:
            raise InvalidInput("a server has its own backend: leave out url, or torch", param="url")
        yield torch.open(repository, model)
        return
    if url is None:
        from saccade.local import Local

        with Local(repository, model) as local:
            yield local
        return
    if repository is not None or model is not None:
        raise InvalidInput("the server chooses its own model: give a url, or a model and its repository", param="url")
    from saccade.client import Client

    with Client(url) as client:
        yield client


def _known(tasks: Sequence[TaskName], seer: Any) -> list[TaskName]:
    """Those of the tasks that the model has. Raises InvalidInput where it has none of them."""
    known = [task for task in tasks if task in seer.card.tasks]
    if not known:
        raise InvalidInput(
            f"the model does {', '.join(seer.card.tasks) or 'nothing'}, not {', '.join(tasks)}", param="task"
        )
    return known


def _trial(item: Item) -> Trial:
    if isinstance(item, DepthItem):
        return DepthTrial(item)
    return FlowTrial(item) if isinstance(item, FlowItem) else AmodalTrial(item)


def _ask(item: Item, trial: Trial, seer: Seer, options: Options) -> tuple[Answer, float]:
    """The answer, checked, and the seconds that it took."""
    choices: Choices = {k: v for k, v in asdict(options).items() if v is not None}  # type: ignore[assignment]
    began = time.perf_counter()
    try:
        answer = trial.ask(seer, choices)
        _check(answer, trial)
    except Exception as error:
        error.add_note(f"while evaluating {item.task}/{item.name}")
        raise
    return answer, time.perf_counter() - began


def _check(answer: Answer, trial: Trial) -> None:
    if answer.prediction.shape != tuple(trial.size):
        raise ModelError(f"the prediction is {answer.prediction.shape}, the picture wants {tuple(trial.size)}")
    if not np.isfinite(answer.prediction).all():
        raise ModelError("the prediction has values that are not finite")


def _score(item: Item, trial: Trial, prediction: NDArray[Any], seconds: float) -> PictureScore:
    return PictureScore(
        item.task,
        item.name,
        trial.groups,
        trial.share,
        trial.measure(prediction),
        trial.baselines(),
        seconds,
        trial.strip(prediction),
    )


def _points(steps: int, members: int, scores: Sequence[PictureScore]) -> Iterator[SweepPoint]:
    for task in dict.fromkeys(score.task for score in scores):
        found = [score for score in scores if score.task == task]
        seconds = float(np.mean([score.seconds for score in found]))
        for group in dict.fromkeys(group for score in found for group in score.groups):
            for metric in METRICS[task]:
                yield SweepPoint(mean_of(task, group, metric, found), steps, members, seconds)


def _reported(items: Sequence[Item], progress: Progressed | None) -> Iterator[Item]:
    for done, item in enumerate(items):
        if progress:
            progress(done, len(items), f"{item.task}/{item.name}")
        yield item
    if progress:
        progress(len(items), len(items), "")


@contextmanager
def _bar(console: Console, title: str) -> Iterator[Progressed]:
    name = TextColumn("{task.description}")
    with Progress(title, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), name, console=console) as bar:
        row = bar.add_task("", total=None)
        yield lambda done, total, name: bar.update(row, completed=done, total=total, description=name)


def _publish(text: str, written: Sequence[Path]) -> None:
    """Markdown to standard output, unwrapped, then the files written."""
    console = Console()
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    for path in written:
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.split("\n\n")[0])
    parser.add_argument("data", type=Path, help="folder with depth/, flow/ and amodal/")
    parser.add_argument("--url", help="evaluate a running server instead of a model in this process")
    parser.add_argument("--repository", type=Path, help="model repository; default: the one that comes with saccade")
    parser.add_argument("--model", help="denoiser of the repository; default: its only one")
    parser.add_argument("--tasks", nargs="+", choices=ALL_TASKS, default=ALL_TASKS)
    parser.add_argument("--steps", type=int, help="DDIM steps; default: the model's")
    parser.add_argument("--ensemble-size", type=int, help="members; default: the model's")
    parser.add_argument("--reduction", help="mean, median or aligned_median; default: the model's for each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processing-resolution", type=int, help="longer edge in pixels; default: the model's")
    parser.add_argument("--out", type=Path, help="folder for the report, its tables and its pictures")
    parser.add_argument("--sweep", action="store_true", dest="run_sweep", help="also measure steps x members")
    return parser


if __name__ == "__main__":
    try:
        main(**vars(_arguments().parse_args()))
    except SaccadeError as error:
        raise SystemExit(f"saccade: {error}") from error

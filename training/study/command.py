"""The command: run what is not done, judge it, write the report anew after every run."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from saccade.errors import InvalidInput, SaccadeError
from training.stages.command import stage_of
from training.study import judge, plan, report
from training.study.plan import Run, Study

RESULT = "result.json"
PARTS = ("depth", "flow", "amodal", "denoising")


def main(config: Path, out: Path, threads: int = 1, only: Sequence[str] = (), data: str = "") -> dict[str, Any]:
    """Run the study of a TOML file and return what results.json says. `only`: axes to run and report; `data`
    in place of the study's own.

    A run that was cut short goes on, one that is done is not done again, and one that another axis has already made is
    taken from there. Raises InvalidInput for a study that cannot be, or a folder whose runs were of another one.
    """
    study = plan.read(config, data)
    if threads < 1:
        raise InvalidInput(f"threads must be at least 1, not {threads}", param="threads")
    if unknown := set(only) - set(study.axes):
        raise InvalidInput(f"the study has no axis {', '.join(sorted(unknown))}", param="only")
    torch.set_num_threads(threads)
    runs = [run for run in plan.runs_of(study) if not only or run.axis in only]
    done: dict[str, dict[str, Any]] = {}
    folders = {run.name: out / "runs" / run.name for run in plan.runs_of(study)}
    plan.check_folders(study, [run for run in runs if not (folders[run.name] / RESULT).exists()])
    console, begun = Console(stderr=True), time.monotonic()
    results: dict[str, Any] = {}
    for number, run in enumerate(runs, 1):
        same = next((row for row in done.values() if row["key"] == run.key), None)
        new = same is None and not (folders[run.name] / RESULT).exists()
        if new:
            minutes = (time.monotonic() - begun) / 60
            console.print(f"{number}/{len(runs)} {run.name}, {minutes:.0f} min so far", highlight=False)
        row = finished(study, run, folders) if same is None else same
        if same is not None:
            folders[run.name] = folders[same["run"]]
        told = {"run": run.name, "axis": run.axis, "point": run.point, "seed": run.seed}
        done[run.name] = {**row, **told, "losses": losses(folders[run.name])}
        if new or number == len(runs):
            results = {"about": study.about, "axes": axes_of(study, done), "runs": list(done.values())}
            write(out / "results.json", results)
            report.write(results, out)
    return results


def axes_of(study: Study, done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the report has to know of the axes of which something is done."""
    begun = {row["axis"] for row in done.values()}
    return {
        name: {
            "about": axis.about,
            "dimensions": list(axis.grid),
            "beside": list(axis.beside),
            "law": axis.law,
            "fit": axis.fit,
        }
        for name, axis in study.axes.items()
        if name in begun
    }


def finished(study: Study, run: Run, folders: dict[str, Path]) -> dict[str, Any]:
    """The result of a run, trained and judged unless it is there."""
    folder = folders[run.name]
    file = folder / RESULT
    if file.exists():
        row: dict[str, Any] = json.loads(file.read_text())
        if row["key"] != run.key:
            raise InvalidInput(f"{folder} is of another study: the values of {run.name} have changed", param="out")
        return row
    values = plan.resolved(run.values, folders)
    config = judge.config_of(run.stage, values)
    if run.macs is not None:
        each = judge.macs_of(judge.network_of(run.stage, config), config, config.loop.batch)
        values.setdefault("loop", {})["steps"] = max(1, round(run.macs / each))
        config = judge.config_of(run.stage, values)
    stage_of(run.stage).run(config, folder, device="cpu")
    judged = judge.judged(study.judge, run, values, folder, study.judge.pictures.replace("{data}", study.data))
    row = {"key": run.key, "stage": run.stage, "values": values, **judged}
    write(file, {**row, "run": run.name})
    return {**row, "run": run.name}


def write(file: Path, table: dict[str, Any]) -> None:
    """Written aside and renamed, so that a kill leaves no half of it."""
    aside = file.with_name(f"{file.name}.part")
    with aside.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(table, indent=1))
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)


def losses(folder: Path) -> list[list[float]]:
    """[step, mean training error since the row before] of a run's log, without a mixture's balance loss."""
    found = []
    for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines()):
        if "loss" in row:
            parts = [row[name] for name in PARTS if name in row]
            found.append([row["step"], sum(parts) / len(parts) if parts else row["loss"]])
    return found


def command(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.study", description=__doc__)
    parser.add_argument("config", type=Path, help="TOML; training/configs has examples")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of what comes of them")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--data", default="", help="folder that {data} stands for (default: the study's own)")
    parser.add_argument("--only", nargs="+", default=(), metavar="AXIS", help="these axes alone")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        main(args.config, args.out, args.threads, args.only, args.data)
    except (SaccadeError, OSError) as error:
        raise SystemExit(f"saccade: {error}") from error

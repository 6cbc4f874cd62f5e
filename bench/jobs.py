"""Kill -9 with jobs in the queue: every one is answered, each once, and with the right bytes.

    python -m bench.jobs [--jobs 50] [--out docs/jobs-killed.md]

So many different requests are left with a server of the repository's model (`Prefer: respond-async`). When a fifth of
them is done the process is killed. A second server gets the same file. Counted are the results, the answers that were
computed to their end (before the kill, by the jobs' own times; after it, by the server's counter), and the results that
differ from what the server says when asked at once.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from bench.gateway import ask, spawned
from bench.machine import describe

OPTIONS: dict[str, Any] = {"processing_resolution": 128, "steps": 2}
COUNTER = 'saccade_jobs_finished_total{status="done",task="depth"} '
SETTINGS: dict[str, object] = {"batch_size": 1, "jobs_at_once": 2, "jobs_limit": 10_000}


@dataclass
class Report:
    taken_ms: list[float] = field(default_factory=list)
    done_before: int = 0
    running_at_kill: int = 0
    queued_at_kill: int = 0
    ready_s: float = 0.0
    rest_s: float = 0.0
    results: int = 0
    answers: int = 0
    repeated: int = 0
    wrong: int = 0


async def bench(count: int, folder: Path) -> Report:
    report, settings = Report(), SETTINGS | {"jobs_file": folder / "jobs.sqlite"}
    async with spawned(**settings) as (client, process):
        paths = [await _submit(client, seed, report) for seed in range(count)]
        await asyncio.gather(*(_ended(client, path) for path in paths[: count // 5]))
        before = await _documents(client)
        process.kill()
        process.wait()
        killed = datetime.now(UTC)
    states = [job["status"] for job in before.values()]
    report.done_before, report.running_at_kill = states.count("done"), states.count("running")
    report.queued_at_kill = states.count("queued")
    began = time.perf_counter()
    async with spawned(**settings) as (client, _):
        report.ready_s = time.perf_counter() - began
        await asyncio.gather(*(_ended(client, path) for path in paths))
        report.rest_s = time.perf_counter() - began - report.ready_s
        after = await _documents(client)
        computed = _counter((await client.get("/metrics")).text)
        earlier = sum(datetime.fromisoformat(job["finished"]) < killed for job in after.values())
        report.answers = earlier + computed
        report.repeated = sum(after[name] != job for name, job in before.items() if job["status"] == "done")
        for seed, path in enumerate(paths):
            result = await client.get(f"{path}/result")
            report.results += result.status_code == 200
            report.wrong += result.content != (await ask(client, "depth", seed=seed, **OPTIONS)).content
    return report


async def _submit(client: httpx.AsyncClient, seed: int, report: Report) -> str:
    """The path of the job; the key makes it one job however often it is sent."""
    began = time.perf_counter()
    headers = {"Prefer": "respond-async", "Idempotency-Key": f"bench-{seed}"}
    response = await ask(client, "depth", headers, seed=seed, **OPTIONS)
    report.taken_ms.append((time.perf_counter() - began) * 1e3)
    response.raise_for_status()
    return response.headers["location"]


async def _ended(client: httpx.AsyncClient, path: str) -> None:
    (await client.get(f"{path}/events")).raise_for_status()


async def _documents(client: httpx.AsyncClient) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    query: dict[str, str] = {"limit": "100"}
    while query:
        page = (await client.get("/jobs", params=query)).json()
        found |= {job["id"]: job for job in page["jobs"]}
        query = {"limit": "100", "cursor": page["cursor"]} if page["cursor"] else {}
    return found


def _counter(metrics: str) -> int:
    return sum(round(float(line.removeprefix(COUNTER))) for line in metrics.splitlines() if line.startswith(COUNTER))


def written(count: int, report: Report) -> str:
    rows = {
        "jobs left with the server": count,
        "time to 202, ms: median, max": f"{statistics.median(report.taken_ms):.0f}, {max(report.taken_ms):.0f}",
        "done, running, queued when killed": f"{report.done_before}, {report.running_at_kill}, {report.queued_at_kill}",
        "second server ready after, s": f"{report.ready_s:.1f}",
        "rest of the jobs after, s": f"{report.rest_s:.1f}",
        "answers computed to their end, in both lives": report.answers,
        "results": report.results,
        "done before and touched again": report.repeated,
        "results that differ from the answer at once": report.wrong,
    }
    head = (
        f"# Jobs through kill -9\n\nMade by `python -m bench.jobs`.\nMachine: {describe('onnxruntime', 'numpy')}.\n\n"
    )
    return head + "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.jobs", description=__doc__)
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(bench(chosen.jobs, Path(folder)))
    text = written(chosen.jobs, report)
    sys.stdout.write(text)
    if chosen.out is not None:
        chosen.out.write_text(text)
    sound = report.results == report.answers == chosen.jobs and not report.repeated and not report.wrong
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())

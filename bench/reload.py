"""Models that change under load: requests all the while, the alias moved there and back, every answer checked.

    python -m bench.reload [--requests 1000] [--moves 8] [--backends embedded triton] [--out docs/reload.md]

The successor is the repository's model under another name, with weaker weights in its denoiser, so that its answers
differ. It is put beside the other only when everything runs, as a new model comes in production. The file named by the
setting `model_file` is then rewritten again and again, while `--concurrent` clients ask for all three tasks. Each
answer must be 200, and what the model whose digest it names answers at rest: so none is lost, and none is half one
model's and half the other's. `triton` starts the real server (tests/triton/server.py).
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
from google.protobuf import text_format
from numpy.typing import NDArray
from onnx import numpy_helper

from bench.gateway import PARTS, ask, gateway
from bench.machine import describe
from saccade.card import PARAMETER
from saccade.repository import CONFIG, Repository, find_repository, sha256
from saccade.tasks import TaskName

OPTIONS = {"processing_resolution": 128, "steps": 2}
SAME = 1e-3  # mean absolute difference below which two maps are one model's; the two models differ by far more
Map = NDArray[np.float64]
Key = tuple[str, TaskName]


def succeed(repository: Path, name: str, successor: str) -> None:
    """Put `successor` beside `name`: the same three models under new names, with other weights in the denoiser."""
    card = Repository(repository).card(name)
    renamed = {old: old.replace(name, successor, 1) for old in (card.encoder, card.decoder, name)}
    for old, new in renamed.items():
        shutil.copytree(repository / old, repository / new, ignore=shutil.ignore_patterns(CONFIG))
    graph = next((repository / successor).glob("*/model.onnx"))
    _weaken(graph)
    facts = json.loads(card.model_dump_json())
    facts |= {"name": successor, "encoder": renamed[card.encoder], "decoder": renamed[card.decoder]}
    facts["digests"] = {renamed[old]: digest for old, digest in card.digests.items()} | {successor: sha256(graph)}
    for old, new in renamed.items():
        config = Repository(repository).config(old)
        config.name = new
        if PARAMETER in config.parameters:
            config.parameters[PARAMETER].string_value = json.dumps(facts)
        (repository / new / CONFIG).write_text(text_format.MessageToString(config))


def _weaken(graph: Path) -> None:
    """Every weight of the graph with more than one axis."""
    model = onnx.load(graph)
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT and len(weight.dims) > 1:
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(0.7), weight.name))
    onnx.save(model, graph)


class Names:
    """The file that says which model is wanted; written as a ConfigMap is, at once."""

    def __init__(self, file: Path, name: str) -> None:
        self.file = file
        self.write(name)

    def write(self, name: str) -> None:
        fresh = self.file.with_suffix(".new")
        fresh.write_text(name)
        os.replace(fresh, self.file)


@dataclass
class Answers:
    """What came back. `wrong` counts answers that are not what their model answers at rest."""

    references: dict[Key, Map]
    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    farthest: float = 0.0

    def add(self, task: TaskName, answer: httpx.Response, seconds: float) -> None:
        self.statuses[answer.status_code] += 1
        self.seconds.append(seconds)
        if answer.status_code != 200:
            sys.stderr.write(f"{answer.status_code} {answer.text}\n")
            return
        digest = answer.headers["saccade-digest"]
        self.models[answer.headers["saccade-model"]] += 1
        apart = distance(read(answer), self.references[digest, task])
        self.farthest = max(self.farthest, apart)
        self.wrong += apart > SAME

    @property
    def failed(self) -> int:
        return self.statuses.total() - self.statuses[200]


def read(answer: httpx.Response) -> Map:
    answer.raise_for_status()
    return np.load(io.BytesIO(answer.content)).astype(np.float64)


def distance(a: Map, b: Map) -> float:
    return float(np.abs(a - b).mean())


class Reload:
    """One gateway that is asked while its model changes."""

    def __init__(self, client: httpx.AsyncClient, names: Names, models: tuple[str, str]) -> None:
        self.client, self.names, self.models = client, names, models
        self.moves_s: list[float] = []

    async def references(self) -> dict[Key, Map]:
        """What each model answers at rest. Raises RuntimeError if the two cannot be told apart."""
        found = {}
        for name in self.models[::-1]:  # to end on the first
            await self.move(name)
            for task in PARTS:
                answer = await ask(self.client, task, **OPTIONS)
                found[answer.headers["saccade-digest"], task] = read(answer)
        for task in PARTS:
            one, other = (value for (_, asked), value in found.items() if asked == task)
            if distance(one, other) < 10 * SAME:
                raise RuntimeError(f"the two models answer {task} alike: {distance(one, other):.2g}")
        self.moves_s.clear()
        return found

    async def move(self, name: str) -> None:
        """Ask for the model; return when it is the one that serves and no other is open."""
        began = time.perf_counter()
        self.names.write(name)
        async with asyncio.timeout(120):
            while (await self.client.get("/readyz")).json().get("model") != name:
                await asyncio.sleep(0.02)
            self.moves_s.append(time.perf_counter() - began)
            while 'state="leaving"' in (await self.client.get("/metrics")).text:
                await asyncio.sleep(0.02)

    async def run(self, requests: int, moves: int, concurrent: int) -> Answers:
        """At least `requests`, and until the last of `moves` is made."""
        answers = Answers(await self.references())
        numbers, moving = count(), asyncio.Event()

        async def client() -> None:
            while (number := next(numbers)) < requests or not moving.is_set():
                task = list(PARTS)[number % len(PARTS)]
                began = time.perf_counter()
                answer = await ask(self.client, task, **OPTIONS)
                answers.add(task, answer, time.perf_counter() - began)

        async def mover() -> None:
            for number in range(moves):
                while len(answers.seconds) < requests * (number + 1) // (moves + 1):
                    await asyncio.sleep(0.02)
                await self.move(self.models[(number + 1) % 2])
            moving.set()

        await asyncio.gather(mover(), *(client() for _ in range(concurrent)))
        return answers


@contextmanager
def triton(repository: Path, folder: Path) -> Iterator[dict[str, object]]:
    """The real server; the settings of a gateway in front of it."""
    from tests.triton.server import TritonServer

    server = TritonServer(repository, folder / "triton")
    try:
        server.start()
        yield {"backend": "triton", "triton_url": server.url}
    finally:
        server.close()


@asynccontextmanager
async def reload(backend: str, source: Path, folder: Path) -> AsyncIterator[Reload]:
    repository = folder / "model_repository"
    shutil.copytree(source, repository)
    name = Repository(repository).default()
    names = Names(folder / "model", name)
    settings: dict[str, Any] = {"model_repository": repository, "model_file": names.file, "batch_size": 1}
    with triton(repository, folder) if backend == "triton" else _nothing() as more:
        async with gateway(folder / "gateway.log", **settings, **more) as client:
            successor = f"{name}-next"
            succeed(repository, name, successor)
            yield Reload(client, names, (name, successor))


@contextmanager
def _nothing() -> Iterator[dict[str, object]]:
    yield {}


async def bench(backend: str, source: Path, requests: int, moves: int, concurrent: int) -> str:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            async with reload(backend, source, Path(folder)) as run:
                answers = await run.run(requests, moves, concurrent)
                taken = [f"{statistics.median(run.moves_s):.1f}", f"{max(run.moves_s):.1f}"]
        except BaseException:
            sys.stderr.write((Path(folder) / "gateway.log").read_text()[-4000:])
            raise
    cuts = statistics.quantiles(answers.seconds, n=100)
    shared = " / ".join(str(answers.models[name]) for name in run.models)
    cells = [backend, len(answers.seconds), answers.failed, answers.wrong, f"{answers.farthest:.1g}", moves, shared]
    cells += [*taken, *(f"{second * 1e3:.0f}" for second in (cuts[49], cuts[98], max(answers.seconds)))]
    return "| " + " | ".join(map(str, cells)) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="models that change under load")
    parser.add_argument("--repository", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--moves", type=int, default=8)
    parser.add_argument("--concurrent", type=int, default=4)
    parser.add_argument("--backends", nargs="+", choices=["embedded", "triton"], default=["embedded", "triton"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    source = find_repository(args.repository)
    busy = os.getloadavg()[0]
    rows = [asyncio.run(bench(name, source, args.requests, args.moves, args.concurrent)) for name in args.backends]
    asked = ", ".join(f"{name} {value}" for name, value in OPTIONS.items())
    table = "\n".join(
        [
            f"{args.concurrent} clients ask for the three tasks in turn ({asked}) while the alias moves.",
            "Wrong: not what the model that the answer names says at rest; the largest mean difference from that is in",
            "the next column. A move takes from writing the file to readiness.",
            f"Machine: {describe('onnxruntime', 'openvino', 'numpy')}; load average before: {busy:.1f}.",
            "",
            "| backend | requests | failed | wrong | difference | moves | answered by each | move, s: median | max "
            "| request, ms: median | p99 | max |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
            *rows,
        ]
    )
    sys.stdout.write(table + "\n")
    if args.out:
        args.out.write_text(f"# Models that change under load\n\nMade by `python -m bench.reload`.\n\n{table}\n")


if __name__ == "__main__":
    main()

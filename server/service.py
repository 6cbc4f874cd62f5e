"""The running house, and the life of a request between its form and its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from starlette.types import Receive

from saccade import formats, render, sequence
from saccade.anytime import Spend
from saccade.backends import Ticket
from saccade.backends.engines import default_threads
from saccade.backends.stepping import Stepping
from saccade.dial import Limits
from saccade.errors import InvalidInput, UnsupportedPicture
from saccade.formats.pictures import open_picture, refusing
from saccade.formats.video import is_video
from saccade.pipeline import Answer, Inputs, Resolved
from saccade.planner import Planner
from saccade.render import Encoded, Format
from saccade.sequence import Seen
from saccade.tasks import TASKS, TaskName
from server import budgets, guard, options, problems, several, tracing
from server.admission import Admission, Overloaded, Size, footprint, padded, work
from server.alias import Alias, Opener
from server.cache import Bounded, Kept
from server.drain import Drain
from server.events import Witness
from server.model import Model
from server.options import Wanted
from server.problems import ClientGone, Problem
from server.settings import Settings
from server.several import Several
from server.telemetry import Metrics
from server.watchdog import Watchdog

T = TypeVar("T")


def picture_names(task: TaskName) -> tuple[str, ...]:
    prompt = TASKS[task].prompt
    return ("image",) if prompt == "none" else ("image", prompt)


@dataclass(frozen=True)
class Job:
    """A request that has passed every check that needs no pixel, and the model that will answer it.

    `options` are the least that may be computed until its `spend` is planned. `client`: the name of its key.
    """

    model: Model
    task: TaskName
    pictures: dict[str, bytes]
    wanted: Wanted
    options: Resolved
    format: Format
    began: float
    several: Several | None = None
    client: str | None = None
    weight: float = 1.0
    longest_s: float = float("inf")
    spend: Spend | None = None
    ticket: Ticket | None = None


class Service:
    """What every request shares: the alias of the model, admission, and the threads that read pictures."""

    def __init__(self, settings: Settings, open_backend: Opener, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.tracing = tracing.opened(settings)
        self.alias = Alias(settings, open_backend, metrics, tracing=self.tracing)
        self.admission = Admission(settings.queue_limit)
        self.drain, self.guard = Drain(), guard.opened(settings.memory_limit_bytes, settings.memory_share)
        self.watchdog = Watchdog(lambda: self.alias.open, settings.stuck_after_s)
        self.limits = Limits(settings.max_steps, settings.max_ensemble_size)
        self.planner = Planner(self.limits)
        self.answers: Bounded[Kept] = Bounded(
            settings.answer_cache_bytes, lambda found: metrics.cache.labels("answers", found).inc()
        )
        self.tables = {task: options.table(settings, task) for task in TASKS}
        self._pool = ThreadPoolExecutor(settings.threads or default_threads(), thread_name_prefix="pictures")
        self.clips = several.Clips()
        self._gauges()

    async def begin(self) -> None:
        """A model in this process must be in order now: raises SaccadeError. One behind Triton may come later."""
        if self.settings.backend == "embedded":
            await self.alias.begin()

    async def aclose(self) -> None:
        await self.alias.aclose()
        if self.tracing is not None:
            await self.tracing.aclose()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.clips.close()

    @property
    def obstacle(self) -> str | None:
        """Why new requests should go elsewhere, whatever the model would say; None where there is no reason."""
        if self.drain.leaving:
            return "the server is shutting down"
        return self.watchdog.fault or ("its memory is used up" if self.guard.exhausted else None)

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Off the event loop, in a pool of its own: pictures wait for pictures and for nothing else."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    async def rows(self, job: Job) -> list[tuple[Size, ...]]:
        """(H, W) of each question's pictures; reads a video. Raises Problem or InvalidInput where that is enough to
        refuse them."""
        if job.several is not None:
            rows = await several.rows(self, job, job.several)
        else:
            rows = [tuple(await self.in_thread(lambda: self.sizes(job.pictures)))]
        for sizes in dict.fromkeys(rows):
            self.check_size(job, sizes[0])
        return rows

    def cost(self, job: Job, rows: Sequence[Sequence[Size]], previews: int = 0) -> float:
        """Units of work of all questions."""
        card = job.model.card
        total = sum(work(card, job.task, job.options, sizes, previews) for sizes in rows)
        if job.several is not None and job.several.steady:
            how = sequence.guide(card, job.options)
            total += sum(work(card, "flow", how, [sizes[0], sizes[0]]) for sizes in rows[1:])
        return total

    async def answer(self, job: Job, watch: Witness | None = None) -> tuple[Answer, Encoded]:
        """Plan, admit, decode, compute, encode. Raises Problem, InvalidInput, and what the pipeline raises."""
        rows = await self.rows(job)
        job = budgets.planned(self, job, rows)
        cost = self.cost(job, rows, 0 if watch is None else job.wanted.previews)
        held = footprint(job.model.card, job.task, job.options, rows)
        try:
            with budgets.admitted(self, job, cost, rows), self.guard.hold(held):
                if watch is not None:
                    watch.begin(job.task, job.options, job.wanted.previews, len(rows))
                answer, encoded = await self._compute(job, watch)
        except Overloaded as error:
            self.metrics.rejected.labels(job.task).inc()
            raise Problem(problems.OVERLOADED, budgets.refusal(error), retry_after_s=error.retry_after_s) from error
        budgets.count(self, job, answer.plan)
        return answer, encoded

    async def _compute(self, job: Job, watch: Witness | None) -> tuple[Answer, Encoded]:
        if job.several is not None:
            answer, encoded = await several.compute(self, job, job.several, watch)
            self.metrics.phases(job.task, answer.timings_ms)
            return answer, encoded
        began = time.perf_counter()
        inputs = await self.in_thread(lambda: self.inputs(job.task, job.pictures))
        budgets.read(self, job, [inputs], began)
        seen = await self.ask(job, [inputs], watch)
        answer = seen[0]
        total_ms = (time.perf_counter() - job.began) * 1e3
        answer = replace(answer, timings_ms={**answer.timings_ms, "total": total_ms})
        self.metrics.phases(job.task, answer.timings_ms)
        style, encoding = job.wanted.render, job.wanted.encoding or "png16"
        picture = inputs.image if style == "color" else None
        began = time.perf_counter()
        encoded = await self.in_thread(lambda: render.encode(answer, job.format, style, encoding, picture=picture))
        budgets.wrote(self, job, [inputs], began)
        return answer, encoded

    async def ask(self, job: Job, asked: Sequence[Inputs], watch: Witness | None, fps: float | None = None) -> Seen:
        """The answers to a job's questions, of which the planner learns."""
        seen = await sequence.ask(
            job.model.pipeline,
            asked,
            job.options,
            steadily=job.several is not None and job.several.steady,
            known=job.wanted.known_depths,
            fps=fps,
            watch=watch,
            ticket=job.ticket,
            spend=job.spend,
        )
        budgets.learn(self, job, asked, seen)
        return seen

    def sizes(self, pictures: dict[str, bytes]) -> list[Size]:
        """(H, W) from the headers alone, before any pixel is decoded."""
        limit = self.settings.max_pixels
        sizes = []
        for name, data in pictures.items():
            try:
                with refusing(name), open_picture(data, max_pixels=limit, param=name) as opened:
                    sizes.append((opened.height, opened.width))
            except UnsupportedPicture as error:
                if "mask" in pictures or not is_video(data):
                    raise
                raise UnsupportedPicture(f"{error} This looks like a video: send it as `video`.", param=name) from error
        return sizes

    def check_size(self, job: Job, size: Size) -> None:
        most = self.settings.max_processing_resolution
        card = job.model.card
        given = padded(card, job.task, job.options, size)
        multiple = card.latent.multiple
        if max(given) > -(-most // multiple) * multiple:
            raise InvalidInput(
                f"the model would be given {given[1]} x {given[0]} px; ask for a processing_resolution of 1 to {most}",
                param="processing_resolution",
            )

    def inputs(self, task: TaskName, pictures: dict[str, bytes]) -> Inputs:
        """Decode what is asked about. Raises InvalidInput."""
        limit = self.settings.max_pixels
        read = {
            name: formats.read_mask(data, max_pixels=limit, param=name)
            if name == "mask"
            else formats.read_picture(data, max_pixels=limit, param=name)
            for name, data in pictures.items()
        }
        return Inputs(task, **read)  # type: ignore[arg-type]

    def _lanes(self) -> list[Stepping]:
        return [model.stepping for model in self.alias.open]

    def _gauges(self) -> None:
        gauge, alias, guarded, watchdog = self.metrics.gauge, self.alias, self.guard, self.watchdog
        lanes = self._lanes
        gauge("saccade_queue_depth", "Requests with a row that waits.", lambda: sum(x.waiting_tickets for x in lanes()))
        gauge("saccade_running_steps", "Denoising steps that run.", lambda: sum(x.running_steps for x in lanes()))
        gauge("saccade_engine_stuck", "1 while an engine is stuck, else 0.", lambda: watchdog.stuck)
        gauge("saccade_loop_lag_seconds", "How late the event loop was.", lambda: watchdog.lag_s)
        gauge("saccade_memory_used_bytes", "Memory used, of the nearest limit.", lambda: guarded.nearest.used)
        gauge("saccade_memory_limit_bytes", "The nearest limit.", lambda: guarded.nearest.limit)
        gauge("saccade_memory_promised_bytes", "Memory promised to requests.", lambda: guarded.held)
        gauge("saccade_leaving", "1 from SIGTERM on, else 0.", lambda: self.drain.leaving)
        guarded.refused = self.metrics.memory_refused.inc
        gauge("saccade_latent_cache_bytes", "Encoded pictures kept.", lambda: sum(m.latents.bytes for m in alias.open))
        gauge("saccade_answer_cache_bytes", "Whole answers kept.", lambda: self.answers.bytes)
        gauge("saccade_queue_rows", "Rows that wait for a batch.", lambda: sum(m.stepping.waiting for m in alias.open))
        gauge("saccade_running_rows", "Rows in batches that run.", lambda: sum(m.stepping.running for m in alias.open))
        gauge("saccade_pending_work", "Admitted work, in steps of 256 x 256 px.", lambda: self.admission.pending)
        gauge("saccade_pending_requests", "Admitted requests.", lambda: self.admission.requests)
        gauge("saccade_backlog_seconds", "Seconds of admitted work.", lambda: sum(x.backlog_s for x in lanes()))
        gauge("saccade_work_rate", "Work finished per second.", lambda: self.admission.rate.per_second)
        gauge("saccade_model_settled", "1 while the model that is wanted serves, else 0.", lambda: alias.settled)
        self.metrics.info(
            "saccade_triton_endpoint",
            "Triton's endpoints, and the state that each is in: up, loading or gone.",
            ("model", "address", "state"),
            lambda: [(m.name, address, state) for m in alias.open for address, state in m.endpoints.items()],
        )
        self.metrics.info(
            "saccade_engine_info",
            "What multiplies for a model of this process, how, and the sizes that have graphs of their own.",
            ("model", "engine", "precision", "threads", "streams", "sizes"),
            lambda: [(m.name, *m.engine.values()) for m in alias.open if m.engine],
        )
        self.metrics.info(
            "saccade_model_info",
            "The model that serves, and one that leaves and ends its last requests.",
            ("model", "digest", "state"),
            lambda: [(m.name, m.card.digest, "serving" if m is alias.serving else "leaving") for m in alias.open],
        )


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; when the client leaves, the work is cancelled at once and ClientGone raised.

    The body must have been read. Whoever cancels this cancels the work too.
    """
    working, leaving = asyncio.create_task(work), asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

"""Jobs from their coming to their end: kept first, run in turn by the code that answers everybody, told to who asks."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from fastapi import Response

from saccade.errors import SaccadeError
from server import problems
from server.events import Events, Witness
from server.jobs import place, replay, webhook
from server.jobs.records import Asked, Record, Result
from server.jobs.store import Store
from server.jobs.webhook import Courier
from server.problems import Problem
from server.respond import respond
from server.service import Service

MOST_ATTEMPTS = 5
MOST_COURIERS = 16
MOST_RESULT_BYTES = 900_000_000  # SQLite takes no more than 10^9 in one row
LONGEST_WAIT_S = 60.0
TIDY_S, LOOK_S, AGAIN_S = 30.0, 0.5, 1.0
T = TypeVar("T")
NOT_THE_JOBS_FAULT = (problems.OVERLOADED, problems.LOW_MEMORY, problems.UNAVAILABLE)
logger = logging.getLogger(__name__)


class Jobs:
    """The jobs of one server. Everything here runs on its event loop but the store, which has a thread of its own.

    A job is written down before its caller hears of it, and its result before it counts as done: whenever the process
    ends, what was not done is run again by the next one, and what was done is never run again.
    """

    def __init__(self, house: Service, weight_of: Callable[[str], float] = lambda _: 1.0) -> None:
        self.house, self.settings, self._weight_of = house, house.settings, weight_of
        self._begun = False
        self._store: Store | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jobs")
        self._live: dict[str, Events] = {}
        self._running: dict[str, asyncio.Task[Response]] = {}
        self._came, self._ended = asyncio.Event(), asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []
        self._courier: Courier | None = None
        metrics = house.metrics
        metrics.gauge(
            "saccade_jobs_queued", "Jobs that wait.", lambda: 0 if self._store is None else self._store.queued
        )
        metrics.gauge("saccade_jobs_running", "Jobs that run.", lambda: len(self._running))

    @property
    def on(self) -> bool:
        return self._store is not None

    async def begin(self) -> None:
        """Open the store; what waits in it is run from now on. Raises SaccadeError where it cannot be had."""
        if self._begun:
            return
        self._begun = True
        self._store = await self._in_thread(lambda: place.opened(self.settings))
        if self._store is None:
            return
        waited = self._store.queued
        given_up = await self._do(lambda store: store.interrupted(MOST_ATTEMPTS))
        if going_on := self._store.queued:
            logger.info("%d jobs go on (%d queued)", going_on, waited)
        for record in given_up:
            await self._finish(record, self._events(record.id), problems.response(_given_up()))
        if (secret := place.secret(self.settings.webhook_secret_file)) is not None:
            self._courier = Courier(secret, self.settings.webhook_allow_private)
        loops = [self._work] * self.settings.jobs_at_once + [self._tidy, self._tell, self._leave]
        self._loops = [asyncio.create_task(_unfailing(loop)) for loop in loops]

    async def aclose(self) -> None:
        """Jobs that run go back to those that wait, for the next process."""
        await _stop(self._loops)
        for told in self._live.values():
            told.close()
        if self._courier is not None:
            await self._courier.aclose()
        if self._store is not None:
            await self._in_thread(self._store.close)
        self._thread.shutdown()

    async def submit(self, owner: str, asked: Asked, hook: str | None, key: str | None) -> Record:
        """Raises store.Full or store.KeyReused."""
        record, new = await self._do(lambda store: store.add(owner, asked, hook, key))
        if new:
            self._came.set()
        return record

    async def find(self, identity: str, owner: str) -> Record | None:
        record = await self._do(lambda store: store.get(identity))
        return record if record is not None and record.owner == owner else None

    async def result(self, record: Record, whole: bool = True) -> Result | None:
        """Without its body unless the `whole` is wanted."""
        return await self._do(lambda store: store.result(record.id, whole))

    async def page(self, owner: str, count: int, before: int | None) -> list[Record]:
        return await self._do(lambda store: store.page(owner, count, before))

    async def cancel(self, record: Record) -> Record | None:
        """The job, withdrawn wherever it stands, unless it has ended meanwhile."""
        now = await self._do(lambda store: store.cancel(record.id))
        if now is not None and now.status == "cancelled":
            if (task := self._running.get(record.id)) is not None:
                task.cancel()
            await self._end(record.id, self._events(record.id), problems.response(cancelled()))
        return now

    async def forget(self, record: Record) -> None:
        await self._do(lambda store: store.forget(record.id))

    async def follow(self, record: Record, last: int) -> Events:
        """What happens to the job from here on; for one that has ended, how it ended, numbered after `last`."""
        live = self._events(record.id)
        live.followers += 1  # a job that ends meanwhile tells how
        try:
            now = await self._do(lambda store: store.get(record.id))
        finally:
            live.followers -= 1
        if now is not None and now.unfinished:
            self._dismiss(record.id, live)
            return live
        self._live.pop(record.id, None)
        result = await self.result(record)
        ended = Events(last)
        told = problems.response(cancelled() if record.status == "cancelled" else expired())
        await ended.end(told if result is None else Response(result.body, result.status, result.headers))
        return ended

    def _events(self, identity: str) -> Events:
        return self._live.setdefault(identity, Events())

    def _dismiss(self, identity: str, told: Events) -> None:
        """Nobody stays for a job that this server will not run any more."""
        if self.house.drain.leaving and identity not in self._running:
            told.close()

    async def _end(self, identity: str, told: Events, response: Response) -> None:
        self._live.pop(identity, None)
        if told.followers > 0:
            await told.end(response)
        told.close()  # who comes later reads the store

    async def _work(self) -> None:
        while not self.house.drain.leaving:
            self._came.clear()
            claimed = await self._surely(Store.claim)
            if claimed is None:
                await self._came.wait()
                continue
            self._came.set()  # there may be more, for another worker
            try:
                await self._run(*claimed)
            except Exception as error:  # the job is not run again and again for a fault of ours
                record = claimed[0]
                await self._finish(record, self._events(record.id), problems.refusal(error))

    async def _run(self, record: Record, asked: Asked) -> None:
        told = self._events(record.id)
        watch = Witness(told, self.house.in_thread, asked.request_id, lambda: told.followers > 0)
        request = replay.request(asked, record.owner, self._weight_of(record.owner))
        task = asyncio.create_task(respond(self.house, request, record.task, watch, later=True))
        self._running[record.id] = task
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:  # this process ends, and the next one goes on
            await _stop([task])
            await self._do(lambda store: store.put_back(record.number, 0.0, count=False))
            raise
        finally:
            del self._running[record.id]
        if task.cancelled():  # by `cancel`, and then this changes nothing
            await self._surely(lambda store: store.put_back(record.number, 0.0, count=True))
        else:
            await self._settle(record, told, task)

    async def _settle(self, record: Record, told: Events, task: asyncio.Task[Response]) -> None:
        error = task.exception()
        if error is not None and not isinstance(error, Exception):
            raise error
        problem = None if error is None else _passing(error)
        if problem is not None and record.attempts < MOST_ATTEMPTS and not self._too_old(record):
            wait_s = min(problem.retry_after_s or 1.0, LONGEST_WAIT_S)
            count = problem.kind not in NOT_THE_JOBS_FAULT
            await self._surely(lambda store: store.put_back(record.number, wait_s, count))
            asyncio.get_running_loop().call_later(wait_s + 0.1, self._came.set)
            self._dismiss(record.id, told)
            return
        await self._finish(record, told, task.result() if error is None else problems.refusal(error))

    def _too_old(self, record: Record) -> bool:
        """Whether it has been tried for as long as its result would be kept."""
        assert self._store is not None  # the record came from it
        return self._store.clock() - record.created > self.settings.jobs_keep_s

    async def _finish(self, record: Record, told: Events, response: Response) -> None:
        if len(response.body) > min(MOST_RESULT_BYTES, self.settings.jobs_max_bytes):
            response = problems.response(_too_large())
        result = Result(response.status_code, dict(response.headers), bytes(response.body))
        ended = await self._surely(lambda store: store.finish(record.number, result))
        if ended is None:  # cancelled meanwhile, and told so
            self._live.pop(record.id, None)
            told.close()
            return
        self.house.metrics.jobs.labels(record.task, ended.status).inc()
        self._ended.set()
        await self._end(record.id, told, response)

    async def _tidy(self) -> None:
        while True:
            await self._surely(Store.expire)
            self._came.set()  # there may be room for results again
            await asyncio.sleep(min(TIDY_S, self.settings.jobs_keep_s))

    async def _leave(self) -> None:
        """A server that shuts down begins no job, and nobody stays for one that waits: it is the next server's."""
        while not self.house.drain.leaving:
            await asyncio.sleep(LOOK_S)
        self._came.set()
        for identity in self._live.keys() - self._running.keys():
            self._live[identity].close()

    async def _tell(self) -> None:
        """Webhooks, beside the jobs: neither ever waits for the other."""
        while self._courier is not None:
            self._ended.clear()
            due = await self._surely(lambda store: store.webhooks(MOST_COURIERS))
            await asyncio.gather(*(self._deliver(self._courier, record) for record in due))
            wait_s = await self._surely(Store.next_webhook_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._ended.wait()

    async def _deliver(self, courier: Courier, record: Record) -> None:
        delivered = await courier.deliver(record)
        again_s = webhook.wait_s(record.webhook_tries + 1)
        outcome = "delivered" if delivered else "failed" if again_s is None else "again"
        self.house.metrics.webhooks.labels(outcome).inc()
        await self._surely(lambda store: store.told(record.number, delivered, again_s))

    async def _surely(self, function: Callable[[Store], T]) -> T:
        """As `_do`, for work that nobody else would do again: a disk that is full now is tried until it is not."""
        wait_s = 0.5
        while True:
            try:
                return await self._do(function)
            except sqlite3.Error as error:
                logger.error("the jobs' file fails, it will be tried again in %g s: %s", wait_s, error)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, 30.0)

    async def _do(self, function: Callable[[Store], T]) -> T:
        assert self._store is not None  # whoever asks has looked whether jobs are on
        return await self._in_thread(partial(function, self._store))

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)


def _passing(error: BaseException) -> Problem | None:
    """The problem, if it is one of the moment: the queue is full, the model is away. Not that the job took too long."""
    problem = error if isinstance(error, Problem) else None
    if isinstance(error, SaccadeError):
        problem = problems.from_saccade(error)
    if problem is None or problem.kind is problems.TIMEOUT or problem.kind.status not in (429, 503, 504):
        return None
    return problem


def _given_up() -> Problem:
    return Problem(problems.INTERRUPTED, f"The server ended {MOST_ATTEMPTS} times while this job ran. Ask for less.")


def _too_large() -> Problem:
    return Problem(
        problems.TOO_LARGE, "The answer is larger than a job may keep. Ask for another format, or wait for it."
    )


def cancelled() -> Problem:
    return Problem(problems.GONE, "The job was cancelled; it has no result.")


def expired() -> Problem:
    return Problem(problems.GONE, "The result was kept for its time, and is gone. Ask again.")


async def _unfailing(loop: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Begun again where it fails: nobody else would do its work."""
    while True:
        try:
            return await loop()
        except Exception:
            logger.exception("a loop of the jobs failed; it goes on in %g s", AGAIN_S)
        await asyncio.sleep(AGAIN_S)


async def _stop(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

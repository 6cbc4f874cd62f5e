"""Requests that ask several questions: pictures in a row, or a video. One admission, one answer, cancelled as one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from saccade import reel, sequence
from saccade.dial import Plan
from saccade.errors import InvalidInput, PictureTooLarge
from saccade.formats.video import Bounds, Clip, read_video
from saccade.pipeline import Answer, Inputs
from saccade.render import Encoded
from saccade.sequence import Seen
from saccade.tasks import TaskName
from server import budgets, problems
from server.admission import Size
from server.events import Witness
from server.forms import VIDEO, Form, Room
from server.options import Wanted
from server.problems import Problem
from server.settings import Settings

if TYPE_CHECKING:
    from server.service import Job, Service

RETRY_S = 10.0
T = TypeVar("T")
Hold = Callable[[], AbstractContextManager[None]]


class Clips:
    """Threads of their own for videos, which take seconds: pictures never wait behind them.

    Who leaves does not stop a decoder: its place and its memory are given back when it ends.
    """

    def __init__(self, threads: int = 2, most_waiting: int = 8) -> None:
        self.waiting, self._most_waiting = 0, most_waiting
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="clips")
        self._free = asyncio.Semaphore(threads)
        self._running: set[asyncio.Task[Any]] = set()

    @property
    def full(self) -> bool:
        return self.waiting >= self._most_waiting

    async def run(self, function: Callable[[], T], hold: Hold = nullcontext) -> T:
        """In its turn, and within `hold` from then on."""
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        running = asyncio.create_task(self._run(function, hold))
        self._running.add(running)
        running.add_done_callback(self._ended)
        return await asyncio.shield(running)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, function: Callable[[], T], hold: Hold) -> T:
        with hold():
            return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        self._free.release()
        if not task.cancelled():
            task.exception()  # where nobody waits any more asyncio would complain that none has seen it


@dataclass
class Several:
    """`rows`: name -> files of the questions; or `video`, and its frames once they are read. `steady`: one scale."""

    rows: dict[str, list[bytes]]
    video: bytes | None
    steady: bool
    clip: Clip | None = None


def room(settings: Settings, task: TaskName) -> Room:
    """What a form of this task may hold."""
    return Room(settings.max_frames, settings.max_clip_bytes, video=task != "amodal")


def of(form: Form, wanted: Wanted, task: TaskName) -> Several | None:
    """What the form asks, if it asks more than one question. Raises InvalidInput for options that do not fit it."""
    if form.video is None:
        for name in ("frames_stride", "frames_limit"):
            if getattr(wanted, name) is not None:
                raise InvalidInput(f"{name} is about the frames of a video: send one as video, or drop it", param=name)
    if form.video is None and not form.rows:
        if wanted.steady:
            raise InvalidInput("steady is about several pictures: send more, or a video, or drop it", param="steady")
        return None
    steady = form.video is not None and task == "depth" if wanted.steady is None else wanted.steady
    if wanted.known_depths is not None and not steady:
        told = "known_depths are of one picture: send that alone, or frames of one clip with steady=true"
        raise InvalidInput(told, param="known_depths")
    return Several(form.rows, form.video, steady)


async def rows(house: Service, job: Job, several: Several) -> list[tuple[Size, ...]]:
    """(H, W) of each question's pictures. Reads the video. Raises Problem or InvalidInput."""
    if several.video is not None and several.clip is None:
        several.clip = await _decoded(house, job, several)
    return _sizes_of_video(job.task, several.clip) if several.clip else await _sizes(house, several, job.task)


async def compute(house: Service, job: Job, several: Several, watch: Witness | None) -> tuple[Answer, Encoded]:
    """All answers as one file; and the first of them, with the time that all took."""
    began = time.perf_counter()
    asked = await house.in_thread(lambda: _questions(house, job.task, several))
    if several.clip is None:
        budgets.read(house, job, asked, began)
    seen = await house.ask(job, asked, watch, several.clip.fps if several.clip else None)
    # A film takes a while to write too. It has been admitted, and may wait.
    run = house.clips.run if job.format == "mp4" else house.in_thread
    began = time.perf_counter()
    encoded = await run(lambda: _encode(job, asked, seen))
    budgets.wrote(house, job, asked, began)
    return _summary(seen), encoded


async def _decoded(house: Service, job: Job, several: Several) -> Clip:
    if house.clips.full:
        house.metrics.rejected.labels(job.task).inc()
        told = "Too many videos wait to be read. Try again later."
        raise Problem(problems.OVERLOADED, told, retry_after_s=RETRY_S)
    most = 3 * house.settings.max_clip_pixels  # its frames, whose number nobody knows yet
    read = partial(_read, house.settings, several, job.wanted)
    return await house.clips.run(read, lambda: house.guard.hold(most))


def _read(settings: Settings, several: Several, wanted: Wanted) -> Clip:
    assert several.video is not None
    bounds = Bounds(settings.max_frames, settings.max_pixels, settings.max_clip_pixels, settings.video_timeout_s)
    stride = wanted.frames_stride or 1
    return read_video(several.video, bounds=bounds, stride=stride, limit=wanted.frames_limit, param=VIDEO)


def _sizes_of_video(task: TaskName, clip: Clip) -> list[tuple[Size, ...]]:
    count, height, width = clip.frames.shape[:3]
    if task == "flow" and count < 2:
        raise InvalidInput("flow needs two frames or more, and the video has one", param=VIDEO)
    size = (height, width)
    return [(size, size)] * (count - 1) if task == "flow" else [(size,)] * count


async def _sizes(house: Service, several: Several, task: TaskName) -> list[tuple[Size, ...]]:
    """Of each question's pictures, from their headers. Raises PictureTooLarge where all together are."""
    rows = several.rows

    def read() -> list[tuple[Size, ...]]:
        return [tuple(house.sizes(dict(zip(rows, files, strict=True)))) for files in zip(*rows.values(), strict=True)]

    found = await house.in_thread(read)
    pixels = sum(height * width for sizes in found for height, width in sizes)
    if pixels > house.settings.max_clip_pixels:
        raise PictureTooLarge(
            f"The pictures hold {pixels} pixels; the limit is {house.settings.max_clip_pixels} in all. Send fewer.",
            param="image",
        )
    if task == "flow":
        return [(now[0], following[0]) for now, following in pairwise(found)]
    return found


def _questions(house: Service, task: TaskName, several: Several) -> list[Inputs]:
    if several.clip is not None:
        return sequence.questions(task, several.clip.frames)
    rows = several.rows
    if task == "amodal":
        pairs = [dict(zip(rows, files, strict=True)) for files in zip(*rows.values(), strict=True)]
        return [house.inputs(task, files) for files in pairs]
    return sequence.questions(task, [house.inputs("depth", {"image": file}).image for file in rows["image"]])


def _encode(job: Job, asked: Sequence[Inputs], seen: Seen) -> Encoded:
    style, encoding = job.wanted.render, job.wanted.encoding or "png16"
    pictures = [inputs.image for inputs in asked]
    return reel.encode(seen, job.format, style, encoding, pictures=pictures)


def _summary(seen: Seen) -> Answer:
    """Phases are added up over the answers, which run beside each other; the queue is the request's own."""
    first = seen[0]
    names = first.timings_ms.keys() - {"queue"}
    spent = {name: sum(answer.timings_ms[name] for answer in seen) for name in names}
    queue_ms = max(answer.timings_ms["queue"] for answer in seen)
    return replace(first, timings_ms=spent | {"queue": queue_ms}, plan=_least([answer.plan for answer in seen]))


def _least(plans: Sequence[Plan | None]) -> Plan | None:
    """What holds of every answer."""
    found = [plan for plan in plans if plan is not None]
    if not found:
        return None
    sure = [plan.uncertainty for plan in found if plan.uncertainty is not None]
    return replace(
        found[0],
        complete=all(plan.complete for plan in found),
        members=min(plan.members for plan in found),
        steps_taken=min(plan.steps_taken for plan in found),
        uncertainty=max(sure, default=None),
    )

"""The exact caches: the same bytes as without, less work, bounded, and never an answer to another question."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest

from saccade.backends import Array, Backend, Conditioning, Labels, Ticket
from saccade.backends.pace import Pace
from saccade.errors import ModelError
from saccade.tasks import TASKS
from server.cache import ENTRY_BYTES, Bounded, Remembering
from tests.server.house import House, Wrapped, files, png, running, until
from tests.server.test_events import STREAM, parse
from tests.server.test_refusals import assert_problem

ROWS = 'saccade_rows_total{kind="%s"}'


def lookups(counters: dict[str, float], cache: str) -> tuple[float, float]:
    """Hits and misses."""
    name = 'saccade_cache_lookups_total{cache="%s",outcome="%s"}'
    hits, misses = (counters.get(name % (cache, outcome), 0) for outcome in ("hit", "miss"))
    return hits, misses


class Encoding(Wrapped):
    """Encodes when it is allowed to; counts how often."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.allowed, self.encoded = asyncio.Event(), 0
        self.allowed.set()
        self.error: Exception | None = None

    async def encode(self, image: Array, prompt: Array, task: Labels, ticket: Ticket) -> Conditioning:
        self.encoded += 1
        await self.allowed.wait()
        if self.error is not None:
            raise self.error
        return await super().encode(image, prompt, task, ticket)


def test_the_latest_are_kept_within_their_bytes() -> None:
    heard: list[str] = []
    kept: Bounded[str] = Bounded(3 * (ENTRY_BYTES + 100), heard.append)
    for name in "abc":
        kept.put(name, name, 100)
    assert kept.get("a") == "a"
    kept.put("d", "d", 100)
    assert [kept.get(name) for name in "abcd"] == ["a", None, "c", "d"]
    kept.put("e", "e", 10_000)  # larger than everything: nothing has to go for it
    assert (len(kept), kept.bytes) == (3, 3 * (ENTRY_BYTES + 100))
    kept.put("c", "C", 50)
    assert (kept.get("c"), kept.bytes) == ("C", 3 * (ENTRY_BYTES + 100) - 50)
    assert heard == ["hit", "hit", "miss", "hit", "hit", "hit"]


def story(backend: Backend, tell: Any, **settings: Any) -> None:
    async def within() -> None:
        async with running(backend, **settings) as house:
            work: Coroutine[Any, Any, None] = tell(house)
            await work

    asyncio.run(within())


@pytest.mark.parametrize("task", TASKS)
def test_a_picture_is_encoded_once_whatever_is_asked_of_it(backend: Backend, task: str) -> None:
    async def tell(house: House) -> None:
        before = await house.counters()
        first = await house.ask(task, format="npy")
        again = await house.ask(task, format="npy")
        await house.ask(task, steps=3, ensemble_size=2, seed=9)
        after = await house.counters()
        assert again.content == first.content
        assert after[ROWS % "encode"] == before[ROWS % "encode"] + 1
        assert lookups(after, "latents") == (2, 1)
        assert after["saccade_latent_cache_bytes"] > 0
        await house.ask(task, processing_resolution=32)
        assert lookups(await house.counters(), "latents") == (2, 2)

    story(backend, tell)


def test_without_room_there_is_no_cache(backend: Backend) -> None:
    async def tell(house: House) -> None:
        before = await house.counters()
        for _ in range(2):
            await house.ask("depth")
        after = await house.counters()
        assert after[ROWS % "encode"] == before[ROWS % "encode"] + 2
        assert lookups(after, "latents") == (0, 0)

    story(backend, tell, latent_cache_bytes=0)


def test_those_that_come_together_share_one_encoding(backend: Backend) -> None:
    async def tell(house: House) -> None:
        begun = counting.encoded
        counting.allowed.clear()
        asking = [asyncio.create_task(house.ask("depth", format="npy")) for _ in range(4)]
        await until(lambda: counting.encoded > begun)
        await asyncio.sleep(0.05)
        counting.allowed.set()
        answers = [await one for one in asking]
        assert len({answer.content for answer in answers}) == 1
        assert counting.encoded == begun + 1

    counting = Encoding(backend)
    story(counting, tell)


def test_who_leaves_takes_nothing_from_the_others(backend: Backend) -> None:
    async def tell(house: House) -> None:
        begun = counting.encoded
        counting.allowed.clear()
        leader = asyncio.create_task(house.ask("depth"))
        await until(lambda: counting.encoded > begun)
        follower = asyncio.create_task(house.ask("depth"))
        await asyncio.sleep(0.05)
        leader.cancel()
        await asyncio.gather(leader, return_exceptions=True)
        counting.allowed.set()
        assert (await follower).status_code == 200

    counting = Encoding(backend)
    story(counting, tell)


def test_who_comes_first_waits_for_nobody_who_comes_later() -> None:
    """A request that the lane serves first does not take over the place of one that asked for the same before it."""

    class Lane:
        card, pace = SimpleNamespace(digest="x"), Pace()
        asked: ClassVar[list[str | None]] = []

        def before_s(self, ticket: Ticket) -> float:
            return {"late": 9.0, "soon": 1.0, "later": 10.0}[str(ticket.client)]

        async def encode(self, image: Array, prompt: Array, task: Labels, ticket: Ticket) -> Conditioning:
            self.asked.append(ticket.client)
            if ticket.client == "late":
                await gate.wait()
            return {"seen": image}

    async def tell() -> None:
        lane = Remembering(Lane(), 2**20)  # type: ignore[arg-type]
        picture, label = np.zeros((1, 3, 8, 8), np.float32), np.zeros(1, np.int64)
        late, later = (
            asyncio.create_task(lane.encode(picture, picture, label, Ticket(client=client)))
            for client in ("late", "later")
        )
        await until(lambda: Lane.asked)
        await lane.encode(picture, picture, label, Ticket(client="soon"))
        assert Lane.asked == ["late", "soon"]
        gate.set()
        await asyncio.gather(late, later)
        assert Lane.asked == ["late", "soon"]

    gate = asyncio.Event()
    asyncio.run(tell())


def test_what_was_there_is_taken_back_by_its_label() -> None:
    class Lane:
        card, pace = SimpleNamespace(digest="x"), Pace()

        async def encode(self, image: Array, prompt: Array, task: Labels, ticket: Ticket) -> Conditioning:
            return {"seen": image}

    async def tell() -> None:
        lane, ticket = Remembering(Lane(), 2**20), Ticket()  # type: ignore[arg-type]
        picture, label = np.zeros((1, 3, 8, 8), np.float32), np.ones(1, np.int64)
        await lane.encode(picture, picture, label, Ticket())
        ticket.plan(pixels=64, encode=1, label=1)
        await lane.encode(picture, picture, label, ticket)
        assert not list(ticket.ahead)

    asyncio.run(tell())


def test_failures_are_not_kept(backend: Backend) -> None:
    async def tell(house: House) -> None:
        counting.error = ModelError("broken")
        assert (await house.ask("depth")).status_code == 500
        counting.error = None
        assert (await house.ask("depth")).status_code == 200

    counting = Encoding(backend)
    story(counting, tell)


def test_answers_are_not_kept_unless_asked_for(backend: Backend) -> None:
    async def tell(house: House) -> None:
        assert "etag" not in (await house.ask("depth")).headers

    story(backend, tell)


@pytest.mark.parametrize("format", ["json", "npy", "png"])
def test_a_kept_answer_is_the_same_file_and_costs_nothing(backend: Backend, format: str) -> None:
    async def tell(house: House) -> None:
        first = await house.ask("depth", format=format)
        rows = (await house.counters())[ROWS % "denoise"]
        again = await house.ask("depth", format=format, steps=2)  # the default, said aloud
        assert again.content == first.content
        assert (await house.counters())[ROWS % "denoise"] == rows
        same = {"server-timing", "x-request-id", "date"}
        assert {k: v for k, v in again.headers.items() if k not in same} == {
            k: v for k, v in first.headers.items() if k not in same
        }
        assert first.headers["etag"].startswith("W/") == (format == "json")
        assert lookups(await house.counters(), "answers") == (1, 1)

    story(backend, tell, answer_cache_bytes=2**20)


def test_watchers_get_a_kept_answer_too(backend: Backend) -> None:
    async def tell(house: House) -> None:
        first = await house.ask("depth")
        told = parse((await house.ask("depth", STREAM)).text)
        assert [event.name for event in told if event.name != "progress"] == ["accepted", "answer"]
        assert told[-1].data == first.json()

    story(backend, tell, answer_cache_bytes=2**20)


def test_no_two_questions_share_an_answer(backend: Backend) -> None:
    asked: list[dict[str, Any]] = [
        {}, {"seed": 1}, {"steps": 3}, {"ensemble_size": 2}, {"format": "npy"}, {"format": "png", "render": "color"},
        {"encoding": "npy"}, {"match_input_resolution": "false"}, {"quality": "balanced"}, {"spacing": "leading"},
        {"target_uncertainty": 5}, {"known_depths": "[[1, 1, 1.0], [50, 30, 2.0]]"}, {"reduction": "mean"},
    ]  # fmt: skip

    async def tell(house: House) -> None:
        tags = [(await house.ask("depth", **options)).headers["etag"] for options in asked]
        other = await house.client.post("/depth", files=files("depth", image=png(seed=5)))
        flow = await house.ask("flow")
        pair = [("image", ("a.png", png())), ("image", ("b.png", png(seed=1)))]
        several = await house.client.post("/depth", files=pair)
        turned = await house.client.post("/depth", files=pair[::-1])
        tags += [answer.headers["etag"] for answer in (other, flow, several, turned)]
        assert len(set(tags)) == len(tags)

    story(backend, tell, answer_cache_bytes=2**20)


def test_who_has_the_answer_is_told_so(backend: Backend) -> None:
    async def tell(house: House) -> None:
        async def having(tag: str, **options: Any) -> httpx.Response:
            headers = {"If-None-Match": tag}
            return await house.client.post("/depth", files=files("depth"), params=options, headers=headers)

        assert (await having("*")).status_code == 200  # there was none yet
        tag = (await house.ask("depth")).headers["etag"]
        strong = tag.removeprefix("W/")
        for known in (tag, strong, f'"other", {tag}', f'{strong},"other"', "*"):
            refused = await having(known)
            assert_problem(refused, 412, "matches")
            assert refused.headers["etag"] == tag
        assert (await having('"other"')).status_code == 200
        assert (await having(strong[1:-1])).status_code == 200  # a tag has its quotes
        assert (await having(tag, seed=1)).status_code == 200
        assert (await having(tag, budget_ms=600_000)).status_code == 200

    story(backend, tell, answer_cache_bytes=2**20)


def test_answers_make_room_for_each_other(backend: Backend) -> None:
    async def tell(house: House) -> None:
        for seed in range(6):
            await house.ask("depth", format="npy", seed=seed)
        counters = await house.counters()
        assert 0 < counters["saccade_answer_cache_bytes"] <= 30_000

    story(backend, tell, answer_cache_bytes=30_000)

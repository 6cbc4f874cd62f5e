"""The lane in a time of its own: the real `Stepping` and its orders before a backend that only takes time.

    python -m bench.lane [--requests 300] [--seeds 3] [--error 0.3]

Chooses the constants of `saccade.backends.order`: hours of load pass in seconds, and nothing is measured. Nothing here
depends on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import selectors
import sys
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import numpy as np

from saccade.backends import Array, Conditioning, Labels, Ticket
from saccade.backends.order import ByDeadline, Dial, FirstCome, Order, RoundRobin
from saccade.backends.pace import Kind, Pace
from saccade.backends.stepping import Stepping
from saccade.card import Card

T = TypeVar("T")
STRIDE = 8
SECONDS: dict[Kind, float] = {"encode": 0.020, "denoise": 0.012, "decode": 0.004}
"""Of a batch at 256 x 256 px."""


class _Selector(selectors.DefaultSelector):
    """Sleeps by moving the clock."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everybody waits for nothing")
        found = super().select(0)
        if not found:
            self.now += max(0.0, timeout)
        return found


class Virtual(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while everybody sleeps, and then at once."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, in virtual time."""
    with asyncio.Runner(loop_factory=Virtual) as runner:
        return runner.run(coroutine)


class Sleeper:
    """A backend that takes its time, and `error` more or less of it, and does nothing."""

    def __init__(self, seconds: dict[Kind, float] = SECONDS, error: float = 0.0, seed: int = 0) -> None:
        self.seconds = seconds
        self.error, self.random = error, np.random.default_rng(seed)
        self.batches = 0
        self.card = cast(Card, SimpleNamespace(conditioning=(), latent=SimpleNamespace(stride=STRIDE)))

    async def sleep(self, kind: Kind, pixels: int) -> None:
        self.batches += 1
        noise = float(np.exp(self.error * self.random.standard_normal())) if self.error else 1.0
        await asyncio.sleep(self.seconds[kind] * pixels / 256**2 * noise)

    async def encode(self, image: Array, prompt: Array, task: Labels, ticket: Ticket) -> Conditioning:
        await self.sleep("encode", image.shape[-1] * image.shape[-2])
        return {}

    async def denoise(self, latent: Array, t: Labels, task: Labels, seen: Conditioning, ticket: Ticket) -> Array:
        await self.sleep("denoise", latent.shape[-1] * latent.shape[-2] * STRIDE**2)
        return latent

    async def decode(self, latent: Array, ticket: Ticket) -> Array:
        await self.sleep("decode", latent.shape[-1] * latent.shape[-2] * STRIDE**2)
        return latent

    async def aclose(self) -> None:
        pass


@dataclass(frozen=True)
class Asked:
    """One request of the load: when it comes, in seconds; what it wants; the deadline it has, in seconds from then."""

    at: float
    edge: int
    steps: int
    members: int
    budget_s: float | None = None
    client: str | None = None
    weight: float = 1.0

    @property
    def pixels(self) -> int:
        return self.edge**2


async def answer(lane: Stepping, asked: Asked, ticket: Ticket) -> None:
    """As the pipeline does it."""
    label = np.zeros(1, np.int64)
    denoise = asked.steps * asked.members
    ticket.plan(pixels=asked.pixels, encode=1, denoise=denoise, decode=asked.members, label=int(label[0]))
    picture = np.broadcast_to(np.float32(0), (1, 1, asked.edge, asked.edge))
    latent = np.broadcast_to(np.float32(0), (1, 1, asked.edge // STRIDE, asked.edge // STRIDE))
    await lane.encode(picture, picture, label, ticket)

    async def member() -> None:
        for _ in range(asked.steps):
            await lane.denoise(latent, label, label, {}, ticket)

    await asyncio.gather(*(member() for _ in range(asked.members)))
    await asyncio.gather(*(lane.decode(latent, ticket) for _ in range(asked.members)))


def simulate(
    load: Sequence[Asked],
    order: Order,
    *,
    backend: Sleeper | None = None,
    batch_size: int = 1,
    concurrency: int = 1,
    told: Callable[[Asked], bool] = lambda _: False,
) -> list[float]:
    """Seconds from coming to the answer, for each of `load`. Those that are `told` say when they want it."""

    async def main() -> list[float]:
        lane = Stepping(backend or Sleeper(), batch_size=batch_size, concurrency=concurrency, order=order)
        learn(lane.pace, (backend or Sleeper()).seconds)
        loop = asyncio.get_running_loop()

        async def one(asked: Asked) -> float:
            await asyncio.sleep(asked.at)
            wanted = asked.at + asked.budget_s if told(asked) and asked.budget_s is not None else None
            ticket = Ticket(deadline=wanted, client=asked.client, weight=asked.weight)
            with lane.place(ticket):
                await answer(lane, asked, ticket)
            return loop.time() - asked.at

        return list(await asyncio.gather(*map(one, load)))

    return run(main())


def learn(pace: Pace, seconds: dict[Kind, float]) -> None:
    """What the warm-up would have found."""
    for kind, one in seconds.items():
        pace.saw(kind, 256**2, one, label=0)


def mixed(requests: int, share: float, seed: int, *, pace: Pace | None = None, stretch: float = 3.0) -> list[Asked]:
    """Steps 1-50, members 1-10, four sizes; Poisson arrivals at `share` of capacity; a budget of `stretch` times the
    time of a request alone."""
    if pace is None:
        learn(pace := Pace(), SECONDS)
    random = np.random.default_rng(seed)
    shapes = [
        Asked(
            0.0,
            int(random.choice([128, 192, 256, 384])),
            int(random.choice([1, 2, 5, 10, 20, 50], p=[0.25, 0.25, 0.2, 0.15, 0.1, 0.05])),
            int(random.choice([1, 2, 5, 10], p=[0.5, 0.2, 0.2, 0.1])),
        )
        for _ in range(requests)
    ]
    work = [pace.work_s(asked.pixels, asked.steps, asked.members) for asked in shapes]
    gaps = random.exponential(float(np.mean(work)) / share, requests)
    times = np.cumsum(gaps)
    alone = [pace.alone_s(asked.pixels, asked.steps, asked.members) for asked in shapes]
    return [replace(a, at=float(t), budget_s=stretch * s) for a, t, s in zip(shapes, times, alone, strict=True)]


def figures(load: Sequence[Asked], seconds: Sequence[float]) -> dict[str, float]:
    """Of the times to the answer, and the share that came within three times the time alone."""
    met = np.mean([s <= a.budget_s + 1e-9 for a, s in zip(load, seconds, strict=True) if a.budget_s is not None])
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99])
    slow = [s / (a.budget_s or 1) for a, s in zip(load, seconds, strict=True)]
    return {"mean": float(np.mean(seconds)), "p50": p50, "p95": p95, "p99": p99, "met": float(met),
            "worst": max(slow) * 3}  # fmt: skip


def _among(told: set[int]) -> Callable[[Asked], bool]:
    return lambda asked: id(asked) in told


ORDERS: dict[str, Callable[[], Order]] = {
    "first come": FirstCome,
    "in turn": RoundRobin,
    "by deadline": ByDeadline,
    "dial": Dial,
}


def compare(orders: dict[str, Callable[[], Order]], requests: int, seeds: Iterable[int], error: float, batch: int,
            deadlines: float) -> Iterable[str]:  # fmt: skip
    pace = Pace(batch)
    learn(pace, SECONDS)
    yield "| load | order | mean s | p50 | p95 | p99 | in time | worst stretch |"
    yield "|---|---|---|---|---|---|---|---|"
    for share in (0.5, 0.8, 1.1):
        for name, order in orders.items():
            found = []
            for seed in seeds:
                load = mixed(requests, share, seed, pace=pace)
                said = set(np.random.default_rng(seed).permutation(requests)[: int(deadlines * requests)])
                told = {id(asked) for i, asked in enumerate(load) if i in said}
                backend = Sleeper(error=error, seed=seed)
                seconds = simulate(load, order(), backend=backend, batch_size=batch, told=_among(told))
                found.append(figures(load, seconds))
            means = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
            yield (
                f"| {share:.0%} | {name} | {means['mean']:.2f} | {means['p50']:.2f} | {means['p95']:.2f} | "
                f"{means['p99']:.2f} | {means['met']:.1%} | {means['worst']:.0f} |"
            )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="the orders of the lane, in virtual time")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--error", type=float, default=0.3, help="how far batches stray from the pace (log-normal)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--deadlines", type=float, default=0.0, help="share of requests that say a deadline")
    args = parser.parse_args(argv)
    rows = compare(ORDERS, args.requests, range(args.seeds), args.error, args.batch, args.deadlines)
    for row in rows:
        sys.stdout.write(row + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

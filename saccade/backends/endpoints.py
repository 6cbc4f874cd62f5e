"""Triton's endpoints: which can be asked now, and what a call that failed says about the one it was made to.

A name that resolves to several addresses is several endpoints, so a headless service of a cluster needs no list.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Collection
from enum import Enum
from itertools import count
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc.service_pb2 import ServerLiveRequest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from saccade.errors import BackendUnavailable, ModelError

log = logging.getLogger(__name__)

GONE_PATIENCE_S = 1.0
LOOK_EVERY_S = 1.0
LOOK_TIMEOUT_S = 2.0
STRIKES = 2
RETRY_FIRST_S, RETRY_MOST_S = 0.2, 2.0
RESOLVE_EVERY_S = 5.0
LARGEST_MESSAGE = 1 << 30

CHANNEL = (
    ("grpc.max_send_message_length", LARGEST_MESSAGE),
    ("grpc.max_receive_message_length", LARGEST_MESSAGE),
    # A server that is back is found at once: gRPC's own pause grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A new channel is a new connection, and not the dead one that another channel still holds.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)


class Kind(Enum):
    """What a failed call says."""

    GONE = "it cannot be reached"
    LOADING = "it does not have the model now"
    CRASHED = "the model's process has died"
    BUSY = "its queue is full"
    LATE = "it did not answer in time"
    FAILED = "it failed to run the model"


class Fault(Exception):
    """A call that failed. `told` is Triton's own message: for the log alone, it may name files of the server."""

    def __init__(self, kind: Kind, told: str = "") -> None:
        super().__init__(kind.value)
        self.kind, self.told = kind, told


def fault(code: grpc.StatusCode, told: str) -> Fault:
    """A gRPC status as Triton uses it.

    While it drains or reloads a model, requests for it are NOT_FOUND ("has no available versions"). A Python model
    whose process died is INTERNAL for ever, while it counts as ready.
    """
    match code:
        case grpc.StatusCode.UNAVAILABLE if "queue" in told:
            return Fault(Kind.BUSY, told)
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            return Fault(Kind.GONE, told)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Fault(Kind.BUSY, told)
        case grpc.StatusCode.NOT_FOUND:
            return Fault(Kind.LOADING, told)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return Fault(Kind.LATE, told)
        case grpc.StatusCode.INTERNAL if "Stub process" in told:
            return Fault(Kind.CRASHED, told)
    return Fault(Kind.FAILED, f"{code.name}: {told}")


class State(Enum):
    """UP: it has answered a tiny inference, and nothing spoke against it since. LOADING: it answers, but not yet so."""

    UP = "up"
    LOADING = "loading"
    GONE = "gone"


class Endpoint:
    """One server at one address: its channel, its state, the calls that it has in hand."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.state, self.why = State.GONE, ""
        self.strikes = 0
        self.heard_at = float("-inf")
        self.suspect = asyncio.Event()
        self._calls: set[grpc.aio.Call] = set()
        self._open()

    def _open(self) -> None:
        self._channel = grpc.aio.insecure_channel(self.address, options=CHANNEL)
        self._stub = GRPCInferenceServiceStub(self._channel)

    @property
    def in_flight(self) -> int:
        return len(self._calls)

    async def call(self, method: str, request: Any, timeout_s: float) -> Any:
        """One call with a deadline; cancelling the awaiting task cancels it at the server too. Raises Fault."""
        if timeout_s <= 0:
            raise Fault(Kind.LATE)
        call = getattr(self._stub, method)(request, timeout=timeout_s)
        self._calls.add(call)
        try:
            answer = await call
            self.heard_at = time.monotonic()
            return answer
        except grpc.aio.AioRpcError as error:
            raise fault(error.code(), error.details() or "") from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Fault(Kind.GONE, "the call was given up with its connection") from None  # see `abandon`
        finally:
            self._calls.discard(call)
            call.cancel()

    async def answers(self) -> None:
        """Raises Fault for a server that does not answer, or drains.

        Not Triton's readiness: by default that is false for all while any model loads, and after any could not.
        """
        await self.call("ServerLive", ServerLiveRequest(), LOOK_TIMEOUT_S)

    async def abandon(self) -> None:
        """Give up the connection and every call on it: a host that vanished never closes it."""
        for call in list(self._calls):
            call.cancel()
        old = self._channel
        self._open()
        await old.close()

    async def aclose(self) -> None:
        await self._channel.close()


Examine = Callable[[Endpoint], Awaitable[None]]


class Endpoints:
    """Every address behind `urls` ("host:port"), each watched by a task of its own once `start` was given a way to
    `examine` whether one can serve: by raising Fault or ModelError if not.

    An endpoint that is up is asked every second whether it is there; two silences, while it answers nothing else, are
    an end, and its calls are given up. One that is not up is examined until it is.
    """

    def __init__(self, urls: Collection[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.urls, self.clock = tuple(urls), clock
        self._known: dict[str, Endpoint] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._resolving: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False
        self._examine: Examine | None = None
        self._changed = asyncio.Event()
        self._turn = count()
        # Since when none is up, and since when none even answers.
        self._none_up_since: float | None = clock()
        self._all_gone_since: float | None = clock()

    @property
    def states(self) -> dict[str, State]:
        return {address: endpoint.state for address, endpoint in self._known.items()}

    async def resolve(self) -> list[Endpoint]:
        """Look the names up; the endpoints there are now. A name that cannot be looked up keeps what it had."""
        found = [await _addresses(url) for url in self.urls]
        fresh = dict.fromkeys(address for addresses in found for address in addresses or ())
        for address in fresh:
            if address not in self._known:
                self._add(address)
        if all(found):
            for address in [address for address in self._known if address not in fresh]:
                await self._remove(address)
        return list(self._known.values())

    def start(self, examine: Examine) -> None:
        """Watch all, and look for new ones, until `aclose`."""
        self._examine = examine
        for address in self._known:
            self._watch(address)
        self._resolving = asyncio.create_task(self._resolve_for_ever())

    async def choose(self, avoid: Collection[Endpoint], until: float, patience_s: float) -> Endpoint:
        """One that is up, rather not of `avoid`, the one with the fewest calls in hand; waits for one.

        Waiting ends at `until` (on the clock), `patience_s` after the last one left the state UP, and a second after
        the last one stopped answering at all: whoever comes later in an outage does not wait. Raises
        BackendUnavailable.
        """
        while True:
            if self._closed:
                raise BackendUnavailable("the backend is closed")
            up = [endpoint for endpoint in self._known.values() if endpoint.state is State.UP]
            preferred = [endpoint for endpoint in up if endpoint not in avoid] or up
            if preferred:
                turn = next(self._turn)
                order = preferred[turn % len(preferred) :] + preferred[: turn % len(preferred)]
                return min(order, key=lambda endpoint: endpoint.in_flight)
            left = self._wait_ends(until, patience_s) - self.clock()
            if left <= 0:
                raise self._nobody()
            changed = self._changed
            try:
                async with asyncio.timeout(left):
                    await changed.wait()
            except TimeoutError:
                continue

    def has_other(self, tried: Collection[Endpoint]) -> bool:
        """Whether one is up that is not among those tried."""
        return any(e.state is State.UP and e not in tried for e in self._known.values())

    def suspect(self, endpoint: Endpoint, kind: Kind) -> None:
        """A call to it failed so: no other goes there until it has been examined."""
        if endpoint.state is State.UP:
            self._set(endpoint, State.GONE if kind is Kind.GONE else State.LOADING, kind.value)
        endpoint.suspect.set()

    def trust(self, endpoint: Endpoint) -> None:
        """It has been examined and can serve."""
        endpoint.strikes = 0
        self._set(endpoint, State.UP, "")

    async def aclose(self) -> None:
        """End the watches and the connections; calls in hand are given up, later ones refused."""
        self._closed = True
        tasks = [*self._watches.values(), *self._closing, *([self._resolving] if self._resolving else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(endpoint.abandon() for endpoint in self._known.values()))
        await asyncio.gather(*(endpoint.aclose() for endpoint in self._known.values()))
        self._known.clear()
        self._changed.set()

    def _wait_ends(self, until: float, patience_s: float) -> float:
        ends = [until]
        if self._none_up_since is not None:
            ends.append(self._none_up_since + patience_s)
        if self._all_gone_since is not None:
            ends.append(self._all_gone_since + GONE_PATIENCE_S)
        return min(ends)

    def _nobody(self) -> BackendUnavailable:
        if self._all_gone_since is not None:
            return BackendUnavailable("Triton cannot be reached", retry_after_s=2.0)
        return BackendUnavailable("Triton does not have the model ready", retry_after_s=2.0)

    def _set(self, endpoint: Endpoint, state: State, why: str) -> None:
        if (endpoint.state, endpoint.why) == (state, why):
            return
        log.log(
            logging.INFO if state is State.UP else logging.WARNING,
            "Triton at %s is %s%s", endpoint.address, state.value, f": {why}" if why else "",
        )  # fmt: skip
        moved, endpoint.state, endpoint.why = endpoint.state is not state, state, why
        if moved:
            self._note()

    def _note(self) -> None:
        """Keep the two times, wake whoever waits."""
        states, now = {endpoint.state for endpoint in self._known.values()}, self.clock()
        self._none_up_since = None if State.UP in states else self._none_up_since or now
        self._all_gone_since = None if states - {State.GONE} else self._all_gone_since or now
        self._changed.set()
        self._changed = asyncio.Event()

    def _add(self, address: str) -> None:
        self._known[address] = Endpoint(address)
        if self._examine is not None:
            self._watch(address)

    async def _remove(self, address: str) -> None:
        """No new calls; those in hand end in their time."""
        endpoint = self._known.pop(address)
        watch = self._watches.pop(address, None)
        if watch is not None:
            watch.cancel()
        log.info("Triton at %s is no longer named", address)
        self._note()
        closing = asyncio.create_task(_close_when_idle(endpoint))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def _watch(self, address: str) -> None:
        self._watches[address] = asyncio.create_task(self._watch_for_ever(self._known[address]))

    async def _watch_for_ever(self, endpoint: Endpoint) -> None:
        pause = RETRY_FIRST_S
        while True:
            await self._look(endpoint)
            if endpoint.state is State.UP:
                pause = RETRY_FIRST_S
                wait = LOOK_EVERY_S
            elif endpoint.state is State.GONE:
                wait = RETRY_FIRST_S
            else:
                wait, pause = pause, min(2 * pause, RETRY_MOST_S)
            try:
                async with asyncio.timeout(wait):
                    await endpoint.suspect.wait()
            except TimeoutError:
                continue

    async def _look(self, endpoint: Endpoint) -> None:
        """Bring the endpoint's state up to date."""
        suspected = endpoint.suspect.is_set()
        endpoint.suspect.clear()
        asked_at = time.monotonic()
        try:
            await endpoint.answers()
        except Fault as found:
            if found.kind is Kind.LATE and endpoint.heard_at >= asked_at:
                endpoint.strikes = 0  # it answers calls: it is busy, not gone
            else:
                await self._silent(endpoint, found)
            return
        endpoint.strikes = 0
        if suspected or endpoint.state is not State.UP:
            await self._revive(endpoint)

    async def _silent(self, endpoint: Endpoint, found: Fault) -> None:
        log.debug("Triton at %s: %s (%s)", endpoint.address, found, found.told)
        endpoint.strikes += 1
        if found.kind is not Kind.LATE:
            self._set(endpoint, State.GONE, str(found))
        elif endpoint.strikes >= STRIKES:
            endpoint.strikes = 0
            self._set(endpoint, State.GONE, "it has stopped answering")
            await endpoint.abandon()

    async def _revive(self, endpoint: Endpoint) -> None:
        """It answers; can it serve?"""
        assert self._examine is not None  # `start` has seen to it
        if endpoint.state is State.GONE:
            self._set(endpoint, State.LOADING, "it answers, and is examined")
        try:
            await self._examine(endpoint)
        except Fault as found:
            log.debug("Triton at %s: %s (%s)", endpoint.address, found, found.told)
            self._set(endpoint, State.GONE if found.kind is Kind.GONE else State.LOADING, str(found))
        except ModelError as error:
            self._set(endpoint, State.LOADING, str(error))
        except Exception:  # a watch that ended would leave its endpoint as it is for ever
            log.exception("Triton at %s could not be examined", endpoint.address)
            self._set(endpoint, State.LOADING, "it could not be examined")
        else:
            self.trust(endpoint)

    async def _resolve_for_ever(self) -> None:
        while True:
            await asyncio.sleep(RESOLVE_EVERY_S)
            try:
                await self.resolve()
            except Exception:  # as with watches: what there was goes on
                log.exception("the names of Triton's endpoints could not be looked up")


async def _addresses(url: str) -> list[str] | None:
    """The addresses behind host:port as gRPC's targets, IPv4 where there is any; None if they cannot be looked up."""
    host, _, port = url.rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        log.debug("%s cannot be looked up: %s", url, error)
        return None
    families = {family for family, *_ in found}
    family = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
    hosts = dict.fromkeys(str(address[0]) for kind, *_, address in found if kind == family)
    return [f"ipv4:{one}:{port}" if family == socket.AF_INET else f"ipv6:[{one}]:{port}" for one in hosts]


async def _close_when_idle(endpoint: Endpoint) -> None:
    while endpoint.in_flight:
        await asyncio.sleep(LOOK_EVERY_S)
    await endpoint.aclose()

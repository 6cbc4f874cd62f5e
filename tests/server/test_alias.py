"""The alias: moving between models under requests, models that cannot be opened, and files that say nothing."""

from __future__ import annotations

import asyncio
import gc
import os
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from saccade.backends import Array, Backend, Conditioning, Labels, Ticket
from saccade.backends.embedded import Embedded
from saccade.errors import BackendUnavailable, ModelError
from saccade.repository import Repository
from server import alias as alias_module
from server.alias import Alias
from server.settings import Settings
from server.telemetry import Metrics
from server.wanted import WantedModel
from tests import toy
from tests.server.house import PROBLEM, Clock, Gated, House, files, housed, until

CARDS: dict[str, dict[str, Any]] = {
    "first": {},
    "second": {
        "latent": {"channels": toy.LATENT, "stride": toy.STRIDE, "scale": 0.25, "multiple": 32},
        "tasks": {
            "depth": {
                "label": 2,
                "defaults": {"steps": 5, "ensemble_size": 2, "reduction": "mean", "processing_resolution": 32},
            }
        },
    },
    "third": {},
}


CONTENTS: dict[bytes | None, str] = {
    None: "is missing",
    b"": "is empty",
    b" \n": "is empty",
    b"first\nsecond\n": "does not hold one name",
    b"x" * 300: "does not hold one name",
    b"\xff\xfe": "cannot be read (UnicodeDecodeError)",
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models; `second` does depth alone, at other sizes and with other defaults."""
    path = tmp_path_factory.mktemp("several") / "model_repository"
    for name, card in CARDS.items():
        toy.build(path, name=name, card=card)
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alias_module, "LOOK_S", 0.005)


class Opened(Gated):
    """A model that waits on command and knows whether it has been closed."""

    closed = False

    async def aclose(self) -> None:
        self.closed = True
        await self.inner.aclose()


class Shelf:
    """Opens models of a repository, `opened` in that order; `faults` come first, and a shut `door` holds all up."""

    def __init__(self, repository: Path) -> None:
        self.repository = Repository(repository)
        self.opened: list[Opened] = []
        self.asked = 0
        self.most_open = 0
        self.faults: list[Exception] = []
        self.kind = Opened
        self.door = asyncio.Event()
        self.door.set()

    async def open(self, name: str | None) -> Backend:
        self.asked += 1
        await self.door.wait()
        if self.faults:
            raise self.faults.pop(0)
        model = Embedded.load(self.repository, name, engine="onnxruntime", precision="fp32", threads=1)
        self.opened.append(self.kind(model))
        self.most_open = max(self.most_open, sum(not model.closed for model in self.opened))
        return self.opened[-1]

    def latest(self, name: str) -> Opened:
        return next(model for model in reversed(self.opened) if model.card.name == name)


class Town:
    """A house whose model is named by a file."""

    def __init__(self, house: House, shelf: Shelf, file: Path) -> None:
        self.house, self.shelf, self.file = house, shelf, file

    @property
    def alias(self) -> Alias:
        return self.house.service.alias

    def want(self, name: str) -> None:
        """As a ConfigMap does: at once."""
        fresh = self.file.with_suffix(".new")
        fresh.write_text(name)
        os.replace(fresh, self.file)

    async def serves(self, name: str) -> None:
        await until(lambda: self.alias.serving is not None and self.alias.current.name == name)

    async def move(self, name: str) -> None:
        self.want(name)
        await self.serves(name)

    async def ready(self) -> Any:
        answer = await self.house.client.get("/readyz")
        assert answer.status_code == 200, answer.text
        return answer.json()


@asynccontextmanager
async def town(repository: Path, file: Path, first: str | None = "first", **settings: Any) -> AsyncIterator[Town]:
    if first is not None:
        file.write_text(first)
    shelf = Shelf(repository)
    async with housed(shelf.open, model_file=file, **settings) as house:
        yield Town(house, shelf, file)
    assert all(model.closed for model in shelf.opened), "nothing stays open"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model"


def made_by(answer: httpx.Response) -> tuple[str, str]:
    assert answer.status_code == 200, answer.text
    return answer.headers["saccade-model"], answer.headers["saccade-digest"]


@pytest.mark.usefixtures("quick")
def test_moves_and_moves_back(repository: Path, file: Path) -> None:
    digests = {name: Repository(repository).card(name).digest for name in CARDS}

    async def story() -> None:
        async with town(repository, file) as here:
            for name, steps in (("first", "2"), ("second", "5"), ("first", "2")):
                await here.move(name)
                answer = await here.house.ask("depth")
                assert made_by(answer) == (name, digests[name])
                assert answer.headers["saccade-steps"] == steps, "the defaults are those of the card"
                listed = (await here.house.client.get("/models")).json()
                assert (listed["default"], [card["name"] for card in listed["models"]]) == (name, [name])
                ready = {"status": "ready", "model": name, "digest": digests[name], "wanted": name, "fault": None}
                assert await here.ready() == ready
                await until(lambda: len(here.alias.open) == 1)
                counters = await here.house.counters()
                info = f'saccade_model_info{{digest="{digests[name]}",model="{name}",state="serving"}}'
                assert (counters[info], counters["saccade_model_settled"]) == (1, 1)
            assert counters['saccade_model_loads_total{outcome="opened"}'] == 3
            assert [model.closed for model in here.shelf.opened] == [True, True, False]

    asyncio.run(story())


@pytest.mark.usefixtures("quick")
def test_a_request_ends_on_the_model_it_began_with(repository: Path, file: Path) -> None:
    async def story() -> None:
        async with town(repository, file) as here:
            alone = await here.house.ask("depth", "application/x-npy", steps=4)
            old = here.shelf.latest("first")
            old.shut()
            began = asyncio.create_task(here.house.ask("depth", "application/x-npy", steps=4))
            await until(lambda: old.rows)
            await here.move("second")
            later = await here.house.ask("depth", "application/x-npy", steps=4)
            assert made_by(later)[0] == "second"
            assert (old.closed, len(here.alias.open)) == (False, 2)
            counters = await here.house.counters()
            assert counters["saccade_running_rows"] == 1, "gauges count the model that leaves too"
            assert sum(value for name, value in counters.items() if 'state="leaving"' in name) == 1
            old.open()
            answer = await began
            assert made_by(answer)[0] == "first"
            assert answer.content == alone.content != later.content
            await until(lambda: old.closed)

    asyncio.run(story())


@pytest.mark.usefixtures("quick")
def test_a_model_that_has_not_yet_gone_takes_over_again_at_once(repository: Path, file: Path) -> None:
    async def story() -> None:
        async with town(repository, file) as here:
            old = here.shelf.latest("first")
            old.shut()
            began = asyncio.create_task(here.house.ask("depth"))
            await until(lambda: old.rows)
            await here.move("second")
            await here.move("first")
            old.open()
            assert made_by(await began)[0] == made_by(await here.house.ask("flow"))[0] == "first"
            assert len(here.shelf.opened) == 2
            await until(lambda: here.shelf.latest("second").closed)

    asyncio.run(story())


@pytest.mark.usefixtures("quick")
def test_a_third_model_waits_until_the_first_has_gone(repository: Path, file: Path) -> None:
    async def story() -> None:
        async with town(repository, file) as here:
            old = here.shelf.latest("first")
            old.shut()
            began = asyncio.create_task(here.house.ask("depth"))
            await until(lambda: old.rows)
            await here.move("second")
            here.want("third")
            await until(lambda: here.alias.wanted.name == "third")
            await asyncio.sleep(0.05)
            assert made_by(await here.house.ask("depth"))[0] == "second"
            assert (await here.ready())["wanted"] == "third"
            assert not here.alias.settled
            old.open()
            assert made_by(await began)[0] == "first"
            await here.serves("third")
            assert here.shelf.most_open == 2

    asyncio.run(story())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("then", ["first", "third"])
def test_a_change_of_mind_while_a_model_opens(repository: Path, file: Path, then: str) -> None:
    async def story() -> list[str]:
        async with town(repository, file) as here:
            here.shelf.door.clear()
            here.want("second")
            await until(lambda: here.shelf.asked == 2)
            here.want(then)
            seen = [made_by(await here.house.ask("depth"))[0]]
            here.alias.wanted._last = then  # the look after the opening is the second one to find it
            here.shelf.door.set()
            while len(here.shelf.opened) < 2 or not here.shelf.opened[1].closed:
                seen.append(made_by(await here.house.ask("depth"))[0])
            await here.serves(then)
            return seen

    assert set(asyncio.run(story())) <= {"first", then}, "the second has never served"


@pytest.mark.usefixtures("quick")
def test_a_name_that_cannot_be_opened_leaves_the_old_one_serving(repository: Path, file: Path) -> None:
    async def story() -> None:
        async with town(repository, file) as here:
            here.want("nowhere")
            await until(lambda: here.alias.fault)
            ready = await here.ready()
            assert (ready["model"], ready["wanted"]) == ("first", "nowhere")
            assert ready["fault"] == "model 'nowhere' cannot be opened; the log says why"
            assert made_by(await here.house.ask("depth"))[0] == "first"
            counters = await here.house.counters()
            assert counters["saccade_model_settled"] == 0
            assert counters['saccade_model_loads_total{outcome="failed"}'] >= 1
            await here.move("second")
            assert here.alias.settled
            here.want("../first")
            await until(lambda: here.alias.fault)
            here.want("second")
            await until(lambda: here.alias.settled)
            assert len(here.shelf.opened) == 2

    asyncio.run(story())


class Stuck(Opened):
    """Warms up, which ends with steps, and never answers again."""

    stepped = False

    async def denoise(
        self, latent: Array, timestep: Labels, task: Labels, conditioning: Conditioning, ticket: Ticket
    ) -> Array:
        self.stepped = True
        return await super().denoise(latent, timestep, task, conditioning, ticket)

    async def decode(self, latent: Array, ticket: Ticket) -> Array:
        if self.stepped:
            await asyncio.Event().wait()
        return await super().decode(latent, ticket)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("fault", "kind", "told"),
    [("nan", Opened, "the log says why"), ("none", Stuck, "a tiny inference did not finish within 0.2 s")],
)
def test_a_model_that_does_not_prove_itself_never_serves(
    tmp_path: Path, file: Path, fault: Any, kind: type[Opened], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = toy.build(toy.build(tmp_path / "repository", name="first"), name="bad", fault=fault)

    async def story() -> None:
        async with town(path, file, drain_timeout_s=1) as here:
            if kind is Stuck:
                monkeypatch.setattr("server.health.PROBE_TIMEOUT_S", 0.2)
            here.shelf.kind = kind
            here.want("bad")
            await until(lambda: here.alias.fault)
            assert (await here.ready())["fault"].endswith(told)
            assert made_by(await here.house.ask("depth"))[0] == "first"
            assert here.shelf.opened[-1].closed

    asyncio.run(story())


@pytest.mark.usefixtures("quick")
def test_a_task_that_goes_with_the_old_model_is_refused(repository: Path, file: Path) -> None:
    """Before the upload, and after it when the move came between."""

    async def story() -> None:
        async with town(repository, file) as here:
            half, rest = asyncio.Event(), asyncio.Event()
            request = httpx.Request("POST", "http://saccade/flow", files=files("flow"))
            whole = request.read()

            async def upload() -> AsyncIterator[bytes]:
                yield whole[:100]
                half.set()
                await rest.wait()
                yield whole[100:]

            headers = {"Content-Type": request.headers["content-type"]}
            asking = asyncio.create_task(here.house.client.post("/flow", content=upload(), headers=headers))
            await half.wait()
            await here.move("second")
            await until(lambda: len(here.alias.open) == 1)  # an upload does not hold the model that leaves
            rest.set()
            for answer in (await asking, await here.house.ask("flow")):
                assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM)
                assert answer.json()["param"] == "task"

    asyncio.run(story())


@pytest.mark.usefixtures("quick")
def test_what_is_not_there_yet_is_waited_for(repository: Path, file: Path) -> None:
    async def story() -> None:
        shelf = Shelf(repository)
        shelf.faults = [BackendUnavailable("no Triton at 127.0.0.1:8001")] * 2
        async with housed(shelf.open, backend="triton", model="first") as house:
            await until(lambda: shelf.asked == 1 and house.service.alias.fault)
            answers = [await house.ask("depth"), await house.client.get("/models"), await house.client.get("/readyz")]
            for answer in answers:
                assert (answer.status_code, answer.headers["content-type"]) == (503, PROBLEM)
                assert answer.json()["type"] == "urn:saccade:problem:unavailable"
                assert "no Triton at" in answer.json()["detail"]
                assert int(answer.headers["retry-after"]) in (1, 2)
            for path in ("/livez", "/", "/openapi.json", "/metrics"):
                assert (await house.client.get(path)).status_code == 200
            await until(lambda: house.service.alias.serving)
            assert (await house.client.get("/readyz")).status_code == 200
            assert made_by(await house.ask("depth"))[0] == "first"
            assert (await house.counters())['saccade_model_loads_total{outcome="failed"}'] == 2

    asyncio.run(story())


def test_trying_again_becomes_rarer() -> None:
    async def opener(_: str | None) -> Backend:
        raise error

    async def waits() -> list[float]:
        clock = Clock()
        alias = Alias(Settings.load(model="any"), opener, Metrics(), clock)
        found = []
        for _ in range(9):
            try:
                await alias._advance()
            except Exception as raised:
                alias._fail(raised)
            assert alias._trouble is not None
            found.append(alias._trouble.again_at - clock.now)
            assert not alias._is_due()
            clock.now = alias._trouble.again_at
            assert alias._is_due()
        return found

    error: Exception = BackendUnavailable("away")
    assert asyncio.run(waits()) == [1, 2, 4, 5, 5, 5, 5, 5, 5]
    error = ModelError("broken")
    assert asyncio.run(waits()) == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_the_same_fault_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def never(_: str | None) -> Backend:
        raise AssertionError

    alias = Alias(Settings.load(), never, Metrics())
    for error in [ModelError("broken"), ModelError("broken"), KeyError("unforeseen"), ModelError("broken")]:
        alias._fail(error)
    assert [(record.getMessage().rsplit(": ")[1], bool(record.exc_info)) for record in caplog.records] == [
        ("broken", False),
        ("'unforeseen'", True),
        ("broken", False),
    ]


@pytest.mark.usefixtures("quick")
def test_leaving_while_a_model_opens_closes_everything(repository: Path, file: Path) -> None:
    async def story() -> None:
        async with town(repository, file) as here:
            here.shelf.door.clear()
            here.want("second")
            await until(lambda: here.shelf.asked == 2)

    asyncio.run(story())


@pytest.mark.usefixtures("quick")
def test_leaving_while_a_model_warms_up_closes_it(repository: Path, file: Path) -> None:
    class Shut(Opened):
        def __init__(self, inner: Backend) -> None:
            super().__init__(inner)
            self.shut()

    async def story() -> None:
        async with town(repository, file) as here:
            here.shelf.kind = Shut
            here.want("second")
            await until(lambda: len(here.shelf.opened) == 2 and here.shelf.opened[1].rows)

    asyncio.run(story())


@pytest.mark.usefixtures("quick")
def test_a_model_that_has_gone_takes_its_memory_along(repository: Path, file: Path) -> None:
    """At once, and not when the garbage collector comes upon a cycle: two models in memory are enough."""

    async def story() -> None:
        async with town(repository, file) as here:
            assert (await here.house.ask("depth")).status_code == 200
            old = weakref.ref(here.alias.current)
            gc.collect()
            gc.disable()
            try:
                await here.move("second")
                await until(lambda: len(here.alias.open) == 1)
                await until(lambda: old() is None)
            finally:
                gc.enable()

    asyncio.run(story())


@pytest.mark.usefixtures("quick")
def test_a_file_that_says_nothing_changes_nothing(repository: Path, file: Path) -> None:
    async def story() -> None:
        async with town(repository, file, model="third") as here:
            assert here.alias.current.name == "first", "the file wins"
            for content, told in CONTENTS.items():
                file.unlink(missing_ok=True)
                if content is not None:
                    file.write_bytes(content)
                await until(lambda told=told: here.alias.fault == f"the model file {told}")
                assert (await here.ready())["model"] == "first"
                assert not here.alias.settled
            await here.move("first")
            await until(lambda: here.alias.settled)
            assert here.shelf.asked == 1

    asyncio.run(story())


@pytest.mark.usefixtures("quick")
def test_until_the_file_is_there_the_setting_holds(repository: Path, file: Path) -> None:
    async def story() -> None:
        async with town(repository, file, first=None, model="third") as here:
            assert here.alias.current.name == "third"
            await here.move("first")

    asyncio.run(story())


@pytest.mark.usefixtures("quick")
def test_without_file_and_setting_nothing_is_guessed(repository: Path, file: Path) -> None:
    async def story() -> None:
        async with town(repository, file, first=None, backend="triton") as here:
            await until(lambda: here.alias.fault)
            unready = await here.house.client.get("/readyz")
            assert (unready.status_code, unready.json()["detail"]) == (503, "the model file is missing")
            assert here.shelf.asked == 0
            await here.move("first")
            await here.ready()

    asyncio.run(story())


def test_a_half_written_name_is_never_taken(file: Path) -> None:
    async def names(*contents: str) -> list[str | None]:
        wanted, found = WantedModel(file, None), []
        for content in contents:
            file.write_text(content)
            await wanted.look()
            found.append(wanted.name)
        return found

    told = asyncio.run(names("first\n", "fir", "second", "second\n", "", "first", "first", "s", "first"))
    assert told == ["first", "first", "first", "second", "second", "second", "first", "first", "first"]

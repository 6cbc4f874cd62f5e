"""What users see when the real Triton is killed, frozen, drained, reloaded, or when its models go wrong.

After every story: no request hangs, no slot leaks, no shared memory is left, and the gateway serves again without a
restart.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc.service_pb2 import RepositoryModelUnloadRequest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from saccade.backends.triton import Triton
from saccade.errors import BackendUnavailable, ModelError
from tests import toy
from tests.triton.server import Tritons, TritonServer
from tests.triton.story import Asked, Gateway, gateway, inject, reload

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.build(tmp_path_factory.mktemp("faults") / "model_repository")


@pytest.fixture
def server(tritons: Tritons, repository: Path, tmp_path: Path) -> Iterator[TritonServer]:
    """A server of this test's own; it leaves nothing behind."""
    del tritons  # sees to it that there is one to start
    made = TritonServer(repository, tmp_path / "one")
    made.start()
    yield made
    made.close()
    for model in ("toy-encoder", "toy", "toy-decoder"):
        inject(repository, model, None)
    assert made.shared_memory() == []


@pytest.fixture
def second(server: TritonServer, repository: Path, tmp_path: Path) -> Iterator[TritonServer]:
    """Another server of the same repository."""
    made = TritonServer(repository, tmp_path / "two")
    made.start()
    yield made
    made.close()


def run(story: Callable[[], Awaitable[Any]], limit_s: float = 90) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(limit_s):
            return await story()

    return asyncio.run(limited())


def statuses(asked: list[Asked]) -> Counter[int]:
    return Counter(one.status for one in asked)


async def settled(house: Gateway) -> None:
    """Nothing is left of what was asked."""
    assert await house.leaks() == {}


def test_kill_9_is_503_within_2_s_and_a_new_server_is_found(server: TritonServer) -> None:
    async def story() -> list[Asked]:
        async with gateway(server) as house:
            inject(server.repository, "toy", "slow 0.3")
            asking = house.asking(8, steps=50)
            await house.until_running()
            killed = time.monotonic()
            server.kill()
            asked = await asyncio.gather(*asking)
            assert max(one.ended for one in asked) - killed < 2
            await house.until_ready(False)
            late = await house.ask()
            assert (late.status, late.problem) == (503, "unavailable")
            assert late.seconds < 1, "in an outage nobody waits for the end of it"
            await settled(house)
            inject(server.repository, "toy", None)
            server.start()
            await house.until_back(server)
            assert await house.ready()
            return asked

    asked = run(story)
    assert statuses(asked) == {503: 8}
    assert {one.problem for one in asked} == {"unavailable"}
    assert all(int(one.headers["retry-after"]) >= 1 for one in asked)
    assert all(str(server.repository).encode() not in one.body for one in asked)


def test_kill_9_of_one_of_two_loses_nothing(server: TritonServer, second: TritonServer) -> None:
    async def story() -> list[Asked]:
        async with gateway(server, second) as house:
            asking = house.asking(8, steps=50)
            await house.until_running()
            server.kill()
            asked = await asyncio.gather(*asking)
            await settled(house)
            server.start()
            return asked

    assert statuses(run(story)) == {200: 8}


def test_a_frozen_server_is_given_up_and_taken_back(server: TritonServer) -> None:
    async def story() -> list[Asked]:
        async with gateway(server, triton_timeout_s=20) as house:
            inject(server.repository, "toy", "slow 0.2")
            asking = house.asking(4, steps=50)
            await house.until_running()
            server.freeze()
            asked = await asyncio.gather(*asking)
            assert max(one.seconds for one in asked) < 12, "found out long before the deadline"
            await house.until_ready(False)
            await settled(house)
            server.thaw()
            inject(server.repository, "toy", None)
            await house.until_back(server)
            await settled(house)
            return asked

    assert statuses(run(story)) == {503: 4}


def test_a_frozen_one_of_two_loses_nothing(server: TritonServer, second: TritonServer) -> None:
    async def story() -> list[Asked]:
        async with gateway(server, second, triton_timeout_s=20) as house:
            asking = house.asking(8, steps=30)
            await house.until_running()
            server.freeze()
            asked = await asyncio.gather(*asking)
            await settled(house)
            server.thaw()
            return asked

    assert statuses(run(story)) == {200: 8}


def test_a_short_freeze_is_only_slow(server: TritonServer) -> None:
    async def story() -> list[Asked]:
        async with gateway(server) as house:
            asking = house.asking(4, steps=20)
            await house.until_running()
            server.freeze()
            await asyncio.sleep(1)
            server.thaw()
            return await asyncio.gather(*asking)

    assert statuses(run(story)) == {200: 4}


def test_a_drain_of_one_of_two_loses_nothing(server: TritonServer, second: TritonServer) -> None:
    async def story() -> list[Asked]:
        async with gateway(server, second) as house:
            asking = house.asking(8, steps=50)
            await house.until_running()
            server.terminate()
            asked = await asyncio.gather(*asking)
            await asyncio.to_thread(server.stop)
            await settled(house)
            return asked

    assert statuses(run(story)) == {200: 8}
    assert server.shared_memory() == []


def test_a_drain_of_the_only_one_refuses_clearly(server: TritonServer) -> None:
    async def story() -> list[Asked]:
        async with gateway(server, triton_timeout_s=5) as house:
            inject(server.repository, "toy", "slow 0.1")
            asking = house.asking(8, steps=100)
            await house.until_running()
            await asyncio.to_thread(server.stop)
            asked = await asyncio.gather(*asking)
            await settled(house)
            inject(server.repository, "toy", None)
            server.start()
            await house.until_back(server)
            return asked

    asked = run(story)
    assert statuses(asked) == {503: 8}
    assert max(one.seconds for one in asked) < 20


def test_a_restart_within_the_deadline_is_waited_for(server: TritonServer) -> None:
    """A drained server that is back at once: requests that were under way are answered."""

    async def story() -> list[Asked]:
        async with gateway(server) as house:
            asking = house.asking(8, steps=100)
            await house.until_running()
            reload(server, "toy")
            return await asyncio.gather(*asking)

    assert statuses(run(story)) == {200: 8}


def test_reloads_under_load_lose_nothing(server: TritonServer) -> None:
    async def story() -> list[Asked]:
        async with gateway(server) as house:
            asking = house.asking(8, steps=100, ensemble_size=2)
            await house.until_running()
            for model in ("toy", "toy-encoder", "toy-decoder", "toy"):
                await asyncio.to_thread(reload, server, model)
                await house.until_up(1)
            asked = await asyncio.gather(*asking)
            await settled(house)
            return asked

    assert statuses(run(story)) == {200: 8}


def test_a_model_that_an_operator_took_away_is_asked_for_again(server: TritonServer) -> None:
    async def story() -> list[Asked]:
        async with gateway(server) as house:
            with grpc.insecure_channel(server.url) as channel:
                stub = GRPCInferenceServiceStub(channel)
                stub.RepositoryModelUnload(RepositoryModelUnloadRequest(model_name="toy-decoder"))
            return await asyncio.gather(*house.asking(2))

    assert statuses(run(story)) == {200: 2}


def test_a_model_process_that_dies_is_started_again_and_nothing_is_lost(server: TritonServer) -> None:
    async def story() -> list[Asked]:
        async with gateway(server) as house:
            asking = house.asking(8, steps=50)
            await house.until_running()
            server.kill_stub("toy")
            asked = await asyncio.gather(*asking)
            await settled(house)
            return asked

    assert statuses(run(story)) == {200: 8}


def test_a_slow_model_is_504_within_the_deadline(server: TritonServer) -> None:
    async def story() -> list[Asked]:
        async with gateway(server, triton_timeout_s=2) as house:
            inject(server.repository, "toy", "slow 4")
            asked = await asyncio.gather(*house.asking(3, steps=2))
            await settled(house)
            inject(server.repository, "toy", None)
            await house.until_back(server)
            return asked

    asked = run(story)
    assert statuses(asked) == {504: 3} or statuses(asked) == {504: 1, 503: 2}
    assert asked[0].problem == "backend-timeout"
    assert all(int(one.headers["retry-after"]) >= 1 for one in asked)
    assert max(one.seconds for one in asked) < 6


def test_a_model_that_returns_nothing_is_504_and_then_not_ready(server: TritonServer) -> None:
    async def story() -> list[Asked]:
        async with gateway(server, triton_timeout_s=2) as house:
            inject(server.repository, "toy", "silent")
            asked = await asyncio.gather(*house.asking(2, steps=2))
            await house.until_ready(False)
            await settled(house)
            inject(server.repository, "toy", None)
            await house.until_back(server)
            return asked

    asked = run(story)
    assert asked[0].status == 504
    assert {one.status for one in asked} <= {503, 504}


@pytest.mark.parametrize(("fault", "model"), [("nan", "toy"), ("shape", "toy"), ("shape", "toy-decoder")])
def test_answers_that_cannot_be_are_500_and_pass(server: TritonServer, fault: str, model: str) -> None:
    async def story() -> list[Asked]:
        async with gateway(server) as house:
            inject(server.repository, model, fault)
            asked = await asyncio.gather(*house.asking(4, steps=2))
            await house.until_ready(False)
            await settled(house)
            inject(server.repository, model, None)
            await house.until_back(server)
            return asked

    asked = run(story)
    assert statuses(asked) == {500: 4}
    assert all(b"toy" not in one.body and b"NaN" not in one.body for one in asked)


def test_what_triton_says_of_its_files_stays_in_the_log(server: TritonServer, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> list[Asked]:
        async with gateway(server) as house:
            inject(server.repository, "toy", "error")
            return await asyncio.gather(*house.asking(2, steps=2))

    asked = run(story)
    assert statuses(asked) == {500: 2}
    assert all(b"model.onnx" not in one.body and str(server.repository).encode() not in one.body for one in asked)
    assert "model.onnx" in caplog.text


def test_an_endpoint_that_fails_is_not_the_last_word(server: TritonServer, second: TritonServer) -> None:
    """The same repository on both, so the fault is put where only one of them looks."""

    async def story() -> tuple[list[Asked], dict[str, str]]:
        async with gateway(server, second) as house:
            server.kill_stub("toy")
            asked = await asyncio.gather(*house.asking(4, steps=20))
            return asked, {}

    assert statuses(run(story)[0]) == {200: 4}


def test_a_gateway_starts_before_its_triton(server: TritonServer) -> None:
    server.stop()

    async def story() -> None:
        async with gateway(server, ready=False) as house:
            assert (await house.client.get("/livez")).status_code == 200
            assert not await house.ready()
            early = await house.ask()
            assert (early.status, early.problem) == (503, "unavailable")
            assert int(early.headers["retry-after"]) >= 1
            server.start()
            await house.until_ready()
            assert (await house.ask()).status == 200

    run(story)


def test_leaving_cancels_the_call_in_triton(server: TritonServer) -> None:
    async def story() -> None:
        async with gateway(server) as house:
            inject(server.repository, "toy", "slow 8")
            asking = house.asking(6, steps=50)
            await house.until_running()
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            async with asyncio.timeout(2):  # while the model is as slow as ever
                while await house.leaks():
                    await asyncio.sleep(0.05)
            inject(server.repository, "toy", None)
            async with asyncio.timeout(20):  # the stand-in sleeps its last sleep to the end
                while (await house.ask()).status != 200:
                    await asyncio.sleep(0.1)

    run(story)


@pytest.fixture
def broken(server: TritonServer) -> Iterator[str]:
    """A model beside toy whose graph is none; the server has not been told of it."""
    folder = server.repository / "broken"
    shutil.copytree(server.repository / "toy", folder)
    config = folder / "config.pbtxt"
    config.write_text(config.read_text().replace('name: "toy"', 'name: "broken"', 1))
    (folder / "1" / "model.onnx").write_bytes(b"garbage")
    yield folder.name
    shutil.rmtree(folder)


def test_a_broken_model_beside_it_does_not_stop_the_one_that_serves(server: TritonServer, broken: str) -> None:
    """To Triton's own mind, as it is by default, no model is ready while one could not be loaded."""

    async def story() -> None:
        async with gateway(server) as house:
            with pytest.raises(ModelError):
                await Triton.connect([server.url], broken)
            until = time.monotonic() + 4
            while time.monotonic() < until:
                assert (await house.ask()).status == 200
                await asyncio.sleep(0.1)

    run(story)


def test_a_name_that_is_not_there_is_a_model_error(server: TritonServer) -> None:
    with pytest.raises(ModelError, match="no model nowhere"):
        asyncio.run(Triton.connect([server.url], "nowhere"))


def test_nobody_at_the_address_is_unavailable() -> None:
    with pytest.raises(BackendUnavailable, match="cannot be reached"):
        asyncio.run(Triton.connect(["127.0.0.1:1"]))

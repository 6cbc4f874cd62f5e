"""The backend `triton` against a server in this process that speaks its protocol; tests/triton has the real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from saccade.backends import Ticket, endpoints
from saccade.backends.embedded import Embedded
from saccade.backends.endpoints import Kind, fault
from saccade.backends.stepping import Stepping
from saccade.backends.triton import Signature, Triton
from saccade.errors import BackendTimeout, BackendUnavailable, ModelError
from saccade.repository import Repository, Tensor, write_config
from tests import toy
from tests.backends.fake_triton import FakeTriton, serving
from tests.toy import CONDITIONING, LATENT

UNAVAILABLE, INTERNAL = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL
SECRET = "/opt/models/secret/model.onnx"


def run(story: Callable[[], Awaitable[Any]]) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(30):
            return await story()

    return asyncio.run(limited())


@asynccontextmanager
async def connected(*fakes: FakeTriton, model: str | None = None, timeout_s: float = 5) -> AsyncIterator[Triton]:
    """All of them up."""
    async with AsyncExitStack() as stack:
        for fake in fakes:
            await stack.enter_async_context(serving(fake))
        triton = await Triton.connect([fake.url for fake in fakes], model, timeout_s=timeout_s)
        stack.push_async_callback(triton.aclose)
        while set(triton.states.values()) != {"up"}:
            await asyncio.sleep(0.01)
        for fake in fakes:
            fake.calls.clear()
        yield triton


def latents(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, LATENT, 4, 6)).astype(np.float32)


async def denoise(triton: Triton | Embedded, batch: int = 2) -> np.ndarray:
    labels = np.arange(batch) % 3
    seen = dict.fromkeys(CONDITIONING, latents(batch))
    return await triton.denoise(latents(batch), labels + 500, labels, seen, Ticket())


@pytest.fixture
def fake(toy_repository: Path) -> FakeTriton:
    return FakeTriton(toy_repository)


@pytest.fixture
def other(toy_repository: Path) -> FakeTriton:
    return FakeTriton(toy_repository)


def test_answers_are_those_of_the_embedded_engine(fake: FakeTriton, toy_repository: Path) -> None:
    embedded = Embedded.load(Repository(toy_repository), engine="onnxruntime", threads=1)
    pictures = np.random.default_rng(1).uniform(-1, 1, (2, 3, 32, 48)).astype(np.float32)

    async def story() -> None:
        async with connected(fake) as triton:
            assert triton.card == embedded.card
            task = np.array([2, 0])
            theirs, ours = [await b.encode(pictures, -pictures, task, Ticket()) for b in (triton, embedded)]
            for name in CONDITIONING:
                np.testing.assert_allclose(theirs[name], ours[name], atol=1e-5)
            np.testing.assert_allclose(await denoise(triton), await denoise(embedded), atol=1e-5)
            both = [await b.decode(latents(), Ticket()) for b in (triton, embedded)]
            np.testing.assert_allclose(*both, atol=1e-5)

    run(story)


@pytest.mark.parametrize("failure", [(UNAVAILABLE, "Socket closed"), (INTERNAL, f"cannot open {SECRET}")])
def test_a_call_that_one_endpoint_fails_is_made_at_the_other(
    fake: FakeTriton, other: FakeTriton, failure: tuple[grpc.StatusCode, str]
) -> None:
    async def story() -> None:
        async with connected(fake, other) as triton:
            for one in (fake, other):
                one.failures["toy"] = [failure]
            await denoise(triton)  # fails at one, then at the other only if that is the one it comes back to
            fake.failures.clear()
            other.failures.clear()
            assert np.isfinite(await denoise(triton)).all()

    if failure[0] is INTERNAL:
        with pytest.raises(ModelError, match="denoiser of toy failed to run") as caught:
            run(story)
        assert SECRET not in str(caught.value)
    else:
        run(story)


def test_a_failure_of_one_endpoint_alone_is_not_seen(fake: FakeTriton, other: FakeTriton) -> None:
    async def story() -> list[int]:
        async with connected(fake, other) as triton:
            fake.failures["toy"] = [(INTERNAL, SECRET)] * 50
            for _ in range(6):
                await denoise(triton)
            return [len(fake.calls), len(other.calls)]

    first, second = run(story)
    assert first >= 1
    assert second == 6


def test_calls_are_shared_among_endpoints(fake: FakeTriton, other: FakeTriton) -> None:
    async def story() -> None:
        async with connected(fake, other) as triton:
            await asyncio.gather(*(denoise(triton) for _ in range(10)))

    run(story)
    assert len(fake.calls) == len(other.calls) == 5


def test_a_full_queue_is_unavailable_and_not_the_endpoints_end(fake: FakeTriton) -> None:
    async def story() -> dict[str, str]:
        async with connected(fake) as triton:
            fake.failures["toy"] = [(UNAVAILABLE, "Exceeds maximum queue size")]
            with pytest.raises(BackendUnavailable, match="queue is full"):
                await denoise(triton)
            return dict(triton.states)

    assert set(run(story).values()) == {"up"}


def test_no_answer_in_time_is_a_timeout_and_is_given_up_there_too(fake: FakeTriton) -> None:
    async def story() -> None:
        async with connected(fake, timeout_s=1.5) as triton:
            fake.silent = True
            with pytest.raises(BackendTimeout, match=r"within 1\.5 s"):
                await denoise(triton)
            while not fake.left:
                await asyncio.sleep(0.01)
            fake.silent = False
            await denoise(triton)

    run(story)


def test_leaving_cancels_the_call_there(fake: FakeTriton) -> None:
    async def story() -> None:
        async with connected(fake) as triton:
            fake.silent = True
            call = asyncio.create_task(denoise(triton))
            while not fake.calls:
                await asyncio.sleep(0.01)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            while not fake.left:
                await asyncio.sleep(0.01)
            assert set(triton.states.values()) == {"up"}

    run(story)


def test_a_model_that_is_not_loaded_is_loaded(fake: FakeTriton) -> None:
    async def story() -> None:
        fake.loaded.clear()
        async with connected(fake, model="toy") as triton:
            assert sorted(fake.commands) == ["load toy", "load toy-decoder", "load toy-encoder"]
            fake.loaded.remove("toy-decoder")
            await triton.decode(latents(), Ticket())
            assert fake.commands[-1] == "load toy-decoder"

    run(story)


def test_a_model_whose_process_has_died_is_unloaded_first(fake: FakeTriton) -> None:
    async def story() -> None:
        async with connected(fake) as triton:
            fake.failures["toy"] = [(INTERNAL, "Stub process 'toy_0_0' is not healthy.")] * 2
            await denoise(triton)

    run(story)
    assert fake.commands == ["unload toy", "load toy"]


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        ((INTERNAL, f"failed to load 'nowhere', failed to poll from {SECRET}"), "no model nowhere that it can load"),
        ((UNAVAILABLE, "explicit model load / unload is not allowed"), "--model-control-mode=explicit"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_a_model_error(
    fake: FakeTriton, failure: tuple[grpc.StatusCode, str], told: str
) -> None:
    fake.load_failure = failure

    async def story() -> None:
        async with connected(fake, model="nowhere"):
            pass

    with pytest.raises(ModelError, match=told) as caught:
        run(story)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("model", ["../toy", "", "a b"])
def test_a_name_that_is_none_is_refused_before_anybody_is_asked(model: str) -> None:
    with pytest.raises(ModelError, match="not a model name"):
        asyncio.run(Triton.connect(["127.0.0.1:1"], model))


def test_one_of_several_models_must_be_named(tmp_path: Path) -> None:
    for name in ("red", "blue"):
        toy.build(tmp_path, name=name)
    both = FakeTriton(tmp_path)

    async def story(model: str | None) -> str:
        async with connected(both, model=model) as triton:
            return triton.card.name

    with pytest.raises(ModelError, match="name one of blue, red"):
        run(lambda: story(None))
    assert run(lambda: story("blue")) == "blue"


def test_an_endpoint_with_another_model_of_that_name_is_not_used(fake: FakeTriton, tmp_path: Path) -> None:
    stranger = FakeTriton(toy.build(tmp_path, width=24))

    async def story() -> None:
        async with serving(fake), serving(stranger):
            triton = await Triton.connect([fake.url])
            await triton.aclose()
            triton = await Triton.connect([fake.url, stranger.url])
            digest = triton.card.digest
            while sorted(triton.states.values()) != ["loading", "up"]:
                await asyncio.sleep(0.01)
            mine, theirs = (fake, stranger) if digest == fake.repository.card("toy").digest else (stranger, fake)
            theirs.calls.clear()
            for _ in range(4):
                await denoise(triton)
            assert "toy" not in theirs.calls
            assert mine.calls.count("toy") >= 4
            await triton.aclose()

    run(story)


@pytest.mark.parametrize(("kind", "told"), [("nan", "non-finite"), ("batch", "of shape")])
def test_outputs_that_cannot_be_are_model_errors(tmp_path: Path, kind: toy.Fault, told: str) -> None:
    spoilt = FakeTriton(toy.build(tmp_path, fault=kind))

    async def story() -> None:
        async with connected(spoilt) as triton:
            labels = np.zeros(2, np.int64)
            await triton.denoise(latents(), labels, labels, dict.fromkeys(CONDITIONING, latents()), Ticket())

    with pytest.raises(ModelError, match=told):
        run(story)


def test_more_rows_than_triton_takes_are_refused_with_advice(fake: FakeTriton) -> None:
    async def story() -> None:
        async with connected(fake) as triton:
            await denoise(triton, 17)

    with pytest.raises(ModelError, match="takes 16 rows at once, not 17: lower batch_size"):
        run(story)


def test_the_knee_is_no_larger_than_what_triton_takes(tmp_path: Path) -> None:
    repository = toy.build(tmp_path, width=64)
    for name in Repository(repository).models():
        file = repository / name / "config.pbtxt"
        file.write_text(file.read_text().replace("max_batch_size: 16", "max_batch_size: 2"))

    async def story() -> int:
        async with connected(FakeTriton(repository)) as triton:
            lane = Stepping(triton)
            await lane.start()
            return lane.batch_size

    assert run(story) in (1, 2)


def test_an_outage_is_told_at_once_and_its_end_is_noticed(fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "GONE_PATIENCE_S", 0.2)

    async def story() -> float:
        async with serving(fake):
            triton = await Triton.connect([fake.url])
        port = int(fake.url.rpartition(":")[2])
        loop = asyncio.get_running_loop()
        with pytest.raises(BackendUnavailable, match="cannot be reached"):
            await denoise(triton)
        began = loop.time()
        with pytest.raises(BackendUnavailable, match="cannot be reached"):
            await denoise(triton)
        late = loop.time() - began
        async with serving(fake, port):
            while set(triton.states.values()) != {"up"}:
                await asyncio.sleep(0.01)
            await denoise(triton)
            await triton.aclose()
        return late

    assert run(story) < 0.1


def test_a_server_that_drains_gets_no_calls(fake: FakeTriton, other: FakeTriton) -> None:
    async def story() -> None:
        async with connected(fake, other) as triton:
            fake.draining = True
            while "gone" not in triton.states.values():
                await asyncio.sleep(0.01)
            for _ in range(4):
                await denoise(triton)
            assert fake.calls == []
            fake.draining = False
            while set(triton.states.values()) != {"up"}:
                await asyncio.sleep(0.01)

    run(story)


def test_closing_ends_calls_in_hand_and_refuses_later_ones(fake: FakeTriton) -> None:
    async def story() -> None:
        async with connected(fake) as triton:
            fake.silent = True
            call = asyncio.create_task(denoise(triton))
            while not fake.calls:
                await asyncio.sleep(0.01)
            await triton.aclose()
            for attempt in (call, denoise(triton)):
                with pytest.raises(BackendUnavailable, match="closed"):
                    await attempt
            fake.silent = False

    run(story)


def test_addresses_that_a_name_loses_are_let_go(fake: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"triton:1": ["ipv4:127.0.0.1:1"]}

    async def addresses(url: str) -> list[str] | None:
        return known.get(url)

    monkeypatch.setattr(endpoints, "_addresses", addresses)
    monkeypatch.setattr(endpoints, "RESOLVE_EVERY_S", 0.02)

    async def story() -> None:
        async with serving(fake):
            known["triton:1"].append(f"ipv4:{fake.url}")
            triton = await Triton.connect(["triton:1"])
            assert len(triton.states) == 2
            known["triton:1"].pop(0)
            while len(triton.states) != 1:
                await asyncio.sleep(0.01)
            known.clear()  # the name server is down: what was known holds
            await asyncio.sleep(0.1)
            assert len(triton.states) == 1
            await denoise(triton)
            await triton.aclose()

    run(story)


def test_names_are_looked_up() -> None:
    async def story() -> list[list[str] | None]:
        return [await endpoints._addresses(url) for url in ("127.0.0.1:8", "[::1]:9", "no.such.name.invalid:1")]

    assert run(story) == [["ipv4:127.0.0.1:8"], ["ipv6:[::1]:9"], None]


@pytest.mark.parametrize(
    ("code", "told", "kind"),
    [
        (UNAVAILABLE, "Socket closed", Kind.GONE),
        (UNAVAILABLE, "Exceeds maximum queue size", Kind.BUSY),
        (grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'x' has no available versions", Kind.LOADING),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", Kind.LATE),
        (INTERNAL, "Stub process 'x_0_0' is not healthy.", Kind.CRASHED),
        (INTERNAL, "out of memory", Kind.FAILED),
        (grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape", Kind.FAILED),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "", Kind.BUSY),
        (grpc.StatusCode.CANCELLED, "", Kind.GONE),
    ],
)
def test_what_a_status_means(code: grpc.StatusCode, told: str, kind: Kind) -> None:
    assert fault(code, told).kind is kind


def test_libtorchs_names_are_ours_without_their_places(tmp_path: Path) -> None:
    tensors = [Tensor("latent", (3, -1, -1)), Tensor("task", (), "INT64")]
    write_config(tmp_path, "x", tensors, [Tensor("picture", (4, -1, -1))], 8, backend="pytorch")
    config = Repository(tmp_path).config("x")
    assert [port.name for port in config.input] == ["latent__0", "task__1"]
    signature = Signature.of(config)
    assert (set(signature.inputs), set(signature.outputs)) == ({"latent", "task"}, {"picture"})
    request = signature.request({"latent": np.zeros((2, 3, 4, 4), np.float32), "task": np.zeros(2, np.int64)})
    assert [list(given.shape) for given in request.inputs] == [[2, 3, 4, 4], [2, 1]]


def test_a_model_without_batches_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path, "x", [], [], 0)
    with pytest.raises(ModelError, match="x does no batches"):
        Signature.of(Repository(tmp_path).config("x"))

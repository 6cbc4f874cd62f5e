from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from saccade.backends import Ticket
from saccade.backends.embedded import Embedded, default_streams
from saccade.backends.engines import Engine
from saccade.backends.graphs import Feeds
from saccade.backends.stepping import Stepping
from saccade.errors import BackendUnavailable, ModelError
from saccade.pipeline import Inputs, Options, Pipeline
from saccade.repository import Repository
from tests import toy
from tests.toy import CONDITIONING, LATENT, PLANES, STRIDE

ENGINES = ["onnxruntime", "openvino"]


@pytest.fixture(scope="module", params=ENGINES)
def embedded(request: pytest.FixtureRequest, toy_repository: Path) -> Embedded:
    return Embedded.load(Repository(toy_repository), engine=request.param, threads=1)


def pictures(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (batch, 3, 32, 48)).astype(np.float32)


def latents(batch: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, LATENT, 4, 6)).astype(np.float32)


def integers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_the_three_graphs_answer_as_the_protocol_says(embedded: Embedded, toy_repository: Path) -> None:
    async def answer() -> tuple[np.ndarray, ...]:
        ticket = Ticket()
        seen = await embedded.encode(pictures(), -pictures(), integers(0, 2), ticket)
        assert {name: value.shape for name, value in seen.items()} == dict.fromkeys(CONDITIONING, (2, LATENT, 4, 6))
        output = await embedded.denoise(latents(), integers(999, 3), integers(0, 2), seen, ticket)
        return seen["prompt_latent"], output, await embedded.decode(output, ticket)

    prompt, output, picture = asyncio.run(answer())
    session = onnxruntime.InferenceSession(str(toy_repository / "toy-encoder/1/model.onnx"))
    expected = session.run(["prompt_latent"], {"image": pictures(), "prompt": -pictures(), "task": integers(0, 2)})
    assert np.allclose(prompt, expected[0], atol=1e-4)
    assert output.shape == latents().shape
    assert picture.shape == (2, PLANES, 4 * STRIDE, 6 * STRIDE)


def test_rows_do_not_influence_each_other(embedded: Embedded) -> None:
    async def denoise(rows: list[int]) -> np.ndarray:
        noise = np.concatenate([latents(1, seed) for seed in rows])
        seen = dict.fromkeys(CONDITIONING, noise * np.float32(0.1))
        return await embedded.denoise(noise, integers(*[900 - r for r in rows]), integers(*rows) % 3, seen, Ticket())

    together, reordered = asyncio.run(denoise([1, 2, 3, 4])), asyncio.run(denoise([4, 9, 1, 7]))
    assert np.array_equal(together[0], reordered[2])
    assert np.array_equal(together[3], reordered[0])


def test_the_event_loop_stays_free_while_a_graph_runs(tmp_path: Path) -> None:
    slow = Embedded.load(Repository(toy.build(tmp_path, width=256)), engine="onnxruntime", threads=1)

    async def count() -> tuple[int, float]:
        big = np.zeros((4, LATENT, 64, 64), np.float32)
        seen = dict.fromkeys(CONDITIONING, big)
        began = time.perf_counter()
        work = asyncio.create_task(slow.denoise(big, integers(1, 2, 3, 4), integers(0, 0, 0, 0), seen, Ticket()))
        turns = 0
        while not work.done():
            await asyncio.sleep(0)
            turns += 1
        await work
        return turns, time.perf_counter() - began

    turns, seconds = asyncio.run(count())
    assert turns > 10
    assert seconds > 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("fault", "told"), [("nan", "non-finite values"), ("batch", r"prediction of shape \[1, 8, 4, 6\]")]
)
def test_outputs_that_cannot_be_are_model_errors(tmp_path: Path, engine: str, fault: toy.Fault, told: str) -> None:
    broken = Embedded.load(Repository(toy.build(tmp_path, fault=fault)), engine=engine, threads=1)
    seen = dict.fromkeys(CONDITIONING, latents())
    with pytest.raises(ModelError, match=f"denoiser of toy.*{told}"):
        asyncio.run(broken.denoise(latents(), integers(3, 999), integers(0, 1), seen, Ticket()))


@pytest.mark.parametrize(
    ("spoilt", "told"),
    [
        ({"prompt_latent": latents()[:1]}, r"float32 \[1, 8, 4, 6\] as prompt_latent"),
        ({"prompt_latent": latents()[:, :5]}, r"float32 \[2, 5, 4, 6\] as prompt_latent"),
        ({"prompt_latent": latents().astype(np.float64)}, "float64"),
        ({"prompt_latent": latents()[0]}, r"float32 \[8, 4, 6\] as prompt_latent"),
        ({"other": latents()}, "nothing as prompt_latent"),
    ],
)
def test_inputs_that_do_not_fit_never_reach_the_engine(
    embedded: Embedded, spoilt: dict[str, np.ndarray], told: str
) -> None:
    seen = {"image_latent": latents()} | spoilt
    with pytest.raises(ModelError, match=told):
        asyncio.run(embedded.denoise(latents(), integers(3, 999), integers(0, 1), seen, Ticket()))


def test_an_engine_that_fails_is_a_model_error(toy_repository: Path) -> None:
    backend = Embedded.load(Repository(toy_repository), engine="onnxruntime", threads=1)
    seen = dict.fromkeys(CONDITIONING, latents()[:, :, :2])
    with pytest.raises(ModelError, match="denoiser of toy failed to run"):
        asyncio.run(backend.denoise(latents(), integers(3, 999), integers(0, 1), seen, Ticket()))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_denoiser_with_too_few_channels_is_not_loaded(tmp_path: Path, engine: str) -> None:
    with pytest.raises(ModelError, match=r"output prediction is float32 \[-1, 7, -1, -1\]"):
        Embedded.load(Repository(toy.build(tmp_path, fault="shape")), engine=engine, threads=1)


@pytest.mark.parametrize(
    ("card", "told"),
    [
        ({"conditioning": ["image_latent"]}, "toy wants prompt_latent, which nothing provides"),
        ({"conditioning": ["image_latent", "depths"]}, "toy-encoder has no output depths"),
        ({"encoder": "toy-decoder"}, "toy-decoder has no input image"),
        ({"decoder": "nowhere"}, "nowhere"),
        ({"latent": {"channels": 4, "stride": 8, "scale": 1, "multiple": 16}}, r"latent is float32 \[-1, 8, -1, -1\]"),
    ],
)
def test_a_card_that_does_not_fit_the_graphs_is_refused(tmp_path: Path, card: dict[str, object], told: str) -> None:
    toy.build(tmp_path, card=card)
    with pytest.raises(ModelError, match=told):
        Embedded.load(Repository(tmp_path), engine="onnxruntime", threads=1)


def test_a_graph_with_integers_for_pictures_is_refused(tmp_path: Path) -> None:
    toy.build(tmp_path)
    file = tmp_path / "toy-decoder/1/model.onnx"
    graph = onnx.load(file)
    kind = graph.graph.input[0].type.tensor_type
    kind.elem_type = onnx.TensorProto.DOUBLE
    cast = onnx.helper.make_node("Cast", ["latent"], ["single"], to=onnx.TensorProto.FLOAT)
    graph.graph.node.insert(0, cast)
    graph.graph.node[1].input[0] = "single"
    onnx.save(graph, file)
    card = Repository(tmp_path).card("toy").model_copy(update={"digests": {}})
    toy.write(tmp_path, "toy", card)
    with pytest.raises(ModelError, match=r"toy-decoder: input latent is .* where float32"):
        Embedded.load(Repository(tmp_path), engine="onnxruntime", threads=1)


def test_changed_weights_are_not_loaded(tmp_path: Path) -> None:
    toy.build(tmp_path)
    with (tmp_path / "toy-decoder/1/model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ModelError, match=r"toy-decoder: .*sha256"):
        Embedded.load(Repository(tmp_path), engine="onnxruntime", threads=1)


def test_a_cancelled_call_that_waits_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Embedded.load(Repository(toy.build(tmp_path, width=256)), engine="onnxruntime", threads=1)
    runs: list[int] = []
    engine = backend._engines["denoiser"]
    run = engine.run
    monkeypatch.setattr(engine, "run", lambda feeds: (runs.append(len(feeds["task"])), run(feeds))[1])

    async def leave() -> None:
        def call(batch: int) -> asyncio.Task[np.ndarray]:
            big = np.zeros((batch, LATENT, 64, 64), np.float32)
            labels = np.zeros(batch, np.int64)
            return asyncio.create_task(backend.denoise(big, labels, labels, dict.fromkeys(CONDITIONING, big), Ticket()))

        first, second, third = call(4), call(2), call(1)
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(first, second, third, return_exceptions=True)

    asyncio.run(leave())
    assert runs == [4, 1]


@pytest.fixture(scope="module")
def sharing(toy_repository: Path) -> Embedded:
    return Embedded.load(Repository(toy_repository), engine="openvino", threads=2, streams=2)


def test_calls_run_at_once_on_their_share_and_alone_on_all_threads(
    sharing: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting, ran = threading.Barrier(2, timeout=20), []

    def watch(name: str, engine: Engine) -> None:
        run = engine.run

        def watched(feeds: Feeds) -> dict[str, np.ndarray]:
            ran.append(name)
            if name == "share":
                meeting.wait()
            return run(feeds)

        monkeypatch.setattr(engine, "run", watched)

    async def ask() -> list[np.ndarray]:
        lane = Stepping(sharing, batch_size=1, concurrency=sharing.streams)
        await lane.start()
        for name, engines in (("share", sharing._engines), ("all", sharing._alone)):
            watch(name, engines["decoder"])
        alone = await lane.decode(latents(1), Ticket())
        return [alone, *await asyncio.gather(*(lane.decode(latents(1), Ticket()) for _ in range(2)))]

    alone, one, other = asyncio.run(ask())
    assert ran == ["all", "share", "share"]
    assert alone.tobytes() == one.tobytes() == other.tobytes()


def test_nothing_is_alone_beside_a_call_that_was_called_off_and_still_runs(
    sharing: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, going_on = threading.Event(), threading.Event()
    run = sharing._alone["decoder"].run

    def held(feeds: Feeds) -> dict[str, np.ndarray]:
        begun.set()
        assert going_on.wait(20)
        return run(feeds)

    async def ask() -> None:
        ghost = asyncio.create_task(sharing.decode(latents(1), Ticket(alone=True)))
        await asyncio.to_thread(begun.wait, 20)
        ghost.cancel()
        try:
            async with asyncio.timeout(20):  # on all threads it would wait for the ghost
                await sharing.decode(latents(1), Ticket(alone=True))
        finally:
            going_on.set()

    monkeypatch.setattr(sharing._alone["decoder"], "run", held)
    asyncio.run(ask())


def test_an_answer_of_shared_threads_is_the_same_alone_and_in_a_crowd(sharing: Embedded, toy_repository: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)

    async def answers(backend: Embedded, seeds: list[int]) -> dict[int, bytes]:
        lane = Stepping(backend, batch_size=1, concurrency=backend.streams)
        await lane.start()
        pipeline = Pipeline(lane)

        async def ask(seed: int) -> bytes:
            options = Options(steps=3, ensemble_size=1 + seed % 3, seed=seed).resolve(pipeline.card, "depth")
            return (await pipeline(Inputs("depth", picture), options)).prediction.tobytes()

        return dict(zip(seeds, await asyncio.gather(*map(ask, seeds)), strict=True))

    single = Embedded.load(Repository(toy_repository), engine="openvino", threads=2, streams=1)
    crowd = asyncio.run(answers(sharing, list(range(9))))
    for seed in (0, 1, 2):
        assert asyncio.run(answers(sharing, [seed])) == {seed: crowd[seed]}
        assert asyncio.run(answers(single, [seed])) == {seed: crowd[seed]}


@pytest.mark.parametrize(
    ("engine", "threads", "parameters", "streams"),
    [
        ("openvino", 1, 10**7, 1),
        ("openvino", 7, 10**7, 1),
        ("openvino", 8, 10**7, 2),
        ("openvino", 32, 10**7, 8),
        ("openvino", 8, 10**8, 1),
        ("onnxruntime", 8, 10**7, 1),
    ],
)
def test_small_models_share_the_threads(engine: str, threads: int, parameters: int, streams: int) -> None:
    assert default_streams(engine, threads, parameters) == streams


@pytest.mark.parametrize(
    ("engine", "threads", "told"),
    [("openvino", 2, "3 streams cannot share 2 threads"), ("onnxruntime", 4, "one batch at a time")],
)
def test_streams_that_cannot_be_are_refused(toy_repository: Path, engine: str, threads: int, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        Embedded.load(Repository(toy_repository), engine=engine, threads=threads, streams=3)


def test_a_size_that_only_one_way_has_a_graph_for_is_compared(
    toy_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs of fixed size round otherwise: an answer must not depend on which of the two has one."""
    backend = Embedded.load(Repository(toy_repository), engine="openvino", threads=2, streams=2, ratios=[(3, 4)])

    def fails(shapes: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(backend._alone["encoder"], "specialise", fails)
    assert asyncio.run(backend.specialise(1)) == [(48, 64)]
    assert backend.special == []


def test_a_closed_backend_is_unavailable(toy_repository: Path) -> None:
    async def late() -> None:
        backend = Embedded.load(Repository(toy_repository), engine="onnxruntime", threads=1)
        await backend.aclose()
        await backend.aclose()
        await backend.decode(latents(), Ticket())

    with pytest.raises(BackendUnavailable):
        asyncio.run(late())


def test_default_sizes_of_the_ratios_are_specialised_and_answer_alike(toy_repository: Path) -> None:
    async def decoded(special: bool) -> tuple[list[tuple[int, int]], np.ndarray]:
        ratios = [(3, 4), (1, 1), (4, 4)] if special else []
        backend = Embedded.load(Repository(toy_repository), precision="fp32", threads=1, ratios=ratios)
        lane = Stepping(backend, batch_size=2)
        await lane.start()
        try:
            image = np.random.default_rng(0).uniform(-1, 1, (1, 3, 48, 64)).astype(np.float32)
            seen = await lane.encode(image, image, integers(0), Ticket())
            noise = np.random.default_rng(1).standard_normal((1, LATENT, 48 // STRIDE, 64 // STRIDE))
            one = noise.astype(np.float32)
            return backend.special, await lane.denoise(one, integers(500), integers(0), seen, Ticket())
        finally:
            await lane.aclose()

    sizes, fixed = asyncio.run(decoded(True))
    none, free = asyncio.run(decoded(False))
    assert (sizes, none) == ([(48, 64), (64, 64)], [])
    np.testing.assert_allclose(fixed, free, atol=1e-5)

"""One request's life on real graphs: the loop against one written here, bytes that depend on no other, and leaving."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime
import pytest

from saccade import ddim
from saccade.backends import Array, Backend, Conditioning, Labels, Ticket
from saccade.backends.embedded import Embedded
from saccade.backends.stepping import Stepping
from saccade.card import Card
from saccade.errors import BackendUnavailable, InvalidInput, ModelError
from saccade.fit import context_box
from saccade.pipeline import Answer, Inputs, Options, Pipeline
from saccade.repository import Repository, sha256
from saccade.tasks import AmodalCoding, TaskName
from tests import toy
from tests.backends.recorder import Recorder
from tests.backends.transformer import transformer

ENGINES = [("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")]


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    async def within() -> Any:
        async with asyncio.timeout(30):
            return await coroutine

    return asyncio.run(within())


def picture(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """Smooth colours: noise would make every answer alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
    return np.kron(coarse, np.ones((16, 16, 1), np.uint8))[:height, :width]


def disc(height: int = 48, width: int = 64, radius: int = 9) -> np.ndarray:
    rows, columns = np.ogrid[:height, :width]
    return (rows - height // 2) ** 2 + (columns - width // 2) ** 2 < radius**2


def inputs(task: TaskName, seed: int = 0, **size: int) -> Inputs:
    image = picture(seed=seed, **size)
    if task == "flow":
        return Inputs("flow", image, next_image=np.roll(image, 3, axis=1))
    return Inputs(task, image, mask=disc(**size) if task == "amodal" else None)


def answer(
    backend: Backend, asked: Inputs, ticket: Ticket | None = None, **options: Any
) -> Coroutine[Any, Any, Answer]:
    return Pipeline(backend)(asked, Options(**options).resolve(backend.card, asked.task), ticket)


def contents(found: Answer) -> tuple[bytes, bytes, bytes]:
    maps = (found.prediction, found.uncertainty, found.completed)
    return tuple(b"" if m is None else m.tobytes() for m in maps)  # type: ignore[return-value]


def load(repository: Path, engine: str, precision: str) -> Embedded:
    return Embedded.load(Repository(repository), engine=engine, precision=precision, threads=1)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with a small transformer for its denoiser: something to gain from bf16, and to lose from bad batching."""
    path = toy.build(tmp_path_factory.mktemp("deep") / "models")
    onnx.save(transformer(64, 2, 4), path / "toy/1/model.onnx")
    card = Repository(path).card("toy")
    digests = card.digests | {"toy": sha256(path / "toy/1/model.onnx")}
    toy.write(path, "toy", card.model_copy(update={"digests": digests}))
    return path


# The loop, in float64 and without a line of the project's but the noise: cosine schedule with zero terminal SNR
# (2102.09672 eq. 17, 2305.08891 alg. 1), trailing timesteps, v-prediction (2202.00512 app. D).


def abar() -> np.ndarray:
    signal = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    root = np.sqrt(np.cumprod(1 - np.minimum(1 - signal[1:] / signal[:-1], 0.999)))
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


class Reference:
    def __init__(self, repository: Path, asked: Inputs) -> None:
        self.sessions = {
            name: onnxruntime.InferenceSession(str(repository / f"toy{name}/1/model.onnx"))
            for name in ("", "-encoder", "-decoder")
        }
        self.task = np.array([toy.LABELS[asked.task]])
        prompt = np.zeros_like(self.planes(asked.image))
        if asked.next_image is not None:
            prompt = self.planes(asked.next_image)
        if asked.mask is not None:
            prompt = np.repeat(np.where(asked.mask, 1, -1)[None, None], 3, axis=1).astype(np.float32)
        feeds = {"image": self.planes(asked.image), "prompt": prompt, "task": self.task}
        self.seen = dict(zip(toy.CONDITIONING, self.sessions["-encoder"].run(toy.CONDITIONING, feeds), strict=True))

    @staticmethod
    def planes(image: np.ndarray) -> np.ndarray:
        bottom, right = (-edge % toy.MULTIPLE for edge in image.shape[:2])
        padded = np.pad(image, ((0, bottom), (0, right), (0, 0)), mode="edge")
        return (padded.transpose(2, 0, 1)[None] / 127.5 - 1).astype(np.float32)

    def member(self, noise: np.ndarray, steps: int) -> np.ndarray:
        """Target picture [K, H, W]."""
        levels, z = abar(), noise[None].astype(np.float64)
        visited = [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]
        for now, then in zip(visited, [*visited[1:], None], strict=True):
            feeds = {"latent": z.astype(np.float32), "timestep": np.array([now]), "task": self.task, **self.seen}
            v = self.sessions[""].run(None, feeds)[0].astype(np.float64)
            a, s = np.sqrt(levels[now]), np.sqrt(1 - levels[now])
            clean, dirt = a * z - s * v, a * v + s * z
            after = 1.0 if then is None else levels[then]
            z = np.sqrt(after) * clean + np.sqrt(1 - after) * dirt
        return self.sessions["-decoder"].run(None, {"latent": (z / 0.5).astype(np.float32)})[0][0].astype(np.float64)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("task", ["depth", "flow", "amodal"])
def test_the_loop_agrees_with_one_in_float64(toy_repository: Path, task: TaskName, steps: int, engine: str) -> None:
    asked = inputs(task)
    if asked.mask is not None:  # an object so wide that its context is the whole picture
        asked = replace(asked, mask=disc(radius=20))
    wanted = {"steps": steps, "ensemble_size": 3, "reduction": "mean", "seed": 11, "processing_resolution": 0}
    found = run(answer(load(toy_repository, engine, "fp32"), asked, **wanted))

    reference = Reference(toy_repository, asked)
    shape = (toy.LATENT, 48 // toy.STRIDE, 64 // toy.STRIDE)
    members = np.stack([reference.member(ddim.noise(11, k, shape), steps) for k in range(3)])
    if task == "depth":
        depth = (members[:, 0].mean(0) + 1) / 2
        assert np.abs(found.prediction - (depth - depth.min()) / np.ptp(depth)).max() < 1e-4
    elif task == "flow":
        coded = members[:, :2]
        flow = np.sign(coded) * (np.expm1(np.abs(coded) * np.log1p(0.25 * 128)) / 128) * 64
        assert np.abs(found.prediction - flow.mean(0).transpose(1, 2, 0)).max() < 1e-3
    else:
        likely = (members[:, 0].mean(0) + 1) / 2
        clear = np.abs(likely - 0.5) > 1e-4
        assert clear.mean() > 0.9
        assert np.array_equal(found.prediction[clear], ((likely > 0.5) | asked.mask)[clear])


def test_flow_is_measured_on_the_models_picture(toy_repository: Path) -> None:
    """The model sees 64 x 48 px, of which 50 x 35 are the picture: its code is a share of 64."""
    asked = inputs("flow", height=35, width=50)
    found = run(answer(load(toy_repository, "onnxruntime", "fp32"), asked, steps=2, processing_resolution=0))
    coded = Reference(toy_repository, asked).member(ddim.noise(0, 0, (toy.LATENT, 6, 8)), 2)[:2, :35, :50]
    flow = np.sign(coded) * (np.expm1(np.abs(coded) * np.log1p(0.25 * 128)) / 128) * 64
    assert np.abs(found.prediction - flow.transpose(1, 2, 0)).max() < 1e-3


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("engine", "precision"), ENGINES)
@pytest.mark.parametrize("repository", ["toy_repository", "deep"])
def test_an_answer_does_not_depend_on_who_shares_its_batches(
    request: pytest.FixtureRequest, repository: str, engine: str, precision: str, batch_size: int
) -> None:
    """Alone, and among seven others of all tasks, timesteps and seeds that come before, with and after it."""
    path = request.getfixturevalue(repository)
    tasks: list[TaskName] = ["depth", "flow", "amodal"]

    def wanted(task: TaskName) -> dict[str, Any]:
        chosen = {"steps": 5, "ensemble_size": 3, "output_uncertainty": True}
        return chosen | ({"reduction": "aligned_median"} if task == "depth" else {})

    async def among(lane: Stepping, mine: Inputs, others: int) -> Answer:
        def other(i: int) -> asyncio.Task[Answer]:
            asked = inputs(tasks[i % 3], seed=i + 1)
            return asyncio.create_task(answer(lane, asked, steps=2 + i % 4, ensemble_size=1 + i % 3, seed=100 + i))

        crowd = [other(i) for i in range(others // 2)]
        await asyncio.sleep(0)
        me = asyncio.create_task(answer(lane, mine, **wanted(mine.task), seed=7))
        crowd += [other(i) for i in range(others // 2, others)]
        found, *_ = await asyncio.gather(me, *crowd)
        return found

    async def main() -> None:
        lane = Stepping(load(path, engine, precision), batch_size=batch_size)
        for task in tasks:
            alone = await among(lane, inputs(task), 0)
            crowded = await among(lane, inputs(task), 7)
            assert contents(alone) == contents(crowded)
            other_seed = await answer(lane, inputs(task), **wanted(task), seed=8)
            assert contents(other_seed) != contents(alone)
        await lane.aclose()

    run(main())


def test_the_answer_depends_on_picture_prompt_task_and_seed(toy_repository: Path) -> None:
    async def main() -> None:
        backend = load(toy_repository, "onnxruntime", "fp32")
        base = inputs("flow")
        others = [inputs("flow", seed=1), replace(base, next_image=np.roll(base.image, 9, axis=0))]
        first = await answer(backend, base)
        for other in others:
            assert contents(await answer(backend, other)) != contents(first)
        assert contents(await answer(backend, base, seed=1)) != contents(first)
        assert contents(await answer(backend, base, steps=3)) != contents(first)
        assert contents(await answer(backend, base)) == contents(first)

    run(main())


@dataclass
class Watched:
    """Any backend, watched: how many rows were denoised, from which latents; with `delay`, in a changed order."""

    inner: Backend
    rows: int = 0
    starts: list[bytes] = field(default_factory=list)
    delay: Callable[[int], float] | None = None
    after: Callable[[int], None] | None = None

    @property
    def card(self) -> Card:
        return self.inner.card

    async def encode(self, image: Array, prompt: Array, task: Labels, ticket: Ticket) -> Conditioning:
        return await self.inner.encode(image, prompt, task, ticket)

    async def denoise(
        self, latent: Array, timestep: Labels, task: Labels, conditioning: Conditioning, ticket: Ticket
    ) -> Array:
        self.rows += len(latent)
        self.starts += [row.tobytes() for row, t in zip(latent, timestep, strict=True) if t == 999]
        if self.delay is not None:
            await asyncio.sleep(self.delay(self.rows))
        if self.after is not None:
            self.after(self.rows)
        return await self.inner.denoise(latent, timestep, task, conditioning, ticket)

    async def decode(self, latent: Array, ticket: Ticket) -> Array:
        return await self.inner.decode(latent, ticket)

    async def aclose(self) -> None:
        await self.inner.aclose()


def test_a_members_noise_is_its_own(toy_repository: Path) -> None:
    """It depends on seed and number: not on order of arrival, ensemble size, task or steps."""

    async def main() -> None:
        embedded = load(toy_repository, "onnxruntime", "fp32")
        plain, turned = Watched(embedded), Watched(embedded, delay=lambda row: 0.002 * (-row % 5))
        first = await answer(plain, inputs("depth"), steps=3, ensemble_size=5, seed=3)
        second = await answer(turned, inputs("depth"), steps=3, ensemble_size=5, seed=3)
        assert contents(first) == contents(second)

        few = Watched(embedded)
        await answer(few, inputs("flow"), steps=1, ensemble_size=2, seed=3)
        assert few.starts == plain.starts[:2]
        assert len(set(plain.starts)) == 5
        other = Watched(embedded)
        await answer(other, inputs("depth"), ensemble_size=5, seed=4)
        assert not set(other.starts) & set(plain.starts)

    run(main())


def test_leaving_frees_waiting_steps_at_once(toy_repository: Path) -> None:
    """Forty steps were wanted; after the caller has left in the seventh, not one more is run."""

    async def main() -> None:
        request: asyncio.Task[Answer] | None = None
        ran_at_leaving: list[int] = []

        def leave(rows: int) -> None:
            if rows == 7 and request is not None:
                ran_at_leaving.append(rows)
                request.cancel()

        backend = Watched(load(toy_repository, "onnxruntime", "fp32"), after=leave)
        lane = Stepping(backend, batch_size=1)
        ticket = Ticket()
        request = asyncio.create_task(answer(lane, inputs("depth"), ticket, steps=10, ensemble_size=4))
        with pytest.raises(asyncio.CancelledError):
            await request
        assert ran_at_leaving == [7]
        assert (lane.waiting, ticket.waiting) == (0, 0)
        await answer(lane, inputs("flow"), steps=2, ensemble_size=1)
        assert backend.rows == 7 + 2
        assert (lane.running, ticket.running) == (0, 0)
        await lane.aclose()

    run(main())


def test_leaving_one_request_does_not_disturb_another(toy_repository: Path) -> None:
    async def main() -> None:
        lane = Stepping(load(toy_repository, "onnxruntime", "fp32"), batch_size=4)
        alone = await answer(lane, inputs("depth"), steps=6, ensemble_size=3)
        leaving = asyncio.create_task(answer(lane, inputs("flow"), steps=1000, ensemble_size=3))
        staying = asyncio.create_task(answer(lane, inputs("depth"), steps=6, ensemble_size=3))
        while lane.waiting < 4:  # until both have encoded their pictures
            await asyncio.sleep(0)
        leaving.cancel()
        assert contents(await staying) == contents(alone)
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await lane.aclose()

    run(main())


@pytest.mark.parametrize("fault", ["nan", "batch"])
def test_a_model_that_fails_is_one_plain_error(tmp_path: Path, fault: toy.Fault) -> None:
    """Not an ExceptionGroup, however many members fail; requests that do not touch the fault still succeed."""

    async def main() -> None:
        lane = Stepping(load(toy.build(tmp_path, fault=fault), "onnxruntime", "fp32"), batch_size=4)
        ticket = Ticket()
        with pytest.raises(ModelError, match="denoiser of toy"):
            await answer(lane, inputs("depth"), ticket, steps=4, ensemble_size=4)
        assert (lane.waiting, lane.running, ticket.waiting, ticket.running) == (0, 0, 0, 0)
        if fault == "nan":  # it is in timesteps below 500, where a single step never comes
            assert np.isfinite((await answer(lane, inputs("depth"), steps=1)).prediction).all()
        await lane.aclose()

    run(main())


def test_a_backend_that_is_away_is_one_plain_error(toy_repository: Path) -> None:
    backend = Recorder.of(toy_repository)
    backend.error = BackendUnavailable("draining", retry_after_s=7)
    with pytest.raises(BackendUnavailable, match="draining") as caught:
        run(answer(backend, inputs("depth"), ensemble_size=3))
    assert caught.value.retry_after_s == 7


def test_an_object_is_painted_when_somebody_looks_and_needs_no_model_then(toy_repository: Path) -> None:
    backend = load(toy_repository, "onnxruntime", "fp32")
    with patch.object(AmodalCoding, "picture", side_effect=AmodalCoding.picture, autospec=True) as paint:
        found = run(answer(backend, inputs("amodal")))
        left = weakref.ref(backend)
        del backend
        gc.collect()
        assert left() is None
        assert paint.call_count == 0
        assert found.completed is found.completed is not None
        assert paint.call_count == 1


@pytest.mark.parametrize("match_input_resolution", [True, False])
def test_the_whole_object_holds_its_visible_part_and_stays_in_its_context(
    toy_repository: Path, match_input_resolution: bool
) -> None:
    image = picture(90, 120)
    visible = np.zeros((90, 120), bool)
    visible[40:50, 70:84] = True
    asked = Inputs("amodal", image, mask=visible)
    backend = load(toy_repository, "onnxruntime", "fp32")
    options = {"match_input_resolution": match_input_resolution, "ensemble_size": 2, "output_uncertainty": True}
    found = run(answer(backend, asked, **options))
    whole, completed, spread = found.prediction, found.completed, found.uncertainty
    assert whole.dtype == bool
    assert completed is not None
    assert spread is not None
    assert np.array_equal(completed[..., 3] == 255, whole)
    top, left, height, width = context_box(visible, 0.5)
    if match_input_resolution:
        assert whole.shape == spread.shape == (90, 120)
        assert whole[visible].all()
        outside = np.ones_like(visible)
        outside[top : top + height, left : left + width] = False
        assert not whole[outside].any()
        assert not spread[outside].any()
        assert np.array_equal(completed[visible][:, :3], image[visible])
        assert whole.sum() > visible.sum()
    else:
        assert max(whole.shape) == found.options.processing_resolution
        assert abs(whole.shape[0] / whole.shape[1] - height / width) < 0.05


def test_a_picture_of_any_size_gets_an_answer_of_its_size(toy_repository: Path) -> None:
    async def main() -> None:
        backend = load(toy_repository, "onnxruntime", "fp32")
        for height, width in ((1, 1), (3, 200), (77, 130), (200, 31)):
            depth = await answer(backend, Inputs("depth", picture(height, width)), ensemble_size=2)
            assert depth.prediction.shape == (height, width)
            assert depth.prediction.min() >= 0
            assert depth.prediction.max() <= 1
            flow = await answer(backend, inputs("flow", height=height, width=width))
            assert flow.prediction.shape == (height, width, 2)

    run(main())


def test_an_answer_says_how_it_came_to_be(toy_repository: Path) -> None:
    async def main() -> None:
        lane = Stepping(load(toy_repository, "onnxruntime", "fp32"), batch_size=1)
        found = await answer(lane, inputs("depth"), ensemble_size=3)
        assert found.model == "toy"
        assert found.digest == Repository(toy_repository).card("toy").digest
        assert (found.options.steps, found.options.reduction) == (2, "median")
        assert set(found.timings_ms) == {"queue", "encode", "denoise", "decode", "ensemble"}
        assert all(took >= 0 for took in found.timings_ms.values())
        await lane.aclose()

    run(main())


Wrong = tuple[TaskName, dict[str, Any], Literal["reduction", "steps", "ensemble_size", "seed", "output_uncertainty"]]


@pytest.mark.parametrize(
    "wrong",
    [
        ("flow", {"reduction": "aligned_median"}, "reduction"),
        ("depth", {"steps": 0}, "steps"),
        ("depth", {"steps": 1001}, "steps"),
        ("depth", {"ensemble_size": 0}, "ensemble_size"),
        ("depth", {"seed": -1}, "seed"),
        ("depth", {"output_uncertainty": True}, "output_uncertainty"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(toy_repository: Path, wrong: Wrong) -> None:
    task, options, param = wrong
    with pytest.raises(InvalidInput) as caught:
        Options(**options).resolve(Repository(toy_repository).card("toy"), task)
    assert caught.value.param == param


def test_inputs_that_do_not_fit_the_task_are_refused_by_name() -> None:
    image, mask = picture(), disc()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"task": "depth", "next_image": image}, "next_image"),
        ({"task": "flow"}, "next_image"),
        ({"task": "flow", "next_image": image[:-1]}, "next_image"),
        ({"task": "amodal"}, "mask"),
        ({"task": "amodal", "mask": mask.T}, "mask"),
        ({"task": "amodal", "mask": np.zeros_like(mask)}, "mask"),
    ]
    for given, param in wrong:
        with pytest.raises(InvalidInput) as caught:
            Inputs(image=image, **given)
        assert caught.value.param == param

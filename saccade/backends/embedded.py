"""Run a model in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from saccade.backends import Array, Conditioning, Labels, Ticket
from saccade.backends.engines import Engine, Feeds, Port, choose, default_threads, open_engine
from saccade.card import Card
from saccade.errors import BackendUnavailable, ModelError
from saccade.repository import Repository

Part = Literal["encoder", "denoiser", "decoder"]
Results = dict[str, NDArray[Any]]

_PICTURE, _LABEL = Port((-1, -1, -1, -1), "float32"), Port((-1,), "int64")


class Embedded:
    """Three compiled graphs and one worker thread: calls run one after another, each on all of the engine's threads.

    The event loop stays free meanwhile. A call that is cancelled before its turn never runs.
    `engine` and `precision` say what 'auto' came to; the decoder is always fp32, it is tiny.
    """

    def __init__(self, card: Card, engines: Mapping[Part, Engine], engine: str, precision: str) -> None:
        check(card, engines)
        self.card = card
        self.engine = engine
        self.precision = precision
        self._engines = engines
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="saccade-embedded")

    @classmethod
    def load(
        cls,
        repository: Repository,
        model: str | None = None,
        *,
        engine: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
    ) -> Self:
        """Verify the files against the card's digests, compile them, check that they are what the card says.

        `engine`: auto, openvino, onnxruntime. `precision`: auto, fp32, bf16. `threads`: None takes the physical cores.
        Raises ModelError.
        """
        card = repository.card(model or repository.default())
        repository.verify(card)
        engine, precision = choose(engine, precision)
        names: dict[Part, str] = {"encoder": card.encoder, "denoiser": card.name, "decoder": card.decoder}

        def compiled(part: Part) -> Engine:
            own = "fp32" if part == "decoder" else precision
            return open_engine(repository.graph(names[part]), engine, own, threads or default_threads())

        with ThreadPoolExecutor(len(names)) as pool:  # most of a start is compiling
            return cls(card, dict(zip(names, pool.map(compiled, names), strict=True)), engine, precision)

    async def encode(self, image: Array, prompt: Array, task: Labels, ticket: Ticket) -> Conditioning:
        results = await self._run("encoder", {"image": image, "prompt": prompt, "task": task})
        return {name: results[name] for name in self.card.conditioning}

    async def denoise(
        self, latent: Array, timestep: Labels, task: Labels, conditioning: Conditioning, ticket: Ticket
    ) -> Array:
        feeds: dict[str, NDArray[Any]] = {"latent": latent, "timestep": timestep, "task": task, **conditioning}
        return (await self._run("denoiser", feeds))["prediction"]

    async def decode(self, latent: Array, ticket: Ticket) -> Array:
        return (await self._run("decoder", {"latent": latent}))["picture"]

    async def aclose(self) -> None:
        """Let the calls in hand end; later ones are refused."""
        await asyncio.to_thread(self._worker.shutdown)

    async def _run(self, part: Part, feeds: Feeds) -> Results:
        try:
            future = asyncio.get_running_loop().run_in_executor(self._worker, self._compute, part, feeds)
        except RuntimeError as error:  # the pool's word for being shut down
            raise BackendUnavailable("the backend is closed") from error
        return await future

    def _compute(self, part: Part, feeds: Feeds) -> Results:
        self._check_feeds(part, feeds)
        try:
            results = self._engines[part].run(feeds)
        except Exception as error:  # every engine has its own
            raise ModelError(f"the {part} of {self.card.name} failed to run") from error
        self._check_results(part, feeds, results)
        return results

    def _check_feeds(self, part: Part, feeds: Feeds) -> None:
        """OpenVINO reads past the end of an input that does not fit, so none may reach it."""
        rows = len(next(iter(feeds.values())))
        for name, port in self._engines[part].inputs.items():
            given = Port(feeds[name].shape, feeds[name].dtype.name) if name in feeds else None
            if given is None or not _fits(Port((rows, *port.dims[1:]), port.dtype), given):
                told = "nothing" if given is None else _told(given)
                raise ModelError(f"the {part} of {self.card.name} was given {told} as {name}, a {_told(port)}")

    def _check_results(self, part: Part, feeds: Feeds, results: Results) -> None:
        for name, value in results.items():
            wanted = self._shape(part, name, feeds)
            agree = len(wanted) == value.ndim and all(w in (-1, s) for w, s in zip(wanted, value.shape, strict=True))
            if not agree:
                told = f"{list(value.shape)} where {list(wanted)} belongs"
                raise ModelError(f"the {part} of {self.card.name} produced {name} of shape {told}")
            if not np.isfinite(value).all():
                raise ModelError(f"the {part} of {self.card.name} produced non-finite values")

    def _shape(self, part: Part, name: str, feeds: Feeds) -> tuple[int, ...]:
        """What an output's shape must be, -1 where anything goes."""
        if part == "encoder":
            return (len(feeds["task"]), *self._engines[part].outputs[name].dims[1:])
        batch, channels, height, width = feeds["latent"].shape
        if part == "denoiser":
            return batch, channels, height, width
        return batch, -1, height * self.card.latent.stride, width * self.card.latent.stride


def check(card: Card, engines: Mapping[Part, Engine]) -> None:
    """The graphs must take and give what the card says. Raises ModelError that names graph and tensor."""
    encoded = engines["encoder"].outputs
    seen = {name: encoded[name] for name in card.conditioning if name in encoded}
    latent = Port((-1, card.latent.channels, -1, -1), "float32")
    pictures = {"image": _PICTURE, "prompt": _PICTURE, "task": _LABEL}
    noisy = {"latent": latent, "timestep": _LABEL, "task": _LABEL}
    _agree(card.encoder, "input", pictures, engines["encoder"].inputs)
    _agree(card.encoder, "output", dict.fromkeys(card.conditioning) | seen, encoded)
    _agree(card.name, "input", noisy | seen, engines["denoiser"].inputs)
    _agree(card.name, "output", {"prediction": latent}, engines["denoiser"].outputs)
    _agree(card.decoder, "input", {"latent": latent}, engines["decoder"].inputs)
    _agree(card.decoder, "output", {"picture": _PICTURE}, engines["decoder"].outputs)


def _agree(model: str, side: str, wanted: Mapping[str, Port | None], found: Mapping[str, Port]) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ModelError(f"{model} has no {side} {', '.join(missing)}; it has {', '.join(found)}")
    unknown = [name for name in found if name not in wanted]
    if unknown and side == "input":
        raise ModelError(f"{model} wants {', '.join(unknown)}, which nothing provides")
    for name, port in wanted.items():
        if port is not None and not _fits(port, found[name]):
            raise ModelError(f"{model}: {side} {name} is {_told(found[name])} where {_told(port)} belongs")


def _fits(wanted: Port, found: Port) -> bool:
    sizes = zip(wanted.dims, found.dims, strict=False)
    return (
        len(wanted.dims) == len(found.dims)
        and wanted.dtype == found.dtype
        and all(w == f or -1 in (w, f) for w, f in sizes)
    )


def _told(port: Port) -> str:
    return f"{port.dtype} {list(port.dims)}"

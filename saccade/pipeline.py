"""One request's life: fit -> encode -> denoise loop -> decode -> ensemble -> unfit.

Batching is not visible here: every member of every request awaits the same denoiser, and the backend packs what waits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from saccade import ddim, dial, ensemble
from saccade.anytime import Anytime, Sight, Spend
from saccade.backends import Array, Backend, Conditioning, Labels, Ticket
from saccade.card import Card, TaskCard
from saccade.errors import InvalidInput
from saccade.fit import Fit, context_box, resize
from saccade.metres import Metres, to_metres
from saccade.schedule import Spacing
from saccade.tasks import TASKS, AmodalCoding, DepthCoding, FlowCoding, TaskName

Picture = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Phase = Literal["encode", "denoise", "decode", "ensemble"]
GLIMPSE_PX = 256
UNSEEN = 128
"""The level of a painted object's colours where the model did not look."""


@dataclass(frozen=True)
class Options:
    """What a caller may turn. None means the card's default for the task.

    `steps` DDIM steps; `ensemble_size` members; `reduction` of the members; `seed` of the noise; `spacing` of the
    timesteps; `processing_resolution` longer edge in pixels (0: the picture's own); `match_input_resolution` brings the
    answer back to the picture's size; `output_uncertainty` adds the map of the members' spread.

    Instead of steps and members: `budget_ms`, milliseconds to spend; `quality`, a point of the card's measured curve;
    `target_uncertainty`, members until the answer's mean uncertainty is that low (`saccade.dial`).
    """

    steps: int | None = None
    ensemble_size: int | None = None
    reduction: ensemble.Reduction | None = None
    seed: int = 0
    spacing: Spacing | None = None
    processing_resolution: int | None = None
    match_input_resolution: bool = True
    output_uncertainty: bool = False
    budget_ms: int | None = None
    quality: dial.Quality | None = None
    target_uncertainty: float | None = None

    def resolve(self, card: Card, task: TaskName, limits: dial.Limits = dial.NO_LIMITS) -> Resolved:
        """Fill in the card's defaults, and what `quality` stands for; with a budget, the least that it may come to.
        Raises InvalidInput for what the task cannot do."""
        if task not in card.tasks:
            known = ", ".join(card.tasks) or "no task: its graphs can be asked raw"
            raise InvalidInput(f"model {card.name} does not do {task}; it does {known}", param="task")
        defaults = card.tasks[task].defaults
        chosen = {f.name: getattr(self, f.name) for f in fields(Resolved)}
        if dial.dialled(self):
            point = dial.unhurried(self, card, task, limits)
            chosen |= {"steps": point.steps, "ensemble_size": point.members}
        chosen |= {k: getattr(defaults, k) for k, v in chosen.items() if v is None}
        resolved = Resolved(**chosen)
        resolved.check(card, task)
        return resolved


@dataclass(frozen=True)
class Resolved:
    """Options with nothing left open."""

    steps: int
    ensemble_size: int
    reduction: ensemble.Reduction
    seed: int
    spacing: Spacing
    processing_resolution: int
    match_input_resolution: bool
    output_uncertainty: bool

    def check(self, card: Card, task: TaskName) -> None:
        if self.reduction not in TASKS[task].reductions:
            allowed = ", ".join(TASKS[task].reductions)
            raise InvalidInput(f"{task} cannot be reduced by {self.reduction}; use {allowed}", param="reduction")
        if not 1 <= self.steps <= card.noise.timesteps:
            raise InvalidInput(f"steps must be 1 to {card.noise.timesteps}", param="steps")
        if self.ensemble_size < 1:
            raise InvalidInput("ensemble_size must be at least 1", param="ensemble_size")
        card.noise.walk(self.steps, self.spacing)
        if card.noise.start == "zeros" and self.ensemble_size > 1:
            raise InvalidInput(
                f"model {card.name} starts from zero, not from noise: its members would all be the same, ask for one",
                param="ensemble_size",
            )
        if self.processing_resolution < 0:
            raise InvalidInput("processing_resolution must be 0 or more", param="processing_resolution")
        if not 0 <= self.seed < 2**63:
            raise InvalidInput("seed must be 0 to 2^63 - 1", param="seed")
        if self.output_uncertainty and self.ensemble_size < 2:
            raise InvalidInput(
                "an uncertainty needs members to differ: ask for ensemble_size >= 2", param="output_uncertainty"
            )


@dataclass(frozen=True)
class Inputs:
    """A task's pictures: `image` [H, W, 3] uint8; for flow `next_image` of the same size; for amodal `mask` [H, W] of
    the object's visible part."""

    task: TaskName
    image: Picture
    next_image: Picture | None = None
    mask: Mask | None = None

    def __post_init__(self) -> None:
        wanted = TASKS[self.task].prompt
        for name in ("next_image", "mask"):
            prompt = getattr(self, name)
            if (prompt is not None) != (name == wanted):
                raise InvalidInput(f"{self.task} {'needs' if name == wanted else 'takes no'} {name}", param=name)
            if prompt is not None and prompt.shape[:2] != self.image.shape[:2]:
                theirs, ours = ("x".join(map(str, p.shape[1::-1])) for p in (prompt, self.image))
                raise InvalidInput(f"{name} is {theirs} but image is {ours}: resize one to the other", param=name)
        if self.mask is not None and not self.mask.any():
            raise InvalidInput("mask is empty: paint the object's visible part white", param="mask")


@dataclass(frozen=True)
class Answer:
    """What was seen. `plan`: where steps and members were chosen for the caller, or time could end the work.

    `prediction`: depth [H, W] float32 in [0, 1], 0 nearest, or in metres where `metres` says how; flow [H, W, 2]
    float32 in pixels of the map's own size; amodal [H, W] bool, the whole object. `uncertainty`: [H, W] float32 or
    None. `painting`: for amodal the whole object, or what paints it once somebody asks for it as `completed`.
    """

    task: TaskName
    prediction: NDArray[np.float32] | Mask
    uncertainty: Array | None
    painting: Picture | Callable[[], Picture | None] | None
    options: Resolved
    model: str
    digest: str
    timings_ms: dict[str, float] = field(default_factory=dict)
    metres: Metres | None = None
    plan: dial.Plan | None = None

    @cached_property
    def completed(self) -> Picture | None:
        """The whole object, [H, W, 4] uint8 RGBA: the picture's own pixels where it is visible, the model's where it is
        hidden. None for other tasks, and for models that paint none."""
        return self.painting() if callable(self.painting) else self.painting

    @property
    def units(self) -> str:
        """Of the prediction and of its uncertainty."""
        return TASKS[self.task].units if self.metres is None else "metres"

    def in_metres(self, metres: Metres) -> Answer:
        """A depth in [0, 1] as metres, by a fit to it."""
        depth = to_metres(self.prediction.astype(np.float32, copy=False), metres)
        spread = None if self.uncertainty is None else self.uncertainty * np.float32(metres.scale)
        return replace(self, prediction=depth, uncertainty=spread, metres=metres)


Glimpse = Callable[[], Awaitable[Answer]]
Surround = Callable[[Phase], AbstractContextManager[object]]


class Watch(Protocol):
    """Hears how an answer comes about, on the event loop. Whatever it raises ends the request."""

    def phase(self, name: Phase) -> None:
        """A phase begins."""
        ...

    async def step(self, member: int, step: int, glimpse: Glimpse) -> None:
        """`member` has taken step 1 .. steps, and goes on when this returns.

        `glimpse` decodes what the member now takes for the clean answer: an Answer of it alone, its longer edge at most
        `GLIMPSE_PX`, without uncertainty. It costs a decoding.
        """
        ...


class Pipeline:
    """Answers requests with one model. Holds no state of any request. `surround` is entered around every phase."""

    def __init__(self, backend: Backend, surround: Surround = nullcontext) -> None:
        self.backend = backend
        self.card = backend.card
        self.surround = surround

    def fit(self, inputs: Inputs, options: Resolved) -> Fit:
        """Where the model looks, and at what size."""
        coding = self.card.coding(inputs.task)
        box = None
        if inputs.mask is not None and isinstance(coding, AmodalCoding) and coding.context is not None:
            box = context_box(inputs.mask, coding.context)
        source = (inputs.image.shape[0], inputs.image.shape[1])
        return Fit.plan(source, options.processing_resolution, self.card.latent.multiple, box)

    async def __call__(
        self,
        inputs: Inputs,
        options: Resolved,
        ticket: Ticket | None = None,
        watch: Watch | None = None,
        spend: Spend | None = None,
    ) -> Answer:
        """Answer one request; cancelling withdraws its waiting steps. Raises ModelError or BackendUnavailable.

        The answer is the same whether or not somebody watches. `spend` may end it early, and its plan says so then.
        """
        if inputs.mask is None:
            fit = self.fit(inputs, options)
        else:  # where it lies takes a look at all of it
            fit = await asyncio.to_thread(self.fit, inputs, options)
        run = _Run(self.backend, inputs, options, fit, ticket or Ticket(), watch, self.surround)
        run.plan()
        with run.timed("encode"):
            conditioning = await run.encode()
        if spend is not None:
            return await self._within(run, conditioning, spend)
        with run.timed("denoise"):
            latents = await _all(run.refine(member, conditioning) for member in range(options.ensemble_size))
        with run.timed("decode"):
            planes = await _all(run.decode(latent) for latent in latents)
        with run.timed("ensemble"):
            answer = await asyncio.to_thread(lambda: run.conclude(np.concatenate(planes)))
        return replace(answer, timings_ms=run.timings_ms)

    async def _within(self, run: _Run, conditioning: Conditioning, spend: Spend) -> Answer:
        pace = getattr(self.backend, "pace", None)
        at_once = 1 if pace is None else pace.batch_size * pace.concurrency
        together = max(1, at_once // len(run.labels))
        members = Anytime(run, conditioning, spend, together)
        with run.timed("denoise"):
            await members.collect()
        with run.timed("ensemble"):
            answer, plan = await asyncio.to_thread(members.conclude)
        return replace(answer, plan=plan, timings_ms=run.timings_ms)


async def _all(coroutines: Iterable[Coroutine[Any, Any, Array]]) -> list[Array]:
    """Run together; if one fails or the caller leaves, none goes on. Raises the first failure as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as failures:
        first = failures.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]


@dataclass
class _Run:
    backend: Backend
    inputs: Inputs
    options: Resolved
    fit: Fit
    ticket: Ticket
    watch: Watch | None = None
    surround: Surround = nullcontext
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: Phase) -> Iterator[None]:
        """Seconds of the phase without those spent waiting in a queue."""
        if self.watch is not None:
            self.watch.phase(phase)
        began, queued = time.perf_counter(), self.ticket.queue_s
        with self.surround(phase):
            yield
        self.seconds[phase] = max(0.0, time.perf_counter() - began - (self.ticket.queue_s - queued))

    @property
    def card(self) -> Card:
        return self.backend.card

    @property
    def task(self) -> TaskCard:
        return self.card.tasks[self.inputs.task]

    @property
    def labels(self) -> Labels:
        """[R], one for each run that an answer takes."""
        return np.array(self.task.labels, np.int64)

    @property
    def timings_ms(self) -> dict[str, float]:
        return {"queue": self.ticket.queue_s * 1e3, **{name: s * 1e3 for name, s in self.seconds.items()}}

    def plan(self) -> None:
        """Tell the ticket what is ahead."""
        members, runs = self.options.ensemble_size, len(self.labels)
        pixels = self.fit.padded[0] * self.fit.padded[1]
        denoise, decode = members * self.options.steps * runs, members * runs
        self.ticket.plan(pixels=pixels, encode=1, denoise=denoise, decode=decode, label=self.task.label)

    def ahead(self, denoise: int, decode: int) -> None:
        """Rows more, or fewer."""
        self.ticket.plan(pixels=self.fit.padded[0] * self.fit.padded[1], denoise=denoise, decode=decode)

    def spent(self, denoise_s: float, decode_s: float) -> None:
        """Share the time in which members were refined and decoded side by side out between the two."""
        whole = self.seconds["denoise"]
        self.seconds["decode"] = whole * decode_s / max(denoise_s + decode_s, 1e-9)
        self.seconds["denoise"] = whole - self.seconds["decode"]

    async def encode(self) -> Conditioning:
        """What the denoiser is given of the pictures, a row for each run."""
        image, prompt = await asyncio.to_thread(self.pictures)
        seen = await self.backend.encode(image, prompt, self.labels[:1], self.ticket)
        runs = len(self.labels)
        return seen if runs == 1 else {name: np.repeat(value, runs, 0) for name, value in seen.items()}

    def pictures(self) -> tuple[Array, Array]:
        """Image and prompt as the model takes them, [1, 3, h, w] each; a task without a prompt gets a blank one."""
        image = self.fit.picture(self.inputs.image)
        prompt = np.full_like(image, self.task.blank)
        if self.inputs.next_image is not None:
            prompt = self.fit.picture(self.inputs.next_image)
        elif self.inputs.mask is not None:
            prompt = self.fit.mask(self.inputs.mask)
        return image[None], prompt[None]

    async def refine(self, member: int, conditioning: Conditioning, sight: Sight | None = None) -> Array:
        """One member's way from noise to an estimate, [R, C, h, w]: its R runs side by side, from the same noise.

        Who has a `sight` of it may end it after any step: the estimate is then what it takes for the clean latent.
        """
        noise, labels = self.card.noise, self.labels
        z = np.repeat(self.start(member)[None], len(labels), 0)
        for taken, (t, t_prev) in enumerate(noise.walk(self.options.steps, self.options.spacing), 1):
            now, then = np.full_like(labels, t), np.full_like(labels, t_prev)
            if sight is not None:
                sight.asked = taken
            output = await self.backend.denoise(z, now, labels, conditioning, self.ticket)
            if sight is not None:
                sight.see(taken, z, output, now)
            if self.watch is not None:
                await self.watch.step(member, taken, partial(self.glimpse, z, output, now))
            if sight is not None and sight.enough:
                return self.estimate(z, output, now)
            z = ddim.step(self.card.schedule, noise.prediction, z, output, now, then)
        return z

    def start(self, member: int) -> Array:
        """Where a member's way begins, [C, h, w]."""
        latent = self.card.latent
        shape = (latent.channels, *(edge // latent.stride for edge in self.fit.padded))
        if self.card.noise.start == "zeros":
            return np.zeros(shape, np.float32)
        return ddim.noise(self.options.seed, member, shape)

    async def glimpse(self, z: Array, output: Array, t: Labels) -> Answer:
        planes = await self.decode(self.estimate(z, output, t))
        return await asyncio.to_thread(lambda: self.small.conclude(planes))

    def estimate(self, z: Array, output: Array, t: Labels) -> Array:
        """What the output takes for the clean latent."""
        clean = ddim.to_sample(z, output, self.card.schedule.abar(t), self.card.noise.prediction)
        return clean.astype(np.float32)

    @cached_property
    def small(self) -> _Run:
        """The same request about a picture of at most `GLIMPSE_PX`."""
        fit = self.fit.shrunk(GLIMPSE_PX)
        height, width = fit.source
        image = np.asarray(Image.fromarray(self.inputs.image).resize((width, height), Image.Resampling.BILINEAR))
        mask = None if self.inputs.mask is None else resize(self.inputs.mask.astype(np.float32), fit.source) > 0
        next_image = image if self.inputs.next_image is not None else None
        options = replace(self.options, match_input_resolution=True, output_uncertainty=False)
        inputs = Inputs(self.inputs.task, image, next_image, mask)
        return _Run(self.backend, inputs, options, fit, self.ticket)

    async def decode(self, z: Array) -> Array:
        return await self.backend.decode(z / np.float32(self.card.latent.scale), self.ticket)

    def conclude(self, pictures: Array) -> Answer:
        """Target pictures [N * R, K, h, w] of the members' runs -> the answer."""
        planes = self.fit.content(pictures)
        coding = self.card.coding(self.inputs.task)
        if isinstance(coding, DepthCoding):
            return self.depth(self.members(planes))
        if isinstance(coding, FlowCoding):
            return self.flow(self.members(planes))
        return self.amodal(coding, planes)

    def merge(self, pictures: Array, members: int) -> Answer:
        """`conclude` of so many members, which may be fewer than were asked for: one has no uncertainty."""
        surely = self.options.output_uncertainty and members > 1
        options = replace(self.options, ensemble_size=members, output_uncertainty=surely)
        return replace(self, options=options).conclude(pictures)

    def uncertainty(self, pictures: Array, longest: int | None = None) -> float:
        """The mean spread of the members [N * R, K, h, w] where the model looked, in the units of the answer; of a
        sample of pixels on a grid of at most `longest` a side."""
        planes = self.fit.content(pictures)
        stride = 1 if longest is None else max(1, -(-max(planes.shape[-2:]) // longest))
        merged, spread = ensemble.reduce(self.members(planes[..., ::stride, ::stride]), self.options.reduction)
        mean = float(spread.mean(dtype=np.float64))
        if self.inputs.task == "depth":
            return mean / (float(np.ptp(merged)) or 1.0)
        enlarged = self.inputs.task == "flow" and self.options.match_input_resolution
        return mean * (max(self.fit.source) / max(self.fit.size) if enlarged else 1.0)

    def members(self, planes: Array) -> Array:
        """Target pictures [N * R, K, h, w] -> what each member sees: [N, h, w], of flow [N, h, w, 2] in pixels of the
        model's picture."""
        coding = self.card.coding(self.inputs.task)
        if isinstance(coding, DepthCoding):
            return coding.decode(coding.code(planes))
        if isinstance(coding, FlowCoding):
            flow = coding.decode(coding.code(planes, len(self.labels)), max(self.fit.padded))
            return np.moveaxis(flow, 1, -1)
        return coding.probability(planes)

    def depth(self, members: Array) -> Answer:
        merged, spread = self.merged(members)
        depth = self.way_back.restore(merged)
        near, far = depth.min(), depth.max()
        span = far - near if far > near else np.float32(1)
        return self.answer((depth - near) / span, None if spread is None else spread / span)

    def flow(self, members: Array) -> Answer:
        (height, width), (seen_height, seen_width) = self.way_back.source, self.fit.size
        scale = np.array([width / seen_width, height / seen_height], np.float32)
        flow, spread = self.merged(members * scale)
        return self.answer(np.stack([self.way_back.restore(flow[..., i]) for i in range(2)], axis=-1), spread)

    def amodal(self, coding: AmodalCoding, planes: Array) -> Answer:
        """The visible part belongs to the whole by definition, so it is always part of the answer."""
        assert self.inputs.mask is not None  # Inputs has seen to it
        probability, spread = self.merged(coding.probability(planes))
        visible, image = self.inputs.mask, self.inputs.image
        if not self.options.match_input_resolution:
            visible = self.fit.content(self.fit.mask(visible))[0] > 0
            image = _picture(self.fit.content(self.fit.picture(image)))
        whole = visible.copy()
        whole[self.way_back.inside] |= self.way_back.to_box(probability) > 0.5
        painting = partial(_painted, coding, planes, self.way_back, image, visible, whole)
        return replace(self.answer(whole, spread), painting=painting)

    @cached_property
    def way_back(self) -> Fit:
        """How the content becomes a map of the size that the caller wants."""
        return self.fit if self.options.match_input_resolution else self.fit.unresized()

    def merged(self, members: Array) -> tuple[Array, Array | None]:
        """The members' map at the model's size, and where it is asked for its uncertainty at the answer's."""
        if not self.options.output_uncertainty:
            return ensemble.merge(members, self.options.reduction), None
        merged, spread = ensemble.reduce(members, self.options.reduction)
        return merged, self.way_back.restore(spread)

    def answer(self, prediction: Array | Mask, uncertainty: Array | None) -> Answer:
        options, card = self.options, self.card
        return Answer(self.inputs.task, prediction, uncertainty, None, options, card.name, card.digest)


def _painted(
    coding: AmodalCoding, planes: Array, fit: Fit, image: Picture, visible: Mask, whole: Mask
) -> Picture | None:
    """The members' object [N, K, h', w'] under the picture [H, W, 3] where that is `visible`, RGBA [H, W, 4]; None:
    they show none."""
    hidden = coding.picture(planes)
    if hidden is None:
        return None
    painted = np.full((*fit.source, 4), UNSEEN, np.uint8)
    for channel, plane in enumerate(hidden):
        painted[*fit.inside, channel] = _levels(fit.to_box(plane))
        np.copyto(painted[..., channel], image[..., channel], where=visible)
    painted[..., 3] = whole * np.uint8(255)
    return painted


def _picture(planes: Array) -> Picture:
    """[3, H, W] in [-1, 1] -> [H, W, 3]."""
    return np.stack([_levels(plane) for plane in planes], axis=-1)


def _levels(plane: Array) -> NDArray[np.uint8]:
    """-1 .. 1 -> 0 .. 255."""
    levels: NDArray[np.uint8] = np.clip(np.rint((plane + 1) * 127.5), 0, 255).astype(np.uint8)
    return levels

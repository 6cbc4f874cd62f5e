"""What models from elsewhere ask of the pipeline: runs, blank prompts, a start from zero, other ends, other codes."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from saccade import ddim
from saccade.backends import Array, Conditioning, Labels, Ticket
from saccade.card import Card, Noise
from saccade.errors import InvalidInput
from saccade.pipeline import Answer, Inputs, Options, Pipeline
from saccade.tasks import AmodalCoding, DepthCoding, FlowCoding
from tests.toy import describe

H, W = 16, 24
PICTURE = np.random.default_rng(0).integers(0, 256, (H, W, 3)).astype(np.uint8)
MASK = np.zeros((H, W), bool)
MASK[4:8, 4:8] = True


class Recorder:
    """A model whose every answer is a plane of its label; it keeps what it is asked."""

    def __init__(self, card: Card, picture: Array | None = None) -> None:
        self.card, self.picture = card, picture
        self.prompts: list[Array] = []
        self.latents: list[Array] = []
        self.asked: list[tuple[list[int], list[int]]] = []

    async def encode(self, image: Array, prompt: Array, task: Labels, ticket: Ticket) -> Conditioning:
        self.prompts.append(prompt)
        return {name: image[:, :1, ::8, ::8] for name in self.card.conditioning}

    async def denoise(
        self, latent: Array, timestep: Labels, task: Labels, conditioning: Conditioning, ticket: Ticket
    ) -> Array:
        assert all(len(value) == len(latent) for value in conditioning.values())
        self.latents.append(latent)
        self.asked.append((timestep.tolist(), task.tolist()))
        return np.broadcast_to(task[:, None, None, None].astype(np.float32), latent.shape)

    async def decode(self, latent: Array, ticket: Ticket) -> Array:
        if self.picture is not None:
            return np.repeat(self.picture[None], len(latent), 0)
        return np.repeat(np.repeat(latent[:, :4], 8, 2), 8, 3)

    async def aclose(self) -> None: ...


def card(task: str, noise: dict[str, Any] | None = None, **facts: Any) -> Card:
    """A card of one task, whose model predicts the clean sample."""
    defaults = {"steps": 2, "ensemble_size": 1, "reduction": "mean", "processing_resolution": 0}
    told = describe("stranger", 0)
    told["tasks"] = {task: {"label": 7, "defaults": defaults, **facts}}
    told["noise"] = {"schedule": "scaled_linear", "prediction": "sample", **(noise or {})}
    told["latent"] |= {"scale": 1.0, "multiple": 8}
    return Card.model_validate(told | {"quality": []})


def ask(backend: Recorder, task: str, **options: Any) -> Answer:
    prompt = {"flow": {"next_image": PICTURE}, "amodal": {"mask": MASK}}.get(task, {})
    inputs = Inputs(task, PICTURE, **prompt)  # type: ignore[arg-type]
    return asyncio.run(Pipeline(backend)(inputs, Options(**options).resolve(backend.card, inputs.task)))


def test_a_flow_in_two_runs_has_u_of_the_first_and_v_of_the_second() -> None:
    backend = Recorder(card("flow", passes=[9], coding={"linear_px": 3, "channels": 3}))
    answer = ask(backend, "flow", ensemble_size=2)
    np.testing.assert_allclose(answer.prediction[..., 0], 7 * 3, rtol=1e-5)
    np.testing.assert_allclose(answer.prediction[..., 1], 9 * 3, rtol=1e-5)
    assert len(backend.prompts) == 1  # the pictures are encoded once
    assert sorted(backend.asked) == [([499, 499], [7, 9])] * 2 + [([999, 999], [7, 9])] * 2
    first = ddim.noise(0, 0, (8, H // 8, W // 8))
    np.testing.assert_array_equal(backend.latents[0], [first, first])


def test_only_flow_takes_runs() -> None:
    with pytest.raises(ValueError, match="only flow takes two runs"):
        card("depth", passes=[9])


@pytest.mark.parametrize("blank", [0.0, 1.0])
def test_a_task_without_a_prompt_gets_the_cards_blank_one(blank: float) -> None:
    backend = Recorder(card("depth", blank=blank))
    ask(backend, "depth")
    assert backend.prompts[0].shape == (1, 3, H, W)
    assert np.unique(backend.prompts[0]).tolist() == [blank]


def test_a_model_may_start_from_zero() -> None:
    backend = Recorder(card("depth", {"start": "zeros"}))
    ask(backend, "depth", steps=1)
    assert backend.asked == [([999], [7])]
    assert not backend.latents[0].any()
    with pytest.raises(InvalidInput, match="members would all be the same"):
        ask(backend, "depth", ensemble_size=2)


def test_the_offset_moves_leading_timesteps_and_the_way_may_end_at_the_first() -> None:
    noise = Noise(schedule="scaled_linear", prediction="v_prediction", steps_offset=1, final="first")
    assert noise.walk(4, "leading") == [(751, 501), (501, 251), (251, 1), (1, 0)]
    assert noise.walk(2, "trailing") == [(999, 499), (499, 0)]
    plain = Noise(schedule="scaled_linear", prediction="v_prediction")
    assert plain.walk(2, "leading") == [(500, 0), (0, -1)]
    nowhere = Noise(schedule="scaled_linear", prediction="v_prediction", final="first")
    assert nowhere.walk(2, "leading") == [(500, 0)]
    with pytest.raises(InvalidInput, match="leads nowhere"):
        nowhere.walk(1, "leading")


def test_steps_that_the_spacing_cannot_take_are_refused_at_once() -> None:
    found = card("depth", {"final": "first"})
    with pytest.raises(InvalidInput, match="trailing"):
        Options(steps=1, spacing="leading").resolve(found, "depth")


def test_depth_is_the_mean_of_three_channels_and_may_be_clipped() -> None:
    planes = np.random.default_rng(1).normal(0, 2, (2, 3, H, W)).astype(np.float32)
    np.testing.assert_allclose(DepthCoding(channels=3).code(planes), planes.mean(1), atol=1e-6)
    np.testing.assert_allclose(DepthCoding(channels=3, clip=True).code(planes), planes.mean(1).clip(-1, 1), atol=1e-6)
    np.testing.assert_array_equal(DepthCoding().code(planes), planes[:, 0])


def test_a_linear_flow_code_is_pixels_over_a_constant_both_ways() -> None:
    flow = np.random.default_rng(2).normal(0, 300, (2, H, W)).astype(np.float32)
    coded = FlowCoding(linear_px=75).encode(flow, 512)
    np.testing.assert_allclose(coded, flow / 75, rtol=1e-6)
    np.testing.assert_allclose(FlowCoding(linear_px=75).decode(coded, 512), flow, rtol=1e-5)


def test_an_object_on_white_is_where_it_is_not_white() -> None:
    """Gray 250 belongs to the object, 251 to the ground; what is visible does anyhow, and keeps its own pixels."""
    coding = AmodalCoding(context=None, ground=250)
    whole = np.zeros((H, W), bool)
    whole[2:10, 2:12] = True
    painted = np.where(whole[..., None], np.array([250, 250, 250]), 251)
    planes = (painted.transpose(2, 0, 1) / 127.5 - 1).astype(np.float32)
    np.testing.assert_array_equal(coding.probability(planes[None])[0], whole)

    backend = Recorder(card("amodal", coding={"context": None, "ground": 250}), planes)
    answer = ask(backend, "amodal")
    np.testing.assert_array_equal(answer.prediction, whole | MASK)
    assert answer.completed is not None
    np.testing.assert_array_equal(answer.completed[..., :3], np.where(MASK[..., None], PICTURE, painted))
    np.testing.assert_array_equal(coding.encode(whole, planes), np.where(whole, planes, 1))


@pytest.mark.parametrize(
    ("task", "coding"),
    [("depth", {"channels": 0}), ("flow", {"linear_px": 0}), ("flow", {"channels": -1}), ("amodal", {"ground": 255}),
     ("amodal", {"ground": "white"})],
)  # fmt: skip
def test_codings_that_cannot_be_are_refused_with_the_card(task: str, coding: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        card(task, coding=coding)


def test_members_vote_on_a_mask_that_is_read_off_a_picture() -> None:
    gray = np.array([200, 255, 240], np.float32) / 127.5 - 1
    planes = np.broadcast_to(gray[:, None, None, None], (3, 3, 4, 4)).astype(np.float32)
    assert AmodalCoding(ground=250).probability(planes).mean(0)[0, 0] == pytest.approx(2 / 3)

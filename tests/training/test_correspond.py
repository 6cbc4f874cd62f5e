"""The tracker that has nothing to learn, on motion known in closed form and beside OpenCV."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from training.models.correspond import Correspondence, correspond

HEIGHT, WIDTH = 96, 128


def textured(seed: int) -> np.ndarray:
    """[H, W, 3] uint8 with detail at every scale."""
    rng = np.random.default_rng(seed)
    layers = [
        cv2.resize(rng.normal(size=(HEIGHT // k, WIDTH // k, 3)), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        for k in (2, 4, 8, 16)
    ]
    picture = sum(layers)
    return np.clip(127 + 40 * picture, 0, 255).astype(np.uint8)


def moved(picture: np.ndarray, shift: tuple[float, float], zoom: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """The picture after a zoom and a shift, and the flow [H, W, 2] that brings it there."""
    matrix = np.array([[zoom, 0, shift[0]], [0, zoom, shift[1]]])
    second = cv2.warpAffine(picture, matrix, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REPLICATE)
    at = np.stack(np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT)), -1)
    return second, (at * (zoom - 1) + shift).astype(np.float32)


def tracked(
    first: np.ndarray, second: np.ndarray, guess: tuple[float, float] = (0, 0)
) -> tuple[np.ndarray, Correspondence]:
    """Flow [H, W, 2] in pixels, and all that was found."""
    pictures = [torch.from_numpy(p).permute(2, 0, 1)[None] / 127.5 - 1 for p in (first, second)]
    start = torch.tensor(guess, dtype=torch.float32)[None, :, None, None].expand(1, 2, HEIGHT // 8, WIDTH // 8) / 8
    found = correspond(*pictures, start)
    flow = F.interpolate(found.motion, scale_factor=2, mode="bilinear", align_corners=False) * 2
    return flow[0].permute(1, 2, 0).numpy(), found


def inner_error(flow: np.ndarray, truth: np.ndarray, edge: int = 16) -> float:
    inner = np.s_[edge:-edge, edge:-edge]
    return float(np.median(np.linalg.norm(flow - truth, axis=-1)[inner]))


@pytest.mark.parametrize("shift", [(0.0, 0.0), (1.5, -0.7), (6.0, 3.0), (-11.0, 5.0)])
def test_a_shift_is_found_to_a_fraction_of_a_pixel(shift: tuple[float, float]) -> None:
    first = textured(0)
    second, truth = moved(first, shift)
    assert inner_error(tracked(first, second)[0], truth) < 0.35


def test_a_zoom_is_followed_as_well_as_farneback_does() -> None:
    first = textured(1)
    second, truth = moved(first, (-4.0, 2.0), zoom=1.06)
    grey = [cv2.cvtColor(p, cv2.COLOR_RGB2GRAY) for p in (first, second)]
    theirs = cv2.calcOpticalFlowFarneback(*grey, None, 0.5, 3, 15, 3, 5, 1.2, 0)
    assert inner_error(tracked(first, second)[0], truth) < max(0.4, 1.5 * inner_error(theirs, truth))


def test_exposure_does_not_look_like_motion() -> None:
    first = textured(2)
    second, truth = moved(first, (3.0, 1.0))
    darker = np.clip(second * 0.6 + 20, 0, 255).astype(np.uint8)
    assert inner_error(tracked(first, darker)[0], truth) < 0.35


def test_a_good_guess_reaches_farther_and_a_bad_one_does_no_harm() -> None:
    first = textured(3)
    far, truth = moved(first, (44.0, 0.0))
    assert inner_error(tracked(first, far)[0], truth, 20) > 5
    assert inner_error(tracked(first, far, guess=(42.0, 2.0))[0][:, :64], truth[:, :64], 20) < 1
    near, truth = moved(first, (3.0, 1.0))
    assert inner_error(tracked(first, near, guess=(-30.0, 25.0))[0], truth) < 0.5


def test_what_is_plain_stays_and_what_vanished_does_not_fit() -> None:
    plain = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    flow, _ = tracked(plain, plain)
    assert np.abs(flow).max() < 1e-3
    first = textured(4)
    replaced = first.copy()
    replaced[:, 64:] = textured(5)[:, 64:]
    mismatch = tracked(first, replaced)[1].mismatch[0, 0].numpy()
    assert np.median(mismatch[8:-8, 40:-8]) > 10 * np.median(mismatch[8:-8, 8:24])

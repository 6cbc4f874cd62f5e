"""Flat worlds: a photograph behind, cut-outs in front, each moving by its own similarity or affine map.

Gives two frames with exact flow (the construction of FlyingChairs, Dosovitskiy et al. 2015, section 4), and for amodal
a half-hidden object with its whole (pix2gestalt, Ozguroglu et al. 2024, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from training.scenes.assets import CUTOUT_PX, TEXTURE_PX, Assets

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class FlowPair:
    """Frames [H, W, 3] uint8; `flow` [H, W, 2] float32 pixels."""

    first: Picture
    second: Picture
    flow: NDArray[np.float32]


@dataclass(frozen=True)
class Hidden:
    """A picture [H, W, 3] with one object in it: `visible` and `whole` masks [H, W] bool, `whole_rgb` [H, W, 3] the
    object unhidden (meaningless outside `whole`)."""

    picture: Picture
    visible: NDArray[np.bool_]
    whole: NDArray[np.bool_]
    whole_rgb: Picture


def flow_pair(assets: Assets, rng: np.random.Generator, size: int) -> FlowPair:
    """2 to 9 cut-outs over a background; displacements heavy-tailed around a random scale."""
    reach = size * np.exp(rng.normal(-4.3, 0.8))
    still = affine(rng, size, cover=True)
    moved = _motion(rng, size, reach) @ still
    background = assets.textures[rng.integers(len(assets.textures))]
    first, second = (_draw(background, m, size, cv2.BORDER_REFLECT) for m in (still, moved))
    flow = _flow(still, moved, size)
    for _ in range(rng.integers(2, 10)):
        stamp = _jitter(assets.cutouts[rng.integers(len(assets.cutouts))], rng)
        start = affine(rng, size, cover=False)
        end = _motion(rng, size, reach * np.exp(rng.normal(0.4, 0.6))) @ start
        for frame, where in ((first, start), (second, end)):
            _paste(frame, _draw(stamp, where, size, cv2.BORDER_CONSTANT))
        inside = _draw(stamp[..., 3], start, size, cv2.BORDER_CONSTANT) > 127
        flow[inside] = _flow(start, end, size)[inside]
    return FlowPair(*_develop([first, second], rng), flow.astype(np.float32))


def hidden_object(assets: Assets, rng: np.random.Generator, size: int) -> Hidden:
    """One object, half hidden by one to three others; 10% of the objects are not hidden at all."""
    while True:
        background = assets.textures[rng.integers(len(assets.textures))]
        picture = _draw(background, affine(rng, size, cover=True), size, cv2.BORDER_REFLECT)
        for _ in range(rng.integers(0, 3)):
            _paste(picture, _random_layer(assets, rng, size))
        layer = _random_layer(assets, rng, size)
        whole = layer[..., 3] > 127
        if whole.mean() < 0.01:
            continue
        visible = whole.copy()
        _paste(picture, layer)
        if rng.random() > 0.1:
            for _ in range(rng.integers(1, 4)):
                front = _random_layer(assets, rng, size, near=whole)
                _paste(picture, front)
                visible &= ~(front[..., 3] > 127)
        share = visible.sum() / whole.sum()
        if share > 0.25 and (rng.random() < 0.3 or share < 0.97):
            picture, rgb = _develop([picture, np.ascontiguousarray(layer[..., :3])], rng)
            return Hidden(picture, visible, whole, rgb)


def affine(rng: np.random.Generator, size: int, cover: bool) -> NDArray[np.float64]:
    """Sheet pixels -> picture pixels, 3 x 3. `cover` keeps the sheet over (nearly) the whole picture."""
    if cover:
        scale, turn, at = size / TEXTURE_PX * rng.uniform(1.1, 1.9), rng.normal(0, 0.15), np.full(2, size / 2)
        half = TEXTURE_PX / 2
    else:
        scale = size / CUTOUT_PX * np.exp(rng.uniform(np.log(0.15), np.log(0.9)))
        turn, at, half = rng.normal(0, 0.3), rng.uniform(0.05, 0.95, 2) * size, CUTOUT_PX / 2
    mirror = np.diag([rng.choice([-1.0, 1.0]), 1, 1])
    stretch = np.diag([np.exp(rng.normal(0, 0.12)), 1, 1])
    return _shift(*at) @ _turn(turn, scale) @ mirror @ stretch @ _shift(-half, -half)


def _motion(rng: np.random.Generator, size: int, reach: float) -> NDArray[np.float64]:
    """A small similarity about a point of the picture: `reach` pixels of shift, some turn and zoom in proportion."""
    about = rng.uniform(0, size, 2)
    angle, length = rng.uniform(0, 2 * np.pi), reach * rng.rayleigh(1)
    turn, zoom = rng.normal(0, 1.2, 2) * min(reach / size, 0.12)
    shift = _shift(np.cos(angle) * length, np.sin(angle) * length)
    return shift @ _shift(*about) @ _turn(turn, np.exp(zoom)) @ _shift(*-about)


def _shift(x: float, y: float) -> NDArray[np.float64]:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], np.float64)


def _turn(angle: float, scale: float) -> NDArray[np.float64]:
    c, s = np.cos(angle) * scale, np.sin(angle) * scale
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], np.float64)


def _draw(sheet: Picture, where: NDArray[np.float64], size: int, border: int) -> Picture:
    shrink = 1 / max(np.sqrt(abs(np.linalg.det(where[:2, :2]))), 1e-3)
    if shrink > 1.5:  # warpAffine does not antialias
        sheet = cv2.GaussianBlur(sheet, (0, 0), 0.4 * shrink)
    drawn: Picture = cv2.warpAffine(sheet, where[:2], (size, size), flags=cv2.INTER_LINEAR, borderMode=border)
    return drawn


def _flow(start: NDArray[np.float64], end: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Every pixel's displacement under end * start^-1."""
    y, x = np.indices((size, size)).astype(np.float64)
    moved = np.tensordot((end @ np.linalg.inv(start))[:2], np.stack([x, y, np.ones_like(x)]), axes=1)
    return np.stack([moved[0] - x, moved[1] - y], axis=-1)


def _paste(frame: Picture, layer: Picture) -> None:
    alpha = layer[..., 3:].astype(np.float32) / 255
    frame[:] = (frame * (1 - alpha) + layer[..., :3] * alpha + 0.5).astype(np.uint8)


def _jitter(stamp: Picture, rng: np.random.Generator) -> Picture:
    gain, bias = rng.uniform(0.6, 1.3, 3), rng.uniform(-20, 20)
    rgb = np.clip(stamp[..., :3] * gain + bias, 0, 255).astype(np.uint8)
    return np.concatenate([rgb, stamp[..., 3:]], axis=-1)


def _random_layer(
    assets: Assets, rng: np.random.Generator, size: int, near: NDArray[np.bool_] | None = None
) -> Picture:
    """A cut-out (or a textured cut-out shape) somewhere; `near` draws it towards that mask's border."""
    stamp = _jitter(assets.cutouts[rng.integers(len(assets.cutouts))], rng)
    if rng.random() < 0.25:
        texture = cv2.resize(assets.textures[rng.integers(len(assets.textures))], (CUTOUT_PX, CUTOUT_PX))
        stamp = np.concatenate([texture, stamp[..., 3:]], axis=-1)
    where = affine(rng, size, cover=False)
    if near is not None:
        rows, columns = np.nonzero(near)
        pick = rng.integers(len(rows))
        target = np.array([columns[pick], rows[pick]]) + rng.normal(0, 0.08 * size, 2)
        here = where @ np.array([CUTOUT_PX / 2, CUTOUT_PX / 2, 1])
        where = _shift(*(target - here[:2])) @ where
    return _draw(stamp, where, size, cv2.BORDER_CONSTANT)


def _develop(frames: list[Picture], rng: np.random.Generator) -> list[Picture]:
    """The camera's part: the same exposure and contrast for all frames, sensor noise and JPEG for each."""
    gain, gamma = np.exp(rng.normal(0, 0.15)), np.exp(rng.normal(0, 0.15))
    table = np.clip(255 * gain * (np.arange(256) / 255) ** gamma, 0, 255).astype(np.uint8)
    sigma, quality = rng.choice([0.0, 1.5, 3.0, 6.0]), rng.choice([0, 0, 50, 75, 90])
    return [_sensor(cv2.LUT(frame, table), sigma, int(quality), rng) for frame in frames]


def _sensor(frame: Picture, sigma: float, jpeg_quality: int, rng: np.random.Generator) -> Picture:
    if sigma:
        noise = rng.standard_normal(frame.shape, np.float32) * np.float32(sigma)
        frame = np.clip(frame + noise, 0, 255).astype(np.uint8)
    if jpeg_quality:
        _, data = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality])
        frame = cv2.imdecode(data, cv2.IMREAD_COLOR)
    return frame

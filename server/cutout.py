"""From a few clicks to an object's outline: GrabCut, on a small copy of the picture and for a few rounds."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from saccade.errors import InvalidInput
from saccade.pipeline import Mask, Picture
from server.hints import Hints

EDGE = 400
ROUNDS = 4
DISC = 0.012
GUESS = 0.22
CRUMB = 0.1
_SEED = 1


def cut_out(picture: Picture, hints: Hints, gone: Callable[[], bool] = lambda: False) -> Mask:
    """[H, W, 3] -> [H, W], the object that the hints show. The same hints give the same mask.

    Looks at a copy of at most `EDGE` px, for at most `ROUNDS` rounds; starts none once `gone`. Raises InvalidInput for
    hints outside the picture, or if nothing stands out.
    """
    height, width = picture.shape[:2]
    hints.check_inside(height, width)
    factor = min(1.0, EDGE / max(height, width))
    size = (max(2, round(width * factor)), max(2, round(height * factor)))
    small = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
    trimap = _refined(small, _trimap(hints, small.shape[:2], (height, width)), gone)
    found = _whole(np.isin(trimap, (cv2.GC_FGD, cv2.GC_PR_FGD)), hints, (height, width))
    if not found.any():
        raise InvalidInput("nothing stands out inside the box; click on the object", param="box")
    soft = cv2.GaussianBlur(found.astype(np.float32), (0, 0), 0.8)
    return np.asarray(cv2.resize(soft, (width, height), interpolation=cv2.INTER_LINEAR) > 0.5)


def _trimap(hints: Hints, size: tuple[int, ...], source: tuple[int, int]) -> NDArray[np.uint8]:
    """What is known of every pixel of the small copy before the first round."""
    rows, columns = np.indices(size)
    places = _scaled(hints, size, source)
    if hints.box is None:
        near = np.min([np.hypot(columns - x, rows - y) for x, y, inside in places if inside], axis=0)
        trimap = np.where(near < GUESS * max(size), cv2.GC_PR_FGD, cv2.GC_PR_BGD)
    else:
        x0, y0, x1, y1 = _scaled_box(hints.box, size, source)
        inside = (columns >= x0) & (columns < x1) & (rows >= y0) & (rows < y1)
        trimap = np.where(inside, cv2.GC_PR_FGD, cv2.GC_BGD)
    for x, y, inside in sorted(places, key=lambda place: place[2]):
        distance = np.hypot(columns - x, rows - y)
        if not inside:
            trimap[(distance < GUESS / 2 * max(size)) & (trimap == cv2.GC_PR_FGD)] = cv2.GC_PR_BGD
        trimap[distance <= max(2.0, DISC * max(size))] = cv2.GC_FGD if inside else cv2.GC_BGD
    return trimap.astype(np.uint8)


def _refined(small: Picture, trimap: NDArray[np.uint8], gone: Callable[[], bool]) -> NDArray[np.uint8]:
    models = [np.zeros((1, 65)) for _ in range(2)]
    cv2.setRNGSeed(_SEED)
    for round_ in range(ROUNDS):
        foreground = np.isin(trimap, (cv2.GC_FGD, cv2.GC_PR_FGD))
        if gone() or foreground.all() or not foreground.any():
            break
        mode = cv2.GC_EVAL if round_ else cv2.GC_INIT_WITH_MASK
        cv2.grabCut(small, trimap, (0, 0, 0, 0), models[0], models[1], 1, mode)
    return trimap


def _whole(found: Mask, hints: Hints, source: tuple[int, int]) -> Mask:
    """The pieces that a click is on; where nobody clicked, all but crumbs. Small holes are filled."""
    pieces = found.astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(pieces, connectivity=4)
    places = [(x, y) for x, y, inside in _scaled(hints, found.shape, source) if inside]
    if places:
        kept = {int(labels[y, x]) for x, y in places} - {0}
    else:
        areas = stats[:, cv2.CC_STAT_AREA]
        kept = {i for i in range(1, count) if areas[i] >= CRUMB * areas[1:].max()}
    return ~_large_holes(~np.isin(labels, list(kept)))


def _large_holes(outside: Mask) -> Mask:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(outside.astype(np.uint8), connectivity=4)
    large = stats[:, cv2.CC_STAT_AREA] >= 0.001 * outside.size
    large[0] = False
    return np.asarray(large[labels])


def _scaled(hints: Hints, size: tuple[int, ...], source: tuple[int, int]) -> list[tuple[int, int, bool]]:
    down, right = size[0] / source[0], size[1] / source[1]
    return [(int((x + 0.5) * right), int((y + 0.5) * down), inside) for x, y, inside in hints.points]


def _scaled_box(
    box: tuple[int, int, int, int], size: tuple[int, ...], source: tuple[int, int]
) -> tuple[float, float, float, float]:
    down, right = size[0] / source[0], size[1] / source[1]
    return np.floor(box[0] * right), np.floor(box[1] * down), np.ceil(box[2] * right), np.ceil(box[3] * down)

"""Contact sheets: a strip for every picture (what was given, what was answered, what is true), many to a sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from saccade.fit import context_box
from saccade.formats.colour import colorize_depth, colorize_flow, colorize_mask

Picture = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Array = NDArray[np.float32]

CELL_PX = 220
GAP_PX = 4
CAPTION_PX = 20
_PROMPT, _ANSWER, _TRUTH = (32, 128, 255), (255, 64, 32), (32, 200, 96)


def depth_strip(picture: Picture, prediction: NDArray[np.floating], truth: Array, valid: Mask) -> Picture:
    """Prediction [H, W] in the truth's scale; both coloured from the truth's 2% to its 98% quantile, no truth black."""
    near, far = np.quantile(truth[valid], [0.02, 0.98])
    span = max(float(far - near), 1e-6)
    seen = _shrink_known(truth, valid)
    cells = [_shrink(picture), *(colorize_depth((d - near) / span) for d in (_shrink(prediction), seen))]
    return _row(cells)


def flow_strip(picture: Picture, prediction: Array, truth: Array, valid: Mask) -> Picture:
    """Flows [H, W, 2]; both on the wheel whose full colour is the truth's 99% quantile of speed."""
    fastest = max(float(np.quantile(np.linalg.norm(truth[valid], axis=-1), 0.99)), 1e-3)
    known = np.where(valid[..., None], truth, np.nan)
    return _row([_shrink(picture), *(_shrink(colorize_flow(f, max_magnitude=fastest)) for f in (prediction, known))])


def amodal_strip(picture: Picture, visible: Mask, prediction: Mask, whole: Mask) -> Picture:
    """Masks [H, W] over the picture: the prompt, the answer, the truth. What lies far from all three is cut off."""
    top, left, height, width = context_box(visible | prediction | whole, 0.4)
    seen = slice(top, top + height), slice(left, left + width)
    colours = zip((visible, prediction, whole), (_PROMPT, _ANSWER, _TRUTH), strict=True)
    return _row([_shrink(colorize_mask(picture[seen], mask[seen], colour=colour)) for mask, colour in colours])


def sheet(title: str, legend: str, strips: Sequence[tuple[str, Picture]]) -> Image.Image:
    """(caption, strip) pairs in as many columns as bring the sheet near the shape of a page."""
    columns = _columns([strip for _, strip in strips])
    width = max(strip.shape[1] for _, strip in strips) + 4 * GAP_PX
    rows = [strips[at : at + columns] for at in range(0, len(strips), columns)]
    heights = [max(strip.shape[0] for _, strip in row) + CAPTION_PX + 2 * GAP_PX for row in rows]
    page = Image.new("RGB", (columns * width + GAP_PX, sum(heights) + 3 * CAPTION_PX), "white")
    draw = ImageDraw.Draw(page)
    draw.text((2 * GAP_PX, GAP_PX), title, "black", ImageFont.load_default(16))
    draw.text((2 * GAP_PX, CAPTION_PX + GAP_PX), legend, "dimgray", ImageFont.load_default(12))
    top = 2 * CAPTION_PX + 2 * GAP_PX
    for row, height in zip(rows, heights, strict=True):
        for column, (caption, strip) in enumerate(row):
            left = column * width + 2 * GAP_PX
            draw.text((left, top), caption, "black", ImageFont.load_default(12))
            page.paste(Image.fromarray(strip), (left, top + CAPTION_PX))
        top += height
    return page


def _columns(strips: Sequence[Picture]) -> int:
    height = sum(strip.shape[0] + CAPTION_PX for strip in strips)
    width = max(strip.shape[1] for strip in strips)
    return max(1, min(len(strips), round(math.sqrt(1.4 * height / width))))


def _row(cells: Sequence[Picture]) -> Picture:
    gap = np.full((cells[0].shape[0], GAP_PX, 3), 255, np.uint8)
    return np.concatenate([part for cell in cells for part in (gap, cell)][1:], axis=1)


def _shrink(picture: NDArray[Any]) -> NDArray[Any]:
    """[H, W, ...] -> the same proportions with a longer edge of CELL_PX, averaged over what each pixel covers."""
    height, width = picture.shape[:2]
    factor = CELL_PX / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))


def _shrink_known(values: Array, valid: Mask) -> NDArray[Any]:
    """Mean of the valid values under each pixel, NaN where there are none: sparse lidar stays to be seen."""
    weight: NDArray[Any] = _shrink(valid.astype(np.float32))
    total = _shrink(np.where(valid, values, 0).astype(np.float32))
    seen = weight > 1e-6
    return np.where(seen, total / np.where(seen, weight, 1), np.nan)

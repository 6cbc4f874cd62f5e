"""One raw sample to one row of a batch: the same crops, colours and codes for generated scenes and for datasets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from saccade.tasks import AmodalCoding, DepthCoding, FlowCoding
from training.data.batch import Sample, sample
from training.data.crop import Crop, apply_look, colours, draw_look
from training.data.raw import RawAmodal, RawDepth, RawFlow

LEAST_KNOWN = 0.2

PutInFront = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


def code_depth(
    raw: RawDepth,
    rng: np.random.Generator,
    size: tuple[int, int],
    coding: DepthCoding,
    put_in_front: PutInFront | None = None,
    whole: bool = False,
) -> Sample | None:
    """A random crop covering at least 40% of the picture; None where less than a fifth of it is known.

    `put_in_front(picture, depth, known)` may change the crop in place. `whole`: all of the picture, however little is
    known of it; a row of which nothing is known has a target of zeros.
    """
    full = raw.known.shape
    crop = Crop.whole(full, size, bool(rng.random() < 0.5)) if whole else Crop.random(rng, full, size, least=0.4)
    picture, depth = crop.picture(raw.image), crop.nearest(raw.depth)
    masks = (raw.known, raw.known if raw.solid is None else raw.solid)
    known, solid = (crop.nearest(mask.astype(np.uint8)) > 0 for mask in masks)
    if put_in_front:
        put_in_front(picture, depth, known)
    picture = colours(picture, rng)
    known &= crop.seen()
    share = (known & solid).mean()
    if share < LEAST_KNOWN and not whole:
        return None
    coded = coding.encode(spread(depth, known), known & solid) if share else np.zeros_like(depth)
    return sample(picture, np.full_like(picture, 127.5), [coded], known)


def code_flow(raw: RawFlow, rng: np.random.Generator, size: tuple[int, int]) -> Sample:
    """A random crop of both frames, in the same colours, with noise of their own."""
    crop = Crop.random(rng, raw.image.shape[:2], size, least=0.6)
    look = draw_look(rng)
    first, second = (
        np.clip(apply_look(crop.picture(f), look) + rng.normal(0, 3), 0, 255) for f in (raw.image, raw.next_image)
    )
    known = crop.nearest(raw.known.astype(np.uint8)) > 0
    flow = spread(crop.flow(raw.flow), known)
    coded = FlowCoding().encode(np.moveaxis(flow, -1, 0), max(size))
    return sample(first, second, list(coded), known)


def code_amodal(
    raw: RawAmodal, rng: np.random.Generator, size: tuple[int, int], coding: AmodalCoding | None = None
) -> Sample:
    """A crop around what is visible of the object, or (a coding without context) all of the picture; the target is
    mask, Y, Cb, Cr whatever the coding, which only says what the model sees."""
    if coding is not None and coding.context is None:
        crop = Crop.whole(raw.visible.shape, size, bool(rng.random() < 0.5))
    else:
        crop = Crop.around(raw.visible > 127, rng, size)
    look = draw_look(rng)
    picture, rgb = (apply_look(crop.picture(p), look) for p in (raw.image, raw.object_rgb))
    visible, whole = (crop.picture(mask) for mask in (raw.visible, raw.whole))
    object_rgb = np.moveaxis(rgb / 127.5 - 1, -1, 0).astype(np.float32)
    target = AmodalCoding().encode(whole > 127, object_rgb)
    target[0] = whole / 127.5 - 1  # the edge's coverage says where within a pixel it runs
    return sample(picture, np.repeat(visible[..., None], 3, -1), list(target), crop.seen())


def spread(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """[H, W(, C)] with every unknown pixel as its nearest known one, so that no code jumps at the edge of knowledge."""
    import cv2

    if known.all() or not known.any():
        return values
    _, labels = cv2.distanceTransformWithLabels(
        (~known).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    table = np.empty((labels.max() + 1, *values.shape[2:]), values.dtype)
    table[labels[known]] = values[known]
    return table[labels]


def closed(known: np.ndarray, gap_px: float) -> np.ndarray:
    """[H, W] bool: where a known pixel lies within `gap_px`."""
    import cv2

    if gap_px <= 0 or known.all() or not known.any():
        return known
    return cv2.distanceTransform((~known).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5) <= gap_px

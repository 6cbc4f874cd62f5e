"""Draws every picture of this folder from photographs that scikit-image carries, free of copyright (see README.md).

    pip install scikit-image
    python examples/make_examples.py [folder]

Nothing is random: the same versions of scikit-image and Pillow give the same bytes.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from skimage import data
from skimage.transform import AffineTransform, warp

Floats = NDArray[np.float64]

# Outlines in the pixels of the photographs, found by eye.
HELMET = (
    "277,512 278,490 281,465 288,438 298,412 312,386 330,367 352,353 376,345 400,343 424,347 446,357 465,373 479,392 "
    "488,412 494,436 498,453 504,462 505,480 503,495 497,506 494,512"
)
SAUCER = "76,224 78,196 86,168 100,140 122,112 148,88 172,74"
SAUCER += " 174,95 178,72 192,50 214,33 244,22 278,18 312,20 346,29 374,44 392,62 398,68 410,66 424,72 424,84 416,108"
SAUCER += " 438,128 460,160 474,194 479,228 476,262 466,296 448,328 420,354 384,372 340,384 294,388 248,383 204,370"
SAUCER += " 166,350 132,320 104,288 86,258"
FRAME = (256, 192)


def main(folder: Path) -> None:
    coffee = data.coffee()
    Image.fromarray(coffee).save(folder / "photo.jpg", quality=88)
    picture, visible = occluded(coffee)
    Image.fromarray(picture).save(folder / "occluded.jpg", quality=88)
    Image.fromarray(visible).save(folder / "occluded_mask.png", optimize=True)
    first, second, flow = moving(coffee)
    Image.fromarray(first).save(folder / "frame_1.png", optimize=True)
    Image.fromarray(second).save(folder / "frame_2.png", optimize=True)
    (folder / "frame_flow.flo").write_bytes(b"PIEH" + struct.pack("<ii", *FRAME) + flow.astype("<f4").tobytes())


def occluded(coffee: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A helmet before cup and saucer: the picture [H, W, 3] uint8, and [H, W] bool of what is seen of these two."""
    size = coffee.shape[1::-1]
    put = AffineTransform(translation=(20, -112))
    helmet, cover = place(data.astronaut(), outline((512, 512), HELMET), put, size)
    picture = over(helmet, cover, coffee / 255)
    return picture, (outline(size, SAUCER) > 0.5) & (cover < 0.5)


def moving(coffee: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Floats]:
    """The camera nears a cat, a cup slides by: two frames [H, W, 3] uint8 and the flow [H, W, 2] px from the first."""
    cat, everywhere = data.chelsea(), np.ones(data.chelsea().shape[:2])
    cup = outline(coffee.shape[1::-1], SAUCER)
    at_cat = AffineTransform(translation=(-100, -50))
    at_cup = AffineTransform(scale=0.34, translation=(4, 66))
    nearer = about((150, 80), AffineTransform(scale=1.025, translation=(2.5, -1.25)))
    sliding = about((98, 140), AffineTransform(rotation=np.deg2rad(4), translation=(11.5, -4.25)))

    def frame(cat_at: AffineTransform, cup_at: AffineTransform) -> tuple[NDArray[np.uint8], Floats]:
        behind, _ = place(cat, everywhere, cat_at, FRAME)
        before, cover = place(coffee, cup, cup_at, FRAME)
        return over(before, cover, behind), cover

    first, cover = frame(at_cat, at_cup)
    second, _ = frame(at_cat + nearer, at_cup + sliding)
    flow = np.where(cover[..., None] > 0.5, displacement(sliding), displacement(nearer))
    return first, second, flow


def outline(size: tuple[int, int], points: str) -> Floats:
    """[H, W] in 0..1: inside of a polygon "x,y x,y ...", with a soft edge of about a pixel."""
    corners = [(int(x), int(y)) for x, y in (point.split(",") for point in points.split())]
    shape = Image.new("L", size)
    ImageDraw.Draw(shape).polygon(corners, fill=255)
    rounded = shape.filter(ImageFilter.GaussianBlur(3)).point(lambda level: 255 * (level > 127))
    return np.asarray(rounded.filter(ImageFilter.GaussianBlur(0.8))) / 255


def place(
    picture: NDArray[np.uint8], cover: Floats, put: AffineTransform, size: tuple[int, int]
) -> tuple[Floats, Floats]:
    """The picture [h, w, 3] and its cover [h, w] moved by `put` onto a canvas: [H, W, 3] and [H, W] in 0..1."""
    scale = float(np.hypot(*put.params[:2, 0]))
    smooth = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(max(0.0, 0.4 / scale - 0.4)))
    shape = size[::-1]
    moved = warp(np.asarray(smooth) / 255, put.inverse, output_shape=shape, order=3, mode="edge")
    return moved, warp(cover, put.inverse, output_shape=shape, order=1)


def over(front: Floats, cover: Floats, back: Floats) -> NDArray[np.uint8]:
    mixed = cover[..., None] * front + (1 - cover[..., None]) * back
    return np.rint(255 * np.clip(mixed, 0, 1)).astype(np.uint8)


def about(centre: tuple[float, float], motion: AffineTransform) -> AffineTransform:
    """The motion, turning and growing about a centre instead of the corner."""
    x, y = centre
    return AffineTransform(translation=(-x, -y)) + motion + AffineTransform(translation=(x, y))


def displacement(motion: AffineTransform) -> Floats:
    """[H, W, 2] px: where the motion takes each pixel of a frame, less where it was."""
    width, height = FRAME
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float64)
    return motion(grid.reshape(-1, 2)).reshape(grid.shape) - grid


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

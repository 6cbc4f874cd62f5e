"""Make the README's picture from real answers to examples/: `python docs/make_pictures.py [--repository DIR]`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from saccade.formats import colorize_depth, colorize_flow
from saccade.local import Local

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
HEIGHT, MARGIN = 200, 8


def panel(picture: np.ndarray | Path, title: str) -> Image.Image:
    """One picture at the common height with its title below."""
    image = Image.open(picture) if isinstance(picture, Path) else Image.fromarray(picture)
    image = image.convert("RGB")
    image = image.resize((round(image.width * HEIGHT / image.height), HEIGHT), Image.Resampling.LANCZOS)
    out = Image.new("RGB", (image.width, HEIGHT + 20), "white")
    out.paste(image)
    ImageDraw.Draw(out).text((4, HEIGHT + 4), title, fill="black")
    return out


def row(panels: list[Image.Image]) -> Image.Image:
    out = Image.new("RGB", (sum(p.width for p in panels) + MARGIN * (len(panels) - 1), HEIGHT + 20), "white")
    left = 0
    for p in panels:
        out.paste(p, (left, 0))
        left += p.width + MARGIN
    return out


def column(rows: list[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (max(r.width for r in rows), sum(r.height + MARGIN for r in rows)), "white")
    top = 0
    for r in rows:
        sheet.paste(r, (0, top))
        top += r.height + MARGIN
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path)
    args = parser.parse_args()
    photo, occluded = EXAMPLES / "photo.jpg", EXAMPLES / "occluded.jpg"
    frames, mask = (EXAMPLES / "frame_1.png", EXAMPLES / "frame_2.png"), EXAMPLES / "occluded_mask.png"
    with Local(args.repository) as local:
        depth = colorize_depth(local.depth(photo, ensemble_size=5).prediction)
        flow = colorize_flow(local.flow(*frames, ensemble_size=5).prediction)
        whole = local.amodal(occluded, mask, ensemble_size=5)
    assert whole.completed is not None
    shown = np.where(whole.completed[..., 3:] > 0, whole.completed[..., :3], 255).astype(np.uint8)
    rows = [
        row([panel(photo, "a photograph"), panel(depth, "depth: red is near, blue is far")]),
        row([panel(frames[0], "first frame"), panel(frames[1], "second frame"), panel(flow, "flow: hue is direction")]),
        row(
            [panel(occluded, "half hidden"), panel(mask, "its visible part"), panel(shown, "amodal: the model's whole")]
        ),
    ]
    column(rows).save(HERE / "images" / "overview.png", optimize=True)


if __name__ == "__main__":
    main()

"""Make docs/gallery.md's picture: `python docs/make_gallery.py PICTURES [--repository DIR] [--out docs/images]`.

PICTURES holds photographs that no training has seen (docs/gallery.md says which); all of them are shown, in the order
of their names: the picture, depth, and depth's uncertainty, on scales of their own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from make_pictures import column, panel, row
from PIL import Image

from saccade.formats import colorize_depth
from saccade.local import Local

HERE = Path(__file__).parent


def strip(local: Local, photo: Path) -> Image.Image:
    answer = local.depth(photo, ensemble_size=10, output_uncertainty=True)
    assert answer.uncertainty is not None
    spread = answer.uncertainty / max(float(np.quantile(answer.uncertainty, 0.99)), 1e-6)
    grey = (np.clip(spread, 0, 1) * 255).astype(np.uint8)
    shown = [(photo, photo.stem), (colorize_depth(answer.prediction), "depth"), (grey, "uncertainty")]
    return row([panel(picture, title) for picture, title in shown])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--repository", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "images")
    args = parser.parse_args()
    photos = sorted(args.pictures.iterdir(), key=lambda path: path.name.lower())
    with Local(args.repository) as local:
        sheet = column([strip(local, photo) for photo in photos])
    sheet.save(args.out / "gallery.jpg", quality=85, optimize=True)


if __name__ == "__main__":
    main()

"""What a PNG costs: milliseconds and bytes with ISA-L's deflate, as it is served, and with zlib's fastest in its place.

    python -m bench.writing [--rounds 40]

The default model's answers about the examples, as data and in colours, and a depth of 3000 x 2000 px; the two turn
about, medians.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
import zlib
from collections.abc import Sequence
from unittest.mock import patch

import numpy as np
from isal import isal_zlib
from PIL import Image

from bench.gateway import PARTS
from bench.machine import describe
from bench.roof import inputs_of
from saccade import render
from saccade.backends.embedded import Embedded
from saccade.backends.stepping import Stepping
from saccade.formats import maps
from saccade.pipeline import Options, Pipeline
from saccade.repository import Repository, find_repository

LARGE = (3000, 2000)


class FastestZlib:
    """zlib in ISA-L's place, where levels mean something else."""

    crc32 = zlib.crc32

    @staticmethod
    def compress(data: bytes, _: int) -> bytes:
        return zlib.compress(data, zlib.Z_BEST_SPEED)


DEFLATES = {"ISA-L": isal_zlib, "zlib": FastestZlib}


async def pictures() -> dict[str, maps.Levels]:
    """What is written, by name."""
    lane = Stepping(Embedded.load(Repository(find_repository(None))), batch_size=1)
    pipeline, found = Pipeline(lane), {}
    for task in PARTS:
        inputs = inputs_of(task)
        answer = await pipeline(inputs, Options().resolve(pipeline.card, task))
        for style in ("data", "color"):
            written = render.encode(answer, "png", style, picture=inputs.image)
            found[f"{task}, {style}"] = maps.read_png(written.data)
        if task == "depth":
            large = np.asarray(Image.fromarray(answer.prediction).resize(LARGE, Image.Resampling.BICUBIC))
            found["depth of 3000 x 2000 px, data"] = maps.to_uint16(large)
    await lane.aclose()
    return found


def measured(levels: maps.Levels, rounds: int) -> dict[str, tuple[float, int]]:
    """Milliseconds and bytes of each."""
    times: dict[str, list[float]] = {name: [] for name in DEFLATES}
    sizes = {}
    for turn in range(rounds + 1):
        for name, deflate in DEFLATES.items():
            with patch.object(maps, "isal_zlib", deflate):
                began = time.perf_counter()
                sizes[name] = len(maps.write_png(levels))
                if turn:
                    times[name].append((time.perf_counter() - began) * 1e3)
    return {name: (statistics.median(times[name]), sizes[name]) for name in DEFLATES}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="what a PNG costs")
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args(argv)
    sys.stdout.write(f"Medians of {args.rounds}. Machine: {describe('isal', 'numpy')}.\n\n")
    sys.stdout.write(
        "| what | ISA-L, ms | zlib, ms | times as fast | ISA-L, bytes | zlib, bytes |\n|---|---|---|---|---|---|\n"
    )
    for name, levels in asyncio.run(pictures()).items():
        (ms, size), (theirs_ms, theirs) = measured(levels, args.rounds).values()
        sys.stdout.write(f"| {name} | {ms:.2f} | {theirs_ms:.2f} | {theirs_ms / ms:.1f} | {size:,} | {theirs:,} |\n")


if __name__ == "__main__":
    main()

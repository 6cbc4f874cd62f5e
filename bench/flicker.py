"""What a steady scale takes away of the flicker, on rendered clips whose depth and motion are known.

    python -m bench.flicker [--clips 6] [--frames 8] [--members 1 5] [--plot docs/images/flicker.png]

A clip is a world of `training.scenes` (procedural textures, so that anybody can make it again) through which the camera
goes on as it began. **Flicker** is how much the error of the answer changes from one frame to the next at the same
point of the world. All frames of a clip are brought to metres by *one* scale and shift (least squares over the clip);
e_t(x) is then answer minus truth at pixel x of frame t, and

    flicker = mean |e_t(x) - e_{t-1}(x + f(x))| / mean depth,

over the pixels x of all frames that are seen in the frame before, where f is the true flow back to it. A constant
error does not flicker; true change is not counted, because the truth changes with it. `abs_rel` is the mean relative
error under that one scale and shift: what somebody gets who takes the whole clip for one measurement.

The ways: each frame *alone*, from noise of its own; all from *the same noise*; *steady*, which is that with each frame
fitted to the one before; and as a bound for any scale and shift, each frame *fitted to the truth* itself.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bench.machine import describe
from saccade import sequence
from saccade.backends.embedded import Embedded
from saccade.backends.stepping import Stepping
from saccade.metrics import abs_rel, align_depth
from saccade.pipeline import Answer, Inputs, Options, Pipeline
from saccade.repository import Repository, find_repository
from saccade.steady import steady, warp
from training.scenes import assets, raycast, worlds
from training.scenes.raycast import Camera

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]
PACE = 0.35  # of the step between the two frames that the scenes are trained with
SAME_POINT = 0.02  # of the depth: what is seen in both frames
NEAR_M = 40.0
ALONE, SHARED, STEADY, ORACLE = "alone", "the same noise", "steady", "fitted to the truth"


@dataclass(frozen=True)
class Clip:
    """`frames` [H, W, 3] uint8; `depths` [H, W] metres; `back`: flow [H, W, 2] from each frame but the first to the one
    before, and `seen` [H, W], where that one sees the same point."""

    frames: list[NDArray[np.uint8]]
    depths: list[Array]
    back: list[Array]
    seen: list[Mask]


@dataclass(frozen=True)
class Figures:
    """`flicker` and `abs_rel` in per cent, and the flicker of every frame but the first."""

    flicker: float
    abs_rel: float
    by_frame: list[float]


def render(seed: int, frames: int, size: int) -> Clip:
    """A still world, a camera that moves on."""
    rng = np.random.default_rng(seed)
    atlas = raycast.Atlas.of(assets.load([], [], rng, 24, 8), rng)
    kind: Callable[..., raycast.World] = (worlds.room, worlds.street, worlds.table_top)[seed % 3]
    world = kind(atlas, rng, size)
    exposure = raycast._exposure(rng)
    clip = Clip([], [], [], [])
    cameras = path(*world.cameras, frames)
    for before, camera in zip([cameras[0], *cameras], cameras, strict=False):
        rays = camera.rays(size)
        depth, index = raycast.intersect(world.solids, camera.centre, rays, atlas).min(1)
        light = raycast.shade(world, world.solids, camera, rays, depth, index, atlas)
        clip.frames.append(raycast._to_uint8(light * exposure, size, rng))
        clip.depths.append(depth.clamp(max=world.far_m).reshape(size, size).numpy())
        if len(clip.depths) > 1:
            flow, there = _back(camera, before, rays, depth, size)
            clip.back.append(flow)
            last, inside = warp(clip.depths[-2], flow)
            clip.seen.append(inside & (np.abs(last - there) < SAME_POINT * there) & (there < NEAR_M))
    return clip


def path(first: Camera, second: Camera, frames: int) -> list[Camera]:
    """`frames` cameras that go on as from the first to the second, more slowly."""
    step = PACE * (second.centre - first.centre)
    turn = torch.matrix_exp(PACE * _log(first.pose.T @ second.pose))
    cameras = [first]
    for _ in range(frames - 1):
        last = cameras[-1]
        cameras.append(replace(last, pose=last.pose @ turn, centre=last.centre + step))
    return cameras


def _log(turn: torch.Tensor) -> torch.Tensor:
    """Of a small rotation."""
    return (turn - turn.T) / 2


def _back(camera: Camera, before: Camera, rays: torch.Tensor, depth: torch.Tensor, size: int) -> tuple[Array, Array]:
    """The flow back to the camera before, and how far from that each point was."""
    points = camera.centre + rays * depth[:, None]
    target, there = before.project(points, size)
    source, _ = camera.project(points, size)
    flow = (target - source).reshape(size, size, 2).clamp(-size, size).numpy()
    return flow, there.reshape(size, size).numpy()


def measure(clip: Clip, answers: Sequence[Array]) -> Figures:
    """Answers [H, W] in no unit against the clip's truth."""
    truth = np.concatenate(clip.depths)
    valid = truth < NEAR_M
    metres = align_depth(np.concatenate(answers), truth, valid).astype(np.float32)
    error = np.split(metres - truth, len(answers))
    changes = []
    for index, (flow, seen) in enumerate(zip(clip.back, clip.seen, strict=True), 1):
        before, _ = warp(error[index - 1], flow)
        changes.append(float(np.abs(error[index] - before)[seen].mean()))
    mean_m = float(truth[valid].mean())
    relative = [100 * change / mean_m for change in changes]
    return Figures(float(np.mean(relative)), 100 * abs_rel(metres, truth, valid), relative)


async def answers(pipeline: Pipeline, clip: Clip, options: Options) -> dict[str, list[Array]]:
    """Way -> depths of the clip's frames."""
    resolved = options.resolve(pipeline.card, "depth")
    asked = [Inputs("depth", frame) for frame in clip.frames]
    own = [await pipeline(inputs, replace(resolved, seed=index)) for index, inputs in enumerate(asked)]
    shared = (await sequence.ask(pipeline, asked, resolved)).answers
    back = [Inputs("flow", now, before) for before, now in pairwise(clip.frames)]
    flows = (await sequence.ask(pipeline, back, sequence.guide(pipeline.card, resolved))).answers
    depths = [_depth(answer) for answer in shared]
    found = {ALONE: [_depth(answer) for answer in own], SHARED: depths}
    found[STEADY] = steady(depths, clip.frames, [_depth(flow) for flow in flows]).maps
    everywhere = [truth < NEAR_M for truth in clip.depths]
    fitted = [align_depth(*given) for given in zip(depths, clip.depths, everywhere, strict=True)]
    return found | {ORACLE: [depth.astype(np.float32) for depth in fitted]}


def _depth(answer: Answer) -> Array:
    return answer.prediction.astype(np.float32, copy=False)


async def run(clips: int, frames: int, size: int, members: Sequence[int]) -> list[dict[str, list[Figures]]]:
    """For each ensemble size: way -> figures of each clip."""
    backend = Stepping(Embedded.load(Repository(find_repository(None)), threads=1), batch_size=1)
    await backend.start()
    pipeline = Pipeline(backend)
    results: list[dict[str, list[Figures]]] = [{} for _ in members]
    for seed in range(clips):
        clip = render(seed, frames, size)
        for result, count in zip(results, members, strict=True):
            found = await answers(pipeline, clip, Options(ensemble_size=count))
            for way, depths in found.items():
                result.setdefault(way, []).append(measure(clip, depths))
        sys.stderr.write(f"clip {seed + 1} of {clips}\n")
    await backend.aclose()
    return results


def table(results: Sequence[dict[str, list[Figures]]], members: Sequence[int]) -> str:
    """Markdown."""
    lines = ["| members | way | flicker | AbsRel of the clip |", "|---|---|---|---|"]
    for result, count in zip(results, members, strict=True):
        for way, rows in result.items():
            flicker, relative = np.mean([row.flicker for row in rows]), np.mean([row.abs_rel for row in rows])
            lines.append(f"| {count} | {way} | {flicker:.2f}% | {relative:.1f}% |")
    return "\n".join(lines)


def draw(result: dict[str, list[Figures]], members: int, path: Path) -> None:
    """Left: each clip's flicker by way. Right: frame by frame, all clips."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    colours = dict(zip(result, ("#9e0142", "#f46d43", "#3288bd", "#888888"), strict=True))
    width = 0.8 / len(result)
    for index, (way, rows) in enumerate(result.items()):
        left.bar(
            np.arange(len(rows)) + index * width, [row.flicker for row in rows], width, color=colours[way], label=way
        )
        right.plot(np.mean([row.by_frame for row in rows], axis=0), color=colours[way], label=way)
    left.set(xlabel="clip", ylabel="flicker, % of the mean depth", title=f"Each clip, {members} members")
    right.set(xlabel="frame", ylim=(0, None), title="Frame by frame, mean of the clips")
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=192, help="edge of the frames in pixels")
    parser.add_argument("--members", type=int, nargs="+", default=[1, 5], help="ensemble sizes")
    parser.add_argument("--plot", type=Path, help="PNG to draw the last ensemble size into")
    given = parser.parse_args(argv)
    results = asyncio.run(run(given.clips, given.frames, given.size, given.members))
    sys.stdout.write(f"{table(results, given.members)}\n\n{describe()}\n")
    if given.plot is not None:
        draw(results[-1], given.members[-1], given.plot)


if __name__ == "__main__":
    main()

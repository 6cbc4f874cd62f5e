"""Several pictures, videos and metres: by both clients, in this process, and from the command line."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from saccade.client import AsyncClient, Client
from saccade.errors import InvalidInput, MetresUndetermined, ServerError
from saccade.formats.video import read_video, write_mp4
from saccade.local import Local
from saccade.sequence import Seen
from tests.client.conftest import Scene


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four frames, 64 x 48 px, 8 a second."""
    levels = np.random.default_rng(3).integers(0, 256, (48, 64, 3), np.uint8)
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    path.write_bytes(write_mp4([np.roll(levels, 2 * index, axis=1) for index in range(4)], 8))
    return path


def same(one: Seen, other: Seen) -> None:
    assert (len(one), one.shots, one.fps) == (len(other), other.shots, other.fps)
    for left, right in zip(one, other, strict=True):
        np.testing.assert_allclose(left.prediction, right.prediction, atol=1e-4)


def test_a_server_and_this_process_agree(url: str, local: Local, scene: Scene, clip: Path) -> None:
    pictures = [scene.image, scene.next_image.read_bytes(), scene.image]
    with Client(url) as client:
        same(client.depths(pictures, steps=1), local.depths(pictures, steps=1))
        same(client.depths(clip, frames_limit=3), local.depths(clip, frames_limit=3))
        moved = client.flows(clip, frames_stride=2)
        same(moved, local.flows(clip.read_bytes(), frames_stride=2))
    assert (len(moved), moved.fps, moved.shots) == (1, 4, None)


def test_the_async_client_asks_the_same(url: str, scene: Scene, clip: Path) -> None:
    async def ask() -> tuple[Seen, Seen]:
        async with AsyncClient(url) as client:
            return await client.depths(clip, steady=False, steps=1), await client.flows([scene.image, scene.next_image])

    depths, flows = asyncio.run(ask())
    with Client(url) as client:
        same(depths, client.depths(clip, steady=False, steps=1))
        np.testing.assert_array_equal(flows[0].prediction, client.flow(scene.image, scene.next_image).prediction)
        np.testing.assert_array_equal(client.depths([scene.image])[0].prediction, client.depth(scene.image).prediction)


def test_known_depths(url: str, local: Local, scene: Scene) -> None:
    relative = local.depth(scene.image).prediction
    known = np.array([[x, y, 1 + 3 * relative[y, x]] for x, y in [(3, 4), (50, 9), (30, 33), (12, 40)]])
    with Client(url) as client:
        for model in (client, local):
            answer = model.depth(scene.image, known_depths=known)
            assert answer.units == "metres"
            assert answer.metres is not None
            assert (answer.metres.inliers, answer.metres.points) == (4, 4)
            np.testing.assert_allclose(answer.prediction, 1 + 3 * relative, rtol=1e-2)
        with pytest.raises(ServerError, match="1 given"):
            client.depth(scene.image, known_depths=known[:1])
    with pytest.raises(MetresUndetermined, match="1 given"):
        local.depth(scene.image, known_depths=known[:1])
    with pytest.raises(InvalidInput, match="rows of x, y and metres"):
        local.depth(scene.image, known_depths=[(1, 2)])


def test_no_frames_are_refused(url: str, local: Local, scene: Scene) -> None:
    with Client(url) as client:
        for model in (client, local):
            with pytest.raises(InvalidInput, match="no frames"):
                model.depths([])
            with pytest.raises((InvalidInput, ServerError), match=r"two frames|next_image is missing"):
                model.flows([scene.image])


def run(quiet: dict[str, str], url: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "saccade", *map(str, arguments), "--url", url]
    return subprocess.run(command, env=quiet, capture_output=True, text=True, check=False)


def test_the_command_writes_a_video_or_a_folder(url: str, quiet: dict[str, str], clip: Path, tmp_path: Path) -> None:
    ran = run(quiet, url, "depth", clip, "-o", tmp_path / "depth.mp4", "--frames-limit", "3")
    assert ran.returncode == 0, ran.stderr
    found = read_video((tmp_path / "depth.mp4").read_bytes())
    assert (len(found.frames), found.fps) == (3, 8)
    ran = run(quiet, url, "flow", clip, "-o", tmp_path / "motion", "--format", "npy")
    assert ran.returncode == 0, ran.stderr
    assert sorted(path.name for path in (tmp_path / "motion").iterdir()) == ["0000.npy", "0001.npy", "0002.npy"]
    assert np.load(tmp_path / "motion" / "0000.npy").shape == (48, 64, 2)


def test_the_command_takes_known_depths(
    url: str, quiet: dict[str, str], local: Local, scene: Scene, tmp_path: Path
) -> None:
    relative = local.depth(scene.image).prediction
    known = [[x, y, round(1 + 3 * float(relative[y, x]), 4)] for x, y in [(3, 4), (50, 9), (30, 33)]]
    (tmp_path / "points.json").write_text(json.dumps(known))
    (tmp_path / "points.csv").write_text("\n".join(", ".join(map(str, row)) for row in known))
    for name in ("points.json", "points.csv"):
        out = tmp_path / f"{name}.npy"
        ran = run(quiet, url, "depth", scene.image, "-o", out, "--known-depths", tmp_path / name)
        assert ran.returncode == 0, ran.stderr
        np.testing.assert_allclose(np.load(out), 1 + 3 * relative, rtol=1e-2)
    (tmp_path / "bad.csv").write_text("x,y,metres\n1,2,3\n")
    ran = run(quiet, url, "depth", scene.image, "--known-depths", tmp_path / "bad.csv")
    assert (ran.returncode, "without a head" in ran.stderr) == (2, True)


def test_the_command_refuses_what_does_not_fit(
    url: str, quiet: dict[str, str], clip: Path, scene: Scene, tmp_path: Path
) -> None:
    for arguments, told in (
        (("depth", clip, scene.image), "ask about it alone"),
        (("depth", clip, "-o", tmp_path / "depth.png"), "name a folder, or an .mp4"),
        (("depth", scene.image, "--frames-limit", "2"), "about a video"),
        (("depth", clip, "--later"), "'Prefer: respond-async' (docs/jobs.md)"),
    ):
        ran = run(quiet, url, *arguments)
        assert (ran.returncode, told in ran.stderr) == (2, True), ran.stderr

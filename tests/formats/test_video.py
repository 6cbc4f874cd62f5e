"""Videos from strangers: what is read, what is refused, and that a bad one harms nobody."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from saccade.errors import InvalidInput, PictureTooLarge, UnreadablePicture, UnsupportedPicture
from saccade.formats import video
from saccade.formats.video import Bounds

SIZE = (48, 64)


def frames(count: int, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    """A pattern that goes right 2 px a frame, RGB."""
    coarse = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))
    return [np.roll(picture, 2 * index, axis=1) for index in range(count)]


def recorded(folder: Path, count: int, codec: str = "FFV1", ending: str = "avi", fps: float = 10) -> bytes:
    """By OpenCV in this process, whatever ours does."""
    path = folder / f"clip.{ending}"
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), fps, SIZE[::-1])
    assert writer.isOpened()
    for frame in frames(count):
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    return path.read_bytes()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return recorded(tmp_path_factory.mktemp("clip"), 8)


def test_frames_come_as_they_were_recorded(clip: bytes) -> None:
    found = video.read_video(clip)
    np.testing.assert_array_equal(found.frames, frames(8))
    assert found.fps == 10


@pytest.mark.parametrize(("codec", "ending"), [("mp4v", "mp4"), ("vp09", "mp4"), ("VP80", "webm"), ("MJPG", "avi")])
def test_the_usual_containers_and_codecs(tmp_path: Path, codec: str, ending: str) -> None:
    found = video.read_video(recorded(tmp_path, 3, codec, ending))
    assert found.frames.shape == (3, *SIZE, 3)
    assert np.abs(found.frames.astype(int) - frames(3)).mean() < 12


def test_an_animated_gif() -> None:
    out = io.BytesIO()
    first, *others = (Image.fromarray(frame) for frame in frames(4))
    first.save(out, "GIF", save_all=True, append_images=others, duration=50)
    found = video.read_video(out.getvalue())
    assert (found.frames.shape, found.fps) == ((4, *SIZE, 3), 20)


def test_a_phone_held_upright(tmp_path: Path) -> None:
    lying = recorded(tmp_path, 3, "mp4v", "mp4")
    one, none = (1).to_bytes(2, "big") + bytes(2), bytes(4)
    identity, quarter = one + none * 3 + one, none + one + none + b"\xff\xff\0\0" + none
    track = lying.index(b"tkhd")
    at = lying.index(identity, track)
    found = video.read_video(lying[:at] + quarter + lying[at + len(identity) :])
    assert found.frames.shape == (3, SIZE[1], SIZE[0], 3)
    assert np.abs(found.frames[1].astype(int) - np.rot90(frames(3)[1], -1)).mean() < 12


def test_stride_and_limit(clip: bytes) -> None:
    found = video.read_video(clip, stride=3)
    np.testing.assert_array_equal(found.frames, frames(8)[::3])
    assert found.fps == pytest.approx(10 / 3)
    np.testing.assert_array_equal(video.read_video(clip, limit=2).frames, frames(2))


def test_more_frames_than_are_allowed_are_not_dropped_in_silence(clip: bytes) -> None:
    few = Bounds(frames=4)
    with pytest.raises(InvalidInput, match="more than 4 frames"):
        video.read_video(clip, bounds=few)
    with pytest.raises(InvalidInput, match="more than 4 frames"):
        video.read_video(clip, bounds=few, limit=6)
    assert len(video.read_video(clip, bounds=few, limit=4).frames) == 4
    assert len(video.read_video(clip, bounds=few, stride=2).frames) == 4


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (Bounds(frame_pixels=SIZE[0] * SIZE[1] - 1), "A frame is 64 x 48 px"),
        (Bounds(clip_pixels=3 * SIZE[0] * SIZE[1]), "Over 3 frames of 64 x 48 px"),
    ],
)
def test_pixels_are_bounded(clip: bytes, bounds: Bounds, message: str) -> None:
    with pytest.raises(PictureTooLarge, match=message):
        video.read_video(clip, bounds=bounds)


def test_time_is_bounded(clip: bytes) -> None:
    with pytest.raises(UnreadablePicture, match="to decode"):
        video.read_video(clip, bounds=Bounds(seconds=0.01))


@pytest.mark.parametrize(
    "data", [b"", b"GIF", b"#EXTM3U\nfile:///etc/passwd\n", b"ffconcat version 1.0\n", b"\x89PNG\r\n"]
)
def test_what_is_no_video_reaches_no_decoder(data: bytes) -> None:
    with pytest.raises(UnsupportedPicture):
        video.read_video(data)


def test_a_playlist_in_disguise_opens_nothing(tmp_path: Path, clip: bytes) -> None:
    other = tmp_path / "other.avi"
    other.write_bytes(clip)
    for head in (b"\0\0\0\x18ftypisom", b"GIF89a", b"\x1a\x45\xdf\xa3"):
        with pytest.raises(InvalidInput):
            video.read_video(head + f"\n#EXTM3U\n#EXTINF:1,\nfile://{other}\n".encode() * 40)


def test_a_video_cut_short_is_refused_or_gives_what_is_there(clip: bytes) -> None:
    with pytest.raises(UnreadablePicture, match="cut short"):
        video.read_video(clip[:200])
    assert 1 <= len(video.read_video(clip[: len(clip) // 2]).frames) < 8


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_an_error_of_ours_or_a_clip(clip: bytes, data: st.DataObject) -> None:
    broken = bytearray(clip)
    for at in data.draw(st.lists(st.integers(0, len(clip) - 1), min_size=1, max_size=30)):
        broken[at] = data.draw(st.integers(0, 255))
    try:
        found = video.read_video(bytes(broken))
    except InvalidInput:
        return
    assert found.frames.ndim == 4


@pytest.mark.parametrize("size", [(48, 64), (47, 63)])
def test_written_clips_are_read_back(size: tuple[int, int]) -> None:
    found = video.read_video(video.write_mp4(frames(5, size), 12))
    assert found.frames.shape == (5, size[0] // 2 * 2, size[1] // 2 * 2, 3)
    assert found.fps == 12
    expected = np.stack(frames(5, size))[:, : size[0] // 2 * 2, : size[1] // 2 * 2]
    assert np.abs(found.frames.astype(int) - expected).mean() < 12

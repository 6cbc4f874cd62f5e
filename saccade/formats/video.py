"""Videos in and out: a stranger's file to frames, frames to an MP4. OpenCV does it, in a process of its own
(`saccade.formats.ffmpeg`), so that no file can take this one along, hold it up or make it open other files."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from saccade.errors import (
    InvalidInput,
    NotInstalled,
    PictureTooLarge,
    SaccadeError,
    UnreadablePicture,
    UnsupportedPicture,
)
from saccade.formats.pictures import check_proportions

FALLBACK_FPS, MAX_FPS = 25.0, 240.0
WRITE_SECONDS = 120.0
# Past what the frames need: OpenCV, FFmpeg and their tables, and a decoder's reference frames.
MEMORY_BYTES = 2**31
_SCRIPT = Path(__file__).with_name("ffmpeg.py")
_KEPT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR")
# Only these containers, and no protocol: a playlist in disguise cannot name another file or host.
_FFMPEG = "protocol_whitelist;none|format_whitelist;mov,matroska,avi,gif"
_ENVIRONMENT = {
    "OPENCV_FFMPEG_CAPTURE_OPTIONS": _FFMPEG,
    "OPENCV_LOG_LEVEL": "OFF",
    "OPENCV_FFMPEG_LOGLEVEL": "-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Bounds:
    """The most that is read of one video: `frames`, `frame_pixels` of one frame, `clip_pixels` of all that are kept
    together, and `seconds` of decoding."""

    frames: int = 120
    frame_pixels: int = 20_000_000
    clip_pixels: int = 64_000_000
    seconds: float = 20.0


@dataclass(frozen=True)
class Clip:
    """`frames` [N, H, W, 3] uint8 RGB, and how many of them make a second."""

    frames: NDArray[np.uint8]
    fps: float


def require_opencv() -> None:
    """Raise NotInstalled where OpenCV is missing. It is large, so a lean server has none."""
    if importlib.util.find_spec("cv2") is None:
        raise NotInstalled("videos need OpenCV, which is not installed here: pip install 'saccade[video]'")


def is_video(data: bytes) -> bool:
    """By its first bytes: MP4 or MOV, WebM or Matroska, AVI, GIF."""
    return (
        data[4:8] == b"ftyp"
        or data[:4] == b"\x1a\x45\xdf\xa3"
        or (data[:4] == b"RIFF" and data[8:12] == b"AVI ")
        or data[:6] in (b"GIF87a", b"GIF89a")
    )


def read_video(
    data: bytes,
    *,
    bounds: Bounds = Bounds(),
    stride: int = 1,
    limit: int | None = None,
    param: str = "video",
) -> Clip:
    """Every `stride`-th frame of a video, upright, `limit` of them at most.

    Raises UnsupportedPicture (not MP4, WebM, AVI or GIF), PictureTooLarge past `bounds` (a video of more frames than
    `bounds.frames` needs a `limit` or a `stride`: nothing is dropped unasked), UnreadablePicture (damaged, a codec that
    is not read, frames that change their size, or too slow to decode), InvalidInput for a side under 2 px.
    """
    require_opencv()
    if not is_video(data):
        raise UnsupportedPicture("Unknown file type. Send an MP4, WebM, AVI or GIF video.", param=param)
    frames = min(bounds.frames, limit or bounds.frames)
    order = {"do": "read", "frames": frames, "stride": stride, "clip_pixels": bounds.clip_pixels}
    order |= {"frame_pixels": bounds.frame_pixels, "memory_bytes": MEMORY_BYTES + 12 * bounds.frame_pixels}
    order["file_bytes"] = 3 * bounds.clip_pixels
    with tempfile.TemporaryFile() as out:
        try:
            found = _run(order, [data], out, bounds.seconds)
        except subprocess.TimeoutExpired as error:
            raise UnreadablePicture(
                f"The video takes over {bounds.seconds:g} s to decode. Send a shorter or smaller one, as H.264 in MP4.",
                param=param,
            ) from error
        _check(found, bounds, frames, limit, param)
        shape = (found["frames"], found["height"], found["width"], 3)
        levels = np.fromfile(out, np.uint8)
    if levels.size != math.prod(shape):
        raise UnreadablePicture("The video cannot be decoded. Convert it, then send it.", param=param)
    bgr = levels.reshape(shape)
    return Clip(bgr[..., ::-1], _fps(found["fps"]) / stride)


def write_mp4(frames: Sequence[NDArray[np.uint8]], fps: float) -> bytes:
    """Frames [H, W, 3] uint8 RGB of one size -> VP9 in MP4, which browsers play. Odd sides lose their last row or
    column, as the codec wants. Raises SaccadeError if it cannot be written."""
    require_opencv()
    height, width = frames[0].shape[0] // 2 * 2, frames[0].shape[1] // 2 * 2
    order = {"do": "write", "fps": min(max(fps, 1.0), MAX_FPS), "height": height, "width": width}
    order["memory_bytes"] = MEMORY_BYTES + 4 * len(frames) * height * width * 3
    rows = [np.ascontiguousarray(frame[:height, :width, ::-1]).tobytes() for frame in frames]
    with tempfile.TemporaryFile() as out:
        try:
            found = _run(order, rows, out, WRITE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise SaccadeError(f"the video took over {WRITE_SECONDS:g} s to write") from error
        if found.get("frames") != len(frames):
            raise SaccadeError("the video could not be written: this OpenCV has no VP9 encoder")
        return out.read()


def _run(order: dict[str, Any], parts: Sequence[bytes], out: IO[bytes], seconds: float) -> dict[str, Any]:
    """What the other process says; what it dies of counts as a damaged file. Raises TimeoutExpired."""
    order |= {"out": out.fileno(), "seconds": math.ceil(seconds) + 1}
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    ran = subprocess.run(
        [sys.executable, "-P", str(_SCRIPT)],
        input=json.dumps(order).encode() + b"\n" + b"".join(parts),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=(out.fileno(),),
        env=kept | _ENVIRONMENT,
        timeout=seconds,
        check=False,
    )
    out.seek(0)
    try:
        found = json.loads(ran.stdout)
    except ValueError:
        found = None
    return found if isinstance(found, dict) and ran.returncode == 0 else {"error": "unreadable"}


def _check(found: dict[str, Any], bounds: Bounds, frames: int, limit: int | None, param: str) -> None:
    size = f"{found.get('width')} x {found.get('height')} px"
    match found.get("error"):
        case None:
            check_proportions(found["width"], found["height"], param)
        case "frame":
            raise PictureTooLarge(f"A frame is {size}; the limit is {bounds.frame_pixels} pixels.", param=param)
        case "clip":
            raise PictureTooLarge(
                f"Over {found['frames']} frames of {size}; the limit is {bounds.clip_pixels} pixels in all. Send a "
                "smaller video, or ask for fewer frames by frames_stride or frames_limit.",
                param=param,
            )
        case "changes":
            raise UnreadablePicture("The video's frames are not of one size. Convert it, then send it.", param=param)
        case _:
            raise UnreadablePicture(
                "The video cannot be decoded: it is cut short, damaged, or of a codec that is not read. Send it whole, "
                "as H.264 or VP9 in MP4, VP8 or VP9 in WebM, or MJPEG in AVI.",
                param=param,
            )
    if found["more"] and (limit is None or limit > frames):
        raise InvalidInput(
            f"The video has more than {frames} frames, the most that one request may ask about. Take fewer by "
            "frames_stride (every n-th) or frames_limit (the first ones).",
            param=param,
        )


def _fps(told: float) -> float:
    return told if 0 < told <= MAX_FPS else FALLBACK_FPS

"""The one process that touches a video: reads or writes one with OpenCV's FFmpeg, and ends. `saccade.formats.video`
starts it, as a script of its own: what a stranger's file does to a decoder, it does here, under limits and a clock.

Standard input: a line of JSON (the order), then the video, or the frames to write. Frames are [H, W, 3] uint8 BGR, one
after the other; those read go to the file descriptor in the order. Standard output: a line of JSON, what was found.
"""

import io
import json
import os
import resource
import sys
import tempfile
from typing import Any

import cv2
import numpy as np


def confine(memory_bytes: int, seconds: int) -> None:
    """The kernel's limits, for what FFmpeg does not mind."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def read(order: dict[str, Any], data: bytes) -> dict[str, Any]:
    """Every `stride`-th frame, `frames` at most and `more` if there are others, to the descriptor `out`."""
    stream: Any = io.BytesIO(data)  # what OpenCV calls an IStreamReader
    video = cv2.VideoCapture(stream, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    if not video.isOpened():
        return {"error": "unreadable"}
    width, height = (int(video.get(key)) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    found = {"width": width, "height": height, "fps": float(video.get(cv2.CAP_PROP_FPS)), "frames": 0, "more": False}
    if width * height > order["frame_pixels"]:
        return found | {"error": "frame"}
    with os.fdopen(order["out"], "wb") as out:
        return found | walk(video, order, out)


def walk(video: cv2.VideoCapture, order: dict[str, Any], out: io.BufferedWriter) -> dict[str, Any]:
    """The frames themselves say their size: the header's may lie, and knows nothing of rotation."""
    facts: dict[str, Any] = {"frames": 0}
    while True:
        seen, frame = video.read()
        if not seen:
            return facts if facts["frames"] else {"error": "unreadable"}
        height, width = frame.shape[:2]
        if facts.setdefault("width", width) != width or facts.setdefault("height", height) != height:
            return facts | {"error": "changes"}
        if facts["frames"] == order["frames"]:
            return facts | {"more": True}
        if frame.dtype != np.uint8 or frame.shape[2:] != (3,):
            return facts | {"error": "unreadable"}
        if width * height > order["frame_pixels"]:
            return facts | {"error": "frame"}
        if (facts["frames"] + 1) * width * height > order["clip_pixels"]:
            return facts | {"error": "clip"}
        out.write(frame.tobytes())
        facts["frames"] += 1
        for _ in range(order["stride"] - 1):
            if not video.grab():
                return facts


def write(order: dict[str, Any], data: bytes) -> dict[str, Any]:
    """The frames as VP9 in MP4 to the descriptor `out`."""
    frames = np.frombuffer(data, np.uint8).reshape(-1, order["height"], order["width"], 3)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "clip.mp4")
        size = (order["width"], order["height"])
        video = cv2.VideoWriter(path, cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"vp09"), order["fps"], size)
        if not video.isOpened():
            return {"error": "no encoder"}
        for frame in frames:
            video.write(frame)
        video.release()
        with open(path, "rb") as written, os.fdopen(order["out"], "wb") as out:
            out.write(written.read())
    return {"frames": len(frames)}


def main() -> None:
    order = json.loads(sys.stdin.buffer.readline())
    data = sys.stdin.buffer.read()
    confine(order["memory_bytes"] + 2 * len(data), order["seconds"])
    if "file_bytes" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"], order["file_bytes"]))
    found = {"read": read, "write": write}[order["do"]](order, data)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()

"""Uploads that were right until something bit them: python -m bench.mutated [--count 10000] [--model-repository DIR]

Starts the real server on loopback and sends it uploads (pictures of every type, masks, videos; multipart and JSON) that
Hypothesis has mutated: bits flipped, bytes overwritten, cut out, put in twice, spliced with another file, numbers set
to their extremes. Half of the mutations are of a file alone, inside a form that is whole, so that the decoders see
them; half are of the whole body. Prints a table of the answers. Exits with 1 if any was a 5xx or none at all (what was
sent then lies in `--keep`), or if the server no longer serves. Linux only.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from bench.malformed import CLOSED, Server, serving

SIZE = (48, 32)
BOUNDARY = b"a-boundary-of-ours"
EXTREMES = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
QUERY = "steps=1&ensemble_size=1&processing_resolution=64"
Mutation = Callable[[bytes], bytes]


def saved(kind: str, mode: str = "RGB", number: int = 0, **how: object) -> bytes:
    levels = np.random.default_rng(number).integers(0, 256, (*SIZE[::-1], 3), np.uint8)
    out = io.BytesIO()
    picture = Image.fromarray(levels).convert("L").convert("I").convert("I;16") if mode == "I;16" else None
    (picture or Image.fromarray(levels).convert(mode)).save(out, kind, **how)
    return out.getvalue()


@cache
def pictures() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "PNG": saved("PNG"),
        "PNG, palette": saved("PNG", "P"),
        "PNG, 16 bits": saved("PNG", "I;16"),
        "PNG, alpha": saved("PNG", "RGBA"),
        "JPEG": saved("JPEG"),
        "JPEG, progressive, turned": saved("JPEG", progressive=True, exif=exif),
        "WebP": saved("WEBP"),
        "WebP, lossless": saved("WEBP", lossless=True),
        "TIFF": saved("TIFF"),
        "TIFF, LZW": saved("TIFF", compression="tiff_lzw"),
        "BMP": saved("BMP"),
        "GIF": saved("GIF"),
    }


@cache
def masks() -> dict[str, bytes]:
    inside = np.zeros(SIZE[::-1], np.uint8)
    inside[8:24, 8:32] = 255
    out = io.BytesIO()
    Image.fromarray(inside).save(out, "PNG")
    return {"mask, PNG": out.getvalue()}


@cache
def videos() -> dict[str, bytes]:
    """Three frames; as MP4 and AVI where OpenCV writes them here, and as GIF."""
    frames = [Image.open(io.BytesIO(saved("PNG", number=number))) for number in range(3)]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=40)
    return {"video, GIF": out.getvalue()} | _written(np.stack([np.asarray(frame.convert("RGB")) for frame in frames]))


def _written(frames: np.ndarray) -> dict[str, bytes]:
    import tempfile

    import cv2

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for ending, code in (("mp4", "mp4v"), ("avi", "MJPG"), ("webm", "VP80")):
            path = Path(folder) / f"clip.{ending}"
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), 10, SIZE)
            for frame in frames:
                writer.write(frame)
            writer.release()
            if path.exists() and path.stat().st_size > 100:
                found[f"video, {ending}"] = path.read_bytes()
    return found


def flip(draw: st.DrawFn) -> Mutation:
    at, bit = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(0, 7))

    def mutate(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[int(at * len(changed))] ^= 1 << bit
        return bytes(changed)

    return mutate


def overwrite(draw: st.DrawFn) -> Mutation:
    at, new = draw(st.floats(0, 1, exclude_max=True)), draw(st.binary(min_size=1, max_size=16))
    return lambda data: data[: (i := int(at * len(data)))] + new + data[i + len(new) :]


def extreme(draw: st.DrawFn) -> Mutation:
    """A number of 1, 2 or 4 bytes, of either order, at its least or most; near the beginning, where headers are."""
    at, value = draw(st.integers(0, 64)), draw(st.sampled_from(EXTREMES))
    size, order = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from(["big", "little"]))
    new = (value & (1 << 8 * size) - 1).to_bytes(size, order)
    return lambda data: data[:at] + new + data[at + size :]


def cut(draw: st.DrawFn) -> Mutation:
    at, size = draw(st.floats(0, 1)), draw(st.integers(1, 64))
    return lambda data: data[: (i := int(at * len(data)))] + data[i + size :]


def truncate(draw: st.DrawFn) -> Mutation:
    at = draw(st.floats(0, 1))
    return lambda data: data[: int(at * len(data))]


def double(draw: st.DrawFn) -> Mutation:
    at, size = draw(st.floats(0, 1)), draw(st.integers(1, 64))
    return lambda data: data[: (i := int(at * len(data))) + size] + data[i:]


def splice(draw: st.DrawFn) -> Mutation:
    other = draw(st.sampled_from(sorted((pictures() | videos()).values())))
    a, b = draw(st.floats(0, 1)), draw(st.floats(0, 1))
    return lambda data: data[: int(a * len(data))] + other[int(b * len(other)) :]


MUTATIONS = (flip, flip, flip, overwrite, overwrite, extreme, extreme, cut, double, truncate, splice)


@st.composite
def mutations(draw: st.DrawFn) -> Mutation:
    """One to four, one after another."""
    chosen = [draw(st.sampled_from(MUTATIONS))(draw) for _ in range(draw(st.integers(1, 4)))]

    def mutate(data: bytes) -> bytes:
        for one in chosen:
            data = one(data) if data else data
        return data

    return mutate


def multipart(parts: dict[str, bytes]) -> bytes:
    body = b""
    for name, data in parts.items():
        head = b'Content-Disposition: form-data; name="%s"; filename="f"' % name.rstrip("0123456789").encode()
        body += b"--" + BOUNDARY + b"\r\n" + head + b"\r\nContent-Type: image/png\r\n\r\n" + data + b"\r\n"
    return body + b"--" + BOUNDARY + b"--\r\n"


def in_json(parts: dict[str, bytes]) -> bytes:
    return json.dumps({name: base64.b64encode(data).decode() for name, data in parts.items()}).encode()


@st.composite
def uploads(draw: st.DrawFn) -> tuple[str, str, bytes, str]:
    """(what it was, path, body, content type)."""
    form = draw(st.sampled_from(["depth", "flow", "amodal", "several", "video", "click"]))
    kind, picture = draw(st.sampled_from(sorted(pictures().items())))
    parts = {"image": picture}
    if form in ("flow", "several"):
        parts["next_image" if form == "flow" else "image1"] = saved("PNG", number=1)
    elif form == "amodal":
        kind, parts["mask"] = f"{kind} and mask", masks()["mask, PNG"]
    elif form == "video":
        kind, clip = draw(st.sampled_from(sorted(videos().items())))
        parts = {"video": clip}
    inside, mutate = draw(st.booleans()), draw(mutations())
    if inside:
        name = draw(st.sampled_from(sorted(parts)))
        parts[name] = mutate(parts[name])
    text = form not in ("several", "click") and draw(st.booleans())
    body = in_json(parts) if text else multipart(parts)
    path = {"several": "/depth", "video": "/depth", "click": "/mask"}.get(form, f"/{form}")
    query = "points=[[9,9,1]]" if form == "click" else QUERY
    media_type = "application/json" if text else f"multipart/form-data; boundary={BOUNDARY.decode()}"
    return f"{kind}, {'file' if inside else 'body'}", f"{path}?{query}", body if inside else mutate(body), media_type


class Tally:
    """Answers by what was sent, and what must not have been."""

    def __init__(self, server: Server, keep: Path | None) -> None:
        self.server, self.keep = server, keep
        self.answers: dict[str, Counter[str]] = {}
        self.faults = 0

    def send(self, upload: tuple[str, str, bytes, str]) -> None:
        what, path, body, media_type = upload
        sent = {"method": "POST", "url": path, "content": body, "headers": {"Content-Type": media_type}}
        status, _ = self.server.send(sent)
        self.answers.setdefault(what, Counter())[status] += 1
        if status.startswith("5") or status == CLOSED:
            self.faults += 1
            if self.keep:
                self.keep.mkdir(parents=True, exist_ok=True)
                name = f"{status}-{self.faults}"
                (self.keep / f"{name}.txt").write_text(f"{what}\n{path}\n{media_type}\n")
                (self.keep / f"{name}.bin").write_bytes(body)


def bench(server: Server, count: int, keep: Path | None) -> bool:
    tally = Tally(server, keep)

    @seed(0)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(uploads())
    def mutated(upload: tuple[str, str, bytes, str]) -> None:
        tally.send(upload)

    server.serves()
    before, began = server.resources(), time.monotonic()
    mutated()
    seconds, after, serves = time.monotonic() - began, server.resources(), server.serves()
    sys.stdout.write("| what was mutated | sent | answers |\n|---|---|---|\n")
    for what, found in sorted(tally.answers.items()):
        told = ", ".join(f"{status} x {times}" for status, times in sorted(found.items()))
        sys.stdout.write(f"| {what} | {found.total()} | {told} |\n")
    total = sum((found for found in tally.answers.values()), Counter[str]())
    told = ", ".join(f"{status} x {times}" for status, times in sorted(total.items()))
    sys.stdout.write(
        f"\n{total.total()} uploads in {seconds:.0f} s: {told}. 5xx or no answer: {tally.faults}.\n"
        f"Memory {before[0]:.0f} MiB before, {after[0]:.0f} after; file descriptors {before[1]} and {after[1]}. "
        f"Still serving: {'yes' if serves else 'NO'}.\n"
    )
    return serves and not tally.faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--model-repository", type=Path)
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    with serving(arguments.model_repository) as server:
        return 0 if bench(server, arguments.count, arguments.keep) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What a server does with requests nobody should send: python -m bench.malformed [--model-repository DIR] [--rounds N]

Starts the real server on loopback, sends every kind of malformed request several times, each one different, and prints
a table of what came back, with the server's memory and file descriptors before and after every round. Exits with 1 if
any answer was a 5xx or not a problem document, or if the server no longer serves. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

PROBLEM = "application/problem+json"
CLOSED = "closed"
JSON = {"Content-Type": "application/json"}
Request = dict[str, Any]
Sent = Request | bytes
"""Arguments of httpx.Client.request, or bytes for the wire."""
Kind = Callable[[random.Random], Sent]


def picture(rng: random.Random, kind: str = "PNG", size: tuple[int, int] = (96, 64)) -> bytes:
    levels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (*size[::-1], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(levels).save(out, kind)
    return out.getvalue()


def mask(level: int, size: tuple[int, int] = (96, 64)) -> bytes:
    out = io.BytesIO()
    Image.new("L", size, level).save(out, "PNG")
    return out.getvalue()


def post(task: str = "depth", query: dict[str, Any] | None = None, **files: bytes) -> Request:
    parts = {name: (f"{name}.png", data) for name, data in files.items()}
    return {"method": "POST", "url": f"/{task}", "files": parts, "params": query or {}}


def with_options(**options: Callable[[random.Random], object]) -> Kind:
    def made(rng: random.Random) -> Sent:
        return post(query={name: value(rng) for name, value in options.items()}, image=picture(rng))

    return made


def with_picture(spoil: Callable[[random.Random], bytes]) -> Kind:
    def made(rng: random.Random) -> Sent:
        data = spoil(rng)
        if rng.random() < 0.5:
            return {"method": "POST", "url": "/depth", "json": {"image": base64.b64encode(data).decode()}}
        return post(image=data)

    return made


def with_body(body: Callable[[random.Random], bytes], headers: dict[str, str]) -> Kind:
    return lambda rng: {"method": "POST", "url": "/depth", "content": body(rng), "headers": headers}


def png_bomb(rng: random.Random) -> bytes:
    """A few bytes that promise gigapixels."""
    edge = rng.randrange(10_000, 2**31)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", edge, edge, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def flat_bomb(rng: random.Random) -> bytes:
    """A well-formed picture of one colour: 64 MP in about 100 KB."""
    out = io.BytesIO()
    Image.new("1", (8000, 8000), rng.randrange(2)).save(out, "PNG")
    return out.getvalue()


def gif_bomb(rng: random.Random) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", 65535, rng.randrange(60000, 65536), 0, 0, 0) + rng.randbytes(100)


def cut(rng: random.Random) -> bytes:
    whole = picture(rng, rng.choice(["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"]))
    return whole[: rng.randrange(1, len(whole) * 3 // 4)]


def flipped(rng: random.Random) -> bytes:
    whole = bytearray(picture(rng, "PNG"))
    for _ in range(50):
        whole[rng.randrange(30, len(whole))] ^= 1 << rng.randrange(8)
    return bytes(whole)


def other_type(rng: random.Random) -> bytes:
    starts = [b"%PDF-1.7", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"PK\3\4", b"\x7fELF", b"text"]
    return rng.choice(starts) + bytes(9)


def mismatched(rng: random.Random) -> Sent:
    odd = (rng.randrange(2, 90), rng.randrange(2, 60))
    if rng.random() < 0.5:
        return post("flow", image=picture(rng), next_image=picture(rng, size=odd))
    return post("amodal", image=picture(rng), mask=mask(255, odd))


def missing(rng: random.Random) -> Sent:
    return rng.choice(
        [
            post("flow", image=picture(rng)),
            post("flow", next_image=picture(rng)),
            post("amodal", image=picture(rng)),
            post("depth", picture=picture(rng)),
            post("depth", image=picture(rng), mask=mask(255)),
            {"method": "POST", "url": "/depth", "json": {}},
        ]
    )


def bad_json(rng: random.Random) -> bytes:
    image = base64.b64encode(picture(rng, size=(8, 8))).decode()
    return rng.choice(
        [
            b"",
            b"{",
            b"[]",
            b"null",
            rng.randbytes(40),
            b"[" * 200_000,
            b'{"image": NaN}',
            b'{"image": 1' + b"0" * 9000 + b"}",
            b'{"image": "\\ud800"}',
            json.dumps({"image": [image]}).encode(),
            json.dumps({"image": "data:image/png;base64," + image}).encode(),
            json.dumps({"image": image, "steps": {"deep": [1]}}).encode(),
            json.dumps({"image": image, "steps": None}).encode(),
            json.dumps({"image": image, "\ud800": 1}).encode(),
        ]
    )


def bad_multipart(rng: random.Random) -> bytes:
    part = (
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        + picture(rng, size=(8, 8))
        + b"\r\n"
    )
    return rng.choice(
        [
            b"",
            rng.randbytes(500),
            part,
            part * 9 + b"--x--\r\n",
            part.replace(b"form-data; name", b"form-data; nom") + b"--x--",
            part.replace(b"\r\n\r\n", b"\r\nX-Long: " + b"y" * 200_000 + b"\r\n\r\n", 1) + b"--x--",
            b"--x\r\n\r\n" * 500 + b"--x--",
            b'--x\r\nContent-Disposition: form-data; name="steps"\r\n\r\n' + b"1" * 100_000 + b"\r\n--x--",
            part + b'--x\r\nContent-Disposition: form-data; name="steps"\r\n\r\n\xff\xfe\r\n--x--\r\n',
        ]
    )


def wire(*lines: str, body: bytes = b"") -> bytes:
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def head(*headers: str) -> tuple[str, ...]:
    return ("POST /depth HTTP/1.1", "Host: saccade", "Content-Type: application/json", *headers)


def lying_length(rng: random.Random) -> Sent:
    length = rng.choice([1, 10**6, 10**12, 10**30])
    return wire(*head(f"Content-Length: {length}", "Connection: close"), body=b'{"image": ""}')


def broken_http(rng: random.Random) -> Sent:
    return rng.choice(
        [
            rng.randbytes(300) + b"\r\n\r\n",
            wire(*head("Content-Length: -5")),
            wire(*head("Content-Length: many")),
            wire(*head("Transfer-Encoding: chunked"), body=b"zz\r\n"),
            wire(*head("X-Long: " + "y" * 300_000)),
            wire("GET /\x00 HTTP/1.1", "Host: saccade"),
            wire(*head("Transfer-Encoding: chunked", "Connection: close"), body=b"1\r\n{\r\n"),
        ]
    )


def too_heavy(rng: random.Random) -> bytes:
    return picture(rng, size=(8, 8)) + bytes(33 * 2**20)


def endless(_: random.Random) -> Sent:
    def chunks() -> Iterator[bytes]:
        for _ in range(4000):
            yield bytes(65536)

    return {"method": "POST", "url": "/depth", "content": chunks(), "headers": JSON}


def impossible(rng: random.Random) -> Sent:
    query: dict[str, Any] = rng.choice(
        [
            {"render": "object"},
            {"format": "flo"},
            {"output_uncertainty": "true", "ensemble_size": "1"},
            {"output_uncertainty": "true", "ensemble_size": "2", "format": "png"},
            {"render": "color", "format": "npy"},
            {"format": "png", "encoding": "npy"},
            {"steps": ["1", "2"]},
            {"spacing": "leading", "timestep_spacing": "trailing"},
        ]
    )
    if rng.random() < 0.3:
        return post("flow", {"reduction": "aligned_median"}, image=picture(rng), next_image=picture(rng))
    return post(query=query, image=picture(rng))


def not_allowed(rng: random.Random) -> Sent:
    path = rng.choice(["/depth", "/flow", "/amodal", "/livez"])
    return {"method": rng.choice(["PUT", "DELETE", "PATCH", "OPTIONS"]), "url": path}


def nowhere(rng: random.Random) -> Sent:
    path = rng.choice(["/Depth", "/depth/", "/../etc/passwd", "/%2e%2e/", "/depth%00", "/v1/depth", "/static/x"])
    return {"method": rng.choice(["GET", "POST"]), "url": path}


def anything(rng: random.Random) -> object:
    return rng.choice(["", "many", "1e3", "0x10", "-1", "0", "9" * 23, "1.5", "\u0663", "nan", "true\n"])


KINDS: dict[str, tuple[Kind, int]] = {
    "decompression bomb, PNG header": (with_picture(png_bomb), 12),
    "decompression bomb, flat 64 MP": (with_picture(flat_bomb), 4),
    "decompression bomb, GIF header": (with_picture(gif_bomb), 6),
    "file cut short": (with_picture(cut), 24),
    "file with flipped bits": (with_picture(flipped), 12),
    "another file type": (with_picture(other_type), 10),
    "random bytes": (with_picture(lambda rng: rng.randbytes(rng.randrange(1, 5000))), 10),
    "empty file": (with_picture(lambda _: b""), 4),
    "one pixel, or a ribbon": (with_picture(lambda rng: picture(rng, size=rng.choice([(1, 1), (2000, 3)]))), 6),
    "file over 32 MiB": (with_picture(too_heavy), 3),
    "sizes that differ": (mismatched, 10),
    "empty mask": (lambda rng: post("amodal", image=picture(rng), mask=mask(0)), 4),
    "picture missing or misnamed": (missing, 12),
    "steps": (with_options(steps=anything), 8),
    "ensemble_size": (with_options(ensemble_size=anything), 8),
    "seed": (with_options(seed=lambda rng: rng.choice(["", "x", -1, 2**63, 2**80])), 6),
    "processing_resolution": (with_options(processing_resolution=lambda rng: rng.choice(["", -1, 5000, 10**9])), 6),
    "unknown choice": (with_options(reduction=anything, spacing=anything), 6),
    "unknown option": (lambda rng: post(query={f"step{rng.randrange(99)}": 1}, image=picture(rng)), 6),
    "impossible combination": (impossible, 14),
    "JSON that is none, or not ours": (with_body(bad_json, JSON), 24),
    "multipart that is none": (with_body(bad_multipart, {"Content-Type": "multipart/form-data; boundary=x"}), 18),
    "multipart without boundary": (with_body(bad_multipart, {"Content-Type": "multipart/form-data"}), 4),
    "unread content type": (with_body(picture, {"Content-Type": "image/png"}), 4),
    "compressed body": (with_body(bad_json, JSON | {"Content-Encoding": "gzip"}), 4),
    "unacceptable Accept": (
        lambda rng: post(image=picture(rng)) | {"headers": {"Accept": rng.choice(["text/html", "image/webp", ";;"])}},
        6,
    ),
    "method not allowed": (not_allowed, 8),
    "no such path": (nowhere, 8),
    "endless chunked body": (endless, 2),
    "Content-Length that lies": (lying_length, 10),
    "broken HTTP": (broken_http, 14),
}
WIRE = ("Content-Length that lies", "broken HTTP")


class Server:
    def __init__(self, popen: subprocess.Popen[str], url: str) -> None:
        self.popen, self.url = popen, url
        self.client = httpx.Client(base_url=url, timeout=60)

    def send(self, sent: Sent) -> tuple[str, str]:
        """Status (or `closed`) and content type."""
        if isinstance(sent, bytes):
            return self._raw(sent)
        try:
            response = self.client.request(**sent)
        except httpx.TransportError:
            return CLOSED, ""
        return str(response.status_code), response.headers.get("content-type", "")

    def _raw(self, data: bytes) -> tuple[str, str]:
        received = b""
        with suppress(OSError), socket.create_connection(("127.0.0.1", int(self.url.rsplit(":", 1)[1])), 20) as wire:
            with suppress(OSError):
                wire.sendall(data)
                wire.shutdown(socket.SHUT_WR)
            while chunk := wire.recv(65536):
                received += chunk
        found = re.match(rb"HTTP/1\.1 (\d+)", received)
        kind = re.search(rb"content-type: ([^\r\n]+)", received, re.IGNORECASE)
        return found[1].decode() if found else CLOSED, kind[1].decode() if kind else ""

    def serves(self) -> bool:
        good = post(query={"steps": 1, "format": "npy"}, image=picture(random.Random(0)))
        return self.send(good)[0] == "200"

    def resources(self) -> tuple[float, int]:
        """Resident memory in MiB and open file descriptors; idle connections of ours are closed first."""
        self.client.close()
        self.client = httpx.Client(base_url=self.url, timeout=60)
        time.sleep(1.0)
        status = Path(f"/proc/{self.popen.pid}/status").read_text()
        resident = re.search(r"VmRSS:\s+(\d+) kB", status)
        return int(resident[1]) / 1024 if resident else 0.0, len(os.listdir(f"/proc/{self.popen.pid}/fd"))


@contextmanager
def serving(repository: Path | None) -> Iterator[Server]:
    command = [sys.executable, "-m", "saccade", "serve", "--port", "0", "--host", "127.0.0.1"]
    command += [] if repository is None else ["--model-repository", str(repository)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as popen:
        try:
            yield Server(popen, _address(popen))
        finally:
            popen.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                popen.wait(30)
            popen.kill()


def _address(popen: subprocess.Popen[str]) -> str:
    """Read the log until the server says that it is up; later lines are left to a thread."""
    log, found = popen.stderr, ""
    if log is None:
        raise RuntimeError("the server has no log")
    for line in log:
        found = found or next(iter(re.findall(r"http://[\d.]+:\d+", line)), "")
        if "startup complete" in line:
            threading.Thread(target=log.read, daemon=True).start()
            return found
    raise RuntimeError("the server did not start")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-repository", type=Path)
    parser.add_argument("--rounds", type=int, default=3, help="send the whole list this many times")
    arguments = parser.parse_args()
    with serving(arguments.model_repository) as server:
        return 0 if report(server, arguments.rounds) else 1


def report(server: Server, rounds: int) -> bool:
    warm_up(server)
    resources, began, faults = [server.resources()], time.monotonic(), 0
    answers: dict[str, Counter[str]] = {name: Counter() for name in KINDS}
    for number in range(rounds):
        faults += sum(send_all(server, number, name, answers[name]) for name in KINDS)
        resources.append(server.resources())
    seconds, serves = time.monotonic() - began, server.serves()
    sys.stdout.write("| kind | sent | answers |\n|---|---|---|\n")
    for name, found in answers.items():
        told = ", ".join(f"{status} x {times}" for status, times in sorted(found.items()))
        sys.stdout.write(f"| {name} | {found.total()} | {told} |\n")
    memory = ", ".join(f"{resident:.0f}" for resident, _ in resources)
    descriptors = ", ".join(str(count) for _, count in resources)
    sys.stdout.write(
        f"\n{sum(found.total() for found in answers.values())} requests in {seconds:.0f} s. "
        f"Answers that were 5xx, accepted, or no problem document: {faults}.\n"
        f"Before, and after each round: memory {memory} MiB; file descriptors {descriptors}. "
        f"Still serving: {'yes' if serves else 'NO'}.\n"
    )
    return serves and not faults


def send_all(server: Server, number: int, name: str, found: Counter[str]) -> int:
    """One round of one kind; returns the faults."""
    kind, count = KINDS[name]
    rng = random.Random(f"{name} {number}")
    answers = [server.send(kind(rng)) for _ in range(count)]
    found.update(status for status, _ in answers)
    return sum(is_fault(name, *answer) for answer in answers)


def warm_up(server: Server) -> None:
    """Good requests, and the largest refusals, so that buffers have grown before memory is measured."""
    for _ in range(5):
        server.serves()
    for name in ("file over 32 MiB", "decompression bomb, flat 64 MP"):
        server.send(KINDS[name][0](random.Random(1)))


def is_fault(name: str, status: str, content_type: str) -> bool:
    """Broken HTTP never reaches the application: the HTTP server answers it in plain text, or closes."""
    if name in WIRE:
        return status.startswith(("2", "5"))
    if name == "file with flipped bits" and status == "200":
        return False  # the flips may spare what the decoder checks
    return not status.startswith("4") or content_type != PROBLEM


if __name__ == "__main__":
    sys.exit(main())

"""Serves the page's files, with the headers that keep it to itself."""

from __future__ import annotations

import hashlib
import mimetypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from server.negotiation import parse_accept, quality

FOLDER = Path(__file__).parent / "files"
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
TYPES = {".js": "text/javascript", ".webmanifest": "application/manifest+json"}


@dataclass(frozen=True)
class File:
    data: bytes
    media_type: str
    tag: str


@cache
def files() -> dict[str, File]:
    """Path below /page/ -> file. What is not in here is not served, whatever the path says."""
    paths = (path for path in sorted(FOLDER.rglob("*")) if path.is_file())
    return {path.relative_to(FOLDER).as_posix(): _file(path) for path in paths}


def _file(path: Path) -> File:
    data = path.read_bytes()
    kind = TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return File(data, kind, f'"{hashlib.sha256(data).hexdigest()[:32]}"')


def wants_page(request: Request) -> bool:
    """True for a browser: it names HTML first. `*/*` gets what it always got, the JSON index."""
    ranges = parse_accept(", ".join(request.headers.getlist("accept")))
    return quality(ranges, "text/html") > quality(ranges, "application/json")


def index(request: Request) -> Response:
    return _send(request, files()["index.html"])


async def file(request: Request, name: str) -> Response:
    found = files().get(name)
    if found is None:
        raise HTTPException(404)
    return _send(request, found)


def _send(request: Request, found: File) -> Response:
    headers = {**HEADERS, "ETag": found.tag, "Vary": "Accept"}
    if found.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(found.data, headers=headers, media_type=found.media_type)


def router() -> APIRouter:
    made = APIRouter()
    made.add_api_route("/page/{name:path}", file, methods=["GET", "HEAD"], include_in_schema=False)
    return made

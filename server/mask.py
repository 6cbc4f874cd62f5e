"""POST /mask: an object's visible part from a few clicks, as `POST /amodal` wants it."""

from __future__ import annotations

import asyncio
import threading
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
from fastapi import Request, Response

from saccade import formats
from saccade.errors import InvalidInput, NotInstalled
from saccade.formats.pictures import open_picture, refusing
from server import forms, hints, problems
from server.admission import PIXEL_BYTES, UNITS_PER_MEGAPIXEL, Overloaded
from server.hints import Hints
from server.problems import Problem
from server.service import Service, while_connected

UNITS = 12.0


def installed() -> bool:
    """Whether OpenCV is here: it is large, so a lean server has none."""
    return find_spec("cv2") is not None


async def answer(request: Request) -> Response:
    """PNG [H, W], 255 where the object is."""
    if not installed():
        raise NotInstalled("outlines are found by OpenCV, which is not installed here: pip install 'saccade[video]'")
    house = cast(Service, request.app.state.service)
    form = await _form(house, request)
    for name in request.query_params:
        raise InvalidInput(f"{name[:64]!r} belongs into the body, not into the query", param=name[:64])
    found = hints.read(form.options)
    left = threading.Event()
    try:
        async with asyncio.timeout(house.settings.request_timeout_s):
            data = await while_connected(request.receive, _mask(house, form.pictures["image"], found, left))
    except TimeoutError as error:
        raise Problem(problems.TIMEOUT, "No mask within the time limit. Try again later.", retry_after_s=5) from error
    finally:
        left.set()
    return Response(data, media_type="image/png")


async def _form(house: Service, request: Request) -> forms.Form:
    try:
        async with asyncio.timeout(house.settings.request_timeout_s):
            return await forms.read(request, ("image",), house.settings.max_upload_bytes, house.in_thread)
    except TimeoutError as error:
        raise Problem(problems.SLOW_UPLOAD, "The body did not arrive in time. Send it faster, or smaller.") from error


async def _mask(house: Service, data: bytes, wanted: Hints, left: threading.Event) -> bytes:
    limit = house.settings.max_pixels

    def size() -> tuple[int, int]:
        with refusing("image"), open_picture(data, max_pixels=limit, param="image") as opened:
            return opened.height, opened.width

    def mask() -> bytes:
        from server.cutout import cut_out  # OpenCV is not small: a server that nobody asks for masks holds none

        picture = formats.read_picture(data, max_pixels=limit)
        return formats.write_png(cut_out(picture, wanted, left.is_set).astype(np.uint8) * np.uint8(255))

    height, width = await house.in_thread(size)
    try:
        pixels = height * width
        with house.admission.admit(UNITS + UNITS_PER_MEGAPIXEL * pixels / 1e6), house.guard.hold(PIXEL_BYTES * pixels):
            return await house.in_thread(mask)
    except Overloaded as error:
        raise Problem(
            problems.OVERLOADED, "The queue is full. Try again later.", retry_after_s=error.retry_after_s
        ) from error


def paths() -> dict[str, Any]:
    """For the OpenAPI document."""
    refusals = (
        *(problems.MALFORMED, problems.SLOW_UPLOAD, problems.TOO_LARGE, problems.UNSUPPORTED, problems.INVALID),
        *(problems.OVERLOADED, problems.INTERNAL, problems.NOT_INSTALLED, problems.UNAVAILABLE),
    )
    mask = {"description": "255 where the object is.", "content": {"image/png": {"schema": {"type": "string"}}}}
    answers = {str(kind.status): {"$ref": f"#/components/responses/{kind.slug}"} for kind in refusals}
    operation = {
        "operationId": "mask",
        "summary": "The visible part of an object, from a few clicks",
        "description": "By GrabCut, on a small copy of the picture: a start for the `mask` of /amodal. "
        "Give a point on the object, or a box around it, or both.",
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": _body(text=True), "application/json": _body(text=False)},
        },
        "responses": {"200": mask, **answers},
    }
    return {"/mask": {"post": operation}}


def _body(text: bool) -> dict[str, Any]:
    image = {"type": "string", "format": "binary" if text else "byte", "description": "The picture."}
    return {
        "schema": {
            "type": "object",
            "required": ["image"],
            "properties": {"image": image, **hints.schema(text)},
            "additionalProperties": False,
        }
    }

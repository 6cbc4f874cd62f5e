"""A request's body: pictures and options from multipart/form-data, or from JSON with base64 members."""

from __future__ import annotations

import base64
import binascii
import json
import string
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from saccade.errors import InvalidInput
from server import problems
from server.options import Given
from server.problems import Problem

MAX_FILES = 4
MAX_FIELDS = 40
MAX_FIELD_BYTES = 2**14
MAX_JSON_SIGNS = 4 * MAX_FIELDS
T = TypeVar("T")
InThread = Callable[[Callable[[], T]], Awaitable[T]]


@dataclass
class Form:
    """`pictures`: name -> file bytes. `options`: whatever else came."""

    pictures: dict[str, bytes] = field(default_factory=dict)
    options: list[Given] = field(default_factory=list)

    def add(self, name: str, data: bytes, max_bytes: int) -> None:
        if name in self.pictures:
            raise InvalidInput(f"{name} is given twice; give it once", param=name)
        if len(data) > max_bytes:
            raise too_large(name, max_bytes)
        self.pictures[name] = data


def too_large(name: str, max_bytes: int) -> Problem:
    return Problem(
        problems.TOO_LARGE, f"{name} is larger than {max_bytes} bytes. Shrink it or compress it more.", param=name
    )


async def read(request: Request, names: tuple[str, ...], max_bytes: int, in_thread: InThread[Form]) -> Form:
    """The body's form, with a picture of at most `max_bytes` for every one of `names`.

    Raises Problem (400, 413, 415) or InvalidInput. `in_thread` runs what would keep the event loop busy.
    """
    _plain(request)
    kind = parse_options_header(request.headers.get("content-type"))[0]
    if kind == b"multipart/form-data":
        form = await _multipart(request, names, max_bytes)
    elif kind == b"application/json":
        body = await request.body()
        form = await in_thread(lambda: _json(body, names, max_bytes))
    else:
        raise Problem(
            problems.UNSUPPORTED, "Send multipart/form-data with file parts, or application/json with base64 members."
        )
    for name in names:
        if name not in form.pictures:
            raise InvalidInput(f"{name} is missing: send it as a file part, or in JSON as base64", param=name)
    return form


def _plain(request: Request) -> None:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Problem(problems.UNSUPPORTED, "A compressed body is not read. Send it without Content-Encoding.")


class _Parser(MultiPartParser):
    """Refuses a body that stops before its closing boundary; Starlette's would drop the unfinished part in silence."""

    ended = False

    def on_end(self) -> None:
        self.ended = True

    async def parse(self) -> FormData:
        parts = await super().parse()
        if not self.ended:
            for file in self._files_to_close_on_error:
                file.close()
            raise MultiPartException("The body stops before its closing boundary.")
        return parts


async def _multipart(request: Request, names: tuple[str, ...], max_bytes: int) -> Form:
    form = Form()
    try:
        async with aclosing(request.stream()) as stream:
            parts = await _Parser(
                request.headers, stream, max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES
            ).parse()
    except MultiPartException as error:
        raise Problem(
            problems.MALFORMED,
            f"{error.message.rstrip('.')}. Send pictures as file parts (with a filename), options as short fields.",
        ) from error
    except UnicodeError as error:
        raise Problem(
            problems.MALFORMED, "The charset of the Content-Type does not fit the fields. Leave it out and send UTF-8."
        ) from error
    try:
        for name, value in parts.multi_items():
            if isinstance(value, str):
                form.options.append(_text_field(name, value, names))
            else:
                await _file_part(form, name, value, names, max_bytes)
    finally:
        await parts.close()
    return form


def _text_field(name: str, value: str, names: tuple[str, ...]) -> Given:
    if name in names:
        raise InvalidInput(f"{name} must be a file part: with curl, -F {name}=@picture.jpg", param=name)
    return Given(name, value, True)


async def _file_part(form: Form, name: str, file: UploadFile, names: tuple[str, ...], max_bytes: int) -> None:
    if name not in names:
        raise InvalidInput(
            f"unexpected file {name[:64]!r}: this task takes {' and '.join(names)} as files, options as text fields",
            param=name[:64],
        )
    if (file.size or 0) > max_bytes:
        raise too_large(name, max_bytes)
    form.add(name, await file.read(), max_bytes)


def _json(body: bytes, names: tuple[str, ...], max_bytes: int) -> Form:
    form = Form()
    for name, value in _members(body):
        if name in names:
            form.add(name, _base64(name, value, max_bytes), max_bytes)
        else:
            form.options.append(Given(name, value, False))
            if len(form.options) > MAX_FIELDS:
                raise Problem(problems.MALFORMED, f"The object has more than {MAX_FIELDS} members.")
    return form


def _members(body: bytes) -> list[tuple[str, Any]]:
    """Members of the one object in the body, repeated ones too.

    Base64 has no brackets and no commas: a body of many is refused before it grows a hundredfold in memory.
    """
    if sum(map(body.count, (b"[", b"{", b","))) > MAX_JSON_SIGNS:
        raise Problem(problems.MALFORMED, f"The body must be one flat JSON object of at most {MAX_FIELDS} members.")
    try:
        parsed = json.loads(body, object_pairs_hook=_Members, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Problem(problems.MALFORMED, "The body is not valid JSON.") from error
    if not isinstance(parsed, _Members):
        raise InvalidInput("the JSON body must be one object with the pictures and options as members")
    return parsed


class _Members(list[tuple[str, Any]]):
    """A JSON object whose repeated names are not lost."""


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _base64(name: str, value: object, max_bytes: int) -> bytes:
    if not isinstance(value, str):
        raise InvalidInput(f"{name} must be a string of base64", param=name)
    try:
        compact = value.encode("ascii").translate(None, string.whitespace.encode())
        if len(compact) > 4 * -(-max_bytes // 3) + 4:
            raise too_large(name, max_bytes)
        return base64.b64decode(compact, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput(
            f"{name} is not base64; encode the file's bytes with + and / and = at the end, with no data: prefix",
            param=name,
        ) from error

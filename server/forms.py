"""A request's body: pictures and options from multipart/form-data, or from JSON with base64 members."""

from __future__ import annotations

import base64
import binascii
import json
import string
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from saccade import metres
from saccade.errors import InvalidInput
from server import problems
from server.options import Given
from server.problems import Problem

MAX_FILES = 4
MAX_FIELDS = 40
MAX_FIELD_BYTES = 2**14
MAX_POINTS_BYTES = 2**20
MAX_JSON_SIGNS = 4 * MAX_FIELDS
JSON_SIGNS_OF_POINTS = 4 * (metres.MAX_POINTS + 1)
VIDEO = "video"
LONG = (metres.PARAM,)
T = TypeVar("T")
InThread = Callable[[Callable[[], T]], Awaitable[T]]


@dataclass(frozen=True)
class Room:
    """What a form may hold beside one question: `frames` pictures of each name, a video (if `video`), and `bytes` of
    all of them together."""

    frames: int
    bytes: int
    video: bool


@dataclass
class Form:
    """`pictures`: name -> file bytes, of one question. `rows`: the same of several, where they came as a list or
    repeated. `video`: instead of pictures. `options`: whatever else came."""

    room: Room | None = None
    pictures: dict[str, bytes] = field(default_factory=dict)
    rows: dict[str, list[bytes]] = field(default_factory=dict)
    video: bytes | None = None
    options: list[Given] = field(default_factory=list)
    held: int = 0

    def names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Of what comes as a file."""
        return (*names, VIDEO) if self.room is not None and self.room.video else names

    def add(self, name: str, data: bytes, max_bytes: int) -> None:
        self.held += len(data)
        most = self.most(name, max_bytes)
        if len(data) > most:
            raise too_large(name, most)
        if name == VIDEO:
            if self.video is not None:
                raise InvalidInput("video is given twice; give it once", param=name)
            self.video = data
        elif name in self.pictures:
            self._add_another(name, data)
        else:
            self.pictures[name] = data

    def add_list(self, name: str, values: Iterable[bytes], max_bytes: int) -> None:
        """Pictures in a row, even if it is a row of one."""
        for data in values:
            self.add(name, data, max_bytes)
        if name in self.pictures:
            self.rows.setdefault(name, [self.pictures[name]])

    def most(self, name: str, max_bytes: int) -> int:
        """Bytes of the file `name`."""
        return self.room.bytes if name == VIDEO and self.room is not None else max_bytes

    def _add_another(self, name: str, data: bytes) -> None:
        if self.room is None:
            raise InvalidInput(f"{name} is given twice; give it once", param=name)
        row = self.rows.setdefault(name, [self.pictures[name]])
        if len(row) == self.room.frames:
            raise Problem(problems.TOO_LARGE, f"{name} is given more than {self.room.frames} times.", param=name)
        if self.held > self.room.bytes:
            raise Problem(problems.TOO_LARGE, f"The pictures take over {self.room.bytes} bytes in all.", param=name)
        row.append(data)

    def check(self, names: tuple[str, ...]) -> None:
        """Raise InvalidInput unless there is a picture for every one of `names`, or what stands for them."""
        if self.video is not None and self.pictures:
            raise InvalidInput("send a video or pictures, not both", param=VIDEO)
        if self.video is not None:
            return
        needed = names if not self.rows else tuple(name for name in names if name != "next_image")
        for name in needed:
            if name not in self.pictures:
                instead = ", or a video" if VIDEO in self.names(names) else ""
                told = f"{name} is missing: send it as a file part, or in JSON as base64{instead}"
                raise InvalidInput(told, param=name)
        if self.rows:
            self._check_rows(names)

    def _check_rows(self, names: tuple[str, ...]) -> None:
        if "next_image" in self.pictures:
            raise InvalidInput("frames go into image, one after the other: leave next_image out", param="next_image")
        if "next_image" in names and len(self.rows.get("image", [])) < 2:
            raise InvalidInput("flow needs two frames or more", param="image")
        # In the order of `names`, as the sizes of the first are what counts; one alone is a row of one.
        self.rows = {name: self.rows.get(name, [self.pictures[name]]) for name in names if name in self.pictures}
        counts = {name: len(row) for name, row in self.rows.items()}
        if len(set(counts.values())) > 1:
            told = " and ".join(f"{count} of {name}" for name, count in counts.items())
            raise InvalidInput(f"each image needs its own: there are {told}", param=names[-1])


def too_large(name: str, max_bytes: int) -> Problem:
    return Problem(
        problems.TOO_LARGE, f"{name} is larger than {max_bytes} bytes. Shrink it or compress it more.", param=name
    )


async def read(
    request: Request, names: tuple[str, ...], max_bytes: int, in_thread: InThread[Form], room: Room | None = None
) -> Form:
    """The body's form, with a picture of at most `max_bytes` for every one of `names`; with `room`, for several.

    Raises Problem (400, 413, 415) or InvalidInput. `in_thread` runs what would keep the event loop busy.
    """
    _plain(request)
    kind = parse_options_header(request.headers.get("content-type"))[0]
    if kind == b"multipart/form-data":
        form = await _multipart(request, names, max_bytes, room)
    elif kind == b"application/json":
        body = await request.body()
        form = await in_thread(lambda: _json(body, names, max_bytes, room))
    else:
        raise Problem(
            problems.UNSUPPORTED, "Send multipart/form-data with file parts, or application/json with base64 members."
        )
    form.check(names)
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


async def _multipart(request: Request, names: tuple[str, ...], max_bytes: int, room: Room | None) -> Form:
    form = Form(room)
    files = MAX_FILES if room is None else MAX_FILES + room.frames * len(names)
    most = MAX_FIELD_BYTES if room is None else MAX_POINTS_BYTES
    try:
        async with aclosing(request.stream()) as stream:
            parts = await _Parser(
                request.headers, stream, max_files=files, max_fields=MAX_FIELDS, max_part_size=most
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
                form.options.append(_text_field(name, value, form.names(names)))
            elif room is not None and name in LONG:
                form.options.append(Given(name, await _text_file(name, value), True))
            else:
                await _file_part(form, name, value, form.names(names), max_bytes)
    finally:
        await parts.close()
    return form


def _text_field(name: str, value: str, names: tuple[str, ...]) -> Given:
    if name in names:
        raise InvalidInput(f"{name} must be a file part: with curl, -F {name}=@picture.jpg", param=name)
    if name not in LONG and len(value) > MAX_FIELD_BYTES:
        raise Problem(problems.MALFORMED, f"A field has more than {MAX_FIELD_BYTES} bytes. Send options as short ones.")
    return Given(name, value, True)


async def _text_file(name: str, file: UploadFile) -> str:
    if (file.size or 0) > MAX_POINTS_BYTES:
        raise too_large(name, MAX_POINTS_BYTES)
    try:
        return (await file.read()).decode()
    except UnicodeError as error:
        raise InvalidInput(f"{name} must be JSON in UTF-8", param=name) from error


async def _file_part(form: Form, name: str, file: UploadFile, names: tuple[str, ...], max_bytes: int) -> None:
    if name not in names:
        raise InvalidInput(
            f"unexpected file {name[:64]!r}: this task takes {' and '.join(names)} as files, options as text fields",
            param=name[:64],
        )
    most = form.most(name, max_bytes)
    if (file.size or 0) > most:
        raise too_large(name, most)
    form.add(name, await file.read(), max_bytes)


def _json(body: bytes, names: tuple[str, ...], max_bytes: int, room: Room | None) -> Form:
    form = Form(room)
    for name, value in _members(body, _most_signs(body, room)):
        if name in form.names(names):
            if name in form.pictures:
                raise InvalidInput(f"{name} is given twice; give it once, as a list if there are several", param=name)
            most = form.most(name, max_bytes)
            if isinstance(value, list) and not isinstance(value, _Members) and room is not None and name != VIDEO:
                form.add_list(name, (_base64(name, one, most) for one in value), max_bytes)
            else:
                form.add(name, _base64(name, value, most), max_bytes)
        else:
            form.options.append(Given(name, value, False))
            if len(form.options) > MAX_FIELDS:
                raise Problem(problems.MALFORMED, f"The object has more than {MAX_FIELDS} members.")
    return form


def _most_signs(body: bytes, room: Room | None) -> int:
    """Lists of pictures have few brackets and commas; those that need many are known by name."""
    if room is None:
        return MAX_JSON_SIGNS
    points = JSON_SIGNS_OF_POINTS if b'"' + metres.PARAM.encode() + b'"' in body else 0
    return MAX_JSON_SIGNS + 2 * room.frames + points


def _members(body: bytes, signs: int) -> list[tuple[str, Any]]:
    """Members of the one object in the body, repeated ones too.

    Base64 has no brackets and no commas: a body of many is refused before it grows a hundredfold in memory.
    """
    if sum(map(body.count, (b"[", b"{", b","))) > signs:
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

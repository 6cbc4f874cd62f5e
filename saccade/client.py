"""Ask a Saccade server: `Client`, and `AsyncClient` with the same methods to await.

    with Client("http://127.0.0.1:8080") as client:
        answer = client.depth("photo.jpg", steps=10, ensemble_size=5)
        answer.prediction  # [H, W] float32, 0 nearest, 1 farthest

What goes wrong is one of `saccade.errors`.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self, Unpack

import httpx
import numpy as np
from pydantic import ValidationError

from saccade import __version__
from saccade.calls import Choices, ImageLike, to_bytes
from saccade.card import Card
from saccade.errors import BackendUnavailable, InvalidInput, ServerError
from saccade.formats import read_npy
from saccade.formats.pictures import open_picture
from saccade.pipeline import Answer, Resolved
from saccade.tasks import TaskName

DEFAULT_URL = "http://127.0.0.1:8080"
MAX_ANSWER_PIXELS = 2**28
_BUSY = (429, 503)


@dataclass(frozen=True)
class Retries:
    """How long to go on asking a server that says it is busy (429, 503). Answers depend on nothing but the request, so
    asking again is always safe. `most` further tries; a Retry-After over `longest_wait_s` ends them."""

    most: int = 4
    longest_wait_s: float = 30.0

    def wait_s(self, response: httpx.Response, tried: int) -> float | None:
        """Seconds until the next try after `tried` of them, or None to stop."""
        if response.status_code not in _BUSY or tried >= self.most:
            return None
        wait_s = _retry_after_s(response.headers.get("retry-after"))
        if wait_s is None:
            wait_s = min(0.5 * 2**tried, self.longest_wait_s)
        return wait_s if wait_s <= self.longest_wait_s else None


RETRIES = Retries()


class _Shared:
    """Requests and answers, the same for both clients."""

    _http: httpx.Client | httpx.AsyncClient

    def __init__(self, url: str, timeout: float | None, retries: Retries) -> None:
        self.url = url.rstrip("/")
        self._timeout = timeout
        self._retries = retries

    def _ask_for(self, task: TaskName, pictures: Mapping[str, ImageLike], choices: Choices) -> httpx.Request:
        if unknown := choices.keys() - Choices.__annotations__.keys():
            raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
        files = {name: (name, to_bytes(image, name), "application/octet-stream") for name, image in pictures.items()}
        fields = {name: _text(value) for name, value in choices.items() if value is not None}
        return self._build("POST", f"/{task}", files=files, data=fields | {"format": "json", "encoding": "npy"})

    def _build(self, method: str, path: str, **body: Any) -> httpx.Request:
        with self._reaching():
            return self._http.build_request(method, self.url + path, **body)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn what goes wrong on the way into our errors."""
        try:
            yield
        except httpx.ReadTimeout as error:
            raise BackendUnavailable(f"{self.url} did not answer within {self._timeout} s") from error
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise InvalidInput(f"not a URL of a server: {self.url}", param="url") from error
        except httpx.RequestError as error:
            raise BackendUnavailable(f"cannot reach {self.url}: {error or type(error).__name__}") from error


class Client(_Shared):
    """Asks and waits. May be used by several threads.

    `timeout`: seconds without a sign of the server, None for ever. `retries`: when it is busy. `headers`: sent with
    every request. Raises ServerError with the server's problem document, BackendUnavailable if it cannot be reached,
    InvalidInput for a picture that cannot be sent.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout: float | None = 300.0,
        retries: Retries = RETRIES,
        headers: Mapping[str, str] | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(url, timeout, retries)
        self._http: httpx.Client = httpx.Client(**_settings(timeout, headers), transport=transport)

    def depth(self, image: ImageLike, **choices: Unpack[Choices]) -> Answer:
        """How far everything is: prediction [H, W] float32, 0 nearest, 1 farthest."""
        return _answer(self._send(self._ask_for("depth", {"image": image}, choices)))

    def flow(self, image: ImageLike, next_image: ImageLike, **choices: Unpack[Choices]) -> Answer:
        """Where everything moved: prediction [H, W, 2] float32 in pixels, u right and v down."""
        return _answer(self._send(self._ask_for("flow", {"image": image, "next_image": next_image}, choices)))

    def amodal(self, image: ImageLike, mask: ImageLike, **choices: Unpack[Choices]) -> Answer:
        """The whole of the object whose visible part is `mask`: prediction [H, W] bool."""
        return _answer(self._send(self._ask_for("amodal", {"image": image, "mask": mask}, choices)))

    def models(self) -> list[Card]:
        """The cards of what the server runs."""
        return _cards(self._send(self._build("GET", "/models")))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, request: httpx.Request) -> httpx.Response:
        tried = 0
        while True:
            with self._reaching():
                response = self._http.send(request)
            wait_s = self._retries.wait_s(response, tried)
            if wait_s is None:
                return response
            time.sleep(wait_s)
            tried += 1


class AsyncClient(_Shared):
    """`Client` to await; cancelling a call closes its connection, and the server drops its work."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout: float | None = 300.0,
        retries: Retries = RETRIES,
        headers: Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(url, timeout, retries)
        self._http: httpx.AsyncClient = httpx.AsyncClient(**_settings(timeout, headers), transport=transport)

    async def depth(self, image: ImageLike, **choices: Unpack[Choices]) -> Answer:
        """As `Client.depth`."""
        return await self._ask("depth", {"image": image}, choices)

    async def flow(self, image: ImageLike, next_image: ImageLike, **choices: Unpack[Choices]) -> Answer:
        """As `Client.flow`."""
        return await self._ask("flow", {"image": image, "next_image": next_image}, choices)

    async def amodal(self, image: ImageLike, mask: ImageLike, **choices: Unpack[Choices]) -> Answer:
        """As `Client.amodal`."""
        return await self._ask("amodal", {"image": image, "mask": mask}, choices)

    async def models(self) -> list[Card]:
        """As `Client.models`."""
        return _cards(await self._send(self._build("GET", "/models")))

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _ask(self, task: TaskName, pictures: Mapping[str, ImageLike], choices: Choices) -> Answer:
        """Files are read and arrays coded beside the event loop, not on it."""
        request = await asyncio.to_thread(self._ask_for, task, pictures, choices)
        return await asyncio.to_thread(_answer, await self._send(request))

    async def _send(self, request: httpx.Request) -> httpx.Response:
        tried = 0
        while True:
            with self._reaching():
                response = await self._http.send(request)
            wait_s = self._retries.wait_s(response, tried)
            if wait_s is None:
                return response
            await asyncio.sleep(wait_s)
            tried += 1


def _settings(timeout: float | None, headers: Mapping[str, str] | None) -> dict[str, Any]:
    named = {"user-agent": f"saccade/{__version__}", "accept": "application/json"}
    return {"timeout": httpx.Timeout(timeout, connect=10.0), "headers": named | dict(headers or {})}


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _retry_after_s(header: str | None) -> float | None:
    """Seconds, or an HTTP date (RFC 9110, section 10.2.3)."""
    if header is None:
        return None
    if header.isdigit():
        return float(header)
    try:
        at = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (at - datetime.now(UTC)).total_seconds()) if at.tzinfo else None


def _document(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of an answer. Raises ServerError for a refusal, and for what no Saccade server says."""
    try:
        document = response.json()
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise _strange(response)
    if not response.is_success:
        raise ServerError(response.status_code, document)
    return document


def _strange(response: httpx.Response) -> ServerError:
    said = response.reason_phrase if not response.is_success else "Unexpected answer"
    return ServerError(
        response.status_code,
        {"title": said, "detail": f"{response.request.url} does not answer as a Saccade server of this version does"},
    )


def _answer(response: httpx.Response) -> Answer:
    document = _document(response)
    try:
        task: TaskName = document["task"]
        prediction = _array(document["prediction"])
        uncertainty, completed = document["uncertainty"], document["completed"]
        return Answer(
            task,
            prediction.astype(np.bool_) if task == "amodal" else prediction,
            None if uncertainty is None else _array(uncertainty),
            None if completed is None else _rgba(completed),
            Resolved(**document["options"]),
            document["model"],
            document["digest"],
            document["timings_ms"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _strange(response) from error


def _array(coded: Mapping[str, Any]) -> Any:
    return read_npy(base64.b64decode(coded["data"], validate=True))


def _rgba(coded: Mapping[str, Any]) -> Any:
    data = base64.b64decode(coded["data"], validate=True)
    return np.asarray(open_picture(data, max_pixels=MAX_ANSWER_PIXELS, param="completed").convert("RGBA"))


def _cards(response: httpx.Response) -> list[Card]:
    document = _document(response)
    try:
        return [Card.model_validate(card) for card in document["models"]]
    except (KeyError, TypeError, ValidationError) as error:
        raise _strange(response) from error

"""What both clients ask with: requests, headers, and the patience with a server that is busy."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from saccade import __version__
from saccade.calls import Choices, ImageLike, Known, points_text, to_bytes
from saccade.errors import BackendUnavailable, InvalidInput
from saccade.later import Job
from saccade.tasks import TaskName

DEFAULT_URL = "http://127.0.0.1:8080"
WATCHING = {"accept": "text/event-stream"}
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


class Shared:
    """Requests and answers, the same for both clients."""

    _http: httpx.Client | httpx.AsyncClient

    def __init__(self, url: str, timeout: float | None, retries: Retries) -> None:
        self.url = url.rstrip("/")
        self._timeout = timeout
        self._retries = retries

    def _ask_for(
        self,
        task: TaskName,
        pictures: Mapping[str, ImageLike] | Sequence[tuple[str, ImageLike]],
        choices: Choices,
        more: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Request:
        if unknown := choices.keys() - Choices.__annotations__.keys():
            raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
        named = pictures.items() if isinstance(pictures, Mapping) else pictures
        files = [(name, (name, to_bytes(image, name), "application/octet-stream")) for name, image in named]
        given = {**choices, **(more or {}), "format": "json", "encoding": "npy"}
        fields = {name: _text(value) for name, value in given.items() if value is not None}
        return self._build("POST", f"/{task}", files=files, data=fields, headers=headers)

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


def settings(timeout: float | None, headers: Mapping[str, str] | None, api_key: str | None) -> dict[str, Any]:
    named = {"user-agent": f"saccade/{__version__}", "accept": "application/json"}
    named |= {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    return {"timeout": httpx.Timeout(timeout, connect=10.0), "headers": named | dict(headers or {})}


def clip_options(steady: bool | None, known: Known | None, stride: int | None, limit: int | None) -> dict[str, object]:
    return {
        "steady": steady,
        "known_depths": points_text(known),
        "frames_stride": stride,
        "frames_limit": limit,
    }


def pictures(image: ImageLike, next_image: ImageLike | None, mask: ImageLike | None) -> dict[str, ImageLike]:
    given = {"image": image, "next_image": next_image, "mask": mask}
    return {name: picture for name, picture in given.items() if picture is not None}


def later(key: str | None) -> dict[str, str]:
    """With a key always, so that a request which is sent again makes no second job."""
    return {"prefer": "respond-async", "idempotency-key": key or uuid.uuid4().hex}


def path(job: Job | str) -> str:
    identity = job.id if isinstance(job, Job) else job
    if not identity.isalnum():
        raise InvalidInput(f"not the id of a job: {identity[:64]!r}", param="job")
    return f"/jobs/{identity}"


def pause_s(tried: int) -> float:
    return min(0.5 * 2.0**tried, 10.0)


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

"""`Prefer: respond-async`, and /jobs."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Send

from saccade.errors import InvalidInput
from saccade.tasks import TaskName
from server import problems
from server.events import EventStream
from server.jobs import webhook
from server.jobs.records import ID, Asked, Record, document
from server.jobs.runner import Jobs, cancelled, expired
from server.jobs.store import Full, KeyReused
from server.logs import state
from server.problems import Problem
from server.respond import accepted, check, read_body
from server.service import Service, while_connected

RETRY_S = 10.0
PAGE, MOST_PAGE = 20, 100
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_CURSOR = re.compile(r"[0-9]{1,18}")


def router() -> APIRouter:
    made = APIRouter()
    made.add_api_route("/jobs", listing, methods=["GET", "HEAD"])
    made.add_api_route("/jobs/{identity}", show, methods=["GET", "HEAD"])
    made.add_api_route("/jobs/{identity}", leave, methods=["DELETE"])
    made.add_api_route("/jobs/{identity}/events", follow, methods=["GET"])
    made.add_api_route("/jobs/{identity}/result", result, methods=["GET", "HEAD"])
    return made


def wanted(request: Request) -> bool:
    """Whether the caller would rather not wait, and this server can do so."""
    told = ",".join(request.headers.getlist("prefer")).split(",")
    return _jobs(request).on and any(one.split(";")[0].strip().lower() == "respond-async" for one in told)


async def accept(house: Service, request: Request, task: TaskName) -> Response:
    """202 and a job, whose request has passed every check that comes before the computing."""
    key = idempotency_key(request)
    body = await read_body(house, request)
    hook = (await check(house, request, task)).wanted.webhook
    if hook is not None:
        _check_webhook(house, hook)
    headers, told = request.headers, state(request.scope)
    asked = Asked(
        task,
        bytes(request.scope["query_string"]),
        headers.get("content-type", ""),
        accepted(request),
        body,
        str(told.get("request_id", "")),
    )
    async with _kept():
        record = await _jobs(request).submit(_owner(request), asked, hook, key)
    extra = {"Location": record.path, "Preference-Applied": "respond-async"}
    return JSONResponse(document(record), 202, extra)


async def listing(request: Request) -> Response:
    count, before = _page(request)
    async with _kept():
        found = await _on(request).page(_owner(request), count + 1, before)
    shown = found[:count]
    cursor = str(shown[-1].number) if len(found) > count else None
    return JSONResponse({"jobs": [document(record) for record in shown], "cursor": cursor})


async def show(request: Request, identity: str) -> Response:
    return JSONResponse(document(await _find(request, identity)))


async def leave(request: Request, identity: str) -> Response:
    """Cancel a job that has not ended, and tell so; forget one that has."""
    record = await _find(request, identity)
    async with _kept():
        if record.unfinished and (now := await _jobs(request).cancel(record)) is not None:
            return JSONResponse(document(now))
        await _jobs(request).forget(record)
    return Response(status_code=204)


async def follow(request: Request, identity: str) -> Response:
    record = await _find(request, identity)
    last = request.headers.get("last-event-id", "")
    async with _kept():
        seen = int(last) if _CURSOR.fullmatch(last) else 0
        events = await _jobs(request).follow(record, seen)
    return _Followed(events, seen)


async def result(request: Request, identity: str) -> Response:
    record = await _find(request, identity)
    if record.unfinished:
        raise Problem(problems.NOT_DONE, f"The job is {record.status}. Its events say when it ends.", retry_after_s=1)
    async with _kept():
        kept = await _jobs(request).result(record, whole=request.method != "HEAD")
    if kept is None:
        raise cancelled() if record.status == "cancelled" else expired()
    return Response(kept.body, kept.status, kept.headers)


class _Followed(EventStream):
    """Of a job, which nobody leaves: a follower who does is noticed here."""

    async def _follow(self, receive: Receive, send: Send) -> None:
        await while_connected(receive, self.send_all(send))


def _jobs(request: Request) -> Jobs:
    return cast(Jobs, request.app.state.jobs)


def _on(request: Request) -> Jobs:
    jobs = _jobs(request)
    if not jobs.on:
        raise Problem(problems.NOT_FOUND, "This server keeps no jobs. Ask without Prefer, and wait for the answer.")
    return jobs


def _owner(request: Request) -> str:
    return str(state(request.scope).get("key") or "")


async def _find(request: Request, identity: str) -> Record:
    """Somebody else's job is as unknown as one that never was."""
    jobs = _on(request)
    async with _kept():
        record = await jobs.find(identity, _owner(request)) if ID.fullmatch(identity) else None
    if record is None:
        raise Problem(problems.NOT_FOUND, "There is no such job, or it is not yours, or its time is long over.")
    return record


@asynccontextmanager
async def _kept() -> AsyncIterator[None]:
    """What keeps the store from doing its work, as problems."""
    try:
        yield
    except Full as error:
        raise Problem(
            problems.OVERLOADED,
            "The server keeps as many jobs as it may. Fetch results and DELETE their jobs, or try again later.",
            retry_after_s=RETRY_S,
        ) from error
    except KeyReused as error:
        raise Problem(
            problems.KEY_REUSED,
            "This Idempotency-Key came before with another request. Repeat that one, or take a new key.",
            param="Idempotency-Key",
        ) from error
    except sqlite3.Error as error:
        raise Problem(
            problems.UNAVAILABLE, "Jobs cannot be kept now. Try again later.", retry_after_s=RETRY_S
        ) from error


def idempotency_key(request: Request) -> str | None:
    """The caller's, if any. Raises InvalidInput for one that cannot be, whether or not it will be used."""
    key = request.headers.get("idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidInput("Idempotency-Key must be 1 to 255 visible ASCII characters", param="Idempotency-Key")
    return key


def _check_webhook(house: Service, url: str) -> None:
    if house.settings.webhook_secret_file is None:
        raise InvalidInput("this server has no secret to sign webhooks with: leave webhook out", param="webhook")
    webhook.check(url, house.settings.webhook_allow_private)


def _page(request: Request) -> tuple[int, int | None]:
    limit, cursor = request.query_params.get("limit", str(PAGE)), request.query_params.get("cursor")
    if not _CURSOR.fullmatch(limit) or not 1 <= int(limit) <= MOST_PAGE:
        raise InvalidInput(f"limit must be a whole number from 1 to {MOST_PAGE}", param="limit")
    if cursor is not None and not _CURSOR.fullmatch(cursor):
        raise InvalidInput("cursor must be one that an earlier page gave", param="cursor")
    return int(limit), None if cursor is None else int(cursor)

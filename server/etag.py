"""What an answer is known by: a digest of all that it follows from (RFC 9110, sections 8.8.3 and 13.1.2)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from saccade import __version__
from server import problems
from server.problems import Problem
from server.settings import Settings

if TYPE_CHECKING:
    from server.service import Job

_TAG = re.compile(r'(?:W/)?("[\x21\x23-\x7e\x80-\xff]*")')


def of(job: Job, settings: Settings) -> str | None:
    """The entity tag of the job's answer; weak for JSON, which has timings in it.

    None where the same request may be answered differently: within a budget, or by a model without a digest.
    """
    wanted, card = job.wanted, job.model.card
    if wanted.options.budget_ms is not None or not card.digest:
        return None
    arithmetic = (__version__, settings.backend, *job.model.engine.values(), job.model.stepping.batch_size)
    asked = (job.task, card.name, card.digest, job.options, wanted.options.quality, wanted.options.target_uncertainty)
    shown = (job.format, wanted.render, wanted.encoding if job.format == "json" else None, wanted.known_depths)
    frames = (job.several and job.several.steady, wanted.frames_stride, wanted.frames_limit)
    digest = hashlib.sha256(repr((arithmetic, asked, shown, frames)).encode())
    for name, data in _files(job):
        digest.update(f"{name} {len(data)} ".encode())
        digest.update(data)
    return ("W/" if job.format == "json" else "") + f'"{digest.hexdigest()}"'


def check(given: Sequence[str], tag: str, known: bool) -> None:
    """If-None-Match: raises Problem 412 where the caller has the answer already; `*` means one that is kept here."""
    asked = ", ".join(given)
    if (asked.strip() == "*" and known) or _bare(tag) in _TAG.findall(asked):
        raise Problem(problems.MATCHES, "You have this answer already: If-None-Match names it.", headers={"ETag": tag})


def _bare(tag: str) -> str:
    """For the weak comparison."""
    return tag.removeprefix("W/")


def _files(job: Job) -> Iterator[tuple[str, bytes]]:
    yield from job.pictures.items()
    if job.several is not None:
        for name, files in job.several.rows.items():
            yield from ((name, file) for file in files)
        if job.several.video is not None:
            yield "video", job.several.video

"""Which file an answer becomes: the option `format`, else the Accept header with its q-values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from saccade import reel, render
from saccade.render import Format, Render
from saccade.tasks import TaskName
from server import problems
from server.problems import Problem

_Q = re.compile(r"0?\.[0-9]+|0\.?|1(\.0*)?")


@dataclass(frozen=True)
class Range:
    """One media range of an Accept header; parameters other than q are ignored."""

    type: str
    subtype: str
    q: float

    def specificity(self, media_type: str) -> int:
        """2 exact, 1 type/*, 0 */*, -1 no match."""
        main, _, sub = media_type.partition("/")
        if (self.type, self.subtype) == (main, sub):
            return 2
        if self.subtype != "*":
            return -1
        return {main: 1, "*": 0}.get(self.type, -1)


def parse_accept(header: str) -> list[Range]:
    """Media ranges, what is malformed left out; an empty header accepts everything.

    `*` alone and weights such as .2 are read too: Java has long sent them.
    """
    ranges = [found for part in header.split(",") if (found := _range(part)) is not None]
    return ranges if header.strip() else [Range("*", "*", 1.0)]


def _range(text: str) -> Range | None:
    media, *parameters = (piece.strip().lower() for piece in text.split(";"))
    main, slash, sub = ("*/*" if media == "*" else media).partition("/")
    if not (main and slash and sub):
        return None
    weights = [value.strip() for name, _, value in (p.partition("=") for p in parameters) if name.strip() == "q"]
    if weights and not _Q.fullmatch(weights[0]):
        return None
    return Range(main, sub, float(weights[0]) if weights else 1.0)


def quality(ranges: Sequence[Range], media_type: str) -> float:
    """q of the most specific range that matches; 0 if none does."""
    matching = [(r.specificity(media_type), r.q) for r in ranges if r.specificity(media_type) >= 0]
    return max(matching)[1] if matching else 0.0


def best(ranges: Sequence[Range], offered: Sequence[Format]) -> Format | None:
    """The offered format that is liked best; of equals the first."""
    liked = {kind: quality(ranges, render.MEDIA_TYPES[kind]) for kind in offered}
    winner = max(liked, key=lambda kind: liked[kind], default=None)
    return winner if winner is not None and liked[winner] > 0 else None


def choose(task: TaskName, accept: str, wanted: Format | None, style: Render, uncertainty: bool) -> Format:
    """The answer's format. `*/*` means the first that can carry what was asked. Raises Problem 406 with the list, or
    InvalidInput where the asked format cannot be combined with the other options."""
    ranges = parse_accept(accept)
    chosen = wanted or best(ranges, render.usable(task, style, uncertainty)) or best(ranges, render.usable(task, style))
    chosen = chosen or best(ranges, render.FORMATS[task])
    if chosen is None:
        offered = ", ".join(render.MEDIA_TYPES[kind] for kind in render.FORMATS[task])
        raise Problem(problems.NOT_ACCEPTABLE, f"{task} is answered as {offered}. Accept one of them, or give format.")
    render.check(task, chosen, style, uncertainty)
    return chosen


def choose_of_several(task: TaskName, accept: str, wanted: Format | None, style: Render, uncertainty: bool) -> Format:
    """The same for several answers at once: JSON, a ZIP of files of the format (for `application/zip` alone the first
    that can carry what was asked, beside JSON), or an MP4."""
    chosen = wanted or _liked_of_several(task, parse_accept(accept), style, uncertainty)
    if chosen is None:
        offered = ", ".join(dict.fromkeys(reel.media_type(kind) for kind in render.FORMATS_OF_SEVERAL[task]))
        told = f"several answers of {task} come as {offered}. Accept one of them, or give format."
        raise Problem(problems.NOT_ACCEPTABLE, told)
    reel.check(task, chosen, style, uncertainty)
    return chosen


def _liked_of_several(task: TaskName, ranges: Sequence[Range], style: Render, uncertainty: bool) -> Format | None:
    """The format of the media type that is liked best; of equals the first."""
    fits = render.usable(task, style, uncertainty) or render.usable(task, style)
    zipped = next((kind for kind in fits if kind != "json"), "png")
    offered: list[Format] = [kind for kind in ("json", zipped, "mp4") if kind in render.FORMATS_OF_SEVERAL[task]]
    if style != "data":
        offered.remove("json")
    liked = {kind: quality(ranges, reel.media_type(kind)) for kind in offered}
    winner = max(liked, key=lambda kind: liked[kind])
    return winner if liked[winner] > 0 else None

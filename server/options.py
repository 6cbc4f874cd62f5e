"""The options of a request: one table, read from form fields, JSON members and query parameters alike."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol, cast, get_args

from saccade import dial, metres, render
from saccade.errors import InvalidInput
from saccade.pipeline import Options
from saccade.render import Encoding, Format, Render
from saccade.schedule import Spacing
from saccade.tasks import TASKS, TaskName
from server.settings import Settings

ALIASES = {"timestep_spacing": "spacing"}
PREVIEWS, MAX_PREVIEWS = 4, 20
MOST_UNCERTAINTY = 1e6
_INTEGER = re.compile(r"-?[0-9]{1,20}")
_TRUTH = {"true": True, "1": True, "false": False, "0": False}
_NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{0,20})?([eE][-+]?[0-9]{1,2})?")
Value = int | float | str | bool | metres.Points


class Given(NamedTuple):
    """An option as it came: text from a form or the query, a JSON value from a JSON body."""

    name: str
    value: object
    text: bool


class Kind(Protocol):
    def read(self, value: object, text: bool) -> Value | None:
        """The value, or None if it is not one of this kind."""
        ...

    def expected(self) -> str: ...

    def schema(self, text: bool) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Integer:
    low: int
    high: int

    def read(self, value: object, text: bool) -> int | None:
        number = int(value) if self._whole(value, text) else None  # type: ignore[call-overload]
        return number if number is not None and self.low <= number <= self.high else None

    def _whole(self, value: object, text: bool) -> bool:
        if text:
            return isinstance(value, str) and _INTEGER.fullmatch(value) is not None
        return (isinstance(value, int) and not isinstance(value, bool)) or (
            isinstance(value, float) and value.is_integer()
        )

    def expected(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def schema(self, text: bool) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True)
class Positive:
    """A number above 0."""

    high: float

    def read(self, value: object, text: bool) -> float | None:
        written = text and isinstance(value, str) and _NUMBER.fullmatch(value) is not None
        number = float(value) if written or (not text and _is_number(value)) else None  # type: ignore[arg-type]
        return number if number is not None and 0 < number <= self.high else None

    def expected(self) -> str:
        return f"a number above 0, up to {self.high:g}"

    def schema(self, text: bool) -> dict[str, Any]:
        return {"type": "number", "exclusiveMinimum": 0, "maximum": self.high}


@dataclass(frozen=True)
class Choice:
    values: tuple[str, ...]

    def read(self, value: object, text: bool) -> str | None:
        return value if isinstance(value, str) and value in self.values else None

    def expected(self) -> str:
        return "one of " + ", ".join(self.values)

    def schema(self, text: bool) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.values)}


@dataclass(frozen=True)
class Boolean:
    def read(self, value: object, text: bool) -> bool | None:
        if text:
            return _TRUTH.get(value) if isinstance(value, str) else None
        return value if isinstance(value, bool) else None

    def expected(self) -> str:
        return "true or false"

    def schema(self, text: bool) -> dict[str, Any]:
        return {"type": "string", "enum": list(_TRUTH)} if text else {"type": "boolean"}


@dataclass(frozen=True)
class Link:
    """A URL, looked at more closely by whoever follows it."""

    pattern = r"https?://[!-~]{1,2000}"

    def read(self, value: object, text: bool) -> str | None:
        return value if isinstance(value, str) and re.fullmatch(self.pattern, value) else None

    def expected(self) -> str:
        return "an https URL of at most 2000 characters"

    def schema(self, text: bool) -> dict[str, Any]:
        return {"type": "string", "format": "uri", "pattern": f"^{self.pattern}$"}


@dataclass(frozen=True)
class KnownDepths:
    """[[x, y, metres], ...]; in text the same as JSON."""

    most: int

    def read(self, value: object, text: bool) -> metres.Points | None:
        found = _json(value) if text else value
        if not isinstance(found, list) or len(found) > self.most:
            return None
        rows = [row for row in found if isinstance(row, list) and len(row) == 3 and all(map(_is_number, row))]
        return [(float(x), float(y), float(m)) for x, y, m in rows] if len(rows) == len(found) else None

    def expected(self) -> str:
        return f"a JSON array of 2 to {self.most} arrays [x, y, metres] of numbers"

    def schema(self, text: bool) -> dict[str, Any]:
        if text:
            return {"type": "string", "contentMediaType": "application/json"}
        row = {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3}
        return {"type": "array", "items": row, "minItems": metres.MIN_POINTS, "maxItems": self.most}


def _json(value: object) -> object:
    try:
        return json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e15 < value < 1e15


class Option(NamedTuple):
    kind: Kind
    help: str
    example: Value


def table(settings: Settings, task: TaskName) -> dict[str, Option]:
    """name -> option, for one task under the server's maxima."""
    size = Integer(0, settings.max_processing_resolution)
    return {
        **_of_clips(settings, task),
        "steps": Option(Integer(1, settings.max_steps), "DDIM steps: how often each member is refined.", 4),
        "ensemble_size": Option(Integer(1, settings.max_ensemble_size), "Members, each from its own noise.", 1),
        "reduction": Option(
            Choice(TASKS[task].reductions), "How members become one answer.", TASKS[task].reductions[0]
        ),
        "seed": Option(Integer(0, 2**63 - 1), "Seed of the noise; the same seed gives the same answer.", 0),
        "spacing": Option(Choice(get_args(Spacing)), "How the steps are spread over the noise schedule.", "trailing"),
        "processing_resolution": Option(
            size, "Longer edge in pixels that the model sees; 0 keeps the picture's own.", size.high // 4
        ),
        "match_input_resolution": Option(
            Boolean(), "Bring the answer back to the picture's size (default true).", True
        ),
        "output_uncertainty": Option(
            Boolean(), "Add a map of the members' spread; needs ensemble_size of 2 or more.", False
        ),
        "budget_ms": Option(
            Integer(1, dial.LONGEST_BUDGET_MS),
            "Milliseconds to spend: the best answer that is ready by then; chooses steps and ensemble_size where they "
            "are not given.",
            1000,
        ),
        "quality": Option(
            Choice(dial.QUALITIES), "Instead of steps and ensemble_size: a point of the measured curve.", "balanced"
        ),
        "target_uncertainty": Option(
            Positive(MOST_UNCERTAINTY),
            "Add members until the answer's mean uncertainty is at most this, in the units of the answer.",
            0.05,
        ),
        "format": Option(Choice(render.FORMATS_OF_SEVERAL[task]), "The answer's file type; wins over Accept.", "json"),
        "render": Option(
            Choice(render.RENDERS[task]), "What a PNG shows: the data, colours to look at, or the object.", "data"
        ),
        "encoding": Option(Choice(get_args(Encoding)), "Of the maps inside a JSON answer.", "png16"),
        "previews": Option(
            Integer(0, MAX_PREVIEWS), "Of a stream of events: how many previews of the answer it shows.", PREVIEWS
        ),
        "webhook": Option(Link(), "Of a job: where to POST that it has ended.", "https://example.org/hook"),
    }


def _of_clips(settings: Settings, task: TaskName) -> dict[str, Option]:
    """What only depth, or only videos have."""
    if task == "amodal":
        return {}
    frames = {
        "frames_stride": Option(Integer(1, 1000), "Of a video: ask about every n-th frame.", 1),
        "frames_limit": Option(Integer(1, settings.max_frames), "Of a video: ask about no more than the first n.", 16),
    }
    if task == "flow":
        return frames
    steady = Option(Boolean(), "One scale for all frames, each fitted to the one before (default: for videos).", True)
    known = Option(
        KnownDepths(metres.MAX_POINTS),
        "Pixels whose distance is known, [[x, y, metres], ...]: the answer is then in metres.",
        [(0.0, 0.0, 1.5), (31.0, 31.0, 4.0)],
    )
    return {"steady": steady, metres.PARAM: known, **frames}


@dataclass(frozen=True)
class Wanted:
    """What a request asks for; None where it leaves the choice."""

    options: Options
    format: Format | None
    render: Render
    encoding: Encoding | None
    previews: int
    webhook: str | None
    steady: bool | None = None
    known_depths: metres.Points | None = None
    frames_stride: int | None = None
    frames_limit: int | None = None


def read(known: Mapping[str, Option], given: Iterable[Given]) -> Wanted:
    """Options from all places together. Raises InvalidInput for an unknown name, a bad value, or two values for one."""
    values: dict[str, Value] = {}
    for item in given:
        name = ALIASES.get(item.name, item.name)
        if name not in known:
            raise unknown(item.name, known)
        value = known[name].kind.read(item.value, item.text)
        if value is None:
            raise InvalidInput(f"{name} must be {known[name].kind.expected()}, not {_shown(item.value)}", param=name)
        if values.setdefault(name, value) != value:
            twice = f"{name} is given twice, as {_shown(values[name])} and as {_shown(value)}; give it once"
            raise InvalidInput(twice, param=name)
    return _wanted(values)


def unknown(name: str, known: Iterable[str]) -> InvalidInput:
    """The error for a name that is no option, with the nearest that is."""
    names = [*known, *ALIASES]
    near = difflib.get_close_matches(name[:64], names, 1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
    return InvalidInput(f"unknown option {_shown(name)}; {hint}", param=name[:64])


def _shown(value: object) -> str:
    """A stranger's value, short enough to repeat."""
    if isinstance(value, list):
        return "an array or object"
    text = repr(value[:64]) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 64 else text[:61] + "..."


def _wanted(values: dict[str, Value]) -> Wanted:
    turned = {f.name: values[f.name] for f in fields(Options) if f.name in values}
    return Wanted(
        Options(**cast(dict[str, Any], turned)),
        cast(Format | None, values.get("format")),
        cast(Render, values.get("render", "data")),
        cast(Encoding | None, values.get("encoding")),
        cast(int, values.get("previews", PREVIEWS)),
        cast(str | None, values.get("webhook")),
        steady=cast(bool | None, values.get("steady")),
        known_depths=cast(metres.Points | None, values.get(metres.PARAM)),
        frames_stride=cast(int | None, values.get("frames_stride")),
        frames_limit=cast(int | None, values.get("frames_limit")),
    )

"""What a person says about where an object is: clicks and a box, read from a request's options."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from saccade.errors import InvalidInput
from server.options import Given

MAX_POINTS = 32
MOST = 1_000_000


@dataclass(frozen=True)
class Hints:
    """Where the object is, in pixels of the picture. `points`: (x, y, is it the object). `box`: (x0, y0, x1, y1)
    around all of it, the far edge excluded. One of them says where it is: a box, or a point that is on it."""

    points: tuple[tuple[int, int, bool], ...] = ()
    box: tuple[int, int, int, int] | None = None

    def check_inside(self, height: int, width: int) -> None:
        if any(x >= width or y >= height for x, y, _ in self.points):
            raise InvalidInput(f"a point lies outside the picture, which is {width} x {height} px", param="points")
        if self.box is not None and (self.box[2] > width or self.box[3] > height):
            raise InvalidInput(f"the box ends outside the picture, which is {width} x {height} px", param="box")


def read(given: Iterable[Given]) -> Hints:
    """Raises InvalidInput for an unknown name, a bad value, a name given twice, or hints that say not where it is."""
    values: dict[str, Any] = {}
    for name, value, text in given:
        if name not in ("points", "box"):
            raise InvalidInput(f"unknown option {name[:64]!r}; known are points and box", param=name[:64])
        if name in values:
            raise InvalidInput(f"{name} is given twice; give it once", param=name)
        values[name] = _parsed(name, value, text)
    hints = Hints(_points(values.get("points", [])), _box(values["box"]) if "box" in values else None)
    if hints.box is None and not any(inside for _, _, inside in hints.points):
        raise InvalidInput("say where the object is: a point on it with label 1, or a box around it", param="points")
    return hints


def _parsed(name: str, value: object, text: bool) -> object:
    if not text:
        return value
    try:
        return json.loads(cast(str, value))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{name} is not JSON: {_SHAPES[name]}", param=name) from error


def _points(value: object) -> tuple[tuple[int, int, bool], ...]:
    items = value if isinstance(value, list) else [None]
    if len(items) > MAX_POINTS:
        raise InvalidInput(f"points are {MAX_POINTS} at most", param="points")
    numbers = [_numbers("points", item, 3) for item in items]
    if any(label not in (0, 1) for _, _, label in numbers):
        raise InvalidInput(f"a point's label is 1 or 0: {_SHAPES['points']}", param="points")
    return tuple((int(x), int(y), label == 1) for x, y, label in numbers)


def _box(value: object) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = map(int, _numbers("box", value, 4))
    if x1 - x0 < 2 or y1 - y0 < 2:
        raise InvalidInput(f"the box is empty: {_SHAPES['box']}", param="box")
    return x0, y0, x1, y1


def _numbers(name: str, value: object, count: int) -> list[float]:
    """A number that no picture could hold is as wrong as a word."""
    items = value if isinstance(value, list) else []
    good = [n for n in items if isinstance(n, (int, float)) and not isinstance(n, bool) and 0 <= n < MOST]
    if len(items) != count or len(good) != count:
        raise InvalidInput(f"{name} cannot be read: {_SHAPES[name]}", param=name)
    return good


_SHAPES = {
    "points": f"send [[x, y, 1 or 0], ...] in pixels, {MAX_POINTS} at most; 1 is on the object, 0 is not",
    "box": "send [left, top, right, bottom] in pixels, around the whole visible part",
}


def schema(text: bool) -> dict[str, Any]:
    """Of `points` and `box`: arrays in a JSON body, the same as text in a form."""
    pixel = {"type": "number", "minimum": 0, "exclusiveMaximum": MOST}
    point = {"type": "array", "prefixItems": [pixel, pixel, {"enum": [0, 1]}], "minItems": 3, "maxItems": 3}
    shapes: dict[str, dict[str, Any]] = {
        "points": {"type": "array", "items": point, "maxItems": MAX_POINTS},
        "box": {"type": "array", "items": pixel, "minItems": 4, "maxItems": 4},
    }
    as_text = {"type": "string", "contentMediaType": "application/json"}
    return {name: (as_text if text else shape) | {"description": _SHAPES[name]} for name, shape in shapes.items()}

"""The OpenAPI document: every option with this server's bounds, every kind of answer, every problem."""

from __future__ import annotations

import base64
from typing import Any, get_args

import numpy as np

from saccade import __version__, formats, reel, render
from saccade.card import Card
from saccade.tasks import TASKS, TaskName
from server import mask, problems, several, v2
from server.forms import VIDEO, Room
from server.jobs import openapi as jobs
from server.options import ALIASES, Option, table
from server.problems import Kind
from server.service import picture_names
from server.settings import Settings

Json = dict[str, Any]
SUMMARIES: dict[TaskName, str] = {
    "depth": "How far everything in a picture is",
    "flow": "Where everything moved from one picture to the next",
    "amodal": "The whole of a half-hidden object",
}
PICTURES = {
    "image": "The picture: PNG, JPEG, WebP, BMP, TIFF or GIF.",
    "next_image": "The next frame, of the same size.",
    "mask": "The object's visible part: white on black, of the picture's size.",
    "video": "Instead of pictures: MP4, WebM, AVI or GIF; each frame is asked about.",
}
REFUSALS = (
    problems.MALFORMED,
    problems.NOT_ACCEPTABLE,
    problems.MATCHES,
    problems.SLOW_UPLOAD,
    problems.TOO_LARGE,
    problems.UNSUPPORTED,
    problems.INVALID,
    problems.OVERLOADED,
    problems.INTERNAL,
    problems.NOT_INSTALLED,
    problems.UNAVAILABLE,
    problems.BACKEND_TIMEOUT,
)


def document(settings: Settings) -> Json:
    tasks = {f"/{task}": {"post": _operation(settings, task)} for task in TASKS}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Saccade",
            "version": __version__,
            "description": "Depth, motion and whole objects from pictures, by one diffusion transformer.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": tasks | mask.paths() | jobs.paths() | _plain_paths() | v2.paths(settings),
        "components": {"schemas": _schemas(), "responses": {kind.slug: _problem(kind) for kind in problems.KINDS}},
    }


def _operation(settings: Settings, task: TaskName) -> Json:
    known = table(settings, task)
    return {
        "operationId": task,
        "summary": SUMMARIES[task],
        "description": f"Answer: {TASKS[task].units}. Options go into the body or the query; what is left out is the "
        "model's default. The file type is chosen by `format`, else by the Accept header, and is JSON for `*/*`.",
        "parameters": [_parameter(name, option) for name, option in _with_aliases(known).items()] + jobs.HEADERS,
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": _body(task, known, True, several.room(settings, task)),
                "application/json": _body(task, known, False, several.room(settings, task)),
            },
        },
        "responses": {"200": _answer(task), "202": jobs.taken()} | _refusals(REFUSALS),
    }


def _with_aliases(known: dict[str, Option]) -> dict[str, Option]:
    return known | {alias: known[name]._replace(help=f"Another name of {name}.") for alias, name in ALIASES.items()}


def _parameter(name: str, option: Option) -> Json:
    return {
        "name": name,
        "in": "query",
        "required": False,
        "description": option.help,
        "schema": option.kind.schema(True),
    }


def _body(task: TaskName, known: dict[str, Option], text: bool, room: Room) -> Json:
    names = picture_names(task)
    pictures = {name: _picture(name, text) if name == "next_image" else _pictures(name, text, room) for name in names}
    pictures |= {VIDEO: _picture(VIDEO, text)} if room.video else {}
    options = {
        name: option.kind.schema(text) | {"description": option.help} for name, option in _with_aliases(known).items()
    }
    schema = {
        "type": "object",
        "anyOf": [{"required": list(way)} for way in _ways(names, room)],
        "properties": pictures | options,
        "additionalProperties": False,
    }
    if text:
        return {"schema": schema}
    return {"schema": schema, "example": dict.fromkeys(names, _example_picture()) | {"steps": known["steps"].example}}


def _ways(names: tuple[str, ...], room: Room) -> list[tuple[str, ...]]:
    """What must be there: the task's pictures; or frames in a row; or a video."""
    frames = [("image",)] if "next_image" in names else []
    return [names, *frames, *([(VIDEO,)] if room.video else [])]


def _pictures(name: str, text: bool, room: Room) -> Json:
    """One, or several for as many answers."""
    one = _picture(name, text)
    told = f"{one.pop('description')} Several, in a row, give as many answers (of flow, one less)."
    return {
        "anyOf": [one, {"type": "array", "items": one, "minItems": 1, "maxItems": room.frames}],
        "description": told,
    }


def _example_picture() -> str:
    """A 32 x 32 ramp in base64; it serves as a mask too."""
    ramp = np.arange(1024).reshape(32, 32) // 4
    return base64.b64encode(formats.write_png(ramp.astype(np.uint8))).decode()


def _picture(name: str, text: bool) -> Json:
    schema: Json = {"type": "string", "format": "binary"} if text else {"type": "string", "format": "byte"}
    return schema | {"description": PICTURES[name] + ("" if text else " In base64.")}


def _answer(task: TaskName) -> Json:
    binary = {"schema": {"type": "string", "format": "binary"}}
    content = {render.MEDIA_TYPES[kind]: binary for kind in render.FORMATS[task]}
    content |= {reel.media_type(kind): binary for kind in render.FORMATS_OF_SEVERAL[task]}
    answers = {"anyOf": [_ref("Answer"), _ref("Answers")]}
    return {
        "description": "The answer, in the file type that was asked for.",
        "headers": {
            "Saccade-Model": _header("Name of the model."),
            "Saccade-Digest": _header("sha256 over all its files."),
            "Saccade-Steps": _header("DDIM steps.", "integer"),
            "Saccade-Ensemble-Size": _header("Members.", "integer"),
            "Saccade-Reduction": _header("How they became one."),
            "Saccade-Seed": _header("Seed of the noise.", "integer"),
            "Saccade-Units": _header("What the numbers mean."),
            "Saccade-Complete": _header("true; false where the time of `budget_ms` cut the work off."),
            "Saccade-Plan": _header("Of `budget_ms`, `quality`, `target_uncertainty`: what was chosen.", needed=False),
            "ETag": _header("Where the server keeps whole answers; not within a budget.", needed=False),
            "Server-Timing": _header("Milliseconds in queue, encode, denoise, decode, ensemble, and in total."),
        },
        "content": content | {"application/json": {"schema": answers}} | jobs.STREAM,
    }


def _header(description: str, kind: str = "string", needed: bool = True) -> Json:
    return {"description": description, "required": needed, "schema": {"type": kind}}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _refusals(kinds: tuple[Kind, ...]) -> Json:
    return {str(kind.status): {"$ref": f"#/components/responses/{kind.slug}"} for kind in kinds}


def _problem(kind: Kind) -> Json:
    again = {"Retry-After": _header("Seconds to wait.", "integer")} if kind.status in (429, 503, 504) else {}
    return {
        "description": f"{kind.title}. {kind.meaning} (`{kind.type}`)",
        "headers": again,
        "content": {problems.MEDIA_TYPE: {"schema": _ref("Problem")}},
    }


def _plain_paths() -> Json:
    return {
        "/": {"get": _index()},
        "/models": {
            "get": _get(
                "models",
                "The model that serves, and its card",
                "application/json",
                _ref("Models"),
                problems.UNAVAILABLE,
            )
        },
        "/livez": {"get": _get("livez", "Does the process answer", "application/json", _ref("Status"))},
        "/readyz": {
            "get": _get(
                "readyz",
                "Does the model answer: a tiny inference",
                "application/json",
                _ref("Ready"),
                problems.UNAVAILABLE,
            )
        },
        "/metrics": {"get": _get("metrics", "Counters for Prometheus", "text/plain", {"type": "string"})},
    }


def _index() -> Json:
    index = _get("index", "What is here; for a browser, the page", "application/json", {"type": "object"})
    index["responses"]["200"]["content"]["text/html"] = {"schema": {"type": "string"}}
    return index


def _get(name: str, summary: str, media_type: str, schema: Json, *refusals: Kind) -> Json:
    good = {"description": summary + ".", "content": {media_type: {"schema": schema}}}
    return {
        "operationId": name,
        "summary": summary,
        "responses": {"200": good} | _refusals((*refusals, problems.INTERNAL)),
    }


def _schemas() -> Json:
    card = Card.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
    parts = card.pop("$defs", {})
    return {
        "Problem": _problem_schema(),
        "Answer": _answer_schema(),
        **jobs.schemas(),
        "Answers": _answers_schema(),
        "Map": _map_schema(),
        "Models": _object(default={"type": "string"}, models={"type": "array", "items": _ref("Card")}),
        "Ready": _ready_schema(),
        "Status": {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}},
        "Card": card,
        **parts,
    }


def _object(**properties: Json) -> Json:
    return {
        "type": "object",
        "required": list(properties),
        "properties": properties,
        "additionalProperties": False,
    }


def _problem_schema() -> Json:
    schema = _object(
        type={
            "type": "string",
            "enum": [kind.type for kind in problems.KINDS],
            "description": "Stable; compare with this.",
        },
        title={"type": "string"},
        status={"type": "integer"},
        detail={"type": "string", "description": "What was wrong, and what to do."},
    )
    schema["properties"] |= {
        "param": {"type": "string", "description": "The field or option at fault."},
        "instance": {"type": "string", "description": "The id of the log entry of a server's fault."},
    }
    return schema


def _ready_schema() -> Json:
    text, maybe_text = {"type": "string"}, {"type": ["string", "null"]}
    return _object(
        status=text,
        model=text | {"description": "The one that serves."},
        digest=text,
        wanted=maybe_text | {"description": "The one that ought to; null: the repository's only one."},
        fault=maybe_text | {"description": "What keeps it from serving."},
    )


def _answer_schema() -> Json:
    text, number, count = {"type": "string"}, {"type": "number"}, {"type": "integer"}
    maybe_map = {"anyOf": [_ref("Map"), {"type": "null"}]}
    options = _object(
        steps=count,
        ensemble_size=count,
        reduction=text,
        seed=count,
        spacing=text,
        processing_resolution=count,
        match_input_resolution={"type": "boolean"},
        output_uncertainty={"type": "boolean"},
    )
    schema = _object(
        task={"type": "string", "enum": list(get_args(TaskName))},
        model=text,
        digest=text,
        units=text,
        shape={"type": "array", "items": count, "minItems": 2, "maxItems": 2, "description": "[height, width]"},
        options=options,
        timings_ms={"type": "object", "additionalProperties": number},
        prediction=_ref("Map"),
        uncertainty=maybe_map,
        completed=maybe_map,
    )
    metres = _object(scale=number, shift=number, residual_m=number, inliers=count, points=count)
    told = "Where known_depths were given: metres = scale * p + shift, p the answer without them; the median error of "
    schema["properties"]["plan"] = _plan_schema()
    schema["properties"]["metres"] = metres | {"description": told + "all points, and how many agree with the fit."}
    return schema


def _plan_schema() -> Json:
    count, maybe = {"type": "integer"}, {"type": ["number", "null"]}
    schema = _object(
        steps=count,
        ensemble_size=count,
        why={"type": "string", "description": "Why these, in words."},
        budget_ms={"type": ["integer", "null"]},
        predicted_ms=maybe | {"description": "Until the answer, as it was foreseen."},
        target_uncertainty=maybe,
        complete={"type": "boolean", "description": "False where the time cut the work off."},
        members=count | {"description": "That were merged."},
        steps_taken=count | {"description": "By each of them, at least."},
        uncertainty=maybe | {"description": "Of the merged answer: the members' mean spread over the root of members."},
    )
    told = "Of `budget_ms`, `quality` or `target_uncertainty`: what was chosen, and what came of it."
    return schema | {"description": told}


def _answers_schema() -> Json:
    """Of several pictures, or of a video."""
    return _object(
        answers={"type": "array", "items": _ref("Answer"), "minItems": 1},
        fps={"type": ["number", "null"], "description": "Of a video's frames that were asked about."},
        shots={
            "type": ["array", "null"],
            "items": {"type": "integer"},
            "description": "With a steady scale: the first answers of each stretch that shares one.",
        },
    )


def _map_schema() -> Json:
    schema = _object(
        encoding={"type": "string", "enum": ["png16", "npy", "png"]},
        media_type={"type": "string"},
        scale={"type": "number"},
        offset={"type": "number"},
        data={"type": "string", "format": "byte", "description": "The file, in base64."},
    )
    schema["description"] = (
        "A map as a file. Its value is raw * scale + offset. Flow as PNG is KITTI's: red is u, green is v, blue is 1 "
        "where the value is known."
    )
    return schema

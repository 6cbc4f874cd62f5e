"""Jobs and streams in the OpenAPI document."""

from __future__ import annotations

from typing import Any, get_args

from saccade.tasks import TASKS
from server import events, problems
from server.jobs.records import Status
from server.jobs.routes import MOST_PAGE, PAGE
from server.problems import Kind

Json = dict[str, Any]
STREAM: Json = {
    events.MEDIA_TYPE: {
        "schema": {
            "type": "object",
            "description": "One server-sent event: accepted, progress, preview, and at last answer or problem. Without "
            "the headers of an answer.",
            "required": ["id", "event", "data"],
            "properties": {
                "id": {"type": "string", "pattern": "^[0-9]+$"},
                "event": {"type": "string", "enum": ["accepted", "progress", "preview", "answer", "problem"]},
                "data": {"type": "string", "description": "JSON in one line."},
            },
        }
    }
}
IDENTITY = {
    "name": "identity",
    "in": "path",
    "required": True,
    "description": "The job's id.",
    "schema": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
}
HEADERS = [
    {
        "name": "Prefer",
        "in": "header",
        "description": "`respond-async`: a job at once instead of the answer later.",
        "schema": {"type": "string", "examples": ["respond-async"]},
    },
    {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "Of a job: the same key is the same job.",
        "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
    },
]


def taken() -> Json:
    """202 of the tasks."""
    links = {
        name: {"operationId": operation, "parameters": {"identity": "$response.body#/id"}}
        for name, operation in (
            *(("job", "job"), ("events", "job_events"), ("result", "job_result"), ("cancel", "job_cancel")),
        )
    }
    location = {"description": "Path of the job.", "required": True, "schema": {"type": "string"}}
    applied = {"description": "respond-async", "required": True, "schema": {"type": "string"}}
    return {
        "description": "A job, where `Prefer: respond-async` asked for one and this server keeps jobs.",
        "headers": {"Location": location, "Preference-Applied": applied},
        "content": {"application/json": {"schema": _ref("Job")}},
        "links": links,
    }


def paths() -> Json:
    cursor = {"type": "string", "pattern": "^[0-9]{1,18}$"}
    limit = {"type": "integer", "minimum": 1, "maximum": MOST_PAGE, "default": PAGE}
    page = [_query("limit", "Most jobs of the answer.", limit), _query("cursor", "Of the page before.", cursor)]
    job = {"200": _json("The job.", "Job")}
    forgotten = {"204": {"description": "It had ended, and is forgotten."}}
    kept = {
        "200": {"description": "As the request would have been answered.", "content": {"*/*": {"schema": {}}}},
        "default": {"description": "As the request would have been refused.", "content": _problem()},
    }
    stream = {"200": {"description": "What happens to the job.", "content": STREAM}}
    one = (problems.NOT_FOUND, problems.INTERNAL, problems.UNAVAILABLE)
    ended = (*one, problems.NOT_DONE, problems.GONE)
    return {
        "/jobs": {
            "get": {
                "operationId": "jobs",
                "summary": "One's own jobs, newest first",
                "parameters": page,
                "responses": {"200": _json("A page of them.", "Jobs")} | _refusals(*one, problems.INVALID),
            }
        },
        "/jobs/{identity}": {
            "parameters": [IDENTITY],
            "get": _operation("job", "How it stands with a job", job, one),
            "delete": _operation("job_cancel", "Cancel a job, or forget one that has ended", job | forgotten, one),
        },
        "/jobs/{identity}/events": {
            "parameters": [IDENTITY],
            "get": _operation("job_events", "What happens to a job, until its answer", stream, one),
        },
        "/jobs/{identity}/result": {
            "parameters": [IDENTITY],
            "get": _operation("job_result", "The answer, as the request alone would have got it", kept, ended),
        },
    }


def schemas() -> Json:
    text, moment = {"type": "string"}, {"type": ["string", "null"], "format": "date-time"}
    links = {name: text for name in ("self", "events", "result", "cancel")}
    hook = {"status": {"type": "string", "enum": ["waiting", "pending", "delivered", "failed"]}}
    members: Json = {
        "id": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
        "status": {"type": "string", "enum": list(get_args(Status))},
        "task": {"type": "string", "enum": list(TASKS)},
        "created": {"type": "string", "format": "date-time"},
        "started": moment,
        "finished": moment,
        "problem": {"anyOf": [_ref("Problem"), {"type": "null"}]},
        "webhook": {"anyOf": [_object(hook | {"tries": {"type": "integer"}}), {"type": "null"}]},
        "links": _object(links),
    }
    several = {"type": "array", "items": _ref("Job")}
    return {"Job": _object(members), "Jobs": _object({"jobs": several, "cursor": {"type": ["string", "null"]}})}


def _object(members: Json) -> Json:
    return {"type": "object", "required": list(members), "properties": members, "additionalProperties": False}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _query(name: str, told: str, schema: Json) -> Json:
    return {"name": name, "in": "query", "description": told, "schema": schema}


def _json(told: str, schema: str) -> Json:
    return {"description": told, "content": {"application/json": {"schema": _ref(schema)}}}


def _problem() -> Json:
    return {problems.MEDIA_TYPE: {"schema": _ref("Problem")}}


def _refusals(*kinds: Kind) -> Json:
    return {str(kind.status): {"$ref": f"#/components/responses/{kind.slug}"} for kind in kinds}


def _operation(name: str, summary: str, good: Json, refusals: tuple[Kind, ...]) -> Json:
    return {"operationId": name, "summary": summary, "responses": good | _refusals(*refusals)}

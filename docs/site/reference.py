"""Pages made from the code: the HTTP interface from its OpenAPI document, problems, and the command's own help."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]
METHODS = {"get", "post", "put", "delete", "patch"}


def pages() -> dict[str, str]:
    """The page's path in the site -> its Markdown (or JSON)."""
    from server import openapi, walls
    from server.settings import Settings

    settings = Settings()
    document = walls.dress(openapi.document(settings), settings)
    return {
        "reference/openapi.json": json.dumps(document, indent=1),
        "reference/http.md": "\n".join(_http(document)),
        "reference/problems.md": "\n".join(_problems()),
        "reference/command.md": "\n".join(_command()),
    }


def _http(openapi: Json) -> Iterator[str]:
    yield "# HTTP, from the OpenAPI document\n"
    yield "Made from the code, with default settings; [openapi.json](openapi.json) is the document itself, and that of"
    yield "a server, with its own bounds, is at its `/openapi.json`. [api.md](../api.md) says the same in words.\n"
    for path, item in openapi["paths"].items():
        for method in sorted(METHODS & item.keys()):
            shared = item.get("parameters", [])
            yield from _operation(
                path, method, item[method] | {"parameters": shared + item[method].get("parameters", [])}
            )
    yield "## Schemas\n"
    for name, schema in openapi["components"]["schemas"].items():
        yield f"### {name}\n"
        yield from _properties(schema)


def _operation(path: str, method: str, operation: Json) -> Iterator[str]:
    yield f"## `{method.upper()} {path}`\n"
    yield operation.get("summary", "") + ".\n"
    if "description" in operation:
        yield operation["description"] + "\n"
    if operation.get("parameters"):
        yield "| parameter | in | type | meaning |\n|---|---|---|---|"
        for one in operation["parameters"]:
            yield f"| `{one['name']}` | {one['in']} | {_type(one['schema'])} | {_cell(one.get('description', ''))} |"
        yield ""
    for kind, body in operation.get("requestBody", {}).get("content", {}).items():
        yield f"Body as `{kind}`: {_members(body['schema'])}\n"
    yield "| status | answer |\n|---|---|"
    for status, answer in operation["responses"].items():
        yield f"| {status} | {_answer(answer)} |"
    yield ""


def _answer(answer: Json) -> str:
    if "$ref" in answer:
        slug = answer["$ref"].rpartition("/")[2]
        return f"[{slug}](problems.md#{slug})"
    kinds = ", ".join(f"`{kind}`" for kind in answer.get("content", {}))
    return _cell(answer["description"]) + (f" ({kinds})" if kinds else "")


def _members(schema: Json) -> str:
    required = set(schema.get("required", ()))
    names = [f"**`{name}`**" if name in required else f"`{name}`" for name in schema.get("properties", {})]
    return ", ".join(names) or _type(schema)


def _properties(schema: Json) -> Iterator[str]:
    if "description" in schema:
        yield schema["description"] + "\n"
    if schema.get("properties"):
        yield "| member | type | meaning |\n|---|---|---|"
        for name, one in schema["properties"].items():
            yield f"| `{name}` | {_type(one)} | {_cell(one.get('description', ''))} |"
        yield ""


def _type(schema: Json) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema or "oneOf" in schema:
        return " or ".join(_type(one) for one in schema.get("anyOf", schema.get("oneOf")))
    if "enum" in schema:
        return ", ".join(f"`{one}`" for one in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type", "anything")
    told = " or ".join(kind) if isinstance(kind, list) else kind
    if told == "array":
        return f"list of {_type(schema.get('items', {}))}"
    low, high = schema.get("minimum"), schema.get("maximum")
    return told + (
        f", {'' if low is None else low} to {'' if high is None else high}" if (low, high) != (None, None) else ""
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _problems() -> Iterator[str]:
    from server.problems import KINDS

    yield "# Problems\n"
    yield "Every refusal is `application/problem+json`; compare its `type`, which is stable. Made from the code."
    yield 'Under `/v2` the same refusals come as that protocol has them, `{"error": "..."}`.\n'
    for kind in sorted(KINDS, key=lambda kind: (kind.status, kind.slug)):
        yield f"## {kind.slug} {{ #{kind.slug} }}\n\n{kind.status}, `{kind.type}`. {kind.title}. {kind.meaning}\n"


def _command() -> Iterator[str]:
    import typer.main

    from saccade.cli import app

    yield "# The command `saccade`\n\nEvery command's own `--help`."
    yield from _helps(typer.main.get_command(app), "saccade")
    yield from _stages()


def _stages() -> Iterator[str]:
    from training.stages import STAGES
    from training.stages.command import parser

    yield "\n# The fields of every stage\n"
    for name in STAGES:
        yield f"## Fields of saccade {name}\n\n```text\n{parser(name).format_help()}\n```\n"


def _helps(command: Any, name: str) -> Iterator[str]:
    with command.make_context(name, [], resilient_parsing=True, max_content_width=100) as context:
        yield f"\n## {name}\n\n```text\n{command.get_help(context)}\n```"
    for under in getattr(command, "commands", {}).values():
        yield from _helps(under, f"{name} {under.name}")

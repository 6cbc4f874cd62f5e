"""What the server sends at / and under /page/. What people do there: tests/page/."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import pytest

from saccade.backends import Backend
from server.page import page
from tests.server.house import PROBLEM, running

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
EXAMPLES = Path(__file__).parents[2] / "examples"


def get(backend: Backend, path: str, method: str = "GET", **headers: str) -> httpx.Response:
    async def once() -> httpx.Response:
        async with running(backend) as house:
            return await house.client.request(method, path, headers=headers)

    return asyncio.run(once())


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (BROWSER, "text/html"),
        ("text/html", "text/html"),
        ("text/html;q=0.5, application/json", "application/json"),
        ("application/json", "application/json"),
        ("*/*", "application/json"),
        ("nonsense", "application/json"),
    ],
)
def test_a_browser_gets_the_page_and_everybody_else_json(backend: Backend, accept: str, kind: str) -> None:
    response = get(backend, "/", accept=accept)
    assert response.headers["content-type"].split(";")[0] == kind
    assert response.headers["vary"] == "Accept"


def test_the_policy_lets_only_our_own_files_run(backend: Backend) -> None:
    response = get(backend, "/", accept=BROWSER)
    policy = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", response.text)


def test_a_file_is_sent_once(backend: Backend) -> None:
    first = get(backend, "/page/app.js")
    assert first.headers["content-type"] == "text/javascript; charset=utf-8"
    again = get(backend, "/page/app.js", **{"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["nothing.js", "../page.py", "%2e%2e/page.py", "..%2fpage.py", "", "samples", "/etc"])
def test_nothing_else_is_sent(backend: Backend, path: str) -> None:
    response = get(backend, f"/page/{path}")
    assert (response.status_code, response.headers["content-type"]) == (404, PROBLEM)


def test_every_file_that_is_named_is_there_and_no_other_host_is() -> None:
    for name, file in page.files().items():
        if not name.endswith((".html", ".js", ".css", ".svg")):
            continue
        text = file.data.decode()
        missing = {path for path in re.findall(r"/page/([\w./-]+\.\w+)", text)} - page.files().keys()
        assert not missing, name
        others = set(re.findall(r"https?://[^\s\"')]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not others, name
        assert text.count("\n") <= 300, name


def test_the_samples_are_the_examples() -> None:
    for sample, example in (
        ("cup.jpg", "photo.jpg"),
        ("hidden.jpg", "occluded.jpg"),
        ("hidden-mask.png", "occluded_mask.png"),
    ):
        assert page.files()[f"samples/{sample}"].data == (EXAMPLES / example).read_bytes()

"""What the page says when the server says no."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Route, expect

from tests.page.visitor import Visitor
from tests.server.process import Process, serving

KEY = "sk-of-the-page"


@pytest.fixture(scope="module")
def strict(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server that wants a key and reads small pictures only."""
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys.write_text(f'[[keys]]\nname = "page"\nsha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"\n')
    keys.chmod(0o600)
    with serving(repository, keys_file=keys, max_pixels=100_000) as process:
        yield process


def test_a_key_is_asked_for_once_and_then_used(browser: Browser, strict: Process) -> None:
    with Visitor.arriving(browser, strict.url) as visitor:
        expect(visitor.page.locator("#key-dialog")).to_be_visible()
        visitor.page.locator("#key").fill("sk-wrong")
        visitor.page.keyboard.press("Enter")
        expect(visitor.page.locator("#key-text")).to_contain_text("does not know this key")
        assert visitor.offences() == []
        visitor.page.locator("#key").fill(KEY)
        visitor.page.keyboard.press("Enter")
        expect(visitor.page.locator("#key-dialog")).to_be_hidden()
        visitor.sample(1)
        visitor.answered()
        visitor.page.reload()
        visitor.sample(1)
        visitor.answered()


def test_a_refusal_is_told_in_words(browser: Browser, strict: Process) -> None:
    with Visitor.arriving(browser, strict.url) as visitor:
        visitor.page.locator("#key").fill(KEY)
        visitor.page.keyboard.press("Enter")
        visitor.choose_file("image", "photo.jpg")
        notice = visitor.page.locator("#notice")
        expect(notice).to_contain_text("That is too large")
        expect(notice).to_contain_text("600 x 400")
        assert visitor.offences() == []
        visitor.page.locator("#notice-close").click()
        expect(notice).to_be_hidden()


def test_what_is_no_picture_is_told_before_it_is_sent(visitor: Visitor, tmp_path: Path) -> None:
    letter = tmp_path / "letter.png"
    letter.write_text("Dear server")
    visitor.choose_file("image", letter)
    expect(visitor.page.locator("#notice")).to_contain_text("PNG, JPEG and WebP work best")
    assert not visitor.sent_to("/depth")


def test_a_busy_server_counts_down_and_is_asked_again(visitor: Visitor) -> None:
    problem = {"type": "urn:saccade:problem:overloaded", "title": "Busy", "status": 429, "detail": "The queue is full."}
    visitor.page.route(
        "**/depth",
        lambda route: route.fulfill(
            status=429, json=problem, headers={"Retry-After": "2"}, content_type="application/problem+json"
        ),
        times=1,
    )
    visitor.sample()
    expect(visitor.page.locator("#notice")).to_contain_text("The server is busy")
    act = visitor.page.locator("#notice-act")
    expect(act).to_be_disabled()
    expect(act).to_be_enabled()
    act.click()
    visitor.answered()
    expect(visitor.page.locator("#notice")).to_be_hidden()


def test_a_problem_at_the_end_of_the_stream_is_told(visitor: Visitor) -> None:
    events = (
        'id: 1\nevent: accepted\ndata: {"total_steps": 1}\n\n'
        'id: 2\nevent: progress\ndata: {"done": 0, "total": 1, "phase": "denoise"}\n\n'
        'id: 3\nevent: problem\ndata: {"status": 503, "title": "Took too long", "detail": "Ask for fewer steps"}\n\n'
    )
    visitor.page.route("**/depth", lambda route: route.fulfill(body=events, content_type="text/event-stream"))
    visitor.sample()
    expect(visitor.page.locator("#notice")).to_contain_text("Ask for fewer steps.")
    expect(visitor.page.locator("#look")).to_be_enabled()


def test_a_server_that_went_away_is_told(visitor: Visitor) -> None:
    visitor.page.route("**/depth", lambda route: route.abort())
    visitor.sample()
    expect(visitor.page.locator("#notice")).to_contain_text("cannot be reached")


def test_a_server_that_finds_no_outlines_leaves_the_brush(visitor: Visitor) -> None:
    def without_masks(route: Route) -> None:
        if route.request.resource_type == "document":
            return route.continue_()
        return route.fulfill(json={"features": {"mask": False}})

    visitor.page.route(visitor.page.url, without_masks)
    visitor.page.reload()
    visitor.choose_task("amodal")
    visitor.sample(1)
    expect(visitor.page.locator("[name=tool]:visible")).to_have_count(2)
    visitor.page.locator("#marks").click()
    visitor.marked()
    assert not visitor.sent_to("/mask")

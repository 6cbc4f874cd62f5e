"""The page in a real Chromium, in front of a real server with the default model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.page.visitor import Visitor
from tests.server.process import Process, serving

ROOT = Path(__file__).parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# The camera is Chromium's own: a green picture with a moving disc.
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


def chromium() -> str | None:
    """$SACCADE_TEST_CHROMIUM, or the one on the path."""
    return os.environ.get("SACCADE_TEST_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    program = chromium()
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium, or name one in SACCADE_TEST_CHROMIUM")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="package")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model; the server's log lies beside it, so not in the checkout."""
    link = tmp_path_factory.mktemp("page") / "model_repository"
    link.symlink_to(ROOT / "model_repository")
    return link


@pytest.fixture(scope="package")
def site(repository: Path) -> Iterator[Process]:
    with serving(repository, batch_size=4) as process:
        yield process


@pytest.fixture
def visitor(browser: Browser, site: Process) -> Iterator[Visitor]:
    """Somebody at a desk, who asked for less motion."""
    with Visitor.arriving(browser, site.url) as arrived:
        yield arrived

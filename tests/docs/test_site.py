"""The site builds without a warning, holds what the code says, and asks no other host for anything."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from server import openapi, walls
from server.problems import KINDS
from server.settings import Settings
from tests.docs.runner import ROOT, commands
from tests.docs.test_documents import PAGES

LINK = re.compile(r"\[[^\]]*\]\((?!https?:|mailto:|#)([^)#\s]+)")
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}
OUTSIDE = re.compile(r"""(?:url\(|@import|importScripts\(|fetch\()\s*["']?(?:https?:)?//""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make docs` makes it."""
    path = tmp_path_factory.mktemp("site")
    ran = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return path


class Loaded(HTMLParser):
    """What a browser fetches by itself with a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in LOADED and given.get("rel") != "canonical" and (address := given.get(LOADED[tag])):
            self.addresses.append(address)


def test_no_page_asks_another_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    outside = {
        f"{page.relative_to(site)}: {address}"
        for page in pages
        for address in Loaded(page).addresses
        if re.match(r"(?:[a-z]+:)?//", address)
    }
    assert not outside
    styles = [file for file in site.rglob("*.css") if OUTSIDE.search(file.read_text("utf-8"))]
    assert not styles


def test_references_have_everything(site: Path) -> None:
    http = (site / "reference" / "http.html").read_text("utf-8")
    document = walls.dress(openapi.document(Settings()), Settings())
    missing = [path for path in document["paths"] if path not in http]
    assert not missing
    assert json.loads((site / "reference" / "openapi.json").read_text("utf-8")) == document
    problems = (site / "reference" / "problems.html").read_text("utf-8")
    assert not [kind.slug for kind in KINDS if f'id="{kind.slug}"' not in problems]
    command = (site / "reference" / "command.html").read_text("utf-8")
    assert not [name for name in commands() if f"saccade {name}" not in command]
    python = (site / "reference" / "python.html").read_text("utf-8")
    for name in (
        "saccade.client.Client.depth",
        "saccade.local.Local",
        "saccade.ddim.step",
        "saccade.errors.ServerError",
    ):
        assert f'id="{name}"' in python


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_in_the_checkout_too(page: Path) -> None:
    """For whoever reads the files where they lie."""
    wrong = [link for link in LINK.findall(page.read_text("utf-8")) if not (page.parent / link).exists()]
    generated = {"http.md", "problems.md", "command.md"}
    assert not [link for link in wrong if Path(link).name not in generated]


def test_the_changelog_keeps_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    headings = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in headings[1:])
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}

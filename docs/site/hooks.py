"""What MkDocs is told beyond mkdocs.yml: pages that lie elsewhere, pages made from the code, and links between all."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import reference  # beside this file; MkDocs looks there while it loads the hook
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "docker/README.md": "docker.md",
    "k8s/README.md": "kubernetes.md",
    "examples/README.md": "pictures.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, target in ELSEWHERE.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text("utf-8")))
    for target, content in reference.pages().items():
        files.append(File.generated(config, target, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links are written for whoever reads the files in the checkout; here they become the site's."""
    source = origin(page.file.src_uri)
    parts, at = [], 0
    for fence in FENCED.finditer(markdown):
        parts += [_relinked(markdown[at : fence.start()], source, page.file.src_uri), fence[0]]
        at = fence.end()
    return "".join([*parts, _relinked(markdown[at:], source, page.file.src_uri)])


def origin(uri: str) -> str:
    """Where in the checkout a page of the site comes from."""
    return next((source for source, target in ELSEWHERE.items() if target == uri), f"docs/{uri}")


def _relinked(markdown: str, source: str, uri: str) -> str:
    def link(found: re.Match[str]) -> str:
        image, text, target, anchor = found[1], found[2], found[3], found[4] or ""
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if there in ELSEWHERE:
            there = f"docs/{ELSEWHERE[there]}"
        elif there.startswith("docs/") or not (ROOT / there).exists():
            return found[0] if source.startswith("docs/") else _link(image, text, there, uri, anchor)
        elif image == "":
            return text  # a file of the checkout that is no page
        return _link(image, text, there, uri, anchor)

    return LINK.sub(link, markdown)


def _link(image: str, text: str, there: str, uri: str, anchor: str) -> str:
    return f"{image}[{text}]({posixpath.relpath(there.removeprefix('docs/'), posixpath.dirname(uri) or '.')}{anchor})"

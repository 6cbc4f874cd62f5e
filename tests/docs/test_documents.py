"""Every command and snippet of the documents, run as it stands against a real server on a port of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import blocks
from tests.docs.runner import ROOT, Failed, Folder, Page, server

PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / folder / "README.md" for folder in ("docker", "k8s", "examples")),
    ]
)


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, int]]:
    """A server with default settings, on its own engine and the default model."""
    with Folder(tmp_path_factory.mktemp("server") / "checkout") as folder, server(folder) as ports:
        yield ports


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_does_what_it_says(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    found = blocks(page, page.read_text("utf-8"))
    if not found:
        return
    runs = [block for block in found if not block.not_run and block.language in ("sh", "python")]
    needs_server = bool(runs) and not runs[0].serves
    ports = request.getfixturevalue("ports") if needs_server else {}
    with Folder(tmp_path / "checkout") as folder:
        Page(page, folder, ports).run()


PAGE = """
```sh
{first}
```

<!-- {mark} -->
```{language}
{second}
```
"""


def run(tmp_path: Path, first: str = "true", mark: str = "", language: str = "sh", second: str = "true") -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.format(first=first, mark=mark, language=language, second=second))
    with Folder(tmp_path / "checkout") as folder:
        Page(page, folder, {}).run()


def test_blocks_of_a_page_share_a_folder(tmp_path: Path) -> None:
    run(tmp_path, "echo 1 > one.txt", second="test -f one.txt && test -f examples/photo.jpg")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"first": "false"}, "ended with 1"),
        ({"first": "cat nothing | sort"}, "ended with 1"),
        ({"language": "python", "second": "raise SystemExit(3)"}, "ended with 3"),
        ({"language": "python", "second": "def"}, "invalid syntax"),
        ({"mark": "not run: no cluster", "second": "if"}, "syntax error"),
        ({"mark": "not run: no cluster", "second": "saccade dance"}, "no command saccade dance"),
        ({"mark": "not run: no cluster", "second": "python -m training.dance"}, "no module training.dance"),
        ({"mark": "expected to fail", "second": "true"}, "ended with 0"),
        ({"language": "toml", "second": "a = "}, "toml"),
        ({"language": "cobol", "second": "a"}, "what is 'cobol'"),
    ],
)
def test_a_block_that_does_not_is_named(tmp_path: Path, changed: dict[str, str], told: str) -> None:
    with pytest.raises(Failed, match=told) as caught:
        run(tmp_path, **changed)
    assert "page.md:" in str(caught.value)


@pytest.mark.parametrize(("mark", "told"), [("not run:", "say why"), ("not run", "say why")])
def test_what_is_not_run_says_why(tmp_path: Path, mark: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        run(tmp_path, mark=mark)


@pytest.mark.parametrize("mark", ["not run: it would fail", "expected to fail"])
def test_marks_hold_for_the_next_block_alone(tmp_path: Path, mark: str) -> None:
    run(tmp_path, mark=mark, second="exit 3")

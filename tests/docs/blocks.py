"""The fenced blocks of a Markdown page, and what is said about each on the line before it.

<!-- not run: why -->         it is parsed, no more: it needs Docker, a cluster, hours, the Internet
<!-- expected to fail -->     it must end with a status that is not 0
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>[\w+-]*)\s*(?P<rest>.*)$")
MARK = re.compile(r"^\s*<!-- *(?P<said>(?:not run|expected to fail).*?) *-->\s*$")
SERVES = re.compile(r"^(?:[A-Z_]+=\S* +)*(?:saccade serve|make serve)\b")


@dataclass(frozen=True)
class Block:
    """`line` is its first line's number in the page. `mark`: what the comment before it says, or ''."""

    page: Path
    line: int
    language: str
    text: str
    mark: str

    @property
    def not_run(self) -> str:
        """Why it is not run, or ''."""
        said, _, why = self.mark.partition(":")
        return why.strip() if said == "not run" else ""

    @property
    def fails(self) -> bool:
        return self.mark == "expected to fail"

    @property
    def serves(self) -> bool:
        """Whether its last command is a server, which stays for the rest of the page."""
        commands = [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip() and line[0] != "#"]
        return self.language == "sh" and bool(commands) and bool(SERVES.match(commands[-1]))

    def __str__(self) -> str:
        return f"{self.page}:{self.line} ({self.language})"


def blocks(page: Path, text: str) -> list[Block]:
    """Raises ValueError for a mark without a reason or without a block, and for a fence that does not end."""
    found: list[Block] = []
    lines = text.splitlines()
    at, mark = 0, ""
    while at < len(lines):
        opening = FENCE.match(lines[at])
        if opening is None:
            if mark and lines[at].strip():
                raise ValueError(f"{page}:{at}: no block follows on {mark!r}")
            mark = _mark(page, at, lines[at]) or mark
            at += 1
            continue
        end = _end(page, lines, at, opening["fence"])
        inner = [line.removeprefix(opening["indent"]) for line in lines[at + 1 : end]]
        found.append(Block(page, at + 2, opening["language"], "\n".join(inner) + "\n", mark))
        at, mark = end + 1, ""
    return found


def _mark(page: Path, at: int, line: str) -> str:
    mark = MARK.match(line)
    if mark is None:
        return ""
    said = mark["said"]
    if said.startswith("not run") and len(said.partition(":")[2].strip()) < 4:
        raise ValueError(f"{page}:{at + 1}: say why it is not run")
    return said


def _end(page: Path, lines: list[str], at: int, fence: str) -> int:
    for end in range(at + 1, len(lines)):
        if lines[end].strip().startswith(fence):
            return end
    raise ValueError(f"{page}:{at + 1}: the block does not end")

"""Somebody who uses the page, and what they can do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Download, Page, Request, expect

EXAMPLES = Path(__file__).parents[2] / "examples"
DESK: dict[str, Any] = {"viewport": {"width": 1360, "height": 860}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True
}  # fmt: skip
PATIENCE_MS = 60_000
AXE = Axe()
expect.set_options(timeout=PATIENCE_MS)


class Visitor:
    """`faults` are errors of the page's code and of its policy; `requests` is all that the browser asked for."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.faults: list[str] = []
        self.requests: list[Request] = []
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", lambda message: self._hear(message.type, message.text))
        page.on("request", lambda request: self.requests.append(request))

    @classmethod
    @contextmanager
    def arriving(cls, browser: Browser, url: str, **context: Any) -> Iterator[Self]:
        options = {**DESK, "reduced_motion": "reduce", **context}
        with browser.new_context(**options) as opened:
            self = cls(opened.new_page())
            self.page.goto(url)
            yield self
            assert not self.faults

    def _hear(self, kind: str, text: str) -> None:
        # An answer of 4xx is logged as an error by the browser itself.
        if kind == "error" and "Failed to load resource" not in text:
            self.faults.append(text)

    def choose_task(self, task: str) -> None:
        self.page.locator(f"[name=task][value={task}]").check()

    def choose_file(self, slot: str, *files: str | Path) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.page.locator(f"[data-choose={slot}]:visible").first.click()
        chooser.value.set_files([EXAMPLES / file for file in files])

    def sample(self, number: int = 0) -> None:
        self.page.locator("#samples button").nth(number).click()

    def view(self, name: str) -> None:
        self.page.locator(f"[name=view][value={name}]").check()

    def answered(self) -> None:
        """Wait until the answer is there."""
        expect(self.page.locator("#status")).to_contain_text("Found in")
        expect(self.page.locator("#result")).to_be_visible()

    def marked(self) -> None:
        """Wait until the outline is there."""
        expect(self.page.locator("#look")).to_be_enabled()
        expect(self.page.locator("#marks")).not_to_have_attribute("aria-busy", "true")

    def turn(self, dial: str, key: str, times: int = 1) -> None:
        slider = self.page.locator(f"#dial-{dial}-input")
        slider.focus()
        for _ in range(times):
            slider.press(key)

    def pixels(self, canvas: str) -> list[int]:
        """What the canvas shows: a sparse sample of its levels, and a sum over all of them."""
        script = """id => { const c = document.getElementById(id);
            const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
            const sample = Array.from({length: 997}, (_, i) => d[4 * Math.floor(i * d.length / 4 / 997) + i % 4]);
            return [...sample, d.reduce((sum, level, i) => (sum * 31 + level) % 1000003, 7)]; }"""
        levels: list[int] = self.page.evaluate(script, canvas)
        return levels

    def download(self, title: str, words: str) -> Download:
        with self.page.expect_download() as download:
            buttons = self.page.locator("#downloads button").filter(has_text=title)
            buttons.filter(has=self.page.get_by_text(words, exact=True)).click()
        return download.value

    def sent_to(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.url.split("?")[0].endswith(path)]

    def offences(self) -> list[str]:
        """What axe finds serious or critical by its own set of rules."""
        found = AXE.run(self.page).response["violations"]
        return [
            f"{each['id']}: {each['nodes'][0]['html'][:120]}"
            for each in found
            if each["impact"] in ("serious", "critical")
        ]

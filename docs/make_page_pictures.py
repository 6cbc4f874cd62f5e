"""Draws docs/images/page-*.png again: the page with the example pictures, at a desk and on a phone, light and dark.

python docs/make_page_pictures.py      needs the extra `test` and a Chromium
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from tests.page.conftest import FLAGS, ROOT, chromium
from tests.page.visitor import PHONE, Visitor
from tests.server.process import serving

IMAGES = ROOT / "docs" / "images"
TASKS = ("depth", "flow", "amodal")
GAP = 24
MOST_BYTES = 300_000


def draw(browser: Browser, url: str) -> None:
    for colours in ("light", "dark"):
        for task in TASKS:
            view, name = ("cloud", "cloud") if (task, colours) == ("depth", "dark") else ("compare", task)
            save(seen(browser, url, task, view, color_scheme=colours), f"page-{name}-{colours}")
        phones = [seen(browser, url, task, "compare", color_scheme=colours, **PHONE) for task in TASKS]
        save(beside(phones, (246, 245, 241) if colours == "light" else (18, 20, 22)), f"page-phone-{colours}")


def seen(browser: Browser, url: str, task: str, view: str, **context: Any) -> Image.Image:
    with Visitor.arriving(browser, url, **context) as visitor:
        visitor.choose_task(task)
        visitor.sample()
        visitor.answered()
        if task != "amodal":
            visitor.turn("steps", "Home")
            visitor.turn("steps", "ArrowRight", 5)
            visitor.page.locator("#film").get_by_text("step 6").wait_for()
            visitor.answered()
        visitor.view(view)
        visitor.page.mouse.move(0, 0)
        visitor.page.evaluate("() => { document.activeElement.blur(); scrollTo(0, 0); }")
        visitor.page.wait_for_timeout(600)
        return Image.open(io.BytesIO(visitor.page.screenshot())).convert("RGB")


def beside(pictures: list[Image.Image], ground: tuple[int, int, int]) -> Image.Image:
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, pictures[0].height), ground)
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index * (picture.width + GAP), 0))
    return sheet.resize((width * 5 // 9, sheet.height * 5 // 9), Image.Resampling.LANCZOS)


def save(picture: Image.Image, name: str) -> None:
    """In as many colours as the file's size allows."""
    for count in (256, 160, 96, 64):
        palette = picture.quantize(count, method=Image.Quantize.MEDIANCUT)
        out = io.BytesIO()
        picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(out, "PNG", optimize=True)
        if len(out.getvalue()) < MOST_BYTES:
            break
    (IMAGES / f"{name}.png").write_bytes(out.getvalue())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        repository = Path(folder) / "model_repository"
        repository.symlink_to(ROOT / "model_repository")
        with serving(repository, batch_size=4) as server:
            draw(playwright.chromium.launch(executable_path=chromium(), args=FLAGS), server.url)

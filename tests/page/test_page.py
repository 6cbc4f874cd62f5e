"""What people do on the page, in a real Chromium."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Error, Route, expect

from saccade.formats import read_mask
from saccade.metrics import iou
from tests.page.visitor import EXAMPLES, PHONE, Visitor
from tests.server.process import Process

SLOTS = {"depth": ["photo.jpg"], "flow": ["frame_1.png", "frame_2.png"], "amodal": ["occluded.jpg"]}
SIZES = {"depth": (400, 600), "flow": (192, 256), "amodal": (400, 600)}
DOWNLOADS = {
    "depth": {"16-bit depth": "png", "in colours": "png", "NPY": "npy", "NPZ": "npz", "PFM": "pfm", "EXR": "exr",
              "JSON": "json", "PLY": "ply"},
    "flow": {"FLO": "flo", "KITTI, 16 bit": "png", "in colours": "png", "NPY": "npy", "NPZ": "npz", "PFM": "pfm",
             "EXR": "exr", "JSON": "json"},
    "amodal": {"the object": "png", "its mask": "png", "over the picture": "png", "NPY": "npy", "NPZ": "npz",
               "EXR": "exr", "JSON": "json"},
}  # fmt: skip
MAGIC = {"png": b"\x89PNG", "npy": b"\x93NUMPY", "npz": b"PK", "pfm": b"P", "exr": b"v/1\x01", "json": b"{",
         "flo": b"PIEH", "ply": b"ply"}  # fmt: skip


def see(visitor: Visitor, task: str) -> None:
    """Bring the example pictures of a task, and wait for the answer."""
    visitor.choose_task(task)
    if task == "amodal":
        visitor.sample()
    else:
        visitor.choose_file("image", SLOTS[task][0])
    if task == "flow":
        visitor.choose_file("next", SLOTS[task][1])
    visitor.answered()


def test_depth_from_a_picture_of_ones_own(visitor: Visitor) -> None:
    see(visitor, "depth")
    assert len(set(visitor.pixels("over"))) > 20
    assert visitor.page.locator("#film li").count() >= 2
    expect(visitor.page.locator("#facts")).to_contain_text("saccade")
    (request,) = visitor.sent_to("/depth")
    assert request.headers["accept"].startswith("text/event-stream")


def test_turning_a_dial_looks_again_and_shows_every_step(visitor: Visitor) -> None:
    see(visitor, "depth")
    visitor.turn("steps", "Home")
    visitor.turn("steps", "ArrowRight", 4)
    expect(visitor.page.locator("#film")).to_contain_text("step 5")
    visitor.answered()
    expect(visitor.page.locator("#film li")).to_have_count(6)
    final = visitor.pixels("over")
    visitor.page.locator("#film button").first.click()
    assert visitor.pixels("over") != final
    visitor.page.locator("#film button").last.click()
    assert visitor.pixels("over") == final


def test_a_dial_turns_with_the_mouse(visitor: Visitor) -> None:
    box = visitor.page.locator("#dial-members svg").bounding_box()
    assert box is not None
    middle = box["x"] + box["width"] / 2
    visitor.page.mouse.move(box["x"] + 12, box["y"] + box["height"] / 2)
    visitor.page.mouse.down()
    visitor.page.mouse.move(middle, box["y"] + 8, steps=4)
    visitor.page.mouse.up()
    expect(visitor.page.locator("#dial-members-input")).to_have_attribute("aria-valuetext", "11 members")


def test_the_slider_compares(visitor: Visitor) -> None:
    see(visitor, "depth")
    over = visitor.page.locator("#over")
    visitor.page.locator("#split").focus()
    visitor.page.keyboard.press("Home")
    expect(over).to_have_css("clip-path", "inset(0px 0px 0px 0%)")
    visitor.page.keyboard.press("End")
    expect(over).to_have_css("clip-path", "inset(0px 0px 0px 100%)")


def test_uncertainty_is_seen_and_read(visitor: Visitor) -> None:
    see(visitor, "depth")
    visitor.view("uncertainty")
    assert len(set(visitor.pixels("over"))) > 20
    visitor.page.locator("#frame").hover()
    expect(visitor.page.locator("#readout")).to_contain_text("±")


def test_one_member_cannot_be_unsure(visitor: Visitor) -> None:
    visitor.turn("members", "Home")
    expect(visitor.page.locator("#uncertainty")).to_be_disabled()
    visitor.sample()
    visitor.answered()
    expect(visitor.page.locator("[name=view][value=uncertainty]")).to_be_disabled()


def test_what_was_turned_stays_when_the_server_answers_late(browser: Browser, site: Process) -> None:
    with Visitor.arriving(browser, "about:blank") as visitor:
        held: list[Route] = []

        def hold(route: Route) -> None:
            held.append(route)

        visitor.page.route("**/models", hold)
        with visitor.page.expect_request("**/models"):
            visitor.page.goto(site.url)
        visitor.turn("members", "Home")
        held.pop().continue_()
        expect(visitor.page.locator("#detail option").first).to_contain_text(" px)")
        expect(visitor.page.locator("#dial-members-input")).to_have_attribute("aria-valuetext", "1 member")
        visitor.choose_task("flow")
        expect(visitor.page.locator("#dial-members-input")).not_to_have_attribute("aria-valuetext", "1 member")


def test_the_point_cloud_turns_with_keys_and_mouse(visitor: Visitor) -> None:
    see(visitor, "depth")
    visitor.view("cloud")
    visitor.page.wait_for_timeout(800)  # it is drawn anew once its place has its size
    before = visitor.pixels("cloud")
    assert len(set(before)) > 20
    assert visitor.pixels("cloud") == before, "who asked for less motion gets none"
    visitor.page.locator("#cloud").focus()
    for _ in range(5):
        visitor.page.keyboard.press("ArrowLeft")
    turned = visitor.pixels("cloud")
    assert turned != before
    visitor.page.locator("#cloud").hover()
    visitor.page.mouse.down()
    visitor.page.mouse.move(500, 300)
    visitor.page.mouse.up()
    assert visitor.pixels("cloud") != turned


def test_the_point_cloud_spins_by_itself(browser: Browser, site: Process) -> None:
    with Visitor.arriving(browser, site.url, reduced_motion="no-preference") as visitor:
        see(visitor, "depth")
        visitor.view("cloud")
        before = visitor.pixels("cloud")
        visitor.page.evaluate("() => new Promise((r) => setTimeout(r, 1500))")
        assert visitor.pixels("cloud") != before


def test_motion_between_two_pictures(visitor: Visitor) -> None:
    see(visitor, "flow")
    expect(visitor.page.locator("#legend")).to_contain_text("px")
    visitor.page.locator("#frame").hover()
    expect(visitor.page.locator("#readout")).to_contain_text("px")


def test_a_next_frame_of_another_size_is_brought_to_the_firsts(visitor: Visitor) -> None:
    visitor.choose_task("flow")
    visitor.choose_file("image", "photo.jpg")
    visitor.choose_file("next", "frame_2.png")
    visitor.answered()
    expect(visitor.page.locator("#slot-next")).to_contain_text("brought to 600 \u00d7 400")


def test_clicking_finds_the_object_and_looking_completes_it(visitor: Visitor) -> None:
    visitor.choose_task("amodal")
    visitor.choose_file("image", "occluded.jpg")
    expect(visitor.page.locator("#look")).to_be_disabled()
    box = visitor.page.locator("#marks").bounding_box()
    assert box is not None
    for x, y in ((180, 150), (120, 230), (250, 110)):
        with visitor.page.expect_response("**/mask"):
            visitor.page.mouse.click(box["x"] + x / 600 * box["width"], box["y"] + y / 400 * box["height"])
        visitor.marked()
    visitor.page.locator("#look").click()
    visitor.answered()
    expect(visitor.page.locator("#legend")).to_contain_text("% of it was hidden")
    mask = visitor.download("PNG", "its mask").path().read_bytes()
    assert iou(read_mask(mask), read_mask((EXAMPLES / "occluded_mask.png").read_bytes())) > 0.7
    visitor.view("object")
    assert len(set(visitor.pixels("over"))) > 20


def test_a_mask_is_painted_and_undone_with_keys_alone(visitor: Visitor) -> None:
    visitor.choose_task("amodal")
    visitor.choose_file("image", "occluded.jpg")
    visitor.page.locator("[name=tool][value=paint]").check()
    visitor.page.locator("#marks").focus()
    clean = visitor.pixels("marks")
    visitor.page.keyboard.press("Enter")
    visitor.page.keyboard.press("ArrowRight")
    visitor.page.keyboard.press("Enter")
    visitor.marked()
    assert visitor.pixels("marks") != clean
    for _ in range(2):
        visitor.page.keyboard.press("Backspace")
    expect(visitor.page.locator("#look")).to_be_disabled()
    assert not visitor.sent_to("/mask")


def test_a_box_is_drawn_with_keys(visitor: Visitor) -> None:
    visitor.choose_task("amodal")
    visitor.choose_file("image", "occluded.jpg")
    visitor.page.locator("[name=tool][value=box]").check()
    visitor.page.locator("#marks").focus()
    for key in ("ArrowLeft",) * 8 + ("ArrowUp",) * 6 + ("Enter",) + ("ArrowRight",) * 10 + ("ArrowDown",) * 10:
        visitor.page.keyboard.press(key)
    with visitor.page.expect_response("**/mask") as answer:
        visitor.page.keyboard.press("Enter")
    assert answer.value.status == 200
    visitor.marked()


@pytest.mark.parametrize("task", DOWNLOADS)
def test_every_format_can_be_taken_away(visitor: Visitor, task: str) -> None:
    see(visitor, task)
    for words, extension in DOWNLOADS[task].items():
        download = visitor.download("", words)
        assert download.suggested_filename.endswith(f".{extension}")
        data = download.path().read_bytes()
        assert data.startswith(MAGIC[extension]), words
        check_size(data, extension, SIZES[task])
    assert visitor.page.locator("#downloads button").count() == len(DOWNLOADS[task])


def check_size(data: bytes, extension: str, size: tuple[int, int]) -> None:
    """At the picture's full size, whatever the page needed to show it."""
    if extension == "npy":
        assert np.load(io.BytesIO(data)).shape[:2] == size
    elif extension == "npz":
        assert {name: each.shape[:2] for name, each in np.load(io.BytesIO(data)).items()} == {
            "prediction": size, "uncertainty": size
        }  # fmt: skip
    elif extension == "png":
        assert Image.open(io.BytesIO(data)).size == size[::-1]
    elif extension == "json":
        assert json.loads(data)["shape"] == list(size)


def test_a_picture_can_be_dropped(visitor: Visitor) -> None:
    data = list((EXAMPLES / "photo.jpg").read_bytes())
    drop = """(data) => { const files = new DataTransfer();
        files.items.add(new File([new Uint8Array(data)], "dropped.jpg", {type: "image/jpeg"}));
        const stage = document.getElementById("stage");
        stage.dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true})); }"""
    visitor.page.evaluate(drop, data)
    visitor.answered()
    expect(visitor.page.locator("#slot-image")).to_contain_text("dropped.jpg")


def test_the_camera_takes_a_picture(visitor: Visitor) -> None:
    visitor.page.locator("[data-camera=image]:visible").click()
    expect(visitor.page.locator("#camera-dialog")).to_be_visible()
    visitor.page.locator("#camera-take").click()
    visitor.answered()
    expect(visitor.page.locator("#slot-image")).to_contain_text("camera.jpg")


def test_a_large_picture_is_sent_smaller_and_the_page_says_so(visitor: Visitor, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    Image.open(EXAMPLES / "photo.jpg").resize((3000, 2000)).save(large)
    visitor.choose_file("image", large)
    visitor.answered()
    expect(visitor.page.locator("#slot-image")).to_contain_text("3000 \u00d7 2000, sent as 1600 \u00d7 1067")


def test_the_whole_way_by_keyboard(visitor: Visitor) -> None:
    keys = visitor.page.keyboard
    visitor.page.locator("#samples button").first.focus()
    keys.press("Enter")
    visitor.answered()
    visitor.page.locator("[name=view]:checked").focus()
    keys.press("ArrowRight")
    expect(visitor.page.locator("[name=view][value=estimate]")).to_be_checked()
    seen = set()
    for _ in range(40):
        keys.press("Tab")
        seen.add(visitor.page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert {"dial-steps-input", "dial-members-input", "look", "uncertainty"} <= seen


def test_stop_withdraws_the_work(visitor: Visitor, site: Process) -> None:
    see(visitor, "depth")
    gone = 'saccade_cancelled_total{reason="disconnect",task="depth"}'
    before = site.counters().get(gone, 0)
    visitor.page.locator("summary").click()
    visitor.page.locator("#eager").uncheck()
    visitor.turn("steps", "End")
    visitor.turn("members", "End")
    visitor.page.locator("#look").click()
    expect(visitor.page.locator("#status")).to_contain_text("Refining")
    visitor.page.locator("#look").click()
    expect(visitor.page.locator("#look")).to_have_text("Look again")
    site.until(lambda: site.counters().get(gone, 0) > before)


def test_nothing_is_asked_of_another_host(visitor: Visitor, site: Process) -> None:
    for task in SLOTS:
        visitor.page.goto(site.url)
        see(visitor, task)
    hosts = {request.url.split("/page")[0] for request in visitor.requests if not request.url.startswith("blob:")}
    assert all(host.startswith(site.url) for host in hosts)


def test_scripts_that_are_not_the_pages_own_do_not_run(visitor: Visitor) -> None:
    for harm in ("document.body.innerHTML = '<b>harm</b>'", "document.body.setAttribute('onclick', 'harm()')"):
        with pytest.raises(Error, match="Trusted"):
            visitor.page.evaluate(f"() => {{ {harm}; }}")
    inline = """() => { const script = document.createElement("style"); script.textContent = "body { display: none }";
        document.head.append(script); }"""
    visitor.page.evaluate(inline)
    expect(visitor.page.locator("body")).to_be_visible()
    assert any("Content Security Policy" in fault for fault in visitor.faults)
    visitor.faults.clear()


@pytest.mark.parametrize("width", [320, 390])
@pytest.mark.parametrize("task", SLOTS)
def test_a_phone_shows_all_of_it(browser: Browser, site: Process, task: str, width: int) -> None:
    with Visitor.arriving(browser, site.url, **{**PHONE, "viewport": {"width": width, "height": 700}}) as visitor:
        see(visitor, task)
        visitor.page.get_by_text("More", exact=True).click()
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= width
        # Fonts differ in width between systems; these are the spacings of WCAG 2.2, 1.4.12.
        visitor.page.evaluate("Object.assign(document.body.style, {letterSpacing: '.12em', wordSpacing: '.16em'})")
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_finger_moves_the_slider_and_marks(browser: Browser, site: Process) -> None:
    with Visitor.arriving(browser, site.url, **PHONE) as visitor:
        visitor.choose_task("amodal")
        visitor.sample(1)
        visitor.page.locator("#marks").tap(position={"x": 110, "y": 90})
        visitor.marked()
        visitor.page.locator("#look").tap()
        visitor.answered()
        visitor.page.locator("#split").tap(position={"x": 40, "y": 60})
        assert float(visitor.page.locator("#split").input_value()) < 30


def test_colours_follow_the_system_and_the_button(browser: Browser, site: Process) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    with Visitor.arriving(browser, site.url, color_scheme="dark") as visitor:
        dark = visitor.page.evaluate(ground)
        visitor.page.locator("#theme").click()
        for come_back in (lambda: None, visitor.page.reload):
            come_back()
            visitor.page.wait_for_timeout(400)  # colours fade in a fifth of a second
            assert visitor.page.evaluate(ground) != dark


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("task", SLOTS)
def test_axe_finds_nothing_serious(browser: Browser, site: Process, task: str, colours: str) -> None:
    with Visitor.arriving(browser, site.url, color_scheme=colours) as visitor:
        visitor.choose_task(task)
        assert visitor.offences() == []
        see(visitor, task)
        visitor.page.locator("summary").click()
        assert visitor.offences() == []
        for view in visitor.page.locator("[name=view]:enabled:visible").all():
            view.check()
            assert visitor.offences() == []
        visitor.page.locator("#key-open").click()
        assert visitor.offences() == []

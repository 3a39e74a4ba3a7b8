"""The studio in a real browser, on a real server with the embedded model."""

from __future__ import annotations

import io
import re
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image, ImageChops, PngImagePlugin
from playwright.sync_api import Browser, Locator, Page, expect

from sfumato.pictures.store import Store
from support import browser as chrome
from support.browser import visit
from support.ports import free_port
from support.serving import Server

TABS = ("Make", "Rework", "Gallery", "Compare", "Server")
ROCKET = "a rocket on a blue background"
LONG = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft " * 6
MARKUP = "<img src=x onerror=\"window.pwned=1;alert('pwned')\"> <b>a cat</b>"
DONE = re.compile(r"/generated-images/")
SLOW = 400
"""Steps of a drawing that is looked at on its way."""

SCREENSHOTS = Path(__file__).parent.parent / "docs" / "images"

expect.set_options(timeout=chrome.PATIENCE_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chrome.chromium() as browser:
        yield browser


def serve(folder: Path, *flags: str) -> Server:
    (folder / "models").mkdir(exist_ok=True)
    return Server(folder / "models", folder / "data", *flags)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("studio")) as server:
        yield server


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    with visit(browser, server.url) as (page, _):
        yield page


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def box(page: Page, name: str) -> Locator:
    return page.get_by_role("textbox", name=name, exact=True)


def result(page: Page) -> Locator:
    return page.get_by_role("img", name="Result", exact=True)


def go(page: Page, tab: str) -> None:
    page.get_by_role("link", name=tab, exact=True).click()
    expect(page.get_by_role("link", name=tab, exact=True)).to_have_attribute("aria-current", "page")


def steps(page: Page, number: int) -> None:
    page.get_by_label("Steps", exact=True).fill(str(number))


def draw(page: Page, prompt: str | None = None) -> str:
    """Draw, and wait for the picture; its URL."""
    before = result(page).get_attribute("src") if result(page).count() else ""
    if prompt is not None:
        box(page, "Prompt").fill(prompt)
    button(page, "Draw").click()
    if before:
        expect(result(page)).not_to_have_attribute("src", before)
    expect(result(page)).to_have_attribute("src", DONE)
    return str(result(page).get_attribute("src"))


def opened(page: Page, url: str) -> Image.Image:
    return Image.open(io.BytesIO(page.request.get(url).body()))


def tiles(page: Page) -> Locator:
    return page.get_by_role("list", name="Gallery").get_by_role("listitem")


def running(page: Page) -> list[dict[str, Any]]:
    return page.request.get("/v1/images/progress").json()["data"]  # type: ignore[no-any-return]


def until(page: Page, wanted: int) -> None:
    """So many requests wait or draw."""
    deadline = time.monotonic() + chrome.PATIENCE_MS / 1000
    while len(running(page)) != wanted:
        assert time.monotonic() < deadline, running(page)


# Make.


def test_the_first_picture_from_an_empty_profile(page: Page) -> None:
    expect(page.get_by_role("heading", name="What shall it be?")).to_be_visible()
    expect(button(page, ROCKET)).to_be_visible()
    assert not page.request.get("/v1/models").json()["data"][0]["sfumato"]["defaults"]["scheduler"]
    button(page, ROCKET).click()
    expect(result(page)).to_have_attribute("src", DONE)
    assert opened(page, str(result(page).get_attribute("src"))).size == (128, 128)
    expect(box(page, "Prompt")).to_have_value(ROCKET)
    expect(page.get_by_role("combobox", name="Model", exact=True)).to_have_value("sfumato-tiny")


def test_the_picture_grows_out_of_its_steps(page: Page) -> None:
    steps(page, 60)
    page.evaluate(
        """() => { window.seen = new Set();
        const look = () => document.querySelectorAll('img[alt=Result]').forEach((one) => seen.add(one.src));
        new MutationObserver(look)
          .observe(document.body, { subtree: true, childList: true, attributes: true, attributeFilter: ['src'] }); }"""
    )
    draw(page, ROCKET)
    seen = page.evaluate("[...window.seen]")
    previews = [src for src in seen if src.startswith("data:image/png")]
    assert len(previews) == 3, [src[:40] for src in seen]
    assert DONE.search(seen[-1])


def test_ctrl_enter_draws_and_progress_is_told(page: Page) -> None:
    steps(page, SLOW)
    box(page, "Prompt").fill(ROCKET)
    box(page, "Prompt").press("Control+Enter")
    expect(page.get_by_role("status")).to_have_text(re.compile(rf"Step \d+ of {SLOW}, .* left"))
    expect(page.get_by_role("progressbar", name="Progress")).to_be_visible()
    button(page, "Cancel").click()
    expect(page.get_by_role("status")).to_have_text("Stopped")
    until(page, 0)
    expect(button(page, "Cancel")).to_have_count(0)


def test_two_in_flight_and_cancel_all(page: Page) -> None:
    steps(page, 1000)
    box(page, "Prompt").fill(ROCKET)
    button(page, "Draw").click()
    box(page, "Prompt").fill("a cat")
    button(page, "Draw").click()
    until(page, 2)
    assert {each["prompt"] for each in running(page)} == {ROCKET, "a cat"}
    expect(page.get_by_role("list", name="Made in this tab").get_by_role("listitem")).to_have_count(2)
    button(page, "Cancel all").click()
    until(page, 0)


def test_pictures_of_one_request_come_one_by_one_and_none_steals_the_view(page: Page) -> None:
    page.get_by_label("Count", exact=True).fill("3")
    steps(page, 6)
    box(page, "Prompt").fill(ROCKET)
    button(page, "Draw").click()
    strip = page.get_by_role("list", name="Made in this tab").get_by_role("listitem")
    expect(strip).to_have_count(3)
    expect(strip.locator("img")).to_have_count(3)
    expect(page.get_by_role("status")).to_have_text("3 pictures, all done")
    strip.last.get_by_role("button").first.click()
    looked = str(result(page).get_attribute("src"))
    page.get_by_label("Count", exact=True).fill("1")
    for number in range(2):
        box(page, "Prompt").fill("a cat")
        button(page, "Draw").click()
        expect(strip.locator("img")).to_have_count(4 + number)
        strip.last.get_by_role("button").first.click()
        expect(result(page)).to_have_attribute("src", looked)


def test_prompts_are_remembered_back_and_forward(page: Page) -> None:
    steps(page, 2)
    draw(page, "one cat")
    draw(page, "two cats")
    box(page, "Prompt").fill("three c")
    button(page, "Earlier prompt").click()
    button(page, "Earlier prompt").click()
    expect(box(page, "Prompt")).to_have_value("one cat")
    button(page, "Later prompt").click()
    expect(box(page, "Prompt")).to_have_value("two cats")
    button(page, "Later prompt").click()
    expect(box(page, "Prompt")).to_have_value("three c")
    page.reload()
    expect(box(page, "Prompt")).to_have_value("three c")


def test_a_seed_is_kept_and_given_again(page: Page) -> None:
    steps(page, 4)
    one = opened(page, draw(page, ROCKET))
    seed = page.get_by_label("Seed", exact=True).input_value()
    other = opened(page, draw(page))
    assert page.get_by_label("Seed", exact=True).input_value() != seed
    page.get_by_label("Seed", exact=True).fill(seed)
    again = opened(page, draw(page))
    assert ImageChops.difference(one, again).getbbox() is None
    assert ImageChops.difference(one, other).getbbox() is not None


def test_what_is_wrong_is_said_where_it_is(browser: Browser, server: Server) -> None:
    with visit(browser, server.url) as (page, watch):
        button(page, "Draw").click()
        expect(page.get_by_role("alert")).to_have_text("Say what to draw.")
        page.get_by_label("Width", exact=True).fill("100")
        box(page, "Prompt").fill(ROCKET)
        button(page, "Draw").click()
        expect(page.locator("#size-about")).to_contain_text("multiples of 8")
        expect(page.locator(".canvas").get_by_role("alert")).to_contain_text("multiples of 8")
        page.get_by_label("Width", exact=True).fill("")
        expect(page.locator("#size-about")).to_have_count(0)
        button(page, "Try again").click()
        expect(page.locator(".canvas").get_by_role("alert")).to_contain_text("multiples of 8")
        watch.forgive(re.compile("status of 400"))


def test_only_what_the_model_takes_is_shown(browser: Browser, tmp_path: Path) -> None:
    import sfumato

    (tmp_path / "models").mkdir()
    tiny = Path(sfumato.__file__).parent / "models" / "sfumato-tiny"
    (tmp_path / "models" / "plain.yaml").write_text(
        f"name: plain\nparameters:\n  model: {tiny}\nstep: 7\nsize: 64x64\ndiffusers:\n  enable_parameters: image\n"
    )
    with serve(tmp_path) as server, visit(browser, server.url) as (page, _):
        model = page.get_by_role("combobox", name="Model", exact=True)
        expect(model).to_have_value("plain")
        expect(page.get_by_label("Guidance", exact=True)).to_be_visible()
        for name in ("Negative prompt", "Steps", "Clip skip"):
            expect(page.get_by_label(name, exact=True)).to_have_count(0)
        expect(page.get_by_label("Width", exact=True)).to_have_attribute("placeholder", "64")
        expect(page.get_by_role("button", name=re.compile("^Add a "))).to_have_count(0)  # there are no adapters
        model.select_option("sfumato-tiny")
        expect(page.get_by_label("Steps", exact=True)).to_have_attribute("placeholder", "20")
        expect(box(page, "Negative prompt")).to_be_visible()


# What outlives what.


def test_a_reload_finds_the_drawing_again(page: Page) -> None:
    steps(page, SLOW)
    box(page, "Prompt").fill(ROCKET)
    button(page, "Draw").click()
    expect(page.get_by_role("status")).to_have_text(re.compile("Step"))
    (before,) = running(page)
    page.reload()
    expect(page.get_by_role("status")).to_have_text(re.compile("Step"))
    expect(result(page)).to_be_visible()
    assert [each["id"] for each in running(page)] == [before["id"]]
    button(page, "Cancel").click()
    until(page, 0)
    steps(page, 30)
    button(page, "Draw").click()
    until(page, 1)
    page.reload()
    expect(result(page)).to_have_attribute("src", DONE)


@pytest.mark.slow  # two servers, as the next one
def test_a_server_that_dies_in_the_middle_is_waited_for_and_the_picture_drawn(browser: Browser, tmp_path: Path) -> None:
    port = str(free_port())
    with serve(tmp_path, "--port", port) as first, visit(browser, first.url) as (page, watch):
        steps(page, SLOW)
        page.get_by_label("Seed", exact=True).fill("7")
        box(page, "Prompt").fill(ROCKET)
        button(page, "Draw").click()
        expect(page.get_by_role("status")).to_have_text(re.compile("Step"))
        first._process.send_signal(signal.SIGKILL)
        expect(page.get_by_role("alert")).to_contain_text("does not respond")
        first.stop()
        with serve(tmp_path, "--port", port):
            expect(page.get_by_role("alert")).to_have_count(0)
            expect(page.get_by_role("status")).to_have_text(re.compile("Step"))
            button(page, "Cancel").click()
            steps(page, 4)
            draw(page)
        watch.forgive(chrome.AWAY)
        watch.forgive(re.compile("status of 503"))  # while it starts


@pytest.mark.slow
def test_the_gallery_outlives_a_reload_and_a_restart(browser: Browser, tmp_path: Path) -> None:
    port = str(free_port())
    with serve(tmp_path, "--port", port) as first, visit(browser, first.url) as (page, _):
        steps(page, 2)
        draw(page, ROCKET)
        go(page, "Gallery")
        expect(tiles(page)).to_have_count(1)
        page.reload()
        expect(tiles(page)).to_have_count(1)
        expect(tiles(page).get_by_role("img")).to_have_attribute("alt", ROCKET)
    for file in (tmp_path / "data").glob("gallery.db*"):
        file.unlink()  # an index, and no more
    with serve(tmp_path, "--port", port) as second, visit(browser, second.url) as (page, _):
        go(page, "Gallery")
        expect(tiles(page)).to_have_count(1)


# Gallery.


def test_use_all_gives_the_same_pixels(page: Page) -> None:
    steps(page, 6)
    page.get_by_label("Guidance", exact=True).fill("4.5")
    page.get_by_label("Scheduler", exact=True).select_option("ddim")
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Eta", exact=True).fill("0.8")
    page.get_by_label("Guidance rescale", exact=True).fill("0.7")
    box(page, "Negative prompt").fill("blurry")
    page.get_by_label("Height", exact=True).fill("96")
    first = opened(page, draw(page, "a red apple on a white background"))
    assert first.size == (128, 96)
    page.evaluate("localStorage.clear()")
    page.reload()
    page.evaluate("sessionStorage.clear()")
    page.reload()
    expect(box(page, "Prompt")).to_have_value("")
    go(page, "Gallery")
    tiles(page).first.click()
    expect(page.get_by_role("dialog")).to_contain_text("Guidance rescale")
    button(page, "Use all").click()
    expect(page.get_by_role("link", name="Make", exact=True)).to_have_attribute("aria-current", "page")
    expect(page.get_by_label("Eta", exact=True)).to_have_value("0.8")
    again = opened(page, draw(page))
    assert ImageChops.difference(first, again).getbbox() is None


def test_search_star_select_and_delete_by_keys(browser: Browser, tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        for prompt in ("one cat", "two cats", "three rockets", "four rockets"):
            assert server.draw(prompt=prompt, steps=1, size="64x64").status_code == 200
        with visit(browser, server.url) as (page, _):
            go(page, "Gallery")
            expect(tiles(page)).to_have_count(4)
            page.get_by_label("Search", exact=True).fill("CAT")
            expect(tiles(page)).to_have_count(2)
            page.get_by_label("Search", exact=True).fill("")
            expect(tiles(page)).to_have_count(4)
            tiles(page).nth(1).get_by_role("button").first.focus()
            page.keyboard.press("s")
            expect(tiles(page).nth(1).get_by_role("button", name="Star")).to_have_attribute("aria-pressed", "true")
            page.keyboard.press("ArrowRight")
            page.keyboard.press(" ")
            page.keyboard.press("Shift+ArrowRight")
            expect(page.get_by_role("group", name="Selection")).to_contain_text("2 files selected")
            page.keyboard.press("Delete")
            page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
            expect(tiles(page)).to_have_count(2)
            page.get_by_label("Starred", exact=True).check()
            expect(tiles(page)).to_have_count(1)
            expect(tiles(page).get_by_role("img")).to_have_attribute("alt", "three rockets")
            tiles(page).first.get_by_role("button").first.press("Enter")
            expect(button(page, "Use all")).to_be_visible()
            with page.expect_download() as download:
                page.keyboard.press("d")
            assert download.value.suggested_filename.endswith(".png")
            page.keyboard.press("Escape")
            expect(button(page, "Use all")).to_have_count(0)
        assert server.client.get("/v1/images/gallery").json()["total"] == 2


def test_a_new_picture_waits_until_it_is_asked_for(page: Page, server: Server) -> None:
    steps(page, 2)
    draw(page, ROCKET)
    steps(page, 60)
    button(page, "Draw").click()
    go(page, "Gallery")
    first = str(tiles(page).first.get_by_role("img").get_attribute("src"))
    expect(page.get_by_role("button", name=re.compile(r"new file.*: show"))).to_be_visible()
    expect(tiles(page).first.get_by_role("img")).to_have_attribute("src", first)
    page.get_by_role("button", name=re.compile(r"new file.*: show")).click()
    expect(tiles(page).first.get_by_role("img")).not_to_have_attribute("src", first)


def foreign() -> bytes:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(
        "parameters",
        "a castle\nNegative prompt: fog\nSteps: 9, Sampler: Euler a, CFG scale: 2.5, "
        "Seed: 9007199254740993, Size: 64x96",
    )
    file = io.BytesIO()
    Image.new("RGB", (64, 96), "navy").save(file, "PNG", pnginfo=chunks)
    return file.getvalue()


def test_a_file_of_another_program_is_read(browser: Browser, server: Server) -> None:
    with visit(browser, server.url) as (page, watch):
        go(page, "Gallery")
        chooser = page.locator("input[type=file]")
        chooser.set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": foreign()})
        expect(page.get_by_role("dialog")).to_contain_text("automatic1111")
        button(page, "Use all").click()
        expect(box(page, "Prompt")).to_have_value("a castle")
        expect(box(page, "Negative prompt")).to_have_value("fog")
        wanted = {"Steps": "9", "Guidance": "2.5", "Seed": "9007199254740993", "Width": "64", "Height": "96"}
        for name, value in (wanted | {"Scheduler": "euler_a"}).items():
            expect(page.get_by_label(name, exact=True)).to_have_value(value)
        draw(page)
        go(page, "Gallery")
        chooser.set_input_files({"name": "b.png", "mimeType": "image/png", "buffer": photo()})
        expect(page.get_by_role("alert")).to_contain_text("does not say how it was made")
        watch.forgive(re.compile("status of 400"))


def test_ten_thousand_pictures_scroll_and_are_searched(browser: Browser, tmp_path: Path) -> None:
    from support.gallery import png

    folder = tmp_path / "data" / "generated-images"
    folder.mkdir(parents=True)
    with serve(tmp_path) as server:
        server.client.get("/v1/images/gallery")
        data = png()
        names = [Store.new_name("", "png") for _ in range(10_000)]
        for name in names[-200:]:
            (folder / name).write_bytes(data)
        for name in names[:-200]:
            (folder / name).hardlink_to(folder / names[-1])
        with sqlite3.connect(tmp_path / "data" / "gallery.db") as index:
            rows = [
                (
                    name,
                    1000.0 + number,
                    "",
                    "m",
                    f"a cat number {number}",
                    False,
                    f'{{"prompt": "a cat number {number}"}}',
                )
                for number, name in enumerate(names)
            ]
            index.executemany("INSERT INTO pictures VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        took = []
        for _ in range(20):
            began = time.perf_counter()
            assert server.client.get("/v1/images/gallery?q=number 9876").json()["total"] == 1
            took.append(time.perf_counter() - began)
        assert sorted(took)[2] < 0.1, took
        with visit(browser, server.url) as (page, _):
            go(page, "Gallery")
            expect(page.get_by_text("10000 files")).to_be_visible()
            expect(tiles(page)).to_have_count(60)
            tiles(page).first.get_by_role("button").first.focus()
            for _ in range(3):
                count = tiles(page).count()
                page.keyboard.press("End")
                expect(tiles(page)).not_to_have_count(count)
            page.get_by_label("Search", exact=True).fill("number 9876")
            expect(tiles(page)).to_have_count(1)
            expect(tiles(page).get_by_role("img")).to_have_attribute("alt", "a cat number 9876")


# Rework.


def photo(orientation: int = 1) -> bytes:
    """Wide, red on its left, and turned by EXIF."""
    image = Image.new("RGB", (128, 96), "white")
    image.paste("red", (0, 0, 64, 96))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif.tobytes()) if orientation == 1 else image.save(file, "JPEG", exif=exif.tobytes())
    return file.getvalue()


def upload(page: Page, data: bytes, kind: str = "png") -> Locator:
    go(page, "Rework")
    page.locator("input[type=file]").set_input_files({"name": f"p.{kind}", "mimeType": f"image/{kind}", "buffer": data})
    mask = page.get_by_role("img", name="Mask", exact=True)
    expect(mask).to_be_visible()
    return mask


def paint(page: Page, mask: Locator, *points: tuple[float, float]) -> None:
    box = mask.bounding_box()
    assert box
    places = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=6)
    page.mouse.up()


@pytest.mark.parametrize("area_only", [False, True])
def test_a_mask_edit_leaves_the_outside_as_it_was(page: Page, area_only: bool) -> None:
    source = Image.open(io.BytesIO(photo())).convert("RGB")
    mask = upload(page, photo())
    page.get_by_label("Brush size", exact=True).fill("20")
    paint(page, mask, (0.4, 0.5), (0.6, 0.5))
    page.get_by_label("Masked area only", exact=True).set_checked(area_only)
    steps(page, 6)
    edited = opened(page, draw(page, "a green apple")).convert("RGB")
    assert edited.size == source.size
    changed = ImageChops.difference(source, edited).getbbox()
    assert changed is not None
    left, top, right, bottom = changed
    assert left >= 128 * 0.4 - 12 and right <= 128 * 0.6 + 12
    assert top >= 48 - 12 and bottom <= 48 + 12


def painted(page: Page) -> float:
    """Part of the picture that is masked."""
    count = page.get_by_role("img", name="Mask", exact=True).evaluate(
        "c => { const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0;"
        " for (let i = 3; i < d.length; i += 4) n += d[i] > 127; return n / (c.width * c.height); }"
    )
    return float(count)


def test_brush_eraser_size_undo_invert_zoom_and_move(page: Page) -> None:
    mask = upload(page, photo())
    before = page.get_by_label("Brush size", exact=True).input_value()
    mask.focus()
    page.keyboard.press("]")
    assert int(page.get_by_label("Brush size", exact=True).input_value()) > int(before)
    page.keyboard.press("[")
    page.keyboard.press("[")
    assert int(page.get_by_label("Brush size", exact=True).input_value()) < int(before)
    paint(page, mask, (0.3, 0.5), (0.7, 0.5))
    one = painted(page)
    assert 0.02 < one < 0.4
    button(page, "Eraser").click()
    paint(page, mask, (0.5, 0.2), (0.5, 0.8))
    assert painted(page) < one
    button(page, "Undo").click()
    assert painted(page) == one
    button(page, "Invert").click()
    assert abs(painted(page) - (1 - one)) < 0.02
    page.keyboard.press("Control+z")
    assert abs(painted(page) - one) < 0.001
    button(page, "Clear").click()
    assert painted(page) == 0
    wide = mask.bounding_box()["width"]  # type: ignore[index]
    button(page, "Zoom in").click()
    assert mask.bounding_box()["width"] > wide * 1.3  # type: ignore[index]
    at = mask.bounding_box()["x"]  # type: ignore[index]
    button(page, "Move").click()
    paint(page, mask, (0.5, 0.5), (0.6, 0.5))
    assert mask.bounding_box()["x"] > at + 10  # type: ignore[index]
    assert painted(page) == 0
    button(page, "Fit").click()
    assert abs(mask.bounding_box()["width"] - wide) < 1  # type: ignore[index]
    button(page, "Brush").click()
    mask.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press(" ")
    assert painted(page) > 0


def test_a_phones_photo_stands_upright(page: Page) -> None:
    mask = upload(page, photo(orientation=6), "jpeg")
    assert (mask.get_attribute("width"), mask.get_attribute("height")) == ("96", "128")
    steps(page, 3)
    drawn = opened(page, draw(page, "a cat"))
    assert drawn.size == (96, 128)


def test_a_result_is_sent_back_with_one_key_and_varied(page: Page) -> None:
    steps(page, 3)
    first = draw(page, ROCKET)
    button(page, "Vary a little").click()
    expect(result(page)).not_to_have_attribute("src", first)
    expect(result(page)).to_have_attribute("src", DONE)
    page.locator("body").press("r")
    expect(page.get_by_role("img", name="Mask", exact=True)).to_be_visible()
    expect(page.get_by_role("img", name="Source", exact=True)).to_be_visible()
    expect(box(page, "Prompt")).to_have_value(ROCKET)


# Compare and server.


def test_a_grid_fills_and_is_one_picture_to_keep(page: Page) -> None:
    go(page, "Compare")
    box(page, "Prompt").fill("a {cat|rocket} on a blue background")
    page.get_by_label("Values across", exact=True).fill("2, 4, 6")
    page.get_by_label("Down", exact=True).select_option("prompt")
    button(page, "Draw").click()
    expect(page.get_by_role("status")).to_have_text("6 of 6 done")
    expect(page.get_by_role("columnheader")).to_have_text(["Steps 2", "Steps 4", "Steps 6"])
    rows = ["a cat on a blue background", "a rocket on a blue background"]
    expect(page.get_by_role("rowheader")).to_have_text(rows)
    assert page.get_by_role("table").get_by_role("img").count() == 6
    with page.expect_download() as download:
        button(page, "Download as one picture").click()
    with Image.open(download.value.path()) as sheet:
        assert sheet.width > 3 * 128 and sheet.height > 2 * 128
    page.get_by_label("Down", exact=True).select_option("steps")
    button(page, "Draw").click()
    expect(page.get_by_role("alert")).to_contain_text("Both sides are the same")


def test_the_server_is_shown_and_models_are_loaded_and_unloaded(page: Page) -> None:
    steps(page, 2)
    draw(page, ROCKET)
    go(page, "Server")
    expect(page.get_by_text("in memory", exact=False).first).to_be_visible()
    button(page, "Unload sfumato-tiny").click()
    expect(button(page, "Load sfumato-tiny")).to_be_visible()
    button(page, "Pin sfumato-tiny").click()
    expect(button(page, "Pin sfumato-tiny")).to_have_attribute("aria-pressed", "true")
    button(page, "Load sfumato-tiny").click()
    expect(button(page, "Unload sfumato-tiny")).to_be_visible()
    button(page, "Pin sfumato-tiny").click()
    expect(button(page, "Pin sfumato-tiny")).to_have_attribute("aria-pressed", "false")
    expect(page.get_by_role("img", name=re.compile("Steps a second"))).to_be_visible()


# Everywhere.


def test_markup_in_a_prompt_is_shown_as_text(page: Page) -> None:
    steps(page, 2)
    draw(page, MARKUP)
    box(page, "Prompt").fill(ROCKET)
    draw(page)
    for tab in TABS:
        go(page, tab)
        assert page.locator("img[src=x]").count() == 0
    go(page, "Gallery")
    page.get_by_label("Search", exact=True).fill("onerror")
    expect(tiles(page)).to_have_count(1)
    tiles(page).first.click()
    expect(page.get_by_role("dialog").get_by_text(MARKUP)).to_be_visible()
    button(page, "Use all").click()
    expect(box(page, "Prompt")).to_have_value(MARKUP)
    go(page, "Compare")
    page.get_by_label("Values across", exact=True).fill("2")
    page.get_by_label("Down", exact=True).select_option("")
    button(page, "Draw").click()
    expect(page.get_by_role("status")).to_have_text("1 of 1 done")
    assert page.locator("img[src=x]").count() == 0
    assert page.evaluate("window.pwned") is None


def test_a_key_is_asked_for_once(browser: Browser, tmp_path: Path) -> None:
    with serve(tmp_path, "--api-keys", "alice:alice-key,bob:bob-key") as server:
        with visit(browser, server.url) as (page, watch):
            page.get_by_label("API key", exact=True).fill("wrong")
            button(page, "Go on").click()
            expect(page.get_by_role("dialog")).to_contain_text("not valid")
            page.get_by_label("API key", exact=True).fill("alice-key")
            button(page, "Go on").click()
            expect(page.get_by_role("dialog")).to_have_count(0)
            steps(page, 2)
            draw(page, ROCKET)
            go(page, "Gallery")
            expect(tiles(page)).to_have_count(1)
            page.reload()
            expect(tiles(page)).to_have_count(1)
            expect(page.get_by_role("dialog")).to_have_count(0)
            watch.forgive(re.compile("status of 401"))
        with visit(browser, server.url) as (page, watch):
            page.get_by_label("API key", exact=True).fill("bob-key")
            button(page, "Go on").click()
            go(page, "Gallery")
            expect(page.get_by_role("heading", name="Nothing here yet")).to_be_visible()
            hers = server.client.get("/v1/images/gallery", headers={"authorization": "Bearer alice-key"})
            assert len(hers.json()["data"]) == 1
            watch.forgive(re.compile("status of 401"))


SHAPES = {"wide": (1440, 900), "narrow": (360, 740)}


@pytest.fixture(scope="module")
def filled(server: Server) -> Server:
    """Pictures of all shapes, and long words."""
    wanted = [("a cat on a green background", "128x128"), ("a red apple on a white background", "128x128"),
              (LONG, "64x64"), ("a wide rocket", "256x64"), ("a tall rocket", "64x256")]  # fmt: skip
    for seed, (prompt, size) in enumerate(wanted, 3):
        assert server.draw(prompt=prompt, size=size, steps=8, seed=seed).status_code == 200
    return server


def everywhere(page: Page) -> Iterator[str]:
    """Each tab, with something to see on it, and an opened picture."""
    steps(page, 8)
    draw(page, ROCKET)
    box(page, "Prompt").fill(LONG)
    yield "make"
    upload(page, photo())
    paint(page, page.get_by_role("img", name="Mask", exact=True), (0.4, 0.5), (0.6, 0.5))
    yield "rework"
    go(page, "Compare")
    box(page, "Prompt").fill(ROCKET)
    page.get_by_label("Values across", exact=True).fill("2, 4")
    page.get_by_label("Values down", exact=True).fill("1, 3")
    button(page, "Draw").click()
    expect(page.get_by_role("status")).to_have_text("4 of 4 done")
    yield "compare"
    go(page, "Server")
    expect(page.get_by_role("heading", name="Models")).to_be_visible()
    yield "server"
    go(page, "Gallery")
    expect(tiles(page).first.get_by_role("img")).to_be_visible()
    page.evaluate("Promise.all([...document.images].map((one) => ((one.loading = 'eager'), one.decode())))")
    yield "gallery"
    tiles(page).first.click()
    expect(button(page, "Use all")).to_be_visible()
    yield "picture"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_tab_fits_and_is_accessible(
    browser: Browser, filled: Server, shape: str, scheme: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    width, height = SHAPES[shape]
    source = chrome.axe()
    folder = Path(request.config.getoption("--screenshots") or tmp_path)
    view: Any = {"viewport": {"width": width, "height": height}, "color_scheme": scheme}
    with visit(browser, filled.url, **view) as (page, _):
        expect(page.get_by_role("heading", name="What shall it be?")).to_be_visible()
        page.screenshot(path=folder / f"{shape}-{scheme}-empty.png")
        assert chrome.violations(page, source) == []
        for name in everywhere(page):
            page.mouse.move(0, 0)
            page.screenshot(path=folder / f"{shape}-{scheme}-{name}.png", full_page=name != "picture")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            assert chrome.violations(page, source) == [], name


def save(page: Page, path: Path) -> None:
    """A screenshot in 256 colours, which nobody sees and which is a third as large."""
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.quantize(palette=image.quantize(256)).save(path, optimize=True)


@pytest.mark.slow
def test_the_screenshots_of_the_readme(browser: Browser, filled: Server, tmp_path: Path) -> None:
    folder = SCREENSHOTS if not (SCREENSHOTS / "studio-make.png").exists() else tmp_path
    with visit(browser, filled.url, viewport={"width": 1280, "height": 800}) as (page, _):
        page.get_by_label("Seed", exact=True).fill("1")
        draw(page, ROCKET)
        page.get_by_label("Seed", exact=True).fill("3")
        draw(page, "a cat on a green background")
        page.mouse.move(0, 0)
        page.evaluate("scrollTo(0, 0)")
        save(page, folder / "studio-make.png")
        go(page, "Compare")
        box(page, "Prompt").fill("a {cat|rocket|red apple} on a blue background")
        page.get_by_label("Seed", exact=True).fill("3")
        page.get_by_label("Values across", exact=True).fill("2, 4, 8, 20")
        page.get_by_label("Down", exact=True).select_option("prompt")
        button(page, "Draw").click()
        expect(page.get_by_role("status")).to_have_text("12 of 12 done")
        page.evaluate("scrollTo(0, 0)")
        save(page, folder / "studio-compare.png")
    for name in ("studio-make.png", "studio-compare.png"):
        assert (folder / name).stat().st_size < 200_000


def test_it_is_there_at_once_and_weighs_little(browser: Browser, server: Server) -> None:
    painted, ready = [], []
    for _ in range(5):
        with visit(browser, server.url) as (page, _):
            expect(button(page, "Draw")).to_be_enabled()
            ready.append(page.evaluate("performance.now()"))
            painted.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
            sizes = page.evaluate(
                "[...performance.getEntriesByType('resource'), ...performance.getEntriesByType('navigation')]"
                ".filter((each) => !each.name.includes('/v1/'))"
                ".map((each) => [each.decodedBodySize, each.transferSize])"
            )
    print(f"first paint {min(painted):.0f} ms, interactive {min(ready):.0f} ms")
    assert sum(body for body, _ in sizes) < 150_000
    assert sum(sent for _, sent in sizes) < 100_000
    assert min(painted) < 1000, painted
    assert min(ready) < 1500, ready

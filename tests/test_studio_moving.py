"""The studio with models of clips and sounds, in a real browser: fields, previews, players, gallery, recipes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from sfumato.pictures import recipe as recipes
from support import browser as chrome
from support import families_sound
from support.answerable import within
from support.browser import visit
from support.clip_classes import wan_image
from support.drawing import source
from support.families_moving import FAMILIES
from support.probed import needs
from support.serving import TIMEOUT_S, Server

MODELS = {"film": FAMILIES["Wan"].build, "from-picture": wan_image, "rain": families_sound.FAMILIES["AudioLDM2"].build}
ENABLE = "diffusers: {enable_parameters: 'negative_prompt,num_inference_steps,image'}\n"

LOADED = """(name) => new Promise((done, failed) => {
  const one = document.querySelector(name);
  if (one.readyState >= 2) done();
  one.onloadeddata = () => done();
  one.onerror = () => failed(one.error.message);
})"""
"""Until a player has something to show."""

expect.set_options(timeout=chrome.PATIENCE_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chrome.chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("moving")
    for name, build in MODELS.items():
        build().save_pretrained(models / "weights" / name)
        text = f"name: {name}\nparameters: {{model: weights/{name}}}\nstep: 2\n{ENABLE}"
        (models / f"{name}.yaml").write_text(text)
    return models


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Server]:
    with Server(models, tmp_path_factory.mktemp("data"), "--default-model", "film") as server:
        yield server


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    with visit(browser, server.url) as (page, _):
        yield page


def fill(page: Page, model: str, prompt: str, **fields: object) -> None:
    page.get_by_role("combobox", name="Model", exact=True).select_option(model)
    page.get_by_role("textbox", name="Prompt", exact=True).fill(prompt)
    for name, value in fields.items():
        page.get_by_label(name.replace("_", " "), exact=True).fill(str(value))


def clip(page: Page, prompt: str, format: str = "webp", **fields: object) -> None:
    fill(page, "film", prompt, **{"Width": 16, "Height": 16, "Frames": 5, "Steps": 2} | fields)
    page.get_by_label("Format", exact=True).select_option(format)


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def result(page: Page, kind: str, suffix: str) -> str:
    """Where what was drawn is, once it is there: in an element of this kind."""
    shown = page.locator(f".canvas > {kind}")
    expect(shown).to_have_attribute("src", re.compile(rf"/generated-images/\w+\.{suffix}$"))
    return str(shown.get_attribute("src"))


def tiles(page: Page) -> Locator:
    return page.get_by_role("list", name="Gallery").get_by_role("listitem")


def open_newest(page: Page) -> Locator:
    """The gallery's newest, opened."""
    page.get_by_role("link", name="Gallery", exact=True).click()
    tiles(page).first.get_by_role("button").first.click()
    return page.get_by_role("dialog")


def test_the_fields_are_those_of_what_the_model_makes(page: Page) -> None:
    labels = ("Width", "Frames", "Seconds", "Frames a second", "Format", "Count")
    wanted = {"film": labels[:5], "rain": ("Seconds", "Format"), "sfumato-tiny": ("Width", "Count")}
    for model, shown in wanted.items():
        page.get_by_role("combobox", name="Model", exact=True).select_option(model)
        for name in labels:
            expect(page.get_by_label(name, exact=True)).to_have_count(int(name in shown))
    page.get_by_role("combobox", name="Model", exact=True).select_option("film")
    expect(page.get_by_label("Frames", exact=True)).to_have_attribute("step", "4")
    expect(page.locator("#num_frames-about")).to_contain_text("multiple of 4")


def test_a_clip_forms_and_its_recipe_draws_it_again(page: Page) -> None:
    clip(page, "a cat walks", Steps=60)
    page.evaluate(
        """() => { window.seen = new Set();
        new MutationObserver(() => document.querySelectorAll('img[alt=Result]').forEach((one) => seen.add(one.src)))
          .observe(document.body, { subtree: true, childList: true, attributes: true, attributeFilter: ['src'] }); }"""
    )
    button(page, "Draw").click()
    url = result(page, "img", "webp")
    assert [src for src in page.evaluate("[...window.seen]") if src.startswith("data:image/png")]
    first = page.request.get(url).body()
    with Image.open(io.BytesIO(first)) as image:
        assert (image.size, image.n_frames) == ((16, 16), 5)  # type: ignore[attr-defined]
    expect(button(page, "Rework it")).to_have_count(0)
    page.evaluate("localStorage.clear(); sessionStorage.clear()")
    dialog = open_newest(page)
    expect(dialog).to_contain_text("Frames a second")
    expect(dialog.get_by_role("img", name="a cat walks")).to_be_visible()
    expect(dialog.get_by_role("button", name="Rework it")).to_have_count(0)
    button(page, "Use all").click()
    expect(page.get_by_label("Frames", exact=True)).to_have_value("5")
    page.get_by_label("Format", exact=True).select_option("webp")
    button(page, "Draw").click()
    expect(page.locator(".canvas > img")).not_to_have_attribute("src", url)
    assert page.request.get(result(page, "img", "webp")).body() == first


def test_a_clip_is_played_downloaded_and_deleted(page: Page) -> None:
    needs("mp4")
    clip(page, "a cat plays", "mp4")
    button(page, "Draw").click()
    result(page, "video", "mp4")
    page.evaluate(LOADED, "video")
    shown = page.evaluate(
        "(({ controls, loop, videoWidth }) => [controls, loop, videoWidth])(document.querySelector('video'))"
    )
    assert shown == [True, True, 16]
    with page.expect_download() as download:
        page.get_by_role("link", name="Download", exact=True).click()
    assert (
        recipes.read(Path(download.value.path()).rename(Path(download.value.path()).with_suffix(".mp4"))).prompt
        == "a cat plays"
    )
    dialog = open_newest(page)
    expect(dialog.locator("video")).to_be_visible()
    page.keyboard.press("Escape")
    small = tiles(page).first.get_by_role("img")
    expect(small).to_have_attribute("src", re.compile("thumbnail$"))
    small.evaluate("(image) => image.decode()")
    tiles(page).first.get_by_role("button").first.focus()
    page.keyboard.press("Delete")
    page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
    expect(page.get_by_role("button", name="a cat plays")).to_have_count(0)


def test_a_sound_is_heard_kept_and_used_again(page: Page) -> None:
    fill(page, "rain", "rain on a roof", Seconds=1, Steps=2)
    expect(page.get_by_role("textbox", name="Prompt", exact=True)).to_have_attribute("placeholder", "What to hear")
    button(page, "Draw").click()
    first = page.request.get(result(page, "audio", "wav")).body()
    page.evaluate(LOADED, "audio")
    assert page.evaluate("document.querySelector('audio').duration") == pytest.approx(1)
    dialog = open_newest(page)
    expect(dialog.locator("audio")).to_be_visible()
    expect(tiles(page).first.get_by_text("rain on a roof")).to_be_visible()
    page.evaluate("localStorage.clear()")
    button(page, "Use all").click()
    expect(page.get_by_label("Seconds", exact=True)).to_have_value("1")
    page.get_by_label("Format", exact=True).select_option("wav")
    before = str(page.locator(".canvas > audio").get_attribute("src"))
    button(page, "Draw").click()
    expect(page.locator(".canvas > audio")).not_to_have_attribute("src", before)
    assert page.request.get(result(page, "audio", "wav")).body() == first


def test_what_the_server_refuses_is_said_at_the_field(browser: Browser, server: Server) -> None:
    with visit(browser, server.url) as (page, watch):
        clip(page, "a cat", Frames=6)
        button(page, "Draw").click()
        expect(page.locator("#num_frames-about")).to_contain_text("4k+1")
        watch.forgive(re.compile("status of 400"))


def test_a_clip_outlives_a_reload_and_is_cancelled(page: Page, server: Server) -> None:
    clip(page, "a long walk", Steps=1000)
    button(page, "Draw").click()
    expect(page.get_by_role("status")).to_have_text(re.compile("Step"))
    (job,) = (each for each in server.client.get("/v1/jobs").json()["data"] if each["status"] == "drawing")
    page.reload()
    expect(page.get_by_role("status")).to_have_text(re.compile("Step"))
    button(page, "Cancel").click()
    expect(page.get_by_role("status")).to_have_text("Stopped")
    expect(button(page, "Cancel")).to_have_count(0)
    within(TIMEOUT_S, lambda: server.client.get(f"/v1/jobs/{job['id']}").json()["status"] == "cancelled")


def test_a_picture_becomes_the_first_frame(page: Page) -> None:
    page.get_by_role("link", name="Rework", exact=True).click()
    picture: Any = {"name": "a.png", "mimeType": "image/png", "buffer": source(32, 16)}
    page.get_by_label("Choose a picture", exact=True).set_input_files(picture)
    fill(page, "from-picture", "it moves", Frames=5, Steps=2)
    page.get_by_label("Format", exact=True).select_option("gif")
    button(page, "Draw").click()
    with Image.open(io.BytesIO(page.request.get(result(page, "img", "gif")).body())) as image:
        assert (image.size, image.n_frames) == ((32, 16), 5)  # type: ignore[attr-defined]


def test_a_sound_that_is_not_kept_is_heard(browser: Browser, models: Path, tmp_path: Path) -> None:
    with (
        Server(models, tmp_path, env={"SFUMATO_KEEP_PICTURES": "false"}) as server,
        visit(browser, server.url) as (page, _),
    ):
        fill(page, "rain", "rain on a roof", Seconds=1, Steps=2)
        button(page, "Draw").click()
        expect(page.locator(".canvas > audio")).to_have_attribute("src", re.compile("^data:audio/wav;base64,"))
        page.evaluate(LOADED, "audio")
        assert server.client.get("/v1/images/gallery").json()["data"] == []

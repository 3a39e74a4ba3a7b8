"""The studio's LoRAs and controls in a real browser, on a server that has some."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from PIL import Image, ImageChops, ImageDraw
from playwright.sync_api import Browser, Locator, Page, expect

import sfumato
from support import browser as chrome
from support import loras
from support.browser import visit
from support.serving import Server

TINY = Path(sfumato.__file__).parent / "models" / "sfumato-tiny"
DONE = re.compile(r"/generated-images/")

expect.set_options(timeout=chrome.PATIENCE_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chrome.chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Server]:
    """`plain`, which has two LoRAs and a ControlNet, and `styled`, which has a LoRA of its own as well."""
    folder = tmp_path_factory.mktemp("studio")
    pipeline = StableDiffusionPipeline.from_pretrained(TINY)
    for seed, name in enumerate(("loras/ink", "loras/watercolour", "own")):
        loras.saved(loras.kohya(pipeline, seed=seed), folder / "models" / f"{name}.safetensors")
    net = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    with torch.no_grad():
        for parameter in net.controlnet_down_blocks.parameters():
            parameter.fill_(0.02)
    net.save_pretrained(folder / "models" / "controlnets" / "lines")
    enabled = "diffusers:\n  enable_parameters: image,negative_prompt,num_inference_steps\n"
    text = f"parameters:\n  model: {TINY}\nstep: 2\nsize: 64x64\ndtype: fp32\n{enabled}"
    (folder / "models" / "plain.yaml").write_text(f"name: plain\n{text}")
    (folder / "models" / "styled.yaml").write_text(f"name: styled\n{text}lora_adapter: own.safetensors\n")
    with Server(folder / "models", folder / "data", "--default-model", "plain") as server:
        yield server


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    with visit(browser, server.url) as (page, _):
        page.get_by_role("combobox", name="Model", exact=True).select_option("plain")
        yield page


def button(place: Page | Locator, name: str) -> Locator:
    return place.get_by_role("button", name=name, exact=True)


def row(page: Page, name: str) -> Locator:
    return page.get_by_role("group", name=name, exact=True)


def field(place: Page | Locator, name: str) -> Locator:
    return place.get_by_label(name, exact=True)


def chosen(page: Page, name: str) -> Locator:
    return page.get_by_role("combobox", name=name, exact=True)


def photo() -> dict[str, Any]:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((12, 12, 52, 52), outline="black", width=4)
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"name": "circle.png", "mimeType": "image/png", "buffer": file.getvalue()}


def draw(page: Page, server: Server) -> tuple[dict[str, Any], Image.Image]:
    """The recipe and the pixels of a new picture."""
    result = page.get_by_role("img", name="Result", exact=True)
    before = result.get_attribute("src") if result.count() else ""
    page.get_by_role("textbox", name="Prompt", exact=True).fill("a cat on a green background")
    button(page, "Draw").click()
    if before:
        expect(result).not_to_have_attribute("src", before)
    expect(result).to_have_attribute("src", DONE)
    url = str(result.get_attribute("src"))
    about = server.client.get(f"/v1/images/gallery/{url.rpartition('/')[2]}").json()
    return about["recipe"], Image.open(io.BytesIO(server.client.get(url).content)).convert("RGB")


def named(recipe: dict[str, Any]) -> list[tuple[str, float]]:
    return [(name, weight) for name, _, _, weight, _ in recipe["loras"]]


def use_newest(page: Page) -> None:
    page.get_by_role("link", name="Gallery", exact=True).click()
    page.get_by_role("list", name="Gallery").get_by_role("listitem").first.click()
    button(page, "Use all").click()
    expect(page.get_by_role("link", name="Make", exact=True)).to_have_attribute("aria-current", "page")


def drop(place: Locator, page: Page) -> None:
    transfer = page.evaluate_handle(
        """(bytes) => { const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], 'circle.png', {type: 'image/png'})); return transfer; }""",
        list(photo()["buffer"]),
    )
    place.dispatch_event("drop", {"dataTransfer": transfer})


def test_loras_draw_with_their_weights_and_use_all_brings_them_back(page: Page, server: Server) -> None:
    button(page, "Add a LoRA").press("Enter")
    button(page, "Add a LoRA").press("Enter")
    chosen(page, "LoRA 2").select_option("watercolour")
    field(row(page, "LoRA 2"), "Weight").fill("0.5")
    recipe, first = draw(page, server)
    assert named(recipe) == [("ink", 1.0), ("watercolour", 0.5)]
    page.reload()
    expect(chosen(page, "LoRA 2")).to_have_value("watercolour")
    button(page, "Remove LoRA 1").press("Enter")
    expect(row(page, "LoRA 2")).to_have_count(0)
    button(page, "Remove LoRA 1").click()
    use_newest(page)
    expect(chosen(page, "LoRA 1")).to_have_value("ink")
    expect(field(row(page, "LoRA 2"), "Weight")).to_have_value("0.5")
    recipe, again = draw(page, server)
    assert named(recipe) == [("ink", 1.0), ("watercolour", 0.5)]
    assert ImageChops.difference(first, again).getbbox() is None
    button(page, "Remove LoRA 2").click()
    button(page, "Remove LoRA 1").click()
    recipe, plain = draw(page, server)
    assert "loras" not in recipe
    assert ImageChops.difference(first, plain).getbbox() is not None


def test_a_model_s_own_lora_is_chosen_only_there_and_comes_back_turned_off(page: Page, server: Server) -> None:
    button(page, "Add a LoRA").click()
    assert chosen(page, "LoRA 1").locator("option").all_inner_texts() == ["ink", "watercolour"]
    field(page, "Model").select_option("styled")
    chosen(page, "LoRA 1").select_option("own")
    field(row(page, "LoRA 1"), "Weight").fill("0")
    recipe, _ = draw(page, server)
    assert recipe["loras_off"] == ["own"]
    button(page, "Remove LoRA 1").click()
    use_newest(page)
    expect(chosen(page, "LoRA 1")).to_have_value("own")
    expect(field(row(page, "LoRA 1"), "Weight")).to_have_value("0")


def test_controls_draw_from_a_chosen_and_a_dropped_picture(page: Page, server: Server) -> None:
    button(page, "Add a control").press("Enter")
    control = row(page, "Control 1")
    page.get_by_role("textbox", name="Prompt", exact=True).fill("a cat")
    button(page, "Add a control").click()
    drop(row(page, "Control 2").get_by_text("Choose or drop a picture"), page)
    expect(row(page, "Control 2").get_by_role("img", name="Picture of Control 2")).to_be_visible()
    field(row(page, "Control 2"), "Weight").fill("0.25")
    field(control, "Choose or drop a picture").set_input_files(photo())
    expect(control.get_by_role("img", name="Picture of Control 1")).to_be_visible()
    field(control, "Preprocess").select_option("invert")
    recipe, _ = draw(page, server)
    drawn = [(each["name"], each["weight"], each["preprocess"]) for each in recipe["controls"]]
    assert drawn == [("lines", 1.0, "invert"), ("lines", 0.25, None)]
    page.reload()
    expect(page.get_by_role("img", name="Result", exact=True)).to_have_attribute("src", DONE)  # remembered all the same
    use_newest(page)
    expect(field(row(page, "Control 1"), "Preprocess")).to_have_value("invert")
    expect(field(row(page, "Control 2"), "Weight")).to_have_value("0.25")


def test_a_control_without_a_picture_is_told_at_the_control(browser: Browser, server: Server) -> None:
    with visit(browser, server.url) as (page, watch):
        field(page, "Model").select_option("plain")
        button(page, "Add a control").click()
        page.get_by_role("textbox", name="Prompt", exact=True).fill("a cat")
        button(page, "Draw").click()
        expect(row(page, "Control 1").get_by_role("alert")).to_contain_text("controls[0].image")
        field(row(page, "Control 1"), "Choose or drop a picture").set_input_files(photo())
        expect(row(page, "Control 1").get_by_role("alert")).to_have_count(0)
        watch.forgive(re.compile("status of 400"))


def test_rework_draws_with_them_too(page: Page, server: Server) -> None:
    button(page, "Add a LoRA").click()
    button(page, "Add a control").click()
    field(page, "Choose or drop a picture").set_input_files(photo())
    page.get_by_role("link", name="Rework", exact=True).click()
    field(page, "Choose a picture").set_input_files(photo())
    recipe, _ = draw(page, server)
    assert named(recipe) == [("ink", 1.0)]
    assert [each["name"] for each in recipe["controls"]] == ["lines"]
    assert recipe["image_sha256"]


def test_the_built_in_model_takes_them_too(page: Page, server: Server) -> None:
    field(page, "Model").select_option("sfumato-tiny")
    button(page, "Add a LoRA").click()
    chosen(page, "LoRA 1").select_option("watercolour")
    button(page, "Add a control").click()
    field(page, "Choose or drop a picture").set_input_files(photo())
    recipe, _ = draw(page, server)
    assert recipe["model"] == "sfumato-tiny"
    assert named(recipe) == [("watercolour", 1.0)]
    assert [each["name"] for each in recipe["controls"]] == ["lines"]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
def test_the_rows_fit_and_are_accessible(browser: Browser, server: Server, width: int, scheme: Any) -> None:
    with visit(browser, server.url, viewport={"width": width, "height": 900}, color_scheme=scheme) as (page, _):
        field(page, "Model").select_option("plain")
        for name in ("LoRA", "LoRA", "control"):
            button(page, f"Add a {name}").click()
        field(page, "Choose or drop a picture").set_input_files(photo())
        expect(page.get_by_role("img", name="Picture of Control 1")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert chrome.violations(page, chrome.axe()) == []

"""Masked area only: the part around the mask is drawn at a size of its own, and nothing else changes."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageDraw

from sfumato.drawing import crop
from support.answers import error_of
from support.pictures import base64_of
from support.serving import Server

SIZE = (300, 200)
AREA = (180, 60, 220, 100)


@given(
    size=st.tuples(st.integers(8, 400), st.integers(8, 400)),
    place=st.tuples(*[st.floats(0, 0.999)] * 4),
    padding=st.integers(0, 500),
    shape=st.sampled_from([(128, 128), (64, 256), (512, 8), (3, 2)]),
)
def test_the_box_holds_the_mask_and_lies_in_the_picture(
    size: tuple[int, int], place: tuple[float, ...], padding: int, shape: tuple[int, int]
) -> None:
    width, height = size
    x, y = sorted(int(width * each) for each in place[:2]), sorted(int(height * each) for each in place[2:])
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle((x[0], y[0], x[1], y[1]), fill=255)
    left, top, right, bottom = box = crop.around(mask, padding, shape)
    assert 0 <= left <= max(0, x[0] - padding) and min(width, x[1] + 1 + padding) <= right <= width
    assert 0 <= top <= max(0, y[0] - padding) and min(height, y[1] + 1 + padding) <= bottom <= height
    if left and top and right < width and bottom < height:  # nothing was in its way
        wide, high = right - left, bottom - top
        assert abs(wide * shape[1] - high * shape[0]) <= max(shape)
    picture, drawn = Image.new("RGB", size, "red"), Image.new("RGB", shape, "blue")
    pasted = crop.pasted(picture, drawn, mask, box)
    assert ImageChops.difference(pasted, picture).getbbox() == mask.getbbox()


def picture() -> Image.Image:
    return Image.radial_gradient("L").resize(SIZE).convert("RGB")


def mask(mode: str = "L") -> Image.Image:
    """White, or of OpenAI's kind transparent, in `AREA`."""
    image = Image.new(mode, SIZE, 0 if mode == "L" else (0, 0, 0, 255))
    image.paste(255 if mode == "L" else (0, 0, 0, 0), AREA)
    return image


def edited(server: Server, **more: Any) -> tuple[Image.Image, dict[str, Any]]:
    body = {"prompt": "a cat", "image": base64_of(picture()), "mask": base64_of(mask("RGBA")), "steps": 4, "seed": 3}
    answer = server.client.post("/v1/images/edits", json=body | more)
    assert answer.status_code == 200, answer.text
    image = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    return image, json.loads(image.info["sfumato"])


def changed(image: Image.Image) -> tuple[int, int, int, int] | None:
    assert image.size == SIZE
    return ImageChops.difference(image.convert("RGB"), picture()).getbbox()


@pytest.mark.parametrize(
    ("more", "area"),
    [
        ({}, [32, 128, 128]),
        ({"mask_padding": 0}, [0, 128, 128]),
        ({"mask_padding": 4096, "size": "96x64"}, [4096, 96, 64]),
    ],
)
def test_outside_the_mask_nothing_changes_and_the_recipe_says_how(
    server: Server, more: dict[str, Any], area: list[int]
) -> None:
    image, made = edited(server, masked_area_only=True, **more)
    box = changed(image)
    assert box and all(here <= there for here, there in zip(AREA[:2], box[:2], strict=True))
    assert all(there <= here for here, there in zip(AREA[2:], box[2:], strict=True))
    assert made["masked_area"] == area
    assert (made["width"], made["height"]) == SIZE


def test_it_is_another_picture_than_of_the_whole(server: Server) -> None:
    part, _ = edited(server, masked_area_only=True)
    whole, made = edited(server)
    assert made["masked_area"] is None
    assert ImageChops.difference(part.convert("RGB"), whole.convert("RGB")).getbbox() is not None


def test_it_is_made_again_from_its_recipe(server: Server, tmp_path: Path) -> None:
    image, _ = edited(server, masked_area_only=True, mask_padding=10, size="96x96")
    names = {"like": image, "image": picture(), "mask": mask("RGBA")}
    (tmp_path / "models").mkdir()
    command = [sys.executable, "-m", "sfumato.cli", "generate", "-o", "again.png", "--models", "models"]
    for name, each in names.items():
        if name == "like":
            newest = server.client.get("/v1/images/gallery?limit=1").json()["data"][0]["name"]
            (tmp_path / "like.png").write_bytes(server.client.get(f"/generated-images/{newest}").content)
        else:
            each.save(tmp_path / f"{name}.png")
        command += [f"--{name}", f"{name}.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "again.png") as again:
        assert ImageChops.difference(again.convert("RGB"), image.convert("RGB")).getbbox() is None


def test_automatic1111_says_it_as_inpaint_full_res(server: Server) -> None:
    body = {
        "prompt": "a cat", "init_images": [base64_of(picture())], "mask": base64_of(mask()), "steps": 4, "mask_blur": 0,
        "inpaint_full_res": 1, "inpaint_full_res_padding": 16, "width": 128, "height": 64, "denoising_strength": 0.9,
    }  # fmt: skip
    answer = server.client.post("/sdapi/v1/img2img", json=body)
    assert answer.status_code == 200, answer.text
    assert "inpaint_full_res" not in answer.headers.get("x-sfumato-ignored", "")
    image = Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0])))
    assert json.loads(image.info["sfumato"])["masked_area"] == [16, 128, 64]
    box = changed(image)
    assert box and box[0] >= AREA[0] and box[3] <= AREA[3]
    assert server.client.post("/sdapi/v1/img2img", json=body | {"inpaint_full_res": False}).status_code == 200


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"masked_area_only": True, "mask": None}, "masked_area_only"),
        ({"masked_area_only": True, "mask_padding": -1}, "mask_padding"),
        ({"masked_area_only": True, "mask_padding": 5000}, "mask_padding"),
        ({"masked_area_only": "perhaps"}, "masked_area_only"),
    ],
)
def test_what_cannot_be_is_named(server: Server, more: dict[str, Any], param: str) -> None:
    body = {"prompt": "a cat", "image": base64_of(picture()), "mask": base64_of(mask("RGBA"))}
    answer = server.client.post("/v1/images/edits", json=body | more)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("mask", "more"),
    [
        (Image.new("L", SIZE), {}),
        (Image.new("L", SIZE, 255), {"inpainting_mask_invert": 1}),
    ],
    ids=["black", "inverted"],
)
def test_a_mask_that_marks_nothing_is_refused(server: Server, mask: Image.Image, more: dict[str, Any]) -> None:
    body = {"prompt": "a cat", "init_images": [base64_of(picture())], "mask": base64_of(mask), "steps": 2}
    answer = server.client.post("/sdapi/v1/img2img", json=body | {"inpaint_full_res": True} | more)
    assert error_of(answer)["param"] == "mask"


def test_nor_is_one_whose_dot_is_blurred_away(server: Server) -> None:
    dot = Image.new("L", SIZE)
    dot.putpixel((150, 100), 255)
    body = {"prompt": "a cat", "init_images": [base64_of(picture())], "mask": base64_of(dot), "steps": 2}
    answer = server.client.post("/sdapi/v1/img2img", json=body | {"inpaint_full_res": True, "mask_blur": 64})
    assert error_of(answer)["param"] == "mask"


def test_padding_alone_is_told_to_change_nothing(server: Server) -> None:
    body = {"prompt": "a cat", "image": base64_of(picture()), "mask": base64_of(mask("RGBA")), "steps": 1}
    answer = server.client.post("/v1/images/edits", json=body | {"mask_padding": 3})
    assert answer.headers["x-sfumato-ignored"] == "mask_padding"

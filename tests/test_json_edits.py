"""Edits as JSON, as OpenAI has them now: `images` and `mask` as objects, and whose transparency is the mask."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support.pictures import encoded
from support.serving import Server

SOURCE = Image.radial_gradient("L").convert("RGB").resize((128, 128))
BASE64 = base64.b64encode(encoded(SOURCE)).decode()
PHOTO = f"data:image/png;base64,{BASE64}"
FEW = {"prompt": "a cat", "steps": 4, "seed": 1}


def cut(opaque: Image.Image) -> str:
    """A data: URI of the picture, with its top transparent."""
    picture = opaque.convert("RGBA")
    picture.paste((0, 0, 0, 0), (0, 0, 128, 40))
    return "data:image/png;base64," + base64.b64encode(encoded(picture)).decode()


MASK = cut(Image.new("RGB", (128, 128)))


def edited(server: Server, **body: Any) -> Image.Image:
    answer = server.client.post("/v1/images/edits", json=FEW | body)
    assert answer.status_code == 200, answer.text
    assert "x-sfumato-ignored" not in answer.headers
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))


def only_the_top_is_new(picture: Image.Image) -> bool:
    before, after = np.asarray(SOURCE, int), np.asarray(picture.convert("RGB"), int)
    return np.array_equal(before[48:], after[48:]) and np.abs(before[:40] - after[:40]).mean() > 5


@pytest.mark.parametrize(
    "fields",
    [
        {"images": [{"image_url": PHOTO}]},
        {"images": [{"image_url": {"url": PHOTO}}]},
        {"images": [{"type": "input_image", "image_url": PHOTO, "file_id": None}]},
        {"image": {"image_url": PHOTO}},
        {"image": None, "images": [{"image_url": PHOTO}]},
        {"image": "", "images": [{"image_url": PHOTO}]},
        {"image": [], "images": [{"image_url": PHOTO}]},
        {"images": [PHOTO]},
        {"image": BASE64},
    ],
    ids=["image_url", "nested", "of the Responses API", "image", "null", "empty", "no picture", "text", "base64"],
)
def test_every_way_to_give_a_picture_is_the_same(server: Server, fields: dict[str, Any]) -> None:
    assert edited(server, **fields).tobytes() == edited(server, image=PHOTO).tobytes()


@pytest.mark.parametrize("mask", [{"image_url": MASK}, {"image_url": {"url": MASK}}, MASK, MASK.partition(",")[2]])
def test_every_way_to_give_a_mask(server: Server, mask: Any) -> None:
    assert only_the_top_is_new(edited(server, images=[{"image_url": PHOTO}], mask=mask))


def test_the_transparency_of_the_picture_is_the_mask(server: Server) -> None:
    """Where none is sent; one that is sent counts alone."""
    assert only_the_top_is_new(edited(server, images=[{"image_url": cut(SOURCE)}]))
    whole = "data:image/png;base64," + base64.b64encode(encoded(Image.new("RGBA", (128, 128)))).decode()
    assert not only_the_top_is_new(edited(server, images=[{"image_url": cut(SOURCE)}], mask={"image_url": whole}))


@pytest.mark.parametrize("path", ["generations", "edits"])
@pytest.mark.parametrize("reference", [BASE64, PHOTO, [BASE64], [{"image_url": PHOTO}]])
def test_reference_pictures(server: Server, path: str, reference: Any) -> None:
    """With edits they come after the picture: one model here takes one, and says so."""
    body = FEW | {"ref_images": reference, "response_format": "b64_json"}
    answer = server.client.post(f"/v1/images/{path}", json=body | ({"image": PHOTO} if path == "edits" else {}))
    if path == "edits":
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image")
        assert "got 2" in answer.json()["error"]["message"]
        return
    picture = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    assert len(json.loads(picture.info["sfumato"])["image_sha256"]) == 1


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("edits", {"images": [{"file_id": "file-1"}]}, "images"),
        ("edits", {"image": {"file_id": "file-1"}}, "image"),
        ("edits", {"images": [{"image_url": PHOTO}], "mask": {"file_id": "file-1"}}, "mask"),
        ("generations", {"image": {"file_id": "file-1"}}, "image"),
        ("generations", {"image": PHOTO, "mask": {"file_id": "file-1"}}, "mask"),
        ("generations", {"ref_images": [{"file_id": "file-1"}]}, "ref_images"),
        ("variations", {"image": {"file_id": "file-1"}}, "image"),
        ("generations", {"controls": [{"image": {"file_id": "file-1"}}]}, "controls[0].image"),
    ],
)
def test_files_are_refused_by_what_to_send(server: Server, path: str, fields: dict[str, Any], param: str) -> None:
    answer = server.client.post(f"/v1/images/{path}", json=FEW | fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert "file_id: uploaded files are no source pictures; send image_url" in error["message"]


@pytest.mark.parametrize("nothing", [{}, {"imageUrl": PHOTO}, {"image_url": {"uri": PHOTO}}])
@pytest.mark.parametrize("path", ["edits", "generations"])
def test_an_object_without_a_picture_is_refused(server: Server, path: str, nothing: dict[str, Any]) -> None:
    """Without its mask the whole picture would be redrawn."""
    for fields, param in (({"image": PHOTO, "mask": nothing}, "mask"), ({"image": nothing}, "image")):
        answer = server.client.post(f"/v1/images/{path}", json=FEW | fields)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == param
        assert 'send {"image_url": "data:..."}' in error["message"]

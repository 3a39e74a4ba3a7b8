"""Edits as JSON, as OpenAI has them now: `images` and `mask` as objects, and whose transparency is the mask."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support.batching_client import EDITS, begun, ended, jsonl, lines_of, sdk, uploaded
from support.inside import Inside
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
        ("edits", {"images": [{"file_id": "file-1"}]}, "image"),
        ("edits", {"image": {"file_id": "file-1"}}, "image"),
        ("edits", {"images": [{"image_url": PHOTO}], "mask": {"file_id": "file-1"}}, "mask"),
        ("generations", {"image": {"file_id": "file-1"}}, "image"),
        ("generations", {"image": PHOTO, "mask": {"file_id": "file-1"}}, "mask"),
        ("generations", {"ref_images": [{"file_id": "file-1"}]}, "image"),
        ("variations", {"image": {"file_id": "file-1"}}, "image"),
    ],
)
def test_a_file_that_is_not_there_is_refused_by_what_to_send(
    server: Server, path: str, fields: dict[str, Any], param: str
) -> None:
    answer = server.client.post(f"/v1/images/{path}", json=FEW | fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert "file_id: 'file-1' is no file of yours; it may have expired. Upload the picture" in error["message"]


@pytest.mark.parametrize("id", [5, "", "x" * 101, ["file-1"]])
def test_what_is_no_id_is_refused(server: Server, id: Any) -> None:
    answer = server.client.post("/v1/images/edits", json=FEW | {"images": [{"file_id": id}]})
    assert answer.status_code == 400, answer.text
    assert "file_id: " in answer.json()["error"]["message"]


def test_an_uploaded_picture_is_the_same(server: Server) -> None:
    """As a source, as a mask, and as the picture of a batch's line."""
    files = {}
    for name, uri in {"photo": PHOTO, "mask": MASK}.items():
        content = base64.b64decode(uri.partition(",")[2])
        answer = server.client.post("/v1/files", files={"file": (f"{name}.png", content)}, data={"purpose": "vision"})
        assert (answer.status_code, answer.json()["purpose"]) == (200, "vision")
        files[name] = {"file_id": answer.json()["id"]}
        downloaded = server.client.get(f"/v1/files/{files[name]['file_id']}/content")
        assert (downloaded.content, downloaded.headers["content-type"]) == (content, "application/octet-stream")
    expected = edited(server, image=PHOTO, mask=MASK)
    assert edited(server, images=[files["photo"]], mask=files["mask"]).tobytes() == expected.tobytes()
    assert edited(server, images=[files["photo"] | {"image_url": None}], mask=MASK).tobytes() == expected.tobytes()
    lines = [FEW | {"images": [files["photo"]], "mask": files["mask"]}]
    with sdk(server) as client:
        done = ended(client, begun(client, jsonl(lines, EDITS), EDITS).id)
        (line,) = lines_of(client, done.output_file_id)
    (item,) = line["response"]["body"]["data"]
    picture = Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))
    assert picture.tobytes() == expected.tobytes()


def test_a_file_of_another_purpose_is_no_picture(server: Server) -> None:
    with sdk(server) as client:
        id = uploaded(client, jsonl([FEW]))
    answer = server.client.post("/v1/images/edits", json=FEW | {"images": [{"file_id": id}]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image")
    assert f"'{id}' is a file of the purpose batch" in answer.json()["error"]["message"]


def test_a_picture_is_of_its_caller(tmp_path: Path) -> None:
    """And in a conversation, too."""
    inside = Inside(tmp_path, api_keys="anna:key-a,ben:key-b")
    anna, ben = ({"authorization": f"Bearer {key}"} for key in ("key-a", "key-b"))
    with inside.client() as client:
        files = {"file": ("a.png", encoded(SOURCE))}
        made = client.post("/v1/files", files=files, data={"purpose": "vision"}, headers=anna)
        picture = {"file_id": made.json()["id"]}
        said = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_image"} | picture]}]
        drawn = {"prompt": "a cat", "image": [picture]}
        requests = {"images/generations": drawn, "chat/completions": {"messages": said}}
        for path, body in requests.items():
            assert client.post(f"/v1/{path}", json=body, headers=anna).status_code == 200
            refused = client.post(f"/v1/{path}", json=body, headers=ben)
            assert refused.status_code == 400
            assert "is no file of yours" in refused.json()["error"]["message"]
        client.delete(f"/v1/files/{made.json()['id']}", headers=anna)
        gone = client.post("/v1/images/generations", json=drawn, headers=anna)
        assert gone.status_code == 400


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

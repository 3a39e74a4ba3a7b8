"""What each client sends by its source code, field by field, and what it reads of the answer.

For clients that no test here can run: the shapes of their requests, sent over a real socket.
"""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from support.pictures import encoded
from support.serving import Server

STRICT = {"created", "data", "background", "output_format", "quality", "size", "usage"}
"""Top-level keys that strictly typed clients know."""

FEW = {"steps": 4, "seed": 1}


SOURCE = Image.radial_gradient("L").convert("RGB").resize((128, 128))
PHOTO = encoded(SOURCE)


def transparent_on_top() -> bytes:
    mask = Image.new("RGBA", SOURCE.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 128, 40))
    return encoded(mask)


def items(answer: httpx.Response, key: str) -> list[Any]:
    """The pictures of an answer, which come by `key` and not by the other."""
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert {"created", "data"} <= set(body) <= STRICT
    assert isinstance(body["created"], int)
    other = {"url": "b64_json", "b64_json": "url"}[key]
    for item in body["data"]:
        assert isinstance(item[key], str)
        assert item[key]
        assert other not in item
    return [opened(item, key) for item in body["data"]]


def opened(item: dict[str, str], key: str) -> Image.Image:
    if key == "b64_json":
        return Image.open(io.BytesIO(base64.b64decode(item[key], validate=True)))
    assert item[key].startswith("http://127.0.0.1:")
    fetched = httpx.get(item[key])
    assert fetched.headers["content-type"].startswith("image/")
    return Image.open(io.BytesIO(fetched.content))


def test_open_webui_generates(server: Server) -> None:
    body = {"model": "sfumato-tiny", "prompt": "a cat", "n": 1, "size": "64x64", "response_format": "b64_json"}
    answer = server.draw(**body, **FEW, extra="what the admin added")
    assert items(answer, "b64_json")[0].size == (64, 64)
    assert answer.headers["x-sfumato-ignored"] == "extra"


@pytest.mark.parametrize("name", ["image", "image[]"])
def test_open_webui_edits(server: Server, name: str) -> None:
    fields = {"model": "gpt-image-1", "prompt": "a cat", "n": "1", "size": "128x128", "steps": "4"}
    files = [(name, ("image.png", PHOTO, "image/png"))]
    answer = server.client.post("/v1/images/edits", data=fields, files=files)
    assert items(answer, "b64_json")[0].size == (128, 128)


def test_librechat_generates(server: Server) -> None:
    answer = server.draw(
        model="gpt-image-1",
        prompt="a cat",
        n=1,
        size="auto",
        quality="auto",
        background="auto",
        output_format="webp",
        output_compression=90,
        **FEW,
    )
    image = items(answer, "b64_json")[0]
    assert (image.format, image.size) == ("WEBP", (128, 128))


def test_librechat_edits(server: Server) -> None:
    fields = {"model": "gpt-image-1", "prompt": "a cat", "n": "1", "quality": "auto", "size": "auto", "user": "me"}
    files = [("image[]", ("image_1.png", PHOTO, "image/png"))]
    answer = server.client.post("/v1/images/edits", data={**fields, "steps": "4"}, files=files)
    assert items(answer, "b64_json")[0].size == (128, 128)


def test_n8n_generates(server: Server) -> None:
    answer = server.draw(model="dall-e-3", prompt="a cat", response_format="b64_json", **FEW)
    assert items(answer, "b64_json")[0].size == (128, 128)


def test_n8n_edits(server: Server) -> None:
    fields = {
        "model": "gpt-image-1",
        "prompt": "a cat",
        "n": "1",
        "size": "auto",
        "quality": "auto",
        "background": "auto",
        "output_format": "png",
        "output_compression": "100",
        "input_fidelity": "high",
    }
    files = [
        ("image[]", ("a.png", PHOTO, "image/png")),
        ("mask", ("mask.png", transparent_on_top(), "image/png")),
    ]
    answer = server.client.post("/v1/images/edits", data={**fields, "steps": "4", "seed": "1"}, files=files)
    after = np.asarray(items(answer, "b64_json")[0].convert("RGB"), int)
    before = np.asarray(SOURCE, int)
    assert np.array_equal(before[48:], after[48:])
    assert np.abs(before[:40] - after[:40]).mean() > 5


def test_nextcloud_fetches_the_url(server: Server) -> None:
    answer = server.draw(prompt="a cat", size="128x128", n=2, model="dall-e-3", steps=4)
    assert [image.size for image in items(answer, "url")] == [(128, 128)] * 2


def test_langchain_reads_the_url(server: Server) -> None:
    answer = server.draw(prompt="a cat", n=1, size="64x64", model="dall-e-2", quality="standard", steps=4)
    assert items(answer, "url")[0].size == (64, 64)


def test_the_url_follows_the_proxy(server: Server) -> None:
    headers = {"x-forwarded-proto": "https", "x-forwarded-host": "pictures.example", "x-forwarded-prefix": "/ai"}
    body = {"prompt": "a cat", "steps": 2}
    answer = server.client.post("/v1/images/generations", json=body, headers=headers)
    url = answer.json()["data"][0]["url"]
    assert url.startswith("https://pictures.example/ai/generated-images/")


def test_vercel_edits_without_a_response_format(server: Server) -> None:
    fields = {"model": "sfumato-tiny", "prompt": "a cat", "n": "1", "size": "64x64", "seed": "1", "steps": "4"}
    answer = server.client.post("/v1/images/edits", data=fields, files={"image": ("blob", PHOTO, "image/png")})
    assert items(answer, "b64_json")[0].size == (64, 64)


def test_litellm_sends_a_literal_extra_body(server: Server) -> None:
    answer = server.draw(model="sfumato-tiny", prompt="a cat", extra_body={"foo": {"bar": 1}}, user="me", **FEW)
    assert items(answer, "url")[0].size == (128, 128)
    assert answer.headers["x-sfumato-ignored"] == "extra_body"
    usage = answer.json()["usage"]
    assert set(usage) == {"input_tokens", "input_tokens_details", "output_tokens", "total_tokens"}
    assert set(usage["input_tokens_details"]) == {"image_tokens", "text_tokens"}
    numbers = [usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]]
    assert all(isinstance(number, int) for number in [*numbers, *usage["input_tokens_details"].values()])


SILLY_TAVERN = {
    "url": "http://silly.example:7860",
    "auth": "user:not-for-the-log",
    "prompt": "a cat",
    "negative_prompt": "blue",
    "sampler_name": "Euler a",
    "scheduler": "automatic",
    "steps": 4,
    "cfg_scale": 7,
    "width": 64,
    "height": 64,
    "seed": -1,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 1,
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "override_settings": {"CLIP_stop_at_last_layers": 1},
    "override_settings_restore_afterwards": True,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
}


def test_sillytavern(server: Server) -> None:
    answer = server.client.post("/sdapi/v1/txt2img", json=SILLY_TAVERN)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert isinstance(body["info"], str)
    assert json.loads(body["info"])["width"] == 64
    assert opened({"b64_json": body["images"][0]}, "b64_json").size == (64, 64)
    assert "not-for-the-log" not in server.log
    assert "silly.example" not in server.log
    for path in ("samplers", "schedulers", "sd-models", "upscalers", "latent-upscale-modes", "sd-vae"):
        assert isinstance(server.client.get(f"/sdapi/v1/{path}").json(), list), path


KRITA = {
    "prompt": "a cat",
    "negative_prompt": "",
    "sampler_name": "Euler a",
    "steps": 4,
    "cfg_scale": 7,
    "width": 128,
    "height": 128,
    "seed": 1,
    "n_iter": 1,
    "batch_size": 1,
    "denoising_strength": 0.75,
    "mask_blur": 0,
    "styles": [],
    "alwayson_scripts": {},
    "override_settings": {"sd_model_checkpoint": "sfumato-tiny", "sd_vae": "Automatic"},
    "override_settings_restore_afterwards": False,
}


def test_krita(server: Server) -> None:
    """Cyanic SD-Krita: what it caches when it starts, then an inpainting."""
    keys = {
        "sd-models": {"title", "model_name"},
        "sd-vae": {"model_name"},
        "samplers": {"name"},
        "upscalers": {"name"},
        "face-restorers": {"name"},
        "prompt-styles": {"name", "prompt", "negative_prompt"},
        "loras": {"name"},
        "hypernetworks": {"name"},
    }
    for path, read in keys.items():
        listed = server.client.get(f"/sdapi/v1/{path}")
        assert listed.status_code == 200, path
        assert all(read <= set(each) for each in listed.json()), path
    assert server.client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "sfumato-tiny"
    assert set(server.client.get("/sdapi/v1/scripts").json()) == {"txt2img", "img2img"}
    assert "loaded" in server.client.get("/sdapi/v1/embeddings").json()
    mask = Image.new("L", SOURCE.size, 0)
    mask.paste(255, (0, 0, 128, 40))
    pictures = {"init_images": [base64.b64encode(PHOTO).decode()], "mask": base64.b64encode(encoded(mask)).decode()}
    answer = server.client.post("/sdapi/v1/img2img", json=KRITA | pictures)
    assert answer.status_code == 200, answer.text
    assert isinstance(json.loads(answer.json()["info"]), dict)
    drawn = np.asarray(opened({"b64_json": answer.json()["images"][0]}, "b64_json").convert("RGB"))
    assert np.array_equal(drawn[48:], np.asarray(SOURCE)[48:])


def test_krita_connects(server: Server) -> None:
    """It asks Gradio's route first."""
    answer = server.client.get("/queue/status")
    assert answer.status_code == 200
    assert answer.json()["queue_size"] >= 0


LOCALAI_PICTURES = {
    "image": base64.b64encode(PHOTO).decode(),
    "file": base64.encodebytes(PHOTO).decode(),
    "files": ["data:image/png;base64," + base64.b64encode(PHOTO).decode()],
    "ref_images": [base64.b64encode(PHOTO).decode()],
}


@pytest.mark.parametrize("path", ["/v1/images/generations", "/images/generations"])
def test_localai_curl(server: Server, path: str) -> None:
    answer = server.client.post(path, json={"prompt": "a cat|blue", "size": "64x64", "step": 3, "seed": 0})
    image = items(answer, "url")[0]
    made = json.loads(image.info["sfumato"])
    assert (made["prompt"], made["negative_prompt"], made["steps"], made["seed"]) == ("a cat", "blue", 3, 0)


@pytest.mark.parametrize("quality", ["7", 7])
def test_localai_quality_is_steps(server: Server, quality: str | int) -> None:
    image = items(server.draw(prompt="a cat", quality=quality), "url")[0]
    assert json.loads(image.info["sfumato"])["steps"] == 7


@pytest.mark.parametrize("key", LOCALAI_PICTURES)
def test_localai_pictures(server: Server, key: str) -> None:
    image = items(server.draw(prompt="a cat", step=4, **{key: LOCALAI_PICTURES[key]}), "url")[0]
    assert len(json.loads(image.info["sfumato"])["image_sha256"]) == 1


def test_anythingllm(server: Server) -> None:
    """Its LocalAI provider: the list by capabilities, then pictures as raw base64."""
    listed = server.client.get("/v1/models/capabilities").json()["data"]
    (model,) = [each["id"] for each in listed if "image" in each["capabilities"]]
    body = {"model": model, "prompt": "a cat", "size": "128x128", "n": 1, "step": 4}
    assert items(server.draw(**body), "url")[0].size == (128, 128)
    reference = base64.b64encode(PHOTO).decode()
    for picture in (reference, f"data:image/png;base64,{reference}"):
        image = items(server.draw(**body, ref_images=[picture]), "url")[0]
        assert len(json.loads(image.info["sfumato"])["image_sha256"]) == 1


def test_localai_inpainting(server: Server) -> None:
    files = {"image": ("a.png", PHOTO, "image/png"), "mask": ("m.png", transparent_on_top(), "image/png")}
    fields = {"model": "sfumato-tiny", "prompt": "a cat", "steps": "4"}
    for path in ("/v1/images/inpainting", "/images/inpainting"):
        image = items(server.client.post(path, data=fields, files=files), "url")[0]
        assert np.array_equal(np.asarray(SOURCE)[48:], np.asarray(image.convert("RGB"))[48:])


@pytest.mark.parametrize("path", ["/v1/models", "/models"])
def test_localai_models(server: Server, path: str) -> None:
    assert "sfumato-tiny" in [model["id"] for model in server.client.get(path).json()["data"]]

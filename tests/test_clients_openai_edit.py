"""The official OpenAI SDK: edits and variations, multipart forms whose every scalar is a string."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai.types import ImagesResponse
from PIL import Image

from support.pictures import encoded
from support.serving import Server

FEW = {"steps": 4, "seed": 1}


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


SOURCE = Image.radial_gradient("L").convert("RGB").resize((128, 128))
PHOTO = encoded(SOURCE)


def pictures(answer: ImagesResponse) -> list[Image.Image]:
    ImagesResponse.model_validate(answer.to_dict())
    return [Image.open(io.BytesIO(base64.b64decode(item.b64_json or ""))) for item in answer.data or []]


def recipe(image: Image.Image) -> dict[str, Any]:
    return dict(json.loads(image.info["sfumato"]))


def test_a_file_and_a_prompt_are_enough(client: openai.OpenAI) -> None:
    answer = client.images.edit(image=PHOTO, prompt="a cat", extra_body=FEW)
    image = pictures(answer)[0]
    assert image.size == (128, 128)
    assert len(recipe(image)["image_sha256"]) == 1
    assert answer.usage
    assert answer.usage.input_tokens_details.image_tokens > 0


@pytest.mark.parametrize(
    "file",
    [
        io.BytesIO(PHOTO),
        ("photo.png", PHOTO),
        ("photo.png", io.BytesIO(PHOTO), "image/png"),
        ("photo.jpg", encoded(SOURCE, "JPEG"), "image/jpeg"),
        ("photo.webp", encoded(SOURCE, "WEBP"), "application/octet-stream"),
    ],
    ids=["stream", "named", "typed", "jpeg", "webp"],
)
def test_every_way_to_give_a_file(client: openai.OpenAI, file: Any) -> None:
    answer = client.images.edit(model="gpt-image-1", image=file, prompt="a cat", extra_body=FEW)
    assert pictures(answer)[0].size == (128, 128)


def test_one_picture_of_a_list(client: openai.OpenAI) -> None:
    answer = client.images.edit(model="gpt-image-1", image=[("a.png", PHOTO)], prompt="a cat", extra_body=FEW)
    assert len(recipe(pictures(answer)[0])["image_sha256"]) == 1


def test_every_field_arrives_as_text_and_counts(client: openai.OpenAI) -> None:
    answer = client.images.edit(
        model="gpt-image-1",
        image=PHOTO,
        prompt="a cat",
        n=2,
        size="64x64",
        quality="low",
        background="auto",
        input_fidelity="high",
        output_format="webp",
        output_compression=50,
        user="someone",
        extra_body={**FEW, "guidance_scale": 2.5, "strength": 0.5, "negative_prompt": "blue"},
    )
    assert [(image.format, image.size) for image in pictures(answer)] == [("WEBP", (64, 64))] * 2
    assert (answer.size, answer.quality, answer.output_format) == ("64x64", "low", "webp")
    assert [item.to_dict()["seed"] for item in answer.data or []] == [1, 2]


def test_a_url_when_it_is_asked_for(client: openai.OpenAI) -> None:
    answer = client.images.edit(model="gpt-image-1", image=PHOTO, prompt="a cat", response_format="url", extra_body=FEW)
    assert answer.data
    assert answer.data[0].b64_json is None
    assert Image.open(io.BytesIO(httpx.get(answer.data[0].url or "").content)).size == (128, 128)


def test_the_transparent_part_of_a_mask_is_redrawn(client: openai.OpenAI) -> None:
    mask = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 128, 40))
    answer = client.images.edit(
        model="gpt-image-1", image=("a.png", PHOTO), mask=("m.png", encoded(mask)), prompt="a cat", extra_body=FEW
    )
    before, after = np.asarray(SOURCE, int), np.asarray(pictures(answer)[0].convert("RGB"), int)
    assert np.array_equal(before[48:], after[48:])
    assert np.abs(before[:40] - after[:40]).mean() > 5


def test_a_mask_of_another_size_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.edit(
            model="gpt-image-1", image=PHOTO, mask=encoded(Image.new("RGBA", (64, 32))), prompt="a cat", extra_body=FEW
        )
    assert bad.value.param == "mask"


def test_strength_leaves_or_keeps_the_picture(client: openai.OpenAI) -> None:
    def distance(strength: float) -> float:
        body = {"steps": 10, "seed": 1, "strength": strength}
        answer = client.images.edit(model="gpt-image-1", image=PHOTO, prompt="a red car", extra_body=body)
        return float(np.abs(np.asarray(pictures(answer)[0], int) - np.asarray(SOURCE, int)).mean())

    assert distance(0.2) < distance(1)


@pytest.mark.parametrize("file", [b"not a picture", b""], ids=["text", "empty"])
def test_what_is_no_picture_is_refused(client: openai.OpenAI, file: bytes) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.edit(model="gpt-image-1", image=("a.png", file), prompt="a cat")
    assert bad.value.param == "image"
    assert bad.value.type == "invalid_request_error"


def test_too_many_pictures_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.edit(model="gpt-image-1", image=[("a.png", PHOTO)] * 17, prompt="a cat")
    assert bad.value.param == "image"


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_variations(client: openai.OpenAI) -> None:
    answer = client.images.create_variation(
        image=("a.png", PHOTO), model="dall-e-2", n=2, response_format="b64_json", user="someone", extra_body=FEW
    )
    first, second = pictures(answer)
    assert first.size == (128, 128)
    assert first.tobytes() != second.tobytes()
    assert first.tobytes() != SOURCE.tobytes()


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_variations_have_a_url_unless_told(client: openai.OpenAI) -> None:
    answer = client.images.create_variation(image=("a.png", PHOTO), size="64x64", extra_body=FEW)  # type: ignore[arg-type]
    assert answer.data
    assert Image.open(io.BytesIO(httpx.get(answer.data[0].url or "").content)).size == (64, 64)

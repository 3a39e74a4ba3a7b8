"""LiteLLM: its `openai/` and `openrouter/` providers with another base URL. Arguments: the server's URL, a picture."""

from __future__ import annotations

import base64
import io
import sys
import urllib.request
from pathlib import Path

import litellm
from litellm.types.utils import ImageResponse
from PIL import Image

URL, PHOTO = sys.argv[1], Path(sys.argv[2])
SERVER = {"api_base": f"{URL}/v1", "api_key": "unused"}
FEW = {"steps": 2, "seed": 1}


def picture(answer: ImageResponse, index: int = 0) -> Image.Image:
    item = answer.data[index]
    assert (item.url is None) != (item.b64_json is None), item
    data = base64.b64decode(item.b64_json) if item.b64_json else urllib.request.urlopen(item.url).read()
    return Image.open(io.BytesIO(data))


def check_usage(answer: ImageResponse) -> None:
    usage = answer.usage
    assert usage is not None
    assert usage.input_tokens > 0, usage
    assert usage.output_tokens > 0, usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens, usage


def generate() -> None:
    answer = litellm.image_generation("a cat", model="openai/sfumato-tiny", n=2, size="64x64", extra_body=FEW, **SERVER)
    assert [picture(answer, index).size for index in (0, 1)] == [(64, 64)] * 2
    assert answer.data[0].url.startswith(URL)


def generate_like_gpt_image() -> None:
    answer = litellm.image_generation(
        "a cat", model="openai/gpt-image-1", quality="low", background="opaque", output_format="webp", **SERVER, **FEW
    )
    assert picture(answer).format == "WEBP"
    assert answer.data[0].b64_json
    assert (answer.quality, answer.output_format, answer.background) == ("low", "webp", "opaque")
    assert answer.size == "128x128"
    check_usage(answer)


def edit() -> None:
    with PHOTO.open("rb") as photo:
        answer = litellm.image_edit(
            image=photo, prompt="a cat", model="openai/gpt-image-1", extra_body={**FEW, "steps": 4}, **SERVER
        )
    assert picture(answer).size == (128, 128)
    check_usage(answer)


def variation() -> None:
    with PHOTO.open("rb") as photo:
        answer = litellm.image_variation(photo, model="openai/dall-e-2", **SERVER)
    assert picture(answer).size == (128, 128)


def chat() -> None:
    messages = [{"role": "user", "content": "a cat"}]
    answer = litellm.completion(model="openai/sfumato-tiny", messages=messages, extra_body=FEW, **SERVER)
    (image,) = answer.choices[0].message.images
    data = image["image_url"]["url"].partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (128, 128)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0


def chat_stream() -> None:
    messages = [{"role": "user", "content": "a cat"}]
    stream = litellm.completion(model="openai/sfumato-tiny", messages=messages, stream=True, extra_body=FEW, **SERVER)
    images = [image for chunk in stream for image in getattr(chunk.choices[0].delta, "images", None) or ()]
    assert len(images) == 1, images
    assert images[0]["image_url"]["url"].startswith("data:image/png;base64,")


def openrouter() -> None:
    """Images by chat completions, as it asks OpenRouter for them."""
    answer = litellm.image_generation("a cat", model="openrouter/sfumato-tiny", n=2, size="256x256", **SERVER, **FEW)
    assert [picture(answer, index).size for index in (0, 1)] == [(128, 128)] * 2
    check_usage(answer)
    wide = litellm.image_generation("a cat", model="openrouter/sfumato-tiny", size="1792x1024", **SERVER, **FEW)
    assert picture(wide).size == (168, 96)
    with PHOTO.open("rb") as photo:
        edited = litellm.image_edit(image=photo, prompt="a cat", model="openrouter/sfumato-tiny", **SERVER)
    assert picture(edited).size == (128, 128)


def errors() -> None:
    for model, size, expected in (
        ("sfumato-tiny", "abc", litellm.exceptions.BadRequestError),
        ("no-such", "64x64", litellm.exceptions.NotFoundError),
    ):
        try:
            litellm.image_generation("a cat", model=f"openai/{model}", size=size, **SERVER)
        except expected as error:
            assert "size" in str(error) or "sfumato-tiny" in str(error), error
        else:
            raise AssertionError(f"{model} {size}: no error")


for check in (generate, generate_like_gpt_image, edit, variation, chat, chat_stream, openrouter, errors):
    check()
    print(check.__name__, "ok")

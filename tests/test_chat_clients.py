"""Chat completions over a real socket: the official SDK, and the requests of chat clients by their source code.

LiteLLM and the JavaScript SDK are among `tests/clients/`.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from PIL import Image

from support.serving import Server

FEW = {"steps": 2, "seed": 1}
PATH = "/v1/chat/completions"


def opened(url: str) -> Image.Image:
    """A picture as clients get it: a data: URI, or fetched."""
    data = base64.b64decode(url.partition(",")[2]) if url.startswith("data:") else httpx.get(url).content
    return Image.open(io.BytesIO(data))


def recipe(picture: Image.Image) -> dict[str, Any]:
    return dict(json.loads(picture.info["sfumato"]))


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def pictures(answer: ChatCompletion) -> list[Image.Image]:
    ChatCompletion.model_validate(answer.to_dict())
    images: Any = answer.choices[0].message.to_dict()["images"]
    return [opened(each["image_url"]["url"]) for each in images]


def test_the_sdk_and_a_second_turn(client: openai.OpenAI) -> None:
    """The answer goes back as the SDK made it, and its picture is the source of the next."""
    messages: list[Any] = [{"role": "user", "content": "a cat on a green background"}]
    first = client.chat.completions.create(
        model="sfumato-tiny", messages=messages, temperature=0.7, max_tokens=100, extra_body=FEW
    )
    (picture,) = pictures(first)
    assert (picture.size, recipe(picture)["prompt"], recipe(picture)["steps"]) == (
        (128, 128),
        messages[0]["content"],
        2,
    )
    assert first.usage
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens
    messages += [first.choices[0].message.to_dict(), {"role": "user", "content": "now make it blue"}]
    second = client.chat.completions.create(
        model="sfumato-tiny", messages=messages, extra_body={"strength": 0.5, "steps": 4}
    )
    (edited,) = pictures(second)
    assert recipe(edited)["prompt"] == "now make it blue"
    assert len(recipe(edited)["image_sha256"]) == 1


def test_the_sdk_streams(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="sfumato-tiny",
        messages=[{"role": "user", "content": "a cat"}],
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=FEW,
    )
    chunks = list(stream)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.to_dict())
    *deltas, last = chunks
    images: list[Any] = [image for each in deltas for image in each.choices[0].delta.to_dict().get("images", [])]
    assert [recipe(opened(each["image_url"]["url"]))["seed"] for each in images] == [1, 2]
    assert deltas[-1].choices[0].finish_reason == "stop"
    assert last.usage
    assert last.usage.completion_tokens == 2 * 64


def test_the_sdk_gets_openais_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "hello"}])
    assert (unknown.value.code, unknown.value.type) == ("model_not_found", "invalid_request_error")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(
                model="sfumato-tiny",
                messages=[{"role": "user", "content": "a cat"}],
                stream=stream,
                extra_body={"steps": 0},
            )
        assert wrong.value.param == "steps"


def test_an_error_on_the_way_is_raised_by_the_sdk(client: openai.OpenAI, server: Server) -> None:
    stream = client.chat.completions.create(
        model="sfumato-tiny",
        messages=[{"role": "user", "content": "a cat"}],
        stream=True,
        extra_body={"steps": 900, "size": "512x512"},
        extra_headers={"x-request-id": "chat-on-the-way"},
    )
    with pytest.raises(openai.APIError, match="cancelled"):
        for _ in stream:
            assert server.client.delete("/v1/images/progress/chat-on-the-way").status_code == 200


def completion(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    answer = server.client.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def streamed(server: Server, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = server.client.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_openrouter(server: Server) -> None:
    """The example of OpenRouter's documentation, and how it reads the answer."""
    result = completion(
        server,
        {
            "model": "sfumato-tiny",
            "messages": [{"role": "user", "content": "Generate a beautiful sunset over mountains"}],
            "modalities": ["image", "text"],
            "image_config": {"aspect_ratio": "16:9"},
            **FEW,
        },
    )
    message = result["choices"][0]["message"]
    assert message["images"]
    for image in message["images"]:
        assert opened(image["image_url"]["url"]).size == (168, 96)


def test_openrouter_streams(server: Server) -> None:
    body = {
        "model": "sfumato-tiny",
        "messages": [{"role": "user", "content": "a sunset"}],
        "modalities": ["image", "text"],
        "stream": True,
        **FEW,
    }
    found = []
    for chunk in streamed(server, body):
        if chunk["choices"] and (delta := chunk["choices"][0]["delta"]).get("images"):
            found += [image["image_url"]["url"] for image in delta["images"]]
    assert [opened(url).size for url in found] == [(128, 128)]


def test_litellms_openrouter_provider(server: Server) -> None:
    """An edit: the picture first, then the text; a quality has become an image size."""
    source = server.png_data_uri((128, 128))
    parts = [{"type": "image_url", "image_url": {"url": source}}, {"type": "text", "text": "make it blue"}]
    result = completion(
        server,
        {
            "model": "sfumato-tiny",
            "messages": [{"role": "user", "content": parts}],
            "modalities": ["image", "text"],
            "image_config": {"image_size": "1K"},
            "n": 1,
            "steps": 4,
        },
    )
    images = [image for choice in result["choices"] for image in choice["message"]["images"]]
    picture = opened(images[0]["image_url"]["url"])
    assert (picture.size, len(recipe(picture)["image_sha256"])) == ((128, 128), 1)
    usage = result["usage"]
    assert usage["prompt_tokens_details"]["image_tokens"] == usage["completion_tokens_details"]["image_tokens"] == 64


CHERRY: dict[str, Any] = {
    "model": "sfumato-tiny",
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "a cat on a green background"},
    ],
    "temperature": 1,
    "top_p": 1,
    "max_tokens": 4096,
    "stream": True,
    "stream_options": {"include_usage": True},
    **FEW,
}


def test_cherry_studio(server: Server) -> None:
    """It takes `delta.images`, and the usage of the event after the one that says why it ended. The picture of an
    answer comes back with the next message of the user."""
    chunks = streamed(server, CHERRY)
    images = [image for each in chunks[:-1] for image in each["choices"][0]["delta"].get("images", ())]
    url = images[0]["image_url"]["url"]
    assert opened(url).size == (128, 128)
    ends = [place for place, each in enumerate(chunks) if each["choices"] and each["choices"][0]["finish_reason"]]
    assert ends == [len(chunks) - 2]
    assert chunks[-1]["usage"]["completion_tokens"] == 64
    parts = [{"type": "text", "text": "make it blue"}, {"type": "image_url", "image_url": {"url": url}}]
    again = [*CHERRY["messages"], {"role": "assistant", "content": ""}, {"role": "user", "content": parts}]
    edited = streamed(server, {**CHERRY, "messages": again, "steps": 4})
    found = [image for each in edited[:-1] for image in each["choices"][0]["delta"].get("images", ())]
    assert len(recipe(opened(found[0]["image_url"]["url"]))["image_sha256"]) == 1


def test_lobehub(server: Server) -> None:
    """Its picture page: the text before the picture, and no stream; `message.images`, else Markdown in the content."""
    parts: list[dict[str, Any]] = [{"text": "a red cat", "type": "text"}]
    parts.append({"image_url": {"url": server.png_data_uri((128, 128))}, "type": "image_url"})
    body = {
        "messages": [{"content": parts, "role": "user"}],
        "model": "sfumato-tiny",
        "modalities": ["image", "text"],
        "stream": False,
        "steps": 4,
    }
    message = completion(server, body)["choices"][0]["message"]
    assert opened(message["images"][0]["image_url"]["url"]).size == (128, 128)
    content = completion(server, {**body, "content_images": True})["choices"][0]["message"]["content"]
    (url,) = re.findall(r"!\[[^\]]*\]\((data:image/[^)]+|https?:[^)\s]+)\)", content)
    assert opened(url).size == (128, 128)


def test_open_webui(server: Server) -> None:
    """A picture model as a chat model: it stores the pictures of `delta.images`; its own addresses stay text."""
    body = {
        "stream": True,
        "model": "sfumato-tiny",
        "messages": [
            {"role": "user", "content": "a cat"},
            {"role": "assistant", "content": "\n![image](/api/v1/files/1/content)\n"},
            {"role": "user", "content": "a dog"},
        ],
        "stream_options": {"include_usage": True},
        **FEW,
    }
    found = []
    for data in streamed(server, body):
        choices = data.get("choices", [])
        if not choices:
            continue
        delta = choices[0].get("delta", {})
        found += [each["image_url"]["url"] for each in delta.get("images") or ()]
    assert [recipe(opened(url))["prompt"] for url in found] == ["a dog"]


def test_without_the_prefix(server: Server) -> None:
    """As LocalAI's clients send it."""
    body = {"model": "dall-e-3", "messages": [{"role": "user", "content": "a cat"}], **FEW}
    answer = server.client.post("/chat/completions", json=body)
    assert opened(answer.json()["choices"][0]["message"]["images"][0]["image_url"]["url"]).size == (128, 128)

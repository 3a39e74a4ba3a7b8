"""The official OpenAI SDK: pictures that show themselves while they are drawn."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator

import openai
import pytest
from openai.types import ImageEditCompletedEvent, ImageGenCompletedEvent, ImageGenPartialImageEvent
from openai.types.image_edit_partial_image_event import ImageEditPartialImageEvent
from openai.types.image_gen_stream_event import ImageGenStreamEvent
from PIL import Image

from support.serving import Server

STEPS = {"steps": 8, "seed": 1}
LONG = {"steps": 400, "seed": 1, "size": "384x384"}
"""Its first preview comes after some seconds, and its end long after."""


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def picture(event: openai.BaseModel) -> Image.Image:
    """The picture of an event that is as the SDK types it."""
    type(event).model_validate(event.to_dict())
    return Image.open(io.BytesIO(base64.b64decode(event.to_dict()["b64_json"])))  # type: ignore[arg-type]


@pytest.mark.parametrize("partials", [0, 1, 2, 3])
def test_previews_come_before_the_picture(client: openai.OpenAI, partials: int) -> None:
    *previews, last = client.images.generate(
        model="gpt-image-1", prompt="a cat", stream=True, partial_images=partials, extra_body=STEPS
    )
    assert all(isinstance(event, ImageGenPartialImageEvent) for event in previews)
    assert [event.partial_image_index for event in previews] == list(range(partials))  # type: ignore[union-attr]
    assert isinstance(last, ImageGenCompletedEvent)
    assert [picture(event).size for event in (*previews, last)] == [(128, 128)] * (partials + 1)
    assert len({picture(event).tobytes() for event in (*previews, last)}) == partials + 1
    assert last.size == "128x128"
    assert last.usage.total_tokens == last.usage.input_tokens + last.usage.output_tokens > 0
    whole = client.images.generate(model="gpt-image-1", prompt="a cat", extra_body=STEPS)
    assert whole.data
    alone = Image.open(io.BytesIO(base64.b64decode(whole.data[0].b64_json or "")))
    assert picture(last).tobytes() == alone.tobytes()


def test_no_previews_unless_they_are_asked_for(client: openai.OpenAI) -> None:
    events = list(client.images.generate(model="gpt-image-1", prompt="a cat", stream=True, extra_body=STEPS))
    assert [event.type for event in events] == ["image_generation.completed"]


def test_several_pictures_end_in_their_order(client: openai.OpenAI) -> None:
    events = list(
        client.images.generate(
            model="gpt-image-1", prompt="a cat", n=3, stream=True, partial_images=1, extra_body=STEPS
        )
    )
    ends = [event.to_dict()["index"] for event in events if isinstance(event, ImageGenCompletedEvent)]
    previews = [event for event in events if isinstance(event, ImageGenPartialImageEvent)]
    assert ends == [0, 1, 2]
    assert sorted(event.to_dict()["index"] for event in previews) == [0, 1, 2]  # type: ignore[type-var]


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_previews_have_the_format_asked_for(client: openai.OpenAI, output_format: str) -> None:
    events = list(
        client.images.generate(
            model="gpt-image-1",
            prompt="a cat",
            stream=True,
            partial_images=1,
            output_format=output_format,  # type: ignore[arg-type]
            extra_body=STEPS,
        )
    )
    assert [event.output_format for event in events] == [output_format] * 2
    assert [picture(event).format for event in events] == [output_format.upper()] * 2


def test_edits_stream_as_well(client: openai.OpenAI) -> None:
    file = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").resize((128, 128)).save(file, "PNG")
    *previews, last = client.images.edit(
        model="gpt-image-1",
        image=("photo.png", file.getvalue(), "image/png"),
        prompt="a cat",
        stream=True,
        partial_images=2,
        extra_body={**STEPS, "strength": 1},
    )
    assert all(isinstance(event, ImageEditPartialImageEvent) for event in previews)
    assert [event.partial_image_index for event in previews] == [0, 1]  # type: ignore[union-attr]
    assert isinstance(last, ImageEditCompletedEvent)
    assert [picture(event).size for event in (*previews, last)] == [(128, 128)] * 3
    assert last.usage.input_tokens_details.image_tokens > 0


def test_streams_in_parallel(server: Server) -> None:
    async def follow(client: openai.AsyncOpenAI, seed: int) -> list[ImageGenStreamEvent]:
        stream = await client.images.generate(
            model="gpt-image-1", prompt="a cat", stream=True, partial_images=2, extra_body={"steps": 8, "seed": seed}
        )
        return [event async for event in stream]

    async def follow_all() -> list[list[ImageGenStreamEvent]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            return await asyncio.gather(*(follow(client, seed) for seed in range(4)))

    ends = [events[-1] for events in asyncio.run(follow_all())]
    assert all(isinstance(end, ImageGenCompletedEvent) for end in ends)
    assert len({picture(end).tobytes() for end in ends}) == 4


def test_closing_a_stream_stops_the_work(server: Server, client: openai.OpenAI) -> None:
    before = len(server.lines)
    stream = client.images.generate(model="gpt-image-1", prompt="a cat", stream=True, partial_images=3, extra_body=LONG)
    with stream:
        assert next(iter(stream)).type == "image_generation.partial_image"
    left = int(server.wait_for(r"was cancelled with (\d+) steps left", before)[1])
    assert left > 0


def test_what_is_wrong_from_the_start_is_a_plain_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.generate(model="gpt-image-1", prompt="a cat", stream=True, partial_images=4)
    assert bad.value.param == "partial_images"
    with pytest.raises(openai.NotFoundError):
        client.images.generate(model="no-such", prompt="a cat", stream=True)


def test_an_error_on_the_way_ends_the_stream(server: Server, client: openai.OpenAI) -> None:
    stream = iter(
        client.images.generate(
            model="gpt-image-1",
            prompt="a cat",
            stream=True,
            partial_images=3,
            extra_body=LONG,
            extra_headers={"x-request-id": "to-be-ended"},
        )
    )
    assert next(stream).type == "image_generation.partial_image"
    assert server.client.delete("/v1/images/progress/to-be-ended").json()["status"] == "cancelled"
    with pytest.raises(openai.APIError) as failed:
        list(stream)
    assert type(failed.value) is openai.APIError  # told in the stream, not by a status
    assert failed.value.code == "cancelled"
    assert failed.value.message

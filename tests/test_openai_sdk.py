"""The official OpenAI SDK over a real socket: it changes `base_url` and nothing else.

Streams, edits and variations stand in `test_clients_openai_*.py`. What the SDK parses loosely is validated
here against its own types, so an answer is what a strictly typed client expects.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai.types import ImagesResponse
from PIL import Image

import sfumato
from support.serving import Server

TINY = Path(sfumato.__file__).parent / "models" / "sfumato-tiny"
FILE = "name: {name}\nparameters:\n  model: {source}\n"
ONE_AT_A_TIME = "limits:\n  max_concurrent: 1\n  retry_after_seconds: 1\n"
FILES = {
    "limited": FILE.format(name="one-at-a-time", source=TINY)
    + "limits:\n  max_concurrent: 1\n  retry_after_seconds: 1\n",
    "slashed": FILE.format(name="someone/tiny", source=TINY),
    "gone": FILE.format(name="gone", source="someone/not-on-this-machine"),
}
FEW = {"steps": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("sdk")
    models = folder / "models"
    models.mkdir()
    for name, text in FILES.items():
        (models / f"{name}.yaml").write_text(text)
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    with Server(models, folder / "data", "--default-model", "sfumato-tiny", env=env) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def pictures(answer: ImagesResponse) -> list[Image.Image]:
    """The pictures of an answer that is as the SDK types it, each by exactly one of URL and base64."""
    ImagesResponse.model_validate(answer.to_dict())
    found = []
    for item in answer.data or []:
        sent = item.to_dict()
        assert ("url" in sent) != ("b64_json" in sent), sent.keys()
        data = base64.b64decode(item.b64_json) if item.b64_json else httpx.get(item.url or "").content
        found.append(Image.open(io.BytesIO(data)))
    return found


def test_generate_by_url(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="sfumato-tiny", prompt="a cat", n=2, size="auto", user="someone", style="vivid", extra_body=FEW
    )
    assert answer.created > 0
    assert [picture.size for picture in pictures(answer)] == [(128, 128)] * 2
    assert all(item.url and item.url.startswith("http://") for item in answer.data or [])


def test_generate_by_base64(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="dall-e-3", prompt="a cat", response_format="b64_json", extra_body={**FEW, "seed": 5}
    )
    assert [picture.size for picture in pictures(answer)] == [(128, 128)]
    assert answer.data
    assert answer.data[0].url is None
    assert (answer.data[0].model_extra or {})["seed"] == 5


def test_gpt_image_clients_get_base64(client: openai.OpenAI) -> None:
    for answer in (
        client.images.generate(model="gpt-image-1", prompt="a cat", extra_body=FEW),
        client.images.generate(model="sfumato-tiny", prompt="a cat", quality="low", extra_body=FEW),
        client.images.generate(model="sfumato-tiny", prompt="a cat", background="auto", extra_body=FEW),
        client.images.generate(model="sfumato-tiny", prompt="a cat", moderation="low", extra_body=FEW),
        client.images.generate(model="sfumato-tiny", prompt="a cat", output_format="png", extra_body=FEW),
    ):
        assert answer.data
        assert answer.data[0].b64_json


def test_an_answer_says_what_was_made(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="gpt-image-1", prompt="a cat", n=2, size="64x96", quality="high", extra_body=FEW
    )
    assert [picture.size for picture in pictures(answer)] == [(64, 96)] * 2
    assert (answer.size, answer.quality, answer.output_format, answer.background) == ("64x96", "high", "png", "opaque")
    assert answer.usage
    details = answer.usage.input_tokens_details
    assert answer.usage.input_tokens == details.text_tokens + details.image_tokens
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert details.text_tokens > 0
    assert details.image_tokens == 0
    assert answer.usage.output_tokens > 0
    assert set(answer.to_dict()) <= {"created", "data", "background", "output_format", "quality", "size", "usage"}


def test_quality_means_steps(client: openai.OpenAI) -> None:
    made = {}
    for quality in ("low", "medium", "high", "auto", "standard", "hd"):
        answer = client.images.generate(
            model="sfumato-tiny", prompt="a cat", quality=quality, response_format="b64_json", extra_body={"seed": 1}
        )
        picture = pictures(answer)[0]
        made[quality] = picture.tobytes()
    assert made["auto"] == made["medium"] == made["standard"]
    assert made["hd"] == made["high"]
    assert len({made["low"], made["medium"], made["high"]}) == 3


@pytest.mark.parametrize(("output_format", "type"), [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
@pytest.mark.parametrize("response_format", ["url", "b64_json"])
def test_output_formats(client: openai.OpenAI, output_format: str, type: str, response_format: str) -> None:
    answer = client.images.generate(
        model="sfumato-tiny",
        prompt="a cat",
        output_format=output_format,  # type: ignore[arg-type]
        response_format=response_format,  # type: ignore[arg-type]
        extra_body=FEW,
    )
    assert [picture.format for picture in pictures(answer)] == [type]
    assert answer.output_format == output_format


@pytest.mark.parametrize("output_format", ["webp", "jpeg"])
def test_compression_makes_files_smaller(client: openai.OpenAI, output_format: str) -> None:
    sizes = []
    for compression in (100, 10):
        answer = client.images.generate(
            model="gpt-image-1",
            prompt="a cat",
            output_format=output_format,  # type: ignore[arg-type]
            output_compression=compression,
            extra_body={**FEW, "seed": 1},
        )
        assert pictures(answer)
        assert answer.data
        sizes.append(len(answer.data[0].b64_json or ""))
    assert sizes[1] < sizes[0]


def test_extra_body_reaches_the_model(client: openai.OpenAI) -> None:
    def drawn(**fields: object) -> bytes:
        body = {**FEW, "seed": 3, **fields}
        answer = client.images.generate(model="gpt-image-1", prompt="a fox on blue", extra_body=body)
        return pictures(answer)[0].tobytes()

    plain = drawn()
    assert plain == drawn()
    assert len({plain, drawn(seed=4), drawn(negative_prompt="blue"), drawn(steps=3), drawn(guidance_scale=7)}) == 5


def test_backgrounds(client: openai.OpenAI) -> None:
    answer = client.images.generate(model="gpt-image-1", prompt="a cat", background="opaque", extra_body=FEW)
    assert answer.background == "opaque"
    assert pictures(answer)[0].mode == "RGB"
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(model="gpt-image-1", prompt="a cat", background="transparent", extra_body=FEW)
    assert refused.value.param == "background"


def test_models(client: openai.OpenAI) -> None:
    models = list(client.models.list())
    assert {model.id for model in models} == {"gone", "one-at-a-time", "sfumato-tiny", "someone/tiny"}
    for model in models:
        type(model).model_validate(model.to_dict())
        assert client.models.retrieve(model.id).id == model.id
        assert model.created > 0
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("no/such")
    assert missing.value.code == "model_not_found"


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(model="no-such", prompt="a cat")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    assert "sfumato-tiny" in missing.value.message
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.generate(model="sfumato-tiny", prompt="a cat", size="abc")
    assert (bad.value.param, bad.value.type) == ("size", "invalid_request_error")
    assert bad.value.request_id


@pytest.mark.parametrize(
    ("param", "value"),
    [("n", 0), ("n", 11), ("output_format", "svg"), ("output_compression", 101), ("quality", "best"), ("prompt", 5)],
)
def test_bad_values_name_their_field(client: openai.OpenAI, param: str, value: object) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.generate(model="sfumato-tiny", **{"prompt": "a cat", param: value})  # type: ignore[arg-type]
    assert bad.value.param == param


def test_raw_responses_carry_the_headers(client: openai.OpenAI) -> None:
    raw = client.images.with_raw_response.generate(
        model="gpt-image-1", prompt="a cat", extra_body={**FEW, "foreign": 1}, extra_headers={"x-request-id": "mine"}
    )
    assert raw.headers["x-request-id"] == "mine"
    assert "foreign" in raw.headers["x-sfumato-ignored"]
    assert pictures(raw.parse())


class Counted(openai.DefaultHttpxClient):
    """Counts what the SDK sends, its retries included."""

    sent = 0

    def send(self, *args: object, **options: object) -> object:  # type: ignore[override]
        self.sent += 1
        return super().send(*args, **options)  # type: ignore[arg-type]


def test_what_would_fail_again_is_not_sent_again(server: Server) -> None:
    http = Counted()
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=3, http_client=http) as client,
        pytest.raises(openai.InternalServerError) as failed,
    ):
        client.images.generate(model="gone", prompt="a cat")
    assert failed.value.response.headers["x-should-retry"] == "false"
    assert http.sent == 1


def test_a_busy_model_is_asked_again_until_it_is_free(server: Server, client: openai.OpenAI) -> None:
    body = {"prompt": "a cat", "model": "one-at-a-time", "response_format": "b64_json"}
    with client.images.with_streaming_response.generate(
        **body,  # type: ignore[arg-type]
        stream=True,
        partial_images=1,
        extra_body={"steps": 1000, "size": "512x512"},
    ):
        with pytest.raises(openai.RateLimitError) as refused:
            client.images.generate(**body)  # type: ignore[call-overload]
        assert refused.value.response.headers["retry-after"] == "1"
    http = Counted()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=30, http_client=http) as again:
        assert pictures(again.images.generate(**body, extra_body=FEW))  # type: ignore[call-overload]


def test_many_at_once(server: Server) -> None:
    async def draw_all() -> list[ImagesResponse]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            return await asyncio.gather(
                *(
                    client.images.generate(model="gpt-image-1", prompt="a cat", extra_body={**FEW, "seed": seed})
                    for seed in range(4)
                )
            )

    answers = asyncio.run(draw_all())
    assert [(answer.data or [])[0].to_dict()["seed"] for answer in answers] == [0, 1, 2, 3]
    assert len({pictures(answer)[0].tobytes() for answer in answers}) == 4

"""The official OpenAI SDK over a real socket: it changes `base_url` and nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import httpx
import openai
import pytest
from hub import Hub
from PIL import Image
from serving import Server

MODEL = "name: m\naliases: [gpt-image-1]\nparameters:\n  model: nitrosocke/Ghibli-Diffusion\nstep: 2\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("sdk")
    (folder / "models").mkdir()
    (folder / "models" / "m.yaml").write_text(MODEL)
    with Server(folder / "models", folder / "data", env=hub.environment(folder / "hf")) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
        yield client


def test_generate_by_url(client: openai.OpenAI) -> None:
    answer = client.images.generate(model="m", prompt="a cat", n=2, size="auto", user="someone")
    assert answer.created > 0
    assert answer.data
    for item in answer.data:
        assert item.b64_json is None
        assert item.url
        assert Image.open(io.BytesIO(httpx.get(item.url).content)).size == (64, 64)


def test_generate_by_base64(client: openai.OpenAI) -> None:
    answer = client.images.generate(model="m", prompt="a cat", response_format="b64_json", extra_body={"seed": 5})
    assert answer.data
    assert answer.data[0].url is None
    assert Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or ""))).size == (64, 64)
    assert answer.data[0].model_extra == {"seed": 5}


def test_gpt_image_clients_get_base64(client: openai.OpenAI) -> None:
    for answer in (
        client.images.generate(model="gpt-image-1", prompt="a cat"),
        client.images.generate(model="m", prompt="a cat", quality="low"),
        client.images.generate(model="m", prompt="a cat", background="auto"),
    ):
        assert answer.data
        assert answer.data[0].b64_json


def test_models(client: openai.OpenAI) -> None:
    models = list(client.models.list())
    assert [model.id for model in models] == ["m", "sfumato-tiny"]
    assert all(model.object == "model" and model.created > 0 and model.owned_by for model in models)


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(model="no-such", prompt="a cat")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    assert "sfumato-tiny" in missing.value.message
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.generate(model="m", prompt="a cat", size="abc")  # type: ignore[arg-type]
    assert (bad.value.param, bad.value.type) == ("size", "invalid_request_error")
    assert bad.value.request_id

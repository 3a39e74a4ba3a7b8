"""Text that is no Unicode, in names of files, model files, metadata and bodies: it breaks no list and no answer."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from sfumato.checkpoints import named_files
from sfumato.config import Broken, load, outcomes
from sfumato.errors import printable
from support.answers import error_of
from support.inside import DRAW, Inside

LISTS = (
    "/v1/models",
    "/v1/models/capabilities",
    "/v1/status",
    "/v1/loras",
    "/api/tags",
    "/sdapi/v1/sd-models",
    "/sdapi/v1/options",
    "/sdapi/v1/loras",
    "/sdapi/v1/embeddings",
    "/controlnet/model_list",
    "/metrics",
)
MODEL = b"parameters:\n  model: some/one\n"


def weights(metadata: dict[str, str] | None = None, name: str = "emb_params") -> bytes:
    entry = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": metadata or {}, name: entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


PLACES: dict[str, bytes] = {
    "caf\udce9.yaml": MODEL,
    "named-\udce9.yaml": b"name: named\n" + MODEL,
    "broken-\udce9.yaml": b"name: broken\nstepp: 3\n" + MODEL,
    "half.yaml": rb'name: "\ud800x"' + b"\n" + MODEL,
    "description.yaml": rb'description: "\udfff"' + b"\n" + MODEL,
    "loras/caf\udce9.safetensors": weights(),
    "loras/\udce9/one.safetensors": weights(),
    "loras/metadata.safetensors": weights({"ss_sd_model_name": "\ud800"}),
    "loras/good.safetensors": weights(),
    "embeddings/caf\udce9.safetensors": weights(),
    "controlnets/caf\udce9/config.json": b'{"_class_name": "ControlNetModel"}',
    "controlnets/good/config.json": b'{"_class_name": "ControlNetModel"}',
    "ip_adapters/caf\udce9.safetensors": weights(),
}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    models = tmp_path / "models"
    try:
        for place, data in PLACES.items():
            (models / place).parent.mkdir(parents=True, exist_ok=True)
            (models / place).write_bytes(data)
    except OSError:
        pytest.skip("this file system has no names of other bytes")
    with Inside(tmp_path, models=models).client() as client:
        yield client


def test_no_list_breaks(client: TestClient) -> None:
    for path in LISTS:
        assert client.get(path).status_code == 200, path
    assert [each["id"] for each in client.get("/v1/models").json()["data"] if "named" in each["id"]] == ["named"]
    assert [each["name"] for each in client.get("/sdapi/v1/loras").json()] == ["good"]
    assert client.get("/controlnet/model_list").json()["model_list"] == ["good"]
    assert client.post("/v1/images/generations", **DRAW).status_code == 200


def test_errors_show_such_a_name_escaped(client: TestClient) -> None:
    broken = client.post("/v1/images/generations", json={"prompt": "a", "model": "broken"})
    assert "broken-\\udce9.yaml" in error_of(broken, 500)["message"]
    unknown = client.post("/v1/images/generations", json={"prompt": "a <lora:caffe>", "model": "m"})
    assert error_of(unknown)["param"] == "loras"


@pytest.mark.parametrize("field", ["controls", "loras", "mask"])
def test_json_within_a_form_is_as_strict_as_a_body(client: TestClient, field: str) -> None:
    for text in (r'[{"\ud800": 1}]', r'{"\ud800": 1}'):
        answer = client.post("/v1/images/edits", data={"prompt": "a", "model": "m", "image": "x", field: text})
        assert answer.status_code == 400, answer.text


def test_a_name_that_is_left_out_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    try:
        (tmp_path / "caf\udce9").write_bytes(b"")
    except OSError:
        pytest.skip("this file system has no names of other bytes")
    (tmp_path / "one").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert [named_files.below(tmp_path) for _ in range(2)] == [[tmp_path / "one"]] * 2
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}{os.sep}caf\\udce9 is left out: its name is not UTF-8; rename it"
    ]


def test_a_surrogate_pair_in_a_model_file_is_its_character(tmp_path: Path) -> None:
    values: dict[str, Any] = {"name": "\U0001f9e8 one", "parameters": {"model": "a/b", "negative_prompt": "\U0001f9e8"}}
    (tmp_path / "m.yaml").write_text(json.dumps(values))
    (config,) = load(tmp_path / "m.yaml")
    assert (config.name, config.sampling.negative_prompt) == ("\U0001f9e8 one", "\U0001f9e8")


def test_half_a_pair_and_a_bad_name_say_why(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text('name: m\nparameters: {model: a/b}\ndescription: "\\ud83e"\n')
    (tmp_path / "a\nb.yaml").write_bytes(MODEL)
    for name, message in (("m.yaml", "line 3: '\\ud83e' has half a surrogate pair"), ("a\nb.yaml", "rename the file")):
        (broken,) = outcomes(tmp_path / name)
        assert isinstance(broken, Broken)
        assert message in broken.error.message


def test_what_is_printable_stays() -> None:
    assert printable("caf\u00e9 \U0001f9e8\n") == "caf\u00e9 \U0001f9e8\n"
    assert printable("\ud800") == "\\ud800"

"""Families of pipelines as models of one server in this process: real classes with tiny weights, over HTTP."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from sfumato.api.app import create_app
from sfumato.config import ModelConfig
from sfumato.engine.local import Local
from sfumato.models import load
from sfumato.pictures.stores import store_of
from sfumato.residency import pool
from sfumato.serving.catalog import Catalog
from sfumato.serving.service import Service
from sfumato.settings import Settings
from support.families import Family, half_mask

ENABLED = "image,negative_prompt,num_inference_steps"


def encoded(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def model_file(name: str, family: Family, kind: str, **more: Any) -> str:
    """With the family's own arguments that a request does not have as `options`."""
    call = family.calls[0]
    plain = {key: value for key, value in call.items() if isinstance(value, bool | int | float)}
    more |= {"size": f"{call['width']}x{call['height']}"} if "width" in call else {}
    requested = ("num_inference_steps", "guidance_scale", "height", "width", "strength")
    options = [f"{key}:{value}" for key, value in plain.items() if key not in requested]
    values = {"name": name, "parameters": {"model": f"tiny/{kind}"}, "step": 2, "cuda": False, "options": options}
    return json.dumps({**values, "diffusers": {"pipeline_type": kind, "enable_parameters": ENABLED}, **more})


class Served:
    """A client of the application, and the models that were loaded."""

    def __init__(self, client: TestClient, folder: Path, families: Mapping[str, Family]) -> None:
        self.client = client
        self.folder = folder
        self._families = families
        self.built: dict[str, Any] = {}

    def model(self, family: str) -> str:
        """The name of a family's model, whose file is written when it is first asked for."""
        name = "".join(letter if letter.isalnum() else "-" for letter in family)
        file = self.folder / f"{name}.yaml"
        if not file.exists():
            self.built[name] = self._families[family].build()
            file.write_text(model_file(name, self._families[family], type(self.built[name]).__name__))
        return name

    def load_built(self, config: ModelConfig, *rest: Any) -> load.Loaded:
        """In the place of `load.load`."""
        pipeline = self.built[config.name]
        pipeline.set_progress_bar_config(disable=True)
        return load.Loaded(config, pipeline, "tiny", "cpu", "fp32")

    def told(self, model: str) -> dict[str, Any]:
        """What the list says of a model."""
        answer = self.client.get(f"/v1/models/{model}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json()["sfumato"])

    def load(self, model: str) -> dict[str, Any]:
        """Load a model; what the list then says of it."""
        assert self.client.post("/v1/models/load", json={"model": model}).status_code == 200
        while (told := self.told(model))["status"] not in ("ready", "failed"):
            time.sleep(0.02)
        assert told["status"] == "ready", told["detail"]
        return told

    def draw_example(self, model: str, example: str) -> None:
        """Send the JSON of a guide to the route that it is for, and see that it draws without a warning."""
        body = json.loads(example) | {"size": "64x64", "width": 64, "height": 64, "steps": 2}
        webui = "alwayson_scripts" in body
        if webui:
            body["override_settings"] = {"sd_model_checkpoint": model}
        answer = self.client.post("/sdapi/v1/txt2img" if webui else "/v1/images/generations", json=body)
        assert answer.status_code == 200, answer.text
        assert "x-sfumato-warning" not in answer.headers, answer.headers

    def generate(self, model: str, **fields: Any) -> Any:
        body = {"model": model, "prompt": "a cat", "seed": 1, "response_format": "b64_json", **fields}
        return self.client.post("/v1/images/generations", json=body)

    def edit(self, model: str, **fields: Any) -> Any:
        return self.client.post("/v1/images/edits", json={"model": model, "prompt": "a cat", "seed": 1, **fields})


@contextmanager
def served(folder: Path, families: Mapping[str, Family], **more: Any) -> Iterator[Served]:
    """A server of these families, with `more` settings; nothing is built before its model is named."""
    (folder / "models").mkdir()
    settings = Settings(
        **{"models": folder / "models", "data": folder / "data", "device": "cpu", "loaded_models": 1, "max_batch": 1}
        | more
    )
    service = Service(Catalog([folder / "models"]), Local(settings), settings)
    app = create_app(service, store_of(settings))
    with pytest.MonkeyPatch.context() as patch, TestClient(app, raise_server_exceptions=False) as client:
        server = Served(client, folder / "models", families)
        patch.setattr(pool.load, "load", server.load_built)
        yield server


MASK = encoded(half_mask())

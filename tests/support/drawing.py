"""What `draw` takes, made of a pipeline that no loader has seen."""

from __future__ import annotations

import io
from collections.abc import AsyncGenerator
from typing import Any

from PIL import Image

from sfumato.config import ModelConfig
from sfumato.core import Event, Failed, Generation
from sfumato.drawing.draw import draw
from sfumato.errors import SfumatoError
from sfumato.models.load import Loaded
from sfumato.sampling import nested
from support.fake_engine import FakeEngine


def quiet(*args: Any) -> None: ...


def loaded(pipeline: Any, **fields: Any) -> Loaded:
    """`pipeline` as if it had been loaded."""
    pipeline.set_progress_bar_config(disable=True)
    config = ModelConfig(**nested({"name": "m", "model": "m", "dtype": "fp32", **fields}))
    return Loaded(config, pipeline, "m", "cpu", "fp32")


def wanted(**fields: Any) -> Generation:
    return Generation(**nested({"id": "1", "prompt": "", "seed": 1, "steps": 2, **fields}))


def source(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(file, "PNG")
    return file.getvalue()


class Drawing(FakeEngine):
    """An engine that draws with one pipeline, whatever model is asked for, in the event loop's own thread."""

    def __init__(self, pipeline: Any, **fields: Any) -> None:
        super().__init__()
        self.model = loaded(pipeline, **fields)

    async def submit(self, config: ModelConfig, generation: Generation) -> AsyncGenerator[Event, None]:
        self.seen.append(generation)
        events: list[Event] = []
        try:
            done = draw(self.model, generation, quiet, events.append)
        except SfumatoError as error:
            yield Failed(error)
            return
        for event in events:
            yield event
        yield done

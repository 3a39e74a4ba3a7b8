"""Responses of Ollama's routes: one JSON object, or one a line (NDJSON), the last with the picture."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sfumato.api.http import errors
from sfumato.api.openai.answers import OutputFormat
from sfumato.core import Done, Preview, Step
from sfumato.errors import SfumatoError
from sfumato.serving.job import Job

NDJSON = "application/x-ndjson"


class OllamaError(BaseModel):
    """The error shape of these routes."""

    error: str = Field(description="What is wrong, what is valid and what to do.")


class Generated(BaseModel):
    """Of a step, or at the end."""

    model: str = Field(description="As in the request.")
    created_at: str
    response: str = Field(description="Always empty: text is not served.")
    done: bool
    done_reason: str | None = Field(None, description="stop; load and unload if there was no prompt.")
    completed: int | None = Field(None, description="Steps completed.")
    total: int | None = Field(None, description="All steps.")
    image: str | None = Field(None, description="The picture as base64; with done.")
    seed: int | None = Field(None, description="Reproduces the picture.")
    total_duration: int | None = Field(None, description="Nanoseconds.")
    load_duration: int | None = Field(None, description="Nanoseconds until it was begun.")
    prompt_eval_count: int | None = Field(None, description="Tokens of both prompts.")
    warnings: list[str] | None = Field(None, description="Where the picture differs from the request.")


class Details(BaseModel):
    parent_model: str
    format: str
    family: str = Field(description="diffusers class; empty until known.")
    families: list[str]
    parameter_size: str
    quantization_level: str = Field(description="dtype; empty until it is loaded.")


class _Item(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    name: str
    model: str
    size: int = Field(description="Bytes in memory; 0 until it is loaded.")
    digest: str
    details: Details


class TagItem(_Item):
    modified_at: str


class Tags(BaseModel):
    models: list[TagItem]


class RunningItem(_Item):
    size_vram: int
    expires_at: str


class Running(BaseModel):
    models: list[RunningItem]


class Shown(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    modelfile: str
    parameters: str = Field(description="A default a line: its name and its value.")
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str] = Field(description="image; and vision, if it draws from pictures.")
    modified_at: str


class Version(BaseModel):
    version: str = Field(description="Of Ollama, whose API this is.")
    sfumato: str


def error_shape(error: dict[str, Any]) -> dict[str, Any]:
    return {"error": error["message"]}


def timestamp(seconds: float) -> str:
    """`seconds` since 1970 in Go's format of a time."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(slots=True)
class Progress:
    """Of one request: what its lines say."""

    model: str
    """As in the request."""
    began: float = field(default_factory=time.monotonic)
    loaded: float | None = None
    """When the first step was done, in seconds of the monotonic clock."""
    step: Step | None = None

    def update(self, event: object) -> None:
        if isinstance(event, Step | Preview) and self.loaded is None:
            self.loaded = time.monotonic()
        if isinstance(event, Step):
            self.step = event

    def answer(self, **more: Any) -> dict[str, Any]:
        steps = {"completed": self.step.step, "total": self.step.total} if self.step else {}
        base = {"model": self.model, "created_at": timestamp(time.time()), "response": "", "done": False}
        return base | steps | more

    async def final(self, done: Done, form: OutputFormat) -> dict[str, Any]:
        now = time.monotonic()
        data = await asyncio.to_thread(form.encode, done)
        return self.answer(
            done=True,
            done_reason="stop",
            image=base64.b64encode(data).decode(),
            seed=done.recipe.seed,
            total_duration=_nanoseconds(now - self.began),
            load_duration=_nanoseconds((self.loaded or now) - self.began),
            prompt_eval_count=done.prompt_tokens,
            **({"warnings": list(done.warnings)} if done.warnings else {}),
        )

    def line(self) -> str:
        return _line(self.answer())


async def lines(job: Job, form: OutputFormat, progress: Progress) -> AsyncGenerator[str, None]:
    """The stream of a request: a line for each step, and one with the picture or the error."""
    try:
        async with aclosing(job.events()) as events:
            async for _, event in events:
                progress.update(event)
                if isinstance(event, Step):
                    yield progress.line()
                elif isinstance(event, Done):
                    yield _line(await progress.final(event, form))
    except Exception as error:  # the status was already sent, so any error goes into the stream
        reported = error if isinstance(error, SfumatoError) else errors.unexpected(error)
        yield _line(error_shape(errors.shape(reported)["error"]))


def _line(answer: dict[str, Any]) -> str:
    return json.dumps(answer) + "\n"


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)

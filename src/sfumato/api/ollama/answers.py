"""Responses of Ollama's routes: one JSON object, or one a line (NDJSON), the last with the picture."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sfumato.api.http import errors
from sfumato.api.http.error_shapes import text_shape
from sfumato.api.openai.answers import OutputFormat, b64
from sfumato.core import Done, Step
from sfumato.serving.job import Job, Part

NDJSON = "application/x-ndjson"


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
    capabilities: list[str] = Field(description="image, video or audio: what it makes; and vision, if from pictures.")
    modified_at: str


class Version(BaseModel):
    version: str = Field(description="Of Ollama, whose API this is.")
    sfumato: str


def timestamp(seconds: float) -> str:
    """`seconds` since 1970 in Go's format of a time."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(slots=True)
class Progress:
    """Of one request: what its lines say."""

    model: str
    """As in the request."""
    began: float = field(default_factory=time.monotonic)
    step: Step | None = None

    def answer(self, **more: Any) -> dict[str, Any]:
        steps = {"completed": self.step.step, "total": self.step.total} if self.step else {}
        base = {"model": self.model, "created_at": timestamp(time.time()), "response": "", "done": False}
        return base | steps | more

    async def final(self, part: Part, form: OutputFormat) -> dict[str, Any]:
        """`part` is done."""
        done, now = part.done, time.monotonic()
        assert done
        return self.answer(
            done=True,
            done_reason="stop",
            completed=part.total,
            total=part.total,
            image=await b64(done, form),
            seed=done.recipe.seed,
            total_duration=_nanoseconds(now - self.began),
            load_duration=_nanoseconds((part.first_step_at or now) - self.began),
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
                if isinstance(event, Step):
                    progress.step = event
                    yield progress.line()
                elif isinstance(event, Done):
                    yield _line(await progress.final(job.parts[0], form))
    except Exception as error:  # the status was already sent, so any error goes into the stream
        yield _line(text_shape(errors.shape(errors.reported(error))["error"]))


def _line(answer: dict[str, Any]) -> str:
    return json.dumps(answer) + "\n"


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)

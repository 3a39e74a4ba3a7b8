"""Clips as JSON, and their description in OpenAPI: OpenAI's `Video`, made of a stored request."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, Field

from sfumato.api.jobs.run import Run
from sfumato.api.jobs.tables import Answer, StoredJob
from sfumato.core import Generation, Recipe


class VideoError(BaseModel):
    code: str | None
    message: str


class Video(BaseModel):
    """A clip that is drawn or was."""

    id: str = Field(description="Also that of its job in `/v1/jobs`.")
    object: Literal["video"]
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(description="0 to 100: the denoising steps that are done.")
    created_at: int
    completed_at: int | None
    expires_at: int | None = Field(description="When it will be deleted; null until it has ended.")
    prompt: str | None
    seconds: str = Field(description="Length; empty while neither the request nor the clip says it.")
    size: str = Field(description="WIDTHxHEIGHT; empty while neither the request nor the clip says it.")
    num_frames: int | None
    fps: float | None
    seed: int | None
    file: str | None = Field(description="Its name on this server: /generated-images/{file}.")
    warnings: list[str] = Field(description="Where the clip differs from the request.")
    error: VideoError | None
    remixed_from_video_id: str | None = Field(description="Always null.")


class Videos(BaseModel):
    """One page of clips."""

    object: Literal["list"]
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    id: str
    object: Literal["video.deleted"]
    deleted: bool


class ClipFile(BaseModel):
    """One of `url` and `b64_json`."""

    url: str | None = None
    b64_json: str | None = None


class ClipFiles(BaseModel):
    """LocalAI's answer."""

    id: str
    created: int
    data: list[ClipFile]


STATES = {"open": "queued", "completed": "completed", "failed": "failed", "cancelled": "failed"}


def of_recipe(recipe: Recipe) -> dict[str, Any]:
    """What a finished clip says of itself."""
    sampling = recipe.sampling
    frames, fps = sampling.num_frames or 0, sampling.fps or 0.0
    return {
        "model": recipe.model,
        "prompt": recipe.prompt,
        "seconds": f"{frames / fps:g}" if fps else "",
        "size": "{}x{}".format(*recipe.size),
        "num_frames": frames,
        "fps": fps,
        "seed": recipe.seed,
    }


def of_generation(model: str, generation: Generation) -> dict[str, Any]:
    """The same of one that is drawn or was not drawn to its end, as far as its request says it."""
    sampling = generation.sampling
    frames, fps, seconds = sampling.num_frames, sampling.fps, sampling.seconds
    seconds = frames / fps if frames and fps else seconds
    return {
        "model": model,
        "prompt": generation.prompt,
        "seconds": f"{seconds:g}" if seconds else "",
        "size": "{}x{}".format(*sampling.size) if sampling.size else "",
        "num_frames": sampling.num_frames,
        "fps": sampling.fps,
        "seed": generation.seed,
    }


UNKNOWN: dict[str, Any] = {
    "model": "", "prompt": None, "seconds": "", "size": "", "num_frames": None, "fps": None, "seed": None,
    "file": None, "warnings": [], "error": None,
}  # fmt: skip


def video_json(
    job: StoredJob, run: Run | None = None, answer: Answer | None = None, *, keep_s: float
) -> dict[str, Any]:
    """`keep_s`: how long jobs are stored; `run`: what this process carries out of it, if it does; `answer`: what its
    route returned, once it has."""
    drawn = run.repeatable.job if run else None
    status, progress, known = STATES[job.state], 100 if job.state == "completed" else 0, dict(UNKNOWN)
    if drawn:
        known |= of_generation(drawn.config.name, drawn.parts[0].generation)
        now = drawn.progress()
        progress = min(99, 100 * now.step // now.total) if now.total and job.open else progress
        status = "in_progress" if job.open and now.state != "queued" else status
    if answer:
        told = json.loads(answer.body)
        if isinstance(error := told.get("error"), dict):
            told["error"] = {"code": error.get("code"), "message": str(error.get("message"))}
        known |= {name: told[name] for name in known if name in told}
    return {
        "id": job.id,
        "object": "video",
        "status": status,
        "progress": progress,
        "created_at": int(job.created),
        "completed_at": int(job.ended) if job.ended is not None and job.state == "completed" else None,
        "expires_at": int(job.ended + keep_s) if job.ended is not None else None,
        "remixed_from_video_id": None,
        **known,
    }

"""Responses of AUTOMATIC1111's routes: their shapes for OpenAPI, and `info`, which is JSON in a string."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sfumato import __version__, schedulers
from sfumato.api.a1111.bodies import DrawBody
from sfumato.core import Done, Recipe
from sfumato.pictures import recipe as recipes
from sfumato.sampling import PARAMETERS, Parameter, clip_layer
from sfumato.serving.job import Job


class _Item(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class Drawn(_Item):
    """The pictures of txt2img and img2img."""

    images: list[str] = Field(description="PNG files as base64, each with its infotext.")
    parameters: dict[str, Any] = Field(description="The request as understood, without pictures.")
    info: str = Field(description="A JSON object: seed, all_seeds, infotexts, warnings and more.")


class Upscaled(_Item):
    image: str = Field(description="PNG as base64.")
    html_info: str


class PngInfo(_Item):
    info: str = Field(description="The infotext; empty if the picture has none.")
    items: dict[str, str] = Field(description="Other texts in the file.")
    parameters: dict[str, str] = Field(description="The infotext's pairs.")


class ProgressState(_Item):
    skipped: bool
    interrupted: bool
    job: str = Field(description="txt2img or img2img; empty: nothing is running.")
    job_count: int = Field(description="Pictures requested.")
    job_no: int = Field(description="Pictures finished.")
    job_timestamp: str
    sampling_step: int = Field(description="Steps completed of the current picture.")
    sampling_steps: int


class ProgressAnswer(_Item):
    progress: float = Field(description="0 to 1, over all the caller's requests; 0: none, or not started.")
    eta_relative: float = Field(description="Estimated seconds left; 0 if unknown.")
    state: ProgressState
    current_image: str | None = Field(description="Preview of the picture: PNG as base64.")
    textinfo: str | None


class SdModel(_Item):
    title: str
    model_name: str
    hash: str | None
    sha256: str | None
    filename: str
    config: str | None


class SamplerItem(_Item):
    name: str
    aliases: list[str]
    options: dict[str, str]


class Scheduler(_Item):
    name: str
    label: str
    aliases: list[str]
    default_rho: float
    need_inner_model: bool


class UpscalerItem(_Item):
    name: str
    model_name: str | None
    model_path: str | None
    model_url: str | None
    scale: float | None


class Named(_Item):
    name: str


class Embeddings(_Item):
    loaded: dict[str, Any]
    skipped: dict[str, Any]


class LoraListItem(_Item):
    name: str
    alias: str
    path: str
    metadata: dict[str, Any]


class Scripts(_Item):
    txt2img: list[str]
    img2img: list[str]


class QueueStatus(_Item):
    msg: str
    queue_size: int
    queue_eta: float | None = Field(description="Estimated seconds until all have begun; null if unknown.")
    rank: int | None
    rank_eta: float | None


class Memory(_Item):
    ram: dict[str, Any] = Field(description="Bytes of the machine, and bytes used by this server.")
    cuda: dict[str, Any] = Field(description="Bytes allocated on the accelerator.")


def info(body: DrawBody, job: Job, results: Sequence[Done], warnings: Sequence[str], urls: Sequence[str]) -> str:
    """The `info` of a request's pictures."""
    first = results[0].recipe
    scheduler = first.sampling.scheduler or ""
    sampler, schedule_type = schedulers.sampler_of(scheduler) or (scheduler, schedulers.AUTOMATIC)
    rare = [each for each in PARAMETERS if not each.reported and first.sampling[each] is not None]
    width, height = (first.hires and first.hires.first) or first.size
    count = len(results)
    return json.dumps(
        {
            "prompt": first.prompt,
            "all_prompts": [done.recipe.prompt for done in results],
            **{each.a1111: _a1111_value(each, first) for each in PARAMETERS if each.a1111 and each.reported},
            "all_negative_prompts": [done.recipe.sampling.negative_prompt or "" for done in results],
            "seed": first.seed,
            "all_seeds": [done.recipe.seed for done in results],
            "subseed": first.seed,
            "all_subseeds": [done.recipe.seed for done in results],
            "subseed_strength": 0,
            "width": width,
            "height": height,
            "sampler_name": sampler,
            "batch_size": min(body.batch_size or 1, count),
            "restore_faces": False,
            "face_restoration_model": None,
            "sd_model_name": first.model,
            "sd_model_hash": None,
            "sd_vae_name": None,
            "sd_vae_hash": None,
            "seed_resize_from_w": -1,
            "seed_resize_from_h": -1,
            "extra_generation_params": {
                "Schedule type": schedule_type,
                **{each.infotext: first.sampling[each] for each in rare},
                **{key: value for key, value in recipes.hires_pairs(first).items() if value is not None},
            },
            "index_of_first_image": 0,
            "infotexts": [recipes.infotext(done.recipe) for done in results],
            "styles": [],
            "job_timestamp": timestamp(job.created),
            "is_using_inpainting_conditioning": first.mask_sha256 is not None,
            "version": f"sfumato {__version__}",
            "warnings": list(warnings),
            "urls": list(urls),
        }
    )


def _a1111_value(parameter: Parameter, recipe: Recipe) -> Any:
    value = recipe.sampling[parameter]
    if parameter.one_based:
        return clip_layer(value, recipe.pipeline)
    return value or "" if parameter.kind is str else value


def timestamp(seconds: float) -> str:
    """`seconds` since 1970 in AUTOMATIC1111's time format."""
    return time.strftime("%Y%m%d%H%M%S", time.localtime(seconds))

"""A request, and the generations it is split into: checks every field except the source pictures."""

from __future__ import annotations

import re
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from sfumato import schedulers
from sfumato.config import ModelConfig
from sfumato.core import MAX_SEED, QUALITIES, Generation, Keep, Limits
from sfumato.errors import InvalidRequest
from sfumato.pictures.fitting import Fitting

MAX_PROMPT = 32_000
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
MAX_PICTURES = 16
MAX_PADDING = 4096
DEFAULT_PADDING = 32
"""Pixels around the masked area if only that is redrawn; AUTOMATIC1111's default."""
RANDOM_SEED = -1
"""The value that AUTOMATIC1111 and LocalAI clients send for a random seed."""


Number = TypeVar("Number", int, float)

_SIZE = re.compile(r"\s*([0-9]{1,9})\s*[xX×]\s*([0-9]{1,9})\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """One unchecked request of a caller. None means "not set"."""

    prompts: Sequence[str]
    bar: bool = True
    """Whether `positive|negative` in a prompt is split; in other dialects the bar has other meanings."""
    model: str | None = None
    negative_prompt: str | None = None
    n: int | None = None
    size: str | None = None
    """`WIDTHxHEIGHT` in pixels, `auto` or None."""
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    """0 .. MAX_SEED; -1 or None: a random one."""
    scheduler: str | None = None
    clip_skip: int | None = None
    strength: float | None = None
    images: Sequence[str | bytes] = ()
    """Source pictures: file bytes, base64, `data:` URI or http(s) URL."""
    mask: str | bytes | None = None
    """White is redrawn; if the mask has transparency, transparent areas are redrawn."""
    fitting: Fitting | None = None
    """Set if pictures and mask follow AUTOMATIC1111's conventions; None: OpenAI's."""
    mask_padding: int | None = None
    """Redraw only the masked area plus this many pixels around it; None: the whole picture."""
    quality: str | None = None
    """A name of `core.QUALITIES`: takes the steps from the model's table, unless `steps` is set."""
    transparent: bool = False
    upscale: int | None = None
    """2 or 4: upscaling factor for the source picture."""
    savings: tuple[str, ...] = ()
    """Names of `core.SAVINGS`, to reproduce a picture that used them."""
    previews: int = 0
    """Previews per picture, 0 .. core.MAX_PREVIEWS."""
    id: str = ""
    """Id for progress and cancelling; empty: a new one."""
    caller: str = ""
    """Who sent the request; the engine is shared fairly between callers."""
    detached: bool = False
    """Drawn to its end even if its client disconnects."""
    keep: Keep | None = None
    """Called with each finished picture."""
    operator: bool = False
    """Sent by the owner of the model files: `enable_parameters` does not apply."""


def plan(request: ImageRequest, config: ModelConfig, limits: Limits, most: int) -> list[Generation]:
    """The generations of a request, without source pictures; at most `most` pictures per request.

    Raises InvalidRequest naming the field at fault.
    """
    prompt_pairs = [_split(prompt) if request.bar else (prompt, None) for prompt in request.prompts]
    if not prompt_pairs:
        raise InvalidRequest("prompt: must be a text or a list of texts", param="prompt")
    texts = [
        *(("prompt", prompt) for prompt in request.prompts),
        ("negative_prompt", request.negative_prompt or ""),
    ]
    for name, text in texts:
        if len(text) > MAX_PROMPT:
            raise InvalidRequest(f"{name}: {len(text)} characters; at most {MAX_PROMPT} are allowed", param=name)
    n = request.n if request.n is not None else min(config.n or 1, most)
    _within("n", n, 1, most)
    if n * len(prompt_pairs) > most:
        raise InvalidRequest(
            f"n: {len(prompt_pairs)} prompts with {n} pictures each; at most {most} per request",
            param="n",
        )
    _within("steps", request.steps, 1, MAX_STEPS)
    _within("guidance_scale", request.guidance_scale, 0, MAX_GUIDANCE)
    _within("strength", request.strength, 0, 1)
    _within("clip_skip", request.clip_skip, 0, 64)
    _within("mask_padding", request.mask_padding, 0, MAX_PADDING)
    if request.mask_padding is not None and request.mask is None:
        raise InvalidRequest("masked_area_only: needs a mask; send `mask` too", param="masked_area_only")
    if request.quality is not None and request.quality not in QUALITIES:
        raise InvalidRequest(
            f"quality: {request.quality[:100]!r}; {', '.join(QUALITIES)} or a number of steps are valid",
            param="quality",
        )
    if request.scheduler:
        schedulers.parse(request.scheduler)
    size = size_of(request.size, limits)
    if len(request.images) > MAX_PICTURES:
        raise InvalidRequest(
            f"image: {len(request.images)} pictures; at most {MAX_PICTURES} are allowed", param="image"
        )
    if request.mask is not None and not request.images:
        raise InvalidRequest("mask: needs a picture to redraw; send `image` too", param="mask")
    if request.strength is not None and not request.images:
        raise InvalidRequest(
            "strength: applies only to a source picture; send `image`, or leave it out", param="strength"
        )
    seed = _seed(config.seed if request.seed is None else request.seed, n)
    generations = []
    for prompt, inline_negative in prompt_pairs:
        negative = ", ".join(text for text in (request.negative_prompt, inline_negative) if text)
        asked = Generation(
            id="",
            prompt=prompt,
            negative_prompt=negative or request.negative_prompt,
            seed=seed,
            width=size and size[0],
            height=size and size[1],
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            scheduler=request.scheduler or None,
            clip_skip=request.clip_skip,
            strength=request.strength,
            mask_padding=request.mask_padding,
            quality=request.quality,
            transparent=request.transparent,
            upscale=request.upscale,
            savings=request.savings,
            previews=request.previews,
            caller=request.caller,
            limits=limits,
        )
        if not request.operator:
            _refuse_disabled(config, asked, bool(request.images))
        generations += [replace(asked, id=uuid.uuid4().hex, seed=seed + i) for i in range(n)]
    return generations


def size_of(text: str | None, limits: Limits) -> tuple[int, int] | None:
    """`WIDTHxHEIGHT` as numbers; None for None and for auto. Raises InvalidRequest for a size that is not allowed."""
    if text is None or text.strip().lower() in ("", "auto"):
        return None
    match = _SIZE.fullmatch(text)
    if not match:
        raise InvalidRequest(f"size: {text[:100]!r} is not WIDTHxHEIGHT (such as 512x512) or auto", param="size")
    width, height = int(match[1]), int(match[2])
    refuse_size(limits, width, height, "size")
    return width, height


def refuse_size(limits: Limits, width: int, height: int, name: str, param: str = "") -> None:
    """Raises InvalidRequest naming the field (`param` if it has another name), unless this size is allowed."""
    if breach := limits.breach(width, height):
        raise InvalidRequest(f"{name}: {width}x{height}; {breach}", param=param or name)


def _seed(seed: int | None, n: int) -> int:
    if seed is None or seed == RANDOM_SEED:
        return secrets.randbelow(2**32)  # small enough for every client's number type
    if not 0 <= seed <= MAX_SEED - (n - 1):
        raise InvalidRequest(
            f"seed: {seed}; 0 to {MAX_SEED} are valid (minus n - 1), -1 or no seed for a random one",
            param="seed",
        )
    return seed


def _split(prompt: str) -> tuple[str, str | None]:
    """Split `positive|negative`, LocalAI's way to send both in one field."""
    positive, bar, negative = prompt.partition("|")
    return (positive.strip(), negative.strip() or None) if bar else (prompt, None)


def _refuse_disabled(config: ModelConfig, asked: Generation, pictures: bool) -> None:
    used = {
        "negative_prompt": asked.negative_prompt,
        "num_inference_steps": asked.steps,
        "clip_skip": asked.clip_skip,
        "image": (pictures and not asked.upscale) or None,  # an upscaler always takes a picture
    }
    for name, value in used.items():
        if value is not None and not config.enables(name):
            raise InvalidRequest(
                f"{name}: {config.name} does not allow requests to set it. Add {name} to "
                f"diffusers.enable_parameters in {config.file}, or leave it out.",
                param=name,
            )


def _within(name: str, value: Number | None, least: float, most: float) -> None:
    if value is not None and not least <= value <= most:  # also refuses NaN
        raise InvalidRequest(f"{name}: {value}; {least} to {most} are valid", param=name)

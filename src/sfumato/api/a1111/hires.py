"""AUTOMATIC1111's hires fix: the fields of a second pass, and what they ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import BaseModel, Field

from sfumato.api.a1111.samplers import choose
from sfumato.api.fields import MAX_SIDE, NUMBER, Text
from sfumato.errors import InvalidRequest, ModelNotFound
from sfumato.sampling import MAX_PROMPT, UPSCALERS, Hires, Sampling, fewer_steps, whole_steps

DEFAULT_STRENGTH, DEFAULT_SCALE = 0.75, 2.0
"""AUTOMATIC1111's, for fields that are absent."""

SAME = ("use same sampler", "use same scheduler", "use same checkpoint", "automatic", "none", "")
"""What its clients send for: as in the first pass."""

DEFAULT_UPSCALER, PLAIN = "Latent", "Lanczos"

Side = Annotated[Annotated[int, Field(ge=0, le=MAX_SIDE)] | None, NUMBER]


class HiresFields(BaseModel):
    """Of txt2img."""

    denoising_strength: Annotated[Annotated[float, Field(ge=0, le=1)] | None, NUMBER] = Field(
        None,
        description=f"With enable_hr: how far the second pass may move; absent: {DEFAULT_STRENGTH}.",
    )
    hr_scale: Annotated[Annotated[float, Field(ge=1, le=16)] | None, NUMBER] = Field(
        None, description=f"With enable_hr: how many times as long the sides become; absent: {DEFAULT_SCALE:g}."
    )
    hr_resize_x: Side = Field(None, description="With enable_hr: the width instead; with 0 it follows from the height.")
    hr_resize_y: Side = Field(None, description="With enable_hr: the height; with 0 it follows from the width.")
    hr_second_pass_steps: Annotated[Annotated[int, Field(ge=0, le=1000)] | None, NUMBER] = Field(
        None, description="With enable_hr: steps of the second pass; 0: as many as in the first."
    )
    hr_upscaler: Text = Field(
        None,
        description="With enable_hr: a name from /sdapi/v1/latent-upscale-modes (latents are enlarged), Lanczos or "
        f"Nearest (pixels are); others count as Lanczos. Absent: {DEFAULT_UPSCALER}.",
        examples=[DEFAULT_UPSCALER],
    )
    hr_sampler_name: Text = Field(None, description="With enable_hr: absent: as in the first pass.")
    hr_scheduler: Text = Field(None, description="With enable_hr: absent: as in the first pass.")
    hr_checkpoint_name: Text = Field(None, description="With enable_hr: only the same model is possible.")
    hr_prompt: Annotated[str | None, Field(max_length=MAX_PROMPT)] = Field(
        None, description="With enable_hr: absent or empty: the prompt."
    )
    hr_negative_prompt: Annotated[str | None, Field(max_length=MAX_PROMPT)] = Field(
        None, description="With enable_hr: absent or empty: the negative prompt."
    )
    hr_cfg: Annotated[Annotated[float, Field(ge=0, le=100)] | None, NUMBER] = Field(
        None, description="With enable_hr: CFG scale of the second pass; absent: as in the first."
    )


def size_of(body: HiresFields, first: tuple[int, int]) -> tuple[int, int]:
    """Of the result, in pixels, if the first pass has this size."""
    width, height = first
    wide, high = body.hr_resize_x or 0, body.hr_resize_y or 0
    if wide or high:
        return wide or round(width * high / height), high or round(height * wide / width)
    scale = body.hr_scale or DEFAULT_SCALE
    return int(width * scale), int(height * scale)


def hires_of(body: HiresFields, first: Sampling, size: tuple[int, int]) -> tuple[Hires, list[str]]:
    """The second pass that a body asks for, and warnings. `size`: of the first pass."""
    warnings = []
    upscaler = next((name for name in UPSCALERS if name.casefold() == (body.hr_upscaler or "").casefold()), None)
    if upscaler is None:
        upscaler = PLAIN if body.hr_upscaler else DEFAULT_UPSCALER
        if body.hr_upscaler and body.hr_upscaler.casefold() != "none":
            warnings.append(f"hr_upscaler: there is no {body.hr_upscaler[:80]!r}; {PLAIN} is used")
    scheduler = first.scheduler
    if named(body.hr_sampler_name):
        choice = choose(body.hr_sampler_name, body.hr_scheduler if named(body.hr_scheduler) else None)
        scheduler = choice.scheduler
        warnings += [f"hr_{warning}" for warning in choice.warnings]
    elif named(body.hr_scheduler):
        warnings.append("hr_scheduler: it needs hr_sampler_name beside it")
    strength = DEFAULT_STRENGTH if body.denoising_strength is None else body.denoising_strength
    steps = body.hr_second_pass_steps or first.steps
    width, height = size_of(body, size)
    sampling = Sampling(
        steps=whole_steps(steps, strength) if steps else None,
        scheduler=scheduler,
        guidance_scale=body.hr_cfg,
        width=width,
        height=height,
        strength=strength,
        negative_prompt=body.hr_negative_prompt or None,
    )
    resized = bool(body.hr_resize_x or body.hr_resize_y)
    scale = None if resized else body.hr_scale or DEFAULT_SCALE
    hires = Hires(upscaler=upscaler, sampling=sampling, prompt=body.hr_prompt or None, scale=scale)
    return hires, warnings + fewer_steps(hires, steps or 0)


def check_checkpoint(body: HiresFields, is_same: Callable[[str], bool]) -> None:
    """Raises InvalidRequest for another model than that of the first pass, and ModelNotFound for none.

    `is_same`: whether a title is that model's; it raises ModelNotFound."""
    title = body.hr_checkpoint_name
    if not title or not named(title):
        return
    try:
        same = is_same(title)
    except ModelNotFound as error:
        raise ModelNotFound(str(error), param="hr_checkpoint_name") from None
    if not same:
        raise InvalidRequest(
            f"hr_checkpoint_name: {title[:100]!r}; both passes are drawn by one model. Leave it "
            "out, or draw with img2img from the first picture",
            param="hr_checkpoint_name",
        )


def named(name: str | None) -> bool:
    """Whether it is anything but: as in the first pass."""
    return (name or "").strip().casefold() not in SAME

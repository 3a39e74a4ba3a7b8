"""A request, and the generations it is split into: checks every field except the source pictures."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sfumato import loras, schedulers
from sfumato.config import ModelConfig, at_fault
from sfumato.core import INTERACTIVE, MAX_SEED, PRIORITIES, QUALITIES, Control, Generation, Limits, StorePicture, labels
from sfumato.errors import InvalidRequest, in_words
from sfumato.formats import IMAGE, PICTURE, VIDEO, check_installed, check_rate, kind_of
from sfumato.formats import WORDS as RESULTS
from sfumato.loras import Lora
from sfumato.pictures.fitting import Fitting
from sfumato.sampling import (
    MAX_PROMPT,
    PARAMETERS,
    UPSCALERS,
    Hires,
    Parameter,
    Sampling,
    prompt_pair,
    refuse_no_guidance,
)
from sfumato.serving import repeat

MAX_PICTURES = 16
MAX_PADDING = 4096
DEFAULT_PADDING = 32
"""Pixels around the masked area if only that is redrawn; AUTOMATIC1111's default."""
RANDOM_SEED = -1
"""The value that AUTOMATIC1111 and LocalAI clients send for a random seed."""

_SIZE = re.compile(r"\s*([0-9]{1,9})\s*[xX×]\s*([0-9]{1,9})\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """One unchecked request of a caller. None means "not set"."""

    prompts: Sequence[str]
    split_prompt: bool = True
    """Whether `positive|negative` in a prompt is LocalAI's way to send both in one field. It is split if the model uses
    a negative prompt and its file lets requests set it."""
    model: str | None = None
    format: str = PICTURE
    """A name of `formats.FORMATS`: what is requested, and how its file is written."""
    n: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    """0 .. MAX_SEED; -1 or None: a random one."""
    images: Sequence[str | bytes] = ()
    """Source pictures: file bytes, base64, `data:` URI, http(s) URL or an uploaded file (`sources.uploaded`)."""
    image_names: Sequence[str] = ()
    """Of each of them in errors; empty: as their API has them."""
    image_fields: Sequence[str] = ("image",)
    """Where their API has them, in the order of what they are for."""
    video: str | bytes | None = None
    """The clip that a clip is drawn from, as the source pictures."""
    video_field: str = "video"
    """Its field in errors."""
    audio: str | bytes | None = None
    """The sound that a sound is made from, as the source pictures."""
    audio_field: str = "audio"
    """Its field in errors."""
    mask: str | bytes | None = None
    """White is redrawn; if the mask has transparency, transparent areas are redrawn."""
    mask_from_alpha: bool = False
    """Whether the first picture's fully transparent areas are the mask, if none is sent and the model takes one."""
    controls: Sequence[Control] = ()
    """Their pictures as the source pictures."""
    loras: Sequence[Lora] = ()
    """Besides those that the prompts name."""
    replace_loras: bool = False
    """As in `Generation`."""
    fitting: Fitting | None = None
    """Set if pictures and mask follow AUTOMATIC1111's conventions; None: OpenAI's."""
    mask_padding: int | None = None
    """Redraw only the masked area plus this many pixels around it; None: the whole picture."""
    quality: str | None = None
    """A name of `core.QUALITIES`: takes the steps from the model's table, unless `sampling.steps` is set."""
    transparent: bool = False
    upscale: int | None = None
    """2 or 4: upscaling factor for the source picture."""
    savings: tuple[str, ...] = ()
    """Names of `core.SAVINGS`, to reproduce a picture that used them."""
    runner: str = ""
    """`core.Recipe.runner` of a picture to reproduce."""
    previews: int = 0
    """Previews per picture, 0 .. core.MAX_PREVIEWS."""
    id: str = ""
    """Id for progress and cancelling; empty: a new one."""
    caller: str = ""
    """Who sent the request; the engine is shared fairly between callers."""
    keep_alive: float | None = None
    """Seconds that the model stays in memory once it is idle; None: as its file or the server says."""
    priority: str = INTERACTIVE
    """A name of `core.PRIORITIES`."""
    deadline: float | None = None
    """When it should be done, in seconds since 1970. A request of which nothing has begun by then is refused."""
    detached: bool = False
    """Drawn to its end even if its client disconnects."""
    keep: StorePicture | None = None
    """Called with each finished picture."""
    operator: bool = False
    """Sent by the owner of the model files: `enable_parameters` does not apply."""
    webui: bool = False
    """As in `Generation`; what the model file does not enable is left out, too."""
    hires: Hires | None = None
    """As in `Generation`."""
    weights: bool = False
    crop: bool = False
    """Both as in `Generation`."""
    lora_tags: bool = True
    """Whether `<lora:name:0.8>` in a prompt is a LoRA; the prompt of a recipe is text."""

    @property
    def has_sources(self) -> bool:
        """Whether files come with it, which are fetched and decoded."""
        return bool(self.images or self.controls or self.others)

    @property
    def others(self) -> dict[str, str]:
        """Inputs of models (`status.Input.name`) that are no pictures, and that it has -> their fields in errors."""
        fields = {"video": (self.video, self.video_field), "audio": (self.audio, self.audio_field)}
        return {name: field for name, (file, field) in fields.items() if file is not None}


def plan(request: ImageRequest, config: ModelConfig, limits: Limits, max_pictures: int) -> list[Generation]:
    """The generations of a request, without source pictures; at most `most` pictures per request.

    Raises InvalidRequest naming the field at fault, and ModelFileError if that is a default of the model file.
    """
    prompts = request.prompts
    if not prompts:
        raise InvalidRequest("prompt: must be a text or a list of texts", param="prompt")
    n = request.n if request.n is not None else min(config.n or 1, max_pictures)
    _check_range("n", n, 1, max_pictures)
    if n * len(prompts) > max_pictures:
        raise InvalidRequest(
            f"n: {len(prompts)} prompts with {n} pictures each; at most {max_pictures} per request", param="n"
        )
    _check_passes(request, limits)
    _check_pictures(request)
    try:
        seed = _seed(config.seed if request.seed is None else request.seed, n)
    except InvalidRequest as error:
        raise at_fault.error_of(error, config, () if request.seed is None else (at_fault.SEED,)) from None
    generations = []
    for prompt in prompts:
        text, tagged = loras.read_tags(prompt) if request.lora_tags else (prompt, ())
        sampling, tagged_negative = _without_tags(request) if request.lora_tags else (request.sampling, ())
        acting = loras.checked((*request.loras, *tagged, *tagged_negative))
        hires, notes = _hires_without_tags(request.hires, acting) if request.lora_tags else (request.hires, ())
        generation = Generation(
            id="",
            prompt=text,
            loras=acting,
            replace_loras=request.replace_loras,
            sampling=sampling,
            format=request.format,
            split_prompt=request.split_prompt,
            seed=seed,
            mask_padding=request.mask_padding,
            mask_from_alpha=request.mask_from_alpha and request.mask is None,
            quality=request.quality,
            transparent=request.transparent,
            upscale=request.upscale,
            savings=request.savings,
            runner=request.runner,
            controls=tuple(replace(control, image=b"") for control in request.controls),
            previews=request.previews,
            caller=request.caller,
            limits=limits,
            webui=request.webui,
            weights=request.weights,
            crop=request.crop,
            hires=hires,
            notes=notes,
            keep_alive=request.keep_alive,
            priority=request.priority,
            deadline=request.deadline,
        )
        if not request.operator:
            generation = _enabled(config, generation, request)
        generations += [replace(generation, id=uuid.uuid4().hex, seed=seed + i) for i in range(n)]
    return generations


def _without_tags(request: ImageRequest) -> tuple[Sampling, tuple[Lora, ...]]:
    """The sampling parameters without LoRAs in the negative prompt, and these."""
    if not request.sampling.negative_prompt:
        return request.sampling, ()
    text, tagged = loras.read_tags(request.sampling.negative_prompt, "negative_prompt")
    return replace(request.sampling, negative_prompt=text), tagged


def _hires_without_tags(hires: Hires | None, acting: Sequence[Lora]) -> tuple[Hires | None, tuple[str, ...]]:
    """The second pass without LoRAs in its prompts, and warnings of those that do not act so: both have the same."""
    if not hires:
        return None, ()
    notes = []
    texts = {"hr_prompt": hires.prompt, "hr_negative_prompt": hires.sampling.negative_prompt}
    for name, text in texts.items():
        texts[name], tagged = loras.read_tags(text, name) if text else (text, ())
        if others := " ".join(lora.tag for lora in tagged if lora not in acting):
            notes.append(f"{name}: {others[:200]} left out: both passes have the LoRAs of `prompt`; name them there")
    sampling = replace(hires.sampling, negative_prompt=texts["hr_negative_prompt"])
    return replace(hires, prompt=texts["hr_prompt"], sampling=sampling), tuple(notes)


def _check_pictures(request: ImageRequest) -> None:
    _check_range("mask_padding", request.mask_padding, 0, MAX_PADDING)
    if request.mask_padding is not None and request.mask is None and not request.mask_from_alpha:
        raise InvalidRequest("masked_area_only: needs a mask; send `mask` too", param="masked_area_only")
    if len(request.images) > MAX_PICTURES:
        raise InvalidRequest(
            f"image: {len(request.images)} pictures; at most {MAX_PICTURES} are allowed", param="image"
        )
    if len(request.controls) > MAX_PICTURES:
        raise InvalidRequest(
            f"controls: {len(request.controls)} control pictures; at most {MAX_PICTURES} are allowed", param="controls"
        )
    for label, control in zip(labels(request.controls), request.controls, strict=True):
        start, end = (0.0 if control.start is None else control.start), (1.0 if control.end is None else control.end)
        if start >= end:
            raise InvalidRequest(
                f"{label}: start {start:g} is not before end {end:g}: the part of the steps, 0 to 1, in "
                "which it is followed; absent, they are 0 and 1. To leave it out, leave out the control",
                param=f"{label}.{'end' if control.start is None else 'start'}",
            )
    if request.mask is not None and not request.images:
        raise InvalidRequest("mask: needs a picture to redraw; send `image` too", param="mask")
    if request.sampling.strength is not None and not request.images and request.video is None:
        raise InvalidRequest(
            "strength: applies only to a source picture or clip; send `image`, or leave it out", param="strength"
        )


def _check_priority(request: ImageRequest) -> None:
    if request.priority not in PRIORITIES:
        raise InvalidRequest(
            f"priority: {request.priority[:100]!r}; {' and '.join(PRIORITIES)} are valid; absent: {INTERACTIVE}",
            param="priority",
        )


def _check_passes(request: ImageRequest, limits: Limits) -> None:
    _check_priority(request)
    for prompt in request.prompts:
        _check_length("prompt", prompt, MAX_PROMPT)
    _check(request.sampling, limits)
    _check_result(request, limits)
    if request.quality is not None and request.quality not in QUALITIES:
        raise InvalidRequest(
            f"quality: {request.quality[:100]!r}; {', '.join(QUALITIES)} or a number of steps are valid",
            param="quality",
        )
    if not (hires := request.hires):
        return
    if request.images:
        raise InvalidRequest("enable_hr: a second pass is for pictures drawn from a text alone", param="enable_hr")
    if hires.upscaler not in UPSCALERS:
        raise InvalidRequest(
            f"hr_upscaler: {hires.upscaler[:100]!r}; {', '.join(UPSCALERS)} are valid", param="hr_upscaler"
        )
    _check_length("hr_prompt", hires.prompt or "", MAX_PROMPT)
    refuse_size(limits, *(hires.sampling.size or (0, 0)), "hr_scale", param="hr_scale")
    _check(hires.sampling, limits)


def _check(sampling: Sampling, limits: Limits) -> None:
    for parameter in PARAMETERS:
        value = sampling[parameter]
        if value is None or parameter.most is None:
            continue
        if isinstance(value, str):
            _check_length(parameter.name, value, int(parameter.most))
        else:
            _check_range(parameter.name, value, parameter.least or 0, parameter.most)
    refuse_no_guidance(sampling)
    if sampling.scheduler:
        schedulers.parse(sampling.scheduler)
    if (sampling.width, sampling.height) != (None, None):
        refuse_size(limits, sampling.width or 0, sampling.height or 0, "size")


def _check_result(request: ImageRequest, limits: Limits) -> None:
    """The fields of a clip or a sound, and what only a picture has."""
    sampling, kind = request.sampling, kind_of(request.format)
    check_installed(request.format, "output_format")
    for parameter in PARAMETERS:
        if sampling[parameter] is not None and kind not in parameter.of:
            results = " and ".join(RESULTS[each] for each in parameter.of)
            raise InvalidRequest(
                f"{parameter.name}: {in_words(sampling[parameter])[:100]}; it is for {results}, and the request is for "
                f"{RESULTS[kind]}; leave it out",
                param=parameter.name,
            )
    for other, param in request.others.items():
        if other != kind:
            raise InvalidRequest(
                f"{param}: only {RESULTS[other]} can be made from it, and the request is for {RESULTS[kind]}; leave it "
                "out",
                param=param,
            )
    if kind == IMAGE:
        return
    if request.hires or request.mask is not None or request.mask_from_alpha:
        raise InvalidRequest("mask: only pictures have masks and second passes; leave them out", param="mask")
    if sampling.num_frames and sampling.seconds:
        raise InvalidRequest(
            "seconds: num_frames is there too, and both say how long the clip is; send one of them", param="seconds"
        )
    _check_range("seconds", sampling.seconds, 0, limits.seconds)
    _check_range("num_frames", sampling.num_frames, 1, limits.frames)
    if kind == VIDEO and sampling.num_frames:
        limits.check_clip(*(sampling.size or (1, 1)), sampling.num_frames)
    if sampling.fps:
        check_rate(request.format, sampling.fps)
        limits.check_length(sampling.num_frames or 1, sampling.fps)


def size_of(text: str | None) -> tuple[int, int] | tuple[None, None]:
    """Width and height of `WIDTHxHEIGHT`; no numbers for none and for auto. Raises InvalidRequest for others."""
    if text is None or text.strip().lower() in ("", "auto"):
        return None, None
    match = _SIZE.fullmatch(text)
    if not match:
        raise InvalidRequest(f"size: {text[:100]!r} is not WIDTHxHEIGHT (such as 512x512) or auto", param="size")
    return int(match[1]), int(match[2])


def refuse_size(limits: Limits, width: int, height: int, name: str, param: str = "") -> None:
    """Raises InvalidRequest naming the field (`param` if it has another name), unless this size is allowed."""
    if violation := limits.violation(width, height):
        raise InvalidRequest(f"{name}: {width}x{height}; {violation}", param=param or name)


def _seed(seed: int | None, n: int) -> int:
    if seed is None or seed == RANDOM_SEED:
        return repeat.seed()
    if not 0 <= seed <= MAX_SEED - (n - 1):
        raise InvalidRequest(
            f"seed: {seed}; 0 to {MAX_SEED} are valid (minus n - 1), -1 or no seed for a random one",
            param="seed",
        )
    return seed


def _enabled(config: ModelConfig, generation: Generation, request: ImageRequest) -> Generation:
    """The generation, if requests may set what it sets. Raises InvalidRequest naming the argument.

    One of AUTOMATIC1111's clients loses what they may not set, except pictures.
    """
    # Controls are what a request adds to a model, as LoRAs are, and most classes of clips need a picture, which LocalAI
    # sends them whatever the file says: only `none` keeps these out.
    free = request.controls or (request.has_sources and kind_of(request.format) != IMAGE)
    pictures = not config.enable_parameters if free else request.images
    if pictures and not generation.upscale and not config.enables("image"):  # an upscaler always takes a picture
        raise _disabled(config, "image", next(iter(request.others.values()), "image"))
    sampling = generation.sampling
    used = [each for each in PARAMETERS if each.guarded and sampling[each] is not None]
    disabled = [each for each in used if not config.enables(each.argument or "")]
    notes = generation.notes
    if generation.split_prompt and prompt_pair(generation.prompt) and not config.enables("negative_prompt"):
        generation = replace(generation, split_prompt=False)
        notes += (f"prompt: not split at its bar: {config.name} does not allow requests to set negative_prompt",)
    if disabled and not generation.webui:
        raise _disabled(config, disabled[0].argument or "")
    without = replace(sampling, **{each.name: None for each in disabled})
    notes += tuple(_left_out(config, sampling, each) for each in disabled)
    return replace(generation, sampling=without, hires=_hires_enabled(config, generation), notes=notes)


def _hires_enabled(config: ModelConfig, generation: Generation) -> Hires | None:
    """The second pass without what requests may not set; its steps follow from those of the first."""
    if not (hires := generation.hires):
        return None
    names = [each.name for each in PARAMETERS if each.guarded and not config.enables(each.argument or "")]
    return replace(hires, sampling=replace(hires.sampling, **dict.fromkeys(names)))


def _disabled(config: ModelConfig, argument: str, field: str = "") -> InvalidRequest:
    """`field`: what the request calls it, if that is another name."""
    return InvalidRequest(
        f"{field or argument}: {config.name} does not allow requests to set it. Add {argument} to "
        f"diffusers.enable_parameters in {config.file_name}, or leave it out.",
        param=field or argument,
    )


def _left_out(config: ModelConfig, sampling: Sampling, parameter: Parameter) -> str:
    value = sampling[parameter]
    told = "" if parameter.kind is str else f"{value + parameter.one_based}; "  # a prompt stays out of warnings
    return f"{parameter.name}: left out: {told}{config.name} does not allow requests to set it"


def _check_length(name: str, text: str, maximum: int) -> None:
    if len(text) > maximum:
        raise InvalidRequest(f"{name}: {len(text)} characters; at most {maximum} are allowed", param=name)


def _check_range(name: str, value: float | None, minimum: float, maximum: float) -> None:
    if value is not None and not minimum <= value <= maximum:  # also refuses NaN
        raise InvalidRequest(f"{name}: {value}; {minimum} to {maximum} are valid", param=name)

"""The arguments of a pipeline call: from the request, then the model file, then the class's own defaults."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, ImageOps

from sfumato.config import DEFAULTS
from sfumato.core import QUALITIES, Generation
from sfumato.drawing import crop
from sfumato.errors import InvalidRequest
from sfumato.models.load import Loaded, encoder_layers
from sfumato.pictures import images
from sfumato.pipelines.capabilities import parameters_of, upscaler

MANY_PICTURES = re.compile(r"Flux2|EditPlus|OmniGen|Kontext(?!Inpaint)")
"""Classes that take several reference pictures for one result; for others a list is a batch."""

PAGE_CLASSES = re.compile(r"StableDiffusion(?!3)")
"""The seed page's defaults (30 steps, guidance 8) are Stable Diffusion's; other classes keep their own."""


@dataclass(frozen=True, slots=True)
class Canvas:
    """The size of the result in pixels (None: the class's own) and its source pictures, at that size."""

    width: int | None
    height: int | None
    sources: list[Image.Image]
    """RGB, upright."""
    mask: Image.Image | None
    """Mode L; white is redrawn."""
    whole: tuple[Image.Image, Image.Image] | None = None
    """The original picture and mask, if another size is drawn and pasted back into them."""
    box: crop.Box | None = None
    """The area of `whole` that is drawn; None: all of it."""

    @property
    def image(self) -> Image.Image | list[Image.Image] | None:
        return self.sources if len(self.sources) > 1 else next(iter(self.sources), None)


def fill(model: Loaded, pipeline: Any, asked: Generation) -> Generation:
    """Fill in what the request leaves open, from the model file and the seed page; class defaults stay None."""
    config = model.config

    def of(argument: str, requested: Any, file: Any) -> Any:
        """The file's value holds where a request has none, and where the file locks it."""
        return file if file is not None and argument in config.locked else _first(requested, file)

    steps = None if "num_inference_steps" in config.locked else _steps_of_quality(model, pipeline, asked.quality)
    return replace(
        asked,
        steps=of("num_inference_steps", _first(asked.steps, steps), _steps(model, pipeline)),
        guidance_scale=of("guidance_scale", asked.guidance_scale, _guidance(model, pipeline)),
        negative_prompt=of("negative_prompt", asked.negative_prompt, config.negative_prompt),
        clip_skip=of("clip_skip", asked.clip_skip, config.clip_skip),
        strength=of("strength", asked.strength, config.strength) if asked.images else asked.strength,
        width=_first(asked.width, None if asked.images else config.width),
        height=_first(asked.height, None if asked.images else config.height),
    )


def default_steps(model: Loaded, pipeline: Any) -> int | None:
    """Default for requests; None: the class has no such argument, or no default number."""
    steps = _default(model, pipeline, "num_inference_steps", _steps(model, pipeline))
    return steps if isinstance(steps, int) else None


def default_guidance(model: Loaded, pipeline: Any) -> float | None:
    """Default for requests; None: the class has no such argument, or no default number."""
    guidance = _default(model, pipeline, "guidance_scale", _guidance(model, pipeline))
    return float(guidance) if isinstance(guidance, int | float) else None


def signature_default(pipeline: Any, argument: str) -> Any:
    """The class's own default for an argument of its call; None if it has none."""
    parameter = parameters_of(pipeline).get(argument)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _paged(pipeline: Any) -> bool:
    return bool(PAGE_CLASSES.match(type(pipeline).__name__))


def _steps(model: Loaded, pipeline: Any) -> int | None:
    """The model file's, or the page's."""
    return _first(model.config.steps, DEFAULTS["step"] if _paged(pipeline) else None)  # type: ignore[no-any-return]


def _guidance(model: Loaded, pipeline: Any) -> float | None:
    page = float(DEFAULTS["cfg_scale"]) if _paged(pipeline) else None
    return _first(model.config.cfg_scale, page)  # type: ignore[no-any-return]


def _default(model: Loaded, pipeline: Any, argument: str, given: Any) -> Any:
    """Default of `argument` for requests; the file's `options` take precedence over all else."""
    if argument not in parameters_of(pipeline):
        return None
    return _first(model.config.options.get(argument), given, signature_default(pipeline, argument))


def _steps_of_quality(model: Loaded, pipeline: Any, quality: str | None) -> int | None:
    """The file's number for this quality, else a multiple of the default; None if requests may not set the steps."""
    if not quality or not model.config.enables("num_inference_steps"):
        return None
    if "num_inference_steps" not in parameters_of(pipeline):
        return None
    default = default_steps(model, pipeline)
    own = dict(model.config.quality_steps).get(quality)
    return own or (default and max(1, round(default * QUALITIES[quality])))


def canvas(model: Loaded, pipeline: Any, wanted: Generation) -> Canvas:
    """Sources and mask at the requested size, else the source's. Raises InvalidRequest for what is not possible."""
    canvas = _canvas(model, pipeline, wanted)
    breach = (
        wanted.limits
        and canvas.sources
        and canvas.width
        and canvas.height
        and wanted.limits.breach(canvas.width, canvas.height)
    )
    if breach:
        raise InvalidRequest(
            f"image: {_size(canvas.sources[0])} would become {canvas.width}x{canvas.height}; {breach}. "
            "Send a size, or a smaller picture.",
            param="image",
        )
    return canvas


def _canvas(model: Loaded, pipeline: Any, wanted: Generation) -> Canvas:
    width, height = wanted.width, wanted.height
    multiple = size_multiple(pipeline)
    if width and height and (width % multiple or height % multiple):
        near = f"{_near(width, multiple)}x{_near(height, multiple)}"
        raise InvalidRequest(
            f"size {width}x{height}: {model.config.name} needs sides that are multiples of {multiple}; "
            f"the nearest is {near}",
            param="size",
        )
    sources = [_flat(images.decoded(png)) for png in wanted.images]
    if not sources:
        return Canvas(width, height, [], None)
    if len(sources) > 1 and not MANY_PICTURES.search(type(pipeline).__name__):
        raise InvalidRequest(
            f"{model.config.name} ({type(pipeline).__name__}) takes one picture, got {len(sources)}; send only one",
            param="image",
        )
    mask = images.decoded(wanted.mask).convert("L") if wanted.mask else None
    if larger := upscaler(pipeline):
        return _enlarged(model, larger.factor, larger.multiple, wanted, sources)
    if mask is not None and mask.size != sources[0].size:
        raise InvalidRequest(
            f"the mask is {_size(mask)}, the picture {_size(sources[0])}: both must have the same size",
            param="mask",
        )
    if mask is not None and wanted.mask_padding is not None:
        return _masked_area(model, wanted, sources, mask, multiple)
    if not (width and height):
        width, height = (_near(side, multiple) for side in sources[0].size)
    if mask is not None and not (wanted.width and wanted.height) and (width, height) != sources[0].size:
        # Stretched slightly for the model, then pasted into the original: outside the mask nothing changes.
        size, first = (width, height), sources[0]
        stretched = [source.resize(size, Image.Resampling.LANCZOS) for source in sources[:1]] + sources[1:]
        return Canvas(width, height, stretched, mask.resize(size, Image.Resampling.NEAREST), (first, mask))
    fit = functools.partial(ImageOps.fit, size=(width, height), method=Image.Resampling.LANCZOS)
    if len(sources) == 1:
        sources = [fit(source) for source in sources]
    return Canvas(width, height, sources, mask and fit(mask, method=Image.Resampling.NEAREST))


def _masked_area(
    model: Loaded, wanted: Generation, sources: list[Image.Image], mask: Image.Image, multiple: int
) -> Canvas:
    """The area around the mask, at the requested size, the model's own, or unscaled."""
    assert wanted.mask_padding is not None
    first = sources[0]
    width, height = (wanted.width, wanted.height) if wanted.width else own_size(model)
    box = crop.around(mask, wanted.mask_padding, (width, height) if width and height else first.size)
    if not (width and height):
        width, height = (_near(end - start, multiple) for start, end in zip(box[:2], box[2:], strict=True))
    size = (width, height)
    part = first.crop(box).resize(size, Image.Resampling.LANCZOS)
    masked = mask.crop(box).resize(size, Image.Resampling.NEAREST)
    return Canvas(width, height, [part, *sources[1:]], masked, (first, mask), box)


def own_size(model: Loaded) -> tuple[int | None, int | None]:
    """The size in the model file or the signature, else the denoiser's: one side or (height, width) of latents."""
    if model.config.width:
        return model.config.width, model.config.height
    pipeline = model.pipeline
    signature = [signature_default(pipeline, side) for side in ("width", "height")]
    if all(isinstance(side, int) for side in signature):
        return signature[0], signature[1]
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    latents: Any = getattr(pipeline, "default_sample_size", None)
    latents = latents or getattr(denoiser, "config", {}).get("sample_size")
    factor = getattr(pipeline, "vae_scale_factor", 1)
    match latents:
        case int(side):
            return side * factor, side * factor
        case [int(height), int(width)]:
            return width * factor, height * factor
    return None, None


def _enlarged(model: Loaded, factor: int, multiple: int, wanted: Generation, sources: list[Image.Image]) -> Canvas:
    """The unscaled source. Raises InvalidRequest if the pipeline would resize it, or for another requested size."""
    (source,) = sources
    if source.width % multiple or source.height % multiple:
        raise InvalidRequest(
            f"the picture is {_size(source)}: {model.config.name} upscales pictures whose sides are multiples of "
            f"{multiple}; the nearest size is {_near(source.width, multiple)}x{_near(source.height, multiple)}",
            param="image",
        )
    width, height = source.width * factor, source.height * factor
    if wanted.width and (wanted.width, wanted.height) != (width, height):
        raise InvalidRequest(
            f"size {wanted.width}x{wanted.height}: {model.config.name} enlarges {factor} times; "
            f"a picture of {_size(source)} becomes {width}x{height}. Leave the size out.",
            param="size",
        )
    return Canvas(width, height, sources, None)


def arguments(model: Loaded, pipeline: Any, asked: Generation, wanted: Generation, canvas: Canvas) -> dict[str, Any]:
    """The arguments for this class. Raises InvalidRequest if it does not take one that was requested."""
    name, parameters = type(pipeline).__name__, parameters_of(pipeline)
    values = {
        "prompt": (wanted.prompt, asked.prompt or None),
        "negative_prompt": (wanted.negative_prompt, asked.negative_prompt),
        "num_inference_steps": (wanted.steps, asked.steps),
        "guidance_scale": (wanted.guidance_scale, asked.guidance_scale),
        "clip_skip": (wanted.clip_skip, asked.clip_skip),
        "strength": (_strength(wanted, parameters), asked.strength),
        # The source picture already has the requested size.
        "width": (canvas.width, None if canvas.sources else asked.width),
        "height": (canvas.height, None if canvas.sources else asked.height),
        "image": (canvas.image, canvas.image),
        "mask_image": (canvas.mask, canvas.mask),
    }
    for argument, (_, requested) in values.items():
        if requested is not None and argument not in parameters:
            raise InvalidRequest(
                f"{argument}: {model.config.name} ({name}) does not take it. It takes: {', '.join(parameters)}",
                param="size" if argument in ("width", "height") else argument,
            )
    _refuse_unheard_negative(model, parameters, asked)
    _refuse_deep_clip_skip(model, pipeline, asked)
    unknown = [option for option in model.config.options if option not in parameters]
    if unknown:
        raise InvalidRequest(
            f"options in {model.config.file}: {', '.join(unknown)} is not an argument of {name}. "
            f"It takes: {', '.join(parameters)}",
            param="options",
        )
    taken = {argument: value for argument, (value, _) in values.items() if value is not None and argument in parameters}
    by_request = {argument for argument, (_, requested) in values.items() if requested is not None}
    if _steps_of_quality(model, pipeline, asked.quality):
        by_request.add("num_inference_steps")
    return taken | {
        option: value
        for option, value in model.config.options.items()
        if option not in by_request or model.config.locks(option)
    }


def _refuse_deep_clip_skip(model: Loaded, pipeline: Any, asked: Generation) -> None:
    layers = encoder_layers(pipeline)
    if asked.clip_skip is not None and layers is not None and asked.clip_skip > layers:
        raise InvalidRequest(
            f"clip_skip {asked.clip_skip}: the text encoder of {model.config.name} has {layers} layers; "
            f"0 to {layers} are valid",
            param="clip_skip",
        )


def _strength(wanted: Generation, parameters: Mapping[str, inspect.Parameter]) -> float | None:
    """Strength for at least one denoising step: diffusers runs int(steps * strength). None: the class's default."""
    own = parameters["strength"].default if "strength" in parameters else None
    strength = own if wanted.strength is None else wanted.strength
    if not isinstance(strength, int | float) or not wanted.steps:
        return wanted.strength
    least = (1 + 1e-9) / wanted.steps
    if wanted.strength is None and strength >= least:
        return None
    return min(1.0, max(strength, least))


def _refuse_unheard_negative(model: Loaded, parameters: Mapping[str, Any], asked: Generation) -> None:
    # Distilled models accept a negative prompt but ignore it unless "true" guidance is on.
    true_cfg = parameters.get("true_cfg_scale")
    if asked.negative_prompt and true_cfg is not None:
        scale = model.config.options.get("true_cfg_scale", true_cfg.default)
        if not scale or scale <= 1:
            raise InvalidRequest(
                f"negative_prompt: {model.config.name} uses it only with true_cfg_scale above 1. "
                f"Add `true_cfg_scale:4` to `options` in {model.config.file}, or leave it out.",
                param="negative_prompt",
            )


def size_multiple(pipeline: Any) -> int:
    """Both sides of a picture must be multiples of this, in pixels."""
    processor = getattr(pipeline, "image_processor", None)
    factor = getattr(getattr(processor, "config", None), "vae_scale_factor", None)
    return int(factor or getattr(pipeline, "vae_scale_factor", None) or 8)


def _near(side: int, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def _flat(image: Image.Image) -> Image.Image:
    """Convert to RGB on white, as a browser shows it on a white page."""
    if image.mode == "RGBA":
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")

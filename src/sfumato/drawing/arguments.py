"""The arguments of a pipeline call: from the request, then the model file, then the class's own defaults."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, ImageOps

from sfumato.checkpoints import class_reading, clip_rules, few_steps, file_values
from sfumato.checkpoints.static_capabilities import LATENT_SIDES
from sfumato.config.model import REQUEST_DEFAULTS
from sfumato.core import QUALITIES, Generation, SourceClip
from sfumato.drawing import crop, picture_arguments, preprocessors
from sfumato.errors import InvalidRequest
from sfumato.formats import VIDEO, kind_of
from sfumato.models.load import Loaded, token_limit
from sfumato.pictures import images
from sfumato.pictures.fitting import near, of_source
from sfumato.pipelines import request_fields
from sfumato.pipelines.capabilities import MULTIPLES, parameters_of, upscaler
from sfumato.pipelines.inputs import LAST, MOVING, check_sides
from sfumato.sampling import PARAMETERS, Parameter, Sampling, merged

SAMPLED = frozenset(parameter.argument for parameter in PARAMETERS if parameter.argument)
"""Arguments of the call that `Sampling` has; the file's `options` for them are defaults like its other keys."""

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
    kept: crop.Box | None = None
    """The area of the drawn picture that is the result; None: all of it."""
    controls: tuple[Image.Image, ...] = ()
    """Control pictures; RGB, at this size."""
    clip: tuple[Image.Image, ...] = ()
    """The frames of the source clip; RGB, at this size."""

    @property
    def sized(self) -> bool:
        """Whether a picture has the result's size already, so that a class need not be told it."""
        return bool(self.sources or self.controls or self.clip)


def fill(model: Loaded, pipeline: Any, generation: Generation) -> Generation:
    """Fill in what the request leaves open, from the model file and the seed page; class defaults stay None."""
    of_quality = Sampling(steps=_steps_of_quality(model, pipeline, generation.quality))
    of_file = _of_file(model, pipeline, pictures=bool(generation.images or generation.controls or generation.clip))
    kind = kind_of(generation.format)
    of_file = replace(of_file, **{each.name: None for each in PARAMETERS if kind not in each.of})
    # A locked parameter without a value in the file is the pipeline class's own.
    locked = {each.name: of_file[each] for each in PARAMETERS if model.config.locks(each.argument or "")}
    return replace(generation, sampling=replace(merged(generation.sampling, of_quality, of_file), **locked))


def defaults(model: Loaded, pipeline: Any) -> Sampling:
    """Defaults for requests, including the class's own; None: it has no such argument, or no default of that type."""
    file = _of_file(model, pipeline)

    def default(parameter: Parameter) -> Any:
        argument = parameter.argument
        if argument is None or parameter.source:  # of the class that takes a picture
            return model.config.sampling[parameter]
        if argument not in parameters_of(pipeline):
            return None
        value = signature_default(pipeline, argument) if file[parameter] is None else file[parameter]
        if parameter.kind is float and isinstance(value, int):
            return float(value)
        return value if isinstance(value, parameter.kind) else None

    return Sampling(**{parameter.name: default(parameter) for parameter in PARAMETERS})


def signature_default(pipeline: Any, argument: str) -> Any:
    """The class's own default for an argument of its call; None if it has none."""
    parameter = parameters_of(pipeline).get(argument)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def _has_page_defaults(pipeline: Any) -> bool:
    return bool(PAGE_CLASSES.match(type(pipeline).__name__))


def _of_file(model: Loaded, pipeline: Any, *, pictures: bool = False) -> Sampling:
    """The model file's defaults, then the seed page's, that apply to a request with or without `pictures`."""
    config = model.config
    options: dict[str, Any] = {each.name: config.options.get(each.argument) for each in PARAMETERS if each.argument}
    page = REQUEST_DEFAULTS if _has_page_defaults(pipeline) else Sampling()
    chosen = merged(
        Sampling(**options),
        config.sampling,
        _of_few_steps(model, pipeline),
        page,
        Sampling(max_sequence_length=token_limit(config, model.pipeline)),
    )

    def applies(parameter: Parameter) -> bool:
        return not (parameter.side if pictures else parameter.source)  # a source picture brings its size

    return Sampling(**{parameter.name: chosen[parameter] for parameter in PARAMETERS if applies(parameter)})


def _of_few_steps(model: Loaded, pipeline: Any) -> Sampling:
    """Of a model that was distilled to a few steps; else nothing."""
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    scheduler, config = type(getattr(model.pipeline, "scheduler", None)).__name__, getattr(pipeline, "config", {})
    values = few_steps.of(
        type(pipeline).__name__, scheduler, getattr(denoiser, "config", {}), config, model.config.label
    )
    taken = parameters_of(pipeline)
    return Sampling(
        **{
            each.name: values[each.argument]
            for each in PARAMETERS
            if each.argument and each.argument in values and each.argument in taken
        }
    )


def _steps_of_quality(model: Loaded, pipeline: Any, quality: str | None) -> int | None:
    """The file's number for this quality, else a multiple of the default; None if requests may not set the steps."""
    if not quality or not model.config.enables("num_inference_steps"):
        return None
    if "num_inference_steps" not in parameters_of(pipeline):
        return None
    default = defaults(model, pipeline).steps
    of_file = dict(model.config.quality_steps).get(quality)
    return of_file or (default and max(1, round(default * QUALITIES[quality])))


def canvas(model: Loaded, pipeline: Any, filled: Generation) -> Canvas:
    """Sources and mask at the requested size, else the source's. Raises InvalidRequest for what is not possible."""
    canvas = _canvas(model, pipeline, filled)
    if canvas.controls and not (canvas.width and canvas.height):
        multiple = size_multiple(pipeline)
        width, height = (near(side, multiple) for side in canvas.controls[0].size)
        canvas = replace(canvas, width=width, height=height)
    if canvas.controls:
        fitted = tuple(_controls(canvas))
        canvas = replace(canvas, controls=preprocessors.applied(filled.controls, fitted, model))
    if not (filled.limits and canvas.width and canvas.height and (canvas.sized or canvas.kept)):
        return canvas
    breach = filled.limits.violation(canvas.width, canvas.height)
    if breach and filled.sampling.size:
        width, height = filled.sampling.size
        raise InvalidRequest(
            f"size: {width}x{height} is drawn at {canvas.width}x{canvas.height}; {breach}. Send a smaller size.",
            param="size",
        )
    if breach:
        size = _size((*canvas.sources, *canvas.controls, *canvas.clip)[0])
        raise InvalidRequest(
            f"image: {size} would become {canvas.width}x{canvas.height}; {breach}. Send a size, or a smaller picture.",
            param="image",
        )
    return canvas


def _canvas(model: Loaded, pipeline: Any, filled: Generation) -> Canvas:
    width, height = filled.sampling.width, filled.sampling.height
    multiple = size_multiple(pipeline)
    if width and height and not filled.crop:
        check_sides(model.config.name, width, height, multiple)
    sources = [images.on_white(images.decoded(png)) for png in filled.images]
    controls = tuple(images.on_white(images.decoded(png)) for png in picture_arguments.encoded(filled))
    if filled.clip:
        return _moving(model, filled, filled.clip, (width, height), multiple)
    if not sources:
        plain = _cropped((width, height), multiple) if width and height else Canvas(width, height, [], None)
        return replace(plain, controls=controls)
    mask = images.decoded(filled.mask).convert("L") if filled.mask else None
    if larger := upscaler(pipeline):
        return _enlarged(model, larger.factor, larger.multiple, filled, sources)
    if mask is not None and mask.size != sources[0].size:
        raise InvalidRequest(
            f"the mask is {_size(mask)}, the picture {_size(sources[0])}: both must have the same size",
            param="mask",
        )
    if mask is not None and filled.mask_padding is not None:
        area = _masked_area(model, filled, sources, mask, multiple)
        whole = (control.resize(mask.size, Image.Resampling.LANCZOS) for control in controls)
        return replace(area, controls=tuple(control.crop(area.box) for control in whole))
    if not (width and height):
        width, height = sources[0].size if filled.crop else _of_source(model, filled, sources[0], multiple)
    if mask is not None and not filled.crop and not filled.sampling.size and (width, height) != sources[0].size:
        # Stretched slightly for the model, then pasted into the original: outside the mask nothing changes.
        size, first = (width, height), sources[0]
        stretched = [source.resize(size, Image.Resampling.LANCZOS) for source in sources[:1]] + sources[1:]
        masked = mask.resize(size, Image.Resampling.NEAREST)
        return Canvas(width, height, stretched, masked, (first, mask), controls=controls)
    if len(sources) == 1 or mask is not None:
        sources = [_fit(sources[0], width, height), *sources[1:]]
    elif class_reading.of_pipeline(pipeline).of(LAST):
        sources = [_fit(source, width, height) for source in sources]  # frames of one clip
    mask = mask and ImageOps.fit(mask, (width, height), Image.Resampling.NEAREST)
    drawn = _cropped((width, height), multiple, sources, mask) if filled.crop else Canvas(width, height, sources, mask)
    return replace(drawn, controls=controls)


def _of_source(model: Loaded, filled: Generation, source: Image.Image, multiple: int) -> tuple[int, int]:
    """The size of a result that says none."""
    return of_source(source.size, own_size(model) if kind_of(filled.format) == VIDEO else (None, None), multiple)


def _moving(
    model: Loaded, filled: Generation, clip: SourceClip, size: tuple[int | None, int | None], multiple: int
) -> Canvas:
    """The frames of a source clip that are drawn from; they have the size already, if it was known when they were
    decoded."""
    width, height = size
    if not (width and height):
        width, height = of_source(clip.size, own_size(model), multiple)
    each = clip.width * clip.height * 3
    frames = memoryview(clip.frames)[: each * (filled.sampling.num_frames or len(clip))]
    shown = (
        Image.frombytes("RGB", (clip.width, clip.height), frames[start : start + each])
        for start in range(0, len(frames), each)
    )
    fitted = (frame if frame.size == (width, height) else _fit(frame, width, height) for frame in shown)
    return Canvas(width, height, [], None, clip=tuple(fitted))


def _controls(canvas: Canvas) -> Iterator[Image.Image]:
    """Its control pictures at its size, which must be set."""
    assert canvas.width
    assert canvas.height
    for control in canvas.controls:
        if canvas.kept is None:
            yield _fit(control, canvas.width, canvas.height)
        else:
            left, top, right, bottom = canvas.kept
            fitted = _fit(control, right - left, bottom - top)
            yield crop.extended(fitted, canvas.kept, (canvas.width, canvas.height))


def _cropped(
    size: tuple[int, int], multiple: int, sources: Sequence[Image.Image] = (), mask: Image.Image | None = None
) -> Canvas:
    """The next size that the model draws, with picture and mask (both of `size`) in its middle."""
    drawn = crop.multiple_of(size, multiple)
    if drawn == size:
        return Canvas(*size, list(sources), mask)
    box = crop.centred(size, drawn)
    # Several pictures are references, of any size.
    extended = [crop.extended(source, box, drawn) if source.size == size else source for source in sources]
    return Canvas(*drawn, extended, mask and crop.extended(mask, box, drawn), kept=box)


def _masked_area(
    model: Loaded, filled: Generation, sources: list[Image.Image], mask: Image.Image, multiple: int
) -> Canvas:
    """The area around the mask, at the requested size, the model's own, or unscaled."""
    assert filled.mask_padding is not None
    first = sources[0]
    width, height = filled.sampling.size or own_size(model)
    if width and height:
        width, height = crop.multiple_of((width, height), multiple)
    box = crop.around(mask, filled.mask_padding, (width, height) if width and height else first.size)
    if not (width and height):
        width, height = (near(end - start, multiple) for start, end in zip(box[:2], box[2:], strict=True))
    size = (width, height)
    part = first.crop(box).resize(size, Image.Resampling.LANCZOS)
    masked = mask.crop(box).resize(size, Image.Resampling.NEAREST)
    return Canvas(width, height, [part, *sources[1:]], masked, (first, mask), box)


def own_size(model: Loaded) -> tuple[int | None, int | None]:
    """The size in the model file or the signature, else the denoiser's, in latents: both sides, one, or a pair."""
    if model.config.sampling.size:
        return model.config.sampling.size
    pipeline = model.pipeline
    signature = [
        signature_default(pipeline, side) or getattr(pipeline, f"default_{side}", None) for side in ("width", "height")
    ]
    if all(isinstance(side, int) for side in signature):
        return signature[0], signature[1]
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    settings: Any = getattr(denoiser, "config", {})
    if all(isinstance(settings.get(side), int) for side in LATENT_SIDES):  # CogVideoX, Allegro
        width, height = (settings[side] * getattr(pipeline, "vae_scale_factor_spatial", 1) for side in LATENT_SIDES)
        return width, height
    latents: Any = getattr(pipeline, "default_sample_size", None) or settings.get("sample_size")
    factor = getattr(pipeline, "vae_scale_factor", 1)
    match latents:
        case int(side):
            return side * factor, side * factor
        case [int(height), int(width)]:
            return width * factor, height * factor
    return None, None


def _enlarged(model: Loaded, factor: int, multiple: int, filled: Generation, sources: list[Image.Image]) -> Canvas:
    """The unscaled source. Raises InvalidRequest if the pipeline would resize it, or for another requested size."""
    (source,) = sources
    width, height = source.width * factor, source.height * factor
    size = filled.sampling.size
    if size and size != (width, height):
        raise InvalidRequest(
            f"size {size[0]}x{size[1]}: {model.config.name} enlarges {factor} times; "
            f"a picture of {_size(source)} becomes {width}x{height}. Leave the size out.",
            param="size",
        )
    drawn = crop.multiple_of(source.size, multiple)
    if drawn == source.size:
        return Canvas(width, height, [source], None)
    if not filled.crop:
        raise InvalidRequest(
            f"the picture is {_size(source)}: {model.config.name} upscales pictures whose sides are multiples of "
            f"{multiple}; the nearest size is {near(source.width, multiple)}x{near(source.height, multiple)}",
            param="image",
        )
    box = crop.centred(source.size, drawn)
    left, top, right, bottom = (side * factor for side in box)
    larger = crop.extended(source, box, drawn)
    return Canvas(drawn[0] * factor, drawn[1] * factor, [larger], None, kept=(left, top, right, bottom))


def arguments(
    model: Loaded, pipeline: Any, generation: Generation, filled: Generation, canvas: Canvas
) -> dict[str, Any]:
    """The arguments for this class. `generation` is what is usable of the request, `filled` has the defaults, too.

    Raises InvalidRequest if the class does not take the prompt or the pictures.
    """
    name, parameters = type(pipeline).__name__, parameters_of(pipeline)
    used = replace(
        filled.sampling, strength=_strength(filled.sampling, parameters), width=canvas.width, height=canvas.height
    )
    values = {
        "prompt": (filled.prompt, None),
        **{each.argument: (used[each], generation.sampling[each]) for each in PARAMETERS if each.argument},
        **{
            name: (value, value) for name, value in picture_arguments.of_canvas(model, pipeline, filled, canvas).items()
        },
    }
    for argument, (_, requested) in values.items():
        if requested is not None and argument not in SAMPLED and argument not in parameters:
            raise InvalidRequest(
                f"{argument}: {model.config.name} ({name}) does not take it. Leave it out. "
                f"It takes: {', '.join(request_fields.of(pipeline))}",
                param=argument,
            )
    if not model.net_digests:  # else the class is the request's choice
        own = parameters_of(model.pipeline)  # its siblings for other tasks may have fewer
        file_values.refuse_options(model.config, type(model.pipeline).__name__, {**own, **parameters})
    kwargs = {
        argument: value for argument, (value, _) in values.items() if value is not None and argument in parameters
    }
    by_request = {argument for argument, (_, requested) in values.items() if requested is not None}
    kwargs |= _by_step(parameters, kwargs)
    return kwargs | {
        option: value
        for option, value in model.config.options.items()
        if option in parameters
        if option not in SAMPLED and (option not in by_request or model.config.locks(option))
    }


def _by_step(parameters: Mapping[str, inspect.Parameter], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments whose default has a number for each of the default steps, for as many steps as there are.

    Classes refuse one of another length, and one of guidance beside a single scale.
    """
    steps = parameters.get("num_inference_steps")
    count = kwargs.get("num_inference_steps", steps.default if steps else None)
    made: dict[str, Any] = {}
    for name, parameter in parameters.items():
        numbers = parameter.default
        several = isinstance(numbers, tuple | list) and all(isinstance(number, float) for number in numbers)
        if not (steps and several and len(numbers) == steps.default):
            continue
        if name.startswith("guidance") and kwargs.get("guidance_scale") is not None:
            made[name] = None
        elif count != len(numbers):
            made[name] = [numbers[step * len(numbers) // count] for step in range(count)]
    return made


def unused_prompt(model: Loaded, pipeline: Any, filled: Generation, kwargs: Mapping[str, Any]) -> list[str]:
    """A warning for a prompt that this class does not take; every request has one."""
    if not filled.prompt or {"prompt", "class_labels"} & kwargs.keys():
        return []
    return [f"prompt: it was not used, {model.config.name} ({type(pipeline).__name__}) takes none"]


def _strength(sampling: Sampling, parameters: Mapping[str, inspect.Parameter]) -> float | None:
    """Strength for at least one denoising step: diffusers runs int(steps * strength). None: the class's default."""
    default = parameters["strength"].default if "strength" in parameters else None
    strength = default if sampling.strength is None else sampling.strength
    if not isinstance(strength, int | float) or not sampling.steps:
        return sampling.strength
    minimum = (1 + 1e-9) / sampling.steps
    if sampling.strength is None and strength >= minimum:
        return None
    return min(1.0, max(strength, minimum))


def size_multiple(pipeline: Any) -> int:
    """Both sides of a picture must be multiples of this, in pixels."""
    if multiple := MULTIPLES.get(type(pipeline).__name__):
        return multiple
    if class_reading.of_pipeline(pipeline).output == MOVING:
        return clip_rules.side_multiple(type(pipeline).__name__, _over(pipeline)) or 8
    processor = getattr(pipeline, "image_processor", None)
    factor = getattr(getattr(processor, "config", None), "vae_scale_factor", None)
    return int(factor or getattr(pipeline, "vae_scale_factor", None) or 8)


def _over(pipeline: Any) -> Callable[[ast.expr], Any]:
    """The value of `self.NAME`, or of its product with a number; None for other expressions."""

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=number):
                return number
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                return getattr(pipeline, name, None)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                sides = value(left), value(right)
                return sides[0] * sides[1] if all(isinstance(side, int) for side in sides) else None
        return None

    return value


def _fit(image: Image.Image, width: int, height: int) -> Image.Image:
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"

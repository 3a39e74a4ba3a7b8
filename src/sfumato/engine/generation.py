"""One picture: the right pipeline of the model, its arguments by signature, and the recipe of what was done."""

from __future__ import annotations

import functools
import inspect
import math
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import diffusers
import torch
from PIL import Image, ImageOps

from sfumato import __version__, pictures, recipe, schedulers
from sfumato.config import DEFAULTS
from sfumato.core import Done, Generation, Recipe
from sfumato.engine import sampler, standin
from sfumato.engine.batching import is_out_of_memory
from sfumato.engine.load import Loaded, encoder_layers
from sfumato.errors import ContentFiltered, DrawError, InvalidRequest, SfumatoError

OnStep: TypeAlias = Callable[[int, int], None]
"""Called after each denoising step with (steps done, steps in all); may raise to stop the run."""

SIBLINGS = {"image": "AutoPipelineForImage2Image", "mask": "AutoPipelineForInpainting"}
"""By name: importing them imports every pipeline there is, which takes seconds."""

NEEDS_PICTURE = re.compile(r"Img2Img|Inpaint|Depth2Img|Upscale|InstructPix2Pix|ControlNet|Edit")
"""Names of classes that draw nothing without a source picture, whatever their signature's defaults say."""

MANY_PICTURES = re.compile(r"Flux2|EditPlus|OmniGen|Kontext(?!Inpaint)")
"""Names of classes that take several reference pictures for one result; for others a list is a batch."""

DEFAULT_THREADS = torch.get_num_threads()

PAGE_CLASSES = re.compile(r"StableDiffusion(?!3)")
"""The seed page's defaults (30 steps, guidance 8) are Stable Diffusion's; other classes keep their own."""


class Stopped(BaseException):
    """Raised through a pipeline by `on_step` to stop it; no pipeline code catches it."""


def draw(model: Loaded, generation: Generation, on_step: OnStep) -> Done:
    """Draw one picture.

    Raises InvalidRequest for what this model cannot do, ContentFiltered when its safety checker fires,
    DrawError when the pipeline raises or its result is not finite.
    """
    torch.set_num_threads(model.config.threads or DEFAULT_THREADS)
    # 1. the pipeline for this task, as a view: it shares the modules and nothing that a run changes
    task = "mask" if generation.mask else "image" if generation.images else "text"
    pipeline = standin.view(_for_task(model, task))
    parameters = inspect.signature(type(pipeline).__call__).parameters
    # 2. what the request leaves open comes from the model file
    wanted = _filled(model, generation, type(pipeline).__name__)
    # 3. source pictures at the size asked for
    width, height, sources, mask = _pictures(model, pipeline, wanted)
    # 4. the arguments this class takes; asked-for ones that it does not take are an error
    arguments = _arguments(pipeline, parameters, wanted, generation, model)
    arguments |= _sized(pipeline, parameters, width, height, sources, mask, generation)
    arguments |= _extra(model, parameters)
    # 5. run
    choice = _choice(model, pipeline, wanted)
    scheduler = sampler.make(pipeline, choice, wanted.seed)
    if scheduler is not None:
        pipeline.scheduler = _observed(scheduler, on_step)
    image = _run(pipeline, arguments, parameters, wanted.seed)
    # 6. outside the mask every pixel stays as it was
    if mask is not None and image.size == sources[0].size:
        image = Image.composite(image, sources[0].convert(image.mode), mask)
    # 7. the picture with its recipe
    made = _recipe(model, pipeline, wanted, image, parameters, arguments, choice)
    return Done(recipe.encode(image, made), made)


def _for_task(model: Loaded, task: str) -> Any:
    own = inspect.signature(type(model.pipeline).__call__).parameters
    name = type(model.pipeline).__name__
    if task == "text":
        image = own.get("image")
        if image is not None and (image.default is inspect.Parameter.empty or NEEDS_PICTURE.search(name)):
            raise InvalidRequest(
                f"{model.config.name} draws from a picture ({name}): send one as `image`", param="image"
            )
        return model.pipeline
    wanted = {"image": "image", "mask": "mask_image"}[task]
    if wanted in own and (task == "mask" or "mask_image" not in own):
        return model.pipeline
    if task not in model.siblings:
        try:
            sibling = getattr(diffusers, SIBLINGS[task]).from_pipe(model.pipeline)
        except ValueError as error:
            raise InvalidRequest(
                f"{model.config.name}: {name} takes no {wanted}, and diffusers has no pipeline "
                f"on the same weights that does ({error})",
                param=task,
            ) from None
        sibling.set_progress_bar_config(disable=True)
        model.siblings[task] = sibling
    return model.siblings[task]


def _filled(model: Loaded, generation: Generation, class_name: str) -> Generation:
    config = model.config
    paged = bool(PAGE_CLASSES.match(class_name))

    def first(*values: Any) -> Any:
        return next((value for value in values if value is not None), None)

    def enabled(name: str, value: Any) -> Any:
        return value if config.enables(name) else None

    return replace(
        generation,
        steps=first(
            generation.steps,
            enabled("num_inference_steps", first(config.steps, DEFAULTS["step"] if paged else None)),
        ),
        guidance_scale=first(
            generation.guidance_scale, config.cfg_scale, float(DEFAULTS["cfg_scale"]) if paged else None
        ),
        negative_prompt=first(generation.negative_prompt, enabled("negative_prompt", config.negative_prompt)),
        clip_skip=first(generation.clip_skip, enabled("clip_skip", config.clip_skip)),
        strength=first(generation.strength, config.strength) if generation.images else generation.strength,
        width=first(generation.width, None if generation.images else config.width),
        height=first(generation.height, None if generation.images else config.height),
    )


def _choice(model: Loaded, pipeline: Any, wanted: Generation) -> schedulers.Choice | None:
    if wanted.scheduler:
        choice = schedulers.parse(wanted.scheduler)
    elif model.config.scheduler_type:
        choice = schedulers.parse(model.config.scheduler_type, model.config.schedule)
    else:
        return None
    sampler.check(pipeline, choice, wanted.steps)
    return choice


def _pictures(
    model: Loaded, pipeline: Any, wanted: Generation
) -> tuple[int | None, int | None, list[Image.Image], Image.Image | None]:
    """Width, height, sources and mask as the pipeline gets them: upright RGB at the size of the result."""
    width, height = wanted.width, wanted.height
    multiple = size_multiple(pipeline)
    if width and height and (width % multiple or height % multiple):
        near = f"{_near(width, multiple)}x{_near(height, multiple)}"
        raise InvalidRequest(
            f"size {width}x{height}: {model.config.name} draws sizes that are multiples of {multiple}; "
            f"the nearest is {near}",
            param="size",
        )
    sources = [_flat(pictures.decoded(png)) for png in wanted.images]
    if not sources:
        return width, height, [], None
    if len(sources) > 1 and not MANY_PICTURES.search(type(pipeline).__name__):
        raise InvalidRequest(
            f"{model.config.name} ({type(pipeline).__name__}) takes one picture, got {len(sources)}",
            param="image",
        )
    mask = pictures.decoded(wanted.mask).convert("L") if wanted.mask else None
    if mask is not None and mask.size != sources[0].size:
        raise InvalidRequest(
            f"the mask is {_size(mask)}, the picture {_size(sources[0])}: both need the same size",
            param="mask",
        )
    if not (width and height):
        width, height = (_near(side, multiple) for side in sources[0].size)
    fit = functools.partial(ImageOps.fit, size=(width, height), method=Image.Resampling.LANCZOS)
    if len(sources) == 1:
        sources = [fit(source) for source in sources]
    return width, height, sources, mask and fit(mask, method=Image.Resampling.NEAREST)


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
    """RGB; what was transparent becomes white, as a browser on a white page shows it."""
    if image.mode == "RGBA":
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def _arguments(
    pipeline: Any,
    parameters: Mapping[str, inspect.Parameter],
    wanted: Generation,
    asked: Generation,
    model: Loaded,
) -> dict[str, Any]:
    values = {
        "prompt": (wanted.prompt, asked.prompt or None),
        "negative_prompt": (wanted.negative_prompt, asked.negative_prompt),
        "num_inference_steps": (wanted.steps, asked.steps),
        "guidance_scale": (wanted.guidance_scale, asked.guidance_scale),
        "clip_skip": (wanted.clip_skip, asked.clip_skip),
        "strength": (_strength(wanted), asked.strength),
    }
    for name, (_, requested) in values.items():
        if requested is not None and name not in parameters:
            raise InvalidRequest(
                f"{name}: {model.config.name} ({type(pipeline).__name__}) does not take it. "
                f"It takes: {', '.join(_taken(parameters))}",
                param=name,
            )
    arguments = {name: value for name, (value, _) in values.items() if value is not None and name in parameters}
    _refuse_unheard_negative(model, parameters, asked)
    layers = encoder_layers(pipeline)
    if asked.clip_skip is not None and layers is not None and asked.clip_skip > layers:
        raise InvalidRequest(
            f"clip_skip {asked.clip_skip}: the text encoder of {model.config.name} has {layers} layers; "
            f"0 to {layers} are valid",
            param="clip_skip",
        )
    return arguments


def _strength(wanted: Generation) -> float | None:
    """At least one denoising step is run: diffusers runs int(steps * strength) of them."""
    if wanted.strength is None or not wanted.steps:
        return wanted.strength
    least = (1 + 1e-9) / wanted.steps
    return min(1.0, max(wanted.strength, least))


def _refuse_unheard_negative(model: Loaded, parameters: Mapping[str, Any], asked: Generation) -> None:
    # Distilled models take a negative prompt and ignore it unless "true" guidance is on.
    true_cfg = parameters.get("true_cfg_scale")
    if asked.negative_prompt and true_cfg is not None:
        scale = model.config.options.get("true_cfg_scale", true_cfg.default)
        if not scale or scale <= 1:
            raise InvalidRequest(
                f"negative_prompt: {model.config.name} hears it only with true_cfg_scale above 1. "
                f"Add `true_cfg_scale:4` to `options` in {model.config.file}, or leave it out.",
                param="negative_prompt",
            )


def _sized(
    pipeline: Any,
    parameters: Mapping[str, Any],
    width: int | None,
    height: int | None,
    sources: list[Image.Image],
    mask: Image.Image | None,
    asked: Generation,
) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if width and height and "width" in parameters and "height" in parameters:
        arguments |= {"width": width, "height": height}
    elif asked.width and not sources and "width" not in parameters:
        raise InvalidRequest(
            f"size: {type(pipeline).__name__} draws one size only. Leave size out or send auto.", param="size"
        )
    if sources:
        arguments["image"] = sources[0] if len(sources) == 1 else sources
    if mask is not None:
        arguments["mask_image"] = mask
    return arguments


def _extra(model: Loaded, parameters: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [name for name in model.config.options if name not in parameters]
    if unknown:
        raise InvalidRequest(
            f"options in {model.config.file}: {', '.join(unknown)} is not an argument of this pipeline. "
            f"It takes: {', '.join(_taken(parameters))}",
            param="options",
        )
    return dict(model.config.options)


def _taken(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    return [name for name, p in parameters.items() if name != "self" and p.kind is not p.VAR_KEYWORD]


def _observed(scheduler: Any, on_step: OnStep) -> Any:
    """Report each `scheduler.step`: every denoising loop of diffusers calls it, with or without a callback."""
    step = scheduler.step
    done = total = 0

    @functools.wraps(step)  # pipelines read its signature to learn what it takes
    def observed(model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal done, total
        if done == 0:
            total = _remaining(scheduler.timesteps, timestep)
        result = step(model_output, timestep, *args, **kwargs)
        done += 1
        on_step(done, max(done, total))
        if done >= total:
            _refuse_nan(result)
        return result

    scheduler.step = observed
    return scheduler


def _remaining(timesteps: Any, first: Any) -> int:
    # Image-to-image starts in the middle of the schedule; second-order solvers name a time step twice
    # and start at its second entry.
    at = (torch.as_tensor(timesteps).cpu() == torch.as_tensor(first).cpu()).nonzero()
    return len(timesteps) - (int(at[-1]) if len(at) else 0)


def _refuse_nan(result: Any) -> None:
    latents = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)
    if isinstance(latents, torch.Tensor) and not bool(torch.isfinite(latents).all()):
        raise DrawError(
            "the model drew NaN: its numbers left the range of its dtype. "
            "Set `dtype: bf16` or `dtype: fp32` in the model file, or lower the guidance scale."
        )


def _run(pipeline: Any, arguments: dict[str, Any], parameters: Mapping[str, Any], seed: int) -> Image.Image:
    if "generator" in parameters:
        # On the CPU always: the same seed gives the same noise on every device.
        arguments = {**arguments, "generator": torch.Generator("cpu").manual_seed(seed)}
    torch.manual_seed(seed)  # for the few pipelines that draw noise without their generator
    try:
        output = pipeline(**arguments)
    except SfumatoError:
        raise
    except Exception as error:  # whatever a pipeline raises, the caller gets words
        if is_out_of_memory(error):
            raise
        if any(frame.name == "check_inputs" for frame in traceback.extract_tb(error.__traceback__)):
            raise InvalidRequest(f"{type(pipeline).__name__} refused the request: {error}") from error
        raise DrawError(f"{type(pipeline).__name__}: {type(error).__name__}: {error}") from error
    if any(getattr(output, "nsfw_content_detected", None) or ()):
        raise ContentFiltered("the model's safety checker blocked this picture; change the prompt or the seed")
    return output.images[0]  # type: ignore[no-any-return]


def _recipe(
    model: Loaded,
    pipeline: Any,
    wanted: Generation,
    image: Image.Image,
    parameters: Mapping[str, inspect.Parameter],
    arguments: Mapping[str, Any],
    choice: schedulers.Choice | None,
) -> Recipe:
    def used(name: str) -> Any:
        """What the pipeline really worked with, its own default included."""
        parameter = parameters.get(name)
        value = arguments.get(name, parameter.default if parameter else None)
        return None if isinstance(value, float) and math.isnan(value) else value

    own = getattr(model.pipeline, "scheduler", None)
    return Recipe(
        model=model.config.name,
        source=model.source,
        pipeline=type(pipeline).__name__,
        prompt=wanted.prompt,
        negative_prompt=wanted.negative_prompt,
        width=image.width,
        height=image.height,
        steps=used("num_inference_steps"),
        guidance_scale=used("guidance_scale"),
        seed=wanted.seed,
        scheduler=choice.name if choice else type(own).__name__,
        clip_skip=wanted.clip_skip,
        strength=wanted.strength if wanted.strength is not None else used("strength"),
        image_sha256=tuple(pictures.fingerprint(png) for png in wanted.images),
        mask_sha256=pictures.fingerprint(wanted.mask) if wanted.mask else None,
        device=model.device,
        dtype=model.dtype,
        versions={"sfumato": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__},
    )

"""Make one picture, clip or sound: choose the pipeline, build its arguments by signature, run it, record the recipe."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import diffusers
import torch
from PIL import Image

from sfumato import __version__, schedulers
from sfumato.batching import views
from sfumato.batching.adapted import Selection
from sfumato.batching.batcher import is_out_of_memory
from sfumato.batching.module_runner import ModuleRunner
from sfumato.checkpoints import feature_caches
from sfumato.config import at_fault
from sfumato.core import VAE_TILING, Done, Generation, Recipe
from sfumato.drawing import (
    arguments,
    clips,
    crop,
    guided,
    inputs,
    latent_sources,
    named_nets,
    outputs,
    picture_prompts,
    prompts,
    sounds,
    usable,
)
from sfumato.drawing.steps import Finite, OnStep, watch
from sfumato.errors import ContentFiltered, DrawError, InvalidRequest, SfumatoError, in_words
from sfumato.formats import WORDS, kind_of
from sfumato.models import ip_adapters
from sfumato.models.load import Loaded
from sfumato.models.release import release_frames
from sfumato.pictures import files, images
from sfumato.pictures.encoder import HERE, Encoder
from sfumato.pictures.results import Clip, Result, Sound
from sfumato.pipelines import capabilities, modular, request_scheduler, scheduler_owners, tokens
from sfumato.pipelines.tiling import can_tile
from sfumato.previews.steps import OnPreview, RunPreviews
from sfumato.runners import recorded
from sfumato.sampling import PARAMETERS, Parameter, Sampling

ARGUMENTS = {"image": "image", "mask": "mask_image"}


class RunStopped(BaseException):
    """Raised through a pipeline by `on_step` to stop it; no pipeline code catches it."""


class Drawn(NamedTuple):
    """What is in `Done`, with the file not yet written."""

    result: Result
    recipe: Recipe
    warnings: tuple[str, ...]
    tokens: int
    format: str


class Disturbed(Exception):
    """Another request left the model changed during this one: draw it again, on a freshly loaded model."""


def draw(
    model: Loaded,
    generation: Generation,
    on_step: OnStep,
    on_preview: OnPreview | None = None,
    runners: Mapping[int, ModuleRunner | None] | None = None,
    encoder: Encoder = HERE,
) -> Done:
    """As `picture`, encoded."""
    return encoded(picture(model, generation, on_step, on_preview, runners, encoder))


def picture(
    model: Loaded,
    generation: Generation,
    on_step: OnStep,
    on_preview: OnPreview | None = None,
    runners: Mapping[int, ModuleRunner | None] | None = None,
    encoder: Encoder = HERE,
) -> Drawn:
    """Draw one picture or clip; `on_preview` receives the requested previews, if the pipeline supports them.

    `runners`: what computes modules in their place, by the id of the module. `encoder`: encodes previews, and calls
    `on_preview`.

    Raises InvalidRequest for what this model cannot do, ContentFiltered if its safety checker fires,
    DrawError if the pipeline raises or its result is not finite, Disturbed if the model must be reloaded.
    """
    # 1. the pipeline for this task, as a view: it shares the modules but no state that a run changes
    capabilities.check(model.config.name, model.pipeline, generation)
    task, complete = inputs.complete(model, picture_prompts.without(model, generation))
    workflow = capabilities.TASKS["mask" if complete.mask else "image" if complete.images else "text"]
    with model.state.adapters.use(
        model.pipeline, model.device, model.config.name, generation.loras, replace_defaults=generation.replace_loras
    ) as adapters:
        # No variable refers to the view here: a stored error would keep it.
        return _draw_on_view(
            model,
            *_view(model, modular.for_task(_for_task(model, task), workflow), generation, adapters, runners, on_step),
            generation,
            complete,
            on_preview,
            encoder,
        )


def rounded(drawn: Drawn) -> Drawn:
    """The same, holding as little as its file needs. Needs no torch."""
    return Drawn(drawn.result.rounded(), *drawn[1:]) if isinstance(drawn.result, Clip) else drawn


def encoded(drawn: Drawn, wanted: Callable[[], bool] = lambda: True) -> Done:
    """The file, with its recipe inside. Needs no torch: another thread may do it.

    `wanted`: asked between the frames of a clip; Cancelled is raised when it is not.
    """
    result = replace(drawn.result, wanted=wanted) if isinstance(drawn.result, Clip) else drawn.result
    file = files.encode(result, drawn.recipe, drawn.format)
    return Done(file, drawn.recipe, drawn.warnings, drawn.tokens, drawn.format)


def _view(
    model: Loaded,
    pipeline: Any,
    generation: Generation,
    adapters: Mapping[int, Selection],
    runners: Mapping[int, ModuleRunner | None] | None,
    on_step: OnStep,
) -> tuple[Any, OnStep]:
    """A view of a pipeline with the request's adapters, and what is called after each of its steps."""
    selected, attending = ip_adapters.selections(model, adapters)
    view = views.view(pipeline, tiled=_tiled(model, generation), adapters=selected, runners=runners)
    return view, picture_prompts.paced(model, attending, on_step)


def _draw_on_view(
    model: Loaded,
    pipeline: Any,
    on_step: OnStep,
    generation: Generation,
    complete: Generation,
    on_preview: OnPreview | None,
    encoder: Encoder,
) -> Drawn:
    try:
        result = _draw(model, pipeline, generation, complete, on_step, on_preview, encoder)
    except BaseException as error:
        release_frames(error)
        if isinstance(error, Exception) and model.state.broken:
            raise Disturbed from error
        if isinstance(error, InvalidRequest):
            raise at_fault.error_of(error, model.config, at_fault.set_by(generation.sampling)) from None
        if type(error) is DrawError and model.config.cache:  # diffusers has caches that fail with some transformers
            raise feature_caches.refusal(model.config, error.message) from error
        raise
    else:
        if model.state.broken:
            raise Disturbed
        return result
    finally:
        if not_restored := views.close(pipeline):
            model.state.broken = f"a request left it changed: {'; '.join(not_restored)}"
        del pipeline  # a stored error would keep this frame


def _draw(
    model: Loaded,
    pipeline: Any,
    requested: Generation,
    generation: Generation,
    on_step: OnStep,
    on_preview: OnPreview | None,
    encoder: Encoder,
) -> Drawn:
    """`generation` is `requested` with the mask and controls that it implies."""
    # 2. the prompts; what this class can use; defaults for the rest; source pictures at the result's size
    usable.refuse_class(model, pipeline, requested)
    generation, how_read = prompts.split(model, pipeline, generation)
    generation, left_out = usable.usable(model, pipeline, generation)
    filled = sounds.settled(model, pipeline, arguments.fill(model, pipeline, generation))
    filled = clips.settled(model, pipeline, generation.sampling, filled)
    usable.refuse_defaults(model, pipeline, filled)
    canvas = arguments.canvas(model, pipeline, filled)
    clips.check_size(model, filled, canvas)
    kwargs = arguments.arguments(model, pipeline, generation, filled, canvas)
    kwargs |= clips.arguments(pipeline, filled) | sounds.arguments(pipeline, filled)
    kwargs |= picture_prompts.arguments(model, pipeline, requested) | guided.arguments(pipeline, filled.sampling)
    kwargs |= latent_sources.of_source(pipeline, generation, kwargs)
    # 3. its own scheduler
    driver = scheduler_owners.drawing_pipeline(pipeline)
    choice = usable.scheduler(driver, filled.sampling)
    if (scheduler := request_scheduler.make(driver, choice, filled.seed)) is not None:
        scheduler_owners.replace_scheduler(pipeline, scheduler)
    previews = _previews(model, driver, generation, canvas, on_preview, encoder)
    finite = watch(pipeline, kwargs, on_step, previews, interval := guided.limit(pipeline, filled.sampling))
    # 4. run
    reading = prompts.read(model, pipeline, generation, kwargs)
    result, more = _run(pipeline, reading.arguments, filled, finite)
    # 5. the requested part of it; outside the mask every pixel stays unchanged
    result = _placed(pipeline, result, canvas) if isinstance(result, Image.Image) else result
    # 6. the result with its recipe, and warnings for what differs from the request
    result_recipe = replace(
        _recipe(model, pipeline, requested, filled, result, kwargs, choice, canvas),
        weights=reading.weights,
        embeddings=reading.embeddings,
    )
    token_count, cut_off = tokens.count(pipeline, kwargs, model.config.name, *reading.texts)
    warnings = (
        *generation.notes,
        *how_read,
        *left_out,
        *reading.warnings,
        *(() if reading.embedded else cut_off),
        *more,
        *arguments.unused_prompt(model, pipeline, filled, kwargs),
        *_kept_scheduler(driver, filled.sampling),
        *_locked(model, pipeline, generation, filled.sampling),
        *_not_taken(model, pipeline, filled, kwargs),
        *_without_effect(pipeline, driver, kwargs),
        *clips.warnings(filled, result),
        *guided.warnings(interval, filled.sampling),
        *latent_sources.warnings(pipeline, generation),
    )
    return Drawn(result, result_recipe, warnings, token_count, generation.format)


def _previews(
    model: Loaded,
    driver: Any,
    generation: Generation,
    canvas: arguments.Canvas,
    on_preview: OnPreview | None,
    encoder: Encoder,
) -> RunPreviews | None:
    if not (generation.previews and on_preview):
        return None
    size = (canvas.width, canvas.height)
    return RunPreviews(driver, generation.previews, *size, on_preview, model.preview_decoder, canvas.kept, encoder)


def _placed(pipeline: Any, image: Image.Image, canvas: arguments.Canvas) -> Image.Image:
    """The drawn picture in its place: within the original outside the mask, without what was added to its size."""
    if capabilities.upscaler(pipeline) and image.size != (canvas.width, canvas.height):
        raise DrawError(
            f"{type(pipeline).__name__} drew {image.width}x{image.height}, not {canvas.width}x{canvas.height}: "
            "its weights do not belong to an upscaler of this class"
        )
    if canvas.whole and canvas.box:
        return crop.pasted(canvas.whole[0], image, canvas.whole[1], canvas.box)
    if canvas.whole:
        source, mask = canvas.whole
        return Image.composite(image.resize(source.size, Image.Resampling.LANCZOS), source.convert(image.mode), mask)
    if canvas.mask is not None and image.size == canvas.mask.size:
        image = Image.composite(image, canvas.sources[0].convert(image.mode), canvas.mask)
    return image.crop(canvas.kept) if canvas.kept else image


def _tiled(model: Loaded, generation: Generation) -> bool:
    if VAE_TILING not in generation.savings:
        return False
    if not can_tile(model.pipeline):
        raise InvalidRequest(
            f"savings: {model.config.name} ({type(model.pipeline).__name__}) has no VAE that supports tiling, "
            f"but {VAE_TILING!r} was requested; leave it out",
            param="savings",
        )
    return True


def _for_task(model: Loaded, task: str) -> Any:
    name = type(model.pipeline).__name__
    if task == inputs.OWN:
        return model.pipeline
    if task not in model.task_pipelines:
        try:
            sibling = getattr(diffusers, capabilities.AUTO_PIPELINES[task]).from_pipe(model.pipeline)
        except ValueError as error:
            raise InvalidRequest(
                f"{model.config.name}: {name} does not take {ARGUMENTS[task]}, and diffusers has no pipeline "
                f"for the same weights that does ({error})",
                param=task,
            ) from None
        sibling.set_progress_bar_config(disable=True)
        model.task_pipelines[task] = sibling
    return model.task_pipelines[task]


def _kept_scheduler(pipeline: Any, sampling: Sampling) -> tuple[str, ...]:
    """A warning if a scheduler other than the requested one was used."""
    why = request_scheduler.keeps_own(pipeline) if sampling.scheduler else ""
    name = type(pipeline.scheduler).__name__ if why else ""
    return (f"scheduler: {sampling.scheduler} was not used but the model's own ({name}): {why}",) if why else ()


def _run(pipeline: Any, kwargs: Mapping[str, Any], filled: Generation, finite: Finite) -> tuple[Result, list[str]]:
    """The result, and warnings for what came with it."""
    seed = filled.seed
    # Noise is always drawn on the CPU: the same seed gives the same noise on every device.
    noise = {"generator": torch.Generator("cpu").manual_seed(seed)}
    if "generator" not in capabilities.parameters_of(pipeline):
        noise = {}
    torch.manual_seed(seed)  # for the few pipelines that draw noise without their generator
    try:
        output = pipeline(**{**outputs.form(pipeline, kind_of(filled.format)), **kwargs}, **noise)
    except SfumatoError:
        raise
    except Exception as error:  # whatever a pipeline raises, the caller gets a readable message
        if is_out_of_memory(error):
            raise
        finite.check()  # NaN may be the cause
        if any(frame.name == "check_inputs" for frame in traceback.extract_tb(error.__traceback__)):
            named = next((name for name in kwargs if re.search(rf"\b{name}\b", str(error))), None)
            raise InvalidRequest(f"{type(pipeline).__name__} refused the request: {error}", param=named) from error
        raise DrawError(f"{type(pipeline).__name__}: {type(error).__name__}: {error}") from error
    finite.check()
    if any(getattr(output, "nsfw_content_detected", None) or ()):
        raise ContentFiltered("the model's safety checker blocked this picture; change the prompt or the seed")
    return outputs.result_of(pipeline, output, filled)


def _locked(model: Loaded, pipeline: Any, requested: Generation, filled: Sampling) -> list[str]:
    """Warnings for values of the request that the model file locks."""
    return [
        f"{each.name}: {usable.in_request(each, requested, pipeline)} was not used: {model.config.name} locks it"
        for each in PARAMETERS
        if (value := requested.sampling[each]) is not None
        and model.config.locks(each.argument or "")
        and value != filled[each]
    ]


def _not_taken(model: Loaded, pipeline: Any, filled: Generation, kwargs: Mapping[str, Any]) -> list[str]:
    """Warnings for defaults of the model file that this class does not take; a request's parameters were refused."""
    file, name, sampling = model.config.sampling, type(pipeline).__name__, filled.sampling
    kind = kind_of(filled.format)
    others = [each for each in PARAMETERS if kind not in each.of and file[each] is not None]
    told = f"of the model file has no effect on {WORDS[kind]}"
    return [f"{each.name}: {in_words(file[each])} {told}" for each in others] + [
        f"{each.name}: {in_words(file[each])} of the model file has no effect, {name} does not take it"
        for each in PARAMETERS
        if each.argument and not each.side and each.argument not in kwargs
        if file[each] is not None and sampling[each] == file[each]
    ]


def _without_effect(pipeline: Any, driver: Any, kwargs: Mapping[str, Any]) -> list[str]:
    """Warnings for arguments of the pipeline that its scheduler does not take, or that need guidance."""
    scheduler = type(getattr(driver, "scheduler", None))
    step = getattr(scheduler, "step", None)
    step_parameters = inspect.signature(step).parameters if step else {}
    warnings = [
        f"{each.name}: {kwargs[argument]:g} has no effect, {scheduler.__name__} does not take it"
        for each in PARAMETERS
        if each.stepped and (argument := each.argument) and kwargs.get(argument) and argument not in step_parameters
    ]
    rescale = kwargs.get("guidance_rescale")
    if rescale and not getattr(pipeline, "do_classifier_free_guidance", True):
        warnings.append(f"guidance_rescale: {rescale:g} has no effect without guidance")
    return warnings


def _recipe(
    model: Loaded,
    pipeline: Any,
    requested: Generation,
    filled: Generation,
    result: Result,
    kwargs: Mapping[str, Any],
    choice: schedulers.SchedulerChoice | None,
    canvas: arguments.Canvas,
) -> Recipe:
    def used(parameter: Parameter) -> Any:
        """The value the pipeline actually used, including its own default."""
        if parameter.argument is None:
            return filled.sampling[parameter]
        argument = parameter.argument
        default = arguments.signature_default(pipeline, argument) if parameter.reported else None
        return kwargs.get(argument, default)

    sampling = Sampling(**{parameter.name: used(parameter) for parameter in PARAMETERS})
    model_scheduler = getattr(model.pipeline, "scheduler", None)
    return Recipe(
        model=model.config.name,
        source=model.source,
        pipeline=type(pipeline).__name__,
        prompt=filled.prompt,
        seed=filled.seed,
        sampling=replace(
            sampling,
            width=result.size[0] or None,
            height=result.size[1] or None,
            seconds=sampling.seconds or (result.seconds if isinstance(result, Sound) else None),
            num_frames=len(result) if isinstance(result, Clip) else sampling.num_frames,
            scheduler=choice.name if choice else type(model_scheduler).__name__,
            strength=sampling.strength if filled.sampling.strength is None else filled.sampling.strength,
        ),
        image_sha256=tuple(images.fingerprint(png) for png in requested.images),
        mask_sha256=images.fingerprint(requested.mask) if requested.mask else None,
        device=model.device,
        dtype=model.dtype,
        versions={"sfumato": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__},
        savings=tuple(sorted({*filled.savings, *model.savings})),
        masked_area=(filled.mask_padding or 0, canvas.width or 0, canvas.height or 0) if canvas.box else None,
        drawn_size=(canvas.width or 0, canvas.height or 0) if canvas.kept else None,
        mask_from_alpha=filled.mask_from_alpha,
        controls=tuple(named_nets.recorded(control, model) for control in requested.controls),
        loras=(loras := inputs.recorded_loras(model, requested)),
        without_loras=bool(model.state.own_loras) and not loras,
        runner=recorded.told(views.computed_by(pipeline)),
        loras_off=inputs.loras_off(model, requested),
    )

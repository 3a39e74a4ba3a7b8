"""What a pipeline can use of a request: the rest is refused, or left out for clients that send every field."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffusers import AutoencoderTiny

from sfumato import schedulers
from sfumato.checkpoints import feature_caches, tiny_vaes
from sfumato.core import Generation
from sfumato.drawing import arguments
from sfumato.errors import InvalidRequest, in_words
from sfumato.models.load import Loaded
from sfumato.pipelines import guidance, request_fields, request_scheduler, scheduler_owners
from sfumato.pipelines.capabilities import most_clip_skip, parameters_of, upscaler
from sfumato.sampling import PARAMETERS, Parameter, Sampling, clip_layer, clip_skip_for, refuse_no_guidance


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a parameter of a request cannot be used."""

    parameter: Parameter
    reason: str
    remedy: str

    @property
    def field(self) -> str:
        return "size" if self.parameter.side else self.parameter.name

    def error(self) -> InvalidRequest:
        argument = self.parameter.argument or self.parameter.name
        param = self.field if self.parameter.side else argument
        return InvalidRequest(f"{argument}: {self.reason}. {self.remedy}", param=param)


def usable(model: Loaded, pipeline: Any, generation: Generation) -> tuple[Generation, tuple[str, ...]]:
    """The generation with parameters that this pipeline can use only, and a warning for each that was left out.

    Raises InvalidRequest naming the argument if anything would be left out, except for AUTOMATIC1111's clients.
    """
    generation = _counted(pipeline, generation)
    refusals = {each.field: each for each in _refusals(model, pipeline, generation)}
    if not generation.webui:
        if refusals:
            raise next(iter(refusals.values())).error()
        return generation, ()
    names = [each.name for each in PARAMETERS if ("size" if each.side else each.name) in refusals]
    sampling = replace(generation.sampling, **dict.fromkeys(names))
    generation = replace(generation, sampling=sampling)
    left_out = [f"{field}: left out: {refusal.reason}" for field, refusal in refusals.items()]
    if wanted := generation.sampling.scheduler:
        steps = arguments.fill(model, pipeline, generation).sampling.steps
        chosen, told = _nearest_scheduler(scheduler_owners.drawing_pipeline(pipeline), wanted, steps)
        generation = replace(generation, sampling=replace(generation.sampling, scheduler=chosen))
        left_out += told
    return generation, tuple(left_out)


def refuse_class(model: Loaded, pipeline: Any, generation: Generation) -> None:
    """Raises InvalidRequest if the class that draws a request cannot use what the model file has put into the model."""
    name, param = type(pipeline).__name__, "controls" if generation.controls else "image"
    tiny = isinstance(getattr(pipeline, "vae", None), AutoencoderTiny)
    for key, what, unfit in (
        ("cache", "a feature cache", model.config.cache and not feature_caches.says_its_calls(name)),
        ("vae", "a tiny VAE", tiny and tiny_vaes.keeps_from(name)),
    ):
        if unfit:
            raise InvalidRequest(
                f"{model.config.name} has {what} (`{key}` in its file), with which {name} cannot draw; leave {param} "
                f"out of the request, or `{key}` out of the file",
                param=param,
            )


def _nearest_scheduler(driver: Any, wanted: str, steps: int | None) -> tuple[str | None, list[str]]:
    """This scheduler, else the same without its schedule, else None for the model's own; a warning if it is another."""
    if request_scheduler.keeps_own(driver):
        return wanted, []
    choice = schedulers.parse(wanted)
    reason = request_scheduler.why_unfit(driver, choice, steps)
    if reason is None:
        return wanted, []
    plain = schedulers.without_schedule(wanted)
    if plain and request_scheduler.why_unfit(driver, schedulers.parse(plain), steps) is None:
        return plain, [f"scheduler: the schedule {choice.schedule} was left out, {plain} is used without it: {reason}"]
    own = type(driver.scheduler).__name__ if getattr(driver, "scheduler", None) is not None else "none"
    return None, [f"scheduler: left out: {wanted}: {reason}. The model's own is used ({own})"]


def scheduler(driver: Any, sampling: Sampling) -> schedulers.SchedulerChoice | None:
    """The scheduler to draw with; None: the model's own. Raises InvalidRequest if it cannot draw with `driver`."""
    if request_scheduler.keeps_own(driver):
        return None
    choice = schedulers.parse(sampling.scheduler) if sampling.scheduler else None
    request_scheduler.check(driver, choice, sampling.steps)
    return choice


def _counted(pipeline: Any, generation: Generation) -> Generation:
    """Layers to skip from the last one, as AUTOMATIC1111's clients count, as layers to skip from the class's own."""
    skipped = generation.sampling.clip_skip
    if skipped is None or not generation.webui:
        return generation
    return replace(
        generation,
        sampling=replace(generation.sampling, clip_skip=clip_skip_for(skipped + 1, type(pipeline).__name__)),
    )


def _refusals(model: Loaded, pipeline: Any, generation: Generation) -> Iterator[Refusal]:
    parameters, name = parameters_of(pipeline), f"{model.config.name} ({type(pipeline).__name__})"
    for each in PARAMETERS:
        value = generation.sampling[each]
        if value is None or (each.argument is None and each.name not in _UNUSABLE):
            continue
        if each.side and (generation.images or generation.controls or generation.clip):  # which have that size already
            if generation.webui and (larger := upscaler(pipeline)):
                yield Refusal(each, f"{name} enlarges {larger.factor} times", "Leave it out.")
        elif each.argument is not None and each.argument not in parameters:
            told = "" if isinstance(value, str) else f"{in_request(each, generation, pipeline)}; "
            fields = ", ".join(request_fields.of(pipeline))
            yield Refusal(each, f"{told}{name} does not take it", f"Leave it out. It takes: {fields}")
        elif why := {**_UNUSED, **_UNUSABLE}.get(each.name, _always_used)(model, pipeline, value):
            reason, remedy = why
            told = f"{in_request(each, generation, pipeline)}; " if each.name in _UNUSABLE else ""
            yield Refusal(each, told + reason, remedy)


def in_request(parameter: Parameter, generation: Generation, pipeline: Any) -> str:
    """The value of a parameter as its request says it; `generation` is as `usable` returns it."""
    value = generation.sampling[parameter]
    if parameter.one_based and generation.webui:
        value = clip_layer(value, type(pipeline).__name__)
    return in_words(value)


def refuse_defaults(model: Loaded, pipeline: Any, filled: Generation) -> None:
    """Raises InvalidRequest for a value that the pipeline takes and would fail with."""
    for each in PARAMETERS:
        value, reject = filled.sampling[each], _UNUSABLE.get(each.name, _always_used)
        taken = each.argument is None or each.argument in parameters_of(pipeline)
        if value is not None and taken and (why := reject(model, pipeline, value)):
            reason, remedy = why
            raise Refusal(each, f"{in_words(value)}; {reason}", remedy).error()
    refuse_no_guidance(filled.sampling)


def takes_negative(model: Loaded, pipeline: Any) -> bool:
    """Whether a negative prompt has a meaning for this model."""
    return "negative_prompt" in parameters_of(pipeline) and not _unused_negative(model, pipeline, "any")


def _unused_negative(model: Loaded, pipeline: Any, negative: str) -> tuple[str, str] | None:
    # Distilled models accept a negative prompt but ignore it unless "true" guidance is on.
    true_cfg = parameters_of(pipeline).get("true_cfg_scale")
    if not negative or true_cfg is None:
        return None
    scale = model.config.options.get("true_cfg_scale", true_cfg.default)
    if scale and scale > 1:
        return None
    return (
        f"{model.config.name} uses it only with true_cfg_scale above 1",
        f"Add `true_cfg_scale:4` to `options` in {model.config.file_name}, or leave it out.",
    )


def _too_deep(model: Loaded, pipeline: Any, clip_skip: int) -> tuple[str, str] | None:
    most = most_clip_skip(pipeline)
    if most is None or clip_skip <= most:
        return None
    return f"the text encoder of {model.config.name} has too few layers", f"0 to {most} are valid"


def _guided_throughout(model: Loaded, pipeline: Any, part: float) -> tuple[str, str] | None:
    # 0 and 1 are what acts without them; that there is an interval is for `refuse_no_guidance`.
    if part in (0, 1) or guidance.limitable(type(pipeline).__name__, parameters_of(pipeline)):
        return None
    return guidance.why_not(type(pipeline).__name__), "Leave it out."


def _always_used(model: Loaded, pipeline: Any, value: Any) -> tuple[str, str] | None:
    return None


_UNUSED: Mapping[str, Callable[[Loaded, Any, Any], tuple[str, str] | None]] = {
    "negative_prompt": _unused_negative,
}
"""Parameter → reason and remedy if the class takes it but this model does not use this value."""

_UNUSABLE: Mapping[str, Callable[[Loaded, Any, Any], tuple[str, str] | None]] = {
    "clip_skip": _too_deep,
    **dict.fromkeys(guidance.FIELDS, _guided_throughout),
}
"""The same for a value that the class takes and fails with."""

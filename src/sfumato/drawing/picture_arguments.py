"""Arguments of a pipeline call that are pictures, each by its role, with what a request says of its controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sfumato.checkpoints import class_reading
from sfumato.core import Control, Generation
from sfumato.errors import InvalidRequest
from sfumato.models.load import Loaded
from sfumato.pipelines import inputs
from sfumato.pipelines.capabilities import parameters_of
from sfumato.pipelines.inputs import CLIP, CONTROL, LABEL, MASK

if TYPE_CHECKING:
    from sfumato.drawing.arguments import Canvas

FIELDS = {"weight": inputs.SCALES, "start": inputs.STARTS, "end": inputs.ENDS, "mode": inputs.MODES}
"""Field of a control -> the parameters of pipelines that it is for; a class has one of them."""

WHOLE = {"weight": 1.0, "start": 0.0, "end": 1.0}
"""Of a control that does not say it, beside another that does."""


def encoded(generation: Generation) -> list[bytes]:
    """Its control pictures."""
    return [control.image for control in generation.controls if isinstance(control.image, bytes)]


def of_canvas(model: Loaded, pipeline: Any, generation: Generation, canvas: Canvas) -> dict[str, Any]:
    """Arguments for the pictures of the canvas. Raises InvalidRequest for what the class does not take."""
    reading = class_reading.of_pipeline(pipeline)
    values: dict[str, Any] = {}
    first = reading.sources[0] if reading.sources else None
    if first and canvas.sources and first.many and (len(canvas.sources) > 1 or first.plural):
        values[first.name] = canvas.sources
    else:
        values |= {taken.name: source for taken, source in zip(reading.sources, canvas.sources, strict=False)}
    if canvas.clip and (clip := reading.of(CLIP)):
        values[clip.name] = list(canvas.clip)
    if canvas.mask is not None and (mask := reading.of(MASK)):
        values[mask.name] = canvas.mask
    if canvas.controls and (control := reading.of(CONTROL)):
        several = class_reading.nets_of(pipeline) > 1 or len(canvas.controls) > 1
        values[control.name] = list(canvas.controls) if several else canvas.controls[0]
        values |= _settings(model, pipeline, generation.controls, several=several)
    if (label := reading.of(LABEL)) and not reading.takes_prompt:
        number = _label(pipeline, generation.prompt)
        if number is not None:
            values[label.name] = [number]
        elif label.required:
            raise _unknown_label(model, pipeline, generation.prompt)
    return values


def _settings(model: Loaded, pipeline: Any, controls: Sequence[Control], *, several: bool) -> dict[str, Any]:
    """Arguments for the weights, starts, ends and modes of controls, those that a request says."""
    taken, nets = parameters_of(pipeline), class_reading.nets_of(pipeline)
    values: dict[str, Any] = {}
    for field, parameters in FIELDS.items():
        requested = [getattr(control, field) for control in controls]
        parameter = next((each for each in parameters if each in taken), None)
        # Some classes take no single weight for several nets, though that is the default.
        listed = field == "weight" and nets > 1 and parameter and parameter not in model.config.options
        if not listed and all(value is None for value in requested):
            continue
        if parameter is None:
            raise InvalidRequest(
                f"controls: {field}: {model.config.name} ({type(pipeline).__name__}) does not take it; leave it out",
                param="controls",
            )
        if field == "mode" and None in requested:
            raise InvalidRequest("controls: mode: every control needs one where one has it", param="controls")
        full = [WHOLE.get(field) if value is None else value for value in requested]
        if nets > 1 or (several and field == "mode"):
            values[parameter] = full
        elif len(set(full)) == 1:
            values[parameter] = full[0]
        else:
            raise InvalidRequest(
                f"controls: {field}: one net of {model.config.name} takes all of them, so they cannot differ; "
                f"got {', '.join(map(str, full))}",
                param="controls",
            )
    if class_reading.kinds_of(pipeline) and "control_mode" not in {*values, *model.config.options}:
        raise InvalidRequest(
            f"controls: mode: {model.config.name} needs the number of the kind of control, "
            f"0 to {class_reading.kinds_of(pipeline) - 1}",
            param="controls",
        )
    return values


def _label(pipeline: Any, prompt: str) -> int | None:
    """The class that a prompt names, by its number or its name; None: it names none."""
    text, labels = _spelling(prompt), _labels(pipeline)
    for spelling in (_spelling, lambda label: _spelling(label).casefold()):  # names that differ in case are told apart
        named = {spelling(label): number for label, number in labels.items()}
        if spelling(text) in named:
            return named[spelling(text)]
    return int(text) if text.isdecimal() and len(text) < 10 and int(text) < _label_count(pipeline) else None


def _spelling(label: str) -> str:
    return " ".join(label.replace("_", " ").split())


def _labels(pipeline: Any) -> dict[str, int]:
    labels = getattr(pipeline, "labels", None)
    return labels if isinstance(labels, dict) else {}


def _label_count(pipeline: Any) -> int:
    for name in ("transformer", "unet"):
        config = getattr(getattr(pipeline, name, None), "config", {})
        if count := config.get("num_embeds_ada_norm") or config.get("num_class_embeds"):
            return int(count)
    return 0


def _unknown_label(model: Loaded, pipeline: Any, prompt: str) -> InvalidRequest:
    labels = list(_labels(pipeline))
    names = f" or one of its names, such as {', '.join(labels[:3])}" if labels else ""
    return InvalidRequest(
        f"prompt: {prompt[:100]!r} is no class of {model.config.name}; "
        f"a number from 0 to {_label_count(pipeline) - 1}{names} is valid",
        param="prompt",
    )

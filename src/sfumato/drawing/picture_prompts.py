"""The pictures of a request's IP-Adapters: apart from its control pictures, which have the size of the result."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sfumato.batching.attending import Attending
from sfumato.checkpoints.ip_adapters import ARGUMENT
from sfumato.core import Generation
from sfumato.errors import InvalidRequest
from sfumato.models import ip_adapters
from sfumato.models.load import Loaded
from sfumato.pictures import images
from sfumato.pipelines.capabilities import parameters_of


def without(model: Loaded, generation: Generation) -> Generation:
    """The generation without them: what is left are the pictures of ControlNets."""
    if model.prompt is None:
        return generation
    taken = model.prompt.controls
    return replace(
        generation, controls=tuple(each for place, each in enumerate(generation.controls) if place not in taken)
    )


def arguments(model: Loaded, pipeline: Any, generation: Generation) -> dict[str, Any]:
    """What the call of a pipeline takes for them. Raises InvalidRequest for a class that has no IP-Adapters."""
    prompt = model.prompt
    if prompt is None:
        return {}
    if ARGUMENT not in parameters_of(pipeline):
        raise InvalidRequest(
            f"{prompt.param}: {model.config.name} ({type(pipeline).__name__}) takes no IP-Adapter for this task; leave "
            "it out",
            param=prompt.param,
        )
    pictures = [[generation.controls[place].image for place in each.controls] for each in prompt.adapters]
    decoded = [[images.on_white(images.decoded(png)) for png in each if isinstance(png, bytes)] for each in pictures]
    return ip_adapters.arguments(model, pipeline, decoded)


def paced(
    model: Loaded, attending: Attending | None, on_step: Callable[[int, int], None]
) -> Callable[[int, int], None]:
    """`on_step`, and before the next step each adapter begins or ends to act."""
    prompt = model.prompt
    if prompt is None or attending is None:
        return on_step
    reference = weakref.ref(attending)  # a stored error would keep it

    def stepped(done: int, total: int) -> None:
        if acting := reference():
            acting.strengths = prompt.strengths(done, total)
        on_step(done, total)

    return stepped

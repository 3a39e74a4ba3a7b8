"""What a pipeline takes of a request, in the words of requests: no caller knows the arguments of its call."""

from __future__ import annotations

from typing import Any

from sfumato.pipelines import guidance
from sfumato.pipelines.capabilities import parameters_of
from sfumato.pipelines.inputs import CONTROL, LABEL, MASK, SOURCES, role_of
from sfumato.sampling import PARAMETERS

FIELDS = {**dict.fromkeys(SOURCES, "image"), MASK: "mask", CONTROL: "controls", LABEL: "prompt"}
"""Role of a parameter of the call -> the field of a request that fills it."""


def of(pipeline: Any) -> list[str]:
    """The fields that it takes, each once; every pipeline has a seed."""
    taken = parameters_of(pipeline)
    fields = ["prompt"] if "prompt" in taken else []
    fields += [FIELDS[role] for name in taken if (role := role_of(name, taken))]
    fields += ["size" if each.side else each.name for each in PARAMETERS if each.argument in taken]
    fields += guidance.FIELDS if guidance.limitable(type(pipeline).__name__, taken) else ()
    scheduler = ["scheduler"] if getattr(pipeline, "scheduler", None) is not None else []
    return list(dict.fromkeys([*fields, *scheduler, "seed"]))

"""What mends a disagreement between two released packages; all of it, each part with the versions it is for.

A shim changes nothing in a package or in a module: names of modules and of weights stay as they are, for whoever loads
adapters. For each there is a test in `tests/test_compat.py` that fails once it is not needed any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Shim:
    needed_by: str
    """The versions it is for."""
    reason: str


ITSELF: Mapping[tuple[str, str], Shim] = {
    ("CLIPTextModel", "text_model"): Shim(
        "diffusers 0.42 with transformers 5.6 and later",
        "for `clip_skip` pipelines read `text_encoder.text_model.final_layer_norm`; transformers merged that part "
        "into the encoder itself",
    ),
}
"""Class of a module and a name that its pipelines ask it for: where the module has none, it is meant itself."""


def is_itself(module: Any, name: str) -> bool:
    """Whether `module`, which has no attribute `name`, stands for it."""
    return (type(module).__name__, name) in ITSELF

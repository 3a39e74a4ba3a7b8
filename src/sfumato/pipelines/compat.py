"""All shims for incompatible releases of two packages, each with the versions it is for.

A shim does not change a package or a module: names of modules and weights stay the same, so adapters can be loaded.
Each shim has a test in `tests/test_compat.py` that fails when the shim is not needed any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Shim:
    needed_by: str
    """The versions that need it."""
    reason: str


ITSELF: Mapping[tuple[str, str], Shim] = {
    ("CLIPTextModel", "text_model"): Shim(
        "diffusers 0.42 with transformers 5.6 and later",
        "for `clip_skip` pipelines read `text_encoder.text_model.final_layer_norm`; transformers merged that part "
        "into the encoder itself",
    ),
}
"""Class of a module and attribute that pipelines read: if the module does not have it, use the module itself."""


def is_itself(module: Any, name: str) -> bool:
    """Whether to use `module` itself for its missing attribute `name`."""
    return (type(module).__name__, name) in ITSELF

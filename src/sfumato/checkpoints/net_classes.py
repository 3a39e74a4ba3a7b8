"""Which ControlNets a pipeline class goes with, read from diffusers' sources. Needs no torch."""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass

from sfumato.checkpoints import class_reading, diffusers_source
from sfumato.pipelines import capabilities


@dataclass(frozen=True, slots=True)
class NetClass:
    """A diffusers class that draws with ControlNets what another one draws without."""

    name: str
    kinds: tuple[str, ...]
    """Classes of the ControlNets that it takes."""
    several: bool
    """Whether it takes more than one at a time."""
    mode: bool
    """Whether requests say the kind of each control, for nets that know several."""


@functools.lru_cache(512)
def of(own: str) -> tuple[NetClass, ...]:
    """Those for the class `own`, the usual one first; empty if diffusers has none."""
    plain = re.sub(r"(?:ControlNet(?:Union)?|Img2Img|Inpaint(?:ing)?)+(?=Pipeline$)", "", own)
    names = [
        capabilities.task_class(own, "text", controlled=True),
        plain.removesuffix("Pipeline") + "ControlNetPipeline",
        plain.removesuffix("Pipeline") + "ControlNetUnionPipeline",
    ]
    return tuple(each for name in dict.fromkeys(names) if name and (each := _read(name)))


def _read(name: str) -> NetClass | None:
    for function in diffusers_source.methods(name, "__init__"):
        for argument in function.args.args:
            if argument.arg == "controlnet" and argument.annotation:
                words = ast.unparse(argument.annotation)
                kinds = tuple(dict.fromkeys(kind for kind in re.findall(r"\w+Model\b", words) if "Multi" not in kind))
                mode = "control_mode" in (class_reading.parameters(name) or {})
                return NetClass(name, kinds, bool(re.search(r"\b(list|tuple)\[", words, re.IGNORECASE)), mode)
    return None

"""Tiny models without a ControlNet, and ControlNets for them on disk: what a request names."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as d
import torch

from support.families import FLOW, Family, without
from support.families_controlled import controlled, controlled_xl, qwen_controlled
from support.families_transformers import flux_controlled, stable_diffusion_3_controlled

CONTROLLED: dict[str, tuple[Any, Callable[[], Any], str]] = {
    "sd": (d.StableDiffusionPipeline, controlled(d.StableDiffusionControlNetPipeline), "image"),
    "xl": (d.StableDiffusionXLPipeline, controlled_xl(d.StableDiffusionXLControlNetPipeline), "image"),
    "sd3": (d.StableDiffusion3Pipeline, stable_diffusion_3_controlled, "control_image"),
    "flux": (d.FluxPipeline, flux_controlled, "control_image"),
    "qwen": (d.QwenImagePipeline, qwen_controlled, "control_image"),
}
"""Family -> its class without a ControlNet, a pipeline with one, and what that calls the control picture."""

OTHER = 7
"""Seed of a second net."""


@functools.cache
def whole(family: str) -> Any:
    """The pipeline with its ControlNet."""
    pipeline = CONTROLLED[family][1]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@functools.cache
def another(family: str) -> Any:
    """A ControlNet as the family's, with other weights."""
    made = copy.deepcopy(whole(family).controlnet)
    generator = torch.Generator().manual_seed(OTHER)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return made


def plain(family: str) -> Any:
    """The pipeline without its ControlNet, on the same modules."""
    cls = CONTROLLED[family][0]
    taken = cls._get_signature_keys(cls)[0]
    more = {"requires_safety_checker": False} if family == "sd" else {}
    return cls(**{name: part for name, part in whole(family).components.items() if name in taken}, **more)


def save_nets(folder: Path, family: str) -> None:
    """`<family>/canny` and `<family>/depth` in `controlnets/` of a folder of model files."""
    whole(family).controlnet.save_pretrained(folder / "controlnets" / family / "canny")
    another(family).save_pretrained(folder / "controlnets" / family / "depth")


def families() -> dict[str, Family]:
    """For `families_served.served`, without ControlNets."""
    calls = {"qwen": without(FLOW, "guidance_scale")}
    return {name: Family(functools.partial(plain, name), calls.get(name, FLOW), "unet") for name in CONTROLLED}

"""The frames, the sides and the rate at which a class draws clips: read from diffusers' source, and from its parts.

A signature says none of these. The frames follow from how the VAE compresses time, the sides from what `check_inputs`
compares, and the rate is the one at which the class's own example writes its clip.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from sfumato.checkpoints import diffusers_source
from sfumato.status import FrameRule

STEPS = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
"""Attributes of pipelines: the frames that the VAE makes of each frame of latents after the first."""

LONGEST = "motion_max_seq_length"
"""Setting of a UNet with motion modules, which know so many places in a row."""

RATES = ("frame_rate", "fps")
"""Parameters of calls for frames a second."""

USUAL_RATE = 10.0
"""diffusers' own default for a clip's file (`export_to_video`, `export_to_gif`)."""

_EXAMPLE = re.compile(r"export_to_(?:video|gif)\([^\n]*?\bfps=(\d+)")


IN_PAIRS: Mapping[str, int] = MappingProxyType({"AutoencoderKLCogVideoX": 2})
"""VAE that decodes so many frames of latents at a time, and makes a first frame for an odd number of them alone."""


OWN: Mapping[str, FrameRule] = MappingProxyType(
    {
        "AllegroPipeline": FrameRule(16, first=24),
        "HeliosPipeline": FrameRule(33, first=33),
        "HeliosPyramidPipeline": FrameRule(33, first=33),
    }
)
"""Classes that draw in pieces: Allegro's VAE decodes 24 frames at a time, every 16, and leaves what is over black;
Helios draws 9 frames of latents at a time, and decodes them alone."""

LATENT_FRAMES: Mapping[str, int] = MappingProxyType({"AllegroTransformer3DModel": 4})
"""Denoisers whose setting counts frames of latents -> frames that the VAE makes of each."""


SOURCES: Mapping[str, str] = MappingProxyType(
    {
        "WanVideoToVideoPipeline": "video",
        "WanVACEPipeline": "video",
        "CogVideoXVideoToVideoPipeline": "video",
        "CogVideoXFunControlPipeline": "control_video",
        "AnimateDiffVideoToVideoPipeline": "video",
        "AnimateDiffControlNetPipeline": "conditioning_frames",
    }
)
"""Classes that make a clip of each frame of another -> the parameter for it. Each was compared with a plain call; those
that continue a clip, or take several, are not here (docs/guides/video.md)."""

FROM_CLIPS: Mapping[str, str] = MappingProxyType(
    {
        "WanPipeline": "WanVideoToVideoPipeline",
        "CogVideoXPipeline": "CogVideoXVideoToVideoPipeline",
        "AnimateDiffPipeline": "AnimateDiffVideoToVideoPipeline",
    }
)
"""Class -> that which draws from a clip on the same weights; diffusers' own table has Wan alone."""


def frame_rule(step: Any, longest: Any, vae: str) -> FrameRule:
    """`step`: the value of one of `STEPS`; `longest`: that of `LONGEST`; anything else: not known. `vae`: its class."""
    counted = step * IN_PAIRS.get(vae, 1) if isinstance(step, int) and step > 1 else 1
    return FrameRule(counted, longest if isinstance(longest, int) else None)


def of_pipeline(pipeline: Any) -> FrameRule:
    """The rule of a pipeline in memory."""
    if own := OWN.get(type(pipeline).__name__):
        return own
    step = next((getattr(pipeline, name) for name in STEPS if hasattr(pipeline, name)), None)
    longest = getattr(getattr(pipeline, "unet", None), "config", {}).get(LONGEST)
    return frame_rule(step, longest, type(getattr(pipeline, "vae", None)).__name__)


def own_rate(name: str, value: Callable[[str], Any]) -> float:
    """Frames a second of a clip whose request does not say it; `value`: of a parameter, of the file or the class."""
    named = (value(parameter) for parameter in RATES)
    return next((float(each) for each in named if each), rate(name))


@functools.cache
def rate(name: str) -> float:
    """Frames a second of a clip of a diffusers class that nobody set."""
    path = diffusers_source.files().get(name)
    example = _EXAMPLE.search(path.read_text(encoding="utf-8")) if path else None
    return float(example[1]) if example else USUAL_RATE


def side_multiple(name: str, value: Callable[[ast.expr], Any]) -> int | None:
    """What `check_inputs` of a class wants both sides to be multiples of; None if it does not say.

    `value`: of an expression over attributes of the pipeline; None if that is not known.
    """
    found = _modulus(name)
    multiple = found.value if isinstance(found, ast.Constant) else value(found) if found is not None else None
    return multiple if isinstance(multiple, int) and multiple > 0 else None


@functools.cache
def _modulus(name: str) -> ast.expr | None:
    """The expression behind `height %` in what a class checks."""
    for function in diffusers_source.methods(name, "check_inputs"):
        for node in ast.walk(function):
            match node:
                case ast.BinOp(left=ast.Name(id="height"), op=ast.Mod(), right=right):
                    return right
    return None

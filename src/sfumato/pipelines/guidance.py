"""Classes whose guidance can be limited to a part of the steps, and how.

Most pipelines with guidance compute each step twice, without the prompt and with it, as two rows of one forward pass.
In which order they do so, and whether they do so at all, is a fact of each class: those here have been compared with
themselves without guidance (`tests/test_guidance_interval.py`). Others call the denoiser twice, give it the scale as an
argument (FLUX), or have three rows.
"""

from __future__ import annotations

from typing import Any

CONCATENATING = frozenset({
    "AuraFlowPipeline", "CogView3PlusPipeline", "HunyuanDiTPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline",
    "SanaPipeline", "StableDiffusion3ControlNetPipeline", "StableDiffusion3Img2ImgPipeline",
    "StableDiffusion3InpaintPipeline", "StableDiffusion3Pipeline", "StableDiffusionAdapterPipeline",
    "StableDiffusionControlNetImg2ImgPipeline", "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionControlNetPipeline", "StableDiffusionDepth2ImgPipeline", "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline", "StableDiffusionPipeline", "StableDiffusionXLAdapterPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline", "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLControlNetPipeline", "StableDiffusionXLControlNetUnionPipeline",
    "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline", "StableDiffusionXLPipeline",
})  # fmt: skip
"""Classes that compute [without the prompt, with it] in one forward pass of two rows."""

FIELDS = ("guidance_start", "guidance_end")
"""Of requests and model files: the ends of the interval."""

OF_GUIDER = ("start", "stop")
"""What the guider of a modular pipeline calls the ends of the interval; it leaves out the other calls itself."""


def limitable(name: str, parameters: Any) -> bool:
    """Whether the guidance of a class can be limited to some steps. `parameters`: names of its call's arguments."""
    return name in CONCATENATING or all(each in parameters for each in OF_GUIDER)


def why_not(name: str) -> str:
    """Why the guidance of a class that is not `limitable` acts in every step."""
    return (
        f"the guidance of {name} cannot be limited to a part of the steps: it does not compute the rows with and "
        "without the prompt in one forward pass, or was not compared for that"
    )

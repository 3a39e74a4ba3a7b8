"""What is known of a model once it is loaded, for those who choose one and ask it for something."""

from __future__ import annotations

from typing import Any

from sfumato.core import ModelInfo
from sfumato.drawing import arguments
from sfumato.models.load import Loaded
from sfumato.pipelines import capabilities, tokens


def model_info(model: Loaded) -> ModelInfo:
    pipeline = model.pipeline
    upscaler = capabilities.upscaler(pipeline)
    tasks = capabilities.tasks(pipeline)
    width, height = size(model) if "text-to-image" in tasks else (None, None)
    return ModelInfo(
        pipeline=type(pipeline).__name__,
        tasks=tasks,
        width=width,
        height=height,
        size_multiple=upscaler.multiple * upscaler.factor if upscaler else arguments.size_multiple(pipeline),
        steps=arguments.default_steps(model, pipeline),
        guidance_scale=arguments.default_guidance(model, pipeline),
        prompt_tokens=tokens.capacity(pipeline, model.config.options),
        transparent=capabilities.transparent(pipeline),
        upscale=upscaler.factor if upscaler else None,
        device=model.device,
        dtype=model.dtype,
    )


def size(model: Loaded) -> tuple[int | None, int | None]:
    """Of a picture whose request names none: the model file's, the signature's, or
    what the denoiser was made for: one side or (height, width) of latents."""
    if model.config.width:
        return model.config.width, model.config.height
    pipeline = model.pipeline
    signature = [arguments.signature_default(pipeline, side) for side in ("width", "height")]
    if all(isinstance(side, int) for side in signature):
        return signature[0], signature[1]
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    latents: Any = getattr(pipeline, "default_sample_size", None)
    latents = latents or getattr(denoiser, "config", {}).get("sample_size")
    factor = getattr(pipeline, "vae_scale_factor", 1)
    match latents:
        case int(side):
            return side * factor, side * factor
        case [int(height), int(width)]:
            return width * factor, height * factor
    return None, None

"""What is known about a loaded model, for clients that choose one and send requests to it."""

from __future__ import annotations

from sfumato.core import ModelInfo
from sfumato.drawing import arguments
from sfumato.models.load import Loaded
from sfumato.pipelines import capabilities, tokens


def model_info(model: Loaded) -> ModelInfo:
    pipeline = model.pipeline
    upscaler = capabilities.upscaler(pipeline)
    tasks = capabilities.tasks(pipeline)
    width, height = arguments.own_size(model) if "text-to-image" in tasks else (None, None)
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

"""Information about a loaded model, for clients that choose one and send requests to it."""

from __future__ import annotations

from dataclasses import replace

from sfumato.checkpoints import class_reading
from sfumato.drawing import arguments, clips, sounds
from sfumato.formats import AUDIO, VIDEO
from sfumato.models.load import Loaded
from sfumato.pipelines import capabilities, tokens
from sfumato.sampling import merged
from sfumato.status import ModelInfo


def model_info(model: Loaded) -> ModelInfo:
    pipeline = model.pipeline
    upscaler = capabilities.upscaler(pipeline)
    abilities = class_reading.abilities_of(model.config, class_reading.kin_of_pipeline(pipeline))
    tasks = abilities.tasks
    sized = {"text-to-image", "text-to-video", "video-to-video"} & {*tasks}
    width, height = arguments.own_size(model) if sized else (None, None)
    sampling = replace(arguments.defaults(model, pipeline), width=width, height=height)
    if abilities.kind == VIDEO:
        sampling = merged(sampling, clips.defaults(model))
    if abilities.kind == AUDIO:
        sampling = merged(sampling, sounds.defaults(model))
    limit = {tokens.LIMIT: sampling.max_sequence_length} if sampling.max_sequence_length else {}
    return ModelInfo(
        pipeline=type(pipeline).__name__,
        abilities=abilities,
        sampling=sampling,
        size_multiple=upscaler.multiple * upscaler.factor if upscaler else arguments.size_multiple(pipeline),
        prompt_tokens=tokens.capacity(pipeline, limit),
        transparent=capabilities.transparent(pipeline),
        upscale=upscaler.factor if upscaler else None,
        device=model.device,
        dtype=model.dtype,
        memory_bytes=sum(model.blocks().values()),
        savings=model.savings,
    )

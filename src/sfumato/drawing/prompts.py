"""How a prompt is read before the pipeline gets it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sfumato.core import Generation
from sfumato.drawing.usable import takes_negative
from sfumato.models.load import Loaded
from sfumato.sampling import prompt_pair


def split(model: Loaded, pipeline: Any, generation: Generation) -> tuple[Generation, tuple[str, ...]]:
    """The generation with `positive|negative` as two prompts if the model uses both, and a warning that says so."""
    pair = prompt_pair(generation.prompt) if generation.split_prompt else None
    if pair is None:
        return generation, ()
    if not takes_negative(model, pipeline):
        return generation, (f"prompt: not split at its bar: {model.config.name} uses no negative prompt",)
    positive, negative = pair
    both = ", ".join(text for text in (generation.sampling.negative_prompt, negative) if text)
    sampling = replace(generation.sampling, negative_prompt=both or generation.sampling.negative_prompt)
    told = "prompt: split at its bar: what stands behind it is the negative prompt"
    return replace(generation, prompt=positive, sampling=sampling), (told,)

"""How a prompt is read before the pipeline gets it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sfumato.core import Generation
from sfumato.drawing import emphasis, inversions, weights
from sfumato.drawing.usable import takes_negative
from sfumato.models.load import Loaded
from sfumato.sampling import prompt_pair

_WEIGHTED = re.compile(r":\s*[+-]?[\d.]+\s*\)|\bBREAK\b")
"""In markup that nobody writes by chance."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the pipeline gets of the prompts."""

    arguments: Mapping[str, Any]
    """Of the call: the texts, or embeddings in their place."""
    texts: tuple[str, str | None]
    """Prompt and negative prompt, with tokens for the names of textual inversions."""
    weights: bool
    """Whether markup was read."""
    embeddings: tuple[str, ...]
    """`name:hash` of each textual inversion."""
    warnings: tuple[str, ...]

    @property
    def embedded(self) -> bool:
        """Whether the texts are read to their end."""
        return "prompt_embeds" in self.arguments


def read(model: Loaded, pipeline: Any, generation: Generation, kwargs: Mapping[str, Any]) -> Reading:
    """Read the prompts of a call. Raises InvalidRequest for a textual inversion that cannot be used."""
    named, used, told = inversions.read(model, pipeline, kwargs, lenient=generation.webui)
    call, not_read = weights.read(model, pipeline, named) if generation.weights else (named, _as_text(named))
    return Reading(
        call,
        (named.get("prompt") or "", named.get("negative_prompt")),
        any(call.get(field) != named.get(field) for field in weights.FIELDS),
        used,
        (*told, *not_read),
    )


def _as_text(kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Warnings for weights that stand in prompts of a request that does not ask for them; brackets alone are text."""
    markup = {field: emphasis.parse(kwargs.get(field) or "").markup for field in weights.FIELDS}
    weighted = {field: [each for each in pieces if _WEIGHTED.search(each)] for field, pieces in markup.items()}
    return tuple(
        f"{field}: {', '.join(map(repr, pieces))} is read as text; weights are read with `prompt_weights: true`, and "
        "on AUTOMATIC1111's routes"
        for field, pieces in weighted.items()
        if pieces
    )


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

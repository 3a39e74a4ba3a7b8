"""Weighted and long prompts of AUTOMATIC1111's clients: embeddings in place of texts, for Stable Diffusion.

compel computes them with the pipeline's own encoders, whose calls are batched and remembered like the pipeline's. A
prompt without weights that the encoders read whole stays a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from sfumato.batching.batcher import is_out_of_memory
from sfumato.drawing.arguments import PAGE_CLASSES
from sfumato.drawing.emphasis import Emphasis, Fragment, parse, unescaped
from sfumato.errors import DrawError, InvalidRequest
from sfumato.models.load import Loaded
from sfumato.pipelines.capabilities import parameters_of
from sfumato.sampling import clip_layer

FIELDS = ("prompt", "negative_prompt")

MAX_CHUNKS = 16
"""What a prompt may have of 75 tokens each, and of BREAKs: attention grows with each for every step."""

MAX_LIGHTER = 64
"""Pieces of a prompt with a weight below 1: compel reads the whole prompt again for each."""


def read(model: Loaded, pipeline: Any, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The arguments of a call with its prompts read as AUTOMATIC1111 reads them, and warnings for what is not read.

    Without markup in prompts that the encoders read whole, the arguments are equal to `kwargs`.
    """
    prompts = {field: parse(kwargs.get(field) or "") for field in FIELDS}
    warnings = [
        f"{field}: {', '.join(map(repr, emphasis.unread))} is read as text"
        for field, emphasis in prompts.items()
        if emphasis.unread
    ]
    pairs = [(getattr(pipeline, tokenizer), getattr(pipeline, encoder)) for tokenizer, encoder in encoders(pipeline)]
    if not pairs:
        warnings += [
            f"{field}: {', '.join(map(repr, emphasis.markup))} is read as text: weights are for the CLIP encoders of "
            f"Stable Diffusion, not for {model.config.name} ({type(pipeline).__name__})"
            for field, emphasis in prompts.items()
            if emphasis.markup
        ]
        return {**kwargs, **{field: unescaped(kwargs[field]) for field in FIELDS if kwargs.get(field)}}, tuple(warnings)
    if not any(_is_weighted(emphasis) or _is_long(emphasis, pairs) for emphasis in prompts.values()):
        plain = {field: emphasis.plain for field, emphasis in prompts.items() if kwargs.get(field)}
        return {**kwargs, **plain}, tuple(warnings)
    for field, emphasis in prompts.items():
        prompts[field], warning = _bounded(emphasis, field, pairs[0][0])
        warnings += warning
    texts = {name: value for name, value in kwargs.items() if name not in FIELDS}
    return texts | _arguments(pipeline, pairs, prompts, kwargs), tuple(warnings)


def _is_weighted(emphasis: Emphasis) -> bool:
    return len(emphasis.parts) > 1 or any(fragment.weight != 1 for part in emphasis.parts for fragment in part)


def _is_long(emphasis: Emphasis, pairs: list[tuple[Any, Any]]) -> bool:
    tokenizer, _ = pairs[0]
    return len(tokenizer(emphasis.plain, verbose=False).input_ids) > int(tokenizer.model_max_length)


def _bounded(emphasis: Emphasis, field: str, tokenizer: Any) -> tuple[Emphasis, list[str]]:
    """A prompt of at most `MAX_CHUNKS`, and a warning if that is not all of it. Raises InvalidRequest."""
    lighter = sum(fragment.weight < 1 for part in emphasis.parts for fragment in part)
    if lighter > MAX_LIGHTER:
        raise InvalidRequest(
            f"{field}: {lighter} pieces have a weight below 1; at most {MAX_LIGHTER} are allowed", param=field
        )
    room = MAX_CHUNKS * (int(tokenizer.model_max_length) - 2)
    total = read = 0
    parts: list[tuple[Fragment, ...]] = []
    for number, part in enumerate(emphasis.parts):
        kept = []
        for fragment in part:
            tokens = tokenizer(fragment.text, add_special_tokens=False, verbose=False).input_ids
            left = room - read if number < MAX_CHUNKS else 0
            total, read = total + len(tokens), read + min(len(tokens), left)
            if len(tokens) <= left:
                kept.append(fragment)
            elif left:
                kept.append(Fragment(tokenizer.decode(tokens[:left]), fragment.weight))
        parts.append(tuple(kept))
    cut = f"{field}: {total - read} of {total} tokens were cut off; at most {MAX_CHUNKS} times 75 are read"
    return Emphasis(tuple(parts[:MAX_CHUNKS])), [cut] if read < total else []


def encoders(pipeline: Any) -> list[tuple[str, str]]:
    """Names of its tokenizers and CLIP text encoders; none if the class does not take embeddings that these make."""
    if not PAGE_CLASSES.match(type(pipeline).__name__) or "prompt_embeds" not in parameters_of(pipeline):
        return []
    names = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
    present = [pair for pair in names if all(getattr(pipeline, name, None) is not None for name in pair)]
    # A stand-in has its module's `__class__`.
    clip = all("CLIP" in getattr(pipeline, encoder).__class__.__name__ for _, encoder in present)
    return present if clip else []


class _Layer:
    """A text encoder, as compel calls it, that gives one of its layers, read as the pipeline class reads it."""

    def __init__(self, encoder: Any, device: torch.device, layer: int, *, normalised: bool) -> None:
        """`device`: where it computes. `layer`: counted from the last, which is 1. `normalised`: by its last norm."""
        self._encoder = encoder
        self._layer = layer
        self._normalised = normalised
        self.device = device
        self.dtype = encoder.dtype
        self.pooled: torch.Tensor | None = None
        """The pooled embedding of the first chunk, if the encoder has one."""

    def __call__(self, tokens: torch.Tensor, mask: torch.Tensor | None, **_: Any) -> Any:
        # Without a mask, as the pipelines call it, where that is the same: such calls share forward passes.
        masked = {} if mask is None or bool(mask.all()) else {"attention_mask": mask}
        last = self._normalised and self._layer == 1
        output = self._encoder(tokens, **masked, **({} if last else {"output_hidden_states": True}))
        if self.pooled is None:
            self.pooled = getattr(output, "text_embeds", None)
        if last:
            return SimpleNamespace(last_hidden_state=output.last_hidden_state)
        states = output.hidden_states[-self._layer]
        norm = self._encoder.text_model.final_layer_norm if self._normalised else lambda states: states
        return SimpleNamespace(last_hidden_state=norm(states))


def _arguments(
    pipeline: Any, pairs: list[tuple[Any, Any]], prompts: Mapping[str, Emphasis], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    parameters, name = parameters_of(pipeline), type(pipeline).__name__
    pooled = "pooled_prompt_embeds" in parameters
    # Only the prompt skips layers in diffusers.
    layers = {"prompt": clip_layer(kwargs.get("clip_skip"), name), "negative_prompt": clip_layer(None, name)}
    device = pipeline._execution_device  # an offloaded encoder's own is the CPU
    embedded = {
        field: _embedded(pairs, prompts[field], device, layer, normalised=not pooled) for field, layer in layers.items()
    }
    longest = max(len(parts) for parts, _ in embedded.values())
    answer: dict[str, Any] = {}
    for field, (parts, pool) in embedded.items():
        if len(parts) < longest:
            empty, _ = _embedded(pairs, parse(""), device, layers[field], normalised=not pooled)
            parts = parts + empty * (longest - len(parts))
        states = torch.cat(parts, dim=1)
        absent = field == "negative_prompt" and kwargs.get(field) is None
        if absent and getattr(pipeline.config, "force_zeros_for_empty_prompt", False):
            states, pool = torch.zeros_like(states), None if pool is None else torch.zeros_like(pool)
        answer |= {f"{field}_embeds": states} | ({f"{_POOLED[field]}": pool} if pooled else {})
    return {argument: value for argument, value in answer.items() if argument in parameters}


_POOLED = {"prompt": "pooled_prompt_embeds", "negative_prompt": "negative_pooled_prompt_embeds"}


def _embedded(
    pairs: list[tuple[Any, Any]], emphasis: Emphasis, device: torch.device, layer: int, *, normalised: bool
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Chunks of [1, 77, features of all encoders], at least one for each part, and the pooled embedding."""
    from compel.embeddings_provider import EmbeddingsProvider, SplitLongTextMode  # for those who send weights

    rows, pooled = [], None
    for tokenizer, encoder in pairs:
        reader = _Layer(encoder, device, layer, normalised=normalised)
        provider = EmbeddingsProvider(
            tokenizer, reader, truncate=False, device=device, split_long_text_mode=SplitLongTextMode.PHRASES
        )
        parts = []
        for part in emphasis.parts:
            fragments = [each for each in part if tokenizer(each.text, add_special_tokens=False).input_ids]
            fragments = fragments or [Fragment("", 1.0)]
            texts, factors = [each.text for each in fragments], [each.weight for each in fragments]
            try:
                states = provider.get_embeddings_for_weighted_prompt_fragments([texts], [factors], device=device)
            except RuntimeError as error:  # compel's word for tokens that it does not find again
                if is_out_of_memory(error):
                    raise
                raise DrawError(f"prompt: its weights cannot be read: {error}") from error
            parts.append(states)
        rows.append(torch.cat(parts, dim=1))
        pooled = reader.pooled
    chunk = int(pairs[0][0].model_max_length)
    return list(torch.split(torch.cat(rows, dim=-1), chunk, dim=1)), pooled

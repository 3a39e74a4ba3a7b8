"""How much of a prompt the text encoders read; the rest is cut off, and the caller gets a warning."""

from __future__ import annotations

import hashlib
import logging
import re
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from sfumato.pipelines.capabilities import parameters_of

log = logging.getLogger(__name__)

ENCODERS = {
    "tokenizer": "text_encoder",
    "tokenizer_2": "text_encoder_2",
    "tokenizer_3": "text_encoder_3",
    "tokenizer_4": "text_encoder_4",
    "prior_tokenizer": "prior_text_encoder",
}
"""Tokenizer → the encoder that reads its tokens; a pipeline may be loaded without some of them."""

UNLIMITED = 1_000_000
"""A tokenizer with a larger `model_max_length` has no limit."""

PLAIN = re.compile(r"CLIP|T5")
"""Tokenizers whose pipelines encode the text unchanged; others insert it into a chat, so more may be cut off."""


LIMIT = "max_sequence_length"
"""The argument of a pipeline that says how many tokens of a prompt its encoders read, CLIP's excepted."""

SCHNELL = 256
"""Tokens that a Flux without embedded guidance (schnell) was trained with; LocalAI sets it for `FluxPipeline`."""

CACHED_TEXTS = 64
"""Texts with cached tokens per tokenizer: the pictures of one request have the same prompt."""

_token_counts: weakref.WeakKeyDictionary[Any, OrderedDict[bytes, int]] = weakref.WeakKeyDictionary()


def usual_limit(pipeline_type: str | None, name: str, guidance_embeds: bool | None) -> int | None:
    """`max_sequence_length` where neither file nor request says it; None: the pipeline's own default.

    `pipeline_type` as the model file has it, `name` the class that draws, `guidance_embeds` of its denoiser.
    """
    schnell = name.startswith("Flux") and guidance_embeds is False
    return SCHNELL if schnell or pipeline_type == "FluxPipeline" else None


def capacity(pipeline: Any, options: Mapping[str, Any]) -> int | None:
    """Maximum tokens of the longest encoder, including start and end tokens; None if none is stated.

    `options`: arguments of the call; only `max_sequence_length` matters.
    """
    room = [room for _, room in _readers(pipeline, options)]
    return max(room) if room else None


def count(
    pipeline: Any, options: Mapping[str, Any], model: str, prompt: str, negative_prompt: str | None
) -> tuple[int, tuple[str, ...]]:
    """Tokens of both texts, and a warning for each text that every encoder cuts off. Tokenises each text once."""
    reader = max(_readers(pipeline, options), key=lambda reader: reader[1], default=None)
    if reader is None:
        return 0, ()
    tokenizer, room = reader
    qualifier = "" if PLAIN.search(type(tokenizer).__name__) else "at least "
    texts = {"prompt": prompt, "negative_prompt": negative_prompt or ""}
    try:
        counts = {field: _tokens(tokenizer, text) for field, text in texts.items() if text}
    except Exception as error:  # an unknown kind of tokenizer must not lose a finished picture
        log.info("%s: cannot count the tokens of a prompt: %s", model, type(error).__name__)
        return 0, ()
    return sum(counts.values()), tuple(
        f"{field}: {qualifier}{count - room} of {count} tokens were cut off; the text encoder of {model} takes {room}"
        for field, count in counts.items()
        if count > room
    )


def _tokens(tokenizer: Any, text: str) -> int:
    cache = _token_counts.setdefault(tokenizer, OrderedDict())
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    count = cache.pop(digest, None)
    if count is None:
        count = len(tokenizer(text, verbose=False).input_ids)
    cache[digest] = count
    while len(cache) > CACHED_TEXTS:
        cache.popitem(last=False)
    return count


def _readers(pipeline: Any, options: Mapping[str, Any]) -> Iterator[tuple[Any, int]]:
    """Each tokenizer with an encoder, and the maximum tokens of that encoder."""
    parameter = parameters_of(pipeline).get(LIMIT)
    limit = options.get(LIMIT, parameter.default if parameter else None)
    for name, encoder in ENCODERS.items():
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is None or getattr(pipeline, encoder, None) is None:
            continue
        # CLIP has a fixed number of positions; for others the pipeline decides how many tokens are read.
        fixed = "CLIP" in type(tokenizer).__name__ or not isinstance(limit, int)
        room = getattr(tokenizer, "model_max_length", UNLIMITED) if fixed else limit
        if isinstance(room, int) and room < UNLIMITED:
            yield tokenizer, room

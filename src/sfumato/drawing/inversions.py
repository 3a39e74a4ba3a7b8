"""Textual inversions in prompts: `embedding:name` as in ComfyUI, or the bare name as in AUTOMATIC1111.

Their vectors become tokens of the loaded model, named by the file's hash, which no prompt contains. Only a request that
names the embedding gets these tokens in place of the name, so other requests are not affected.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sfumato.batching import offload, torch_state
from sfumato.checkpoints import embeddings
from sfumato.checkpoints.sources import PICKLES
from sfumato.drawing.weights import FIELDS, encoders
from sfumato.errors import InvalidRequest, LoadError
from sfumato.models.load import Loaded

_EXPLICIT = re.compile(r"\bembedding:([^\s,()\[\]:|]+)", re.IGNORECASE)


def read(
    model: Loaded, pipeline: Any, kwargs: Mapping[str, Any], *, lenient: bool
) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
    """The arguments with tokens in place of names; `name:hash` of each embedding; warnings.

    Raises InvalidRequest for an `embedding:name` that is not there or does not fit; if `lenient`, and for bare names
    always, it is text, with a warning.
    """
    texts = {field: str(kwargs[field]) for field in FIELDS if kwargs.get(field)}
    names = embeddings.found(model.config.folder)
    if not names and not any(_EXPLICIT.search(text) for text in texts.values()):
        return dict(kwargs), (), ()
    pattern, by_name = _pattern(frozenset(names)), {name.casefold(): name for name in names}
    used: dict[str, str] = {}
    warnings: list[str] = []

    def replaced(field: str, match: re.Match[str]) -> str:
        name = by_name[match["name"].casefold()]
        try:
            tokens, digest = _tokens(model, pipeline, names[name])
        except LoadError as error:
            if match["explicit"] and not lenient:
                raise InvalidRequest(f"{field}: embedding {name!r}: {error.message}", param=field) from None
            warnings.append(f"{field}: {name!r} is read as text: {error.message}")
            return match[0]
        used[name] = digest
        return tokens

    for field, text in texts.items():
        texts[field] = pattern.sub(lambda match, field=field: replaced(field, match), text)  # type: ignore[misc]
        for unknown in _EXPLICIT.findall(pattern.sub("", text)):
            if unknown.casefold() in by_name:
                continue
            known = f"there are {', '.join(sorted(names)[:20])}" if names else "there are none"
            message = f"{field}: there is no embedding {unknown[:60]!r} in {embeddings.FOLDER}/ beside the model files"
            if not lenient:
                raise InvalidRequest(f"{message}; {known}", param=field)
            warnings.append(f"{message}; it is read as text")
    return {**kwargs, **texts}, tuple(f"{name}:{digest}" for name, digest in used.items()), tuple(warnings)


@functools.lru_cache(maxsize=16)
def _pattern(names: frozenset[str]) -> re.Pattern[str]:
    choices = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)"
    suffixes = "|".join(suffix.removeprefix(".") for suffix in embeddings.SAFE + PICKLES)
    return re.compile(
        rf"(?<![\w-])(?P<explicit>embedding:)?(?P<name>{choices})(?:\.(?:{suffixes}))?(?![\w-])", re.IGNORECASE
    )


def _tokens(model: Loaded, pipeline: Any, path: Path) -> tuple[str, str]:
    """The tokens of an embedding, loaded into the model if they are not yet, and the file's hash. Raises LoadError."""
    try:
        digest = embeddings.digest(path)
    except OSError as error:
        raise LoadError(f"{path.name} cannot be read: {error.strerror}") from None
    if digest not in model.state.embeddings:
        model.state.embeddings[digest] = _load(model, pipeline, path, digest)
    return model.state.embeddings[digest], digest


def _load(model: Loaded, pipeline: Any, path: Path, digest: str) -> str:
    """Load an embedding into the tokenizers and text encoders; returns its tokens. Raises LoadError."""
    targets = encoders(pipeline)
    if not targets or not hasattr(model.pipeline, "load_textual_inversion"):
        raise LoadError(
            f"{model.config.name} ({type(pipeline).__name__}) takes none: they are for Stable Diffusion's CLIP encoders"
        )
    vectors = embeddings.vectors(path, model.config)
    by_encoder = _by_encoder(model, targets, vectors, path)
    count = len(next(iter(by_encoder.values())))
    tokens = [f"<embedding-{digest[:16]}-{number}>" for number in range(count)]
    random_state = torch_state.random()  # new rows are initialised at random before they are set
    try:
        # Parameters made in inference mode could not be changed outside of it.
        with torch.inference_mode(False), torch.no_grad():
            for tokenizer_name, encoder_name in targets:
                tokenizer, encoder = (getattr(model.pipeline, name) for name in (tokenizer_name, encoder_name))
                _align(tokenizer, encoder)
                if tokens[0] in tokenizer.get_vocab():  # of another model, or the second encoder failed the last time
                    continue
                # All rows are set below: a distribution to draw them from would take seconds to compute.
                encoder.resize_token_embeddings(len(tokenizer) + count, mean_resizing=False)
                model.pipeline.load_textual_inversion(
                    [{token: row} for token, row in zip(tokens, by_encoder[encoder_name], strict=True)],
                    token=tokens, tokenizer=tokenizer, text_encoder=encoder,
                )  # fmt: skip
                _ADDED[encoder] += tokens
    finally:
        torch_state.set_random(random_state)
    if offload.enabled(model.pipeline):  # diffusers has attached its hooks anew
        offload.enable(model.pipeline, model.device)
    return " ".join(tokens)


_ADDED: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()
"""Text encoder → the tokens of the rows that embeddings have added to it, in their order."""


def _align(tokenizer: Any, encoder: Any) -> None:
    """Give a tokenizer a token for each row of the encoder, so that the next token is the next row.

    Models that share an encoder have tokenizers of their own, and one that is loaded again has a new one: rows that
    the others have added keep their tokens, and are not added again.
    """
    added = _ADDED.setdefault(encoder, [])
    if (missing := encoder.get_input_embeddings().weight.shape[0] - len(tokenizer)) > 0:
        unused = [f"<row-{len(tokenizer) + number}>" for number in range(missing - len(added))]
        tokenizer.add_tokens([*unused, *added[-missing:]])


def _by_encoder(
    model: Loaded, targets: list[tuple[str, str]], vectors: Mapping[str, Any], path: Path
) -> dict[str, torch.Tensor]:
    keys = dict(zip(("text_encoder", "text_encoder_2"), embeddings.XL, strict=True))
    single = len(targets) == 1 and len(vectors) == 1
    chosen = {name: vectors["" if single else keys[name]] for _, name in targets if single or keys[name] in vectors}
    widths = {name: getattr(model.pipeline, name).get_input_embeddings().weight.shape[-1] for _, name in targets}
    fits = all(name in chosen and chosen[name].shape[-1] == width for name, width in widths.items())
    foreign = len(vectors) > len(targets) and "text_encoder_2" not in widths  # one for XL on Stable Diffusion 1
    if not fits or foreign:
        has = " and ".join(str(tensor.shape[-1]) for tensor in vectors.values())
        takes = " and ".join(str(width) for width in widths.values())
        raise LoadError(f"{path.name} is for text encoders of {has} features; {model.config.name} has {takes}")
    return chosen

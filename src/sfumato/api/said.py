"""Read the generation parameters of a picture file as request fields: from Sfumato, AUTOMATIC1111, InvokeAI, and
from ComfyUI if the file has AUTOMATIC1111's infotext.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sfumato import schedulers
from sfumato.api.a1111.samplers import choose
from sfumato.core import MAX_SEED
from sfumato.errors import InvalidPicture
from sfumato.pictures import recipe
from sfumato.sampling import PARAMETERS

INVOKE_CHUNKS = ("invokeai_metadata", "invokeai", "sd-metadata")
"""Chunks where InvokeAI writes its JSON: version 3 and later, some of 3, version 2."""

MAX_TEXT = 1_000_000
"""Maximum characters of one chunk."""


@dataclass(frozen=True, slots=True)
class Said:
    """`source`: the program that wrote it; `fields`: request fields; `warnings`: what could not be used."""

    source: str
    fields: dict[str, Any]
    warnings: tuple[str, ...] = field(default=())


def read(texts: Mapping[str, str]) -> Said:
    """Parse the result of `recipe.texts`. Raises InvalidPicture if nothing in it is understood."""
    texts = {name: text for name, text in texts.items() if len(text) <= MAX_TEXT}
    for reader in (_ours, _invoke, _infotext):
        if said := reader(texts):
            return said
    if "workflow" in texts or "prompt" in texts:
        raise InvalidPicture(
            "image: it contains a ComfyUI workflow but no AUTOMATIC1111 infotext, and only that can be read. Save it "
            "with a node that writes the infotext.",
            param="image",
        )
    raise InvalidPicture(
        "image: it does not say how it was made. Sfumato, AUTOMATIC1111, InvokeAI and some ComfyUI nodes write that "
        "into their files; chat programs and editors remove it.",
        param="image",
    )


def _ours(texts: Mapping[str, str]) -> Said | None:
    made = _object(texts.get(recipe.RECIPE_CHUNK))
    if made is None:
        return None
    from_picture = bool(made.get("image_sha256"))
    wanted = {name: made.get(name) for name in ("model", "prompt", "seed")}
    wanted |= {each.name: made.get(each.name) for each in PARAMETERS if from_picture or not each.source}
    wanted["scheduler"] = schedulers.canonical_name(made.get("scheduler"))
    sources = ("it was made from a picture, which is needed again for the same one",) if from_picture else ()
    return Said("sfumato", _clean(wanted), sources)


def _infotext(texts: Mapping[str, str]) -> Said | None:
    text = texts.get(recipe.INFOTEXT_CHUNK, "")
    pairs = recipe.parse(text) if text.strip() else {}
    if not pairs.get("Steps") and not pairs.get("Seed"):
        return None
    chosen = choose(pairs.get("Sampler"), pairs.get("Schedule type"))
    wanted: dict[str, Any] = {"model": pairs.get("Model"), "prompt": pairs.get("Prompt"), "seed": pairs.get("Seed")}
    wanted |= {"width": pairs.get("Size-1"), "height": pairs.get("Size-2"), "scheduler": chosen.scheduler}
    wanted |= {"negative_prompt": pairs.get("Negative prompt")}
    for each in PARAMETERS:
        if each.infotext:
            value = pairs.get(each.infotext)
            wanted[each.name] = (_number(int, value) or 1) - 1 or None if each.one_based else value
    comfy = "ComfyUI" in pairs.get("Version", "") or "workflow" in texts
    return Said("comfyui" if comfy else "automatic1111", _clean(wanted), chosen.warnings)


def _invoke(texts: Mapping[str, str]) -> Said | None:
    made = next((found for name in INVOKE_CHUNKS if (found := _object(texts.get(name))) is not None), None)
    if made is None:
        return None
    inner = made.get("image")
    flat = inner if isinstance(inner, dict) else made  # version 2 keeps all of it one level deeper
    prompt = flat.get("positive_prompt", flat.get("prompt"))
    if isinstance(prompt, list):  # version 2: parts with weights, and the negative prompt in brackets
        prompt = ", ".join(str(part.get("prompt", "")) for part in prompt if isinstance(part, dict))
    named = made.get("model", made.get("model_weights"))
    model = named.get("name", named.get("model_name")) if isinstance(named, dict) else named
    wanted = {"model": model, "prompt": prompt, "seed": flat.get("seed")}
    wanted |= {each.name: flat.get(each.invoke) for each in PARAMETERS if each.invoke}
    name = str(flat.get("scheduler", flat.get("sampler")) or "")
    scheduler, warnings = _of_invoke(name)
    return Said("invokeai", _clean(wanted | {"scheduler": scheduler}), warnings)


def _of_invoke(name: str) -> tuple[str | None, tuple[str, ...]]:
    """`dpmpp_2m_k` there is `k_dpmpp_2m` here."""
    if not name:
        return None, ()
    plain = name.removeprefix("k_")
    for ours in (f"k_{plain[:-2]}" if plain.endswith("_k") else plain, plain.removesuffix("_k")):
        if known := schedulers.canonical_name(ours):
            return known, ()
    return None, (f"scheduler: {name[:80]!r} does not exist here; the model's own is used",)


def _object(text: str | None) -> dict[str, Any] | None:
    try:
        found = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _number(kind: Callable[[Any], Any], value: Any) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _side(value: Any) -> int | None:
    found = _number(int, value)
    return found if found is not None and 0 < found < 100_000 else None


def _seed(value: Any) -> int | None:
    found = _number(int, value)
    return found if found is not None and 0 <= found <= MAX_SEED else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _real(value: Any) -> float | None:
    found = _number(float, value)
    return found if found is not None and abs(found) < 1e6 else None  # excludes infinity and NaN


KINDS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        **{each.name: {str: _text, int: _side, float: _real}[each.kind] for each in PARAMETERS},
        **{"model": _text, "prompt": _text, "seed": _seed},
    }
)
"""Field → function that converts another program's value; None if it cannot be used."""


def _clean(wanted: Mapping[str, Any]) -> dict[str, Any]:
    return {name: KINDS[name](value) for name, value in wanted.items() if KINDS[name](value) is not None}

"""Read the generation parameters of a picture file as request fields: from Sfumato, AUTOMATIC1111, InvokeAI, and
from ComfyUI if the file has AUTOMATIC1111's infotext.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from pydantic_core import from_json

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


PENULTIMATE_MODELS = re.compile(r"xl|pony|illustrious|noob|sd3", re.IGNORECASE)
"""Names of models that read the last but one layer by themselves: an infotext counts layers from the last one, and says
no more of a model than its name. Others are taken for Stable Diffusion 1."""


HIRES = "enable_hr: it was drawn in two passes, which AUTOMATIC1111's route txt2img and `sfumato generate --like` do"

WEIGHTS = "prompt: its weights are read on AUTOMATIC1111's routes; on others they are text"


@dataclass(frozen=True, slots=True)
class FileParameters:
    """`source`: the program that wrote it; `fields`: request fields; `warnings`: what could not be used."""

    source: str
    fields: dict[str, Any]
    warnings: tuple[str, ...] = field(default=())


def read(texts: Mapping[str, str]) -> FileParameters:
    """Parse the result of `recipe.texts`. Raises InvalidPicture if nothing in it is understood."""
    texts = {name: text for name, text in texts.items() if len(text) <= MAX_TEXT}
    for reader in (_ours, _invoke, _infotext):
        if parameters := reader(texts):
            return parameters
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


def _ours(texts: Mapping[str, str]) -> FileParameters | None:
    metadata = _object(texts.get(recipe.RECIPE_CHUNK))
    if metadata is None:
        return None
    from_picture = bool(metadata.get("image_sha256"))
    fields = {name: metadata.get(name) for name in ("model", "prompt", "seed")}
    fields |= {each.name: metadata.get(each.name) for each in PARAMETERS if from_picture or not each.source}
    fields["scheduler"] = schedulers.canonical_name(metadata.get("scheduler"))
    sources = ("it was made from a picture, which is needed again for the same one",) if from_picture else ()
    marked = (WEIGHTS,) if metadata.get("weights") else ()
    twice = (HIRES,) if metadata.get("hires") else ()
    return FileParameters("sfumato", _convert(fields), sources + marked + twice)


def _infotext(texts: Mapping[str, str]) -> FileParameters | None:
    text = texts.get(recipe.INFOTEXT_CHUNK, "")
    pairs = recipe.parse(text) if text.strip() else {}
    if not pairs.get("Steps") and not pairs.get("Seed"):
        return None
    choice = choose(pairs.get("Sampler"), pairs.get("Schedule type"))
    fields: dict[str, Any] = {"model": pairs.get("Model"), "prompt": pairs.get("Prompt"), "seed": pairs.get("Seed")}
    fields |= {"width": pairs.get("Size-1"), "height": pairs.get("Size-2"), "scheduler": choice.scheduler}
    fields |= {"negative_prompt": pairs.get("Negative prompt")}
    for parameter in PARAMETERS:
        if parameter.infotext:
            value = pairs.get(parameter.infotext)
            fields[parameter.name] = (_number(int, value) or 1) - 1 or None if parameter.one_based else value
    comfy = "ComfyUI" in pairs.get("Version", "") or "workflow" in texts
    if fields["clip_skip"] and PENULTIMATE_MODELS.search(pairs.get("Model", "")):
        fields["clip_skip"] -= 1
    twice = (HIRES,) if "Hires upscaler" in pairs else ()
    return FileParameters("comfyui" if comfy else "automatic1111", _convert(fields), (*choice.warnings, *twice))


def _invoke(texts: Mapping[str, str]) -> FileParameters | None:
    metadata = next((parsed for name in INVOKE_CHUNKS if (parsed := _object(texts.get(name))) is not None), None)
    if metadata is None:
        return None
    inner = metadata.get("image")
    flat = inner if isinstance(inner, dict) else metadata  # version 2 keeps all of it one level deeper
    prompt = flat.get("positive_prompt", flat.get("prompt"))
    if isinstance(prompt, list):  # version 2: parts with weights, and the negative prompt in brackets
        prompt = ", ".join(str(part.get("prompt", "")) for part in prompt if isinstance(part, dict))
    entry = metadata.get("model", metadata.get("model_weights"))
    model = entry.get("name", entry.get("model_name")) if isinstance(entry, dict) else entry
    fields = {"model": model, "prompt": prompt, "seed": flat.get("seed")}
    fields |= {each.name: flat.get(each.invoke) for each in PARAMETERS if each.invoke}
    name = str(flat.get("scheduler", flat.get("sampler")) or "")
    scheduler, warnings = _of_invoke(name)
    return FileParameters("invokeai", _convert(fields | {"scheduler": scheduler}), warnings)


def _of_invoke(name: str) -> tuple[str | None, tuple[str, ...]]:
    """`dpmpp_2m_k` there is `k_dpmpp_2m` here."""
    if not name:
        return None, ()
    plain = name.removeprefix("k_")
    for candidate in (f"k_{plain[:-2]}" if plain.endswith("_k") else plain, plain.removesuffix("_k")):
        if scheduler := schedulers.canonical_name(candidate):
            return scheduler, ()
    return None, (f"scheduler: {name[:80]!r} does not exist here; the model's own is used",)


def _object(text: str | None) -> dict[str, Any] | None:
    try:
        parsed = from_json(text) if text else None
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _number(kind: Callable[[Any], Any], value: Any) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _side(value: Any) -> int | None:
    number = _number(int, value)
    return number if number is not None and 0 < number < 100_000 else None


def _seed(value: Any) -> int | None:
    number = _number(int, value)
    return number if number is not None and 0 <= number <= MAX_SEED else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _finite(value: Any) -> float | None:
    number = _number(float, value)
    return number if number is not None and abs(number) < 1e6 else None  # excludes infinity and NaN


CONVERTERS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        **{each.name: {str: _text, int: _side, float: _finite}[each.kind] for each in PARAMETERS},
        **{"model": _text, "prompt": _text, "seed": _seed},
    }
)
"""Field → function that converts another program's value; None if it cannot be used."""


def _convert(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: CONVERTERS[name](value) for name, value in fields.items() if CONVERTERS[name](value) is not None}

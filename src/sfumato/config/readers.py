"""One function per type of value. Each returns the typed value or raises ValueError saying what is valid.

Absent values (null, or an empty string as in LocalAI) never get here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import PurePosixPath
from typing import Any, TypeAlias
from urllib.parse import urlparse

from sfumato.config import addresses
from sfumato.config.model import Download, FeatureCache
from sfumato.config.scalar import scalar
from sfumato.core import MAX_SEED, QUALITIES, keep_alive_seconds
from sfumato.errors import did_you_mean, in_words

Reader: TypeAlias = Callable[[Any], Any]

DTYPES: Mapping[str, str | None] = {
    "auto": None,
    **dict.fromkeys(("fp16", "f16", "float16", "half"), "fp16"),
    **dict.fromkeys(("bf16", "bfloat16"), "bf16"),
    **dict.fromkeys(("fp32", "f32", "float32", "float"), "fp32"),
}

OFFLOADS: Mapping[str, str | None] = {"auto": None, "none": "none", "model": "model", "group": "group"}

STORAGE_DTYPES: Mapping[str, str] = {
    **dict.fromkeys(("fp8", "float8", "fp8_e4m3", "float8_e4m3fn"), "fp8"),
    **dict.fromkeys(("fp8_e5m2", "float8_e5m2"), "fp8_e5m2"),
}

RUNNERS = ("eager", "openvino", "compile", "auto")
"""Values of `accelerate`."""

QUANTIZATIONS: Mapping[str, str | None] = {"none": None, **{name: name for name in ("int8", "fp8", "nf4", "fp4")}}

OF_LANGUAGE_MODELS = frozenset({
    "awq", "gptq", "bitsandbytes", "marlin", "gguf", "squeezellm", "aqlm", "deepspeedfp", "compressed-tensors",
    "experts_int8", "awq_marlin", "gptq_marlin", "modelopt", "hqq", "fbgemm_fp8", "ptpc_fp8", "torchao",
})  # fmt: skip
"""Values of `quantization` that LocalAI passes to vLLM."""

EVERY = "*"

_NOT_ARGUMENTS = frozenset({"size", "seed", "n", "scheduler", "scheduler_type", "schedule", "quality"})
"""What requests may say that is no argument of the pipeline call."""

_ARGUMENTS = {"step": "num_inference_steps", "steps": "num_inference_steps", "cfg_scale": "guidance_scale"}

MAX_SIDE = 16384
_NAME = re.compile(r"(?!\s)[^\x00-\x1f\x7f\ud800-\udfff]{1,200}(?<!\s)")
_SIZE = re.compile(r"([0-9]{1,6})[xX×]([0-9]{1,6})")
_CACHE_KEY = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,200}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


def shorten(value: Any) -> str:
    """The value as text for an error message: short, and never raises."""
    return addresses.redact(in_words(value))


def string(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float | date) and not isinstance(value, bool):
        return str(value)
    raise ValueError("needs text; put quotes around it")


def name(value: Any) -> str:
    text = string(value)
    if not _NAME.fullmatch(text):
        raise ValueError("needs a name of 1 to 200 printable characters, no space at either end")
    return text


TEXTS: tuple[Reader, ...] = (string, name)
"""Those that want a value as it is written, whatever YAML takes it for."""


def flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError("needs true or false, without quotes")


def keep_alive(value: Any) -> float:
    try:
        return keep_alive_seconds(value)
    except ValueError as error:
        raise ValueError(f"{shorten(value)}: {error}") from None


def number(minimum: float, maximum: float = math.inf) -> Reader:
    """A finite number from `minimum` to `maximum`."""

    def read(value: Any) -> float:
        # YAML 1.1 reads 1e-3 as text.
        parsed = scalar(value) if isinstance(value, str) else value
        valid = f"needs a number {_range(minimum, maximum)}"
        if isinstance(parsed, bool) or not isinstance(parsed, int | float):
            raise ValueError(valid)
        if not minimum <= parsed <= maximum or not math.isfinite(parsed):
            raise ValueError(valid)
        try:
            return float(parsed)
        except OverflowError:
            raise ValueError(valid) from None

    return read


def integer(minimum: int, maximum: int | None = None, *, absent: int | None = None) -> Reader:
    """A whole number from `minimum` to `maximum`; `absent` is the number that stands for "not set"."""

    def read(value: Any) -> int | None:
        parsed = scalar(value) if isinstance(value, str) else value
        if isinstance(parsed, float) and parsed.is_integer():
            parsed = int(parsed)
        valid = f"needs a whole number {_range(minimum, maximum)}"
        if isinstance(parsed, bool) or not isinstance(parsed, int):
            raise ValueError(valid)
        if parsed == absent:
            return None
        if parsed < minimum or (maximum is not None and parsed > maximum):
            raise ValueError(valid)
        return parsed

    return read


def _range(minimum: float, maximum: float | None) -> str:
    return f"from {minimum:g} up" if maximum is None or maximum == math.inf else f"from {minimum:g} to {maximum:g}"


def ratios(value: Any) -> tuple[float, ...]:
    """A list of numbers, one for each step of the run that they were measured in."""
    if not isinstance(value, list) or not 2 <= len(value) <= 1000:
        raise ValueError("needs a list of 2 to 1000 numbers, one for each step of the run that they were measured in")
    read = number(0, 100)
    return tuple(read(item) for item in value)


CACHES: Mapping[str, Mapping[str, Reader]] = {
    "first_block": {"threshold": number(0, 10)},
    "taylorseer": {
        "cache_interval": integer(1, 1000),
        "disable_cache_before_step": integer(1, 1000),
        "disable_cache_after_step": integer(1, 1000),
        "max_order": integer(0, 4),
        "use_lite_mode": flag,
    },
    "magcache": {
        "threshold": number(0, 10),
        "max_skip_steps": integer(1, 1000),
        "retention_ratio": number(0, 1),
        "mag_ratios": ratios,
    },
}
"""Feature caches → their settings, by diffusers' names (`FirstBlockCacheConfig`, `TaylorSeerCacheConfig`,
`MagCacheConfig`)."""

NO_CACHES: Mapping[str, str] = {
    "pyramid_attention_broadcast": "it has one state for all requests, and the call without the prompt gets the "
    "attention of the call with it",
    "faster_cache": "it has one state for all requests, and fails where a step has one row in each call",
    "sea_cache": "it is for films: diffusers has an adapter for Cosmos 3 alone",
    "text_kv_cache": "it is for Nucleus-MoE alone, and knows a text by its address, which another request may get",
}
"""Those of diffusers that are not offered → why."""

seed = integer(0, MAX_SEED, absent=-1)
"""-1 is LocalAI's value for a random seed."""


def qualities(value: Any) -> tuple[tuple[str, int], ...]:
    """A mapping from names in `QUALITIES` to denoising steps, in the table's order."""
    if not isinstance(value, dict):
        raise ValueError("needs `name: steps` lines, e.g. {low: 10, high: 40}")
    read = integer(1, 10_000)
    steps = {}
    for quality, number in value.items():
        if quality not in QUALITIES:
            near = did_you_mean(quality, QUALITIES) if isinstance(quality, str) else ""
            raise ValueError(f"{shorten(quality)} is not one of {', '.join(QUALITIES)}.{near}")
        try:
            steps[quality] = read(number)
        except ValueError as error:
            raise ValueError(f"{quality} {error}") from None
    return tuple((quality, steps[quality]) for quality in QUALITIES if quality in steps)


def gpu(value: Any) -> int:
    text = str(value).removeprefix("cuda:") if isinstance(value, int | str) else ""
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,3}", text):
        raise ValueError("needs the number of a GPU: 0, 1, ...")
    return int(text)


def one_of(choices: Mapping[str, Any]) -> Reader:
    def read(value: Any) -> Any:
        choice = str(value).removeprefix("torch.").lower() if isinstance(value, str) else ""
        if choice not in choices:
            raise ValueError(f"is not one of {', '.join(choices)}.{did_you_mean(choice, choices)}")
        return choices[choice]

    return read


dtype = one_of(DTYPES)
offload = one_of(OFFLOADS)
prediction_type = one_of({**{word: word for word in ("epsilon", "v_prediction", "sample", "flow_prediction")},
                          "v": "v_prediction", "v_pred": "v_prediction", "eps": "epsilon"})  # fmt: skip
timestep_spacing = one_of({word: word for word in ("leading", "trailing", "linspace")})


def layerwise_casting(value: Any) -> str | None:
    """The dtype of the stored weights; `true` is fp8."""
    if isinstance(value, bool):
        return "fp8" if value else None
    stored: str = one_of(STORAGE_DTYPES)(value)
    return stored


def quantization(value: Any) -> str | None:
    """A way to quantise; vLLM's are left as they are, for `parse` to tell of."""
    if isinstance(value, str) and value.lower() in OF_LANGUAGE_MODELS:
        return value.lower()
    chosen: str | None = one_of(QUANTIZATIONS)(value)
    return chosen


def cache(value: Any) -> FeatureCache | None:
    """The name of a feature cache, or a mapping with it as `type` and settings beside it."""
    if value in (False, "none"):
        return None
    settings = dict(value) if isinstance(value, dict) else {"type": value}
    named = settings.pop("type", None)
    if isinstance(named, str) and (why := NO_CACHES.get(named.lower())):
        raise ValueError(f"diffusers' {named.lower()} is not offered: {why}. Use {', '.join(CACHES)}")
    kind: str = one_of({name: name for name in CACHES})(named)
    readers = CACHES[kind]
    for name in settings.keys() - readers.keys():
        raise ValueError(f"{kind} has no setting {shorten(name)}; it has {', '.join(readers)}")
    try:
        return FeatureCache(
            kind, tuple((name, read(settings[name])) for name, read in readers.items() if name in settings)
        )
    except ValueError as error:
        raise ValueError(f"{kind}: {error}") from None


accelerate: Reader = one_of({name: name for name in RUNNERS})


def size(value: Any) -> tuple[int, int] | None:
    """`WIDTHxHEIGHT` in pixels; `auto` is the model's own size."""
    if value == "auto":
        return None
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    sides = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(1 <= side <= MAX_SIDE for side in sides):
        raise ValueError(f'needs a size such as "512x768", each side from 1 to {MAX_SIDE} pixels')
    return sides


def names(value: Any) -> tuple[str, ...]:
    """One name, or a list of names."""
    return tuple(dict.fromkeys(name(item) for item in (value if isinstance(value, list) else [value])))


def strings(value: Any) -> tuple[str, ...]:
    return tuple(string(item) for item in (value if isinstance(value, list) else [value]))


def one_or_more(value: Any) -> str | tuple[str, ...]:
    return strings(value) if isinstance(value, list) else string(value)


def numbers(minimum: float, maximum: float) -> Reader:
    """As `number`, one or a list of them."""
    read = number(minimum, maximum)
    return lambda value: tuple(read(item) for item in (value if isinstance(value, list) else [value]))


def parameters(value: Any) -> frozenset[str]:
    """Names of pipeline arguments: "a,b", a list, or `none`."""
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError('needs names separated by commas, e.g. "negative_prompt,num_inference_steps,image"')
    arguments = [item.strip() for item in value if item.strip()]
    for argument in arguments:
        if not argument.isidentifier():
            raise ValueError(f"{shorten(argument)} is not the name of a pipeline argument")
    return frozenset(argument for argument in arguments if argument != "none")


def locked(value: Any) -> frozenset[str]:
    """Names of pipeline arguments, of which the file's own words are taken too; `true` is all that `options` sets."""
    if isinstance(value, bool):
        return frozenset({EVERY} if value else ())
    names = parameters(value)
    if useless := names & _NOT_ARGUMENTS:
        raise ValueError(
            f"{', '.join(sorted(useless))} cannot be locked: only arguments of the pipeline call can, "
            "such as num_inference_steps, guidance_scale, width, height"
        )
    return frozenset(_ARGUMENTS.get(argument, argument) for argument in names)


def options(value: Any) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Of a list: its `key:value`, the value may hold colons; and its words without a colon.

    The last of several with one key counts.
    """
    if not isinstance(value, list):
        raise ValueError('needs a list with one "key:value" a line')
    switches = [item for item in value if isinstance(item, str) and ":" not in item]
    return tuple(dict(_option(item) for item in value if item not in switches).items()), tuple(switches)


def _option(item: Any) -> tuple[str, str]:
    if isinstance(item, dict) and len(item) == 1:  # `- key: value`: the space makes it a mapping
        (key, value), *_ = item.items()
        text = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        item = f"{key}:{text}" if not isinstance(value, list | dict) else None
    key, colon, text = item.partition(":") if isinstance(item, str) else ("", "", "")
    if not colon or not key.strip().isidentifier():
        raise ValueError(f'{shorten(item)} is not "key:value" with the name of a pipeline argument as key')
    return key.strip(), text.strip()


def downloads(value: Any) -> tuple[Download, ...]:
    if not isinstance(value, list):
        raise ValueError("needs a list of {filename, uri, sha256}")
    return tuple(_download(item) for item in value)


def _download(item: Any) -> Download:
    if not isinstance(item, dict) or not isinstance(item.get("uri"), str) or not item["uri"]:
        raise ValueError(f"{shorten(item)} needs a `uri`, and may have `filename` and `sha256`")
    for key in item:
        if key not in ("uri", "filename", "sha256"):
            raise ValueError(f"unknown key {shorten(key)}; an entry has uri, filename and sha256")
    filename = string(item.get("filename") or PurePosixPath(urlparse(item["uri"]).path).name)
    path = PurePosixPath(filename)
    if not path.name or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"filename {shorten(filename)} must stay in the model file's folder")
    sha256 = item.get("sha256") or None
    if sha256 is not None and not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
        raise ValueError(f"sha256 {shorten(sha256)} is not 64 hexadecimal digits")
    return Download(item["uri"], str(path), sha256.lower() if sha256 else None)


def artifacts(value: Any) -> tuple[str, str | None, str | None]:
    """LocalAI's managed snapshot -> (hub id, revision, path of what it has fetched).

    Others beside the one for `model` are not for us. A `resolved` commit wins over the revision that was asked for.
    """
    entries = value if isinstance(value, list) else [value]
    model_entries = [item for item in entries if isinstance(item, dict) and (item.get("target") or "model") == "model"]
    source = model_entries[0].get("source") if len(model_entries) == 1 else None
    if not isinstance(source, dict) or source.get("type", "huggingface") != "huggingface":
        raise ValueError("needs one entry for `model` with source: {type: huggingface, repo: owner/name}")
    repo = source.get("repo")
    if not isinstance(repo, str):
        raise ValueError(f"repo {shorten(repo)} is not owner/name")
    for prefix in ("https://huggingface.co/", "huggingface://", "hf://"):
        repo = repo.removeprefix(prefix)
    if repo.strip("/").count("/") != 1:
        raise ValueError(f"repo {shorten(repo)} is not owner/name")
    resolved = model_entries[0].get("resolved") or {}
    if not isinstance(resolved, dict):
        raise ValueError(f"resolved {shorten(resolved)} needs `revision` and `cache_key`")
    key, revision = resolved.get("cache_key"), resolved.get("revision") or source.get("revision")
    if key and not (isinstance(key, str) and _CACHE_KEY.fullmatch(key)):
        raise ValueError(f"cache_key {shorten(key)} is not the name of a folder")
    snapshot = f".artifacts/huggingface/{key}/snapshot" if key else None
    return repo.strip("/"), string(revision) if revision else None, snapshot

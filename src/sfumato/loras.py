"""LoRAs of a request: what names one, how strongly it acts, and AUTOMATIC1111's way to write it into a prompt."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from sfumato.errors import InvalidRequest

MAX_LORAS = 10
"""Per picture. Each adds to the work of every step."""

MAX_WEIGHT = 10.0
"""Of a LoRA, in both directions; 1 is as trained."""

MAX_NAME = 1024
"""Characters."""

_TAG = re.compile(r"<(?:lora|lyco):([^<>:]*)((?::[^<>:]*)*)>", re.IGNORECASE)

_SUFFIX = re.compile(r"\.(safetensors|sft)$", re.IGNORECASE)
_URL = re.compile(r"https?://", re.IGNORECASE)
_HUB_SCHEME = re.compile(r"^(huggingface|hf):/{0,2}", re.IGNORECASE)
_HASHED = re.compile(r"(.+)-([0-9a-f]{12})")


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA that a request names; the fields after the weights are known once its file is there."""

    source: str
    """Name in the folder `loras`, path below it, hub id with or without a file, URL, or name of one of the model's."""
    weight: float = 1.0
    """How strongly it acts on the denoiser: 1 is as trained, negative is the opposite."""
    text_weight: float | None = None
    """How strongly it acts on the text encoders; None: as `weight`."""
    file: str = ""
    """Path on this disk; empty for one of the model file's own."""
    sha256: str = ""
    """Of the file."""
    short_hash: str = ""
    """Twelve digits that the community's tools know it by: of the file without its header."""
    default: int | None = None
    """Number of the model file's LoRA that this is."""
    stamp: tuple[int, int, int] | None = field(default=None, compare=False)
    """Of the file when its hashes were taken: its size, time of change and inode."""

    @property
    def name(self) -> str:
        return name_of(self.source)

    @property
    def weight_of_text(self) -> float:
        return self.weight if self.text_weight is None else self.text_weight

    @property
    def tag_name(self) -> str:
        """What a tag can name it by, so that it is found again: of a URL, which has colons, by its short hash."""
        if _URL.match(self.source):
            return f"{self.name}-{self.short_hash}" if self.short_hash else self.name
        path = _HUB_SCHEME.sub("", self.source)
        return self.name if "/" not in path or set("<>:,") & set(path) else path

    @property
    def tag(self) -> str:
        """As AUTOMATIC1111 writes it into a prompt: the weight of the text encoders comes first."""
        weights = [self.weight_of_text] if self.weight_of_text == self.weight else [self.weight_of_text, self.weight]
        return f"<lora:{self.tag_name}{''.join(f':{weight:g}' for weight in weights)}>"


def name_of(source: str) -> str:
    """The last part of a path, id or URL, without a suffix."""
    path = urlsplit(source).path if _URL.match(source) else source
    return _SUFFIX.sub("", PurePosixPath(re.sub(r"@[^/]*", "", path).rstrip("/")).name)


def hashed(name: str) -> tuple[str, str] | None:
    """Name and short hash of what `Lora.tag_name` has made of a URL's LoRA; None if it is no such name."""
    match = _HASHED.fullmatch(name)
    return (match[1], match[2]) if match else None


def not_named_by(recorded: Iterable[Lora], tags: Iterable[Lora]) -> list[Lora]:
    """Those of a recipe that no tag of a new prompt names: a tag says anew how strongly its LoRA acts."""
    names = {name.casefold() for tag in tags for name in (tag.source, tag.name)}
    return [each for each in recorded if not names & {each.source.casefold(), each.name.casefold(), each.tag_name}]


def read_tags(prompt: str, field: str = "prompt") -> tuple[str, tuple[Lora, ...]]:
    """The prompt without `<lora:name:0.8>`, and the LoRAs. Raises InvalidRequest naming `field` for a tag that says no
    weight.

    As in AUTOMATIC1111 one number is for all, of two the first is for the text encoders and the second for the
    denoiser; `te=` and `unet=` name them.
    """
    loras = tuple(_of_tag(match, field) for match in _TAG.finditer(prompt))
    if not loras:
        return prompt, ()
    return re.sub(r"(?<=[^ ]) {2,}(?=[^ ])", " ", _TAG.sub("", prompt)).strip(), loras


def _of_tag(match: re.Match[str], field: str) -> Lora:
    numbers: list[float] = []
    named: dict[str, float] = {}
    for part in match[2].split(":")[1:]:
        key, equals, value = part.rpartition("=")
        try:
            number = float(value) if value.strip() else 1.0
        except ValueError:
            raise _bad_tag(field, match[0], f"{part[:40]!r} is no number") from None
        if not equals:
            numbers.append(number)
        elif key.strip() in ("te", "unet"):
            named[key.strip()] = number
        elif key.strip() != "dyn":
            raise _bad_tag(field, match[0], f"{key[:40]!r} is neither te nor unet")
    if not match[1].strip():
        raise _bad_tag(field, match[0], "it names no LoRA")
    text = named.get("te", numbers[0] if numbers else 1.0)
    weight = named.get("unet", numbers[1] if len(numbers) > 1 else text)
    return Lora(match[1].strip(), weight, None if text == weight else text)


def _bad_tag(field: str, tag: str, reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"{field}: {tag[:80]!r}: {reason}; <lora:name>, <lora:name:0.8> and <lora:name:0.8:0.6> (text encoders, "
        "denoiser) are valid",
        param=field,
    )


def checked(loras: Iterable[Lora]) -> tuple[Lora, ...]:
    """All of a picture's LoRAs; one that is named twice acts with the sum. Raises InvalidRequest naming `loras`."""
    by_source: dict[str, Lora] = {}
    for each in loras:
        if not each.source.strip() or len(each.source) > MAX_NAME:
            raise InvalidRequest(f"loras: a name has 1 to {MAX_NAME} characters", param="loras")
        before = by_source.get(each.source)
        by_source[each.source] = _sum(before, each) if before else each
    for lora in by_source.values():
        for weight in (lora.weight, lora.weight_of_text):
            if not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
                raise InvalidRequest(
                    f"loras: {lora.name[:80]}: weight {weight:g}; {-MAX_WEIGHT:g} to {MAX_WEIGHT:g} are valid",
                    param="loras",
                )
    if len(by_source) > MAX_LORAS:
        raise InvalidRequest(f"loras: {len(by_source)}; at most {MAX_LORAS} per picture", param="loras")
    return tuple(by_source.values())


def _sum(one: Lora, other: Lora) -> Lora:
    text = one.weight_of_text + other.weight_of_text
    weight = one.weight + other.weight
    return replace(one, weight=weight, text_weight=None if text == weight else text)


def of_defaults(loras: Iterable[Lora]) -> dict[int, Lora]:
    """Number of each of the model file's LoRAs that a request names → that; of one named twice the weights add up."""
    found: dict[int, Lora] = {}
    for lora in loras:
        if lora.default is not None:
            before = found.get(lora.default)
            found[lora.default] = _sum(before, lora) if before else lora
    return found

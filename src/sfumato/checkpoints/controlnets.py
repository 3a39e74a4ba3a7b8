"""ControlNets that requests name: in the folder `controlnets` beside the model files, or on the hub. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sfumato.checkpoints import diffusers_source, variants
from sfumato.errors import InvalidRequest

FOLDER = "controlnets"
DESCRIPTION = "config.json"

MAX_TOLD = 20
"""Names that a message lists."""

_HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^@\s]+))?")
_WEIGHTS = re.compile(r"diffusion_pytorch_model[^/]*\.safetensors")
_TITLE_SUFFIX = re.compile(r"\s*\[[0-9a-fA-F]*\]\s*$")
"""AUTOMATIC1111's clients send a hash behind the name."""


@dataclass(frozen=True, slots=True)
class HubNet:
    """A ControlNet's repository on the hub."""

    id: str
    revision: str | None = None


def listed(folder: Path) -> dict[str, Path]:
    """The ControlNets for the model files in `folder`: path below `controlnets/` -> folder in diffusers' layout."""
    root = folder / FOLDER
    descriptions = sorted(root.rglob(DESCRIPTION))
    return {path.parent.relative_to(root).as_posix(): path.parent for path in descriptions if class_of(path.parent)}


def class_of(folder: Path) -> str | None:
    """The diffusers class of a ControlNet's folder; None if it is none."""
    name = diffusers_source.json_of(folder / DESCRIPTION).get("_class_name")
    return name if isinstance(name, str) and "ControlNet" in name else None


def find(folder: Path, name: str, param: str) -> tuple[str, Path | HubNet]:
    """The ControlNet that a request names, as it is called here: by its path below `controlnets/`, by the last part of
    that, or as a hub id (`owner/name`, `owner/name@revision`). Raises InvalidRequest with `param`."""
    known = listed(folder)
    plain = without_hash(name)
    choices = [each for each in known if each.casefold() == plain.casefold()]
    choices = choices or [each for each in known if each.rpartition("/")[2].casefold() == plain.casefold()]
    if len(choices) > 1:
        raise InvalidRequest(f"{param}: {name[:100]!r} may be {' or '.join(choices)}; name one of them", param=param)
    if choices:
        return choices[0], known[choices[0]]
    if (match := _HUB.fullmatch(plain)) and not {"..", "."} & set(match["id"].split("/")):
        return plain, HubNet(match["id"], match["revision"])
    raise InvalidRequest(
        f"{param}: there is no ControlNet {name[:100]!r}. {available(folder)}; a hub id (owner/name) is valid too",
        param=param,
    )


def without_hash(name: str) -> str:
    """A name without the hash that AUTOMATIC1111's clients send behind it."""
    return _TITLE_SUFFIX.sub("", name).strip().strip("/")


def available(folder: Path) -> str:
    """The ControlNets beside the model files, in words."""
    return in_words(FOLDER, listed(folder))


def in_words(folder: str, known: Iterable[str]) -> str:
    """What there is in a folder beside the model files."""
    names = [*known]
    more = f" and {len(names) - MAX_TOLD} more" if len(names) > MAX_TOLD else ""
    told = f"there are {', '.join(names[:MAX_TOLD])}{more}" if names else "there are none"
    return f"In {folder}/ {told}"


def chosen(names: Iterable[str]) -> tuple[str | None, list[str]]:
    """The variant of a ControlNet's weights to load, and its safetensors files: the plain ones, else any variant."""
    files = {f"net/{name}": name for name in names if _WEIGHTS.fullmatch(name)}
    variant = variants.pick(files, (None,))
    return variant, [name for file, name in files.items() if variants.of(file) == variant]

"""ControlNets that requests name: in the folder `controlnets` beside the model files, or on the hub. Needs no torch.

Each is a folder in diffusers' layout, or one `.safetensors` file as AUTOMATIC1111's users have them.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from sfumato.checkpoints import diffusers_source, named_files, sources, variants, weight_file, weight_header
from sfumato.checkpoints.weight_header import Header
from sfumato.config import ModelConfig
from sfumato.errors import InvalidRequest, LoadError, did_you_mean

FOLDER = "controlnets"
DESCRIPTION = "config.json"
SUFFIXES = (".safetensors", ".sft")

MAX_TOLD = 20
"""Names that a message lists."""

REMEDY = (
    "What is read: .safetensors files with the names of the original ControlNets (control_model...) or of diffusers', "
    "and folders or repositories in diffusers' layout"
)

_HUB = re.compile(
    r"(?:(?:huggingface|hf):/{0,2})?(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^@\s/]+))?"
    r"(?:/(?P<file>[^@\s]+?)(?:@(?P<branch>[^@\s]+))?)?",
    re.IGNORECASE,
)
_WEIGHTS = re.compile(r"diffusion_pytorch_model[^/]*\.safetensors")
_TITLE_SUFFIX = re.compile(r"\s*\[[0-9a-fA-F]*\]\s*$")
"""AUTOMATIC1111's clients send a hash behind the name."""

ORIGINAL_PREFIX = "control_model."
"""Of the names in most original ControlNets; others have none."""

_CLASSES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ControlNetUnionModel": ("controlnet_cond_embedding.conv_in.weight", "task_embedding"),
        "ControlNetModel": ("controlnet_cond_embedding.conv_in.weight", "time_embedding.linear_1.weight"),
        "FluxControlNetModel": ("controlnet_x_embedder.weight", "x_embedder.weight", "controlnet_blocks.0.weight"),
        "QwenImageControlNetModel": ("controlnet_x_embedder.weight", "img_in.weight", "txt_norm.weight"),
        "SD3ControlNetModel": ("pos_embed_input.proj.weight", "controlnet_blocks.0.weight"),
    }
)
"""Class of diffusers -> the tensors that a file of it has in diffusers' names; the first that fits."""

_ORIGINAL = ("input_hint_block.0.weight", "time_embed.0.weight", "zero_convs.0.0.weight")
"""Tensors that a file with the original names has: a `ControlNetModel`."""

_OTHERS: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "a Control-LoRA, which holds only differences from a model": re.compile(r"^lora_controlnet$"),
        "a ControlLLLite": re.compile(r"^lllite_"),
        "a T2I-Adapter": re.compile(r"^(adapter\.)?body\.\d+\."),
        "a ControlNet of XLabs' layout for FLUX": re.compile(r"^double_blocks\.0\."),
        "a LoRA": re.compile(r"^lora_(unet|te\d?|transformer)_|.*\.lora_(down|up|A|B)\."),
        "a whole model or its denoiser": re.compile(r"^model\.diffusion_model\."),
        "an IP-Adapter": re.compile(r"^(ip_adapter|image_proj)\."),
    }
)
"""What else lies in folders of ControlNets -> a name in it."""


@dataclass(frozen=True, slots=True)
class HubNet:
    """A ControlNet on the hub: a repository in diffusers' layout, or a file in one."""

    id: str
    revision: str | None = None
    file: str | None = None


def listed(folder: Path) -> dict[str, Path]:
    """The ControlNets for the model files in `folder`: path below `controlnets/` -> folder in diffusers' layout, or
    file; a file's name has no suffix, unless a folder has the same name."""
    return {name: path for name, path in _there(folder).items() if path.is_dir() or _is_net(path)}


def _there(folder: Path) -> dict[str, Path]:
    """`listed`, and weight files that are no ControlNets or cannot be read."""
    root = folder / FOLDER
    below = named_files.below(root)
    folders = [path.parent for path in below if path.name == DESCRIPTION and class_of(path.parent)]
    named = {path.relative_to(root).as_posix(): path for path in folders}
    for path in below:
        if path.suffix.lower() in (*SUFFIXES, *sources.PICKLES) and path.is_file() and path.parent not in folders:
            whole = path.relative_to(root).as_posix()
            plain = whole.removesuffix(path.suffix)
            named[whole if plain in named or path.suffix.lower() in sources.PICKLES else plain] = path
    return named


def _is_net(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and class_of(path) is not None


def class_of(path: Path) -> str | None:
    """The diffusers class of a ControlNet's folder or file; None if it is none, or cannot be read."""
    if path.is_file():
        return _class_of_file(path, weight_file.stamp(path))
    name = diffusers_source.json_of(path / DESCRIPTION).get("_class_name")
    return name if isinstance(name, str) and "ControlNet" in name else None


@functools.lru_cache(4096)
def _class_of_file(path: Path, stamp: tuple[int, int, int] | None) -> str | None:
    """Read once for each version of a file: lists and requests look at all of the folder."""
    try:
        return class_in(weight_header.of_file(path))
    except LoadError:
        return None


def class_in(header: Header) -> str | None:
    """The diffusers class of a file with this header; None if it is no ControlNet that can be read."""
    names = header.tensors
    for name, marks in _CLASSES.items():
        if all(mark in names for mark in marks):
            return name
    return "ControlNetModel" if is_original(header) else None


def is_original(header: Header) -> bool:
    """Whether a file has the names of the original ControlNets."""
    prefix = ORIGINAL_PREFIX if f"{ORIGINAL_PREFIX}{_ORIGINAL[0]}" in header.tensors else ""
    return all(prefix + mark in header.tensors for mark in _ORIGINAL)


def refuse(path: Path) -> None:
    """Raises LoadError, with what would work, for a file that is no ControlNet, and for a pickle."""
    if path.suffix.lower() in sources.PICKLES:
        raise LoadError(
            f"{path.name} is a pickle, which can run arbitrary code when it is loaded. Take its .safetensors file: "
            "most ControlNets have been published as one"
        )
    if path.suffix.lower() not in SUFFIXES:
        raise LoadError(f"{path.name} is no .safetensors file. {REMEDY}")
    of_file = weight_header.of_file(path)
    if class_in(of_file) is None:
        other = next((what for what, mark in _OTHERS.items() if any(map(mark.match, of_file.tensors))), None)
        raise LoadError(
            f"{path.name} is {other or 'no ControlNet, or one of a layout that nothing here reads'}. {REMEDY}"
        )


def find(folder: Path, name: str, param: str) -> dict[str, Path | HubNet]:
    """The ControlNets that a request may mean, as they are called here: by the path below `controlnets/`, by the last
    part of that (then of several families, maybe), both with or without the file's suffix, or else as a hub id
    (`owner/name`, `owner/name@revision`, `owner/name/file.safetensors`). Raises InvalidRequest with `param`."""
    known = _there(folder)
    plain = without_hash(name)
    wanted = plain.casefold()
    for found in (
        {each: path for each, path in known.items() if wanted in _spellings(each, path)},
        {each: path for each, path in known.items() if wanted in _spellings(each.rpartition("/")[2], path)},
    ):
        if readable := {each: path for each, path in found.items() if path.is_dir() or _is_net(path)}:
            return dict(readable)
        for each, path in found.items():
            try:
                refuse(path)
            except LoadError as error:
                raise InvalidRequest(f"{param}: {each[:100]!r}: {error.message}", param=param) from None
    if plain and ".." not in plain.split("/") and (folder / FOLDER / plain / DESCRIPTION).is_file():
        raise InvalidRequest(
            f"{param}: {plain[:100]!r} is in {FOLDER}/, but its {DESCRIPTION} names no ControlNet of diffusers "
            "(`_class_name`); take it from the ControlNet's repository",
            param=param,
        )
    match = None if is_path(name) else _HUB.fullmatch(plain)
    if match and not {"..", "."} & set(f"{match['id']}/{match['file'] or ''}".split("/")):
        net = HubNet(match["id"], match["revision"] or match["branch"], match["file"])
        if net.file and PurePosixPath(net.file).suffix.lower() in sources.PICKLES:
            raise InvalidRequest(
                f"{param}: {plain[:100]!r} is a pickle, which can run arbitrary code when it is loaded; name a "
                ".safetensors file of the repository",
                param=param,
            )
        if net.file is None or PurePosixPath(net.file).suffix.lower() in SUFFIXES:
            return {plain: net}
    raise InvalidRequest(
        f"{param}: there is no ControlNet {name[:100]!r}.{did_you_mean(plain, [*listed(folder)])} {available(folder)}; "
        "a hub id (owner/name, or owner/name/file.safetensors) is valid too",
        param=param,
    )


def of_model(config: ModelConfig) -> tuple[str, ...]:
    """Each name in the model file's `control_net`."""
    nets = config.control_net or ()
    return (nets,) if isinstance(nets, str) else nets


def here(config: ModelConfig, name: str) -> Path | None:
    """A ControlNet of the model file, if it is a path or one of `controlnets/` beside it."""
    path = (config.folder / os.path.expanduser(name)).resolve()  # noqa: PTH111
    return path if path.exists() else listed(config.folder).get(name.removesuffix(".safetensors"))


def _spellings(name: str, path: Path) -> set[str]:
    """How a request may write a name, in lower case: a file's with and without its suffix."""
    plain = name.casefold()
    if path.is_dir():
        return {plain}
    suffix = path.suffix.casefold()
    bare = plain.removesuffix(suffix)
    return {plain, bare + suffix} | ({bare} if suffix in sources.PICKLES else set())


def is_path(name: str) -> bool:
    """Whether a name is written as a path of a disk, which is never a hub id."""
    return name.strip().startswith(("/", "~", "\\", "."))


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

"""IP-Adapters that requests and model files name: in the folder `ip_adapters` beside the model files, or on the hub.

An adapter is one file. Its image encoder is a folder near it, as in the repositories on the hub. Needs no torch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sfumato.checkpoints import class_reading, controlnets, diffusers_source, named_files, weight_header
from sfumato.errors import InvalidRequest, LoadError

FOLDER = "ip_adapters"
SUFFIX = ".safetensors"
ENCODER_WEIGHTS = "model*.safetensors"

PROJECTION, IMAGE = "image_proj.", "ip_adapter."
"""Beginnings of an adapter's keys: what makes tokens of a picture, and the attention to them."""

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
"""Types of image encoders."""

_WHOLE = {"clip": CLIP, "siglip": SIGLIP}
"""Types of models with such an encoder and a text encoder -> the encoder's."""

_XLABS = {"ip_adapter_proj_model.": PROJECTION, "double_blocks.": IMAGE}
"""XLabs' beginnings of keys (FLUX) -> ours."""

_XLABS_PARTS = {
    "processor.": "", "ip_adapter_double_stream_k_proj": "to_k_ip", "ip_adapter_double_stream_v_proj": "to_v_ip",
}  # fmt: skip

ARGUMENT = "ip_adapter_image"
"""What the calls of pipelines name the pictures."""

SHOWN = 5
"""Keys that a message names."""

_HUB = re.compile(
    r"(?=.*ip[-_ ]?adapter)(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@\s]+))?/"
    r"(?P<file>[^@\s]+\.safetensors)(?:@(?P<branch>[^@\s]+))?",
    re.IGNORECASE,
)
"""A file on the hub whose path says that it is one: other files are ControlNets."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """An adapter in a repository on the hub."""

    id: str
    file: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Encoder:
    """The image encoder that an adapter needs."""

    setting: str
    """Of the encoder's configuration: `projection_dim`, or `hidden_size` if the adapter reads more than one vector."""
    width: int
    kind: str = CLIP
    """Its `model_type`."""

    @property
    def words(self) -> str:
        return {CLIP: "CLIPVisionModelWithProjection", SIGLIP: "SiglipVisionModel"}[self.kind]

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Whether a configuration describes one, or a model with one beside a text encoder."""
        if isinstance(inner := config.get("vision_config"), dict):
            config = {**inner, "model_type": inner.get("model_type", _WHOLE.get(str(config.get("model_type"))))}
        return config.get("model_type") == self.kind and config.get(self.setting) == self.width


def listed(folder: Path) -> dict[str, Path]:
    """The adapters for the model files in `folder`: path below `ip_adapters/`, without the suffix -> file."""
    root = folder / FOLDER
    files = [path for path in named_files.below(root) if path.suffix == SUFFIX]
    files = [path for path in files if not (path.parent / controlnets.DESCRIPTION).exists()]
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in files}


@functools.cache
def taken_by(pipeline: str) -> bool:
    """Whether a diffusers class draws with adapters that requests name: its call takes pictures for them, and its
    denoiser, a UNet or a transformer, has places for them."""
    constructor = next(diffusers_source.methods(pipeline, "__init__"), None)
    parts = [each.arg for each in constructor.args.args] if constructor else []
    denoiser = any(part in parts for part in ("unet", "transformer"))
    return denoiser and ARGUMENT in (class_reading.parameters(pipeline) or {})


def all_listed(folder: Path) -> list[str]:
    """The names of the ControlNets and of the adapters for the model files in `folder`."""
    return [*controlnets.listed(folder), *listed(folder)]


def find(folder: Path, name: str, param: str) -> tuple[str, Path | HubFile] | None:
    """The adapter of this name, as it is called here: by its path below `ip_adapters/` or the last part of that, with
    or without the suffix, or as a file on the hub (`owner/IP-Adapter/file.safetensors`, `owner/name@revision/file`).
    None: there is none, so that it may be a ControlNet. Raises InvalidRequest with `param`."""
    known = listed(folder)
    plain = controlnets.without_hash(name)
    bare = plain.removesuffix(SUFFIX).casefold()
    choices = [each for each in known if each.casefold() == bare]
    choices = choices or [each for each in known if each.rpartition("/")[2].casefold() == bare]
    if len(choices) > 1:
        raise InvalidRequest(f"{param}: {name[:100]!r} may be {' or '.join(choices)}; name one of them", param=param)
    if choices:
        if choices[0] in controlnets.listed(folder):
            raise InvalidRequest(
                f"{param}: {name[:100]!r} is in {FOLDER}/ and in {controlnets.FOLDER}/; rename one of them", param=param
            )
        return choices[0], known[choices[0]]
    match = None if controlnets.is_path(name) else _HUB.fullmatch(plain)
    if match and not {"..", "."} & set(plain.split("/")):
        return plain, HubFile(match["id"], match["file"], match["revision"] or match["branch"])
    return None


def find_any(folder: Path, name: str, param: str) -> tuple[bool, list[Path | HubFile | controlnets.HubNet]]:
    """Whether a name is an IP-Adapter's, else ControlNets', and where they are. Raises InvalidRequest with `param`."""
    if found := find(folder, name, param):
        return True, [found[1]]
    try:
        return False, [*controlnets.find(folder, name, param).values()]
    except InvalidRequest as error:
        raise InvalidRequest(f"{error.message}. {available(folder)}", param=param) from None


def available(folder: Path) -> str:
    """The adapters beside the model files, in words."""
    return controlnets.in_words(FOLDER, listed(folder))


def encoder_of(file: Path) -> Encoder:
    """The image encoder that a file needs. Raises LoadError if it is no IP-Adapter that draws from a picture alone."""
    tensors = weight_header.of_file(file).tensors
    shapes = {canonical(key): tensor.shape for key, tensor in tensors.items()}
    if not any(key.startswith(IMAGE) for key in shapes) or not any(key.startswith(PROJECTION) for key in shapes):
        raise LoadError(f"{file.name} is no IP-Adapter: it has {shown(sorted(shapes))}, not {PROJECTION}* and {IMAGE}*")
    projected = {key.removeprefix(PROJECTION) for key in shapes if key.startswith(PROJECTION)}
    if "perceiver_resampler.proj_in.weight" in projected or (
        "norm.weight" in projected and "proj.0.weight" in projected
    ):
        raise LoadError(
            f"{file.name} is a FaceID adapter: it follows the embedding of a face, which another model (InsightFace) "
            "computes. Use one that follows pictures, such as ip-adapter-plus-face"
        )
    kind = SIGLIP if "time_embedding.linear_1.weight" in projected else CLIP  # Stable Diffusion 3 reads SigLIP's
    for key, setting in _ENCODERS.items():
        if len(shape := shapes.get(PROJECTION + key, ())) == 2:
            return Encoder(setting, shape[1], kind)
    raise LoadError(f"{file.name}: diffusers knows no IP-Adapter with {PROJECTION}* of {shown(sorted(projected))}")


_ENCODERS = {"proj.weight": "projection_dim", "proj.0.weight": "hidden_size", "proj_in.weight": "hidden_size"}
"""Key of the layer that reads the encoder's output -> the setting that says how wide that is."""


def canonical(key: str) -> str:
    """The name of a tensor as most adapters have it: XLabs' have others."""
    for beginning, ours in _XLABS.items():
        if key.startswith(beginning):
            key = ours + key.removeprefix(beginning)
            if ours == IMAGE:
                for part, plain in _XLABS_PARTS.items():
                    key = key.replace(part, plain)
    return key


def nearest(file: str, folders: Iterable[str]) -> list[str]:
    """Folders of encoders, those closest to an adapter's file first. Paths with `/`."""
    parents = PurePosixPath(file).parts[:-1]

    def shared(folder: str) -> int:
        parts = PurePosixPath(folder).parts
        return next((at for at, pair in enumerate(zip(parents, parts, strict=False)) if pair[0] != pair[1]),
                    min(len(parents), len(parts)))  # fmt: skip

    return sorted(folders, key=lambda folder: (-shared(folder), len(PurePosixPath(folder).parts), folder))


def local_encoder(file: Path, folder: Path, encoder: Encoder) -> Path | None:
    """The folder of the image encoder for a file: beside it, or below `ip_adapters/` of the model files in `folder`;
    None: there is none that fits."""
    found = [*(folder / FOLDER).rglob(controlnets.DESCRIPTION), *file.parent.glob(f"*/{controlnets.DESCRIPTION}")]
    for path in nearest(file.as_posix(), {path.parent.as_posix() for path in found}):
        described = diffusers_source.json_of(Path(path) / controlnets.DESCRIPTION)
        if encoder.fits(described) and any(Path(path).glob(ENCODER_WEIGHTS)):
            return Path(path)
    return None


def shown(keys: list[str]) -> str:
    """Some keys, in words."""
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{', '.join(keys[:SHOWN])}{more}" if keys else "nothing"

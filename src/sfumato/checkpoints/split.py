"""Models in several files, as ComfyUI keeps them: `diffusion_models/` or `unet/`, `text_encoders/` or `clip/`, `vae/`.

A denoiser alone, in `.safetensors` or GGUF, takes what describes it from its base: the repository (or folder) that
`diffusers.base_model` names, else the one that diffusers knows for its names and shapes. Text encoders and VAE come
from the files that the model file names; else from those of the folders beside that fit; else from the base as well.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from sfumato.checkpoints import contents, diffusers_source, sources, weight_header
from sfumato.checkpoints.contents import Contents
from sfumato.checkpoints.weight_header import Header
from sfumato.config import ModelConfig, addresses
from sfumato.errors import LoadError, ModelFileError

log = logging.getLogger(__name__)

GGUF = ".gguf"
DENOISERS = ("transformer", "unet")
"""Components that a denoiser alone can be."""
TEXT_FOLDERS, VAE_FOLDERS = ("text_encoders", "clip"), ("vae",)
WIDTHS = ("d_model", "hidden_size")
PRECISION = ("F32", "BF16", "F16", "F8_E4M3", "F8_E5M2")
"""Of two files with the same component the earlier one is taken."""


@dataclass(frozen=True, slots=True)
class Base:
    """What describes a split model and supplies what its files lack."""

    config: ModelConfig
    folder: Path
    """Its descriptions on this disk, in diffusers' layout."""
    index: Mapping[str, Any] = field(default_factory=dict)


def is_gguf(config: ModelConfig) -> bool:
    """Whether a model's source is a GGUF file."""
    return sources.suffix_of(config) == GGUF


def contents_of(path: Path) -> Contents | None:
    """What a weight file on this disk has in it; None for a pickle, which has no header. Raises LoadError."""
    return contents.of(weight_header.of_file(path)) if path.suffix.lower() in sources.TENSORS else None


def base_of(config: ModelConfig, made_of: Contents | None) -> ModelConfig:
    """The config of the base of a denoiser alone. Raises ModelFileError if it, or the package gguf, is missing."""
    gguf = is_gguf(config)
    if gguf and importlib.util.find_spec("gguf") is None:
        raise ModelFileError(
            f"{config.name}: reading a .gguf file needs the package gguf. Run `pip install 'sfumato[gguf]'`, and start "
            "Sfumato again",
            param="parameters.model",
        )
    base = config.base_model or (made_of.repository if made_of else None)
    if not base:
        raise ModelFileError(
            f"{config.name}: {'a .gguf file' if gguf else config.label} holds a denoiser alone. Name the "
            "repository (or folder) that it was made from, for all else: `diffusers: {base_model: owner/name}`",
            param="diffusers.base_model",
        )
    return with_source(config, base)


def with_source(config: ModelConfig, model: str) -> ModelConfig:
    """The config with `model` as its source; where its own file comes from does not apply to it."""
    return replace(
        config, model=model, base_model=None, repo=None, revision=None, snapshot=None, downloads=(), text_encoders=()
    )


def denoiser_of(index: Mapping[str, Any], label: str) -> str:
    """The component that a denoiser alone takes the place of. Raises ModelFileError if the base has none."""
    part = next((name for name in DENOISERS if isinstance(index.get(name), list)), None)
    if part is None:
        raise ModelFileError(
            f"{label}: has neither of {', '.join(DENOISERS)}, which a denoiser alone could take the place of",
            param="diffusers.base_model",
        )
    return part


def assign(config: ModelConfig, path: Path, named: Mapping[str, Path], base: Base) -> dict[str, Path]:
    """Component -> the file it comes from: the denoiser at `path`, files that the model file names, those beside.

    `named`: the text encoders that the model file names, as it writes them -> where they are. Raises LoadError or
    ModelFileError.
    """
    made_of = contents_of(path)
    assigned = {denoiser_of(base.index, str(base.folder)): path}
    if made_of and made_of.has_vae and "vae" in base.index:
        assigned["vae"] = path
    encoders = _encoders(base)
    for name, file in named.items():
        assigned[_place(config, name, file, encoders, assigned)] = file
    root = _root(path)
    if root is None:
        return assigned
    for part, sizes in encoders.items():
        fitting = _beside(root, TEXT_FOLDERS, partial(_is_encoder, sizes)) if part not in assigned and not named else []
        if fitting:
            assigned[part] = _one(config, fitting, part, "diffusers.text_encoders")
    if "vae" in base.index and "vae" not in assigned and not config.vae:
        channels = diffusers_source.json_of(base.folder / "vae" / "config.json").get("latent_channels", 4)
        if fitting := _beside(root, VAE_FOLDERS, partial(_is_vae, channels)):
            assigned["vae"] = _one(config, fitting, "vae", "vae")
    return assigned


def _encoders(base: Base) -> dict[str, tuple[int, int]]:
    """Text encoder of the base -> its words and width, where its description says them."""
    sizes = {}
    for part, value in base.index.items():
        if part.startswith("text_encoder") and isinstance(value, list) and value[1]:
            described = diffusers_source.json_of(base.folder / part / "config.json")
            inner = described.get("text_config")
            described = {**described, **inner} if isinstance(inner, dict) else described
            width = next((described[key] for key in WIDTHS if isinstance(described.get(key), int)), None)
            if width and isinstance(described.get("vocab_size"), int):
                sizes[part] = (described["vocab_size"], width)
    return sizes


def _place(
    config: ModelConfig, name: str, file: Path, encoders: Mapping[str, tuple[int, int]], assigned: Mapping[str, Path]
) -> str:
    header, name = weight_header.of_file(file), addresses.redact(name)
    contents.refuse_layout(contents.of(header), name, "diffusers.text_encoders", (contents.SCALED_FP8,))
    sizes = contents.words_and_width(header)
    for part, wanted in encoders.items():
        if part not in assigned and sizes == wanted:
            return part
    wanted_sizes = ", ".join(f"{part} of {words} words x {width}" for part, (words, width) in encoders.items())
    found = f"has {sizes[0]} words x {sizes[1]}" if sizes else "is no text encoder"
    raise ModelFileError(
        f"{config.name}: text_encoders: {name} {found}; this model takes {wanted_sizes or 'none'}, each once",
        param="diffusers.text_encoders",
    )


def _root(path: Path) -> Path | None:
    """ComfyUI's folder of models, if the file lies in one of its folders for denoisers."""
    return next((folder.parent for folder in path.parents if folder.name in sources.SPLIT_FOLDERS), None)


def _beside(root: Path, folders: tuple[str, ...], fits: Callable[[Header], bool]) -> list[Path]:
    """The files of these folders whose header fits; those that cannot be read are told of and left out."""
    fitting = []
    for path in (path for name in folders for path in sorted((root / name).rglob("*"))):
        if path.suffix.lower() in sources.TENSORS and path.suffix.lower() != GGUF:
            try:
                fitting += [path] if fits(weight_header.of_file(path)) else []
            except LoadError as error:
                log.warning("%s", error.message)
    return fitting


def _is_encoder(sizes: tuple[int, int], header: Header) -> bool:
    made_of = contents.of(header)
    readable = made_of.quantised in (None, contents.SCALED_FP8)
    return made_of.kind == contents.TEXT_ENCODER and readable and contents.words_and_width(header) == sizes


def _is_vae(channels: int, header: Header) -> bool:
    return contents.of(header).kind == contents.VAE and contents.latent_channels(header) == channels


def _one(config: ModelConfig, found: list[Path], part: str, key: str) -> Path:
    """The one file, or the one of the highest precision. Raises ModelFileError if that leaves several."""
    ranks = {path: min(_precisions(path), default=len(PRECISION)) for path in found}
    best = [path for path in found if ranks[path] == min(ranks.values())]
    if len(best) > 1:
        names = ", ".join(f"{path.parent.name}/{path.name}" for path in best)
        raise ModelFileError(f"{config.name}: {names} all fit as {part}; name the right one in `{key}`", param=key)
    log.info("%s: %s comes from %s", config.name, part, best[0])
    return best[0]


def _precisions(path: Path) -> Iterator[int]:
    dtypes = {tensor.dtype for tensor in weight_header.of_file(path).tensors.values() if len(tensor.shape) > 1}
    return (PRECISION.index(dtype) for dtype in dtypes if dtype in PRECISION)

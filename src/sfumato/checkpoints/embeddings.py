"""Textual inversions in the folder `embeddings` beside the model files. Finding them needs no torch.

A file of AUTOMATIC1111 or diffusers holds vectors for one text encoder; one for XL holds `clip_l` and `clip_g`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.checkpoints import named_files, weight_header
from sfumato.checkpoints.sources import PICKLES
from sfumato.config import ModelConfig
from sfumato.errors import LoadError

FOLDER = "embeddings"
SAFE = (".safetensors", ".sft")

XL = ("clip_l", "clip_g")
"""Keys of a file for XL: its text encoder and its second one."""


@dataclass(frozen=True, slots=True)
class Shape:
    vectors: int
    features: int
    """Of all encoders together."""


def found(folder: Path) -> dict[str, Path]:
    """The embeddings for the model files in `folder`, by name; a safetensors file hides a pickle of its name."""
    files = [
        path for path in named_files.below(folder / FOLDER) if path.suffix.lower() in SAFE + PICKLES and path.is_file()
    ]
    files.sort(key=lambda path: (not is_pickle(path), path))  # the last one of a name stays
    return {path.stem: path for path in files}


def is_pickle(path: Path) -> bool:
    return path.suffix.lower() in PICKLES


def shape(path: Path) -> Shape | None:
    """The size of a safetensors file's vectors; None if that is no embedding, or cannot be known without reading it."""
    try:
        tensors = {} if is_pickle(path) else weight_header.of_file(path).tensors
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        flat = [each if len(each) == 2 else (1, *each) for each in _vectors(shapes, path).values()]
        return Shape(flat[0][0], sum(features for _, features in flat))
    except (LoadError, OSError, ValueError):
        return None


def digest(path: Path) -> str:
    """SHA-256 of the file."""
    status = path.stat()
    return _digest(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1024)
def _digest(path: Path, changed: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def vectors(path: Path, config: ModelConfig) -> dict[str, Any]:
    """Tensors of [vectors, features]: one without a name, or those of `XL`. Raises LoadError."""
    import torch
    from safetensors.torch import load_file

    if is_pickle(path) and not config.allow_pickle:
        raise LoadError(
            f"{path.name} is a pickle, which can run arbitrary code when it is loaded. Use a .safetensors file, or set "
            f"`allow_pickle: true` in {config.file_name} if you trust it"
        )
    try:
        state = torch.load(path, "cpu", weights_only=True) if is_pickle(path) else load_file(path)
        if isinstance(state.get("string_to_param"), dict):  # AUTOMATIC1111's pickles
            state = state["string_to_param"]
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor) and value.ndim}
    except Exception as error:  # whatever a damaged file makes torch raise, or one that holds something else
        raise LoadError(f"{path.name} cannot be read: {type(error).__name__}") from None
    return {name: value.reshape(-1, value.shape[-1]).float() for name, value in _vectors(tensors, path).items()}


def _vectors(named: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Those of a file's tensors, or their shapes, that are an embedding. Raises LoadError."""
    if all(name in named for name in XL):
        return {name: named[name] for name in XL}
    if "emb_params" in named:
        return {"": named["emb_params"]}
    if len(named) == 1:
        return {"": next(iter(named.values()))}
    raise LoadError(f"{path.name} is not a textual inversion: it has {len(named)} tensors and no `emb_params`")

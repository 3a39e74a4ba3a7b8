"""Common to all that requests need and that is loaded for itself: ControlNets, IP-Adapters, encoders, estimators."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from sfumato.batching.batcher import is_out_of_memory
from sfumato.config import ModelConfig
from sfumato.errors import LoadError, SfumatoError
from sfumato.models import weight_stamps
from sfumato.models.content_hashes import ContentHashes
from sfumato.models.device import choose_device
from sfumato.models.load import ModelState

M = TypeVar("M", bound=torch.nn.Module)


def place(config: ModelConfig, device_setting: str) -> tuple[str, str]:
    """Device and dtype: those of the model that it was named for."""
    return choose_device(config, device_setting), config.dtype or "fp32"


@contextmanager
def reading(path: Path) -> Iterator[ModelState]:
    """Read the weights at `path`, a file or folder: what damaged ones make libraries raise becomes a LoadError.

    The state notices when they are replaced or written over.
    """
    state = ModelState(stamps=weight_stamps.of([path]))
    try:
        yield state
    except SfumatoError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # Libraries name the whole path, which is nothing for clients.
        text = " ".join(str(error).replace(str(path.parent), "").split())[:300]
        raise LoadError(f"{path.name} cannot be loaded: {text or type(error).__name__}") from error


def detached(module: M) -> M:
    """The module with tensors of its own: those on a CPU are mapped, and would change with a file that is written
    over."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
    return module.eval()


def digest(files: Sequence[Path], hashes: ContentHashes) -> str:
    """SHA-256 of the weights; of several files, of their digests."""
    digests = [hashes.of(file) for file in sorted(files)]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()

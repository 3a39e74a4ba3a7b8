"""What a request adds to a model's attention: IP-Adapters, each with its pictures, strength and steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sfumato.checkpoints.ip_adapters import Encoder


class Weights(torch.nn.Module):
    """The tensors of an adapter's file: in one module, so that they are moved and counted like others."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = tuple(tensors)
        self.tensors = torch.nn.ParameterList(
            torch.nn.Parameter(tensor, requires_grad=False) for tensor in tensors.values()
        )

    def of(self, prefix: str) -> dict[str, torch.Tensor]:
        """Those whose names begin so, by the rest of their names."""
        named = zip(self.names, self.tensors, strict=True)
        return {name.removeprefix(prefix): tensor.data for name, tensor in named if name.startswith(prefix)}


class Adapter:
    """An IP-Adapter in memory, in place of a pipeline."""

    def __init__(self, weights: Weights, digest: str, encoder: Encoder, folder: str | None) -> None:
        self.weights = weights
        self.digest = digest
        """SHA-256 of its file."""
        self.encoder = encoder
        self.folder = folder
        """Where the image encoder is that it needs: a path, or one in its repository on the hub; None: nowhere."""


class ImageEncoder:
    """The image encoder of adapters in memory, in place of a pipeline."""

    def __init__(self, image_encoder: torch.nn.Module, processor: Any = None) -> None:
        """`processor`: what makes pictures ready for it; None: what diffusers takes without one."""
        self.image_encoder = image_encoder
        self.processor = processor


@dataclass(frozen=True, slots=True)
class Prompted:
    """One adapter with its pictures, as a request says it."""

    adapter: Adapter
    controls: tuple[int, ...]
    """Places of its pictures among the controls of the request."""
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    """0 .. 1: the part of the steps in which it acts."""

    def strength(self, done: int, total: int) -> float:
        """How strongly it acts at the step after `done` of `total`; before the first step, `total` is 0."""
        over = (done + 1) / total > self.end if total else self.end == 0
        before = done / total < self.start if total else self.start > 0
        return 0.0 if over or before else self.weight


@dataclass(frozen=True, slots=True)
class PicturePrompt:
    """The adapters of a request, in its order."""

    adapters: tuple[Prompted, ...]
    param: str
    """The request's field that names the first."""

    def strengths(self, done: int = 0, total: int = 0) -> tuple[float, ...]:
        return tuple(each.strength(done, total) for each in self.adapters)

    @property
    def controls(self) -> frozenset[int]:
        """Places of their pictures among the controls of the request."""
        return frozenset(place for each in self.adapters for place in each.controls)

    @property
    def of_files(self) -> Sequence[Any]:
        return [each.adapter for each in self.adapters]

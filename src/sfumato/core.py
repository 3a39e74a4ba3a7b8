"""The vocabulary of Sfumato: what a front end asks for and what the engine answers.

Everything that crosses the pipe between the API process and the worker stands in this file or is
carried by something that does. Standard library only; frozen, so nothing changes under a reader.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from sfumato.errors import SfumatoError

MAX_SEED = 2**63 - 1
"""Largest seed: torch's generators take 64 bits, JSON clients sign them."""

MAX_PREVIEWS = 16
"""Most previews of one generation: each costs about as much as decoding the picture."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One picture to draw. `n` pictures are `n` of these, with seeds `seed`, `seed + 1`, ...

    `None` means "as the model has it": the pipeline's own default stays in force.
    """

    id: str
    prompt: str
    seed: int
    """0 .. MAX_SEED."""
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    """Pixels. Both are given or neither."""
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    """A name of `sfumato.schedulers`; None keeps the model file's, then the model's own."""
    clip_skip: int | None = None
    strength: float | None = None
    """0 .. 1: how far image-to-image may leave its source."""
    images: tuple[bytes, ...] = ()
    """Source pictures, each an encoded PNG, upright, RGB or RGBA."""
    caller: str = ""
    """Whoever asked: callers share the engine fairly."""
    mask: bytes | None = None
    """An encoded PNG, mode L, the size of the first image; white (255) is redrawn."""
    previews: int = 0
    """0 .. MAX_PREVIEWS: pictures on the way, evenly spread over the steps and never at the last."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that made one picture; `sfumato generate --like` makes it again from this alone."""

    model: str
    source: str
    """Hub id (with `@commit`), path or URL that the weights came from."""
    pipeline: str
    """diffusers class that drew it."""
    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    steps: int | None
    guidance_scale: float | None
    seed: int
    scheduler: str
    """Our name, or the diffusers class when the model's own scheduler was kept."""
    clip_skip: int | None
    strength: float | None
    image_sha256: tuple[str, ...]
    """Of the decoded source pictures as the pipeline got them (see `pictures.fingerprint`)."""
    mask_sha256: str | None
    device: str
    dtype: str
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """`step` of `total` denoising steps are done (1 .. total)."""

    step: int
    total: int


@dataclass(frozen=True, slots=True)
class Preview:
    """The picture as it stands after `step` of `total`, at most 512 pixels on its longer side.

    A run that has to start again shows its previews again, from 0.
    """

    index: int
    """0 is the first."""
    step: int
    total: int
    png: bytes


@dataclass(frozen=True, slots=True)
class Done:
    """Terminal: the picture as PNG bytes with its recipe inside."""

    png: bytes
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Failed:
    """Terminal: what went wrong."""

    error: SfumatoError


Event: TypeAlias = Step | Preview | Done | Failed
"""A stream of events is any number of `Step` and `Preview`, then exactly one `Done` or `Failed`."""

ModelState: TypeAlias = Literal["unloaded", "downloading", "loading", "ready", "failed"]


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """Where a model stands in the engine."""

    state: ModelState = "unloaded"
    detail: str = ""
    """What is being fetched, or why the load failed."""
    progress: float | None = None
    """0 .. 1 while downloading."""

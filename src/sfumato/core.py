"""The vocabulary of Sfumato: what a front end asks for and what the engine answers.

Everything that crosses the pipe between the API process and the worker stands in this file or is
carried by something that does. Standard library only; frozen, so nothing changes under a reader.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias

from sfumato.errors import SfumatoError

MAX_SEED = 2**63 - 1
"""Largest seed: torch's generators take 64 bits, JSON clients sign them."""

MAX_PREVIEWS = 16
"""Most previews of one generation."""

VAE_TILING = "vae_tiling"
"""A name of `SAVINGS`: the VAE works in tiles, which changes pixels where they meet."""

OFFLOAD = "offload"
"""A name of `SAVINGS`: modules wait in main memory, which changes no pixel."""

SAVINGS = (VAE_TILING, OFFLOAD)
"""What a picture may have been drawn with because memory ran out."""

QUALITIES: Mapping[str, float] = MappingProxyType(
    {"low": 0.5, "medium": 1.0, "high": 1.5, "xhigh": 2.0, "max": 3.0, "auto": 1.0, "standard": 1.0, "hd": 1.5}
)
"""OpenAI's `quality` → how many times the model's default steps, where its file has no number of its own."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a picture that is drawn may measure. One forward of a huge or a very long one holds up all others."""

    pixels: int
    side: int
    """Of the longer side, in pixels."""
    aspect: int
    """How many times longer than the other a side may be."""

    def breach(self, width: int, height: int) -> str:
        """Why this size is not drawn, in words; empty where it is."""
        if min(width, height) < 1:
            return "both sides need at least 1 pixel"
        if max(width, height) > self.side:
            return f"no side may be longer than {self.side} pixels (the setting max_side)"
        if width * height > self.pixels:
            root = math.isqrt(self.pixels)
            return f"at most {self.pixels} pixels in all ({root}x{root}) are drawn (the setting max_pixels)"
        if max(width, height) > self.aspect * min(width, height):
            return f"no side may be longer than {self.aspect} times the other (the setting max_aspect)"
        return ""


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
    mask_padding: int | None = None
    """Only the masked area is drawn, with so many pixels around it, at the size asked for or the model's own, and put
    back into the picture. None: all of the picture is."""
    previews: int = 0
    """0 .. MAX_PREVIEWS: pictures on the way, evenly spread over the steps and never at the last."""
    quality: str | None = None
    """A name of `QUALITIES`: steps by the model's table, where `steps` says nothing."""
    transparent: bool = False
    """The picture is to have an alpha channel; a pipeline that draws none refuses."""
    upscale: int | None = None
    """How many times larger than its source, on each side; a pipeline that is no upscaler refuses."""
    savings: tuple[str, ...] = ()
    """Names of `SAVINGS` to draw with from the start, as a picture was drawn that is to be made again."""
    limits: Limits | None = None
    """Of a size that comes from a source picture; None: any."""


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
    savings: tuple[str, ...] = ()
    """Names of `SAVINGS` that it was drawn with."""
    masked_area: tuple[int, int, int] | None = None
    """Where only the masked area was drawn: pixels of padding, width and height that it was drawn at."""


@dataclass(frozen=True, slots=True)
class Step:
    """`step` of `total` denoising steps are done (1 .. total)."""

    step: int
    total: int


@dataclass(frozen=True, slots=True)
class Preview:
    """The picture as it stands after `step` of `total`.

    A run that has to start again shows its previews again, from 0.
    """

    index: int
    """0 is the first."""
    step: int
    total: int
    png: bytes
    """Mostly smaller than the picture that it stands for, whose shape it has; whoever shows it scales it up."""
    width: int
    height: int
    """Pixels of the picture that it stands for."""


@dataclass(frozen=True, slots=True)
class Done:
    """Terminal: the picture as PNG bytes with its recipe inside."""

    png: bytes
    recipe: Recipe
    warnings: tuple[str, ...] = ()
    """What was done otherwise than asked, each a sentence that begins with the request's field."""
    prompt_tokens: int = 0
    """Of prompt and negative prompt, as the text encoder counts them; 0 where there is none."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Terminal: what went wrong."""

    error: SfumatoError


Event: TypeAlias = Step | Preview | Done | Failed
"""A stream of events is any number of `Step` and `Preview`, then exactly one `Done` or `Failed`."""

Keep: TypeAlias = Callable[[Done], Awaitable[str | None]]
"""Puts a picture where it stays; its name there, or None where it was not kept."""

LoadState: TypeAlias = Literal["unloaded", "downloading", "loading", "ready", "failed"]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a model once it is loaded. None: the pipeline does not say."""

    pipeline: str
    """diffusers class."""
    tasks: tuple[str, ...]
    """Of text-to-image, image-to-image, inpainting, upscaling: what it can be asked for on the same weights."""
    width: int | None
    height: int | None
    """Pixels of a picture whose request names no size."""
    size_multiple: int
    """Both sides are multiples of this, in pixels."""
    steps: int | None
    guidance_scale: float | None
    """Defaults of a request, the model file's included."""
    prompt_tokens: int | None
    """Tokens of a prompt that the text encoder takes, its start and end marks included."""
    transparent: bool
    """Whether it draws pictures with an alpha channel."""
    upscale: int | None
    """How many times larger than its source, for an upscaler."""
    device: str
    dtype: str


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counted since the engine started; a worker that dies takes its counts along into the next one's."""

    forwards: int = 0
    """Of heavy modules."""
    batch_sizes: Mapping[int, int] = field(default_factory=dict)
    """Requests that shared a forward of the denoiser → how many forwards had that many."""
    unbatched: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Module name (`unet`, `vae` ...) and reason → forwards that no other request could share, whoever was there."""
    steps: int = 0
    """Denoising steps of all requests."""
    step_seconds: float = 0.0
    """Time between steps, summed over requests: divided by `steps`, what a step takes."""
    loads: int = 0
    evictions: int = 0
    restarts: int = 0
    """Workers that were started because one had died."""
    resident_models: int = 0
    memory_bytes: int = 0
    """Resident memory of the worker."""
    device_memory_bytes: int = 0
    """Allocated on the accelerator."""


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """Where a model stands in the engine."""

    state: LoadState = "unloaded"
    detail: str = ""
    """What is being fetched, or why the load failed."""
    progress: float | None = None
    """0 .. 1 while downloading."""
    info: ModelInfo | None = None
    """Once it is ready."""

"""The vocabulary of Sfumato: what a front end requests and what the engine answers.

Everything that crosses the pipe between the API process and the worker is defined in this file or carried by a class
defined here. Standard library only; frozen, so nothing changes under a reader.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

from sfumato import formats
from sfumato.errors import InvalidRequest, SfumatoError
from sfumato.loras import Lora
from sfumato.sampling import Hires, Sampling

MAX_SEED = 2**63 - 1
"""Largest seed: torch's generators take 64 bits, but JSON clients treat them as signed."""

MAX_PREVIEWS = 16
"""Maximum number of previews per generation."""

VAE_TILING = "vae_tiling"
"""A name of `SAVINGS`: the VAE works in tiles, which changes pixels where they meet."""

VAE_SLICING = "vae_slicing"
"""A name of `SAVINGS`: the VAE works on one picture of a batch at a time, which changes no pixel."""

OFFLOAD = "offload"
"""A name of `SAVINGS`: modules wait in main memory, which changes no pixel."""

GROUP_OFFLOAD = "group_offload"
"""A name of `SAVINGS`: layers wait in main memory, which changes no pixel."""

SAVINGS = (VAE_TILING, VAE_SLICING, OFFLOAD, GROUP_OFFLOAD)
"""Memory savings that a picture may be drawn with. Savings in weights (`quantization:int8`) come with the model."""

EAGER = "eager"
"""The runner that is the module itself."""

QUALITIES: Mapping[str, float] = MappingProxyType(
    {"low": 0.5, "medium": 1.0, "high": 1.5, "xhigh": 2.0, "max": 3.0, "auto": 1.0, "standard": 1.0, "hd": 1.5}
)
"""OpenAI's `quality` → multiple of the model's default steps, unless the model file sets its own step count."""


PRIORITIES = (INTERACTIVE, BATCH) = ("interactive", "batch")
"""Classes of requests. The first is the default, and none is above it; nobody waits for the pictures of the second."""

_DURATION = re.compile(r"-?(?:\d+(?:\.\d*)?|\.\d+)(?:h|ms|m|s)?(?:(?:\d+(?:\.\d*)?)(?:h|ms|m|s))*", re.ASCII)
_PARTS = re.compile(r"(\d+\.?\d*|\.\d+)(h|ms|m|s|$)")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "": 1.0, "ms": 0.001}


def keep_alive_seconds(value: object) -> float:
    """How long an idle model stays in memory, in Ollama's form: seconds, or a duration such as "5m" or "1h30m".

    0 is not at all; a negative one is infinite: until another model needs the memory. Raises ValueError.
    """
    text = "" if isinstance(value, bool) else str(value).strip().lower()
    if len(text) > 40 or not _DURATION.fullmatch(text):
        raise ValueError('must be seconds (300), a duration ("5m", "1h30m"), 0 for not at all or -1 for no limit')
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in _PARTS.findall(text))
    return math.inf if text.startswith("-") else seconds


MAX_FRAMES = 257
"""Default of the setting `max_frames`."""

MAX_SECONDS = 60
"""Default of the setting `max_seconds`."""

MAX_CLIP_MEGAPIXELS = 256
"""Default of the setting `max_clip_megapixels`."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits for the size of a result. One forward pass of a huge picture would hold up all the others."""

    pixels: int
    side: int
    """Maximum length of the longer side, in pixels."""
    aspect: int
    """Maximum ratio of the longer side to the shorter one."""
    frames: int = MAX_FRAMES
    """Of a clip."""
    seconds: float = MAX_SECONDS
    """Of a clip or a sound."""
    clip_pixels: int = MAX_CLIP_MEGAPIXELS * 10**6
    """Of all frames of a clip together."""

    def violation(self, width: int, height: int) -> str:
        """Why this size is refused, in words; empty if it is allowed."""
        if min(width, height) < 1:
            return "both sides need at least 1 pixel"
        if max(width, height) > self.side:
            return f"no side may be longer than {self.side} pixels (the setting max_side)"
        if width * height > self.pixels:
            root = math.isqrt(self.pixels)
            return f"a picture has at most {self.pixels} pixels in all ({root}x{root}; the setting max_pixels)"
        if max(width, height) > self.aspect * min(width, height):
            return f"no side may be longer than {self.aspect} times the other (the setting max_aspect)"
        return ""

    def check_clip(self, width: int, height: int, frames: int) -> None:
        """Raises InvalidRequest unless a clip of so many frames of this size is allowed."""
        most = min(self.frames, self.clip_pixels // (width * height))
        if frames > most:
            raise InvalidRequest(
                f"num_frames: {frames} of {width}x{height}; at most {most} of this size are allowed (the settings "
                "max_frames and max_clip_megapixels). Send fewer frames or a smaller size",
                param="num_frames",
            )

    def check_length(self, frames: int, fps: float) -> None:
        """Raises InvalidRequest unless a clip of so many frames at this rate is allowed."""
        if frames > self.seconds * fps:
            raise InvalidRequest(
                f"num_frames: {frames} at {fps:g} frames a second are {frames / fps:.4g} seconds; at most "
                f"{self.seconds:g} are allowed (the setting max_seconds). Send fewer frames or a higher fps",
                param="num_frames",
            )


CANNY = "canny"
"""A name of `PREPROCESSORS`: the edges of a picture, white on black."""

INVERT = "invert"
"""A name of `PREPROCESSORS`: dark and light swapped, for drawings that are black on white."""

DEPTH = "depth"
"""A name of `PREPROCESSORS`: how near each place of a picture is, estimated; the nearest is white."""

POSE = "pose"
"""A name of `PREPROCESSORS`: the people in a picture as skeletons in OpenPose's colours, on black."""

PREPROCESSORS = (CANNY, DEPTH, POSE, INVERT)
"""What a control picture may be made of before it is followed."""


@dataclass(frozen=True, slots=True)
class Control:
    """A picture that a ControlNet, an IP-Adapter or an adapter of the model follows. None: the pipeline's own."""

    image: str | bytes
    """In a generation an encoded PNG, upright, RGB or RGBA, empty while that waits; in a request as other pictures."""
    weight: float | None = None
    """How strongly it is followed; 0: not at all, 1: as trained."""
    start: float | None = None
    """0 .. 1: the part of the steps after which it begins."""
    end: float | None = None
    """0 .. 1: the part of the steps after which it ends."""
    mode: int | None = None
    """Number of the kind of control, for nets that know several."""
    name: str | None = None
    """The ControlNet or IP-Adapter that follows it: in `controlnets/` or `ip_adapters/` beside the model files, or on
    the hub. None: the model file's own."""
    preprocess: str | None = None
    """A name of `PREPROCESSORS`; None: the picture is followed as it is."""
    thresholds: tuple[float, float] | None = None
    """Of canny, in levels of 0 .. 255; None: 100 and 200."""
    joins: bool = False
    """Whether it is one more picture for the IP-Adapter of the control before it, and has nothing else."""
    estimators: tuple[str, ...] = ()
    """What `preprocess` estimates with: hub ids or folders; none: what the model file or the server says."""


def labels(controls: Sequence[Control]) -> list[str]:
    """What a request calls each of its controls: `controls[0]`; those that join one have its label."""
    numbers = itertools.accumulate((not control.joins for control in controls), initial=-1)
    return [f"controls[{number}]" for number in [*numbers][1:]]


@dataclass(frozen=True, slots=True)
class SourceClip:
    """The clip that another is drawn from, decoded: at most the frames that its request draws, at the size drawn."""

    frames: bytes
    """RGB, 8 bits a channel: frame by frame, row by row."""
    width: int
    height: int
    """Of these frames, in pixels."""
    fps: float
    """Frames a second, as the file has them."""
    size: tuple[int, int]
    """Width and height in pixels that the file has."""
    sha256: str
    """Of the file."""

    def __len__(self) -> int:
        return len(self.frames) // (self.width * self.height * 3)


@dataclass(frozen=True, slots=True)
class SourceSound:
    """The sound that another is made from, decoded."""

    samples: bytes
    """32-bit floats of -1 .. 1, channel by channel."""
    channels: int
    rate: int
    """Samples a second."""
    sha256: str
    """Of the file."""

    @property
    def seconds(self) -> float:
        return len(self.samples) / (4 * self.channels * self.rate)


@dataclass(frozen=True, slots=True)
class Generation:
    """One picture, clip or sound to make. `n` of them are `n` of these, with seeds `seed`, `seed + 1`, ..."""

    id: str
    prompt: str
    seed: int
    """0 .. MAX_SEED."""
    sampling: Sampling = field(default_factory=Sampling)
    """Both of width and height are set, or neither."""
    format: str = formats.PICTURE
    """A name of `formats.FORMATS`: what it ends in, and how the file is written."""
    images: tuple[bytes, ...] = ()
    """Source pictures, each an encoded PNG, upright, RGB or RGBA."""
    clip: SourceClip | None = None
    sound: SourceSound | None = None
    caller: str = ""
    """Who sent the request; the engine is shared fairly between callers."""
    mask: bytes | None = None
    """An encoded PNG, mode L, of the first image's size; white (255) areas are redrawn."""
    mask_padding: int | None = None
    """Draw only the masked area plus this many pixels around it, at the requested or the model's own size, and paste it
    back into the picture. None: redraw the whole picture."""
    mask_from_alpha: bool = False
    """Whether the first picture's fully transparent areas are its mask, if none was sent and the model takes one."""
    controls: tuple[Control, ...] = ()
    loras: tuple[Lora, ...] = ()
    """With their files; they act besides those of the model file."""
    replace_loras: bool = False
    """Whether none of the model file's LoRAs acts."""
    previews: int = 0
    """0 .. MAX_PREVIEWS: number of previews, spread evenly over the steps; never at the last step."""
    quality: str | None = None
    """A key of `QUALITIES`: takes the steps from the model's table if `sampling.steps` is None."""
    transparent: bool = False
    """Request an alpha channel; a pipeline that cannot draw one refuses."""
    upscale: int | None = None
    """Upscaling factor of each side; a pipeline that is not an upscaler refuses."""
    savings: tuple[str, ...] = ()
    """Names of `SAVINGS` to apply from the start, to reproduce a picture that was drawn with them."""
    limits: Limits | None = None
    """Limits for a size that is taken from a source picture; None: no limit."""
    webui: bool = False
    """From a client of AUTOMATIC1111's API, which sends every field to every model: what the model cannot use is left
    out with a warning, and `clip_skip` counts from the last layer. Otherwise that is refused with an InvalidRequest."""
    split_prompt: bool = False
    """Take `positive|negative` in the prompt for both prompts, if the model uses a negative prompt."""
    weights: bool = False
    """Read AUTOMATIC1111's markup in both prompts: `(cat:1.5)`, `[less]`, BREAK, escaped brackets."""
    crop: bool = False
    """Draw a size whose sides are no multiples of the model's at the next multiple, and crop the picture to it.
    Otherwise it is refused."""
    hires: Hires | None = None
    """A second pass, for a picture without sources."""
    latents: str = ""
    """A name of `sampling.UPSCALERS`: the source picture is enlarged as latents."""
    notes: tuple[str, ...] = ()
    """Warnings that are known before it is drawn, in the form of `Done.warnings`."""
    keep_alive: float | None = None
    """Seconds that the model stays in memory once it is idle; None: as its file or the server says."""
    runner: str = ""
    """`Recipe.runner` of a picture to draw again: where `accelerate` is `auto`, the choice is that one's."""
    priority: str = INTERACTIVE
    """A name of `PRIORITIES`. No pixel depends on it."""
    deadline: float | None = None
    """When it should be done, in seconds since 1970; it only orders its caller's generations."""


@dataclass(frozen=True, slots=True)
class RecordedControl:
    """A control as a recipe has it; the fields of `Control`, with digests."""

    image_sha256: str
    """Digest of the decoded picture."""
    weight: float | None = None
    start: float | None = None
    end: float | None = None
    mode: int | None = None
    name: str | None = None
    net_sha256: str | None = None
    """Digest of the weights of the ControlNet or IP-Adapter, if the request named it."""
    preprocess: str | None = None
    thresholds: tuple[float, float] | None = None
    joins: bool = False
    estimators: tuple[tuple[str, str], ...] = ()
    """What `preprocess` estimated with: for each model its hub id or folder, and the SHA-256 of its weights."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that made one result; `sfumato generate --like` reproduces it from this alone."""

    model: str
    source: str
    """Hub id (with `@commit`), path or URL that the weights came from."""
    pipeline: str
    """diffusers class that drew it."""
    prompt: str
    seed: int
    sampling: Sampling
    """The values that the pipeline used, including its own defaults. Width and height are those of the picture; the
    scheduler is our name for it, or the diffusers class if the model's own was kept."""
    image_sha256: tuple[str, ...]
    """Digests of the decoded source pictures as the pipeline received them (see `pictures.fingerprint`)."""
    mask_sha256: str | None
    device: str
    dtype: str
    versions: dict[str, str] = field(default_factory=dict)
    savings: tuple[str, ...] = ()
    """Names of `SAVINGS` that the picture was drawn with, and the model's savings in weights."""
    masked_area: tuple[int, int, int] | None = None
    """If only the masked area was drawn: padding in pixels, and the width and height it was drawn at."""
    weights: bool = False
    """Whether AUTOMATIC1111's markup was read in the prompts."""
    embeddings: tuple[str, ...] = ()
    """Textual inversions in the prompts, as `name:hash` with the SHA-256 of their files."""
    drawn_size: tuple[int, int] | None = None
    """Width and height that it was drawn at, if it was cropped from that."""
    mask_from_alpha: bool = False
    """Whether the mask was the transparency of the first picture."""
    controls: tuple[RecordedControl, ...] = ()
    loras: tuple[tuple[str, str, str, float, float], ...] = ()
    """For each LoRA that acted, the model file's first: what it was named by, the SHA-256 of its file, its short hash,
    and its weights for the denoiser and for the text encoders."""
    without_loras: bool = False
    """Whether the model file has LoRAs of which none acted, and no other did."""
    runner: str = ""
    """What computed denoiser, VAE and text encoders, as in `RunnerState`; `eager+...` if that could not serve all calls
    of a module. Where they differ: `unet openvino-bf16, vae eager`. Empty in recipes of earlier versions, which knew
    `eager` alone."""
    loras_off: tuple[str, ...] = ()
    """Names of the model file's LoRAs that did not act."""
    hires: Hires | None = None
    """The second pass; all other fields are of the first, except the size."""
    video_sha256: str | None = None
    """Digest of the file of the source clip."""
    audio_sha256: str | None = None
    """Digest of the file of the source sound."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture or of each frame, in pixels; zeros for a sound."""
        return self.sampling.size or (0, 0)


@dataclass(frozen=True, slots=True)
class Step:
    """Denoising step `step` of `total` is complete (1 .. total)."""

    step: int
    total: int


@dataclass(frozen=True, slots=True)
class Preview:
    """The picture after denoising step `step` of `total`.

    A run that has to restart sends its previews again, from 0.
    """

    index: int
    """0 is the first."""
    step: int
    total: int
    png: bytes
    """Usually smaller than the final picture, with the same aspect ratio; clients scale it up."""
    width: int
    height: int
    """Size of the final picture, in pixels."""


@dataclass(frozen=True, slots=True)
class Done:
    """Terminal: the file, with its recipe embedded where its format can hold one."""

    file: bytes
    recipe: Recipe
    warnings: tuple[str, ...] = ()
    """Where the result differs from the request, one sentence each, beginning with the request's field."""
    prompt_tokens: int = 0
    """Tokens of prompt and negative prompt, as the text encoder counts them; 0 without a text encoder."""
    format: str = formats.PICTURE
    """Of `file`: a name of `formats.FORMATS`, `Generation.format`."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Terminal: what went wrong."""

    error: SfumatoError


Event: TypeAlias = Step | Preview | Done | Failed
"""A stream of events is any number of `Step` and `Preview`, then exactly one `Done` or `Failed`."""

StorePicture: TypeAlias = Callable[[Done], Awaitable[str | None]]
"""Stores a result and returns its name there, or None if it was not kept."""

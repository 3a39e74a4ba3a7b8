"""What is known of models and of the engine: what requests may ask of a model, its state in memory, counters.

Sent by the worker, and shown by every front end. Standard library only; frozen, as `core` is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from sfumato.formats import IMAGE
from sfumato.sampling import Sampling

LoadState: TypeAlias = Literal["unloaded", "downloading", "loading", "ready", "in_main_memory", "failed"]


@dataclass(frozen=True, slots=True)
class Input:
    """A field of requests that a model takes."""

    name: str
    """`prompt`, `image`, `video`, `audio`, `mask` or `controls`."""
    least: int
    """How many every request needs; 0: optional."""
    most: int | None
    """None: as many as the server allows, or not known before the model is loaded."""
    roles: tuple[str, ...]
    """What they are for, in the order in which they are sent."""


@dataclass(frozen=True, slots=True)
class FrameRule:
    """How many frames a clip of a model has."""

    step: int = 1
    """`first` and a multiple of this, the frames that its VAE makes of one frame of latents."""
    most: int | None = None
    """None: as many as the server allows."""
    first: int = 1
    """The fewest."""

    def at_least(self, frames: float) -> int:
        """The smallest number of frames that the model draws and that is not below this."""
        return math.ceil((max(self.first, frames) - self.first) / self.step - 1e-9) * self.step + self.first

    def at_most(self, frames: float) -> int:
        """The largest number of frames that it draws and that is not above this; below `first`: there is none."""
        high = frames if self.most is None else min(frames, self.most)
        return math.floor((high - self.first) / self.step + 1e-9) * self.step + self.first

    def violation(self, frames: int) -> str:
        """Why a clip has not this many, in words; empty if it may."""
        if self.most is not None and frames > self.most:
            return f"at most {self.most} are drawn at a time"
        if (high := self.at_least(frames)) == frames:
            return ""
        nearest = f"the nearest are {high - self.step} and {high}" if high > self.first else f"the fewest are {high}"
        return f"frames of the form {self.step}k+{self.first} are valid; {nearest}"


@dataclass(frozen=True, slots=True)
class SoundRule:
    """What sounds a model makes. Lengths are in seconds."""

    rate: int
    """Samples a second."""
    least: float = 0.0
    most: float | None = None
    """None: as long as the server allows."""
    piece: float = 0.0
    """The class rounds a length down to a multiple of this; 0: it does not."""

    def samples(self, seconds: float) -> int:
        return math.floor(seconds * self.rate + 1e-6)

    def violation(self, seconds: float) -> str:
        """Why a sound is not this long, in words; empty if it may."""
        if self.most is not None and seconds > self.most:
            return f"at most {self.most:.6g} are made at a time"
        return f"at least {self.least:.3g} are made" if seconds < self.least else ""


@dataclass(frozen=True, slots=True)
class Abilities:
    """What requests may ask of a model."""

    tasks: tuple[str, ...] = ()
    """What it does, of text-to-image, label-to-image, image-to-image, inpainting and upscaling, or of text-to-video,
    image-to-video and video-to-video, or of text-to-audio and audio-to-audio."""
    inputs: tuple[Input, ...] = ()
    problem: str = ""
    """Why no request can have anything of it, in words."""
    kind: str = IMAGE
    """What it makes: a name of `formats.KINDS`."""
    frames: FrameRule | None = None
    """Of clips; None: it makes none, or the files do not say."""
    sound: SoundRule | None = None
    """Of sounds; None: it makes none, or the files do not say."""

    def input(self, name: str) -> Input | None:
        return next((each for each in self.inputs if each.name == name), None)


@dataclass(frozen=True, slots=True)
class RunnerState:
    """What computes a module of a model."""

    module: str
    """Its name in the pipeline: `unet`, `transformer`."""
    runner: str
    """`eager`: the module itself. `openvino-fp32`, `openvino-bf16`: a graph made of it, in this precision; `openvino`
    before the precision is known. `compile-bf16`: torch.compile. `parallel-2`: two devices. `auto`: chosen for the
    first picture."""
    detail: str = ""
    """Why it is eager, what was measured, or what is not ready yet or not served by the graph."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known about a loaded model. None: the pipeline does not say."""

    pipeline: str
    """diffusers class."""
    abilities: Abilities
    sampling: Sampling
    """Defaults for requests, including the model file's."""
    size_multiple: int
    """Both sides are multiples of this, in pixels."""
    prompt_tokens: int | None
    """Maximum prompt length of the text encoder in tokens, including its start and end tokens."""
    transparent: bool
    """Whether the model draws pictures with an alpha channel."""
    upscale: int | None
    """Upscaling factor, for an upscaler."""
    device: str
    dtype: str
    memory_bytes: int = 0
    """What its weights take in memory; what it shares with another model counts for both."""
    savings: tuple[str, ...] = ()
    """Memory savings in effect for every picture, as recipes have them."""
    runners: tuple[RunnerState, ...] = ()
    """What computes its denoisers, VAE and text encoders."""

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.abilities.tasks


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the engine started; they continue when a worker dies and the next one starts."""

    forwards: int = 0
    """Forward passes of heavy modules."""
    batch_sizes: Mapping[int, int] = field(default_factory=dict)
    """Number of requests that shared a denoiser forward pass → number of such forward passes."""
    unbatched: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Module name (`unet`, `vae` ...) and reason → forward passes that could not have been batched with any request."""
    prompt_hits: int = 0
    """Calls of text encoders answered from the prompt-embedding cache."""
    prompt_misses: int = 0
    """Calls of text encoders that were computed, though the cache could have had them."""
    prompt_cache_bytes: int = 0
    steps: int = 0
    """Total denoising steps of all requests."""
    step_seconds: float = 0.0
    """Time between steps, summed over requests; divided by `steps` it is the mean time per step."""
    loads: int = 0
    evictions: int = 0
    restarts: int = 0
    """Workers started to replace one that had died."""
    resident_models: int = 0
    model_bytes: Mapping[str, int] = field(default_factory=dict)
    """Model in memory → bytes of its weights; what two models share counts for both."""
    memory_bytes: int = 0
    """Resident memory of the worker."""
    device_memory_bytes: int = 0
    """Memory allocated on the accelerator."""


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """State of a model in the engine."""

    state: LoadState = "unloaded"
    detail: str = ""
    """What is being fetched, or why the load failed."""
    progress: float | None = None
    """0 .. 1 while downloading."""
    info: ModelInfo | None = None
    """Set once the model is ready."""

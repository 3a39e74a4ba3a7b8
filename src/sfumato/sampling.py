"""The sampling parameters: one table, and one value that requests, generations and recipes carry.

The fields of both HTTP dialects, the model file's keys, the limit checks, the command line's options, the infotext and
the reference pages are made from the table. A new parameter takes one line in `Sampling`, and one more where it is
used if it is not just an argument of the pipeline call.

The seed is not a sampling parameter: the pictures of one request share their `Sampling` and differ in the seed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

from sfumato.errors import InvalidRequest
from sfumato.formats import AUDIO, IMAGE, KINDS, VIDEO

MAX_PROMPT = 32_000
"""Characters of a prompt, positive or negative."""


SEEN = (IMAGE, VIDEO)
"""The kinds of results that have a size."""

MAX_LYRICS = 16_000
"""Characters of the words of a song."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """The metadata of one field of `Sampling`."""

    name: str
    kind: type
    """int, float or str."""
    help: str
    """One sentence, without the full stop."""
    least: float | None = None
    most: float | None = None
    """Limits of a number; for a string, `most` is its maximum length in characters."""
    example: Any = None
    of: tuple[str, ...] = KINDS
    """The kinds of results that it is for; requests for others do not have it."""

    argument: str | None = None
    """Name of the pipeline call's argument; None: it is not an argument."""
    guarded: bool = False
    """Requests may set it only if the model file's `enable_parameters` lists its argument."""
    source: bool = False
    """It has an effect only with a source picture."""
    side: bool = False
    """A side of the picture: requests, model files and the command line give both sides as one `size`."""
    stepped: bool = False
    """The pipeline passes it to its scheduler's steps; it has no effect if the scheduler does not take it."""
    reported: bool = False
    """Recipes always have it, with the pipeline's default if it was not set. Otherwise only if it was set."""

    aliases: tuple[str, ...] = ()
    """Other names of it in OpenAI's and LocalAI's requests."""
    empty: bool = False
    """There, an empty string is a value: it replaces the model file's."""
    a1111: str | None = None
    """Its name in AUTOMATIC1111's bodies; None: see `api.a1111.bodies` for how they give it."""
    one_based: bool = False
    """It is `clip_skip`: AUTOMATIC1111 counts layers from the last one, which is 1, for every class (`clip_layer`). Its
    requests are carried as if the class read that one by itself, until the class is known."""
    neutral: tuple[Any, ...] = ()
    """Values that AUTOMATIC1111's clients send by default; treated as not set."""
    infotext: str | None = None
    """Its key in an infotext; None: see `pictures.recipe` for how that gives it."""
    invoke: str | None = None
    """Its key in InvokeAI's metadata, if it has one."""

    flag: str
    """Option of the command line."""
    keys: tuple[str, ...] = ()
    """Keys of the model file; if several are set, the last one wins."""
    most_in_file: float | None = None
    """Maximum in a model file, if it is higher than in requests."""
    absent: str = ""
    """Text for the reference page: what applies if the model file does not set it."""


def _parameter(help: str, **metadata: Any) -> Any:
    return field(default=None, metadata={"help": help, **metadata})


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling parameters of a picture, a clip or a sound, in the order of an infotext. None: the model's default."""

    steps: int | None = _parameter(
        "Denoising steps", argument="num_inference_steps", least=1, most=1000, example=20, guarded=True, reported=True,
        aliases=("step", "num_inference_steps"), a1111="steps", infotext="Steps", invoke="steps",
        keys=("step",), most_in_file=10_000,
        absent="few if it was distilled to that, 30 for Stable Diffusion, else the pipeline's own",
    )  # fmt: skip
    scheduler: str | None = _parameter(
        "Scheduler, by a name of docs/reference/schedulers.md", example="k_dpmpp_2m", reported=True,
        aliases=("sampler", "scheduler_type"), keys=("diffusers.scheduler_type",), absent="the model's own",
    )  # fmt: skip
    guidance_scale: float | None = _parameter(
        "Guidance scale; 0 is none", argument="guidance_scale", least=0, most=100.0, example=7.0, reported=True,
        aliases=("cfg_scale",), a1111="cfg_scale", infotext="CFG scale", invoke="cfg_scale",
        flag="--guidance", keys=("cfg_scale", "diffusers.cfg_scale"), most_in_file=1000,
        absent="0 or 1 for models distilled to few steps, 8 for Stable Diffusion",
    )  # fmt: skip
    width: int | None = _parameter("Pixels", argument="width", of=SEEN, side=True, reported=True, invoke="width")
    height: int | None = _parameter("Pixels", argument="height", of=SEEN, side=True, reported=True, invoke="height")
    strength: float | None = _parameter(
        "0..1: how far the result may move from the source picture", argument="strength", least=0, most=1,
        example=0.75, source=True, of=SEEN, reported=True, a1111="denoising_strength",
        infotext="Denoising strength", invoke="strength", keys=("strength",),
    )  # fmt: skip
    clip_skip: int | None = _parameter(
        "Text encoder layers to skip, from the one that the pipeline class reads by itself: the last one; for XL and "
        "Stable Diffusion 3 the last but one", argument="clip_skip", least=0, most=64, guarded=True,
        reported=True, a1111="clip_skip", one_based=True, infotext="Clip skip", invoke="clip_skip",
        keys=("clip_skip", "parameters.clip_skip", "diffusers.clip_skip"), most_in_file=100,
    )  # fmt: skip
    negative_prompt: str | None = _parameter(
        "What to keep out of the picture", argument="negative_prompt", most=MAX_PROMPT, guarded=True, reported=True,
        empty=True, a1111="negative_prompt", invoke="negative_prompt", flag="--negative",
        keys=("parameters.negative_prompt",),
    )  # fmt: skip
    max_sequence_length: int | None = _parameter(
        "Tokens of the prompt that T5 or a language model reads; the rest is cut off", argument="max_sequence_length",
        least=1, most=4096, a1111="max_sequence_length", infotext="Max sequence length",
        keys=("max_sequence_length", "diffusers.max_sequence_length"),
        absent="256 for Flux schnell and for `pipeline_type: FluxPipeline`, as in LocalAI; else the pipeline's own",
    )  # fmt: skip
    eta: float | None = _parameter(
        "0..1: noise added at each step, by schedulers that take it, such as ddim", argument="eta", least=0, most=1,
        stepped=True, a1111="eta", neutral=(1,), infotext="Eta", keys=("eta", "diffusers.eta"),
    )  # fmt: skip
    guidance_rescale: float | None = _parameter(
        "0..1: how far to rescale the guided prediction, against over-exposure", argument="guidance_rescale", least=0,
        most=1, a1111="guidance_rescale", infotext="CFG Rescale", invoke="cfg_rescale_multiplier",
        keys=("guidance_rescale", "diffusers.guidance_rescale"),
    )  # fmt: skip

    guidance_start: float | None = _parameter(
        "0..1: guidance acts from this part of the steps on; the steps before it are drawn without, which takes half "
        "the time", least=0, most=1, example=0.1, a1111="guidance_start", infotext="CFG start",
        keys=("guidance_start", "diffusers.guidance_start"), absent="0",
    )  # fmt: skip
    guidance_end: float | None = _parameter(
        "0..1: guidance acts up to this part of the steps; the steps after it are drawn without, which takes half the "
        "time", least=0, most=1, example=0.7, a1111="guidance_end", infotext="CFG end",
        keys=("guidance_end", "diffusers.guidance_end"), absent="1",
    )  # fmt: skip

    num_frames: int | None = _parameter(
        "Frames of a clip", of=(VIDEO,), least=1, most=10_000, example=49, flag="--frames",
        keys=("num_frames",), absent="the pipeline's own",
    )  # fmt: skip
    fps: float | None = _parameter(
        "Frames a second of a clip", of=(VIDEO,), least=1, most=120, example=16, keys=("fps",),
        absent="what the class was trained with",
    )  # fmt: skip
    seconds: float | None = _parameter(
        "Length of a clip or a sound in seconds; of a clip it is rounded up to frames that the class draws",
        of=(VIDEO, AUDIO), least=0.1, most=3600, example=4, keys=("seconds",),
        absent="the pipeline's own",
    )  # fmt: skip
    lyrics: str | None = _parameter(
        "Words that are sung, with marks such as `[verse]`; for ACE-Step", of=(AUDIO,), argument="lyrics",
        most=MAX_LYRICS, example="[verse] la la", keys=("lyrics",), absent="none",
    )  # fmt: skip
    vocal_language: str | None = _parameter(
        "Language of `lyrics`", of=(AUDIO,), argument="vocal_language", most=20, example="en",
        keys=("vocal_language",), absent="the pipeline's own",
    )  # fmt: skip
    bpm: int | None = _parameter(
        "Beats a minute of music", of=(AUDIO,), argument="bpm", least=20, most=400, example=80, keys=("bpm",),
        absent="the model chooses",
    )  # fmt: skip
    keyscale: str | None = _parameter(
        "Key of music", of=(AUDIO,), argument="keyscale", most=40, example="C major", keys=("keyscale",),
        absent="the model chooses",
    )  # fmt: skip
    timesignature: str | None = _parameter(
        "Beats of a bar of music", of=(AUDIO,), argument="timesignature", most=20, example="4",
        keys=("timesignature",), absent="the model chooses",
    )  # fmt: skip

    def __getitem__(self, parameter: Parameter) -> Any:
        return getattr(self, parameter.name)

    @property
    def guided(self) -> tuple[float, float]:
        """The part of the steps that is drawn with guidance: from where to where, 0..1."""
        return (self.guidance_start or 0.0, 1.0 if self.guidance_end is None else self.guidance_end)

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height in pixels; None: the model's default."""
        return (self.width, self.height) if self.width and self.height else None


def _parameters() -> tuple[Parameter, ...]:
    hints = get_type_hints(Sampling)
    flags = {spec.name: "--" + spec.name.replace("_", "-") for spec in fields(Sampling)}
    return tuple(
        Parameter(
            **{"name": spec.name, "kind": get_args(hints[spec.name])[0], "flag": flags[spec.name], **spec.metadata}
        )
        for spec in fields(Sampling)
    )


PARAMETERS = _parameters()
"""One `Parameter` for each field of `Sampling`, in order."""

OF_PICTURES = tuple(each for each in PARAMETERS if IMAGE in each.of)
"""Those that requests for pictures have."""

NAMED: Mapping[str, Parameter] = MappingProxyType({each.name: each for each in PARAMETERS})


@dataclass(frozen=True, slots=True, kw_only=True)
class Hires:
    """A second pass: the finished picture enlarged, and drawn again from that by the same model."""

    upscaler: str
    """A key of `UPSCALERS`."""
    sampling: Sampling
    """Of the second pass, with the size of the result and the strength. None: as in the first."""
    prompt: str | None = None
    """None: as in the first pass."""
    scale: float | None = None
    """How many times as long the sides are, if that was requested, and not the size."""
    first: tuple[int, int] | None = None
    """In a recipe: width and height of the first pass."""

    @property
    def steps(self) -> int:
        """Denoising steps that the second pass runs: its strength leaves out the others."""
        return max(1, int((self.sampling.steps or 1) * (self.sampling.strength or 0.0) + 1e-9))


def whole_steps(steps: int, strength: float) -> int:
    """Steps of image-to-image that runs `steps` of them: diffusers runs the part `strength` of all."""
    return min(int(NAMED["steps"].most or steps), math.ceil(steps / strength - 1e-9)) if strength > 0 else steps


def fewer_steps(hires: Hires, steps: int) -> list[str]:
    """A warning if the second pass runs fewer than these steps, as `whole_steps` has a limit."""
    if hires.steps >= steps or not hires.sampling.strength:
        return []
    return [
        f"hr_second_pass_steps: {hires.steps} of {steps} are run: the second pass is the part "
        f"{hires.sampling.strength:g} (denoising_strength) of {hires.sampling.steps} steps, which are the most"
    ]


UPSCALERS: Mapping[str, tuple[str, bool] | None] = MappingProxyType(
    {
        "Latent": ("bilinear", False),
        "Latent (antialiased)": ("bilinear", True),
        "Latent (bicubic)": ("bicubic", False),
        "Latent (bicubic antialiased)": ("bicubic", True),
        "Latent (nearest)": ("nearest", False),
        "Latent (nearest-exact)": ("nearest-exact", False),
        "Lanczos": None,
        "Nearest": None,
    }
)
"""How a picture is enlarged between two passes, by AUTOMATIC1111's names → for its latents, the mode of torch's
`interpolate` and whether that is antialiased; None: its pixels are."""


PENULTIMATE = re.compile(r"(?<!I2VGen)XL|StableDiffusion3")
"""Names of pipeline classes that read the last but one layer of their text encoders by themselves."""


def clip_layer(clip_skip: int | None, pipeline: str) -> int:
    """The text encoder layer that a pipeline class reads with this `clip_skip`; 1 is the last, as in AUTOMATIC1111."""
    return (clip_skip or 0) + (2 if PENULTIMATE.search(pipeline) else 1)


def clip_skip_for(layer: int, pipeline: str) -> int:
    """The `clip_skip` with which a pipeline class reads this layer, or its own if that is not one of the later ones."""
    return max(0, layer - clip_layer(0, pipeline))


def prompt_pair(text: str) -> tuple[str, str] | None:
    """Prompt and negative prompt of `positive|negative`, LocalAI's way to send both in one field; None: it is text.

    Several bars, and braces as in `{red|blue}`, are others' ways to write a text.
    """
    if text.count("|") != 1 or "{" in text or "}" in text:
        return None
    positive, _, negative = text.partition("|")
    return positive.strip(), negative.strip()


def merged(*choices: Sampling) -> Sampling:
    """For each field the first value that is not None. Order: request, model file, defaults."""

    def first(parameter: Parameter) -> Any:
        return next((choice[parameter] for choice in choices if choice[parameter] is not None), None)

    return Sampling(**{each.name: first(each) for each in PARAMETERS})


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Move the sampling parameters of a flat mapping, such as a JSON object, into its `sampling`."""
    others = {name: value for name, value in values.items() if name not in NAMED}
    sampling = {name: value for name, value in values.items() if name in NAMED}
    return others | {"sampling": Sampling(**sampling)}


def refuse_no_guidance(sampling: Sampling) -> None:
    """Raises InvalidRequest if no step at all would be drawn with guidance."""
    start, end = sampling.guided
    if start >= end:
        raise InvalidRequest(
            f"guidance_start {start:g} is not before guidance_end {end:g}: the part of the steps, 0 to 1, that is "
            "drawn with guidance; absent, they are 0 and 1. For none send guidance_scale 1",
            param="guidance_end" if sampling.guidance_start is None else "guidance_start",
        )


def flat(sampling: Sampling) -> dict[str, Any]:
    """The fields for a JSON object: those that are set or always reported."""
    return {each.name: sampling[each] for each in PARAMETERS if each.reported or sampling[each] is not None}

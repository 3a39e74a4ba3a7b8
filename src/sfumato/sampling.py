"""What decides how a picture is sampled: one table of parameters, carried whole by request, generation and recipe.

From it come the fields of both HTTP dialects, the model file's keys, the checks of limits, the options of the command
line, the pairs of an infotext and the reference pages. To add a parameter is one line in `Sampling`, and one where it
is used if it is more than an argument of the pipeline's call.

A seed is not among them: pictures of one request share their sampling and differ in the seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

MAX_PROMPT = 32_000
"""Characters of a prompt, positive or negative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """What is known of one field of `Sampling`."""

    name: str
    kind: type
    """int, float or str."""
    help: str
    """A sentence without its full stop."""
    least: float | None = None
    most: float | None = None
    """Of a number; of a text its characters."""
    example: Any = None

    argument: str | None = None
    """Of the pipeline's call; None: it is no argument."""
    guarded: bool = False
    """Requests may set it only where the model file's `enable_parameters` has its argument."""
    source: bool = False
    """It means something only with a source picture."""
    side: bool = False
    """Of the picture: requests, model files and the command line say both sides as one `size`."""
    stepped: bool = False
    """The pipeline hands it on to its scheduler's steps; a scheduler that does not take it leaves it without effect."""
    reported: bool = False
    """A recipe has it always: the pipeline's own default where nobody set it. Otherwise only where it was set."""

    aliases: tuple[str, ...] = ()
    """Its other names in requests of OpenAI's and LocalAI's kind."""
    empty: bool = False
    """In those an empty text is a value, which stands in for the model file's."""
    a1111: str | None = None
    """Its name in AUTOMATIC1111's bodies; None: they say it otherwise, see `api.a1111.bodies`."""
    one_based: bool = False
    """AUTOMATIC1111 counts it from 1, which is none of it."""
    neutral: tuple[Any, ...] = ()
    """Values that AUTOMATIC1111's clients send unasked: they ask for nothing."""
    optional: bool = False
    """AUTOMATIC1111's clients send it to every model: where one does not take it, it is left out with a warning."""
    infotext: str | None = None
    """Its key in an infotext; None: that says it otherwise, see `pictures.recipe`."""
    invoke: str | None = None
    """Its key in InvokeAI's metadata; None: it has none."""

    flag: str
    """Of the command line."""
    keys: tuple[str, ...] = ()
    """Of a model file; of several the last that is given counts."""
    most_in_file: float | None = None
    """Where a model file may say more than a request."""
    absent: str = ""
    """What holds where a model file says nothing, for its reference page."""


def _parameter(help: str, **known: Any) -> Any:
    return field(default=None, metadata={"help": help, **known})


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a picture is sampled. None: as the model has it.

    In the order of an infotext.
    """

    steps: int | None = _parameter(
        "Denoising steps", argument="num_inference_steps", least=1, most=1000, example=20, guarded=True, reported=True,
        aliases=("step", "num_inference_steps"), a1111="steps", optional=True, infotext="Steps", invoke="steps",
        keys=("step",), most_in_file=10_000, absent="30 for Stable Diffusion, else the pipeline's own",
    )  # fmt: skip
    scheduler: str | None = _parameter(
        "Scheduler, by a name of docs/reference/schedulers.md", example="k_dpmpp_2m", reported=True,
        aliases=("sampler", "scheduler_type"), keys=("diffusers.scheduler_type",), absent="the model's own",
    )  # fmt: skip
    guidance_scale: float | None = _parameter(
        "Guidance scale; 0 is none", argument="guidance_scale", least=0, most=100.0, example=7.0, reported=True,
        aliases=("cfg_scale",), a1111="cfg_scale", optional=True, infotext="CFG scale", invoke="cfg_scale",
        flag="--guidance", keys=("cfg_scale", "diffusers.cfg_scale"), most_in_file=1000,
        absent="8 for Stable Diffusion",
    )  # fmt: skip
    width: int | None = _parameter("Pixels", argument="width", side=True, reported=True, invoke="width")
    height: int | None = _parameter("Pixels", argument="height", side=True, reported=True, invoke="height")
    strength: float | None = _parameter(
        "0..1: how far the result may move from the source picture", argument="strength", least=0, most=1,
        example=0.75, source=True, reported=True, a1111="denoising_strength", infotext="Denoising strength",
        invoke="strength", keys=("strength",),
    )  # fmt: skip
    clip_skip: int | None = _parameter(
        "Number of last text encoder layers to skip", argument="clip_skip", least=0, most=64, guarded=True,
        reported=True, a1111="clip_skip", one_based=True, infotext="Clip skip", invoke="clip_skip",
        keys=("clip_skip", "parameters.clip_skip", "diffusers.clip_skip"), most_in_file=100,
    )  # fmt: skip
    negative_prompt: str | None = _parameter(
        "What to keep out of the picture", argument="negative_prompt", most=MAX_PROMPT, guarded=True, reported=True,
        empty=True, a1111="negative_prompt", invoke="negative_prompt", flag="--negative",
        keys=("parameters.negative_prompt",),
    )  # fmt: skip
    eta: float | None = _parameter(
        "0..1: noise added at each step, by schedulers that take it, such as ddim", argument="eta", least=0, most=1,
        stepped=True, a1111="eta", neutral=(1,), optional=True, infotext="Eta", keys=("eta", "diffusers.eta"),
    )  # fmt: skip
    guidance_rescale: float | None = _parameter(
        "0..1: how far to rescale the guided prediction, against over-exposure", argument="guidance_rescale", least=0,
        most=1, a1111="guidance_rescale", optional=True, infotext="CFG Rescale", invoke="cfg_rescale_multiplier",
        keys=("guidance_rescale", "diffusers.guidance_rescale"),
    )  # fmt: skip

    def __getitem__(self, parameter: Parameter) -> Any:
        return getattr(self, parameter.name)

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height; None: as the model has it."""
        return (self.width, self.height) if self.width and self.height else None


def _known() -> tuple[Parameter, ...]:
    hints = get_type_hints(Sampling)
    flags = {spec.name: "--" + spec.name.replace("_", "-") for spec in fields(Sampling)}
    return tuple(
        Parameter(
            **{"name": spec.name, "kind": get_args(hints[spec.name])[0], "flag": flags[spec.name], **spec.metadata}
        )
        for spec in fields(Sampling)
    )


PARAMETERS = _known()
"""Of each field of `Sampling`, in order."""

NAMED: Mapping[str, Parameter] = MappingProxyType({each.name: each for each in PARAMETERS})


def merged(*choices: Sampling) -> Sampling:
    """Field by field the first choice that says something: the request, then the model file, then defaults."""

    def first(parameter: Parameter) -> Any:
        return next((choice[parameter] for choice in choices if choice[parameter] is not None), None)

    return Sampling(**{each.name: first(each) for each in PARAMETERS})


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that stand side by side, as in JSON, as fields of a dataclass that carries a `Sampling`."""
    own = {name: value for name, value in values.items() if name not in NAMED}
    sampling = {name: value for name, value in values.items() if name in NAMED}
    return own | {"sampling": Sampling(**sampling)}


def flat(sampling: Sampling) -> dict[str, Any]:
    """Its fields for a JSON object, without those that nobody set and that are not always reported."""
    return {each.name: sampling[each] for each in PARAMETERS if each.reported or sampling[each] is not None}

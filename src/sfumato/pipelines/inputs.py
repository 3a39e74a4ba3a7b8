"""What a pipeline class takes besides a prompt, and what comes out of it: the tables that its source is read with.

`models.class_reading` makes a `Reading` of a class; `abilities` says what requests may ask of it. Nothing here knows a
class by name: a parameter of the call has a role by its own name, whichever class it belongs to.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sfumato.errors import InvalidRequest
from sfumato.formats import AUDIO, IMAGE, VIDEO
from sfumato.formats import WORDS as RESULTS
from sfumato.status import Abilities, FrameRule, Input, SoundRule

PICTURE, ORIGINAL, EXAMPLE, REFERENCE, LAST = "picture", "original", "example", "reference", "last"
MASK, CONTROL, LABEL = "mask", "control", "label"

ROLES: Mapping[str, str] = MappingProxyType(
    {
        "image": PICTURE,
        "images": PICTURE,
        "input_images": PICTURE,
        "original_image": ORIGINAL,
        "example_image": EXAMPLE,
        "reference_image": REFERENCE,
        "image_reference": REFERENCE,
        "last_image": LAST,
        "mask_image": MASK,
        "mask": MASK,
        "control_mask": MASK,
        "control_image": CONTROL,
        "condtioning_image": CONTROL,  # spelt so in diffusers
        "class_labels": LABEL,
    }
)
"""Parameter of a pipeline's call -> what a request puts into it. A parameter that is not here gets nothing."""

SOURCES = (ORIGINAL, PICTURE, EXAMPLE, REFERENCE, LAST)
"""Roles that a request's `image`s fill, in this order; a mask belongs to the first."""

WORDS: Mapping[str, str] = MappingProxyType(
    {
        PICTURE: "a source picture",
        ORIGINAL: "the original picture",
        EXAMPLE: "an example picture",
        REFERENCE: "a reference picture",
        LAST: "the last frame",
        CONTROL: "a control picture",
    }
)

SCALES = ("controlnet_conditioning_scale", "adapter_conditioning_scale")
"""Parameters for the weight of a control. A class with one and without `control_image` takes the control as `image`."""

STARTS = ("control_guidance_start",)
ENDS = ("control_guidance_end", "adapter_conditioning_factor")
MODES = ("control_mode",)
"""Parameters for the other fields of a control."""

FRAME_COUNTS = ("num_frames", "video_length", "frames")
"""Parameters for the number of pictures in a row."""

SOURCE_CLIPS = ("video", "pose_video", "face_video", "conditioning_video", "conditioning_frames", "control_video")
"""Parameters for moving pictures, which a request cannot give."""

SOURCE_SOUNDS = ("audio",)
"""Parameters for sound, which a request cannot give."""

MOVING, SOUND = "moving pictures", "sound"

OUTPUTS: Mapping[str, str] = MappingProxyType(
    {
        "audios": SOUND,
        "frames": MOVING,
        "video": MOVING,
        "images": "",
        "image": "",
        "prediction": "",
        "rgb": "",
        "image_embeds": "embeddings for another pipeline",
        "image_embeddings": "embeddings for another pipeline",
        "prompt_embeds": "embeddings for another pipeline",
        "texts": "text",
        "sequences": "text",
    }
)
"""Field of a pipeline's output -> what it is, in words; empty: a picture. Of several fields the first here counts."""

SERVED: Mapping[str, str] = MappingProxyType({"": IMAGE, MOVING: VIDEO, SOUND: AUDIO})
"""What a class makes, in those words -> the kind of results that it can be asked for."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the call that has a role."""

    name: str
    role: str
    required: bool
    """Whether the class cannot draw without it, whatever the default in its signature."""
    many: bool = False
    """Whether it takes several pictures for one result."""

    @property
    def plural(self) -> bool:
        """Whether it takes a list, of a single picture too."""
        return self.name.endswith("s")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a pipeline class takes and returns."""

    name: str
    parameters: tuple[str, ...]
    """Of its call."""
    inputs: tuple[Parameter, ...]
    output: str = ""
    """What it returns, in words; empty: a picture."""
    unmet: tuple[str, ...] = ()
    """Parameters without a default that have no role: a request cannot give them."""
    own_denoiser: bool = False
    """Whether its denoiser takes a mask beside the latents, which that of its siblings does not."""
    lacks: str = ""
    """Components that it needs and that the model does not have."""

    def of(self, *roles: str) -> Parameter | None:
        """The first parameter with one of these roles, in their order."""
        return next((each for role in roles for each in self.inputs if each.role == role), None)

    @property
    def sources(self) -> tuple[Parameter, ...]:
        """What a request's `image`s are for, in their order."""
        return tuple(each for role in SOURCES for each in self.inputs if each.role == role)

    @property
    def takes_prompt(self) -> bool:
        return "prompt" in self.parameters

    def kind(self, options: Mapping[str, Any]) -> str | None:
        """What requests have of it: a name of `formats.KINDS`; None: nothing. A clip of one frame is a picture."""
        one_frame = any(options.get(count) == 1 for count in FRAME_COUNTS if count in self.parameters)
        return IMAGE if self.output == MOVING and one_frame else SERVED.get(self.output)

    def problem(self, options: Mapping[str, Any]) -> str:
        """Why no request can have anything of it, in words; empty if it can. `options`: those of the model file."""
        if self.kind(options) is None:
            served = ", ".join(RESULTS[kind] for kind in SERVED.values())
            return f"{self.name} makes {self.output}, and Sfumato serves {served}"
        if self.lacks:
            return f"{self.name} needs {self.lacks}, which this model does not have"
        if unmet := [name for name in self.unmet if name not in options]:
            return f"{self.name} needs {', '.join(unmet)}, which a request cannot give"
        prompts = [name for name in self.parameters if re.fullmatch(r"(?!negative)(?!.*_per_)\w+_prompt", name)]
        if prompts and not self.takes_prompt:
            return f"{self.name} is asked with {' and '.join(prompts)}, which a request cannot give"
        if self.of(MASK) and not self.sources:
            return f"{self.name} takes a mask without a picture, which a request cannot give"
        return ""


def role_of(name: str, parameters: Collection[str]) -> str | None:
    """The role of a parameter among those of its call."""
    if name == "control_image" and "control_mask" in parameters:
        return PICTURE  # what is to be redrawn
    if name == "image" and "control_image" not in parameters and any(scale in parameters for scale in SCALES):
        return CONTROL
    return ROLES.get(name)


def of_signature(name: str, parameters: Mapping[str, inspect.Parameter]) -> Reading:
    """What a signature alone says: what has a default is optional, and a picture comes out."""

    def required(parameter: str) -> bool:
        return parameters[parameter].default is inspect.Parameter.empty

    inputs = tuple(
        Parameter(each, role, required(each)) for each in parameters if (role := role_of(each, tuple(parameters)))
    )
    known = {each.name for each in inputs} | {"prompt", "args"}
    return Reading(
        name,
        tuple(parameters),
        inputs,
        unmet=tuple(each for each in parameters if each not in known and required(each)),
    )


@dataclass(frozen=True, slots=True)
class Kin:
    """A class with those that diffusers has for other tasks on the same weights, and what the weights say."""

    own: Reading
    image: Reading | None = None
    mask: Reading | None = None
    """None: there is none, or it does not take the same controls."""
    masks_only: bool = False
    """Whether the denoiser takes a mask beside the latents, so that it draws nothing without one."""
    nets: int = 1
    """Control nets or adapters, each of which takes a control picture."""
    kinds: int = 0
    """Kinds of controls that a single net tells apart, if it does: it takes up to so many pictures."""
    more: bool = False
    """Whether there may be more nets, which is not known before the model is loaded."""
    frames: FrameRule | None = None
    """Of the clips that it draws, if it is known."""
    sound: SoundRule | None = None
    """Of the sounds that it makes, if it is known."""

    def without_mask(self) -> Reading | None:
        """The class for a source picture alone."""
        mask = self.own.of(MASK)
        if not self.masks_only and self.own.sources and not (mask and mask.required):
            return self.own
        return None if self.masks_only else self.image

    def with_mask(self) -> Reading | None:
        return self.own if self.own.of(MASK) else self.mask

    def as_control(self) -> bool:
        """Whether a source picture alone is taken for the control picture."""
        control = self.own.of(CONTROL)
        return bool(control and control.required and not any(each.required for each in self.own.sources))


def abilities(kin: Kin, options: Mapping[str, Any]) -> Abilities:
    """What requests may ask of a class."""
    own = kin.own
    if problem := own.problem(options):
        return Abilities(problem=problem)
    text = not kin.masks_only and not any(each.required for each in own.inputs)
    if own.kind(options) == VIDEO:
        moving = {"text-to-video": text, "image-to-video": bool(own.sources)}
        tasks = tuple(task for task, drawn in moving.items() if drawn)
        return Abilities(tasks, _inputs(kin, text), kind=VIDEO, frames=kin.frames)
    if own.kind(options) == AUDIO:
        return Abilities(("text-to-audio",) if text else (), _inputs(kin, text), kind=AUDIO, sound=kin.sound)
    label = own.of(LABEL)
    still = {
        "text-to-image": text,
        "label-to-image": bool(label and label.required),
        "image-to-image": bool(kin.without_mask() or kin.with_mask() or kin.as_control()),
        "inpainting": kin.with_mask() is not None,
    }
    return Abilities(tuple(task for task, drawn in still.items() if drawn), _inputs(kin, text))


def _inputs(kin: Kin, text: bool) -> tuple[Input, ...]:
    readings = [each for each in (kin.own, kin.without_mask(), kin.with_mask()) if each]
    control, label = kin.own.of(CONTROL), kin.own.of(LABEL)
    most = None if kin.more else max(kin.nets, kin.kinds)
    inputs = []
    if kin.own.takes_prompt or label:
        inputs.append(Input("prompt", 1, 1, ("text",) if kin.own.takes_prompt else (LABEL,)))
    sources = max((each.sources for each in readings), key=len)
    if sources or kin.as_control():
        required = [each for each in kin.own.sources if each.required]
        least = max(len(required), 0 if text or control else 1)
        several = any(each.many for reading in readings for each in reading.sources)
        roles = tuple(each.role for each in sources) or (CONTROL,)
        inputs.append(Input("image", least, None if several else len(sources) or most, roles))
    if kin.with_mask():
        inputs.append(Input("mask", 0, 1, (MASK,)))
    if control:
        inputs.append(Input("controls", kin.nets if control.required else 0, most, (CONTROL,)))
    return tuple(inputs)


def check_kind(model: str, can: Abilities, kind: str, param: str) -> None:
    """Raises InvalidRequest naming the model's tasks, unless it makes results of this kind."""
    if can.kind != kind:
        raise InvalidRequest(
            f"{model} makes {made_by(can)}, and the request is for {RESULTS[kind]}; `tasks` in the list of models says "
            "which model makes them",
            param=param,
        )


def made_by(can: Abilities) -> str:
    """What a model makes, in words, with its tasks."""
    return f"{RESULTS[can.kind]} ({', '.join(can.tasks)})"


def check(
    model: str,
    can: Abilities,
    *,
    kind: str,
    frames: int | None = None,
    seconds: float | None = None,
    pictures: int,
    mask: bool,
    controls: int,
    fields: Sequence[str] = ("image",),
    names: Sequence[str] = (),
) -> None:
    """Raises InvalidRequest naming the input that is missing, or that the model does not take.

    `kind` and the numbers are those of a request; `fields` are where it may have pictures, in the order of their roles;
    `names` are where it has them.
    """
    if can.problem:
        raise InvalidRequest(f"{model} draws no picture: {can.problem}", param="model")
    check_kind(model, can, kind, "model")
    if frames and can.frames and (why := can.frames.violation(frames)):
        raise InvalidRequest(f"num_frames: {frames}; {model} does not draw that many: {why}", param="num_frames")
    if seconds and can.sound and (why := can.sound.violation(seconds)):
        raise InvalidRequest(f"seconds: {seconds:g}; {model} does not make that long a sound: {why}", param="seconds")
    image = can.input("image")
    if mask and "inpainting" not in can.tasks:
        raise InvalidRequest(
            f"{model} does not take mask_image; leave the mask out. It does: {', '.join(can.tasks)}", param="mask"
        )
    pictures = _check_controls(model, can, pictures, mask=mask, controls=controls)
    if image:
        _check_pictures(model, image, pictures, fields, names)
    elif pictures:
        name = (*names, *fields)[0]
        raise InvalidRequest(f"{name}: {model} takes no picture; leave it out", param=name)
    if frames == 1 and image and image.roles[-1] == LAST and pictures == len(image.roles):
        raise InvalidRequest(f"num_frames: 1; from a first to {WORDS[LAST]} there are two or more", param="num_frames")


def check_sides(model: str, width: int, height: int, multiple: int) -> None:
    """Raises InvalidRequest unless both sides, in pixels, are multiples of what a class draws."""
    if width % multiple or height % multiple:
        raise InvalidRequest(
            f"size {width}x{height}: {model} needs sides that are multiples of {multiple}; "
            f"the nearest is {near(width, multiple)}x{near(height, multiple)}",
            param="size",
        )


def near(side: int, multiple: int) -> int:
    """The multiple next to a side, at least one."""
    return max(multiple, round(side / multiple) * multiple)


def _check_controls(model: str, can: Abilities, pictures: int, *, mask: bool, controls: int) -> int:
    """The pictures that are no controls."""
    image, control = can.input("image"), can.input("controls")
    if controls and control is None:
        raise InvalidRequest(
            f"{model} takes no control pictures by itself; leave controls out, or send the `name` of a ControlNet",
            param="controls",
        )
    if control and control.least and not controls:
        if pictures and not mask and image and not image.least:
            pictures, controls = 0, pictures  # pictures alone are the controls
        else:
            besides = " besides image" + (" and mask" if mask else "") if pictures else ""
            raise InvalidRequest(
                f'{model} needs {WORDS[CONTROL]}{besides}: send it as `controls: [{{"image": ...}}]`'
                + ("" if pictures or (image and image.least) else ", or as `image`"),
                param="controls",
            )
    if image and image.roles == (CONTROL,) and pictures and controls:
        raise InvalidRequest(
            f"{model} takes no picture besides controls, which may be sent as `image` instead; send one of both",
            param="image",
        )
    if control and controls and not control.least <= controls <= (control.most or controls):
        several = f"{control.least} to {control.most}" if control.least != control.most else f"{control.least}"
        raise InvalidRequest(f"controls: {model} takes {several} control pictures, got {controls}", param="controls")
    return pictures


def _check_pictures(model: str, image: Input, pictures: int, fields: Sequence[str], names: Sequence[str]) -> None:
    roles = [WORDS[role] for role in image.roles]
    if pictures < image.least:
        send = f"send one as `{fields[0]}`"
        if image.least > 1:
            send = f"send them as {' and '.join(f'`{field}`' for field in fields)}, in this order; got {pictures}"
        name = fields[min(pictures, len(fields) - 1)]
        raise InvalidRequest(f"{model} needs {' and '.join(roles[: image.least])}: {send}", param=name)
    if image.most is not None and pictures > image.most:
        takes = "one picture" if image.most == 1 else f"{image.most} pictures ({', then '.join(roles)})"
        only = "only one" if image.most == 1 else f"at most {image.most}"
        name = (*fields[:1], *names)[-1]
        raise InvalidRequest(f"{name}: {model} takes {takes}, got {pictures}; send {only}", param=name)

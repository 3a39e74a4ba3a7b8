"""Read a pipeline class: what its call takes and returns, from its source as text.

A signature does not say it: diffusers' calls have `image=None` whether they can do without it or not. A call that can
asks for `image is not None`; that, the names of the parameters and the class of the output are read here.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from sfumato.checkpoints import class_needs, clip_rules, diffusers_source, feature_caches, sound_rules
from sfumato.checkpoints.class_needs import Lacks, Settings
from sfumato.config import ModelConfig
from sfumato.pipelines import capabilities
from sfumato.pipelines.inputs import (
    CLIP,
    CONTROL,
    FRAME_COUNTS,
    LABEL,
    MASK,
    OUTPUTS,
    PICTURE,
    SOUND,
    SOURCE_CLIPS,
    SOURCE_SOUNDS,
    SOURCES,
    Kin,
    Parameter,
    Reading,
    abilities,
    of_signature,
    role_of,
)
from sfumato.status import Abilities, FrameRule, SoundRule

FOR_A_PICTURE = re.compile(r"Img2Img|Inpaint|Depth2Img|Upscale|SuperResolution|Pix2Pix|Edit|Refiner|Variation")
"""Names of classes that need a source picture, though their calls look at whether there is one."""

CAPTION = "text"
"""A field of the output of classes that answer a picture with words."""

MANY_BLOCKS = re.compile(r"Flux2|EditPlus|WithPrior")
"""Names of classes made of blocks, or with a prior, that take several pictures for one result."""

MASKS = frozenset({"mask", "mask_image", "masked_image_latents"})
"""What calls name a mask that they hand to the denoiser."""

WITH_PICTURE = "ip_image_proj"
"""`encoder_hid_dim_type` of a UNet with an IP-Adapter, which draws nothing without the adapter's picture."""

MASKED_CHANNELS = 9
"""Channels of a UNet that takes latents, a mask, and the latents of the masked picture."""


@functools.cache
def of_name(name: str) -> Reading | None:
    """The reading of a diffusers class; None if it has no call that can be read."""
    signature = parameters(name)
    call = next(diffusers_source.methods(name, "__call__"), None)
    if signature is None or call is None:
        return None
    fields = dict(_returned(name, call))
    inputs = tuple(
        Parameter(each, role, _required(name, call, signature, each, role), _many(name, call, each, role))
        for each in signature
        if (role := role_of(each, signature.keys())) and not (role == PICTURE and CAPTION in fields)
    )
    if source := clip_rules.SOURCES.get(name):  # a mask of these classes is moving, too
        inputs = (*(each for each in inputs if each.role != MASK), _clip(name, call, source))
    if heard := sound_rules.SOURCES.get(name):
        inputs = (*inputs, Parameter(heard.parameter, heard.role, False))
    plain = of_signature(name, signature)
    output = _output(call, fields, signature.keys())
    masked = any(each.role == MASK for each in inputs) and _concatenates_mask(name, call)
    clips = (each for each in signature if each in (*SOURCE_CLIPS, *SOURCE_SOUNDS) and each not in plain.unmet)
    unmet = plain.unmet + tuple(each for each in clips if each != source and not _does_without(name, call, each))
    return Reading(name, plain.parameters, inputs, output, unmet, masked)


def _clip(name: str, call: ast.FunctionDef, parameter: str) -> Parameter:
    return Parameter(parameter, CLIP, not _does_without(name, call, parameter))


@functools.cache
def output_fields(name: str) -> frozenset[str]:
    """The fields of what a diffusers class returns; empty if that cannot be read."""
    call = next(diffusers_source.methods(name, "__call__"), None)
    return frozenset(dict(_returned(name, call))) if call else frozenset()


def of_class(kind: type[Any], signature: Mapping[str, inspect.Parameter]) -> Reading:
    """The reading of an imported class; of one that is not diffusers' the signature alone."""
    of_diffusers = of_name(kind.__name__) if kind.__module__.startswith("diffusers.") else None
    return of_diffusers or of_signature(kind.__name__, signature)


def of_declared(name: str, tasks: Collection[str]) -> Reading:
    """The reading of a class made of blocks, which states its tasks."""
    image = Parameter("image", PICTURE, "text-to-image" not in tasks, bool(MANY_BLOCKS.search(name)))
    mask = Parameter("mask_image", MASK, "image-to-image" not in tasks)
    pictures = {"image-to-image": (image,), "inpainting": (image, mask)}
    inputs = dict.fromkeys(each for task, taken in pictures.items() if task in tasks for each in taken)
    return Reading(name, ("prompt", *(each.name for each in inputs)), tuple(inputs))


def of_pipeline(pipeline: Any) -> Reading:
    """The reading of the class of a pipeline in memory."""
    kind = type(pipeline)
    if declared := capabilities.tasks(pipeline):
        return of_declared(kind.__name__, declared)
    return of_class(kind, capabilities.parameters_of(pipeline))


@functools.cache
def parameters(name: str) -> Mapping[str, inspect.Parameter] | None:
    """Parameters of a class's call, as `capabilities.parameters_of` returns them; None: no such class."""
    for function in diffusers_source.methods(name, "__call__"):
        defaults = diffusers_source.defaults(function)
        names = [each.arg for each in (*function.args.args, *function.args.kwonlyargs) if each.arg != "self"]
        kind = inspect.Parameter.KEYWORD_ONLY
        return {
            each: inspect.Parameter(each, kind, default=defaults.get(each, inspect.Parameter.empty)) for each in names
        }
    return None


def abilities_of(config: ModelConfig, kin: Kin) -> Abilities:
    """What requests may ask of a model file's class."""
    if kin.own.name in capabilities.UPSCALERS:
        return capabilities.UPSCALING
    if config.cache:
        image, mask = (
            each if each and feature_caches.says_its_calls(each.name) else None for each in (kin.image, kin.mask)
        )
        kin = replace(kin, image=image, mask=mask)
    return abilities(kin, config.options)


def kin_of(
    own: Reading,
    *,
    unet_channels: Any = None,
    hidden_type: Any = None,
    nets: int = 1,
    kinds: int = 0,
    more: bool = False,
    lacks: Lacks = lambda part: False,
    setting: Settings = lambda part, key: None,
    frames: FrameRule | None = None,
    sound: SoundRule | None = None,
) -> Kin:
    """A class with its siblings. `unet_channels`: those that the UNet takes, if there is one; `hidden_type`: its
    `encoder_hid_dim_type`."""
    own = class_needs.on_weights(own, setting)
    if hidden_type == WITH_PICTURE:
        own = replace(own, unmet=(*own.unmet, "ip_adapter_image"))
    found = {task: _sibling(own, task) for task in ("image", "mask")}
    siblings = {task: class_needs.on_parts(sibling, lacks) for task, sibling in found.items() if sibling}
    image, mask = (each if each and not each.lacks else None for each in map(siblings.get, ("image", "mask")))
    masks_only = unet_channels == MASKED_CHANNELS
    clip = own if own.of(CLIP) else _of_clips(own, lacks, setting)
    return Kin(class_needs.on_parts(own, lacks), image, mask, masks_only, nets, kinds, more, frames, sound, clip)


def _of_clips(own: Reading, lacks: Lacks, setting: Settings) -> Reading | None:
    """The class that draws from a clip on the same weights. None: there is none, or it would pass over Wan 2.2's second
    denoiser or its times for each token."""
    name = clip_rules.FROM_CLIPS.get(own.name)
    if name is None or setting("", "expand_timesteps") or setting("", "boundary_ratio") is not None:
        return None
    return of_name(name)


def kin_of_pipeline(pipeline: Any) -> Kin:
    """The class of a pipeline in memory, with what its components say."""
    own = of_pipeline(pipeline)
    unet = getattr(getattr(pipeline, "unet", None), "config", {})
    return kin_of(
        own,
        unet_channels=unet.get("in_channels"),
        hidden_type=getattr(unet, "encoder_hid_dim_type", None),  # diffusers sets the attribute alone
        nets=nets_of(pipeline),
        kinds=kinds_of(pipeline),
        lacks=lambda part: getattr(pipeline, part, None) is None,
        setting=lambda part, key: getattr(getattr(pipeline, part, None) if part else pipeline, "config", {}).get(key),
        frames=clip_rules.of_pipeline(pipeline),
        sound=sound_rules.of_pipeline(pipeline) if own.output == SOUND else None,
    )


def nets_of(pipeline: Any) -> int:
    """How many control nets or adapters a pipeline has; 1 also if it has none."""
    return max(1, len(nets_in(pipeline)))


def nets_in(pipeline: Any) -> list[Any]:
    """Its control nets or adapters."""
    control = _control_of(pipeline)
    several = getattr(control, "nets", None) or getattr(control, "adapters", None)
    return list(several) if several else [] if control is None else [control]


def kinds_of(pipeline: Any) -> int:
    """How many kinds of controls its single net tells apart; 0 if it does not."""
    kinds = getattr(_control_of(pipeline), "config", {}).get("num_control_type")
    return kinds if isinstance(kinds, int) else 0


def _control_of(pipeline: Any) -> Any:
    for name in ("controlnet", "adapter"):
        if (control := getattr(pipeline, name, None)) is not None:
            return control
    return None


def _sibling(own: Reading, task: str) -> Reading | None:
    name = capabilities.task_class(own.name, task, controlled=False)
    sibling = of_name(name) if name and name != own.name else None
    if sibling is None or sibling.own_denoiser:
        return None
    controlled = bool(sibling.of(CONTROL)) == bool(own.of(CONTROL))
    return sibling if controlled and (task == "mask") == bool(sibling.of(MASK)) else None


def _required(
    name: str, call: ast.FunctionDef, signature: Mapping[str, inspect.Parameter], parameter: str, role: str
) -> bool:
    if signature[parameter].default is inspect.Parameter.empty:
        return True
    if role == LABEL:
        return False
    if role == PICTURE and FOR_A_PICTURE.search(name):
        return True
    if role == MASK and any(
        role_of(each, signature.keys()) in SOURCES and not _required(name, call, signature, each, PICTURE)
        for each in signature
    ):
        return False  # it belongs to a picture that may be absent
    return not _does_without(name, call, parameter)


def _does_without(name: str, call: ast.FunctionDef, parameter: str) -> bool:
    """Whether a call asks for `parameter is not None`, or hands it to one that returns at once without it."""
    if _looks_into(call, parameter):
        return False
    if _asks_for(call, parameter):
        return True
    for node in ast.walk(call):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=method)) if _passes(node, parameter):
                inner = _pipeline_of(name, method)
                if (
                    inner
                    and (passed := of_name(inner))
                    and any(not each.required for each in passed.inputs if each.name == parameter)
                ):
                    return True
                if any(_returns_without(each, parameter) for each in diffusers_source.methods(name, method)):
                    return True
    return False


def _asks_for(call: ast.FunctionDef, parameter: str) -> bool:
    for node in ast.walk(call):
        match node:
            case ast.Compare(left=ast.Name(id=id), ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]):
                if id == parameter:
                    return True
    return False


def _looks_into(call: ast.FunctionDef, parameter: str) -> bool:
    """Whether it takes an attribute or an item of the parameter, whatever the parameter is."""
    statements = [each for each in call.body if not isinstance(each, ast.If | ast.For | ast.With)]
    return any(
        isinstance(node, ast.Attribute | ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id == parameter
        for statement in statements
        for node in ast.walk(statement)
    )


def _passes(call: ast.Call, parameter: str) -> bool:
    passed = [*call.args, *(each.value for each in call.keywords)]
    return any(isinstance(each, ast.Name) and each.id == parameter for each in passed)


def _returns_without(function: ast.FunctionDef, parameter: str) -> bool:
    """Whether it begins with `if parameter is None: return None`."""
    for node in function.body:
        if isinstance(node, ast.If) and isinstance(node.body[0], ast.Return):
            for test in ast.walk(node.test):
                match test:
                    case ast.Compare(left=ast.Name(id=id), ops=[ast.Is()], comparators=[ast.Constant(value=None)]):
                        return id == parameter
    return False


def _many(name: str, call: ast.FunctionDef, parameter: str, role: str) -> bool:
    """Whether a call makes a list of a single picture, and asks whether there is one: then a list is no batch."""
    if role == PICTURE and parameter.endswith("s"):
        return True
    if role != PICTURE or not _asks_for(call, parameter):
        return False
    lists = [node.elts for node in ast.walk(call) if isinstance(node, ast.List)]
    return any(len(items) == 1 and isinstance(items[0], ast.Name) and items[0].id == parameter for items in lists)


def _concatenates_mask(name: str, call: ast.FunctionDef) -> bool:
    """Whether its denoiser, or that of the pipeline that it ends with, is given a mask in any case."""
    inner = [each for node in ast.walk(call) if isinstance(node, ast.Return) for each in _ends_with(name, call, node)]
    if inner:
        return any(_concatenates_mask(inner[0], each) for each in diffusers_source.methods(inner[0], "__call__"))
    conditional = {
        id(each)
        for node in ast.walk(call)
        if isinstance(node, ast.If) and "channels" in ast.unparse(node.test)
        for each in ast.walk(node)
    }
    return any(
        isinstance(node, ast.Call)
        and id(node) not in conditional
        and ast.unparse(node.func) == "torch.cat"
        and {each.id for each in ast.walk(node.args[0]) if isinstance(each, ast.Name)} & MASKS
        and "latent" in ast.unparse(node.args[0])
        for node in ast.walk(call)
    )


def _ends_with(name: str, call: ast.FunctionDef, node: ast.Return) -> list[str]:
    """The pipelines within this one whose result is returned."""
    return list(_assigned_from(name, call, node.value.id)) if isinstance(node.value, ast.Name) else []


def _output(call: ast.FunctionDef, fields: Mapping[str, str], signature: Collection[str]) -> str:
    """What comes out, as `OUTPUTS` says it; a picture if that cannot be told."""
    for field, words in OUTPUTS.items():
        if field in fields:
            nested = fields[field].startswith(("list[list[", "List[List["))
            row = any(each in FRAME_COUNTS for each in signature)
            return OUTPUTS["frames"] if not words and (nested or row) else words
    return "" if fields or not _is_array(call) else "numbers"


def _is_array(call: ast.FunctionDef) -> bool:
    return any(
        isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value).endswith(".numpy()")
        for node in ast.walk(call)
    )


def _returned(name: str, call: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    """Fields of what a call returns, each with its annotation; of a class made of two, what its second returns."""
    for node in ast.walk(call):
        if not isinstance(node, ast.Return) or node.value is None:
            continue
        for inner in _ends_with(name, call, node):
            if function := next(diffusers_source.methods(inner, "__call__"), None):
                yield from _returned(inner, function)
        for made in ast.walk(node.value):
            if isinstance(made, ast.Call) and isinstance(made.func, ast.Name) and made.func.id.endswith("Output"):
                yield from diffusers_source.fields(made.func.id).items()


def _assigned_from(name: str, call: ast.FunctionDef, variable: str) -> Iterator[str]:
    """Pipelines within this one whose result a variable has."""
    for node in ast.walk(call):
        match node:
            case ast.Assign(
                targets=[ast.Name(id=id)],
                value=ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=attribute)),
            ) if id == variable and (inner := _pipeline_of(name, attribute)):
                yield inner


def _pipeline_of(name: str, attribute: str) -> str | None:
    """The class of a pipeline that another makes in its constructor."""
    return class_needs.inner_pipelines(name).get(attribute)

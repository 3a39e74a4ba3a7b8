"""The pictures of a request as the class on these weights takes them: which of its pipelines, mask and controls."""

from __future__ import annotations

from dataclasses import replace

from PIL import Image

from sfumato.checkpoints import class_reading
from sfumato.core import Control, Generation
from sfumato.errors import InvalidRequest
from sfumato.formats import kind_of
from sfumato.loras import of_defaults
from sfumato.models.load import Loaded
from sfumato.pictures import images
from sfumato.pipelines import inputs

OWN, CLIP = "own", "clip"
"""Task of the loaded class itself, and of the one that draws from a clip; other tasks are `image` and `mask`, of its
siblings on the same weights."""


def complete(model: Loaded, generation: Generation) -> tuple[str, Generation]:
    """The task, and the generation with the mask and the controls that it implies.

    A picture's transparency may be its mask; where a class draws only under a mask, a picture without one is redrawn as
    a whole; where it needs a control picture and no other, a picture is that. Raises InvalidRequest naming the input
    that is missing, or that the model does not take.
    """
    kin = class_reading.kin_of_pipeline(model.pipeline)
    can = class_reading.abilities_of(model.config, kin)
    inputs.check(
        model.config.name, can,
        kind=kind_of(generation.format), frames=generation.sampling.num_frames,
        seconds=generation.sampling.seconds,
        pictures=len(generation.images), mask=bool(generation.mask), controls=len(generation.controls),
        others={name: name for name, each in (("video", generation.clip), ("audio", generation.sound)) if each},
    )  # fmt: skip
    if generation.clip:
        return OWN if kin.own.of(inputs.CLIP) else CLIP, generation
    mask, mask_from_alpha = generation.mask, False
    if mask is None and kin.as_control() and not generation.controls and generation.images:
        controls = tuple(Control(image) for image in generation.images)
        return OWN, replace(generation, images=(), controls=controls, mask_from_alpha=False)
    if mask is None and generation.images and generation.mask_from_alpha and kin.with_mask():
        mask = images.alpha_mask(generation.images[0])
        mask_from_alpha = mask is not None
    if mask is None and generation.images and kin.with_mask() and not kin.without_mask():
        mask = images.png(Image.new("L", images.size(generation.images[0]), 255))
    if mask is None and generation.mask_padding is not None:
        raise InvalidRequest("masked_area_only: needs a mask; send `mask` too", param="masked_area_only")
    generation = replace(generation, mask=mask, mask_from_alpha=mask_from_alpha)
    chosen = kin.with_mask() if mask else kin.without_mask() if generation.images else kin.own
    if chosen is kin.own or chosen is None:
        return OWN, generation
    return "mask" if mask else "image", generation


def recorded_loras(model: Loaded, generation: Generation) -> tuple[tuple[str, str, str, float, float], ...]:
    """The LoRAs that act, as a recipe keeps them, the model file's first."""
    weights = of_defaults(generation.loras)
    used = [
        weights.get(number, own)
        for number, own in enumerate(model.state.own_loras)
        if number in weights or not generation.replace_loras
    ]
    used += [lora for lora in generation.loras if lora.default is None]
    own = model.state.own_loras
    digests = [each if each.default is None else own[each.default] for each in used]
    return tuple(
        (lora.source, digest.sha256, digest.short_hash, lora.weight, lora.weight_of_text)
        for lora, digest in zip(used, digests, strict=True)
        if lora.weight or lora.weight_of_text
    )


def loras_off(model: Loaded, generation: Generation) -> tuple[str, ...]:
    """Names of the model file's LoRAs that do not act."""
    weights = of_defaults(generation.loras)
    off = []
    for number, own in enumerate(model.state.own_loras):
        lora = weights.get(number, replace(own, weight=0.0, text_weight=None) if generation.replace_loras else own)
        if not lora.weight and not lora.weight_of_text:
            off.append(own.name)
    return tuple(off)

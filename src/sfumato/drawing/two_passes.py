"""A picture in two passes: drawn, enlarged, and drawn again from that. AUTOMATIC1111 calls it hires fix.

Both passes are ordinary runs of `drawing.draw`, the second one image-to-image of the same model, with the same seed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace

from PIL import Image, ImageOps

from sfumato.batching.module_runner import ModuleRunner
from sfumato.core import Generation
from sfumato.drawing import draw as one_pass
from sfumato.drawing.info import model_info
from sfumato.drawing.steps import OnStep
from sfumato.errors import InvalidRequest
from sfumato.models.load import Loaded
from sfumato.pictures.encoder import HERE, Encoder
from sfumato.previews.steps import OnPreview
from sfumato.sampling import UPSCALERS, Hires, fewer_steps, merged, whole_steps


def picture(
    model: Loaded,
    generation: Generation,
    on_step: OnStep,
    on_preview: OnPreview | None = None,
    runners: Mapping[int, ModuleRunner | None] | None = None,
    encoder: Encoder = HERE,
) -> one_pass.Drawn:
    """As `drawing.draw.picture`, in two passes if the generation has a second one. Steps are counted over both."""
    asked = generation.hires
    if asked is None:
        return one_pass.picture(model, generation, on_step, on_preview, runners, encoder)
    if "image-to-image" not in model_info(model).tasks:
        raise InvalidRequest(
            f"enable_hr: {model.config.name} ({type(model.pipeline).__name__}) draws no picture from another, which a "
            "second pass does. Leave it out",
            param="enable_hr",
        )
    first_steps = 0

    def of_first(step: int, total: int) -> None:
        nonlocal first_steps
        first_steps = total
        on_step(step, total + planned(asked, total))

    first = one_pass.picture(model, replace(generation, hires=None), of_first, on_preview, runners, encoder)
    hires = _settled(asked, first.recipe.sampling.steps or 1)
    small = first.result
    assert isinstance(small, Image.Image)  # `planning` refuses second passes of others
    second = encoder.result(lambda: _second(generation, hires, small))
    done = one_pass.picture(
        model,
        second,
        lambda step, total: on_step(first_steps + step, first_steps + total),
        on_preview,
        runners,
        encoder,
    )
    used = replace(hires, sampling=done.recipe.sampling, first=first.recipe.size)
    width, height = done.recipe.size
    whole = replace(
        first.recipe,
        sampling=replace(first.recipe.sampling, width=width, height=height),
        savings=tuple(sorted({*first.recipe.savings, *done.recipe.savings})),
        weights=first.recipe.weights or done.recipe.weights,
        embeddings=tuple(dict.fromkeys([*first.recipe.embeddings, *done.recipe.embeddings])),
        drawn_size=first.recipe.drawn_size or done.recipe.drawn_size,
        hires=used,
    )
    fewer = () if asked.sampling.steps else fewer_steps(hires, first.recipe.sampling.steps or 1)
    warnings = tuple(dict.fromkeys([*first.warnings, *fewer, *done.warnings]))
    return one_pass.Drawn(done.result, whole, warnings, first.tokens, first.format)


def planned(hires: Hires, steps: int) -> int:
    """Steps of the second pass, if the first has `steps`."""
    return _settled(hires, steps).steps


def _settled(hires: Hires, steps: int) -> Hires:
    """The second pass with as many steps as the first runs, if it does not say how many."""
    if hires.sampling.steps:
        return hires
    return replace(hires, sampling=replace(hires.sampling, steps=whole_steps(steps, hires.sampling.strength or 0.0)))


def _second(generation: Generation, hires: Hires, picture: Image.Image) -> Generation:
    latent = UPSCALERS[hires.upscaler] is not None
    source = picture if latent else _enlarged(picture, hires)
    file = io.BytesIO()
    source.save(file, "PNG", compress_level=1)
    return replace(
        generation,
        hires=None,
        prompt=generation.prompt if hires.prompt is None else hires.prompt,
        sampling=merged(hires.sampling, replace(generation.sampling, width=None, height=None)),
        images=(file.getvalue(),),
        latents=hires.upscaler if latent else "",
        transparent=False,
        notes=(),
    )


def _enlarged(picture: Image.Image, hires: Hires) -> Image.Image:
    resample = Image.Resampling.NEAREST if hires.upscaler == "Nearest" else Image.Resampling.LANCZOS
    return ImageOps.fit(picture, hires.sampling.size or picture.size, resample)

"""A source picture as latents, which diffusers' pipelines take as `image`: between two passes they are enlarged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image, ImageOps

from sfumato.core import Generation
from sfumato.pictures import images
from sfumato.sampling import UPSCALERS


def taken(pipeline: Any, generation: Generation) -> bool:
    """Whether the generation asks for it and the pipeline does it: its VAE's latents are pictures of its channels.

    Not where the pipeline makes more of what its VAE encodes: in another precision, or by the latents' means.
    """
    vae: Any = getattr(pipeline, "vae", None)
    processor = getattr(pipeline, "image_processor", None)
    config = getattr(vae, "config", None)
    channels = getattr(config, "latent_channels", None)
    accepted = getattr(getattr(processor, "config", None), "vae_latent_channels", None)
    if not generation.latents or channels is None or channels != accepted:
        return False
    upcast = hasattr(pipeline, "upcast_vae") and getattr(config, "force_upcast", False) and vae.dtype == torch.float16
    return not upcast and getattr(config, "latents_mean", None) is None


def warnings(pipeline: Any, generation: Generation) -> list[str]:
    if not generation.latents or taken(pipeline, generation):
        return []
    name = type(pipeline).__name__
    return [f"hr_upscaler: {generation.latents} enlarged the pixels, as Lanczos does: {name} takes no latents here"]


def of_source(pipeline: Any, generation: Generation, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The source picture as latents of the size at which it stands in `arguments`, for a generation that asks for it.

    Nothing if the pipeline takes none.
    """
    if not taken(pipeline, generation) or not (mode := UPSCALERS[generation.latents]):
        return {}
    source, vae = arguments.get("image"), pipeline.vae
    source = source[0] if isinstance(source, list) and len(source) == 1 else source
    if not isinstance(source, Image.Image):
        return {}
    picture = images.on_white(images.decoded(generation.images[0]))
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    # Its part that has the result's shape, in whole latents.
    scale = max(source.width / picture.width, source.height / picture.height)
    width, height = (max(factor, round(side / scale / factor) * factor) for side in source.size)
    picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    pixels = pipeline.image_processor.preprocess(picture).to(pipeline.device, vae.dtype)
    with torch.no_grad():
        answer = vae.encode(pixels)
    encoded = answer.latents if hasattr(answer, "latents") else answer.latent_dist.mode()
    scaled = (encoded - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
    how, antialias = mode
    target = (source.height // factor, source.width // factor)
    larger = torch.nn.functional.interpolate(scaled.float(), size=target, mode=how, antialias=antialias)
    return {"image": larger.to(vae.dtype)}

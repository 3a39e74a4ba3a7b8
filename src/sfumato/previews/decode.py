"""Decode the latents after a scheduler step into a preview, more cheaply than with the VAE.

A preview changes nothing about its request. It is nearly free if the model has a `CheapDecoder`: a latent-to-RGB
map fitted for its VAE, or a tiny autoencoder named in its model file. Otherwise the pipeline's own decoder is used.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, AutoencoderTiny
from PIL import Image, ImageOps

from sfumato.previews.latent_rgb import LatentRGB, fit

CheapDecoder: TypeAlias = LatentRGB | AutoencoderTiny
"""Turns latents into a picture at almost no cost."""

LONGEST = 512
"""Larger previews are scaled down to this many pixels on the longer side."""

CHANNELS = (1, 3, 4)
"""Valid numbers of channels: grey, RGB and RGBA."""

UNSCALED = frozenset({"LDMSuperResolutionPipeline"})
"""Classes that pass latents to their decoder unscaled, like those whose decoder is a `movq`."""


def cheap_decoder(pipeline: Any) -> CheapDecoder | None:
    """The latent-to-RGB map of the pipeline's VAE; None if there is none, or its decoder is cheap already."""
    vae = getattr(pipeline, _decoder(pipeline) or "", None)
    if vae is None or isinstance(vae, AutoencoderTiny) or hasattr(pipeline, "vocoder"):
        return None
    return fit(vae, getattr(pipeline, "vae_scale_factor", None) or 8)


@dataclass(frozen=True, slots=True)
class PreviewImage:
    """A small picture, and the size in pixels of the final one."""

    image: Image.Image
    width: int
    height: int


MakePicture: TypeAlias = Callable[[], PreviewImage | None]
"""None if the numbers are not a picture."""


def preview(
    pipeline: Any, latents: torch.Tensor, width: int | None, height: int | None, cheap: CheapDecoder | None = None
) -> PreviewImage | None:
    """Preview of the first picture in `latents`, of `width` x `height` pixels or that shape; None if not a picture.

    Takes [B, C, H, W], [B, C, T, H, W] and [B, T, C, H, W], of which the first frame is shown, and packed
    [B, tokens, C]; pixels if the pipeline has no decoder.
    """
    make = decoded(pipeline, latents, width, height, cheap)
    return make and make()


@torch.no_grad()
def decoded(
    pipeline: Any, latents: torch.Tensor, width: int | None, height: int | None, cheap: CheapDecoder | None = None
) -> MakePicture | None:
    """As `preview`, up to where a picture is made of the numbers: that can be done later, in any thread.

    On an accelerator it would wait for the device.
    """
    if not latents.is_floating_point() or hasattr(pipeline, "vocoder"):
        return None
    name = _decoder(pipeline)
    latents = latents.detach()[:1].clone()
    if name is None:
        return functools.partial(_picture, None, latents)
    vae = getattr(pipeline, name)
    if cheap is None and hasattr(
        vae, "_hf_hook"
    ):  # it is offloaded: moving it to the device would offload the denoiser
        return None
    # A tiny autoencoder has its own scale; a map takes the decoder's input.
    decoder = cheap if isinstance(cheap, AutoencoderTiny) else vae
    raw = name == "movq" or type(pipeline).__name__ in UNSCALED
    spatial = latents if raw else _spatial(pipeline, vae, decoder, latents, width, height)
    if spatial is not None and spatial.ndim == 5:
        spatial = _first_frame(vae, spatial)
    if spatial is None or spatial.ndim not in (4, 5):
        return None
    if cheap is not None and spatial.ndim == 5:
        spatial = spatial[:, :, 0]
    processor: Any = getattr(pipeline, "image_processor", None)
    binned = hasattr(processor, "resize_and_crop_tensor")  # draws at the nearest size in its table
    if isinstance(cheap, LatentRGB):
        size = (width, height) if binned and width and height else None
        return functools.partial(_rgb_image, cheap, spatial, size)
    if cheap is not None:
        pixels = cheap.decode(spatial.to(cheap.device, cheap.dtype), return_dict=False)[0]
    else:
        pixels = _decoded(pipeline, vae, spatial, _options(name, vae))
    if pixels.ndim == 5:
        pixels = pixels[:, :, 0]
    if width and height and binned:
        pixels = processor.resize_and_crop_tensor(pixels, width, height)
    return functools.partial(_picture, processor, pixels)


def _options(name: str, vae: Any) -> dict[str, Any]:
    """Arguments of the decoder besides the latents."""
    if name == "movq":
        return {"force_not_quantize": True}
    return {"num_frames": 1} if isinstance(vae, AutoencoderKLTemporalDecoder) else {}


def _first_frame(vae: Any, latents: torch.Tensor) -> torch.Tensor | None:
    """Of the latents of a clip as its VAE takes them: with one frame, or without that axis where it knows none."""
    channels = vae.config.get("latent_channels") or vae.config.get("z_dim")
    if latents.shape[1] == channels:
        first = latents[:, :, :1]
    elif latents.shape[2] == channels:
        first = latents[:, :1].transpose(1, 2)
    else:
        return None
    return first[:, :, 0] if isinstance(vae, AutoencoderKL | AutoencoderKLTemporalDecoder) else first


def _decoder(pipeline: Any) -> str | None:
    """The name of the component that decodes latents to pixels."""
    return next((name for name in ("vae", "movq", "vqvae", "vqgan") if getattr(pipeline, name, None) is not None), None)


def _rgb_image(latent_rgb: LatentRGB, latents: torch.Tensor, size: tuple[int, int] | None) -> PreviewImage | None:
    """One pixel per latent, for a picture of `size`, or of the size that follows from the latents."""
    full = _picture(None, latent_rgb(latents))
    if full is None:
        return None
    small, factor = full.image, latent_rgb.factor
    if size is None:
        return PreviewImage(small, small.width * factor, small.height * factor)
    small_size = (max(1, round(size[0] / factor)), max(1, round(size[1] / factor)))
    return PreviewImage(ImageOps.fit(small, small_size, Image.Resampling.BICUBIC), *size)


def _spatial(
    pipeline: Any, vae: Any, decoder: Any, latents: torch.Tensor, width: int | None, height: int | None
) -> torch.Tensor | None:
    """`latents` of `vae` in the form `decoder` takes: unpacked to [B, C, H, W] or [B, C, 1, H, W], and unscaled."""
    if latents.ndim != 3:
        return _unscaled(decoder, latents)
    grid = _grid(latents.shape[1], (width or 1) / (height or 1))
    if grid is None:
        return None
    rows, columns = grid
    if hasattr(vae, "bn") and hasattr(pipeline, "_unpatchify_latents"):  # Flux 2: normalised by patch
        patches = latents.transpose(1, 2).reshape(1, -1, rows, columns)
        mean, variance = (value.view(1, -1, 1, 1).to(patches) for value in (vae.bn.running_mean, vae.bn.running_var))
        patches = patches * torch.sqrt(variance + vae.config.batch_norm_eps) + mean
        return pipeline._unpatchify_latents(patches)  # type: ignore[no-any-return]
    unpack = getattr(pipeline, "_unpack_latents", None)
    if unpack is None:
        return None
    factor = pipeline.vae_scale_factor
    patch = pipeline.image_processor.config.vae_scale_factor  # pixels per token
    available = {"latents": latents, "height": rows * patch, "width": columns * patch, "vae_scale_factor": factor}
    parameters = inspect.signature(unpack).parameters
    if not parameters.keys() <= available.keys():  # layers, frames, or pictures side by side
        return None
    return _unscaled(decoder, unpack(**{name: available[name] for name in parameters}))


def _grid(tokens: int, ratio: float) -> tuple[int, int] | None:
    """Rows and columns of `tokens` closest to `ratio` (width to height), if one is close enough."""
    pairs = ((rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0)
    off, grid = min((abs(math.log(columns / rows / ratio)), (rows, columns)) for rows, columns in pairs)
    return grid if off < 0.2 else None


def _unscaled(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    config = vae.config
    latents = latents / (getattr(config, "scaling_factor", None) or 1.0)
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return latents + (getattr(config, "shift_factor", None) or 0.0)
    shape = (1, -1, *[1] * (latents.ndim - 2))
    return latents * torch.tensor(std).view(shape).to(latents) + torch.tensor(mean).view(shape).to(latents)


def _decoded(pipeline: Any, vae: Any, latents: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Pixels [B, C, H, W] or [B, C, 1, H, W], about -1 .. 1."""
    dtype = vae.dtype
    upcast = dtype == torch.float16 and hasattr(pipeline, "upcast_vae") and vae.config.force_upcast
    if not upcast:
        return vae.decode(latents.to(dtype), return_dict=False, **options)[0]  # type: ignore[no-any-return]
    try:  # as the pipeline does at its end; no other request runs meanwhile
        vae.to(dtype=torch.float32)
        return vae.decode(latents.float(), return_dict=False, **options)[0]  # type: ignore[no-any-return]
    finally:
        vae.to(dtype=dtype)


def _picture(processor: Any, pixels: torch.Tensor) -> PreviewImage | None:
    """Picture of pixels [B, C, H, W], about -1 .. 1, at most LONGEST on a side; None if they are not a picture."""
    if pixels.ndim != 4 or pixels.shape[1] not in CHANNELS or not bool(torch.isfinite(pixels).all()):
        return None
    if processor is not None:
        image = processor.postprocess(pixels, output_type="pil")[0]
    else:
        levels = ((pixels[0].float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().cpu()
        image = Image.fromarray(levels.permute(1, 2, 0).squeeze(-1).numpy())
    if not isinstance(image, Image.Image):
        return None
    size = image.size
    image.thumbnail((LONGEST, LONGEST))
    return PreviewImage(image, *size)

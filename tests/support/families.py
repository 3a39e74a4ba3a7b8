"""Tiny real pipelines of many families, each with three calls that differ in all they can.

The weights are random and the sizes absurd; classes, wiring and code paths are diffusers' own. What
`tiny.py` has is taken from there. `FAMILIES` is the table of those with a UNet; `families_transformers.py`
and `families_moving.py` (videos and sound) go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers as d
import numpy as np
import torch
from PIL import Image

from support import tiny
from support.tiny import STABLE_DIFFUSION_NOISE, WIDTH, seeded

Call = dict[str, Any]

PROMPTS = ("a cat", "a dog on a long road in the rain", "two")
STEPS = (3, 5, 4)
GUIDANCE = (5.0, 3.0, 8.0)
SQUARE = {"height": 64, "width": 64}


@dataclass(frozen=True)
class Family:
    """A pipeline class at toy size."""

    build: Callable[[], Any]
    calls: list[Call]
    denoiser: str = "transformer"
    alone: str = ""
    """Why its denoiser calls are not merged, where they are not."""


def three(**common: Any) -> list[Call]:
    """Calls with prompts of different length, and different steps and guidance."""
    return [
        {"prompt": prompt, "num_inference_steps": steps, "guidance_scale": guidance, **common}
        for prompt, steps, guidance in zip(PROMPTS, STEPS, GUIDANCE, strict=True)
    ]


def negative(calls: list[Call]) -> list[Call]:
    """The second has a negative prompt as well."""
    return [{**call, "negative_prompt": "bad, worse"} if at == 1 else call for at, call in enumerate(calls)]


def with_pictures(calls: list[Call], key: str = "image", size: int = 64) -> list[Call]:
    return [{**call, key: picture(at, size)} for at, call in enumerate(calls)]


def without(calls: list[Call], *keys: str) -> list[Call]:
    return [{key: value for key, value in call.items() if key not in keys} for call in calls]


def picture(seed: int, size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))


def half_mask(size: int = 64) -> Image.Image:
    return Image.fromarray((np.arange(size * size).reshape(size, size) % size > size // 2).astype(np.uint8) * 255)


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _first(unet: Any) -> dict[str, Any]:
    return {"unet": unet, "scheduler": tiny._pndm(), **tiny._first_generation()}


def _first_plain(unet: Any) -> dict[str, Any]:
    parts = _first(unet)
    del parts["requires_safety_checker"]
    return parts


def of_first_generation(kind: Any, **unet: Any) -> Callable[[], Any]:
    """A pipeline class over the parts of Stable Diffusion 1."""

    def build() -> Any:
        with seeded(0):
            return kind(**_first(tiny._unet(**unet)))

    return build


def upscale() -> Any:
    with seeded(0):
        parts = _first(tiny._unet(in_channels=7, num_class_embeds=1000))
        for absent in ("requires_safety_checker", "safety_checker", "feature_extractor"):
            del parts[absent]
        return d.StableDiffusionUpscalePipeline(low_res_scheduler=d.DDPMScheduler(), **parts)


def small_decoder() -> Any:
    pipe = tiny.stable_diffusion()
    with seeded(1):
        pipe.vae = d.AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
        ).eval()  # fmt: skip
    return pipe


def consistency() -> Any:
    with seeded(0):
        parts = _first(tiny._unet(time_cond_proj_dim=32)) | {"scheduler": d.LCMScheduler(**STABLE_DIFFUSION_NOISE)}
        return d.LatentConsistencyModelPipeline(**parts)


def control_net(**changes: Any) -> Any:
    return d.ControlNetModel(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
        cross_attention_dim=WIDTH, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(8, 8, 8, 8), **changes,
    ).eval()  # fmt: skip


def controlled(kind: Any) -> Callable[[], Any]:
    def build() -> Any:
        with seeded(0):
            return kind(controlnet=lively(control_net()), **_first(tiny._unet()))

    return build


def controlled_xl() -> Any:
    parts = xl_parts()
    with seeded(1):
        unet = parts["unet"].config
        net = d.ControlNetModel(
            block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
            cross_attention_dim=2 * WIDTH, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=8, conditioning_embedding_out_channels=(8, 8, 8, 8),
            projection_class_embeddings_input_dim=unet.projection_class_embeddings_input_dim,
        )  # fmt: skip
        return d.StableDiffusionXLControlNetPipeline(controlnet=lively(net.eval()), **parts)


def lively(net: Any) -> Any:
    # A ControlNet starts with zeros where it joins the UNet, and so without effect.
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return net


def adapted() -> Any:
    with seeded(0):
        adapter = d.T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter")
        return d.StableDiffusionAdapterPipeline(adapter=adapter.eval(), **_first(tiny._unet()))


def xl_parts() -> dict[str, Any]:
    parts = tiny.stable_diffusion_xl().components
    return {name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")}


def over(kind: Any, base: Callable[[], Any], *absent: str) -> Callable[[], Any]:
    """Another pipeline class over the parts of one that there is."""
    return lambda: kind(**{name: part for name, part in base().components.items() if name not in absent})


def kandinsky22() -> Any:
    with seeded(0):
        unet = d.UNet2DConditionModel(
            in_channels=4, out_channels=8, addition_embed_type="image", layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn", block_out_channels=(32, 64), encoder_hid_dim=WIDTH,
            encoder_hid_dim_type="image_proj", cross_attention_dim=WIDTH, attention_head_dim=4,
            resnet_time_scale_shift="scale_shift",
        )  # fmt: skip
        movq = d.VQModel(
            block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), latent_channels=4, layers_per_block=1,
            norm_num_groups=8, norm_type="spatial", num_vq_embeddings=12, vq_embed_dim=4,
        )  # fmt: skip
        scheduler = d.DDPMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
        return d.KandinskyV22Pipeline(unet=unet.eval(), movq=movq.eval(), scheduler=scheduler)


def guided_by_perturbation() -> Any:
    with seeded(0):
        return d.StableDiffusionPAGPipeline(**_first(tiny._unet()), pag_applied_layers="mid")


def embeds(calls: list[Call]) -> list[Call]:
    """Kandinsky's decoder takes what its prior makes of a text."""
    return [
        {**call, "image_embeds": numbers(at, 1, WIDTH), "negative_image_embeds": numbers(at + 9, 1, WIDTH)}
        for at, call in enumerate(without(calls, "prompt"))
    ]


def mixed(calls: list[Call]) -> list[Call]:
    """Each with a scheduler of its own: some count time in int64, some in float32."""
    kinds = (d.DDIMScheduler, d.EulerDiscreteScheduler, d.EulerAncestralDiscreteScheduler)
    return [{**c, "scheduler": kind(**STABLE_DIFFUSION_NOISE)} for c, kind in zip(calls, kinds, strict=True)]


SD = negative(three())
FLOW = three(**SQUARE)
PICTURES = with_pictures(SD)
DEEP = {"strength": 0.8}
NOT_MERGED_EXCLUSIVE = "changes the attention of the shared UNet while it runs"

FAMILIES: dict[str, Family] = {
    "StableDiffusion": Family(tiny.stable_diffusion, SD, "unet"),
    "StableDiffusion (mixed schedulers)": Family(tiny.stable_diffusion, mixed(SD), "unet"),
    "StableDiffusionXL (mixed schedulers)": Family(tiny.stable_diffusion_xl, mixed(negative(FLOW)), "unet"),
    "StableDiffusionControlNet (mixed schedulers)": Family(
        controlled(d.StableDiffusionControlNetPipeline), mixed(PICTURES), "unet"
    ),
    "StableDiffusionXLControlNet (mixed schedulers)": Family(
        controlled_xl, mixed([{**c, **SQUARE} for c in PICTURES]), "unet"
    ),
    "StableDiffusion (small decoder)": Family(small_decoder, SD, "unet"),
    "StableDiffusionImg2Img": Family(
        of_first_generation(d.StableDiffusionImg2ImgPipeline), [{**c, **DEEP} for c in PICTURES], "unet"
    ),
    "StableDiffusionInpaint (plain UNet)": Family(
        of_first_generation(d.StableDiffusionInpaintPipeline),
        [{**c, "mask_image": half_mask(), **SQUARE, **DEEP} for c in PICTURES],
        "unet",
    ),
    "StableDiffusionInpaint (9 channels)": Family(
        tiny.inpaint_unet, [{**c, "mask_image": half_mask(), **SQUARE} for c in PICTURES], "unet"
    ),
    "StableDiffusionDepth2Img": Family(tiny.stable_diffusion_depth, [{**c, **DEEP} for c in PICTURES], "unet"),
    "StableDiffusionUpscale": Family(upscale, with_pictures(SD, size=16), "unet"),
    "StableDiffusionInstructPix2Pix": Family(
        of_first_generation(d.StableDiffusionInstructPix2PixPipeline, in_channels=8), PICTURES, "unet"
    ),
    "LatentConsistencyModel": Family(consistency, three(), "unet"),
    "StableDiffusionControlNet": Family(controlled(d.StableDiffusionControlNetPipeline), PICTURES, "unet"),
    "StableDiffusionControlNetImg2Img": Family(
        controlled(d.StableDiffusionControlNetImg2ImgPipeline),
        [{**c, **DEEP} for c in with_pictures(PICTURES, "control_image")],
        "unet",
    ),
    "StableDiffusionAdapter": Family(adapted, [{**c, **SQUARE} for c in PICTURES], "unet"),
    "StableDiffusionXL": Family(tiny.stable_diffusion_xl, negative(FLOW), "unet"),
    "StableDiffusionXLImg2Img": Family(
        lambda: d.StableDiffusionXLImg2ImgPipeline(**xl_parts()), [{**c, **DEEP} for c in PICTURES], "unet"
    ),
    "StableDiffusionXLInpaint": Family(
        lambda: d.StableDiffusionXLInpaintPipeline(**xl_parts()),
        [{**c, "mask_image": half_mask(), **SQUARE, **DEEP} for c in PICTURES],
        "unet",
    ),
    "StableDiffusionXLControlNet": Family(controlled_xl, [{**c, **SQUARE} for c in PICTURES], "unet"),
    "StableDiffusionPAG": Family(guided_by_perturbation, SD, "unet", NOT_MERGED_EXCLUSIVE),
    "KandinskyV22": Family(kandinsky22, embeds(FLOW), "unet"),
    "DDPM": Family(tiny.ddpm, [{"num_inference_steps": steps} for steps in STEPS], "unet"),
}

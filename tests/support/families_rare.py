"""Tiny real pipelines of classes that are drawn over HTTP only: maps of a picture, two pictures, stages of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as d
from diffusers.models.attention_processor import AttnAddedKVProcessor
from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from support import families_newer, tiny
from support.families import Family, _first_plain, half_mask, picture, three, with_pictures, without
from support.tiny import WIDTH, seeded
from support.tiny_text import t5_tokenizer

SIDE = 32
"""Pixels of what the encoders of pictures read."""


def cascade_with_pictures() -> Any:
    made = families_newer.cascade()
    with seeded(1):
        made.register_modules(
            prior_image_encoder=CLIPVisionModelWithProjection(VISION).eval(), prior_feature_extractor=reader()
        )
        made.prior_pipe.register_modules(
            image_encoder=made.prior_image_encoder, feature_extractor=made.prior_feature_extractor
        )
    return made


VISION = CLIPVisionConfig(
    hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE,
    patch_size=16, projection_dim=WIDTH,
)  # fmt: skip

ALBEDO = {
    "target_names": ["albedo", "material"], "albedo": {"prediction_space": "srgb"},
    "material": {"prediction_space": "linear"},
}  # fmt: skip


def marigold(kind: Any, targets: int = 1, **settings: Any) -> Callable[[], Any]:
    """Predicts maps of a picture."""

    def build() -> Any:
        with seeded(0):
            unet = tiny._unet(in_channels=4 + 4 * targets, out_channels=4 * targets)
            parts = {name: part for name, part in tiny._first_generation().items() if "text" in name or name == "vae"}
            return kind(
                unet=unet, tokenizer=tiny.clip_tokenizer(), scheduler=d.DDIMScheduler(prediction_type="v_prediction"),
                default_denoising_steps=2, default_processing_resolution=0, **parts, **settings,
            )  # fmt: skip

    return build


def with_depth() -> Any:
    """Draws a picture and its depth from a VAE of six channels."""
    with seeded(0):
        parts = _first_plain(tiny._unet()) | {"vae": tiny._vae(in_channels=6, out_channels=6)}
        return d.StableDiffusionLDM3DPipeline(image_encoder=None, requires_safety_checker=False, **parts)


def paint_by_example() -> Any:
    with seeded(0):
        encoder = PaintByExampleImageEncoder(VISION, proj_size=WIDTH).eval()
        return d.PaintByExamplePipeline(
            vae=tiny._vae(), unet=tiny._unet(in_channels=9), scheduler=tiny._pndm(), safety_checker=None,
            image_encoder=encoder, feature_extractor=reader(),
        )  # fmt: skip


def variation() -> Any:
    with seeded(0):
        parts = _first_plain(tiny._unet())
        kept = {name: parts[name] for name in ("vae", "unet", "scheduler", "safety_checker")}
        return d.StableDiffusionImageVariationPipeline(
            image_encoder=CLIPVisionModelWithProjection(VISION).eval(), feature_extractor=reader(),
            requires_safety_checker=False, **kept,
        )  # fmt: skip


def reader() -> Any:
    return CLIPImageProcessor(crop_size=SIDE, size=SIDE)


def deep_floyd(kind: Any, *, larger: bool = False) -> Callable[[], Any]:
    """IF: draws pixels; `larger`: its second stage, which also reads the smaller picture."""

    def build() -> Any:
        with seeded(0):
            more = {"class_embed_type": "timestep", "in_channels": 6} if larger else {"in_channels": 3}
            unet = d.UNet2DConditionModel(
                sample_size=SIDE, layers_per_block=1, block_out_channels=(32, 64), out_channels=6,
                down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
                mid_block_type="UNetMidBlock2DSimpleCrossAttn",
                up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), cross_attention_dim=WIDTH,
                encoder_hid_dim=WIDTH, attention_head_dim=8, addition_embed_type="text",
                addition_embed_type_num_heads=2, cross_attention_norm="group_norm",
                resnet_time_scale_shift="scale_shift", act_fn="gelu", **more,
            )  # fmt: skip
            unet.set_attn_processor(AttnAddedKVProcessor())
            noise = {"beta_schedule": "squaredcos_cap_v2", "beta_start": 0.0001, "beta_end": 0.02}
            scheduler = d.DDPMScheduler(
                thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.0,
                variance_type="learned_range", **noise,
            )  # fmt: skip
            parts = {
                "unet": unet.eval(), "tokenizer": t5_tokenizer(), "text_encoder": tiny._t5(), "scheduler": scheduler,
                "safety_checker": None, "feature_extractor": None, "watermarker": None,
                "requires_safety_checker": False,
            }  # fmt: skip
            return kind(**parts, **({"image_noising_scheduler": d.DDPMScheduler(**noise)} if larger else {}))

    return build


PLAIN = without(three(), "guidance_scale")
MAPS = with_pictures(without(PLAIN, "prompt"))
TWO = [{**call, "original_image": picture(at + 5)} for at, call in enumerate(with_pictures(three(), size=SIDE))]

FAMILIES: dict[str, Family] = {
    "StableCascadeCombined (pictures)": Family(
        cascade_with_pictures, families_newer.FAMILIES["StableCascadeCombined"].calls, "decoder"
    ),
    "MarigoldDepth": Family(marigold(d.MarigoldDepthPipeline, prediction_type="depth"), MAPS, "unet"),
    "MarigoldNormals": Family(marigold(d.MarigoldNormalsPipeline, prediction_type="normals"), MAPS, "unet"),
    "MarigoldIntrinsics": Family(
        marigold(d.MarigoldIntrinsicsPipeline, 2, prediction_type="intrinsics", target_properties=ALBEDO), MAPS, "unet"
    ),
    "StableDiffusionLDM3D": Family(with_depth, three(), "unet"),
    "PaintByExample": Family(
        paint_by_example,
        [{**c, "example_image": picture(9), "mask_image": half_mask()} for c in MAPS],
        "unet",
    ),
    "StableDiffusionImageVariation": Family(variation, with_pictures(without(three(), "prompt")), "unet"),
    "IF": Family(deep_floyd(d.IFPipeline), three(), "unet"),
    "IFImg2Img": Family(deep_floyd(d.IFImg2ImgPipeline), with_pictures(three()), "unet"),
    "IFInpainting": Family(
        deep_floyd(d.IFInpaintingPipeline), [{**c, "mask_image": half_mask()} for c in with_pictures(three())], "unet"
    ),
    "IFSuperResolution": Family(deep_floyd(d.IFSuperResolutionPipeline, larger=True), with_pictures(three()), "unet"),
    "IFImg2ImgSuperResolution": Family(deep_floyd(d.IFImg2ImgSuperResolutionPipeline, larger=True), TWO, "unet"),
    "IFInpaintingSuperResolution": Family(
        deep_floyd(d.IFInpaintingSuperResolutionPipeline, larger=True),
        [{**call, "mask_image": half_mask()} for call in TWO],
        "unet",
    ),
}

"""Tiny pipelines that enlarge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers

from support import tiny


def four_times() -> Any:
    """StableDiffusionUpscalePipeline: its VAE has 4 pixels to a latent, and the latents the size of the source."""
    with tiny.seeded(0):
        parts = tiny._first_generation()
        for absent in ("requires_safety_checker", "safety_checker", "feature_extractor"):
            del parts[absent]
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
        parts["vae"] = tiny._vae(block_out_channels=(8, 8, 8), scaling_factor=0.08333, **blocks)
        unet = tiny._unet(in_channels=7, num_class_embeds=1000)
        return diffusers.StableDiffusionUpscalePipeline(
            unet=unet, scheduler=diffusers.DDIMScheduler(), low_res_scheduler=diffusers.DDPMScheduler(), **parts
        )


def twice() -> Any:
    """StableDiffusionLatentUpscalePipeline with as many halvings as the published one."""
    with tiny.seeded(0):
        parts = tiny._first_generation()
        for absent in ("requires_safety_checker", "safety_checker", "feature_extractor"):
            del parts[absent]
        unet = diffusers.UNet2DConditionModel(
            sample_size=16, in_channels=8, out_channels=5, block_out_channels=(32, 32, 64, 64), layers_per_block=1,
            act_fn="gelu", attention_head_dim=8, norm_num_groups=None, cross_attention_dim=tiny.WIDTH,
            down_block_types=("KDownBlock2D",) + ("KCrossAttnDownBlock2D",) * 3, mid_block_type=None,
            up_block_types=("KCrossAttnUpBlock2D",) * 3 + ("KUpBlock2D",), conv_in_kernel=1, conv_out_kernel=1,
            resnet_time_scale_shift="scale_shift", time_embedding_type="fourier", timestep_post_act="gelu",
            time_cond_proj_dim=128 + tiny.WIDTH, only_cross_attention=False, dual_cross_attention=False,
        ).eval()  # fmt: skip
        schedule = diffusers.EulerDiscreteScheduler(prediction_type="sample")
        return diffusers.StableDiffusionLatentUpscalePipeline(unet=unet, scheduler=schedule, **parts)


def super_resolution() -> Any:
    """LDMSuperResolutionPipeline, which takes no prompt."""
    with tiny.seeded(0):
        unet = diffusers.UNet2DModel(
            sample_size=32, in_channels=6, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
            norm_num_groups=4, attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).eval()  # fmt: skip
        vqvae = diffusers.VQModel(
            block_out_channels=(8, 8, 8), norm_num_groups=4, num_vq_embeddings=16, latent_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        ).eval()  # fmt: skip
        return diffusers.LDMSuperResolutionPipeline(vqvae=vqvae, unet=unet, scheduler=diffusers.DDIMScheduler())


UPSCALERS: dict[str, tuple[Callable[[], Any], int, tuple[int, int]]] = {
    "four times": (four_times, 4, (36, 20)),
    "twice": (twice, 2, (96, 64)),
    "four times, without a prompt": (super_resolution, 4, (64, 32)),
}

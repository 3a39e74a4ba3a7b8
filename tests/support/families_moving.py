"""Tiny real pipelines of videos and sound; see `families.py`."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaModel,
)

from support import tiny
from support.families import Call, Family, controlled, negative, picture, three, with_pictures, without
from support.families_transformers import LANGUAGE, any_tokenizer, flow, umt5
from support.tiny import STABLE_DIFFUSION_NOISE, WIDTH, seeded
from support.tiny_text import clip_tokenizer, t5_tokenizer


def wan() -> Any:
    with seeded(0):
        transformer = d.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
            text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        )  # fmt: skip
        vae = d.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
        return d.WanPipeline(
            transformer=transformer.eval(), vae=vae.eval(), scheduler=flow(shift=7.0), text_encoder=umt5(),
            tokenizer=t5_tokenizer(), transformer_2=None,
        )  # fmt: skip


def ltx() -> Any:
    with seeded(0):
        transformer = d.LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
            cross_attention_dim=32, num_layers=1, caption_channels=WIDTH,
        )  # fmt: skip
        vae = d.AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False), layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1), patch_size=1, patch_size_t=1,
        )  # fmt: skip
        vae.use_framewise_encoding = vae.use_framewise_decoding = False
        return d.LTXPipeline(
            transformer=transformer.eval(), vae=vae.eval(), scheduler=flow(), text_encoder=tiny._t5(),
            tokenizer=t5_tokenizer(),
        )  # fmt: skip


def cogvideox() -> Any:
    with seeded(0):
        transformer = d.CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2,
            text_embed_dim=WIDTH, num_layers=1, sample_width=4, sample_height=4, sample_frames=9, patch_size=2,
            temporal_compression_ratio=4, max_text_seq_length=64, use_rotary_positional_embeddings=True,
        )  # fmt: skip
        vae = d.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
            temporal_compression_ratio=4,
        )  # fmt: skip
        return d.CogVideoXPipeline(
            transformer=transformer.eval(), vae=vae.eval(), scheduler=d.CogVideoXDDIMScheduler(),
            text_encoder=tiny._t5(), tokenizer=t5_tokenizer(),
        )  # fmt: skip


def mochi() -> Any:
    with seeded(0):
        transformer = d.MochiTransformer3DModel(
            patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
            in_channels=12, text_embed_dim=WIDTH, time_embed_dim=4, max_sequence_length=64,
        )  # fmt: skip
        with torch.no_grad():
            transformer.pos_frequencies.zero_()
        vae = d.AutoencoderKLMochi(
            latent_channels=12, out_channels=3, encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32), layers_per_block=(1, 1, 1, 1, 1),
        )  # fmt: skip
        return d.MochiPipeline(
            transformer=transformer.eval(), vae=vae.eval(), scheduler=flow(), text_encoder=tiny._t5(),
            tokenizer=t5_tokenizer(),
        )  # fmt: skip


def latte() -> Any:
    with seeded(0):
        transformer = d.LatteTransformer3DModel(
            sample_size=4, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3,
            caption_channels=WIDTH, in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True,
            activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
            norm_elementwise_affine=False, norm_eps=1e-6, video_length=2,
        )  # fmt: skip
        return d.LattePipeline(
            transformer=transformer.eval(), vae=tiny._vae(), scheduler=d.DDIMScheduler(), text_encoder=tiny._t5(),
            tokenizer=t5_tokenizer(),
        )  # fmt: skip


def hunyuan_video() -> Any:
    with seeded(0):
        transformer = d.HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True,
            text_embed_dim=WIDTH, pooled_projection_dim=WIDTH, rope_axes_dim=(4, 6, 6),
        )  # fmt: skip
        vae = d.AutoencoderKLHunyuanVideo(
            latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
            norm_num_groups=4, mid_block_add_attention=True,
        )  # fmt: skip
        return d.HunyuanVideoPipeline(
            transformer=transformer.eval(), vae=vae.eval(), scheduler=flow(shift=7.0),
            text_encoder=LlamaModel(LlamaConfig(**LANGUAGE)).eval(), tokenizer=any_tokenizer(),
            text_encoder_2=CLIPTextModel(tiny._clip()).eval(), tokenizer_2=clip_tokenizer(),
        )  # fmt: skip


def motion() -> Any:
    return d.MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=4,
        motion_num_attention_heads=4, motion_max_seq_length=8,
    ).eval()  # fmt: skip


def animate_diff() -> Any:
    with seeded(0):
        parts = tiny._first_generation()
        del parts["safety_checker"], parts["requires_safety_checker"]
        scheduler = d.DDIMScheduler(**STABLE_DIFFUSION_NOISE, clip_sample=False)
        return d.AnimateDiffPipeline(unet=tiny._unet(), motion_adapter=motion(), scheduler=scheduler, **parts)


def animate_diff_free_init() -> Any:
    pipe = animate_diff()
    pipe.enable_free_init(num_iters=2)
    return pipe


def animate_diff_controlled() -> Any:
    with seeded(0):
        parts = controlled(d.StableDiffusionControlNetPipeline)().components
        for absent in ("safety_checker", "image_encoder", "feature_extractor"):
            del parts[absent]
        parts["scheduler"] = d.DDIMScheduler(**STABLE_DIFFUSION_NOISE, clip_sample=False)
        return d.AnimateDiffControlNetPipeline(motion_adapter=motion(), **parts)


def stable_video() -> Any:
    with seeded(0):
        unet = d.UNetSpatioTemporalConditionModel(
            block_out_channels=(32, 64), layers_per_block=1, sample_size=8, in_channels=8, out_channels=4,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=WIDTH,
            num_attention_heads=4, projection_class_embeddings_input_dim=96, addition_time_embed_dim=32,
        )  # fmt: skip
        vae = d.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
        )
        eyes = CLIPVisionConfig(hidden_size=32, projection_dim=WIDTH, num_hidden_layers=2, num_attention_heads=4,
                                image_size=224, intermediate_size=37, patch_size=32)  # fmt: skip
        scheduler = d.EulerDiscreteScheduler(
            **STABLE_DIFFUSION_NOISE, prediction_type="v_prediction", sigma_max=700.0, sigma_min=0.002,
            timestep_spacing="leading", timestep_type="continuous", use_karras_sigmas=True,
        )  # fmt: skip
        return d.StableVideoDiffusionPipeline(
            unet=unet.eval(), vae=vae.eval(), scheduler=scheduler,
            image_encoder=CLIPVisionModelWithProjection(eyes).eval(),
            feature_extractor=CLIPImageProcessor(crop_size=32, size=32),
        )  # fmt: skip


def stable_audio() -> Any:
    with seeded(0):
        transformer = d.StableAudioDiTModel(
            sample_size=8, in_channels=3, num_layers=2, attention_head_dim=4, num_key_value_attention_heads=2,
            out_channels=3, cross_attention_dim=4, time_proj_dim=8, global_states_input_dim=8,
            cross_attention_input_dim=4,
        )  # fmt: skip
        vae = d.AutoencoderOobleck(
            encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=3,
            audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
        )  # fmt: skip
        projection = d.StableAudioProjectionModel(text_encoder_dim=WIDTH, conditioning_dim=4, min_value=0, max_value=32)
        scheduler = d.CosineDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        )
        tokenizer = t5_tokenizer()
        tokenizer.model_max_length = 48
        return d.StableAudioPipeline(
            transformer=transformer.eval(), vae=vae.eval(), scheduler=scheduler, text_encoder=tiny._t5(),
            tokenizer=tokenizer, projection_model=projection.eval(),
        )  # fmt: skip


def moving(frames: int, size: int = 32, **more: Any) -> list[Call]:
    return three(num_frames=frames, height=size, width=size, **more)


FILM = {"num_frames": 2, "height": 32, "width": 32, "decode_chunk_size": 2}
ALL_OVER = "FreeInit runs the whole schedule several times"

FAMILIES: dict[str, Family] = {
    "Wan": Family(wan, negative(moving(9, 16))),
    "LTX": Family(ltx, negative(moving(9))),
    "CogVideoX": Family(cogvideox, negative(moving(8, max_sequence_length=64))),
    "Mochi": Family(mochi, negative(moving(7, 16, max_sequence_length=64))),
    "Latte": Family(
        latte, three(video_length=2, height=32, width=32, clean_caption=False), alone="text keeps its length, unmasked"
    ),
    "HunyuanVideo": Family(hunyuan_video, moving(9, 16, max_sequence_length=700)),
    "AnimateDiff": Family(animate_diff, negative(moving(4)), "unet"),
    "AnimateDiff (FreeInit)": Family(animate_diff_free_init, negative(moving(4)), "unet", ALL_OVER),
    "AnimateDiffControlNet": Family(
        animate_diff_controlled,
        [{**c, "conditioning_frames": [picture(at + n, 32) for n in range(4)]} for at, c in enumerate(moving(4))],
        "unet",
    ),
    "StableVideoDiffusion": Family(
        stable_video,
        [{**c, **FILM} for c in with_pictures(without(three(), "prompt", "guidance_scale"), size=32)],
        "unet",
    ),
    "StableAudio": Family(stable_audio, [{**c, "audio_end_in_s": 1.5} for c in negative(three())]),
}

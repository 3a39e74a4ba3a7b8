"""Tiny real pipelines of clips besides those of `families_moving`: with sound, and from a picture."""

from __future__ import annotations

from typing import Any

import diffusers as d
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from support import tiny
from support.families_moving import wan
from support.families_transformers import LANGUAGE, any_tokenizer, flow
from support.tiny import WIDTH, seeded

RATE = 16_000
"""Samples a second of the sound of `ltx2`."""


def gemma() -> Any:
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    text = {name: value for name, value in LANGUAGE.items() if not name.endswith("_id")}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config).eval()


def ltx2() -> Any:
    with seeded(0):
        transformer = d.LTX2VideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
            audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
            audio_cross_attention_dim=8, num_layers=1, caption_channels=WIDTH, rope_double_precision=False,
            rope_type="split",
        )  # fmt: skip
        vae = d.AutoencoderKLLTX2Video(
            latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
            decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_residual=(False,),
            upsample_factor=(1,), patch_size=1, patch_size_t=1, decoder_causal=False,
        )  # fmt: skip
        vae.use_framewise_encoding = vae.use_framewise_decoding = False
        sound = d.AutoencoderKLLTX2Audio(
            base_channels=4, ch_mult=(1,), num_res_blocks=1, attn_resolutions=None, resolution=32, latent_channels=2,
            mid_block_add_attention=False, sample_rate=RATE, mel_bins=8,
        )  # fmt: skip
        connectors = LTX2TextConnectors(
            caption_channels=WIDTH, text_proj_in_factor=LANGUAGE["num_hidden_layers"] + 1,
            video_connector_num_attention_heads=4, video_connector_attention_head_dim=8, video_connector_num_layers=1,
            video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=4,
            audio_connector_attention_head_dim=8, audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=None, connector_rope_base_seq_len=32, rope_double_precision=False,
            causal_temporal_positioning=False, rope_type="split",
        )  # fmt: skip
        vocoder = LTX2Vocoder(
            in_channels=16, hidden_channels=32, out_channels=2, upsample_kernel_sizes=[20, 32],
            upsample_factors=[10, 16], resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=RATE,
        )  # fmt: skip
        tokenizer = any_tokenizer()
        tokenizer.padding_side = "left"
        return d.LTX2Pipeline(
            scheduler=flow(), vae=vae.eval(), audio_vae=sound.eval(), text_encoder=gemma(), tokenizer=tokenizer,
            connectors=connectors.eval(), transformer=transformer.eval(), vocoder=vocoder.eval(),
        )  # fmt: skip


def wan_image() -> Any:
    parts = wan().components
    del parts["transformer"]
    with seeded(0):
        transformer = d.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=36, out_channels=16,
            text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32, image_dim=16,
        )  # fmt: skip
        eyes = CLIPVisionConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, image_size=32,
                                intermediate_size=32, patch_size=8)  # fmt: skip
        return d.WanImageToVideoPipeline(
            **parts, transformer=transformer.eval(), image_encoder=CLIPVisionModel(eyes).eval(),
            image_processor=CLIPImageProcessor(crop_size=32, size=32),
        )  # fmt: skip


def text_to_video() -> Any:
    """The class of ModelScope's weights, which diffusers keeps among its deprecated ones."""
    with seeded(0):
        unet = d.UNet3DConditionModel(
            block_out_channels=(8, 16), layers_per_block=1, sample_size=8, cross_attention_dim=WIDTH,
            attention_head_dim=4, norm_num_groups=4, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        )  # fmt: skip
        parts = tiny.stable_diffusion().components
        kept = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer")}
        scheduler = d.DDIMScheduler(**tiny.STABLE_DIFFUSION_NOISE, clip_sample=False, set_alpha_to_one=False)
        return d.TextToVideoSDPipeline(**kept, unet=unet.eval(), scheduler=scheduler)

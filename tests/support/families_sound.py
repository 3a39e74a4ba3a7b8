"""Tiny real pipelines of sound; see `families.py`. Two are those of `families_moving` and `families_newer`."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch
import transformers as t
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel
from diffusers.pipelines.deprecated.dance_diffusion import DanceDiffusionPipeline
from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder
from transformers.convert_slow_tokenizer import bytes_to_unicode

from support import tiny
from support.families import Family, lively, negative, three, without
from support.families_moving import stable_audio
from support.families_newer import longcat_audio
from support.families_transformers import LANGUAGE, TOKENS, any_tokenizer, flow
from support.tiny import STABLE_DIFFUSION_NOISE, WIDTH, seeded
from support.tiny_text import t5_tokenizer


def _oobleck(rate: int, channels: int) -> Any:
    return d.AutoencoderOobleck(
        encoder_hidden_size=6, downsampling_ratios=[2, 4], decoder_channels=6, decoder_input_channels=channels,
        audio_channels=2, channel_multiples=[1, 2], sampling_rate=rate,
    ).eval()  # fmt: skip


def ace_step(**changes: Any) -> Any:
    with seeded(0):
        sizes = {
            "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 8, "sliding_window": 16,
        }  # fmt: skip
        transformer = d.AceStepTransformer1DModel(
            **sizes, num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8, **changes
        )
        condition = AceStepConditionEncoder(
            **sizes, text_hidden_dim=WIDTH, timbre_hidden_dim=8, num_lyric_encoder_hidden_layers=2,
            num_timbre_encoder_hidden_layers=2,
        )  # fmt: skip
        return d.AceStepPipeline(
            transformer=lively(transformer.eval()), condition_encoder=condition.eval(), vae=_oobleck(800, 8),
            text_encoder=t.Qwen3Model(t.Qwen3Config(**LANGUAGE)).eval(), tokenizer=any_tokenizer(),
            scheduler=d.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
        )  # fmt: skip


def stable_audio_3(kind: Any = d.StableAudio3Pipeline) -> Any:
    with seeded(0):
        transformer = d.StableAudio3DiTModel(
            io_channels=8, embed_dim=32, depth=2, num_heads=4, cond_token_dim=WIDTH, global_cond_dim=WIDTH,
            local_add_cond_dim=9, timestep_features_dim=16, num_memory_tokens=4,
        )  # fmt: skip
        vae = d.AutoencoderSAME(
            patch_size=8, encoder_channels=16, encoder_c_mults=(1,), encoder_strides=(2,),
            encoder_transformer_depths=(1,), latent_dim=8, dim_heads=8, sampling_rate=800,
        )  # fmt: skip
        encoder = t.T5GemmaModuleConfig(**LANGUAGE, query_pre_attn_scalar=8, layer_types=["full_attention"] * 2)
        text = t.T5GemmaConfig(encoder=encoder, decoder=encoder, is_encoder_decoder=False, vocab_size=TOKENS)
        return kind(
            transformer=lively(transformer.eval()), vae=lively(vae.eval()), tokenizer=any_tokenizer(64),
            text_encoder=t.T5GemmaEncoderModel(text).eval(), scheduler=flow(),
            duration_embedder=StableAudio3DurationEmbedder(output_dim=WIDTH, fourier_dim=16).eval(),
        )  # fmt: skip


def _spectrogram_vae() -> Any:
    return d.AutoencoderKL(
        block_out_channels=(8, 16), in_channels=1, out_channels=1, norm_num_groups=8, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def _vocoder() -> Any:
    config = t.SpeechT5HifiGanConfig(
        model_in_dim=8, sampling_rate=16000, upsample_initial_channel=16, upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3, 7], resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
    )  # fmt: skip
    vocoder = lively(t.SpeechT5HifiGan(config).eval())
    with torch.no_grad():
        for name, parameter in vocoder.named_parameters():
            if "weight" in name:
                parameter.mul_(6)  # else it answers every spectrogram with the same silence
    return vocoder


def _roberta_tokenizer() -> Any:
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *bytes_to_unicode().values()]
    return t.RobertaTokenizer(vocab={word: at for at, word in enumerate(words)}, merges=[], model_max_length=77)


def _clap() -> Any:
    text = {
        "hidden_size": 8, "intermediate_size": 37, "num_attention_heads": 1, "num_hidden_layers": 1, "bos_token_id": 0,
        "eos_token_id": 2, "pad_token_id": 1, "vocab_size": 261, "projection_dim": 8,
    }  # fmt: skip
    audio = {
        "spec_size": 8, "window_size": 4, "num_mel_bins": 8, "intermediate_size": 37, "depths": [1, 1],
        "num_attention_heads": [1, 1], "num_hidden_layers": 1, "hidden_size": 192, "projection_dim": 8,
        "patch_size": 2, "patch_stride": 2, "patch_embed_input_channels": 4,
    }  # fmt: skip
    return t.ClapModel(t.ClapConfig(text_config=text, audio_config=audio, projection_dim=16)).eval()


def audio_ldm2() -> Any:
    with seeded(0):
        unet = AudioLDM2UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8, sample_size=32, in_channels=4,
            out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=(8, 16),
        )  # fmt: skip
        words = t.GPT2Config(
            n_embd=16, n_head=1, n_layer=1, vocab_size=1002, n_positions=99, bos_token_id=0, eos_token_id=1
        )
        projection = AudioLDM2ProjectionModel(text_encoder_dim=16, text_encoder_1_dim=WIDTH, langauge_model_dim=16)
        ears = t.ClapFeatureExtractor(feature_size=8)
        language_model = t.GPT2LMHeadModel(words).eval()
        language_model.config.max_new_tokens = 8
        return d.AudioLDM2Pipeline(
            unet=unet.eval(), vae=_spectrogram_vae(), text_encoder=_clap(), text_encoder_2=tiny._t5(),
            projection_model=projection.eval(), language_model=language_model, tokenizer=_roberta_tokenizer(),
            tokenizer_2=t5_tokenizer(), vocoder=_vocoder(), feature_extractor=ears,
            scheduler=d.DDIMScheduler(**STABLE_DIFFUSION_NOISE, clip_sample=False, set_alpha_to_one=False),
        )  # fmt: skip


def dance_diffusion() -> Any:
    with seeded(0):
        unet = d.UNet1DModel(
            block_out_channels=(32, 32, 64), extra_in_channels=16, time_embedding_dim=16, sample_size=512,
            in_channels=2, sample_rate=16_000, out_channels=2, use_timestep_embedding=False,
            time_embedding_type="fourier", mid_block_type="UNetMidBlock1D",
            down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
            up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
        )  # fmt: skip
        return DanceDiffusionPipeline(unet=unet.eval(), scheduler=d.IPNDMScheduler())


FAMILIES: dict[str, Family] = {
    "StableAudio": Family(stable_audio, [{**c, "audio_end_in_s": 1.5} for c in negative(three())]),
    "StableAudio3": Family(stable_audio_3, [{**c, "duration": 0.1} for c in negative(three())]),
    "AceStep": Family(ace_step, [{**c, "audio_duration": 0.1} for c in three()]),
    "AudioLDM2": Family(audio_ldm2, [{**c, "audio_length_in_s": 0.01} for c in negative(three())], "unet"),
    "LongCatAudioDiT": Family(longcat_audio, [{**c, "audio_duration_s": 0.01} for c in three()]),
    "DanceDiffusion": Family(
        dance_diffusion,
        [{**c, "audio_length_in_s": 0.02} for c in without(three(), "prompt", "guidance_scale")],
        "unet",
    ),
}

"""Tiny real pipelines whose denoiser is a transformer; see `families.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as d
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from support import tiny
from support.families import (
    DEEP,
    FLOW,
    PICTURES,
    SQUARE,
    Family,
    half_mask,
    lively,
    negative,
    over,
    three,
    with_pictures,
    without,
)
from support.tiny import WIDTH, seeded
from support.tiny_text import clip_tokenizer, t5_tokenizer


def any_tokenizer(length: int = 512) -> PreTrainedTokenizerFast:
    """A token for each printable character, and a chat template, as the tokenizers of language models have."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *(chr(code) for code in range(32, 127)), "\n"]
    inner = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    inner.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        model_max_length=length, padding_side="right",
        chat_template="{% for message in messages %}{% if message.content is string %}{{ message.content }}"
        "{% else %}{{ message.content[0].text }}{% endif %}{% endfor %}",
    )  # fmt: skip


TOKENS = 104
LANGUAGE: dict[str, Any] = {
    "vocab_size": TOKENS, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
"""What every tiny language model has."""


def umt5() -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(vocab_size=len(t5_tokenizer()), d_model=WIDTH, d_kv=8, num_heads=4, d_ff=64, num_layers=2)
    ).eval()


def flow(**changes: Any) -> Any:
    return d.FlowMatchEulerDiscreteScheduler(**changes)


def flow_vae(channels: int = 4, **changes: Any) -> Any:
    return tiny._vae(
        latent_channels=channels, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06,
        scaling_factor=1.5, **changes,
    )  # fmt: skip


def flux_with(kind: Any, **changes: Any) -> Callable[[], Any]:
    def build() -> Any:
        parts = {n: p for n, p in tiny.flux().components.items() if n not in ("image_encoder", "feature_extractor")}
        with seeded(1):
            shape = {k: v for k, v in parts["transformer"].config.items() if not k.startswith("_")} | changes
            parts["transformer"] = tiny._livened(d.FluxTransformer2DModel(**shape))
        return kind(**parts)

    return build


def flux2() -> Any:
    text = LANGUAGE | {"model_type": "mistral"}
    vision = {"model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
              "intermediate_size": 32, "image_size": 30, "patch_size": 6, "num_channels": 3}  # fmt: skip
    with seeded(0):
        transformer = d.Flux2Transformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=WIDTH, timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
        )  # fmt: skip
        vae = d.AutoencoderKLFlux2(
            sample_size=64, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        encoder = Mistral3ForConditionalGeneration(
            Mistral3Config(text_config=text, vision_config=vision, image_token_index=1)
        )
        return d.Flux2Pipeline(
            transformer=transformer.eval(), vae=vae.eval(), text_encoder=encoder.eval(), tokenizer=any_tokenizer(),
            scheduler=flow(use_dynamic_shifting=True),
        )  # fmt: skip


def flux2_klein() -> Any:
    parts = flux2().components
    with seeded(0):
        parts["text_encoder"] = Qwen3ForCausalLM(Qwen3Config(**LANGUAGE)).eval()
    return d.Flux2KleinPipeline(**parts)


def flux_controlled() -> Any:
    parts = {n: p for n, p in tiny.flux().components.items() if n not in ("image_encoder", "feature_extractor")}
    with seeded(1):
        shape = {k: v for k, v in parts["transformer"].config.items() if not k.startswith("_")}
        del shape["out_channels"]
        net = d.FluxControlNetModel(**shape)
    return d.FluxControlNetPipeline(controlnet=lively(net.eval()), **parts)


def stable_diffusion_3_controlled() -> Any:
    parts = tiny.stable_diffusion_3().components
    for absent in ("image_encoder", "feature_extractor"):
        del parts[absent]
    with seeded(1):
        net = d.SD3ControlNetModel.from_transformer(
            parts["transformer"], num_layers=1, num_extra_conditioning_channels=0, load_weights_from_transformer=False
        )
    return d.StableDiffusion3ControlNetPipeline(controlnet=lively(net.eval()), **parts)


def qwen_image() -> Any:
    text = LANGUAGE | {"rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    with seeded(0):
        transformer = d.QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
            num_attention_heads=3, joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4),
        )  # fmt: skip
        vae = d.AutoencoderKLQwenImage(
            base_dim=24, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        )  # fmt: skip
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        return d.QwenImagePipeline(
            transformer=transformer.eval(), vae=vae.eval(), scheduler=flow(),
            text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(), tokenizer=any_tokenizer(),
        )  # fmt: skip


def z_image() -> Any:
    with seeded(0):
        transformer = d.ZImageTransformer2DModel(
            all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=2, n_refiner_layers=1,
            n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
        )  # fmt: skip
        with torch.no_grad():  # made with torch.empty
            transformer.x_pad_token.fill_(1.0)
            transformer.cap_pad_token.fill_(1.0)
        return d.ZImagePipeline(
            transformer=transformer.eval(), vae=flow_vae(16), scheduler=flow(),
            text_encoder=Qwen3Model(Qwen3Config(**LANGUAGE)).eval(), tokenizer=any_tokenizer(),
        )  # fmt: skip


def gemma() -> Any:
    return Gemma2Model(Gemma2Config(**LANGUAGE, query_pre_attn_scalar=8, sliding_window=512)).eval()


def sana() -> Any:
    with seeded(0):
        transformer = d.SanaTransformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH,
            sample_size=32,
        )  # fmt: skip
        blocks = ("ResBlock", "EfficientViTBlock")
        vae = d.AutoencoderDC(
            in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=blocks,
            decoder_block_types=blocks, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1), downsample_block_type="conv", upsample_block_type="interpolate",
            decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41,
        )  # fmt: skip
        return d.SanaPipeline(
            transformer=transformer.eval(), vae=vae.eval(), scheduler=flow(shift=3.0), text_encoder=gemma(),
            tokenizer=any_tokenizer(),
        )  # fmt: skip


def lumina2() -> Any:
    with seeded(0):
        transformer = d.Lumina2Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=2, num_refiner_layers=1,
            num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2),
            axes_lens=(300, 64, 64), cap_feat_dim=WIDTH,
        )  # fmt: skip
        return d.Lumina2Pipeline(
            transformer=transformer.eval(), vae=flow_vae(), scheduler=flow(), text_encoder=gemma(),
            tokenizer=any_tokenizer(),
        )  # fmt: skip


def hunyuan_dit() -> Any:
    with seeded(0):
        transformer = d.HunyuanDiT2DModel(
            sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
            cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH, pooled_projection_dim=16, hidden_size=24,
            activation_fn="gelu-approximate", text_len=77, text_len_t5=256,
        )  # fmt: skip
        bert = BertConfig(vocab_size=TOKENS, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
                          intermediate_size=64, max_position_embeddings=80)  # fmt: skip
        return d.HunyuanDiTPipeline(
            transformer=transformer.eval(), vae=tiny._vae(), scheduler=d.DDPMScheduler(),
            text_encoder=BertModel(bert).eval(), tokenizer=any_tokenizer(77), text_encoder_2=tiny._t5(),
            tokenizer_2=t5_tokenizer(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip


def cogview4() -> Any:
    with seeded(0):
        transformer = d.CogView4Transformer2DModel(
            patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, out_channels=4,
            text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=4,
        )  # fmt: skip
        glm = GlmModel(GlmConfig(**LANGUAGE, partial_rotary_factor=0.5))
        scheduler = flow(base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True,
                         time_shift_type="linear")  # fmt: skip
        return d.CogView4Pipeline(
            transformer=transformer.eval(), vae=tiny._vae(), scheduler=scheduler, text_encoder=glm.eval(),
            tokenizer=any_tokenizer(),
        )  # fmt: skip


def chroma() -> Any:
    with seeded(0):
        transformer = d.ChromaTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=32,
            approximator_layers=1, approximator_num_channels=16,
        )  # fmt: skip
        return d.ChromaPipeline(
            transformer=transformer.eval(), vae=flow_vae(), scheduler=flow(), text_encoder=tiny._t5(),
            tokenizer=t5_tokenizer(),
        )  # fmt: skip


def aura_flow() -> Any:
    with seeded(0):
        transformer = d.AuraFlowTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
            attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=WIDTH,
            out_channels=4, pos_embed_max_size=64,
        )  # fmt: skip
        return d.AuraFlowPipeline(
            transformer=transformer.eval(), vae=tiny._vae(), scheduler=flow(), text_encoder=umt5(),
            tokenizer=t5_tokenizer(),
        )  # fmt: skip


def hidream() -> Any:
    with seeded(0):
        transformer = d.HiDreamImageTransformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=4, caption_channels=[WIDTH, WIDTH], text_emb_dim=2 * WIDTH, num_routed_experts=4,
            num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1),
        )  # fmt: skip
        clip = tiny._clip()
        clip.max_position_embeddings = 128
        clips = [CLIPTextModelWithProjection(clip).eval() for _ in range(2)]
        llama = LlamaForCausalLM(LlamaConfig(**LANGUAGE)).eval()
        pipe = d.HiDreamImagePipeline(
            transformer=transformer.eval(), vae=flow_vae(), scheduler=flow(), text_encoder=clips[0],
            tokenizer=clip_tokenizer(), text_encoder_2=clips[1], tokenizer_2=clip_tokenizer(),
            text_encoder_3=tiny._t5(), tokenizer_3=t5_tokenizer(), text_encoder_4=llama, tokenizer_4=any_tokenizer(),
        )  # fmt: skip
        pipe.default_sample_size = 8  # it scales every size to that area
        return pipe


def pixart_alpha() -> Any:
    sigma = tiny.pixart()
    return d.PixArtAlphaPipeline(**sigma.components)


def class_dit() -> Any:
    with seeded(0):
        transformer = d.DiTTransformer2DModel(
            sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
            out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero", norm_elementwise_affine=False,
        )  # fmt: skip
        return d.DiTPipeline(transformer=transformer.eval(), vae=tiny._vae(), scheduler=d.DDIMScheduler())


FAMILIES: dict[str, Family] = {
    "StableDiffusion3": Family(tiny.stable_diffusion_3, negative(FLOW)),
    "StableDiffusion3Img2Img": Family(
        over(d.StableDiffusion3Img2ImgPipeline, tiny.stable_diffusion_3),
        [{**c, **DEEP, **SQUARE} for c in PICTURES],
    ),
    "Flux": Family(tiny.flux, FLOW),
    "FluxImg2Img": Family(flux_with(d.FluxImg2ImgPipeline), [{**c, **DEEP} for c in with_pictures(FLOW)]),
    "FluxInpaint": Family(
        flux_with(d.FluxInpaintPipeline), [{**c, **DEEP, "mask_image": half_mask()} for c in with_pictures(FLOW)]
    ),
    "FluxFill": Family(
        flux_with(d.FluxFillPipeline, in_channels=16 + 16 + 256, out_channels=16),
        [{**c, "mask_image": half_mask()} for c in with_pictures(FLOW)],
    ),
    "FluxKontext": Family(
        flux_with(d.FluxKontextPipeline), [{**c, "_auto_resize": False, "max_area": 4096} for c in with_pictures(FLOW)]
    ),
    "FluxControl": Family(
        flux_with(d.FluxControlPipeline, in_channels=32, out_channels=16), with_pictures(FLOW, "control_image")
    ),
    "Flux2": Family(flux2, [{**c, "text_encoder_out_layers": (1,)} for c in FLOW]),
    "Flux2Klein": Family(flux2_klein, [{**c, "text_encoder_out_layers": (1,)} for c in FLOW]),
    "FluxControlNet": Family(flux_controlled, with_pictures(FLOW, "control_image")),
    "StableDiffusion3ControlNet": Family(stable_diffusion_3_controlled, with_pictures(FLOW, "control_image")),
    "QwenImageImg2Img": Family(
        over(d.QwenImageImg2ImgPipeline, qwen_image),
        [
            {**c, **DEEP, "true_cfg_scale": 3.0, "negative_prompt": "x"}
            for c in without(with_pictures(FLOW), "guidance_scale")
        ],
    ),
    "ZImageImg2Img": Family(over(d.ZImageImg2ImgPipeline, z_image), [{**c, **DEEP} for c in with_pictures(FLOW)]),
    "QwenImage": Family(
        qwen_image, [{**c, "true_cfg_scale": 3.0, "negative_prompt": "x"} for c in without(FLOW, "guidance_scale")]
    ),
    "ZImage": Family(z_image, FLOW),
    "Sana": Family(
        sana,
        [
            {**c, "use_resolution_binning": False, "complex_human_instruction": None}
            for c in negative(three(height=32, width=32))
        ],
    ),
    "PixArtAlpha": Family(pixart_alpha, [{**c, "use_resolution_binning": False} for c in FLOW]),
    "PixArtSigma": Family(tiny.pixart, [{**c, "use_resolution_binning": False} for c in FLOW]),
    "Lumina2": Family(lumina2, FLOW),
    "HunyuanDiT": Family(hunyuan_dit, [{**c, "use_resolution_binning": False} for c in negative(FLOW)]),
    "CogView4": Family(cogview4, negative(FLOW)),
    "Chroma": Family(chroma, FLOW),
    "AuraFlow": Family(aura_flow, FLOW),
    "HiDreamImage": Family(hidream, FLOW),
    "DiT": Family(
        class_dit,
        [{**c, "class_labels": [at]} for at, c in enumerate(without(three(), "prompt"))],
    ),
}

"""More tiny real pipelines: distilled and combined ones, and those whose text comes in lengths of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers as d
import torch
from diffusers.models.transformers import transformer_cosmos
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
)

from support import tiny
from support.families import (
    DEEP,
    FLOW,
    Call,
    Family,
    embeds,
    half_mask,
    kandinsky22,
    lively,
    negative,
    numbers,
    over,
    picture,
    three,
    with_pictures,
    without,
)
from support.families_moving import moving, wan
from support.families_transformers import (
    LANGUAGE,
    any_tokenizer,
    flow,
    flow_vae,
    flux_with,
    gemma,
    qwen_image,
    sana,
    umt5,
)
from support.tiny import WIDTH, seeded
from support.tiny_text import clip_tokenizer, t5_tokenizer

SCHNELL: dict[str, Any] = {"guidance_embeds": False}
"""FLUX.1-schnell has no embedding of guidance, and passes None."""


def language() -> Any:
    text = LANGUAGE | {"rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def eyes(size: int = 224, patch: int = 32) -> Any:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    config = CLIPVisionConfig(projection_dim=WIDTH, image_size=size, patch_size=patch, **shape)
    return CLIPVisionModelWithProjection(config).eval()


def sana_sprint() -> Any:
    parts = sana().components
    with seeded(1):
        shape = {k: v for k, v in parts["transformer"].config.items() if not k.startswith("_")}
        parts["transformer"] = d.SanaTransformer2DModel(
            **shape | {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
        ).eval()
    return d.SanaSprintPipeline(**parts | {"scheduler": d.SCMScheduler()})


def kandinsky3() -> Any:
    with seeded(0):
        unet = d.Kandinsky3UNet(
            in_channels=4, time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=3,
            block_out_channels=(32, 64), cross_attention_dim=4, encoder_hid_dim=WIDTH,
        )  # fmt: skip
        scheduler = d.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="squaredcos_cap_v2")
        return d.Kandinsky3Pipeline(
            unet=unet.eval(), movq=kandinsky22().movq, scheduler=scheduler, text_encoder=tiny._t5(),
            tokenizer=t5_tokenizer(),
        )  # fmt: skip


def prior() -> dict[str, Any]:
    """What Kandinsky 2.2 makes an embedding of a text with."""
    with seeded(0):
        made = d.PriorTransformer(num_attention_heads=2, attention_head_dim=12, embedding_dim=WIDTH, num_layers=1)
        made.clip_std = torch.nn.Parameter(torch.ones_like(made.clip_std))
        scheduler = d.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample_range=10.0
        )
        text = CLIPTextModelWithProjection(tiny._clip()).eval()
        return {
            "prior": made.eval(), "image_encoder": eyes(), "text_encoder": text,
            "tokenizer": clip_tokenizer(), "scheduler": scheduler,
            "image_processor": CLIPImageProcessor(crop_size=224, size=224),
        }  # fmt: skip


def kandinsky_combined(kind: Any = d.KandinskyV22CombinedPipeline) -> Any:
    return kind(**kandinsky22().components, **{f"prior_{name}": part for name, part in prior().items()})


def cascade_unet(**changes: Any) -> Any:
    shape: dict[str, Any] = {
        "in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8, "conditioning_dim": WIDTH,
        "block_out_channels": (32, 32), "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1),
        "up_num_layers_per_block": (1, 1), "clip_text_pooled_in_channels": WIDTH,
    }  # fmt: skip
    made = d.StableCascadeUNet(**shape | changes)
    with torch.no_grad():  # it starts with zeros where it ends, and would draw nothing
        for parameter in made.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return made.eval()


def cascade() -> Any:
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    with seeded(0):
        before = cascade_unet(
            clip_text_in_channels=WIDTH, clip_image_in_channels=WIDTH, switch_level=(False,),
            in_channels=16, out_channels=16,
        )  # fmt: skip
        decoder = cascade_unet(patch_size=2, effnet_in_channels=16)
        text = CLIPTextModelWithProjection(tiny._clip()).eval()
        return d.StableCascadeCombinedPipeline(
            tokenizer=clip_tokenizer(), text_encoder=text, decoder=decoder, scheduler=d.DDPMWuerstchenScheduler(),
            vqgan=PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=16, embed_dim=16).eval(), prior_prior=before,
            prior_text_encoder=text, prior_tokenizer=clip_tokenizer(), prior_scheduler=d.DDPMWuerstchenScheduler(),
        )  # fmt: skip


def kandinsky5() -> Any:
    with seeded(0):
        transformer = d.Kandinsky5Transformer3DModel(
            in_visual_dim=16, in_text_dim=WIDTH, in_text_dim2=WIDTH, time_dim=16, out_visual_dim=16,
            patch_size=(1, 2, 2), model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(1, 1, 2),
            visual_cond=False, attention_type="regular",
        )  # fmt: skip
        pipe = d.Kandinsky5T2IPipeline(
            transformer=transformer.eval(), vae=flow_vae(16), text_encoder=language(), tokenizer=any_tokenizer(),
            text_encoder_2=CLIPTextModel(tiny._clip()).eval(), tokenizer_2=clip_tokenizer(), scheduler=flow(shift=7.0),
        )  # fmt: skip
        pipe.resolutions = [(64, 64)]
        return pipe


def hunyuan_image() -> Any:
    with seeded(0):
        transformer = d.HunyuanImageTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, patch_size=(1, 1), guidance_embeds=False, text_embed_dim=WIDTH,
            text_embed_2_dim=WIDTH, rope_axes_dim=(4, 4),
        )  # fmt: skip
        vae = d.AutoencoderKLHunyuanImage(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 64, 64, 64), layers_per_block=1,
            scaling_factor=0.476986, spatial_compression_ratio=8, sample_size=128,
        )  # fmt: skip
        guider = d.AdaptiveProjectedMixGuidance
        return d.HunyuanImagePipeline(
            transformer=transformer.eval(), vae=vae.eval(), scheduler=flow(shift=7.0), text_encoder=language(),
            tokenizer=any_tokenizer(), text_encoder_2=tiny._t5(), tokenizer_2=t5_tokenizer(),
            guider=guider(adaptive_projected_guidance_start_step=2),
            ocr_guider=guider(adaptive_projected_guidance_start_step=3),
        )  # fmt: skip


class Unguarded(torch.nn.Module):
    """In the place of Cosmos' safety checker, whose weights take gigabytes."""

    dtype, device = torch.float32, torch.device("cpu")

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def nearest(picture: torch.Tensor, size: list[int], **_: Any) -> torch.Tensor:
    return torch.nn.functional.interpolate(picture, size, mode="nearest")


def cosmos() -> Any:
    if not hasattr(transformer_cosmos, "transforms"):  # all that it wants of torchvision, which isn't here
        functional, modes = SimpleNamespace(resize=nearest), SimpleNamespace(NEAREST="nearest")
        transformer_cosmos.transforms = SimpleNamespace(functional=functional, InterpolationMode=modes)
    with seeded(0):
        transformer = d.CosmosTransformer3DModel(
            in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2,
            text_embed_dim=WIDTH, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2),
            rope_scale=(2.0, 1.0, 1.0), concat_padding_mask=True, extra_pos_embed_type="learnable",
        )  # fmt: skip
        scheduler = flow(use_karras_sigmas=True)
        return d.Cosmos2TextToImagePipeline(
            transformer=transformer.eval(), vae=wan().vae, scheduler=scheduler, text_encoder=tiny._t5(),
            tokenizer=t5_tokenizer(), safety_checker=Unguarded(),
        )  # fmt: skip


def wan_between(expanded: bool = False) -> Any:
    """A video between a first and a last frame: two pictures to a row."""
    parts = wan().components
    with seeded(1):
        transformer = d.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=36, out_channels=16,
            text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32, image_dim=WIDTH,
            pos_embed_seq_len=2 * (8 * 8 + 1),
        )  # fmt: skip
        return d.WanImageToVideoPipeline(
            **parts | {"transformer": transformer.eval()}, image_encoder=eyes(32, 4),
            image_processor=CLIPImageProcessor(crop_size=32, size=32),
        )  # fmt: skip


def wan_2_2() -> Any:
    """Two denoisers, one for each half of the steps."""
    parts = wan().components
    return d.WanPipeline(**parts | {"transformer_2": wan().transformer}, boundary_ratio=0.875)


def wan_2_2_small() -> Any:
    """One denoiser with a time step for every token."""
    return d.WanPipeline(**wan().components, expand_timesteps=True)


def longcat_audio(**changes: Any) -> Any:
    with seeded(0):
        transformer = d.LongCatAudioDiTTransformer(
            dit_dim=64, dit_depth=2, dit_heads=4, dit_text_dim=WIDTH, latent_dim=8, **changes
        )
        vae = d.LongCatAudioDiTVae(
            in_channels=1, channels=16, c_mults=[1, 2], strides=[2], latent_dim=8, encoder_latent_dim=16,
            downsampling_ratio=2, sample_rate=24000,
        )  # fmt: skip
        return d.LongCatAudioDiTPipeline(
            transformer=lively(transformer.eval()), vae=vae.eval(), text_encoder=umt5(), tokenizer=t5_tokenizer()
        )


def lumina() -> Any:
    with seeded(0):
        transformer = d.LuminaNextDiT2DModel(
            sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_attention_heads=3,
            num_kv_heads=1, multiple_of=16, learn_sigma=True, qk_norm=True, cross_attention_dim=WIDTH,
        )  # fmt: skip
        return d.LuminaPipeline(
            transformer=transformer.eval(), vae=tiny._vae(), scheduler=flow(), text_encoder=gemma(),
            tokenizer=any_tokenizer(),
        )  # fmt: skip


def cogview3() -> Any:
    with seeded(0):
        transformer = d.CogView3PlusTransformer2DModel(
            patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2, out_channels=4,
            text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=2, pos_embed_max_size=8, sample_size=8,
        )  # fmt: skip
        return d.CogView3PlusPipeline(
            transformer=transformer.eval(), vae=tiny._vae(), scheduler=d.CogVideoXDDIMScheduler(),
            text_encoder=tiny._t5(), tokenizer=t5_tokenizer(),
        )  # fmt: skip


def ovis() -> Any:
    with seeded(0):
        transformer = d.OvisImageTransformer2DModel(
            patch_size=1, in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
        return d.OvisImagePipeline(
            transformer=transformer.eval(), vae=flow_vae(), scheduler=flow(), tokenizer=any_tokenizer(),
            text_encoder=Qwen3Model(Qwen3Config(**LANGUAGE)).eval(),
        )  # fmt: skip


def allegro() -> Any:
    with seeded(0):
        transformer = d.AllegroTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1,
            cross_attention_dim=24, sample_width=8, sample_height=8, sample_frames=8, caption_channels=WIDTH,
        )  # fmt: skip
        vae = d.AutoencoderKLAllegro(
            in_channels=3, out_channels=3, down_block_types=("AllegroDownBlock3D",) * 4,
            up_block_types=("AllegroUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), latent_channels=4,
            layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4,
        )  # fmt: skip
        vae.enable_tiling()
        return d.AllegroPipeline(
            transformer=transformer.eval(), vae=vae.eval(), scheduler=d.DDIMScheduler(), text_encoder=tiny._t5(),
            tokenizer=t5_tokenizer(),
        )  # fmt: skip


def with_prior(calls: list[Call], **more: Any) -> list[Call]:
    return [{**call, "prior_num_inference_steps": 3, **more} for call in calls]


PADDED = "an average over its text counts padding in"
# As embeddings: from a prompt this class wants a package that isn't here.
TEXTS = {"prompt_embeds": numbers(1, 1, 16, WIDTH), "negative_prompt_embeds": numbers(2, 1, 16, WIDTH)}
BETWEEN = [
    {**c, **TEXTS, "last_image": picture(at + 10, 16)}
    for at, c in enumerate(without(with_pictures(moving(9, 16), size=16), "prompt"))
]
SHORT = {"max_sequence_length": 16}

FAMILIES: dict[str, Family] = {
    "Flux (schnell)": Family(flux_with(d.FluxPipeline, **SCHNELL), FLOW),
    "FluxImg2Img (schnell)": Family(
        flux_with(d.FluxImg2ImgPipeline, **SCHNELL), [{**c, **DEEP} for c in with_pictures(FLOW)]
    ),
    "FluxInpaint (schnell)": Family(
        flux_with(d.FluxInpaintPipeline, **SCHNELL),
        [{**c, **DEEP, "mask_image": half_mask()} for c in with_pictures(FLOW)],
    ),
    "FluxFill (schnell)": Family(
        flux_with(d.FluxFillPipeline, in_channels=16 + 16 + 256, out_channels=16, **SCHNELL),
        [{**c, "mask_image": half_mask()} for c in with_pictures(FLOW)],
    ),
    "FluxKontext (schnell)": Family(
        flux_with(d.FluxKontextPipeline, **SCHNELL),
        [{**c, "_auto_resize": False, "max_area": 4096} for c in with_pictures(FLOW)],
    ),
    "FluxControl (schnell)": Family(
        flux_with(d.FluxControlPipeline, in_channels=32, out_channels=16, **SCHNELL),
        with_pictures(FLOW, "control_image"),
    ),
    "Flux (true guidance)": Family(
        flux_with(d.FluxPipeline), [{**c, "true_cfg_scale": 3.0, "negative_prompt": "x"} for c in FLOW]
    ),
    "SanaSprint": Family(
        sana_sprint,
        [
            {**c, "use_resolution_binning": False, "complex_human_instruction": None, "intermediate_timesteps": None}
            for c in three(height=32, width=32)
        ],
    ),
    "Kandinsky3": Family(kandinsky3, negative(three(height=16, width=16)), "unet", PADDED),
    "KandinskyV22Prior": Family(lambda: d.KandinskyV22PriorPipeline(**prior()), negative(three()), "prior"),
    "KandinskyV22Img2Img": Family(
        over(d.KandinskyV22Img2ImgPipeline, kandinsky22),
        [{**c, "strength": 0.8} for c in with_pictures(embeds(FLOW))],
        "unet",
    ),
    "KandinskyV22Combined": Family(kandinsky_combined, with_prior(negative(FLOW)), "unet"),
    "StableCascadeCombined": Family(
        cascade,
        with_prior(
            [{**c, "decoder_guidance_scale": 2.0} for c in without(three(height=128, width=128), "guidance_scale")]
        ),
        "decoder",
    ),
    "Kandinsky5T2I": Family(kandinsky5, negative(FLOW), alone="text keeps its length, unmasked"),
    "HunyuanImage": Family(hunyuan_image, without(FLOW, "guidance_scale")),
    "Cosmos2TextToImage": Family(cosmos, negative(three(height=32, width=32, **SHORT))),
    "WanImageToVideo (first and last)": Family(wan_between, BETWEEN),
    "Wan (2.2, two denoisers)": Family(wan_2_2, negative(moving(9, 16))),
    "Wan (2.2, a time per token)": Family(wan_2_2_small, negative(moving(9, 16))),
    "LongCatAudioDiT": Family(
        longcat_audio,
        [{**c, "audio_duration_s": 0.1} for c in three()],
        alone="a convolution over its text reads padding",
    ),
    "LongCatAudioDiT (no convolution over text)": Family(
        lambda: longcat_audio(text_conv=False), [{**c, "audio_duration_s": 0.1} for c in three()]
    ),
    "Lumina": Family(lumina, [{**c, "clean_caption": False} for c in FLOW]),
    "CogView3Plus": Family(cogview3, negative(three(**SHORT, height=64, width=64))),
    "OvisImage": Family(ovis, negative([{**c, "max_sequence_length": 32} for c in FLOW])),
    "Allegro": Family(allegro, [{**c, "clean_caption": False} for c in moving(8, 16, **SHORT)]),
    "QwenImageInpaint": Family(
        over(d.QwenImageInpaintPipeline, qwen_image),
        [
            {**c, **DEEP, "mask_image": half_mask(), "true_cfg_scale": 3.0, "negative_prompt": "x"}
            for c in without(with_pictures(FLOW), "guidance_scale")
        ],
    ),
}

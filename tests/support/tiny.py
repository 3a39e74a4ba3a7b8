"""Tiny real diffusers pipelines: random but seeded weights, fp32, built offline in a blink.

Nothing is mocked: each function returns the class its name says, with every component it has in
earnest, only very narrow. The same `seed` gives the same weights, so the same call gives the same
pixels. All draw 64x64 unless told otherwise and take sizes in multiples of 8 (flow models: 16).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessor,
    T5Config,
    T5EncoderModel,
)

from support.tiny_checkpoint import single_file as single_file
from support.tiny_text import BOS, EOS, VOCABULARY, clip_tokenizer, t5_tokenizer

WIDTH = 32
"""Features of every tiny text encoder; what cross-attention reads is a multiple of it."""

STABLE_DIFFUSION_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""The noise schedule that every Stable Diffusion was trained on."""


def stable_diffusion(seed: int = 0) -> DiffusionPipeline:
    """StableDiffusionPipeline with the parts of SD 1.5: PNDM, 12 text layers (so `clip_skip` 11 is valid)."""
    with seeded(seed):
        return StableDiffusionPipeline(unet=_unet(), scheduler=_pndm(), **_first_generation())


def inpaint_unet(seed: int = 0) -> DiffusionPipeline:
    """StableDiffusionInpaintPipeline whose UNet takes 9 channels: latents, mask and masked latents."""
    with seeded(seed):
        return StableDiffusionInpaintPipeline(unet=_unet(in_channels=9), scheduler=_pndm(), **_first_generation())


def stable_diffusion_depth(seed: int = 0) -> DiffusionPipeline:
    """StableDiffusionDepth2ImgPipeline: a DPT depth estimator feeds the fifth channel of the UNet."""
    with seeded(seed):
        parts = _first_generation()
        for absent in ("safety_checker", "requires_safety_checker"):
            del parts[absent]
        depth = DPTConfig(
            image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
            intermediate_size=32, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8, is_hybrid=False,
        )  # fmt: skip
        parts["depth_estimator"] = DPTForDepthEstimation(depth).eval()
        parts["feature_extractor"] = DPTImageProcessor(size={"height": 32, "width": 32})
        return StableDiffusionDepth2ImgPipeline(unet=_unet(in_channels=5), scheduler=_pndm(), **parts)


def stable_diffusion_xl(seed: int = 0) -> DiffusionPipeline:
    """StableDiffusionXLPipeline with both text encoders and EulerDiscrete, as SDXL base has them."""
    with seeded(seed):
        unet = _unet(
            cross_attention_dim=2 * WIDTH,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            # Six sizes of 8 features each, then the pooled prompt.
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        )
        return StableDiffusionXLPipeline(
            unet=unet,
            vae=_vae(),
            text_encoder=CLIPTextModel(_clip(hidden_act="quick_gelu")).eval(),
            text_encoder_2=CLIPTextModelWithProjection(_clip(hidden_act="gelu")).eval(),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(),
            scheduler=EulerDiscreteScheduler(**STABLE_DIFFUSION_NOISE, timestep_spacing="leading", steps_offset=1),
        )


def flux(seed: int = 0) -> DiffusionPipeline:
    """FluxPipeline: flow matching, CLIP for the pooled prompt, T5 for its tokens, embedded guidance."""
    with seeded(seed):
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8), guidance_embeds=True,
        )  # fmt: skip
        return FluxPipeline(
            transformer=_livened(transformer),
            vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611),
            text_encoder=CLIPTextModel(_clip()).eval(),
            text_encoder_2=_t5(),
            tokenizer=clip_tokenizer(),
            tokenizer_2=t5_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        )


def stable_diffusion_3(seed: int = 0) -> DiffusionPipeline:
    """StableDiffusion3Pipeline: flow matching with real guidance, two CLIP encoders and T5."""
    with seeded(seed):
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2,
            attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32,
            joint_attention_dim=2 * WIDTH, pooled_projection_dim=2 * WIDTH, pos_embed_max_size=32,
        )  # fmt: skip
        return StableDiffusion3Pipeline(
            transformer=_livened(transformer),
            vae=_vae(
                latent_channels=16,
                use_quant_conv=False,
                use_post_quant_conv=False,
                shift_factor=0.0609,
                scaling_factor=1.5305,
            ),
            text_encoder=CLIPTextModelWithProjection(_clip()).eval(),
            text_encoder_2=CLIPTextModelWithProjection(_clip()).eval(),
            text_encoder_3=_t5(width=2 * WIDTH),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(),
            tokenizer_3=t5_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )


def pixart(seed: int = 0) -> DiffusionPipeline:
    """PixArtSigmaPipeline: takes no `clip_skip` and only the old `callback`, not `callback_on_step_end`.

    By default it draws near 256x256 and resizes; with `use_resolution_binning=False` it keeps the size.
    """
    with seeded(seed):
        transformer = PixArtTransformer2DModel(
            sample_size=32, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=4,
            in_channels=4, out_channels=8, cross_attention_dim=32, caption_channels=WIDTH,
        )  # fmt: skip
        return PixArtSigmaPipeline(
            transformer=_livened(transformer),
            vae=_vae(),
            text_encoder=_t5(),
            tokenizer=t5_tokenizer(),
            scheduler=DDIMScheduler(**STABLE_DIFFUSION_NOISE),
        )


def ddpm(seed: int = 0) -> DiffusionPipeline:
    """DDPMPipeline: no prompt, no guidance, no size, no callback; it draws 16x16."""
    with seeded(seed):
        unet = UNet2DModel(
            sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
        )  # fmt: skip
        return DDPMPipeline(unet=unet.eval(), scheduler=DDPMScheduler())


def stable_diffusion_15(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> DiffusionPipeline:
    """StableDiffusionPipeline in the full shapes of SD 1.5: 1.07 billion random parameters, 2.1 GB in bf16.

    Only the tokenizer is tiny, so prompts mean what they mean elsewhere in these tests: nothing.
    """
    with seeded(seed):
        # On the meta device no initialiser runs: those of torch would take minutes and 4 GB.
        with torch.device("meta"):
            unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
            vae = AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            )  # fmt: skip
            text = CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12, projection_dim=768, bos_token_id=BOS, eos_token_id=EOS,
            )  # fmt: skip
            text_encoder = CLIPTextModel(text)
        return StableDiffusionPipeline(
            unet=_filled(unet, dtype),
            vae=_filled(vae, dtype),
            text_encoder=_filled(text_encoder, dtype),
            tokenizer=clip_tokenizer(),
            scheduler=_pndm(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def gguf(path: Path) -> None:
    """Write the denoiser of a tiny Flux as a GGUF file."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "flux")
    for name, tensor in flux(seed=9).transformer.state_dict().items():
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save(pipe: DiffusionPipeline, folder: Path, *, variant: str | None = None) -> Path:
    """Writes `pipe` as a diffusers folder of safetensors, `variant` in the file names; returns `folder`."""
    pipe.save_pretrained(folder, safe_serialization=True, variant=variant)
    return folder


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch start at `seed` inside and go on outside as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _first_generation() -> dict[str, Any]:
    """What Stable Diffusion 1 and 2 have besides UNet and scheduler."""
    return {
        "vae": _vae(),
        "text_encoder": CLIPTextModel(_clip(hidden_act="quick_gelu")).eval(),
        "tokenizer": clip_tokenizer(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _unet(**changes: Any) -> UNet2DConditionModel:
    shape: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": WIDTH,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    if "transformer_layers_per_block" in changes:  # SDXL attends in its inner blocks instead.
        shape["down_block_types"] = ("DownBlock2D", "CrossAttnDownBlock2D")
        shape["up_block_types"] = ("CrossAttnUpBlock2D", "UpBlock2D")
    return UNet2DConditionModel(**shape | changes).eval()


def _vae(**changes: Any) -> AutoencoderKL:
    """Four blocks: 8 pixels to a latent, as the models this stands for."""
    shape: dict[str, Any] = {
        "sample_size": 64,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    return AutoencoderKL(**shape | changes).eval()


def _clip(**changes: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=12,
        num_attention_heads=4, projection_dim=WIDTH, max_position_embeddings=77,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS, **changes,
    )  # fmt: skip


def _t5(width: int = WIDTH) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, num_heads=4, d_ff=2 * width, num_layers=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def _pndm() -> PNDMScheduler:
    return PNDMScheduler(**STABLE_DIFFUSION_NOISE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)


def _livened(transformer: Any) -> Any:
    """`transformer` with its narrow output spread: as initialised it would hardly move the noise."""
    with torch.no_grad():
        transformer.proj_out.weight.mul_(4)
    return transformer.eval()


def _filled(module: Any, dtype: torch.dtype) -> Any:
    """`module` off the meta device: matrices random at a scale that keeps activations in range."""
    positions = {name for name, _ in module.named_buffers() if name.endswith("position_ids")}
    module = module.to(dtype).to_empty(device="cpu")
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            torch.nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
    for name in positions:  # Not a weight: the one buffer whose content is fixed.
        buffer = module.get_buffer(name)
        buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return module.eval()

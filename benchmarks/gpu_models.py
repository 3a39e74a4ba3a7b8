"""Pipelines of real shapes with random weights, made on the device, for `benchmarks/gpu.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import diffusers as d
import torch

from sfumato.checkpoints import descriptions

DTYPE = torch.bfloat16

VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
TOY = {"block_out_channels": (8, 16), "norm_num_groups": 4}


def made(device: str, build: Callable[[], Any]) -> Any:
    """A module with random weights of DTYPE, never in main memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            return build().eval()
    finally:
        torch.set_default_dtype(before)


def described(repo: str, part: str) -> dict[str, Any]:
    folder = descriptions.of(repo)
    assert folder
    config: dict[str, Any] = json.loads((folder / part / "config.json").read_text())
    return config


def stable_diffusion(shape: Shape, device: str) -> Any:
    config = described("stable-diffusion-v1-5/stable-diffusion-v1-5", "unet") | shape.changes
    unet = made(device, lambda: d.UNet2DConditionModel.from_config(config))
    vae = made(device, lambda: d.AutoencoderKL(**{**VAE, **shape.vae}))
    scheduler = d.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    return d.StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)


def stable_diffusion_xl(shape: Shape, device: str) -> Any:
    config = described("stabilityai/stable-diffusion-xl-base-1.0", "unet") | shape.changes
    unet = made(device, lambda: d.UNet2DConditionModel.from_config(config))
    vae = made(device, lambda: d.AutoencoderKL(**{**VAE, "force_upcast": False, **shape.vae}))
    scheduler = d.EulerDiscreteScheduler(beta_schedule="scaled_linear")
    return d.StableDiffusionXLPipeline(vae, None, None, None, None, unet, scheduler, add_watermarker=False)


def flux(shape: Shape, device: str) -> Any:
    transformer = made(device, lambda: d.FluxTransformer2DModel(**shape.changes))
    kind = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159}
    vae = made(device, lambda: d.AutoencoderKL(**{**VAE, **kind, **shape.vae}))
    return d.FluxPipeline(d.FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, transformer)


@dataclass(frozen=True)
class Shape:
    """A family at its real size."""

    name: str
    make: Callable[[Shape, str], Any]
    denoiser: str
    side: int
    """Pixels."""
    steps: int
    text: tuple[int, int]
    """Tokens and features of a prompt's embedding."""
    pooled: int
    """Features of its pooled embedding; 0: it has none."""
    guided: bool
    """With classifier-free guidance: two rows per picture."""
    variants: tuple[str, ...]
    changes: dict[str, Any]
    """To the denoiser's configuration."""
    vae: dict[str, Any]
    toy: dict[str, Any]
    """Fields of the same family at toy size."""

    def build(self, device: str) -> Any:
        return self.make(self, device)

    def tiny(self) -> Shape:
        return replace(self, **self.toy)

    def call(self, device: str, number: int) -> dict[str, Any]:
        """Arguments of one picture. Steps, guidance, text and seed differ between numbers."""
        chance = torch.Generator().manual_seed(number)

        def embedding(*size: int) -> torch.Tensor:
            return torch.randn(1, *size, generator=chance).to(device, DTYPE)

        texts = ["", "negative_"] if self.guided else [""]
        return {
            "output_type": "np", "width": self.side, "height": self.side,
            "num_inference_steps": self.steps + number % 3 - (number > 0),
            "guidance_scale": 5.0 + number % 4 if self.guided else 0.0, "generator": chance,
            **{f"{text}prompt_embeds": embedding(*self.text) for text in texts},
            **({f"{text}pooled_prompt_embeds": embedding(self.pooled) for text in texts} if self.pooled else {}),
        }  # fmt: skip


TOY_UNET = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 16,
            "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}  # fmt: skip
TOY_VAE = TOY | {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}

SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "sd15", stable_diffusion, "unet", side=512, steps=12, text=(77, 768), pooled=0, guided=True,
            variants=("channels_last", "compile"), changes={}, vae={},
            toy={"side": 32, "steps": 3, "text": (7, 16), "changes": TOY_UNET, "vae": TOY_VAE},
        ),
        Shape(
            "sdxl", stable_diffusion_xl, "unet", side=1024, steps=8, text=(77, 2048), pooled=1280, guided=True,
            variants=("channels_last", "compile"), changes={}, vae={},
            toy={
                "side": 32, "steps": 3, "text": (7, 16), "pooled": 8, "vae": TOY_VAE,
                "changes": TOY_UNET | {
                    "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32,
                    "transformer_layers_per_block": 1,
                },
            },
        ),
        Shape(
            "flux", flux, "transformer", side=1024, steps=4, text=(512, 4096), pooled=768, guided=False,
            variants=("compile", "cache", "fp8"), changes={}, vae={},
            toy={
                "side": 32, "steps": 3, "text": (7, 16), "pooled": 8,
                "changes": {
                    "num_layers": 1, "num_single_layers": 1, "in_channels": 64, "attention_head_dim": 16,
                    "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 8,
                    "axes_dims_rope": (4, 4, 8),
                },
                "vae": TOY_VAE,
            },
        ),
    )
}  # fmt: skip

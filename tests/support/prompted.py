"""IP-Adapters for tiny models, as files with their image encoder, in the forms that people have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from support.tiny import seeded

VISION = CLIPVisionConfig(
    hidden_size=64, projection_dim=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
    intermediate_size=64,
)  # fmt: skip
TOKENS, DEPTH = 5, 4
"""Of a plus adapter; diffusers reads no other depth."""


def save_encoder(folder: Path, **changes: Any) -> None:
    with seeded(11):
        config = CLIPVisionConfig(**{**VISION.to_dict(), **changes})
        CLIPVisionModelWithProjection(config).eval().save_pretrained(folder)


def _number(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5


def attention(unet: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The part for the attention of a UNet."""
    tensors, number = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor") and "motion_modules" not in name:
            shape = unet.get_submodule(name.removesuffix(".processor")).inner_dim, unet.config.cross_attention_dim
            for kind in ("k", "v"):
                tensors[f"ip_adapter.{number}.to_{kind}_ip.weight"] = _number(shape, generator)
            number += 2
    return tensors


def plain(width: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The projection of a base adapter, for text of this width."""
    return {
        "image_proj.proj.weight": _number((4 * width, VISION.projection_dim), generator),
        "image_proj.proj.bias": torch.zeros(4 * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }


def plus(width: int, generator: torch.Generator, inner: int = 64) -> dict[str, torch.Tensor]:
    """The projection of a plus adapter, which reads all that the encoder sees."""
    seen = VISION.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (1, TOKENS, inner), "proj_in.weight": (inner, seen), "proj_out.weight": (width, inner),
    }  # fmt: skip
    for layer in (f"layers.{at}" for at in range(DEPTH)):
        shapes |= {
            f"{layer}.0.to_q.weight": (64, inner), f"{layer}.0.to_kv.weight": (128, inner),
            f"{layer}.0.to_out.weight": (inner, 64), f"{layer}.1.1.weight": (4 * inner, inner),
            f"{layer}.1.3.weight": (inner, 4 * inner),
        }  # fmt: skip
    tensors = {name: _number(shape, generator) for name, shape in shapes.items()}
    biases = ["proj_in", "proj_out"]
    for norm, size in {"norm_out": width, **{f"layers.{at}.{norm}": inner for at in range(DEPTH)
                       for norm in ("0.norm1", "0.norm2", "1.0")}}.items():  # fmt: skip
        tensors[f"{norm}.weight"], tensors[f"{norm}.bias"] = torch.ones(size), torch.zeros(size)
    tensors |= {f"{name}.bias": torch.zeros(tensors[f"{name}.weight"].shape[0]) for name in biases}
    return {f"image_proj.{name}": tensor for name, tensor in tensors.items()}


def full(width: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The projection of a full-face adapter, which makes a token of each patch."""
    seen = VISION.hidden_size
    tensors = {
        "proj.0.weight": _number((seen, seen), generator), "proj.0.bias": torch.zeros(seen),
        "proj.2.weight": _number((width, seen), generator), "proj.2.bias": torch.zeros(width),
        "proj.3.weight": torch.ones(width), "proj.3.bias": torch.zeros(width),
    }  # fmt: skip
    return {f"image_proj.{name}": tensor for name, tensor in tensors.items()}


def flux(transformer: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """An adapter for FLUX, in the usual names."""
    tensors = plain(transformer.config.joint_attention_dim, generator)
    count = transformer.config.num_layers
    for number, part in ((number, part) for number in range(count) for part in "kv"):
        shape = transformer.inner_dim, transformer.config.joint_attention_dim
        tensors[f"ip_adapter.{number}.to_{part}_ip.weight"] = _number(shape, generator)
        tensors[f"ip_adapter.{number}.to_{part}_ip.bias"] = _number(shape[:1], generator)
    return tensors


def xlabs(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same in XLabs' names."""

    def name(key: str) -> str:
        for part in "kv":
            key = key.replace(f"to_{part}_ip", f"processor.ip_adapter_double_stream_{part}_proj")
        return key.replace("image_proj.", "ip_adapter_proj_model.").replace("ip_adapter.", "double_blocks.", 1)

    return {
        name(key) if key.startswith("ip_adapter.") else key.replace("image_proj.", "ip_adapter_proj_model."): tensor
        for key, tensor in tensors.items()
    }


SEEN = 40
"""Width of what the tiny SigLIP sees."""


def save_siglip(folder: Path) -> None:
    config = SiglipVisionConfig(
        hidden_size=SEEN, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    with seeded(12):
        SiglipVisionModel(config).eval().save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.4] * 3).save_pretrained(folder)


def sd3(transformer: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """An adapter for Stable Diffusion 3, in the names of InstantX's file."""
    head = transformer.config.attention_head_dim
    width, inner, time, tokens = head * transformer.config.num_attention_heads, 64, 64, 5
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (1, tokens, inner), "proj_in.weight": (inner, SEEN), "proj_in.bias": (inner,),
        "proj_out.weight": (width, inner), "proj_out.bias": (width,), "norm_out.weight": (width,),
        "norm_out.bias": (width,), "time_embedding.linear_1.weight": (inner, 32),
        "time_embedding.linear_1.bias": (inner,), "time_embedding.linear_2.weight": (inner, inner),
        "time_embedding.linear_2.bias": (inner,),
    }  # fmt: skip
    for layer in (f"layers.{at}" for at in range(DEPTH)):
        shapes |= {
            f"{layer}.0.norm1.weight": (inner,), f"{layer}.0.norm1.bias": (inner,), f"{layer}.0.norm2.weight": (inner,),
            f"{layer}.0.norm2.bias": (inner,), f"{layer}.0.to_q.weight": (64, inner),
            f"{layer}.0.to_kv.weight": (128, inner), f"{layer}.0.to_out.weight": (inner, 64),
            f"{layer}.1.0.weight": (inner,), f"{layer}.1.0.bias": (inner,), f"{layer}.1.1.weight": (4 * inner, inner),
            f"{layer}.1.3.weight": (inner, 4 * inner), f"{layer}.2.1.weight": (4 * inner, inner),
            f"{layer}.2.1.bias": (4 * inner,),
        }  # fmt: skip
    tensors = {f"image_proj.{name}": _number(shape, generator) for name, shape in shapes.items()}
    parts: dict[str, tuple[int, ...]] = {
        "norm_ip.linear.weight": (2 * width, time), "norm_ip.linear.bias": (2 * width,),
        "to_k_ip.weight": (width, width), "to_v_ip.weight": (width, width), "norm_q.weight": (head,),
        "norm_k.weight": (head,), "norm_ip_k.weight": (head,),
    }  # fmt: skip
    for number in range(len(transformer.attn_processors)):
        tensors |= {f"ip_adapter.{number}.{name}": _number(shape, generator) for name, shape in parts.items()}
    return tensors


FORMS = {"base": plain, "plus": plus, "full": full}


def save_adapter(file: Path, unet: Any, form: str = "base", seed: int = 21) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = attention(unet, generator) | FORMS[form](unet.config.cross_attention_dim, generator)
    save_file(tensors, file)

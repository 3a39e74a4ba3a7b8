"""IP-Adapters for tiny models, as files with their image encoder, in the forms that people have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

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
        if name.endswith("attn2.processor"):
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


FORMS = {"base": plain, "plus": plus, "full": full}


def save_adapter(file: Path, unet: Any, form: str = "base", seed: int = 21) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = attention(unet, generator) | FORMS[form](unet.config.cross_attention_dim, generator)
    save_file(tensors, file)

"""LoRAs for tiny models, in the forms that people have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from sfumato.checkpoints import lora_files, weight_file
from sfumato.loras import Lora
from support import tiny

LINEAR = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1")


def kohya(
    pipeline: Any, encoders: dict[str, str] | None = None, *, seed: int = 5, dora: bool = False, conv: bool = False
) -> dict[str, torch.Tensor]:
    """As kohya's scripts name one; `encoders`: component → prefix. `conv`: LyCORIS's LoCon, in convolutions too."""
    tensors: dict[str, torch.Tensor] = {}
    with tiny.seeded(seed):
        for part, prefix in {"unet": "lora_unet", **(encoders or {})}.items():
            for name, module in getattr(pipeline, part).named_modules():
                linear = isinstance(module, torch.nn.Linear) and name.endswith(LINEAR if part == "unet" else TEXT)
                convolution = conv and name.endswith("conv1") and isinstance(module, torch.nn.Conv2d)
                if not linear and not convolution:
                    continue
                path = name if part == "unet" else f"text_model.{name.removeprefix('text_model.')}"
                key, weight = f"{prefix}_{path.replace('.', '_')}", module.weight
                tensors[f"{key}.lora_down.weight"] = torch.randn(2, *weight.shape[1:]) * 0.3
                tensors[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], 2, *[1] * (weight.dim() - 2)) * 0.3
                tensors[f"{key}.alpha"] = torch.tensor(2.0)
                if dora:
                    tensors[f"{key}.dora_scale"] = weight.detach().norm(dim=1, keepdim=True) * 1.5
    return tensors


def diffusers(
    pipeline: Any, folder: Path, name: str, *, part: str = "transformer", seed: int = 5, dora: bool = False
) -> Path:
    """As diffusers' scripts save one; `pipeline` is spoilt by it."""
    with tiny.seeded(seed):
        denoiser = getattr(pipeline, part)
        targets = ["to_q", "to_k", "to_v"]
        denoiser.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False, use_dora=dora))
        layers: Any = {f"{part}_lora_layers": get_peft_model_state_dict(denoiser)}
        pipeline.save_lora_weights(folder, weight_name=name, **layers)
    return folder / name


def lokr(pipeline: Any) -> dict[str, torch.Tensor]:
    """As LyCORIS names a LoKr of a transformer."""
    tensors: dict[str, torch.Tensor] = {}
    with tiny.seeded(4):
        for name, layer in pipeline.transformer.named_modules():
            if name.endswith(("to_q", "to_k", "to_v")):
                rows, columns = layer.weight.shape
                tensors[f"transformer.{name}.lokr_w1"] = torch.randn(2, 2) * 0.5
                tensors[f"transformer.{name}.lokr_w2"] = torch.randn(rows // 2, columns // 2) * 0.5
    return tensors


def saved(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def of(path: Path, weight: float = 1.0, text_weight: float | None = None) -> Lora:
    """One whose file is there."""
    return Lora(path.stem, weight, text_weight, str(path), *lora_files.digests(path), stamp=weight_file.stamp(path))

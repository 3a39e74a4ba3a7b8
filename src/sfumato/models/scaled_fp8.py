"""Weights in fp8 with a scale beside each (ComfyUI's `scaled_fp8` and `comfy_quant`), as numbers of a model's dtype.

diffusers' quantisers do not read them. A weight is its fp8 number times its scale, of the whole tensor or of each row.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from sfumato.checkpoints import contents
from sfumato.errors import LoadError

FORMATS = ("float8_e4m3fn", "float8_e5m2")
"""What `comfy_quant` may say of a layer."""


def tensors(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of such a file, one after the other, without its scales. Raises LoadError for another format."""
    read: dict[str, torch.Tensor] = {}
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for name in sorted(names):
            if name.endswith(".comfy_quant"):
                _check(path, name, file.get_tensor(name))
            if contents.is_about_scales(name):
                continue
            tensor = file.get_tensor(name)
            scale = next((each for each in contents.scales_of(name) if each in names), None)
            if scale is not None:
                factor = file.get_tensor(scale).float().reshape(-1, *[1] * (tensor.dim() - 1))
                tensor = tensor.float() * factor
            fp8 = tensor.is_floating_point() and tensor.element_size() == 1
            read[name] = tensor.to(dtype) if scale is not None or fp8 else tensor
    return read


def _check(path: Path, name: str, words: torch.Tensor) -> None:
    try:
        said = json.loads(bytes(words.flatten().tolist()))
    except ValueError:
        said = None
    if not isinstance(said, dict) or said.get("format") not in FORMATS:
        found = said.get("format") if isinstance(said, dict) else "nothing that can be read"
        raise LoadError(
            f"{path.name}: {name} says {found}; {' and '.join(FORMATS)} are read. Take the bf16, fp16 or fp8 file of "
            "the same model, or a .gguf",
            param="parameters.model",
        )

"""The low-memory keys of a model file: what can work is checked, put into effect at load, and reported.

Nothing that changes pixels is chosen without being asked for: `offload: auto` only moves weights. What happens when
memory runs out all the same is in `drawing.out_of_memory`.
"""

from __future__ import annotations

import ast
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

from sfumato.checkpoints import diffusers_source, modular, pipeline_class, split
from sfumato.config import ModelConfig
from sfumato.core import GROUP_OFFLOAD, OFFLOAD, VAE_SLICING, VAE_TILING
from sfumato.errors import ModelFileError
from sfumato.models import precision, quantizers
from sfumato.pipelines import tiling

log = logging.getLogger(__name__)

Offload: TypeAlias = Literal["none", "model", "group"]

SEQUENCE = "model_cpu_offload_seq"
"""The attribute of a pipeline class that says in which order it uses its modules; without one none can wait."""

ACTIVATIONS = 2 * 1024**3
"""Bytes that a forward pass of a large model needs beside its weights. A guess: if it is too low, fallbacks apply."""

OFFLOAD_NAMES: Mapping[str, str] = {"model": OFFLOAD, "group": GROUP_OFFLOAD}

STORED = {"fp8": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
"""Values of `layerwise_casting` → torch's names."""

_VAE_KEYS = {"vae_slicing": tiling.SLICING, "vae_tiling": tiling.TILING}


def check(config: ModelConfig, name: str, index: Mapping[str, Any], device: str | None) -> None:
    """Raises ModelFileError for a key that cannot work with the pipeline class `name` or on this device.

    `index`: the `model_index.json`, empty if not known yet. `device`: None if not known yet.
    """
    quantizers.check(config, device)
    known = name not in (pipeline_class.ANY, *pipeline_class.AUTO)
    if config.offload == "model" and known and not modular.is_one(name) and not _has_sequence(name):
        raise ModelFileError(
            f"{config.name}: offload: model: {name} does not say in which order it uses its modules. Write "
            "`offload: group`, or leave it out",
            param="offload",
        )
    denoisers = [part for part, value in index.items() if precision.is_denoiser(part) and isinstance(value, list)]
    if config.quantization and index and not quantizers.parts(index):
        raise quantizers.nothing(config)
    if config.layerwise_casting and index and not denoisers:
        raise _no_casting(config)
    if config.layerwise_casting and split.is_gguf(config):
        raise ModelFileError(
            f"{config.name}: layerwise_casting: the weights of a .gguf file are quantised already; leave it out",
            param="layerwise_casting",
        )
    vae = index.get(tiling.NAME)
    for key, attribute in _VAE_KEYS.items():
        if getattr(config, key) and index and not (isinstance(vae, list) and _assigns(str(vae[1]), attribute)):
            raise _no_vae_for(config, key)


def engage(config: ModelConfig, pipeline: Any, dtype: Any) -> None:
    """Put into effect what changes a loaded pipeline's modules; it is still in main memory. Raises ModelFileError."""
    vae = getattr(pipeline, tiling.NAME, None)
    for key, attribute in _VAE_KEYS.items():
        if getattr(config, key):
            if not hasattr(vae, attribute):
                raise _no_vae_for(config, key)
            getattr(vae, attribute.replace("use", "enable"))()
    if config.layerwise_casting:
        import torch

        denoisers = [module for name, module in _modules(pipeline) if precision.is_denoiser(name)]
        castable = [
            module
            for module in denoisers
            if hasattr(module, "enable_layerwise_casting") and getattr(module, "hf_quantizer", None) is None
        ]
        if not castable:
            raise _no_casting(config)
        for module in castable:
            stored = getattr(torch, STORED[config.layerwise_casting])
            module.enable_layerwise_casting(storage_dtype=stored, compute_dtype=dtype)


def choose_offload(config: ModelConfig, sizes: Mapping[str, int], free: int | None, *, ordered: bool) -> Offload:
    """How much of the weights waits in main memory.

    `sizes`: component → bytes of its weights. `free`: bytes on the device; None: not known, all is taken to fit.
    `ordered`: whether the pipeline's modules can be offloaded one by one.
    """
    match config.offload:
        case "none" | "model" | "group" as written:
            return written
    room = free - ACTIVATIONS if free is not None else sum(sizes.values())
    if sum(sizes.values()) <= room and not config.low_vram:
        return "none"
    return "model" if ordered and max(sizes.values(), default=0) <= room else "group"


def savings(config: ModelConfig, offload: Offload) -> tuple[str, ...]:
    """What is in effect for every picture of a loaded model, by the names in recipes."""
    keys = {
        VAE_TILING: bool(config.vae_tiling),
        VAE_SLICING: config.vae_slicing,
        OFFLOAD_NAMES.get(offload, ""): offload != "none",
        f"layerwise_casting:{config.layerwise_casting}": config.layerwise_casting is not None,
        f"quantization:{config.quantization}": config.quantization is not None,
        f"cache:{config.cache}": config.cache is not None,
    }
    return tuple(sorted(name for name, engaged in keys.items() if engaged))


def stored(config: ModelConfig, sizes: Mapping[str, int], index: Mapping[str, Any], width: int) -> dict[str, int]:
    """Component → bytes of its weights once they are loaded; `sizes` has them at `width` bytes a number."""
    quantised = quantizers.BYTES.get(config.quantization or "", width)
    cast = 1 if config.layerwise_casting else width

    def bytes_of(name: str) -> float:
        if precision.is_denoiser(name):
            return min(quantised, cast)
        return quantised if name in quantizers.parts(index) else width

    return {name: math.ceil(size * min(1, bytes_of(name) / width)) for name, size in sizes.items()}


def without_effect(config: ModelConfig, device: str) -> str:
    """What the file asks for that this device has no use for, and why; empty if nothing."""
    asked = "low_vram" if config.low_vram else ""
    if config.offload in ("model", "group"):
        asked = f"offload: {config.offload}"
    if not asked or not device.startswith("cpu"):
        return ""
    return f"{asked} has no effect on a CPU: all weights are in main memory anyway"


def sizes(pipeline: Any) -> dict[str, int]:
    """Component → bytes of its weights."""
    from sfumato.models import footprint

    return {name: sum(tensor.nbytes for tensor in footprint.tensors_of(module)) for name, module in _modules(pipeline)}


def room(pipeline: Any, device: str) -> int | None:
    """Bytes on an accelerator for this pipeline: free ones, and those it has already. None: the driver does not say."""
    import torch

    from sfumato.models import footprint

    try:
        free, _ = torch.accelerator.get_memory_info(device)
    except (RuntimeError, AssertionError, NotImplementedError, AttributeError) as error:
        log.info("%s does not say how much memory is free: %s", device, error)
        return None
    tensors = [tensor for _, module in _modules(pipeline) for tensor in footprint.tensors_of(module)]
    return int(free) + sum(tensor.nbytes for tensor in tensors if tensor.device.type != "cpu")


def _modules(pipeline: Any) -> Iterator[tuple[str, Any]]:
    return ((name, part) for name, part in pipeline.components.items() if hasattr(part, "parameters"))


def is_ordered(pipeline: Any) -> bool:
    """Whether a pipeline's modules can be offloaded one by one."""
    return bool(getattr(pipeline, SEQUENCE, None))


def _has_sequence(name: str) -> bool:
    return bool(diffusers_source.inherited(name, SEQUENCE))


def _assigns(cls: str, attribute: str) -> bool:
    """Whether a class's constructor sets an attribute."""
    return any(
        isinstance(node, ast.Attribute) and node.attr == attribute and isinstance(node.ctx, ast.Store)
        for function in diffusers_source.methods(cls, "__init__")
        for node in ast.walk(function)
    )


def _no_casting(config: ModelConfig) -> ModelFileError:
    return ModelFileError(
        f"{config.name}: layerwise_casting: this model has no denoiser whose weights diffusers can cast; leave it out",
        param="layerwise_casting",
    )


def _no_vae_for(config: ModelConfig, key: str) -> ModelFileError:
    return ModelFileError(f"{config.name}: {key}: this model has no VAE that can do it; leave it out", param=key)

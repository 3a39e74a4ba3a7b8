"""The device and the dtype that a model is loaded with: from its file, the server's setting and this machine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from sfumato.config import ModelConfig
from sfumato.errors import DeviceUnavailable, first_line
from sfumato.models import precision
from sfumato.settings import members

log = logging.getLogger(__name__)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def choose_device(config: ModelConfig, setting: str) -> str:
    """`setting` wins unless "auto"; then the file's `cuda`: true, false, or absent for the best available device.

    Of a worker's several devices it is the first. Raises DeviceUnavailable, also if they are not as many as the file's
    `context_parallel` says.
    """
    setting, *further = members(setting)
    if config.context_parallel and config.context_parallel != 1 + len(further):
        raise DeviceUnavailable(
            f"{config.name}: diffusers.context_parallel: {config.context_parallel}: a worker of so many devices is "
            f"needed, and this one has {'+'.join((setting, *further))}. Start the server with, for example, --devices "
            f"{'+'.join(f'cuda:{number}' for number in range(config.context_parallel))}, or leave the key out."
        )
    if setting != "auto":
        if config.cuda and not setting.startswith("cuda"):
            log.warning("%s: the file says cuda: true; the server's device setting is %s", config.name, setting)
        _usable(config, setting)
        return setting
    if config.cuda is False:
        return "cpu"
    gpu = "cuda" if config.main_gpu is None else f"cuda:{config.main_gpu}"
    if config.cuda:
        _usable(config, gpu)
        return gpu
    best = torch.accelerator.current_accelerator(check_available=True)
    if best is None:
        return "cpu"
    return gpu if best.type == "cuda" else str(best.type)


def _usable(config: ModelConfig, device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DeviceUnavailable(
            f"{config.name}: the device {device!r} is not usable on this machine ({first_line(error)}). "
            "Set `cuda: false` in the model file, leave it out (to take the best available device), "
            "or start the server with --device cpu."
        ) from error


def choose_dtype(config: ModelConfig, device: str, index: Mapping[str, Any] | None = None) -> str:
    """The file's `dtype`; else with `f16: true` on CUDA the half precision that the family is made for.

    Otherwise bf16 on CUDA and CPUs that support it, else fp32. `index`: the repository's `model_index.json`, if known.
    """
    dtype, told = _dtype(config, device, index or {})
    if told:
        log.warning("%s: f16: true: %s", config.name, told)
    return dtype


def expected_dtype(config: ModelConfig, device: str) -> str:
    """`choose_dtype` before the repository is known, to choose among its files. Logs nothing."""
    return _dtype(config, device, {})[0]


def _dtype(config: ModelConfig, device: str, index: Mapping[str, Any]) -> tuple[str, str]:
    """The dtype, and where it differs from what `f16: true` asks for, why."""
    if config.dtype:
        return config.dtype, ""
    fast = "bf16" if device.startswith("cuda") or (device == "cpu" and _cpu_has_bf16()) else "fp32"
    if any(precision.draws_without_bf16(str(name)) for name in (config.pipeline_type, index.get("_class_name"))):
        fast = "fp32"
    if not config.f16:
        return fast, ""
    if not device.startswith("cuda"):
        return fast, f"float16 is slow on {device}; {fast} is used"
    if precision.made_for(config.pipeline_type, index) == "bf16":
        return "bf16", (
            "this family is made for bfloat16, and its numbers leave the range of float16: bf16 is used, at the same "
            "size. `dtype: fp16` in the model file insists"
        )
    return "fp16", ""


def _cpu_has_bf16() -> bool:
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16") or features.get("bf16"))

"""Quantise weights while they are loaded, with diffusers' quantisers: for the key `quantization`.

The denoiser is quantised, and text encoders that are language models: the rest is small, and loses more than it saves.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from sfumato.config import ModelConfig
from sfumato.errors import ModelFileError
from sfumato.models import precision


@dataclass(frozen=True, slots=True)
class Quantizer:
    """One way to quantise: the package that does it, and on which devices it works."""

    package: str
    setting: str
    """The package's own name for it."""
    devices: frozenset[str] | None = None
    """None: all."""


QUANTIZERS: Mapping[str, Quantizer] = MappingProxyType(
    {
        "int8": Quantizer("torchao", "Int8WeightOnlyConfig"),
        "fp8": Quantizer("torchao", "Float8WeightOnlyConfig"),
        "nf4": Quantizer("bitsandbytes", "nf4", frozenset({"cuda", "xpu"})),
        "fp4": Quantizer("bitsandbytes", "fp4", frozenset({"cuda", "xpu"})),
    }
)
"""Weights alone are quantised; the arithmetic stays in the model's dtype."""

BYTES: Mapping[str, float] = {"int8": 1, "fp8": 1, "nf4": 0.5, "fp4": 0.5}
"""Of a weight, without its scales."""


def check(config: ModelConfig, device: str | None) -> None:
    """Raises ModelFileError if the file's `quantization` cannot work here. `device`: None if not known yet."""
    name = config.quantization
    if name is None:
        return
    quantizer = QUANTIZERS[name]
    everywhere = ", ".join(key for key, each in QUANTIZERS.items() if each.devices is None)
    kind = (device or "").partition(":")[0]
    if kind and quantizer.devices is not None and kind not in quantizer.devices:
        raise ModelFileError(
            f"{config.name}: quantization: {name} works on {' and '.join(sorted(quantizer.devices))} only, and this "
            f"model is on {kind}. Write one that works everywhere ({everywhere}), or leave it out",
            param="quantization",
        )
    if importlib.util.find_spec(quantizer.package) is None:
        raise ModelFileError(
            f"{config.name}: quantization: {name} needs the package {quantizer.package}. Run "
            f"`pip install 'sfumato[{quantizer.package}]'`, and start Sfumato again",
            param="quantization",
        )
    if config.layerwise_casting:
        raise ModelFileError(
            f"{config.name}: quantization: {name} and layerwise_casting: {config.layerwise_casting} both store the "
            "denoiser's weights in fewer bytes; write one of them",
            param="quantization",
        )


def parts(index: Mapping[str, Any]) -> dict[str, str]:
    """Component to quantise → the library it is of, from a `model_index.json` or a modular one."""
    # In a modular index a third entry says where it is; a class may be unknown.
    components = {name: value[:2] for name, value in index.items() if isinstance(value, list) and any(value[1:])}
    return {
        name: str(library or "diffusers")
        for name, (library, cls) in components.items()
        if (precision.is_denoiser(name) and library in ("diffusers", None))
        or precision.is_language_model(name, str(cls))
    }


def settings(config: ModelConfig, index: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Component → what the library that loads it takes to quantise it. Raises ModelFileError if there is none."""
    if config.quantization is None:
        return {}
    if not (chosen := parts(index)):
        raise nothing(config)
    return {name: _setting(config.quantization, library, dtype) for name, library in chosen.items()}


def for_pipeline(
    config: ModelConfig, index: Mapping[str, Any], dtype: Any, without: Collection[str] = ()
) -> dict[str, Any]:
    """Argument of a pipeline's `from_pretrained`, for all components but those `without`; empty if there are none."""
    mapping = {name: each for name, each in settings(config, index, dtype).items() if name not in without}
    if not mapping:
        return {}
    from diffusers import PipelineQuantizationConfig

    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)}


def denoiser(config: ModelConfig, file: Path, described: Path, index: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """The denoiser of a single file, quantised, under its component's name; empty if nothing is to be quantised.

    `described`: the folder with its configuration.
    """
    if config.quantization is None:
        return {}
    import diffusers

    part = next((name for name, library in parts(index).items() if library == "diffusers"), None)
    if part is None:
        raise nothing(config)
    plain = getattr(diffusers, index[part][1]).from_single_file(
        str(file), config=str(described), subfolder=part, dtype=dtype
    )
    return {part: quantised(plain, _setting(config.quantization, "diffusers", dtype), dtype)}


def quantised(module: Any, setting: Any, dtype: Any) -> Any:
    """A module of diffusers, read anew with quantised weights.

    `from_single_file` takes a setting too, but leaves the weights as they are with some quantisers, and says nothing.
    """
    with TemporaryDirectory(prefix="sfumato-") as folder:
        module.save_pretrained(folder)
        return type(module).from_pretrained(folder, quantization_config=setting, dtype=dtype, local_files_only=True)


def nothing(config: ModelConfig) -> ModelFileError:
    return ModelFileError(
        f"{config.name}: quantization: {config.quantization}: this model has no denoiser that diffusers can quantise; "
        "leave it out",
        param="quantization",
    )


def _setting(name: str, library: str, dtype: Any) -> Any:
    """What the library that loads a component takes to quantise it."""
    import diffusers
    import transformers

    quantizer, classes = QUANTIZERS[name], diffusers if library == "diffusers" else transformers
    if quantizer.package == "torchao":
        # Not an import statement: the package is an extra.
        quantization = importlib.import_module("torchao.quantization")
        return classes.TorchAoConfig(getattr(quantization, quantizer.setting)())
    return classes.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quantizer.setting, bnb_4bit_compute_dtype=dtype
    )

"""Load the components of a model in several files (`split`), each from its file and by its base's description."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import diffusers
import torch
import transformers

from sfumato.checkpoints import contents, split, weight_file
from sfumato.errors import LoadError
from sfumato.models import quantizers, scaled_fp8


def components(
    files: Mapping[str, Path],
    described: Path,
    index: Mapping[str, Any],
    dtype: torch.dtype,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Component -> module, in `dtype`; GGUF and quantised ones compute in it.

    `files`: component -> its file; `described`: the base's descriptions; `settings`: component -> how to quantise it,
    if its file is not quantised. Raises LoadError if a file does not fit.
    """
    modules = {}
    for part, path in files.items():
        library, name = index[part]
        with weight_file.in_lower_case(path) as file:
            if library == "transformers":
                modules[part] = _text_encoder(
                    getattr(transformers, name), file, described / part, dtype, settings.get(part)
                )
            else:
                modules[part] = _of_diffusers(
                    getattr(diffusers, name), file, described, part, dtype, settings.get(part)
                )
    return modules


def _of_diffusers(cls: Any, file: Path, described: Path, part: str, dtype: torch.dtype, setting: Any) -> Any:
    if not hasattr(cls, "from_single_file"):
        raise LoadError(
            f"{file.name}: diffusers cannot read a {cls.__name__} from a single file; name the whole model in "
            "parameters.model",
            param="parameters.model",
        )
    quantised: dict[str, Any] = {}
    made_of = split.contents_of(file)
    source: Any = str(file)
    if file.suffix == split.GGUF:
        quantised["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
    elif made_of and made_of.quantised in contents.READABLE:
        quantised["quantization_config"] = diffusers.BFLQuantizationConfig(compute_dtype=dtype)
    elif made_of and made_of.quantised == contents.SCALED_FP8:
        source = scaled_fp8.tensors(file, dtype)
    module = cls.from_single_file(source, config=str(described), subfolder=part, dtype=dtype, **quantised)
    return quantizers.quantised(module, setting, dtype) if setting and not quantised else module


def _text_encoder(cls: Any, file: Path, described: Path, dtype: torch.dtype, setting: Any) -> Any:
    """transformers reads a folder: here one with the description, and the file under the name it expects."""
    made_of = split.contents_of(file)
    scaled = made_of is not None and made_of.quantised == contents.SCALED_FP8
    more = {"quantization_config": setting} if setting else {}
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").symlink_to((described / "config.json").absolute())
        if scaled:
            more |= {"config": cls.config_class.from_pretrained(folder), "state_dict": scaled_fp8.tensors(file, dtype)}
        else:
            (Path(folder) / "model.safetensors").symlink_to(file.resolve())
        module, report = cls.from_pretrained(
            None if scaled else folder, dtype=dtype, output_loading_info=True, local_files_only=True, **more
        )
    if missing := sorted(report["missing_keys"]):
        raise LoadError(
            f"{file.name} lacks {len(missing)} of the weights of a {cls.__name__} ({', '.join(missing[:3])} ...); take "
            "the file that belongs to this model",
            param="diffusers.text_encoders",
        )
    return module.eval()

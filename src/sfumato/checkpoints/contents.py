"""What a weight file has in it, told by the names, shapes and dtypes in its header.

A whole model is a checkpoint. ComfyUI's folders, and GGUF files, have a denoiser alone; many files on sharing sites are
parts of models (LoRAs, VAEs, text encoders) that no pipeline can be made of.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sfumato.checkpoints import single_file
from sfumato.checkpoints.weight_header import Header, Tensor
from sfumato.errors import LoadError

CHECKPOINT, DENOISER = "checkpoint", "denoiser"
LORA, CONTROL_NET, VAE, TEXT_ENCODER, EMBEDDING = "LoRA", "ControlNet", "VAE", "text encoder", "textual inversion"

_LORA = re.compile(
    r"\.(lora_(down|up|A|B)(\.\w+)?\.weight|hada_w[12]_[ab]|lokr_w[12](_[ab])?)$|^lora_(unet|te\d?|transformer)_"
)
_CONTROL = re.compile(
    r"^(control_model|controlnet_cond_embedding|input_hint_block|controlnet_blocks)\.|^control_(all_x_embedder|layers)\."
)
_TEXT_PART = re.compile(r"^(cond_stage_model|conditioner|text_encoders?|text_encoder_\d)\.")
_VAE_PART = re.compile(r"^(first_stage_model|vae)\.")
_VAE = re.compile(
    r"^(first_stage_model\.|vae\.)?decoder\.(conv_in|conv1|conv_in\.conv|middle\.0\.residual\.2)\.weight$"
)
_DENOISER = re.compile(
    r"^(model\.diffusion_model|diffusion_model|net)\.|^(input_blocks|middle_block|output_blocks|time_embed|time_embedding)\."
    r"|^(double|single|joint|transformer|single_transformer)_(blocks|layers)\.|^(x_embedder|patch_embed|proj_in|img_in|txt_in)\."
)
EMBEDDED_WORDS = re.compile(r"(token_embedding|shared|embed_tokens|word_embeddings)\.weight$")
"""A text encoder's table of tokens: its shape is (words, width)."""

REMEDIES: Mapping[str, str] = MappingProxyType(
    {
        LORA: "Name the model that it changes in parameters.model, and this file in `lora_adapter`",
        CONTROL_NET: "Put it into the folder `controlnets` beside the model files, for requests to name; or name the "
                     "model that it controls in parameters.model, and this file in `diffusers.control_net`",
        VAE: "Name a model in parameters.model, and this file in `vae`",
        TEXT_ENCODER: "Name a model in parameters.model, and this file in `diffusers.text_encoders`",
        EMBEDDING: "Name a model in parameters.model, and put this file into the folder `embeddings` beside the model "
                   "file",
    }
)  # fmt: skip
"""What to do with a file that is no model."""

FP8R, NVFP4 = "fp8r", "nvfp4"
READABLE = (FP8R, NVFP4)
"""Layouts of quantised weights that diffusers' quantisers read from a single file."""
SCALED_FP8 = "fp8 with scales of tensors or rows"
"""Layout with a scale for each tensor or row, which is read into the model's dtype (`models.scaled_fp8`)."""

_ABOUT_SCALES = re.compile(r"(^|\.)(scaled_fp8|comfy_quant|scale_weight|scale_input|weight_scale|input_scale)$")


@dataclass(frozen=True, slots=True)
class Contents:
    kind: str
    """CHECKPOINT, DENOISER, or another of the above."""
    repository: str | None
    """The hub id of the repository that describes it, by diffusers' rules; None if they do not know it."""
    quantised: str | None = None
    """The layout of quantised weights: one of READABLE, SCALED_FP8, or words for one that nothing here reads."""
    has_vae: bool = False
    has_text: bool = False

    @property
    def needs_base(self) -> bool:
        """Whether text encoders have to come from elsewhere."""
        return self.kind == DENOISER or (self.kind == CHECKPOINT and self.has_vae and not self.has_text)


def of(header: Header) -> Contents:
    """What a file with this header contains."""
    names = header.tensors
    kind = _kind(header)
    repository = single_file.repository_of(header) if kind in (CHECKPOINT, DENOISER) else None
    if repository == single_file.OTHERWISE and not any("input_blocks.0.0.weight" in name for name in names):
        repository = None if kind == DENOISER else repository  # it has none of the marks that diffusers knows
    has_text, has_vae = (any(map(mark.match, names)) for mark in (_TEXT_PART, _VAE_PART))
    return Contents(kind, repository, _quantised(names), has_vae, has_text)


def refuse(contents: Contents, label: str) -> None:
    """Raises LoadError if no model can be made of such a file."""
    if remedy := REMEDIES.get(contents.kind):
        raise LoadError(f"{label} is a {contents.kind}, not a model. {remedy}", param="parameters.model")
    # Whole models are read by diffusers from the file itself.
    scaled = (SCALED_FP8,) if contents.needs_base else ()
    refuse_layout(contents, label, "parameters.model", (*READABLE, *scaled))


def refuse_layout(contents: Contents, label: str, key: str, readable: tuple[str, ...]) -> None:
    """Raises LoadError if the file's weights are quantised in a layout that nothing here reads."""
    if contents.quantised and contents.quantised not in readable:
        raise LoadError(
            f"{label} has quantised weights in the layout {contents.quantised}, which diffusers' quantisers do not "
            "read. Take its bf16, fp16 or plain fp8 file, or a .gguf of the same model",
            param=key,
        )


def words_and_width(header: Header) -> tuple[int, int] | None:
    """Size of a text encoder's vocabulary and width of its token embeddings; None if it has no such table."""
    for name, tensor in header.tensors.items():
        if EMBEDDED_WORDS.search(name) and len(tensor.shape) == 2:
            return tensor.shape[0], tensor.shape[1]
    return None


def latent_channels(header: Header) -> int | None:
    """Channels of the latents that a VAE decodes; None if its names do not tell."""
    for name, tensor in header.tensors.items():
        if _VAE.match(name) and len(tensor.shape) > 1:
            return tensor.shape[1]
    return None


def prediction(header: Header) -> dict[str, Any]:
    """What a checkpoint was trained to predict, by the marks in it: keys of a model file, empty without a mark."""
    if "v_pred" in header.tensors or header.metadata.get("modelspec.prediction_type") in ("v", "v_prediction"):
        zero = {"rescale_betas_zero_snr": True} if "ztsnr" in header.tensors else {}
        return {"prediction_type": "v_prediction", **zero}
    return {}


def _kind(header: Header) -> str:
    names = header.tensors
    if any(map(_LORA.search, names)):
        return LORA
    has_denoiser = any(map(_DENOISER.match, names))
    if any(map(_CONTROL.match, names)) and not any(name.startswith("model.diffusion_model.") for name in names):
        return CONTROL_NET
    if len(names) <= 4 and names.keys() & {"emb_params", "clip_l", "clip_g", "string_to_param"}:
        return EMBEDDING
    if any(map(_TEXT_PART.match, names)):
        return CHECKPOINT if has_denoiser else TEXT_ENCODER
    if any(map(_VAE.match, names)):
        return CHECKPOINT if has_denoiser else VAE
    if has_denoiser or single_file.repository_of(header) not in (None, single_file.OTHERWISE):
        return DENOISER
    return TEXT_ENCODER if words_and_width(header) else CHECKPOINT


def _quantised(names: Mapping[str, Tensor]) -> str | None:
    ends = {name.rpartition(".")[2] for name in names}
    if "weight_scale" in ends and not ends & {"comfy_quant", "scale_weight"}:
        scales = {name: tensor for name, tensor in names.items() if name.endswith(".weight_scale")}
        if all(_is_fp8r(names, name) for name in scales):
            return FP8R
        if "weight_scale_2" in ends and all(_is_nvfp4(names, name) for name in scales):
            return NVFP4
    if _is_scaled_fp8(names):
        return SCALED_FP8
    dtypes = {tensor.dtype for name, tensor in names.items() if name.endswith("weight")}
    if "scaled_fp8" in names or ends & {"comfy_quant", "scale_weight"}:
        packed = "nvfp4" if "weight_scale_2" in ends else "scaled fp8"
        return f"ComfyUI's {'scaled int8' if 'I8' in dtypes else packed}"
    if "weight_scale" in ends or "input_scale" in ends:
        return f"scaled {'int8' if 'I8' in dtypes else 'fp4' if 'U8' in dtypes else 'fp8'}"
    if any("quant_state" in name for name in names) or ends & {"SCB", "absmax"}:
        return "bitsandbytes"
    return "int8" if "I8" in dtypes else None


def scales_of(name: str) -> tuple[str, ...]:
    """What the scale of a weight may be called."""
    layer, _, last = name.rpartition(".")
    return (f"{name}_scale", f"{layer}.scale_weight") if last == "weight" else (f"{name}_scale",)


def is_about_scales(name: str) -> bool:
    """Whether a tensor says how others are scaled, and is no weight."""
    return bool(_ABOUT_SCALES.search(name))


def _is_scaled_fp8(names: Mapping[str, Tensor]) -> bool:
    """Whether some weights are in fp8 with a scale, and all scales are of whole tensors or of rows of such weights."""
    scaled = {weight: scale for weight in names for scale in scales_of(weight) if scale in names}
    others = {name for name in names if name.endswith((".weight_scale", ".scale_weight"))} - set(scaled.values())
    others |= {name for name in names if name.endswith(".weight_scale_2")}
    return (
        bool(scaled)
        and not others
        and all(
            names[weight].dtype.startswith("F8_")
            and names[scale].dtype in ("F32", "F16", "BF16")
            and math.prod(names[scale].shape) in (1, names[weight].shape[0] if names[weight].shape else 1)
            for weight, scale in scaled.items()
        )
    )


def _is_fp8r(names: Mapping[str, Tensor], scale: str) -> bool:
    """Whether a weight is in fp8 with a scale for each row."""
    weight = names.get(scale.removesuffix("_scale"))
    return weight is not None and weight.dtype == "F8_E4M3" and names[scale].shape == weight.shape[:1]


def _is_nvfp4(names: Mapping[str, Tensor], scale: str) -> bool:
    """Whether a weight has two values to the byte, a scale for each 16 of them, and a scale of the input."""
    weight, prefix = names.get(scale.removesuffix("_scale")), scale.removesuffix("weight_scale")
    return (
        weight is not None
        and weight.dtype == "U8"
        and {f"{prefix}weight_scale_2", f"{prefix}input_scale"} <= names.keys()
    )

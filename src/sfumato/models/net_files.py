"""ControlNets in single files: a file has no configuration, so it is told from its header and the model's denoiser.

A ControlNet is a copy of a part of the denoiser that it was made for. What shapes do not tell (the number of attention
heads, say) it has in common with it; what the file has otherwise (fewer blocks, another size of its picture's
embedding) its shapes tell. Nothing of it is asked of a hub.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import safetensors.torch
import torch
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

from sfumato.checkpoints import contents, controlnets, weight_header
from sfumato.checkpoints.weight_header import Header
from sfumato.errors import LoadError

Shapes = Mapping[str, tuple[int, ...]]

NOT_SHARED = ("encoder_hid_dim", "encoder_hid_dim_type")
"""Settings of a denoiser that an IP-Adapter changes; a ControlNet knows nothing of it."""

_LABELS = {f"add_embedding.linear_{at}.{kind}": f"label_emb.0.{2 * at - 2}.{kind}" for at in (1, 2)
           for kind in ("weight", "bias")}  # fmt: skip
"""Names of Stable Diffusion XL that diffusers' conversion leaves out."""


def settings_of(denoiser: Any) -> dict[str, Any]:
    """Those settings of a denoiser's configuration that classes of ControlNets have too."""
    taken = {key for name in _DESCRIBED for key in _parameters(getattr(diffusers, name))} - set(NOT_SHARED)
    return {key: value for key, value in sorted(dict(denoiser).items()) if key in taken}


def load(path: Path, denoiser: Mapping[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    """The ControlNet of a file for a denoiser with these settings. Raises LoadError if it fits no such denoiser."""
    controlnets.refuse(path)
    contents.refuse_layout(contents.of(weight_header.of_file(path)), path.name, "controls", ())
    if why := problem(path, denoiser):
        raise LoadError(why)
    header = weight_header.of_file(path)
    cls, described = _described(header, denoiser, path.name)
    with TemporaryDirectory() as folder:
        (Path(folder) / controlnets.DESCRIPTION).write_text(json.dumps({**described, "_class_name": cls.__name__}))
        if controlnets.is_original(header):
            tensors = _in_names_of_diffusers(safetensors.torch.load_file(path), denoiser)
            made = cls.from_single_file(tensors, config=folder, dtype=dtype)
        else:
            (Path(folder) / "diffusion_pytorch_model.safetensors").symlink_to(path.absolute())
            made = cls.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    net: torch.nn.Module = made.eval()
    return net


def problem(path: Path, denoiser: Mapping[str, Any]) -> str | None:
    """Why a file does not go with such a denoiser, told from its header; None if it does. Raises LoadError."""
    header = weight_header.of_file(path)
    try:
        cls, described = _described(header, denoiser, path.name)
        with torch.device("meta"):
            made = cls.from_config(described)
    except LoadError as error:
        return error.message
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        return _of_another_model(path.name, f"{type(error).__name__}: {error}").message
    expected, there = _shapes(made.state_dict()), _shapes(_converted(header, denoiser))
    for name in sorted({*expected, *there}):
        if expected.get(name) != there.get(name):
            why = f"{name} is {there.get(name, 'missing')}, that model's is {expected.get(name, 'not there')}"
            return _of_another_model(path.name, why).message
    return None


def _described(header: Header, denoiser: Mapping[str, Any], label: str) -> tuple[Any, dict[str, Any]]:
    """Class and configuration of a file. Raises LoadError if they cannot be told."""
    name = controlnets.class_in(header) or ""
    cls: Any = getattr(diffusers, name)
    known = {key: value for key, value in denoiser.items() if key in _parameters(cls) and key not in NOT_SHARED}
    try:
        return cls, known | _DESCRIBED[name](_shapes(_converted(header, denoiser)), denoiser)
    except (LookupError, TypeError, ValueError) as error:
        raise _of_another_model(label, f"it lacks {error}") from None


def _converted(header: Header, denoiser: Mapping[str, Any]) -> dict[str, Any]:
    """The file's tensors in diffusers' names, without values."""
    with torch.device("meta"):
        tensors = {name: torch.empty(tensor.shape) for name, tensor in header.tensors.items()}
    return _in_names_of_diffusers(tensors, denoiser)


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _in_names_of_diffusers(tensors: Mapping[str, Any], denoiser: Mapping[str, Any]) -> dict[str, Any]:
    if "time_embedding.linear_1.weight" in tensors or not any("input_hint_block.0" in name for name in tensors):
        return dict(tensors)
    layers = denoiser.get("layers_per_block", 2)
    converted = convert_controlnet_checkpoint(
        dict(tensors), {"layers_per_block": layers if isinstance(layers, int) else 2}
    )
    plain = {name.removeprefix(controlnets.ORIGINAL_PREFIX): tensor for name, tensor in tensors.items()}
    converted |= {name: plain[original] for name, original in _LABELS.items() if original in plain}
    return {name: tensor for name, tensor in converted.items() if tensor is not None}


def _of_another_model(label: str, why: str) -> LoadError:
    first = " ".join(why.split())[:300]
    return LoadError(f"{label} was made for another model ({first}); take one that was made for this model's kind")


def _parameters(cls: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.__init__).parameters)[1:]


def _count(shapes: Shapes, pattern: str) -> int:
    """How many numbers stand where the pattern has its group."""
    found = {match[1] for name in shapes if (match := re.match(pattern, name))}
    return len(found)


def _of_unet(shapes: Shapes, denoiser: Mapping[str, Any]) -> dict[str, Any]:
    """`ControlNetModel`: its blocks, which a smaller net has without attention or with fewer layers of it."""
    hint = "controlnet_cond_embedding"
    inner = [shapes[f"{hint}.blocks.{at}.weight"][0] for at in range(0, _count(shapes, rf"{hint}\.blocks\.(\d+)"), 2)]
    last = shapes[f"{hint}.conv_out.weight"][1]
    count = _count(shapes, r"down_blocks\.(\d+)\.")
    layers = [_count(shapes, rf"down_blocks\.{at}\.attentions\.0\.transformer_blocks\.(\d+)\.") for at in range(count)]
    middle = _count(shapes, r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.")
    told = {
        "in_channels": shapes["conv_in.weight"][1],
        "conditioning_channels": shapes[f"{hint}.conv_in.weight"][1],
        "conditioning_embedding_out_channels": [*inner, last],
        "block_out_channels": [shapes[f"down_blocks.{at}.resnets.0.conv1.weight"][0] for at in range(count)],
        "down_block_types": ["CrossAttnDownBlock2D" if each else "DownBlock2D" for each in layers],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
        # the middle has as many as the last block's number says, also where that has none
        "transformer_layers_per_block": [*[each or 1 for each in layers[:-1]], layers[-1] or middle or 1],
    }
    crossed = next((name for name in shapes if name.endswith("attn2.to_k.weight")), None)
    if crossed:
        told["cross_attention_dim"] = shapes[crossed][1]
    if "encoder_hid_proj.weight" in shapes:
        told |= {"encoder_hid_dim": shapes["encoder_hid_proj.weight"][1], "encoder_hid_dim_type": "text_proj"}
    return told


def _of_union(shapes: Shapes, denoiser: Mapping[str, Any]) -> dict[str, Any]:
    """`ControlNetUnionModel`: and the number of its kinds of control."""
    told = _of_unet(shapes, denoiser)
    kinds, channels = shapes["task_embedding"]
    del told["mid_block_type"]
    return told | {
        "num_control_type": kinds,
        "num_trans_channel": channels,
        "num_trans_layer": _count(shapes, r"transformer_layes\.(\d+)\."),  # as diffusers writes it
        "num_proj_channel": shapes["spatial_ch_projs.weight"][0],
    }


def _of_flux(shapes: Shapes, denoiser: Mapping[str, Any]) -> dict[str, Any]:
    mode, hint = "controlnet_mode_embedder.weight", "input_hint_block.conv_out.weight"
    return _blocks(shapes) | {
        "in_channels": shapes["x_embedder.weight"][1],
        "num_single_layers": _count(shapes, r"single_transformer_blocks\.(\d+)\."),
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "guidance_embeds": any(name.startswith("time_text_embed.guidance_embedder.") for name in shapes),
        "num_mode": shapes[mode][0] if mode in shapes else None,
        "conditioning_embedding_channels": shapes[hint][0] if hint in shapes else None,
    }


def _of_qwen(shapes: Shapes, denoiser: Mapping[str, Any]) -> dict[str, Any]:
    channels = shapes["img_in.weight"][1]
    extra = shapes["controlnet_x_embedder.weight"][1] - channels
    return _blocks(shapes) | {"in_channels": channels, "extra_condition_channels": extra}


def _of_sd3(shapes: Shapes, denoiser: Mapping[str, Any]) -> dict[str, Any]:
    channels = denoiser.get("in_channels", 16)
    context = "context_embedder.weight"
    qk_norm = any(name.endswith("attn.norm_q.weight") for name in shapes)
    doubled = {int(match[1]) for name in shapes if (match := re.match(r"transformer_blocks\.(\d+)\.attn2\.", name))}
    return _blocks(shapes) | {
        "extra_conditioning_channels": shapes["pos_embed_input.proj.weight"][1] - channels,
        "joint_attention_dim": shapes[context][1] if context in shapes else None,
        "use_pos_embed": "pos_embed.proj.weight" in shapes,
        "pos_embed_type": "sincos" if "pos_embed.pos_embed" in shapes else None,
        "dual_attention_layers": sorted(doubled),
        "qk_norm": "rms_norm" if qk_norm else None,
    }


def _blocks(shapes: Shapes) -> dict[str, Any]:
    return {"num_layers": _count(shapes, r"transformer_blocks\.(\d+)\.")}


_DESCRIBED: Mapping[str, Callable[[Shapes, Mapping[str, Any]], dict[str, Any]]] = {
    "ControlNetModel": _of_unet,
    "ControlNetUnionModel": _of_union,
    "FluxControlNetModel": _of_flux,
    "QwenImageControlNetModel": _of_qwen,
    "SD3ControlNetModel": _of_sd3,
}
"""Class → the settings that the shapes of its file tell."""

"""One-file checkpoints in the layout of the original Stable Diffusion, as model sharing sites have them.

How `StableDiffusionPipeline.from_single_file(path)` reads one (diffusers 0.42):

1.  The keys tell the model type: `model.diffusion_model.input_blocks.0.0.weight` with 9 input channels
    is "inpainting", `...input_blocks.2.1...attn2.to_k.weight` 1024 wide is "v2", the marks of SDXL, Flux and
    so on are "xl_base", "flux-dev", ...; what has none of them is "v1", at any size, so a tiny one as well.
2.  The type names the repository of the configs, unless `config=` gives a folder or another repository:
    "v1" stable-diffusion-v1-5/stable-diffusion-v1-5,
    "inpainting" stable-diffusion-v1-5/stable-diffusion-inpainting,
    "v2" stabilityai/stable-diffusion-2-1, "xl_base" stabilityai/stable-diffusion-xl-base-1.0.
3.  `snapshot_download` fetches every `*.json` and `*.txt` of it, in all folders; no weights.
    Of a tiny repository these are `CONFIGS`; a full one has feature_extractor/preprocessor_config.json,
    safety_checker/config.json, tokenizer/{merges.txt,vocab.json,special_tokens_map.json} besides.
4.  UNet, VAE and text encoder come from the file, scheduler and tokenizer from the configs. The safety
    checker is left out. Configs of other shapes than the file's are an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

CONFIGS = frozenset(
    {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "unet/config.json",
        "vae/config.json",
    }
)
"""What `from_single_file` downloads of a repository that `tiny.save` wrote."""

Rename = str | Callable[[re.Match[str]], str]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}

ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def single_file(pipe: StableDiffusionPipeline, path: Path) -> Path:
    """Writes a Stable Diffusion 1 pipeline as one `.safetensors` of the original layout; returns `path`."""
    unet = _unet_names(pipe.unet.config.layers_per_block)
    vae = _vae_names(len(pipe.vae.config.block_out_channels))
    tensors: dict[str, Tensor] = {}
    for name, tensor in pipe.unet.state_dict().items():
        tensors["model.diffusion_model." + _renamed(name, unet)] = tensor
    for name, tensor in pipe.vae.state_dict().items():
        if ".attentions." in name and name.endswith("weight") and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]  # The original attends with 1x1 convolutions.
        tensors["first_stage_model." + _renamed(name, vae)] = tensor
    for name, tensor in pipe.text_encoder.state_dict().items():
        # transformers 5 has dropped the level of the tree that the original layout still names.
        tensors["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = tensor
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def _renamed(name: str, rules: list[tuple[str, Rename]]) -> str:
    """`name` after the one rule whose pattern it begins with; a name without a rule stays."""
    for pattern, rename in rules:
        if match := re.match(pattern, name):
            start = match.expand(rename) if isinstance(rename, str) else rename(match)
            return start + name[match.end() :]
    return name


def _unet_names(layers: int) -> list[tuple[str, Rename]]:
    """The original numbers all blocks in one row: `layers` and a resize per level, one more going up."""

    def down(match: re.Match[str]) -> str:
        level, kind, layer, part = int(match[1]), match[2], int(match[3]), match[4]
        row = 1 + level * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{row + layers}.0.op"
        return f"input_blocks.{row + layer}.{_column(kind)}.{RESNET.get(part, part)}"

    def up(match: re.Match[str]) -> str:
        level, kind, layer, part = int(match[1]), match[2], int(match[3]), match[4]
        row = level * (layers + 1)
        if kind == "upsamplers":
            # Behind the attention where the level has one; level 0 of Stable Diffusion 1 has none.
            return f"output_blocks.{row + layers}.{1 if level == 0 else 2}.conv"
        return f"output_blocks.{row + layer}.{_column(kind)}.{RESNET.get(part, part)}"

    def middle(match: re.Match[str]) -> str:
        kind, layer, part = match[1], int(match[2]), match[3]
        return f"middle_block.{2 * layer if kind == 'resnets' else 1}.{RESNET.get(part, part)}"

    outer: list[tuple[str, Rename]] = [(re.escape(ours) + r"(?=\.)", theirs) for ours, theirs in OUTER.items()]
    return [
        *outer,
        (r"down_blocks\.(\d+)\.(\w+)\.(\d+)\.(\w+)", down),
        (r"up_blocks\.(\d+)\.(\w+)\.(\d+)\.(\w+)", up),
        (r"mid_block\.(\w+)\.(\d+)\.(\w+)", middle),
    ]


def _column(kind: str) -> int:
    return 0 if kind == "resnets" else 1


def _vae_names(levels: int) -> list[tuple[str, Rename]]:
    """Levels count from the full resolution on both ways; diffusers counts the decoder from the smallest."""

    def level(match: re.Match[str]) -> str:
        half, way, number, kind, layer, part = match.groups()
        place = f"{half}.{way}.{int(number) if way == 'down' else levels - 1 - int(number)}"
        if kind == "resnets":
            return f"{place}.block.{layer}.{_shortcut(part)}"
        return f"{place}.{way}sample.{part}"

    def middle(match: re.Match[str]) -> str:
        half, layer, part = match.groups()
        return f"{half}.mid.block_{int(layer) + 1}.{_shortcut(part)}"

    def attention(match: re.Match[str]) -> str:
        return f"{match[1]}.mid.attn_1.{ATTENTION[match[2]]}"

    return [
        (r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(\w+)", level),
        (r"(encoder|decoder)\.mid_block\.resnets\.(\d+)\.(\w+)", middle),
        (r"(encoder|decoder)\.mid_block\.attentions\.0\.(to_out\.0|\w+)", attention),
        (r"(encoder|decoder)\.conv_norm_out", r"\1.norm_out"),
    ]


def _shortcut(part: str) -> str:
    return "nin_shortcut" if part == "conv_shortcut" else part

"""The names that the original ControlNets have in their files, for a tiny one of diffusers."""

from __future__ import annotations

import re
from typing import Any

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
PER_BLOCK = 3
"""Two layers and what makes the next block smaller."""


def original(net: Any, prefix: str = "control_model.") -> dict[str, Any]:
    """The weights of a `ControlNetModel` of two layers a block, by their original names."""
    return {prefix + _name(name): tensor.contiguous() for name, tensor in net.state_dict().items()}


def _name(name: str) -> str:
    for pattern, made in (
        (r"time_embedding\.linear_(\d)\.(.+)", lambda m: f"time_embed.{2 * int(m[1]) - 2}.{m[2]}"),
        (r"add_embedding\.linear_(\d)\.(.+)", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}.{m[2]}"),
        (r"conv_in\.(.+)", lambda m: f"input_blocks.0.0.{m[1]}"),
        (r"controlnet_cond_embedding\.conv_in\.(.+)", lambda m: f"input_hint_block.0.{m[1]}"),
        (r"controlnet_cond_embedding\.blocks\.(\d+)\.(.+)", lambda m: f"input_hint_block.{2 * int(m[1]) + 2}.{m[2]}"),
        (r"controlnet_cond_embedding\.conv_out\.(.+)", lambda m: f"input_hint_block.14.{m[1]}"),
        (r"controlnet_down_blocks\.(\d+)\.(.+)", lambda m: f"zero_convs.{m[1]}.0.{m[2]}"),
        (r"controlnet_mid_block\.(.+)", lambda m: f"middle_block_out.0.{m[1]}"),
        (r"mid_block\.resnets\.(\d)\.(\w+)\.(.+)", lambda m: f"middle_block.{2 * int(m[1])}.{RESNET[m[2]]}.{m[3]}"),
        (r"mid_block\.attentions\.0\.(.+)", lambda m: f"middle_block.1.{m[1]}"),
        (
            r"down_blocks\.(\d)\.resnets\.(\d)\.(\w+)\.(.+)",
            lambda m: f"input_blocks.{1 + PER_BLOCK * int(m[1]) + int(m[2])}.0.{RESNET[m[3]]}.{m[4]}",
        ),
        (
            r"down_blocks\.(\d)\.attentions\.(\d)\.(.+)",
            lambda m: f"input_blocks.{1 + PER_BLOCK * int(m[1]) + int(m[2])}.1.{m[3]}",
        ),
        (
            r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.+)",
            lambda m: f"input_blocks.{PER_BLOCK * (int(m[1]) + 1)}.0.op.{m[2]}",
        ),
    ):
        if match := re.fullmatch(pattern, name):
            return str(made(match))
    raise AssertionError(name)

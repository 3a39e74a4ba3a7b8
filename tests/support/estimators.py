"""Tiny models of transformers that preprocessors estimate with, as folders with their image processors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t

from support import nets
from support.tiny import seeded

SIDE = 56
"""Of what a tiny estimator reads, in pixels; a multiple of 14, the size of its patches."""


def _backbone() -> Any:
    return t.Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=SIDE,
        patch_size=14, out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
    )  # fmt: skip


def _dpt() -> Any:
    config = t.DPTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=SIDE,
        patch_size=14, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 16, 16, 16], fusion_hidden_size=16,
        is_hybrid=False, use_auxiliary_head=False,
    )  # fmt: skip
    return t.DPTForDepthEstimation(config)


def _depth_anything(**changes: Any) -> Any:
    config = t.DepthAnythingConfig(
        backbone_config=_backbone(), reassemble_hidden_size=32, patch_size=14, neck_hidden_sizes=[16, 16, 16, 16],
        fusion_hidden_size=16, head_hidden_size=8, **changes,
    )  # fmt: skip
    return t.DepthAnythingForDepthEstimation(config)


DEPTH = {
    "depth anything": _depth_anything,
    "metric": lambda: _depth_anything(depth_estimation_type="metric"),
    "dpt": _dpt,
}


def save_depth(folder: Path, kind: str = "depth anything", seed: int = 3) -> Path:
    with seeded(seed):
        DEPTH[kind]().eval().save_pretrained(folder)
    processor = t.DPTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, keep_aspect_ratio=kind != "dpt", ensure_multiple_of=14
    )
    processor.save_pretrained(folder)
    return folder


def save_person(folder: Path) -> Path:
    """A detector that takes some places of most pictures for people."""
    backbone = t.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = t.RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=32, encoder_in_channels=[16, 24, 32], d_model=32,
        encoder_ffn_dim=32, encoder_attention_heads=2, decoder_ffn_dim=32, decoder_attention_heads=2, num_queries=6,
        decoder_layers=2, encoder_layers=1, decoder_in_channels=[32, 32, 32], num_denoising=0,
        id2label={0: "cat", 1: "Person", 2: "dog"}, label2id={"cat": 0, "Person": 1, "dog": 2},
    )  # fmt: skip
    with seeded(1):
        t.RTDetrForObjectDetection(config).eval().save_pretrained(folder)
    t.RTDetrImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def save_pose(folder: Path, **changes: Any) -> Path:
    """A ViTPose that is certain of most joints."""
    backbone = t.VitPoseBackboneConfig(
        image_size=[64, 48], patch_size=[16, 16], hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        mlp_ratio=2, out_features=["stage2"], **changes,
    )  # fmt: skip
    with seeded(2):
        model = t.VitPoseForPoseEstimation(t.VitPoseConfig(backbone_config=backbone, num_labels=17)).eval()
    with torch.no_grad():
        model.head.conv.weight.mul_(6)
    model.save_pretrained(folder)
    t.VitPoseImageProcessorPil(size={"height": 64, "width": 48}).save_pretrained(folder)
    return folder


def save_net(folder: Path) -> None:
    """A ControlNet `strong` beside the model files in a folder, which shows in the picture what it follows."""
    net = copy.deepcopy(nets.another("sd"))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.startswith("controlnet_cond_embedding"):
                parameter.mul_(0 if name.endswith("bias") else 6)
            elif name.startswith(("controlnet_down", "controlnet_mid")):
                parameter.mul_(10)
    net.save_pretrained(folder / "controlnets" / "strong")


SAVED: dict[str, Callable[[Path], Path]] = {
    "depth_model": save_depth,
    "person_model": save_person,
    "pose_model": save_pose,
}
"""Setting -> what saves a tiny model for it."""

"""How diffusers puts IP-Adapters into each kind of denoiser, by the mixin that its class has for them.

All use the adapter's tensors as they are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.loaders.transformer_flux import FluxTransformer2DLoadersMixin
from diffusers.loaders.transformer_sd3 import SD3Transformer2DLoadersMixin
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from diffusers.models.embeddings import MultiIPAdapterImageProjection

from sfumato.checkpoints.ip_adapters import ARGUMENT
from sfumato.pipelines.capabilities import parameters_of

Tensors = Mapping[str, torch.Tensor]
Shapes = dict[str, torch.Size]

NEGATIVE = f"negative_{ARGUMENT}"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of denoiser."""

    mixin: type
    shapes: Callable[[Any, Tensors], Shapes]
    """The keys that an adapter of a denoiser has for its attention, with their shapes; what a denoiser does not say is
    taken from the adapter."""
    put: Callable[[Any, Sequence[Mapping[str, dict[str, torch.Tensor]]]], tuple[dict[str, Any], list[Any]]]
    """Put adapters into a twin; returns its attention processors by their names, and what makes tokens of pictures."""
    most: int | None = None
    """How many adapters, each with how many pictures; None: any number."""


def of(denoiser: Any) -> Kind | None:
    """The kind of a denoiser; None: it takes no adapters."""
    return next((kind for kind in KINDS if isinstance(denoiser, kind.mixin)), None)


def arguments(kind: Kind, pipeline: Any, pictures: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """What the call of a pipeline takes for the pictures of each adapter."""
    if kind.most == 1:
        return {ARGUMENT: pictures[0][0]}
    given: dict[str, Any] = {ARGUMENT: [list(each) for each in pictures]}
    if len(pictures) > 1 and NEGATIVE in parameters_of(pipeline):  # some classes make one black picture for all
        given[NEGATIVE] = [each[0].point(lambda level: 0) for each in pictures]
    return given


def _of_unet(unet: Any, attention: Tensors) -> Shapes:
    shapes: Shapes = {}
    number = 1
    for name in unet.attn_processors:
        if name.endswith("attn1.processor") or "motion_modules" in name:
            continue
        layer = unet.get_submodule(name.removesuffix(".processor"))
        shape = torch.Size((layer.inner_dim, unet.config.cross_attention_dim))
        shapes |= {f"{number}.to_k_ip.weight": shape, f"{number}.to_v_ip.weight": shape}
        number += 2
    return shapes


def _of_flux(transformer: Any, attention: Tensors) -> Shapes:
    count = sum(not name.startswith("single_transformer_blocks") for name in transformer.attn_processors)
    width = torch.Size((transformer.inner_dim,))
    shape = torch.Size((transformer.inner_dim, transformer.config.joint_attention_dim))
    return {
        f"{number}.to_{part}_ip.{kind}": shape if kind == "weight" else width
        for number in range(count)
        for part in "kv"
        for kind in ("weight", "bias")
    }


def _of_sd3(transformer: Any, attention: Tensors) -> Shapes:
    head = transformer.config.attention_head_dim
    width = head * transformer.config.num_attention_heads
    first = attention.get("0.norm_ip.linear.weight")
    time = first.shape[-1] if first is not None else 0  # the adapter's own embedding of the time step
    parts = {
        "norm_ip.linear.weight": (2 * width, time), "norm_ip.linear.bias": (2 * width,),
        "to_k_ip.weight": (width, width), "to_v_ip.weight": (width, width),
        **{f"{norm}.weight": (head,) for norm in ("norm_q", "norm_k", "norm_ip_k")},
    }  # fmt: skip
    count = len(transformer.attn_processors)
    return {f"{number}.{part}": torch.Size(shape) for number in range(count) for part, shape in parts.items()}


def _put_many(denoiser: Any, states: Sequence[Any]) -> tuple[dict[str, Any], list[Any]]:
    processors = denoiser._convert_ip_adapter_attn_to_diffusers(states)
    projections = [denoiser._convert_ip_adapter_image_proj_to_diffusers(state["image_proj"]) for state in states]
    denoiser.encoder_hid_proj = None  # a projection has processors too
    denoiser.set_attn_processor(dict(processors))
    denoiser.encoder_hid_proj = MultiIPAdapterImageProjection(projections)
    return processors, projections


def _put_into_unet(unet: Any, states: Sequence[Any]) -> tuple[dict[str, Any], list[Any]]:
    if getattr(unet, "encoder_hid_proj", None) is not None and not hasattr(unet, "text_encoder_hid_proj"):
        unet.text_encoder_hid_proj = unet.encoder_hid_proj  # Kolors has one for its text
    put = _put_many(unet, states)
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    return put


def _put_into_sd3(transformer: Any, states: Sequence[Any]) -> tuple[dict[str, Any], list[Any]]:
    (state,) = states
    processors = transformer._convert_ip_adapter_attn_to_diffusers(state["ip_adapter"])
    projection = transformer._convert_ip_adapter_image_proj_to_diffusers(state["image_proj"])
    transformer.set_attn_processor(dict(processors))
    transformer.image_proj = projection
    return processors, [projection]


KINDS = (
    Kind(UNet2DConditionLoadersMixin, _of_unet, _put_into_unet),
    Kind(FluxTransformer2DLoadersMixin, _of_flux, _put_many),
    Kind(SD3Transformer2DLoadersMixin, _of_sd3, _put_into_sd3, most=1),
)

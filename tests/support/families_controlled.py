"""Tiny real pipelines with ControlNets and adapters in the numbers that published ones have; see `families.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as d

from support.families import (
    DEEP,
    FLOW,
    PICTURES,
    SD,
    SQUARE,
    Call,
    Family,
    _first,
    half_mask,
    lively,
    of_first_generation,
    picture,
    three,
    with_pictures,
    without,
    xl_parts,
)
from support.families_transformers import (
    hunyuan_dit,
    qwen_image,
    sana,
    stable_diffusion_3_controlled,
)
from support.tiny import WIDTH, seeded

DEEP_UNET: dict[str, Any] = {
    "block_out_channels": (8, 16, 16, 16), "layers_per_block": 2, "norm_num_groups": 4, "attention_head_dim": 4,
}  # fmt: skip
"""Four blocks of two layers: a ControlNet gives such a UNet 12 residuals, as it gives that of Stable Diffusion 1.5."""

ATTEND = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
XL_UNET: dict[str, Any] = {
    "block_out_channels": (8, 16, 16), "layers_per_block": 2, "norm_num_groups": 4, "attention_head_dim": 4,
    "transformer_layers_per_block": (1, 1, 2), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    "cross_attention_dim": 2 * WIDTH,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
}  # fmt: skip
"""Three blocks of two layers, and nine residuals: Stable Diffusion XL."""


def deep_unet(**changes: Any) -> Any:
    up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    shape = DEEP_UNET | {"sample_size": 8, "cross_attention_dim": WIDTH, "up_block_types": up} | changes
    return d.UNet2DConditionModel(down_block_types=ATTEND, **shape).eval()


def xl_unet(**changes: Any) -> Any:
    up = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    return d.UNet2DConditionModel(**(XL_UNET | {"sample_size": 8, "up_block_types": up} | changes)).eval()


def net(shape: dict[str, Any] | None = None, kind: Any = d.ControlNetModel, **changes: Any) -> Any:
    shape = shape or DEEP_UNET | {"cross_attention_dim": WIDTH, "down_block_types": ATTEND}
    made = kind(conditioning_embedding_out_channels=(8, 8, 8, 8), **shape, **changes)
    return lively(made.eval())


def controlled(kind: Any, count: int = 1) -> Callable[[], Any]:
    def build() -> Any:
        with seeded(0):
            parts = _first(deep_unet())
            nets = [net() for _ in range(count)]
            return kind(controlnet=nets[0] if count == 1 else nets, **parts)

    return build


def controlled_xl(kind: Any, net_kind: Any = d.ControlNetModel, count: int = 1, **changes: Any) -> Callable[[], Any]:
    def build() -> Any:
        with seeded(1):
            parts = xl_parts() | {"unet": xl_unet()}
            nets = [net(XL_UNET, net_kind, **changes) for _ in range(count)]
            return kind(controlnet=nets[0] if count == 1 else nets, **parts)

    return build


def adapter(channels: list[int], kind: str = "full_adapter", factor: int = 8) -> Any:
    return d.T2IAdapter(channels=channels, num_res_blocks=2, downscale_factor=factor, adapter_type=kind).eval()


def adapted(count: int = 1) -> Any:
    with seeded(0):
        nets = [adapter([8, 16, 16, 16]) for _ in range(count)]
        one = nets[0] if count == 1 else d.MultiAdapter(nets).eval()
        return d.StableDiffusionAdapterPipeline(adapter=one, **_first(deep_unet()))


def adapted_xl() -> Any:
    with seeded(0):
        parts = xl_parts() | {"unet": xl_unet()}
        made = adapter([8, 16, 16, 16], "full_adapter_xl", 16)
        return d.StableDiffusionXLAdapterPipeline(adapter=made, **parts)


def xl_instructed() -> Any:
    with seeded(0):
        return d.StableDiffusionXLInstructPix2PixPipeline(**xl_parts() | {"unet": xl_unet(in_channels=8)})


def ip_adapted() -> Any:
    """Stable Diffusion with an image prompt, given as embeddings."""
    pipe = of_first_generation(d.StableDiffusionPipeline)()
    with seeded(2):
        from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
        from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

        unet = pipe.unet
        width = unet.config.cross_attention_dim
        processors = {}
        for name, processor in unet.attn_processors.items():
            attention = unet.get_submodule(name.removesuffix(".processor"))
            hidden = attention.to_q.in_features
            crossing = name.endswith("attn2.processor")
            processors[name] = IPAdapterAttnProcessor2_0(hidden, width, num_tokens=(4,)) if crossing else processor
        unet.set_attn_processor(processors)
        projection = ImageProjection(cross_attention_dim=width, image_embed_dim=WIDTH, num_image_text_embeds=4)
        unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
        unet.config.encoder_hid_dim_type = "ip_image_proj"
        unet.eval()
    return pipe


def prompted_by_picture(calls: list[Call]) -> list[Call]:
    from support.families import numbers

    return [{**call, "ip_adapter_image_embeds": [numbers(at, 2, 1, WIDTH)]} for at, call in enumerate(calls)]


def sana_controlled() -> Any:
    parts = sana().components
    with seeded(1):
        shape = {k: v for k, v in parts["transformer"].config.items() if not k.startswith("_")}
        known = d.SanaControlNetModel.__init__.__wrapped__.__code__.co_varnames
        made = d.SanaControlNetModel(**{k: v for k, v in shape.items() if k in known} | {"num_layers": 1})
    return d.SanaControlNetPipeline(controlnet=lively(made.eval()), **parts)


def qwen_controlled() -> Any:
    parts = qwen_image().components
    with seeded(1):
        made = d.QwenImageControlNetModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
            joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4),
        )  # fmt: skip
    return d.QwenImageControlNetPipeline(controlnet=lively(made.eval()), **parts)


def hunyuan_controlled() -> Any:
    parts = hunyuan_dit().components
    parts["requires_safety_checker"] = False
    with seeded(1):
        made = d.HunyuanDiT2DControlNetModel.from_transformer(
            parts["transformer"], conditioning_channels=3, transformer_num_layers=2, load_weights_from_transformer=False
        )
    return d.HunyuanDiTControlNetPipeline(controlnet=lively(made.eval()), **parts)


def sd3_many() -> Any:
    parts = stable_diffusion_3_controlled().components
    parts["controlnet"] = d.SD3MultiControlNetModel([parts["controlnet"], parts["controlnet"]])
    return d.StableDiffusion3ControlNetPipeline(**parts)


def of_size(calls: list[Call]) -> list[Call]:
    return [{**call, **SQUARE} for call in calls]


def two(key: str, calls: list[Call]) -> list[Call]:
    return [{**call, key: [picture(at), picture(at + 10)]} for at, call in enumerate(calls)]


MASKED = [{**c, "mask_image": half_mask(), **SQUARE, **DEEP} for c in with_pictures(PICTURES, "control_image")]
UNION = {"control_mode": 1}
ONE_FOR_ALL = {"num_control_type": 2, "num_trans_channel": 8, "num_trans_head": 2, "num_proj_channel": 8}

FAMILIES: dict[str, Family] = {
    "StableDiffusionControlNet (12 residuals)": Family(
        controlled(d.StableDiffusionControlNetPipeline), PICTURES, "unet"
    ),
    "StableDiffusionControlNet (guess mode)": Family(
        controlled(d.StableDiffusionControlNetPipeline), [{**c, "guess_mode": True} for c in PICTURES], "unet"
    ),
    "StableDiffusionControlNet (two)": Family(
        controlled(d.StableDiffusionControlNetPipeline, 2), two("image", SD), "unet"
    ),
    "StableDiffusionControlNetImg2Img (12 residuals)": Family(
        controlled(d.StableDiffusionControlNetImg2ImgPipeline),
        [{**c, **DEEP} for c in with_pictures(PICTURES, "control_image")],
        "unet",
    ),
    "StableDiffusionControlNetInpaint (12 residuals)": Family(
        controlled(d.StableDiffusionControlNetInpaintPipeline), MASKED, "unet"
    ),
    "StableDiffusionXLControlNet (9 residuals)": Family(
        controlled_xl(d.StableDiffusionXLControlNetPipeline), of_size(PICTURES), "unet"
    ),
    "StableDiffusionXLControlNet (two)": Family(
        controlled_xl(d.StableDiffusionXLControlNetPipeline, count=2), of_size(two("image", SD)), "unet"
    ),
    "StableDiffusionXLControlNetImg2Img": Family(
        controlled_xl(d.StableDiffusionXLControlNetImg2ImgPipeline),
        of_size([{**c, **DEEP} for c in with_pictures(PICTURES, "control_image")]),
        "unet",
    ),
    "StableDiffusionXLControlNetInpaint": Family(
        controlled_xl(d.StableDiffusionXLControlNetInpaintPipeline), MASKED, "unet"
    ),
    "StableDiffusionXLControlNetUnion": Family(
        controlled_xl(d.StableDiffusionXLControlNetUnionPipeline, d.ControlNetUnionModel, **ONE_FOR_ALL),
        [{**c, **SQUARE, **UNION} for c in with_pictures(SD, "control_image")],
        "unet",
    ),
    "StableDiffusionAdapter (4 residuals)": Family(adapted, of_size(PICTURES), "unet"),
    "StableDiffusionAdapter (two)": Family(
        lambda: adapted(2),
        [{**c, "adapter_conditioning_scale": [1.0, 0.5]} for c in of_size(two("image", SD))],
        "unet",
    ),
    "StableDiffusionXLAdapter": Family(adapted_xl, of_size(PICTURES), "unet"),
    "StableDiffusionXLInstructPix2Pix": Family(xl_instructed, of_size(PICTURES), "unet"),
    "StableDiffusion (IP adapter)": Family(ip_adapted, prompted_by_picture(SD), "unet"),
    "SanaControlNet": Family(
        sana_controlled,
        [
            {**c, "use_resolution_binning": False, "complex_human_instruction": None}
            for c in with_pictures(three(height=32, width=32), "control_image", 32)
        ],
    ),
    "QwenImageControlNet": Family(
        qwen_controlled,
        [
            {**c, "true_cfg_scale": 3.0, "negative_prompt": "x"}
            for c in with_pictures(without(FLOW, "guidance_scale"), "control_image")
        ],
    ),
    "HunyuanDiTControlNet": Family(
        hunyuan_controlled, [{**c, "use_resolution_binning": False} for c in with_pictures(FLOW, "control_image")]
    ),
    "StableDiffusion3ControlNet (two)": Family(
        sd3_many, [{**c, "controlnet_conditioning_scale": [1.0, 0.5]} for c in two("control_image", FLOW)]
    ),
}

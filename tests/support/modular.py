"""Tiny modular pipelines: the parts of the ordinary tiny ones, and of those families that exist only in blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as d
from transformers import Qwen3Config, Qwen3Model, Qwen3VLConfig, Qwen3VLModel

from support import tiny
from support.families_transformers import LANGUAGE, any_tokenizer, flow, flux2, flux2_klein, qwen_image, z_image
from support.tiny import WIDTH, seeded
from support.tiny_text import t5_tokenizer


def of_parts(cls: Any, parts: dict[str, Any]) -> Any:
    """A pipeline of this class, with those of `parts` that its blocks take."""
    pipe = cls()
    pipe.update_components(**{name: part for name, part in parts.items() if name in pipe.components and part})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def over(cls: Any, build: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: of_parts(cls, build().components)


def anima() -> Any:
    """A family that diffusers has only in blocks."""
    with seeded(0):
        transformer = d.CosmosTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2,
            text_embed_dim=WIDTH, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2),
            rope_scale=(1.0, 4.0, 4.0), concat_padding_mask=False, extra_pos_embed_type=None,
        )  # fmt: skip
        conditioner = d.AnimaTextConditioner(
            source_dim=WIDTH, target_dim=WIDTH, model_dim=WIDTH, num_layers=2, num_attention_heads=4,
            target_vocab_size=len(t5_tokenizer()),
        )  # fmt: skip
        parts = {
            "transformer": transformer.eval(), "text_conditioner": conditioner.eval(), "vae": qwen_image().vae,
            "text_encoder": Qwen3Model(Qwen3Config(**LANGUAGE)).eval(), "tokenizer": any_tokenizer(),
            "t5_tokenizer": t5_tokenizer(), "scheduler": flow(shift=3.0),
        }  # fmt: skip
        return of_parts(d.AnimaModularPipeline, parts)


def krea2(cls: Any) -> Any:
    with seeded(0):
        rope = {"mrope_section": [1, 1, 2], "rope_type": "default"}
        text = LANGUAGE | {"num_hidden_layers": 36, "rope_scaling": rope}
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH,
                  "deepstack_visual_indexes": []}  # fmt: skip
        transformer = d.Krea2Transformer2DModel(
            in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=64, timestep_embed_dim=32, text_hidden_dim=WIDTH, num_text_layers=12,
            text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=64,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        parts = {
            "transformer": transformer.eval(), "vae": qwen_image().vae, "scheduler": flow(use_dynamic_shifting=True),
            "text_encoder": Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)).eval(),
            "tokenizer": any_tokenizer(),
        }  # fmt: skip
        return of_parts(cls, parts)


BUILD: dict[str, Callable[[], Any]] = {
    "StableDiffusionXL": over(d.StableDiffusionXLModularPipeline, tiny.stable_diffusion_xl),
    "StableDiffusion3": over(d.StableDiffusion3ModularPipeline, tiny.stable_diffusion_3),
    "Flux": over(d.FluxModularPipeline, tiny.flux),
    "FluxKontext": over(d.FluxKontextModularPipeline, tiny.flux),
    "Flux2": over(d.Flux2ModularPipeline, flux2),
    "Flux2Klein": over(d.Flux2KleinModularPipeline, flux2_klein),
    "Flux2KleinBase": over(d.Flux2KleinBaseModularPipeline, flux2_klein),
    "QwenImage": over(d.QwenImageModularPipeline, qwen_image),
    "ZImage": over(d.ZImageModularPipeline, z_image),
    "Anima": anima,
    "Krea2": lambda: krea2(d.Krea2ModularPipeline),
    "Krea2Turbo": lambda: krea2(d.Krea2TurboModularPipeline),
}


def save(pipe: Any, folder: Path) -> Path:
    """A modular repository of `pipe`; its index names the folder itself."""
    pipe.save_pretrained(str(folder), overwrite_modular_index=True)
    return folder


def moved(folder: Path, component: str, repo: str) -> None:
    """From now on the folder's index says that a component comes from this repository."""
    index = json.loads((folder / "modular_model_index.json").read_text())
    index[component][2]["pretrained_model_name_or_path"] = repo
    (folder / "modular_model_index.json").write_text(json.dumps(index))

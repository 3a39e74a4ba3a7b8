"""Tiny modular pipelines of families that read their prompts with Mistral 3 and Qwen 3 VL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as d
from transformers import Mistral3Config, Mistral3Model, Qwen3VLConfig, Qwen3VLModel

from support.families_transformers import LANGUAGE, any_tokenizer, flow, flux2
from support.modular import of_parts
from support.tiny import WIDTH, seeded

TAPPED = 13
"""Layers of the text encoder that Ideogram 4 reads."""

VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH,
    "deepstack_visual_indexes": [],
}  # fmt: skip


def ernie() -> Any:
    with seeded(0):
        text = LANGUAGE | {"model_type": "mistral"}
        vision = {"model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
                  "intermediate_size": 32, "image_size": 30, "patch_size": 6, "num_channels": 3}  # fmt: skip
        transformer = d.ErnieImageTransformer2DModel(
            hidden_size=WIDTH, num_attention_heads=2, num_layers=2, ffn_hidden_size=64, in_channels=16,
            out_channels=16, text_in_dim=WIDTH, rope_axes_dim=(4, 6, 6),
        )  # fmt: skip
        encoder = Mistral3Model(Mistral3Config(text_config=text, vision_config=vision, image_token_index=1))
        parts = {
            "transformer": transformer.eval(), "vae": flux2().vae, "text_encoder": encoder.eval(),
            "tokenizer": any_tokenizer(), "scheduler": flow(shift=3.0),
        }  # fmt: skip
        return of_parts(d.ErnieImageModularPipeline, parts)


def ideogram4() -> Any:
    with seeded(0):
        rope = {"mrope_section": [1, 1, 2], "rope_type": "default"}
        text = LANGUAGE | {"num_hidden_layers": 36, "rope_scaling": rope}

        def transformer() -> Any:
            return d.Ideogram4Transformer2DModel(
                in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, intermediate_size=64,
                adaln_dim=16, llm_features_dim=WIDTH * TAPPED, mrope_section=(4, 2, 2),
            ).eval()  # fmt: skip

        parts = {
            "transformer": transformer(), "unconditional_transformer": transformer(), "vae": flux2().vae,
            "text_encoder": Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=VISION)).eval(),
            "tokenizer": any_tokenizer(), "scheduler": flow(),
        }  # fmt: skip
        return of_parts(d.Ideogram4ModularPipeline, parts)


BUILD: dict[str, Callable[[], Any]] = {"ErnieImage": ernie, "Ideogram4": ideogram4}

"""A tiny prior of FLUX.1."""

from __future__ import annotations

from diffusers import FluxPriorReduxPipeline, ReduxImageEncoder
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from support import tiny


def redux() -> FluxPriorReduxPipeline:
    """Without text encoders, as it is published."""
    side = {"height": 32, "width": 32}
    with tiny.seeded(3):
        vision = SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
        embedder = ReduxImageEncoder(redux_dim=16, txt_in_features=tiny.WIDTH)
        embedder.redux_down.weight.data.mul_(10)  # so that pictures show the difference between two pictures
        return FluxPriorReduxPipeline(
            image_encoder=SiglipVisionModel(vision).eval(),
            feature_extractor=SiglipImageProcessor(size=side),
            image_embedder=embedder,
        )

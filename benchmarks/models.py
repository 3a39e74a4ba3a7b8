"""The measured models (the built-in one, a Stable Diffusion with a third of the width) and the requests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from sfumato import schedulers
from sfumato.config import ModelConfig
from sfumato.core import Generation
from sfumato.serving.catalog import EMBEDDED, Catalog

SIZES = {"embedded": 128, "middle": 256}
"""Pixels per side."""

STEPS = {"embedded": (12, 28), "middle": (5, 9)}
"""Minimum and maximum steps of a mixed request."""

TEXTS = ("a red ball", "two blue cubes on yellow", "a green cup", "a small house on a dark background", "a star")
SCHEDULERS = (None, "euler", "ddim", "k_dpmpp_2m", "unipc")


def config(name: str, folder: Path, device: str) -> ModelConfig:
    """The model of that name, built in `folder` if necessary."""
    if name == "embedded":
        return Catalog([EMBEDDED]).get("sfumato-tiny")
    _middle().save_pretrained(folder / "middle-weights")
    dtype = "fp32" if device == "cpu" else "bf16"
    (folder / "middle.yaml").write_text(
        f"name: middle\nparameters:\n  model: {folder / 'middle-weights'}\ndtype: {dtype}\n"
    )
    return Catalog([folder]).get("middle")


def _middle() -> Any:
    """In the shape of Stable Diffusion 1.5, but with 96 to 384 features instead of 320 to 1280; random weights."""
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED / "sfumato-tiny")
    torch.manual_seed(0)
    pipeline.register_modules(
        unet=UNet2DConditionModel(
            block_out_channels=(96, 192, 384, 384), cross_attention_dim=128, attention_head_dim=6, sample_size=32
        )
    )
    return pipeline


def mixed(model: str, count: int, seed: int) -> list[Generation]:
    """Requests that have only the size in common."""
    dice = random.Random(seed)
    side = SIZES[model]
    return [
        Generation(
            id=f"{seed}-{index}",
            prompt=dice.choice(TEXTS),
            seed=dice.randrange(2**32),
            negative_prompt=dice.choice((None, "blurry")),
            width=side,
            height=side,
            steps=dice.randint(*STEPS[model]),
            guidance_scale=dice.choice((2.0, 3.0, 5.0)),
            scheduler=dice.choice(SCHEDULERS),
        )
        for index in range(count)
    ]


class Plain:
    """diffusers used as documented: one pipeline, one call after another."""

    def __init__(self, config: ModelConfig, device: str) -> None:
        from sfumato.models import load

        self.pipeline = load.load(config, device, lambda status: None).pipeline
        self.device = device

    def draw(self, asked: Generation) -> Any:
        """The picture, with a scheduler made like the engine's."""
        import torch

        from sfumato.pipelines import request_scheduler

        choice = schedulers.parse(asked.scheduler) if asked.scheduler else None
        own = self.pipeline.scheduler
        self.pipeline.scheduler = request_scheduler.make(self.pipeline, choice, asked.seed)
        try:
            with torch.no_grad():
                return self.pipeline(**arguments(asked)).images[0]
        finally:
            self.pipeline.scheduler = own


def arguments(asked: Generation) -> dict[str, Any]:
    """The arguments of `pipe(...)`."""
    import torch

    return {
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "width": asked.width,
        "height": asked.height,
        "num_inference_steps": asked.steps,
        "guidance_scale": asked.guidance_scale,
        "generator": torch.Generator("cpu").manual_seed(asked.seed),
    }

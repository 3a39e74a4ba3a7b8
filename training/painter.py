"""The finished pipeline as one object that paints batches of prompts, for evaluation and grids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from sfumato.schedulers import parse
from training.paths import PIPELINE

STEPS, GUIDANCE, BATCH = 20, 3.0, 10


def make_scheduler(name: str, config: Any) -> Any:
    """The scheduler that the server calls ``name``, on the noise schedule of ``config``."""
    form = parse(name).noise
    return getattr(diffusers, form.cls).from_config(config, **form.arguments)


class Painter:
    """Text to image, image to image and inpainting; equal seeds paint equal pictures."""

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        pipeline.set_progress_bar_config(disable=True)
        self._text = pipeline
        parts = {
            **pipeline.components, "safety_checker": None, "feature_extractor": None,
            "requires_safety_checker": False,
        }  # fmt: skip
        self._image = StableDiffusionImg2ImgPipeline(**parts)
        self._mask = StableDiffusionInpaintPipeline(**parts)
        self._image.set_progress_bar_config(disable=True)
        self._mask.set_progress_bar_config(disable=True)

    @classmethod
    def load(cls, folder: Path = PIPELINE) -> "Painter":
        """The shipped weights, computing in full precision."""
        return cls(StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32))

    def paint(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampler: str | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """One picture per prompt and seed, with ``sampler`` or the folder's own scheduler.

        With ``image`` (a list) in the options it starts from images, with ``mask_image`` it inpaints.
        Lists among the options are split like the prompts.
        """
        pipeline = self._text
        if "mask_image" in options:
            pipeline = self._mask
        elif "image" in options:
            pipeline = self._image
        config = self._text.scheduler.config
        options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, **options}
        painted: list[Image.Image] = []
        for start in range(0, len(prompts), BATCH):
            part = slice(start, start + BATCH)
            pipeline.scheduler = (
                make_scheduler(sampler, config) if sampler else type(self._text.scheduler).from_config(config)
            )
            here = {k: v[part] if isinstance(v, list) else v for k, v in options.items()}
            torch.manual_seed(seeds[start])  # for the solvers that draw their own noise
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            painted += pipeline(list(prompts[part]), generator=generators, **here).images
        return painted

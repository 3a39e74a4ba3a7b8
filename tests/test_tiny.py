"""The tiny pipelines: real enough to draw, the same each time, different where they should be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image

from support import tiny

BUILDERS = [
    tiny.stable_diffusion,
    tiny.inpaint_unet,
    tiny.stable_diffusion_depth,
    tiny.stable_diffusion_xl,
    tiny.flux,
    tiny.stable_diffusion_3,
    tiny.pixart,
    tiny.ddpm,
]

# What diffusers says of its own accord and no caller can prevent.
pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # depth in fp32
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Euler on NumPy 2
]

Pixels = np.ndarray[Any, np.dtype[np.float32]]


def draw(pipe: Any, prompt: str = "a cat", seed: int = 0) -> Pixels:
    """Three steps of 64x64, with whatever else this pipeline cannot do without."""
    arguments: dict[str, Any] = {"prompt": prompt, "width": 64, "height": 64}
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    match type(pipe).__name__:
        case "DDPMPipeline":
            arguments = {}
        case "StableDiffusionDepth2ImgPipeline":
            arguments = {"prompt": prompt, "image": picture}
        case "StableDiffusionInpaintPipeline":
            arguments |= {"image": picture, "mask_image": Image.new("L", (64, 64), 255)}
        case "PixArtSigmaPipeline":
            arguments |= {"use_resolution_binning": False, "clean_caption": False}
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    pixels: Pixels = pipe(**arguments, num_inference_steps=3, generator=generator, output_type="np").images[0]
    return pixels


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_same_seeds_same_pixels(build: Callable[[], DiffusionPipeline], tmp_path: Path) -> None:
    pixels = draw(build())
    torch.rand(1)  # Whatever else has drawn random numbers makes no difference.
    assert np.array_equal(draw(build()), pixels)
    again = DiffusionPipeline.from_pretrained(tiny.save(build(), tmp_path))
    # Weights mapped from a file lie at other addresses, and how those are aligned decides which kernel sums
    # them: the last bit may differ.
    assert np.allclose(draw(again), pixels, atol=1e-5)


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_seed_and_prompt_change_the_picture(build: Callable[[], DiffusionPipeline]) -> None:
    pipe = build()
    pixels = draw(pipe)
    assert np.isfinite(pixels).all() and pixels.std() > 0.05
    # In grey levels of 255, so that it shows in a PNG as well.
    assert np.abs(draw(pipe, seed=1) - pixels).mean() > 10 / 255
    if build is not tiny.ddpm:
        assert np.abs(draw(pipe, prompt="a dog") - pixels).max() > 5 / 255


def test_building_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tiny.stable_diffusion()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("build", [tiny.stable_diffusion, tiny.inpaint_unet], ids=lambda build: build.__name__)
def test_single_file_draws_as_the_original(build: Callable[[], DiffusionPipeline], tmp_path: Path) -> None:
    pipe = build()
    folder = tiny.save(pipe, tmp_path / "configs")
    path = tiny.single_file(pipe, tmp_path / "one.safetensors")
    again = type(pipe).from_single_file(str(path), config=str(folder))
    assert np.allclose(draw(again), draw(pipe), atol=1e-5)


@pytest.mark.slow
def test_single_file_in_full_size(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion_15()
    path = tiny.single_file(pipe, tmp_path / "sd15.safetensors")
    assert sum(part.num_parameters() for part in (pipe.unet, pipe.vae, pipe.text_encoder)) == 1_066_235_307
    for name in ("unet", "vae"):
        getattr(pipe, name).save_config(tmp_path / name)
    for name in ("scheduler", "tokenizer"):
        getattr(pipe, name).save_pretrained(tmp_path / name)
    pipe.text_encoder.config.save_pretrained(tmp_path / "text_encoder")
    pipe.save_config(tmp_path)
    again = StableDiffusionPipeline.from_single_file(str(path), config=str(tmp_path), torch_dtype=torch.bfloat16)
    for name in ("unet", "vae", "text_encoder"):
        expected, tensors = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
        assert expected.keys() == tensors.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)

"""A picture's recipe: in the file, read back, and made again."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sfumato import recipe
from sfumato.core import Recipe
from sfumato.errors import InvalidPicture


def made(prompt: str = "a cat", negative: str | None = "dog") -> Recipe:
    return Recipe(
        model="m", source="some/one@abc", pipeline="StableDiffusionPipeline", prompt=prompt, negative_prompt=negative,
        width=64, height=48, steps=20, guidance_scale=7.5, seed=2**63 - 1, scheduler="euler_a", clip_skip=2,
        strength=0.5, image_sha256=("ab",), mask_sha256=None, device="cpu", dtype="fp32", versions={"torch": "2"},
    )  # fmt: skip


# PNG text cannot hold what no text holds: lone surrogates and NUL.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(TEXT, st.none() | TEXT)
def test_what_goes_in_comes_out(tmp_path_factory: pytest.TempPathFactory, prompt: str, negative: str | None) -> None:
    path = tmp_path_factory.getbasetemp() / "picture.png"
    path.write_bytes(recipe.encode(Image.new("RGB", (64, 48)), made(prompt, negative)))
    assert recipe.read(path) == made(prompt, negative)


def test_infotext_is_what_web_uis_read() -> None:
    png = recipe.encode(Image.new("RGB", (64, 48)), made())
    assert (
        Image.open(io.BytesIO(png))
        .info["parameters"]
        .startswith(
            "a cat\nNegative prompt: dog\nSteps: 20, Sampler: euler_a, CFG scale: 7.5, "
            "Seed: 9223372036854775807, Size: 64x48, Model: m, Denoising strength: 0.5, Clip skip: 2, Version: sfumato"
        )
    )


@pytest.mark.parametrize("content", [b"", b"hello"])
def test_a_file_that_is_no_picture(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(InvalidPicture, match="not a picture"):
        recipe.read(tmp_path / "x.png")


def test_a_picture_without_a_recipe(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(InvalidPicture, match="carries no recipe"):
        recipe.read(tmp_path / "x.png")

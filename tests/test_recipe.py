"""A picture's recipe: in the file, read back, and made again."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from sfumato.core import Recipe
from sfumato.errors import InvalidPicture, InvalidRequest
from sfumato.pictures import recipe
from sfumato.sampling import Sampling


def made(prompt: str = "a cat", negative: str | None = "dog") -> Recipe:
    return Recipe(
        model="m", source="some/one@abc", pipeline="StableDiffusionPipeline", prompt=prompt, seed=2**63 - 1,
        sampling=Sampling(negative_prompt=negative, width=64, height=48, steps=20, guidance_scale=7.5,
                          scheduler="euler_a", clip_skip=2, strength=0.5),
        image_sha256=("ab",), mask_sha256=None, device="cpu", dtype="fp32", versions={"torch": "2"},
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
            "a cat\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7.5, "
            "Seed: 9223372036854775807, Size: 64x48, Model: m, Denoising strength: 0.5, Clip skip: 3, Version: sfumato"
        )
    )


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ("k_dpmpp_2m", "Sampler: DPM++ 2M, Schedule type: Karras,"),
        ("dpmpp_2m", "Sampler: DPM++ 2M, Schedule type: Uniform,"),
        ("dpmpp_2m_sde_exponential", "Sampler: DPM++ 2M SDE, Schedule type: Exponential,"),
        ("euler_sgm_uniform", "Sampler: Euler, Schedule type: SGM Uniform,"),
        ("EulerDiscreteScheduler", "Sampler: EulerDiscreteScheduler, CFG scale"),
    ],
)
def test_samplers_have_the_names_of_web_uis(scheduler: str, words: str) -> None:
    assert words in recipe.infotext(replace(made(), sampling=replace(made().sampling, scheduler=scheduler)))


def tidy(text: str) -> str:
    """As web UIs read a text: without blanks at the ends of its lines."""
    return "\n".join(line.strip() for line in text.split("\n"))


@given(TEXT, st.none() | TEXT, TEXT)
def test_an_infotext_is_read_back(prompt: str, negative: str | None, model: str) -> None:
    assume(recipe.NEGATIVE not in prompt)
    values = recipe.parse(recipe.infotext(replace(made(prompt, negative), model=f"m{model}".strip())))
    assert values["Prompt"] == tidy(prompt).strip()
    assert values["Negative prompt"] == tidy(negative or "").strip()
    assert values["Model"] == f"m{model}".strip()
    assert (values["Seed"], values["Size-1"], values["Size-2"]) == (str(2**63 - 1), "64", "48")


@given(TEXT)
def test_any_text_is_read_as_an_infotext(text: str) -> None:
    values = recipe.parse(text)
    assert all(isinstance(value, str) for value in values.values())
    assert {"Prompt", "Negative prompt"} <= set(values)


def test_an_infotext_of_a_web_ui_is_read() -> None:
    values = recipe.parse(
        "a cat, 8k:\nin a box\nNegative prompt: (blurry:1.2)\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, "
        'CFG scale: 7, Seed: 1, Size: 512x768, Model hash: 6ce0161689, Model: "v1, 5: \\"best\\"", '
        'Lora hashes: "fur: 0123, tail: 4567", Version: v1.10.1'
    )
    assert values == {
        "Prompt": "a cat, 8k:\nin a box", "Negative prompt": "(blurry:1.2)", "Steps": "20", "Sampler": "DPM++ 2M",
        "Schedule type": "Karras", "CFG scale": "7", "Seed": "1", "Size-1": "512", "Size-2": "768",
        "Model hash": "6ce0161689", "Model": 'v1, 5: "best"', "Lora hashes": "fur: 0123, tail: 4567",
        "Version": "v1.10.1",
    }  # fmt: skip


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_every_format_says_the_same(format: str) -> None:
    png = recipe.encode(Image.new("RGB", (64, 48)), made("a cat, größer: 3"))
    assert recipe.texts(recipe.convert(png, format, 80))["parameters"] == recipe.infotext(made("a cat, größer: 3"))


def test_a_damaged_exif_block_says_nothing() -> None:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + "a cat".encode("utf-16-be")
    whole = exif.tobytes()
    for length in range(len(whole)):
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "PNG", exif=whole[:length])
        with warnings.catch_warnings(action="ignore"):  # Pillow's own of what is cut off
            said = recipe.texts(file.getvalue())
        assert "a cat".startswith(said.get("parameters", ""))


@pytest.mark.parametrize("content", [b"", b"hello"])
def test_a_file_that_is_no_picture(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(InvalidPicture, match="not a picture, a clip or a sound, or damaged"):
        recipe.read(tmp_path / "x.png")


def test_a_picture_without_a_recipe(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(InvalidPicture, match="contains no recipe"):
        recipe.read(tmp_path / "x.png")


def test_a_side_that_the_format_does_not_have_is_refused() -> None:
    png = recipe.encode(Image.new("RGB", (16400, 8)), made())
    with pytest.raises(InvalidRequest, match="16383") as caught:
        recipe.convert(png, "webp")
    assert caught.value.param == "output_format"

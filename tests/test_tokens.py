"""A text longer than its encoder reads is drawn, and the caller is told how much was cut."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from diffusers import DiffusionPipeline

from sfumato.config import ModelConfig
from sfumato.core import Generation
from sfumato.drawing.draw import draw
from sfumato.models import load
from sfumato.pictures.images import decoded
from sfumato.pipelines import tokens
from sfumato.sampling import Sampling
from sfumato.serving.catalog import EMBEDDED, Catalog
from support import tiny
from support.drawing import quiet

BUILD: dict[str, Any] = {
    "sd": tiny.stable_diffusion,
    "xl": tiny.stable_diffusion_xl,
    "sd3": tiny.stable_diffusion_3,
    "flux": tiny.flux,
    "pixart": tiny.pixart,
    "ddpm": tiny.ddpm,
}


@functools.cache
def pipeline(name: str) -> DiffusionPipeline:
    pipe = BUILD[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def letters(count: int) -> str:
    """A text of so many tokens for the tiny CLIP tokenizer, its two marks not counted."""
    return "a " * count


CASES: list[tuple[str, dict[str, Any], str, str | None, tuple[str, ...]]] = [
    ("sd", {}, letters(75), letters(75), ()),
    ("sd", {}, letters(118), None, ("prompt: 43 of 120 tokens were cut off; the text encoder of m takes 77",)),
    # Either is cut at its own end, whatever the other's length: row 23.
    ("sd", {}, letters(8), letters(118),
     ("negative_prompt: 43 of 120 tokens were cut off; the text encoder of m takes 77",)),
    ("xl", {}, letters(76), None, ("prompt: 1 of 78 tokens were cut off; the text encoder of m takes 77",)),
    # T5 reads what CLIP does not. Its toy tokenizer has a token for each letter and each space.
    ("sd3", {}, "a" * 200, None, ()),
    ("sd3", {}, "a" * 300, None, ("prompt: 46 of 302 tokens were cut off; the text encoder of m takes 256",)),
    ("flux", {"max_sequence_length": 100}, "a" * 200, None,
     ("prompt: 102 of 202 tokens were cut off; the text encoder of m takes 100",)),
    ("flux", {}, "a" * 200, None, ()),
    ("pixart", {}, "a" * 299, None, ("prompt: 1 of 301 tokens were cut off; the text encoder of m takes 300",)),
    ("ddpm", {}, letters(999), None, ()),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "prompt", "negative", "told"), CASES)
def test_what_is_cut(
    name: str, options: dict[str, Any], prompt: str, negative: str | None, told: tuple[str, ...]
) -> None:
    assert tokens.count(pipeline(name), options, "m", prompt, negative)[1] == told


def test_an_encoder_that_was_left_out_reads_nothing() -> None:
    without = tiny.stable_diffusion_3()
    without.register_modules(text_encoder_3=None)
    assert tokens.capacity(pipeline("sd3"), {}) == 256
    assert tokens.capacity(without, {}) == 77


def test_a_tokenizer_without_a_limit_warns_of_nothing() -> None:
    pipe = tiny.stable_diffusion()
    pipe.tokenizer.model_max_length = int(1e30)  # what transformers puts for "not told"
    assert tokens.capacity(pipe, {}) is None
    assert tokens.count(pipe, {}, "m", letters(999), None)[1] == ()


def test_a_tokenizer_that_cannot_count_costs_no_picture() -> None:
    class Odd(type(tiny.clip_tokenizer())):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    pipe = tiny.stable_diffusion()
    pipe.tokenizer.__class__ = Odd
    assert tokens.count(pipe, {}, "m", letters(999), None)[1] == ()


SMALL = {"steps": 2, "width": 64, "height": 64}


def test_row_23_a_long_negative_prompt_beside_a_short_prompt_is_drawn_with_a_warning() -> None:
    model = load.Loaded(ModelConfig(name="m", model="m"), pipeline("sd"), "m", "cpu", "fp32")
    asked = Generation("1", letters(8), 1, Sampling(negative_prompt=letters(118), **SMALL))
    done = draw(model, asked, quiet)
    (warning,) = done.warnings
    assert warning == "negative_prompt: 43 of 120 tokens were cut off; the text encoder of m takes 77"
    # The first 77 are all that is heard.
    heard = Generation("2", letters(8), 1, Sampling(negative_prompt=letters(75), **SMALL))
    same = draw(model, heard, quiet)
    assert same.warnings == ()
    assert pixels(same.file) == pixels(done.file)


def test_the_embedded_model_tells() -> None:
    model = load.load(Catalog([EMBEDDED]).get("sfumato-tiny"), "cpu", quiet)
    room = tokens.capacity(model.pipeline, {})
    assert room is not None
    text = "cat " * 200
    count = len(model.pipeline.tokenizer(text, verbose=False).input_ids)
    assert count > room
    done = draw(model, Generation("1", text, 1, Sampling(steps=1)), quiet)
    assert done.warnings == (
        f"prompt: {count - room} of {count} tokens were cut off; the text encoder of sfumato-tiny takes {room}",
    )
    assert draw(model, Generation("1", "a cat", 1, Sampling(steps=1)), quiet).warnings == ()


def pixels(png: bytes) -> bytes:
    return decoded(png).tobytes()

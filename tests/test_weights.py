"""Row 13 of the cases that failed: AUTOMATIC1111's weights, BREAK and long prompts."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sfumato
import sfumato.commands.generate as command
from sfumato.api.openai.bodies import GenerationsBody
from sfumato.batching import views
from sfumato.core import Done
from sfumato.drawing import weights
from sfumato.drawing.draw import draw
from sfumato.drawing.emphasis import HEAVIEST, parse
from sfumato.errors import InvalidRequest
from sfumato.pictures.images import decoded
from support import tiny
from support.drawing import loaded, quiet, wanted

MARKED = "a (cat:1.5) ((dog)) [bird] BREAK x"

PIPELINES: dict[str, Any] = {"sd": tiny.stable_diffusion(), "xl": tiny.stable_diffusion_xl(), "flux": tiny.flux()}

PARSED = [
    (MARKED, [[("a ", 1), ("cat", 1.5), (" ", 1), ("dog", 1.21), (" ", 1), ("bird", 0.909)], [("x", 1)]]),
    (r"a \(cat\) \[b\] \\ c", [[(r"a (cat) [b] \ c", 1)]]),
    (r"(\(a\):1.2)", [[("(a)", 1.2)]]),
    ("a) b] c", [[("a) b] c", 1)]]),
    ("(a (b c", [[("a ", 1.1), ("b c", 1.21)]]),
    ("([a b)] c", [[("a b] c", 1)]]),
    ("((a:1.2) b:1.5)", [[("a", 1.8), (" b", 1.5)]]),
    ("f:1.5) 1:2 (a:b)", [[("f:1.5) 1:2 ", 1), ("a:b", 1.1)]]),
    ("BREAKFAST (BREAK x:2)", [[("BREAKFAST ", 1)], [("x", 2)]]),
    ("(a:.5) (b:-1)", [[("a", 0.5), (" ", 1), ("b", -1)]]),
    ("[a|b] [a:b:0.5] [b:0.5]", [[("[a|b] [a:b:0.5] [b:0.5]", 1)]]),
    ("a [lamp|neon] (b)", [[("a [lamp|neon] ", 1), ("b", 1.1)]]),
    ("", [[]]),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "parts"), PARSED)
def test_the_markup_is_a1111_s(prompt: str, parts: list[list[tuple[str, float]]]) -> None:
    read = [[(each.text, round(each.weight, 3)) for each in part] for part in parse(prompt).parts]
    assert read == [[each for each in part if each[0].strip()] for part in parts]


def test_what_was_found_is_told() -> None:
    assert parse(MARKED).markup == ("(cat:1.5)", "((dog))", "[bird]", "BREAK")
    assert parse("[a|b] x AND y [c:0.5]").unread == ("AND", "[a|b]", "[c:0.5]")
    assert parse("a cat, 35mm f/1.8").markup == parse("a cat").unread == ()


@given(st.text(st.sampled_from("()[]\\:|. BREAK1ab"), max_size=60))
def test_no_text_is_an_error(prompt: str) -> None:
    emphasis = parse(prompt)
    assert all(abs(each.weight) <= HEAVIEST and each.text.strip() for part in emphasis.parts for each in part)
    if not set(prompt) & set("()[]\\") and "BREAK" not in prompt:
        assert emphasis.plain.strip() == prompt.strip()


@pytest.mark.parametrize("piece", ["(a", "a)", "[a", "([", "\\", "(a:1.5)", "BREAK ", "[a|", "[:"])
def test_a_long_text_is_read_in_time(piece: str) -> None:
    began = time.process_time()
    parse(piece * (32_000 // len(piece)))
    assert time.process_time() - began < 5


def drawn(kind: str, prompt: str, **more: Any) -> Done:
    fields = {"width": 64, "height": 64, "guidance_scale": 5.0, "weights": True, "prompt": prompt}
    return draw(loaded(PIPELINES[kind]), wanted(**{**fields, **more}), quiet)


def pixels(done: Done) -> Any:
    return np.asarray(decoded(done.file)).astype(int)


def same(one: Done, other: Done) -> bool:
    return bool(np.abs(pixels(one) - pixels(other)).max() <= 1)


@pytest.mark.parametrize("kind", ["sd", "xl"])
@pytest.mark.parametrize("clip_skip", [None, 1, 3])
def test_a_weight_of_one_changes_nothing(kind: str, clip_skip: int | None) -> None:
    """So the embeddings are those of the pipeline: layer, norm, pooled and negative ones."""
    more = {"clip_skip": clip_skip, "negative_prompt": "dog"}
    plain = drawn(kind, "a cat", **more, weights=False)
    pipeline = PIPELINES[kind]
    call = {"prompt": "a cat", "negative_prompt": "dog", "clip_skip": clip_skip}
    view = views.view(pipeline)
    try:
        encoders = [(getattr(view, one), getattr(view, other)) for one, other in weights.encoders(view)]
        made = weights._arguments(view, encoders, {field: parse(str(call[field])) for field in weights.FIELDS}, call)
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        more = {"clip_skip": clip_skip} if kind == "sd" else {"prompt_2": None, "clip_skip": clip_skip}
        own = view.encode_prompt("a cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True,
                                 negative_prompt="dog", **more)  # fmt: skip
        for name, theirs in zip(names, own, strict=False):
            assert torch.allclose(made[name], theirs, atol=1e-5), name
    finally:
        views.close(view)
    assert same(drawn(kind, "a (cat:1.0)", **{"clip_skip": clip_skip, "negative_prompt": "dog"}), plain)


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_weights_change_the_picture(kind: str) -> None:
    plain = drawn(kind, "a cat")
    prompts = ["a (cat:1.5)", "a (cat)", "a [cat]", "a (cat:0.3)", "a BREAK cat", "a (cat:0)"]
    pictures = [drawn(kind, prompt) for prompt in prompts]
    for prompt, done in zip(prompts, pictures, strict=True):
        assert (pixels(done) != pixels(plain)).any(), prompt
        assert (done.warnings, done.recipe.prompt, done.recipe.weights) == ((), prompt, True)
    negative, heavier = (drawn(kind, "a cat", negative_prompt=text) for text in ("dog", "(dog:1.5)"))
    assert (pixels(negative) != pixels(heavier)).any()


@pytest.mark.parametrize("kind", [tiny.stable_diffusion, tiny.stable_diffusion_xl])
def test_in_half_precision(kind: Any) -> None:
    model = loaded(kind().to(torch.bfloat16))
    size = {"width": 64, "height": 64}
    pictures = [draw(model, wanted(prompt=prompt, weights=True, **size), quiet) for prompt in (MARKED, "a cat")]
    assert (pixels(pictures[0]) != pixels(pictures[1])).any()


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_what_is_not_weighted_is_a_text_as_on_other_routes(kind: str) -> None:
    for negative in (None, "dog"):
        plain = drawn(kind, "a cat", negative_prompt=negative, weights=False)
        asked = drawn(kind, "a cat", negative_prompt=negative)
        assert asked.file == plain.file and not asked.recipe.weights
    escaped = drawn(kind, r"a \(cat\)")
    assert same(escaped, drawn(kind, "a (cat)", weights=False))
    assert (escaped.recipe.prompt, escaped.recipe.weights) == (r"a \(cat\)", True)


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_long_prompts_are_read_to_their_end(kind: str) -> None:
    long = "a cat, " * 30  # a token for each letter
    assert not same(drawn(kind, long + "x"), drawn(kind, long + "y"))
    assert drawn(kind, long + "x").warnings == ()
    other = drawn(kind, long + "x", weights=False)
    assert "cut off" in other.warnings[0]
    assert same(other, drawn(kind, long + "y", weights=False))
    assert drawn(kind, "a cat", negative_prompt=long).warnings == ()  # both are made as long as the longer one


@pytest.mark.parametrize("prompt", ["a" * 20_000, "a, (b:1.2) " * 1000, "a BREAK " * 1000, "BREAK " * 1000])
def test_a_prompt_has_an_end(prompt: str) -> None:
    """A hostile one would else fill the memory at every step."""
    pipeline = PIPELINES["sd"]
    call, warnings = weights.read(loaded(pipeline), pipeline, {"prompt": prompt})
    assert call["prompt_embeds"].shape[1] <= 77 * (weights.MAX_CHUNKS + 1)
    assert call["prompt_embeds"].shape == call["negative_prompt_embeds"].shape
    assert [each.partition(" ")[0] for each in warnings] == ([] if "a" not in prompt else ["prompt:"])
    assert not warnings or "cut off" in warnings[0]


def test_weights_below_one_are_counted() -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt: 65 pieces .*; at most 64 are allowed"):
        drawn("sd", "[a] b " * 65)


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_model_without_weights_says_what_it_found(field: str) -> None:
    model = loaded(PIPELINES["flux"], option_lines=(("true_cfg_scale", "4.0"),))
    prompts = {"prompt": "a cat"} | {field: MARKED + r" \(z\)"}
    done = draw(model, wanted(weights=True, width=64, height=64, **prompts), quiet)
    (warning,) = [each for each in done.warnings if "weights are for" in each]
    assert warning.startswith(f"{field}: '(cat:1.5)', '((dog))', '[bird]', 'BREAK' is read as text")


def test_what_no_model_reads_is_told() -> None:
    assert drawn("sd", "[cat:dog:0.5] AND x").warnings == ("prompt: 'AND', '[cat:dog:0.5]' is read as text",)


@pytest.mark.slow
def test_weighted_requests_share_forwards() -> None:
    """And each is the picture that it is alone, whatever the lengths of their prompts."""
    pipeline = PIPELINES["sd"]
    prompts = ["a (cat:1.5)", "a (dog:0.5) x", "a cat", "a cat BREAK (x)"]
    texts = [{"prompt": prompt, "negative_prompt": None} for prompt in prompts]
    calls = [weights.read(loaded(pipeline), pipeline, text)[0] for text in texts]
    more = {"num_inference_steps": 3, "output_type": "np", "width": 64, "height": 64}

    def made() -> list[dict[str, Any]]:
        return [call | more | {"generator": torch.Generator().manual_seed(1)} for call in calls]

    alone = [sfumato.gather(pipeline, [each])[0].images for each in made()]
    stats: dict[str, dict[str, Any]] = {}
    together = [each.images for each in sfumato.gather(pipeline, made(), stats=stats)]
    assert stats["unet"]["calls"] > stats["unet"]["forwards"]
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one - other).max() < 1e-4


def test_it_is_made_again_from_its_recipe() -> None:
    first = drawn("sd", MARKED, negative_prompt="(dog:1.2)")
    again = command._as_request(first.recipe)
    assert again["weights"] is True
    second = draw(
        loaded(PIPELINES["sd"]),
        replace(wanted(prompt=again["prompts"][0], weights=again["weights"]), sampling=again["sampling"]),
        quiet,
    )
    assert second.file == first.file


def test_on_other_routes_the_markup_is_text_with_a_warning_unless_the_key_is_sent() -> None:
    body = {"prompt": "a (cat:1.5), (really) big", "negative_prompt": "x BREAK y"}
    plain, keyed = (GenerationsBody(**body, **more).to_request() for more in ({}, {"prompt_weights": True}))
    assert (plain.weights, keyed.weights) == (False, True)
    pictures = {}
    for name, read in (("plain", False), ("read", True)):
        model = loaded(PIPELINES["sd"])
        done = draw(model, wanted(**body, weights=read, width=64, height=64), quiet)
        pictures[name] = done
    told = pictures["plain"].warnings
    assert told[0].startswith("prompt: '(cat:1.5)' is read as text; weights are read with `prompt_weights: true`")
    assert told[1].startswith("negative_prompt: 'BREAK' is read as text")
    assert len(told) == 2
    assert pictures["read"].warnings == ()
    assert not np.array_equal(*(np.asarray(decoded(done.file)) for done in pictures.values()))

"""Row 29 of the cases that failed: textual inversions in prompts, each for the requests that name it alone."""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sfumato.commands.generate as command
from sfumato.checkpoints import embeddings
from sfumato.core import Done
from sfumato.drawing import inversions, two_passes
from sfumato.drawing.draw import draw
from sfumato.errors import InvalidRequest
from sfumato.models.load import Loaded
from sfumato.pictures import recipe
from sfumato.pictures.images import decoded
from sfumato.sampling import Hires, Sampling
from support import tiny
from support.drawing import loaded, quiet, wanted
from support.inside import Inside

MAKERS: dict[str, Any] = {"sd": tiny.stable_diffusion, "xl": tiny.stable_diffusion_xl}


def rows(count: int, features: int = tiny.WIDTH, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of embeddings for both models, of another size, damaged, and pickled."""
    place = tmp_path / embeddings.FOLDER
    (place / "more").mkdir(parents=True)
    save_file({"emb_params": rows(2)}, place / "easy-negative.safetensors")
    save_file({"<cat-toy>": rows(1, seed=1)[0]}, place / "more" / "CatToy.safetensors")
    widths = [each.config.hidden_size for each in (MODELS["xl"].text_encoder, MODELS["xl"].text_encoder_2)]
    save_file({"clip_l": rows(2, widths[0]), "clip_g": rows(2, widths[1])}, place / "both.safetensors")
    save_file({"emb_params": rows(1, 7)}, place / "wide.safetensors")
    (place / "broken.safetensors").write_bytes(b"no header")
    torch.save({"string_to_param": {"*": rows(1, seed=2)}, "name": "old"}, place / "old.pt")
    torch.save({"<new>": rows(1, seed=2)[0]}, place / "new.bin")
    return tmp_path


MODELS: dict[str, Any] = {kind: make() for kind, make in MAKERS.items()}


def model_of(kind: str, folder: Path, **fields: Any) -> Loaded:
    return loaded(MAKERS[kind](), folder=folder, **fields)


def drawn(model: Loaded, prompt: str, **more: Any) -> Done:
    fields = {"width": 64, "height": 64, "guidance_scale": 5.0, "prompt": prompt}
    return draw(model, wanted(**{**fields, **more}), quiet)


def pixels(done: Done) -> Any:
    return np.asarray(decoded(done.file)).astype(int)


def plain(kind: str, load: dict[str, torch.Tensor], prompt: str, **more: Any) -> Any:
    """The picture of diffusers alone, with the token `sks`."""
    pipeline = MAKERS[kind]()
    pipeline.set_progress_bar_config(disable=True)
    for number, tensor in enumerate(load.values()):
        suffix = "_2" if number else ""
        pipeline.load_textual_inversion(
            {"sks": tensor}, token="sks", tokenizer=getattr(pipeline, f"tokenizer{suffix}"),
            text_encoder=getattr(pipeline, f"text_encoder{suffix}"),
        )  # fmt: skip
    call = {"num_inference_steps": 2, "width": 64, "height": 64, "guidance_scale": 5.0}
    image = pipeline(prompt, generator=torch.Generator().manual_seed(1), **call, **more).images[0]
    return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("name", ["embedding:easy-negative", "easy-negative", "Embedding:Easy-Negative.safetensors"])
def test_the_picture_is_that_of_diffusers(name: str, folder: Path) -> None:
    model = model_of("sd", folder)
    expected = plain("sd", {"": rows(2)}, "a cat", negative_prompt="a, sks")
    done = drawn(model, "a cat", negative_prompt=f"a, {name}")
    assert np.abs(pixels(done) - expected).max() <= 1
    assert done.warnings == ()
    expected = plain("sd", {"": rows(2)}, "a sks b")
    assert np.abs(pixels(drawn(model, f"a {name} b")) - expected).max() <= 1


def test_both_encoders_of_xl(folder: Path) -> None:
    widths = [each.config.hidden_size for each in (MODELS["xl"].text_encoder, MODELS["xl"].text_encoder_2)]
    expected = plain("xl", {"l": rows(2, widths[0]), "g": rows(2, widths[1])}, "a sks b")
    assert np.abs(pixels(drawn(model_of("xl", folder), "a both b")) - expected).max() <= 1


def test_as_the_engine_calls_it(folder: Path) -> None:
    """In inference mode, one after another, and a weight that is set afterwards as adapters do."""
    model = model_of("sd", folder)
    with torch.inference_mode():
        pictures = [drawn(model, name) for name in ("cattoy", "easy-negative", "cattoy easy-negative")]
    assert not model.pipeline.text_encoder.get_input_embeddings().weight.is_inference()
    model.pipeline.text_encoder.get_input_embeddings().weight.data[0] += 0
    outside = model_of("sd", folder)
    for name, done in zip(("cattoy", "easy-negative", "cattoy easy-negative"), pictures, strict=True):
        assert np.abs(pixels(drawn(outside, name)) - pixels(done)).max() <= 1


def test_encoders_that_two_models_share(folder: Path) -> None:
    """Each has a tokenizer of its own."""
    one, other = model_of("sd", folder), model_of("sd", folder)
    other.pipeline.text_encoder = one.pipeline.text_encoder
    expected = [drawn(model_of("sd", folder), name) for name in ("cattoy", "easy-negative")]
    for model, name, done in ((one, "cattoy", 0), (other, "easy-negative", 1), (one, "easy-negative", 1),
                              (other, "cattoy", 0), (one, "cattoy", 0)):  # fmt: skip
        assert np.abs(pixels(drawn(model, name)) - pixels(expected[done])).max() <= 1


def test_an_embedding_is_in_a_shared_encoder_once(folder: Path) -> None:
    """Also when a model is loaded again, with a new tokenizer, beside one that shares its encoder."""
    one = model_of("sd", folder)
    encoder = one.pipeline.text_encoder
    expected = {name: pixels(drawn(one, name)) for name in ("cattoy", "easy-negative")}
    rows = encoder.get_input_embeddings().weight.shape[0]
    for names in (("easy-negative", "cattoy"), ("cattoy", "easy-negative")):
        again = model_of("sd", folder)
        again.pipeline.text_encoder = encoder
        for name in names:
            assert np.array_equal(pixels(drawn(again, name)), expected[name])
        assert encoder.get_input_embeddings().weight.shape[0] == rows


@pytest.mark.parametrize(("kind", "name"), [("sd", "cattoy"), ("xl", "both")])
def test_no_other_request_is_affected(kind: str, name: str, folder: Path) -> None:
    """Neither one that never named it, nor the same text on a model that has none."""
    model = model_of(kind, folder)
    before = drawn(model, "a cat")
    used = drawn(model, f"a cat {name}")
    assert (pixels(used) != pixels(before)).any()
    assert drawn(model, "a cat").file == before.file
    assert drawn(model, "a cat cattoyx both-ways").warnings == ()  # parts of words are words
    assert drawn(model, f"a cat {name}").file == used.file
    assert drawn(model, "<embedding>").warnings == ()


def test_a_changed_file_is_another_embedding(folder: Path) -> None:
    model, path = model_of("sd", folder), folder / "embeddings" / "easy-negative.safetensors"
    first = drawn(model, "easy-negative")
    save_file({"emb_params": rows(2, seed=5)}, path)
    os.utime(path, (1, 1))
    second = drawn(model, "easy-negative")
    assert (pixels(first) != pixels(second)).any()
    assert first.recipe.embeddings != second.recipe.embeddings


def test_it_can_be_weighted(folder: Path) -> None:
    model = model_of("sd", folder)
    once, heavy = (drawn(model, f"a ({name})", weights=True) for name in ("cattoy:1.0", "embedding:cattoy:1.6"))
    assert (pixels(once) != pixels(heavy)).any()
    assert np.abs(pixels(once) - pixels(drawn(model, "a cattoy"))).max() <= 1
    assert once.warnings == heavy.warnings == ()


REFUSED = [
    ("sd", "embedding:gone", "no embedding 'gone'"),
    ("sd", "embedding:wide", "wide.safetensors is for text encoders of 7 features; m has 32"),
    ("sd", "embedding:both", "is for text encoders of"),
    ("xl", "embedding:easy-negative", "is for text encoders of 32 features; m has"),
    ("sd", "embedding:broken", "broken.safetensors cannot be read"),
    ("sd", "embedding:old", "old.pt is a pickle.*allow_pickle"),
]


@pytest.mark.parametrize(("kind", "name", "message"), REFUSED)
@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_what_cannot_be_used_is_refused_or_warned_of(
    kind: str, name: str, message: str, field: str, folder: Path
) -> None:
    model = model_of(kind, folder)
    asked = wanted(**{"width": 64, "height": 64, "prompt": "a cat", field: f"a {name}, b"})
    with pytest.raises(InvalidRequest, match=f"^{field}: .*{message}") as caught:
        draw(model, asked, quiet)
    assert caught.value.param == field
    done = draw(model, replace(asked, webui=True), quiet)
    (warning,) = done.warnings
    assert warning.startswith(f"{field}: ") and "read as text" in warning
    assert done.recipe.embeddings == ()
    bare = name.partition(":")[2]
    told = draw(model, wanted(**{"width": 64, "height": 64, "prompt": "a cat", field: bare}), quiet).warnings
    assert [each.partition(":")[0] for each in told] == ([] if bare == "gone" else [field])


def test_other_models_say_so(folder: Path) -> None:
    model = loaded(tiny.flux(), folder=folder)
    with pytest.raises(InvalidRequest, match="takes none"):
        drawn(model, "embedding:cattoy", guidance_scale=None)
    assert "takes none" in drawn(model, "cattoy", guidance_scale=None).warnings[0]


@pytest.mark.parametrize("name", ["old", "new"])
def test_a_pickle_that_is_allowed(name: str, folder: Path) -> None:
    done = drawn(model_of("sd", folder, allow_pickle=True), f"a {name} b")
    assert np.abs(pixels(done) - plain("sd", {"": rows(1, seed=2)}, "a sks b")).max() <= 1


def test_the_recipe_has_its_hash(folder: Path) -> None:
    model, path = model_of("sd", folder), folder / "embeddings" / "easy-negative.safetensors"
    done = drawn(model, "a embedding:easy-negative")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert done.recipe.embeddings == (f"easy-negative:{digest}",)
    assert done.recipe.prompt == "a embedding:easy-negative"
    image = Image.open(io.BytesIO(done.file))
    assert f'TI hashes: "easy-negative: {digest[:10]}"' in image.info["parameters"]
    stored = json.loads(image.info["sfumato"])
    assert recipe.from_json(stored) == done.recipe
    assert "embeddings" not in json.loads(json.dumps(recipe.as_json(drawn(model, "a cat").recipe)))
    again = command._as_request(done.recipe)
    second = draw(model, replace(wanted(prompt=again["prompts"][0]), sampling=again["sampling"]), quiet)
    assert second.file == done.file


def test_the_recipe_of_two_passes_has_those_of_both(folder: Path) -> None:
    second = Sampling(width=64, height=64, strength=0.5)
    hires = Hires(upscaler="Lanczos", sampling=second, prompt="a CatToy, easy-negative")
    asked = wanted(prompt="a easy-negative", width=64, height=64, hires=hires)
    done = two_passes.picture(model_of("sd", folder), asked, quiet)
    assert [each.split(":")[0] for each in done.recipe.embeddings] == ["easy-negative", "CatToy"]


def test_the_random_numbers_of_others_are_left_alone(folder: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    model = model_of("sd", folder)
    torch.manual_seed(3)
    inversions.read(model, model.pipeline, {"prompt": "cattoy"}, lenient=False)
    assert torch.equal(torch.rand(3), expected)


def test_they_are_listed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    inside = Inside(tmp_path_factory.mktemp("inside"), models=folder)
    with inside.client() as client:
        answer = client.get("/sdapi/v1/embeddings").json()
    assert set(answer["skipped"]) == {"broken", "old", "new"}
    assert {name: (each["vectors"], each["shape"]) for name, each in answer["loaded"].items()} == {
        "easy-negative": (2, 32), "CatToy": (1, 32), "wide": (1, 7),
        "both": (2, sum(each.config.hidden_size for each in (MODELS["xl"].text_encoder, MODELS["xl"].text_encoder_2))),
    }  # fmt: skip

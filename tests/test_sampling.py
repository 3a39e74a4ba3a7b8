"""One table of parameters: each field arrives from every door, and stands in recipe, lists and docs.

The tests walk `fields(Sampling)`, so that a parameter that is added is tested at every door, too.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from typer.testing import CliRunner

import sfumato
import sfumato.commands.generate as command
from sfumato import schedulers
from sfumato.api import file_parameters as files
from sfumato.api.openai.bodies import GenerationsBody
from sfumato.cli import app
from sfumato.config import ModelConfig, load, reference
from sfumato.core import Done, Generation, Limits, Recipe
from sfumato.drawing import arguments
from sfumato.drawing.draw import draw
from sfumato.drawing.info import model_info
from sfumato.errors import InvalidRequest
from sfumato.formats import IMAGE, PICTURE, VIDEO
from sfumato.models.load import Loaded
from sfumato.pictures import recipe
from sfumato.pictures.images import decoded
from sfumato.process import wire
from sfumato.sampling import NAMED, OF_PICTURES, PARAMETERS, Parameter, Sampling, flat, merged, nested
from sfumato.serving.planning import ImageRequest, plan
from support import tiny
from support.inside import Inside, Painter

DOCS = Path(__file__).parent.parent / "docs"
LIMITS = Limits(2048 * 2048, 4096, 8)
EVERY = [pytest.param(each, id=each.name) for each in OF_PICTURES]
ALL = [pytest.param(each, id=each.name) for each in PARAMETERS]
"""Also those of clips and sounds alone."""
ENABLED = ",".join(["image", *(str(each.argument) for each in PARAMETERS if each.guarded)])


def value_of(parameter: Parameter) -> Any:
    """One that is no default and no neutral value."""
    if parameter.kind is str:
        return parameter.example or "dark"
    if IMAGE not in parameter.of:
        return parameter.kind(parameter.example)
    if parameter.side:
        return 64 if parameter.name == "width" else 128
    if parameter.name == "guidance_end":
        return 0.75  # behind the start
    least = parameter.least or 0
    return parameter.kind(least + 2) if parameter.kind is int else (parameter.most or 1.0) / 4


def format_of(parameter: Parameter) -> str:
    """Of a request that may have it."""
    return PICTURE if IMAGE in parameter.of else "gif" if VIDEO in parameter.of else "wav"


WHOLE = Sampling(**{each.name: value_of(each) for each in OF_PICTURES})


def picture(side: int = 64) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(file, "PNG")
    return file.getvalue()


SOURCE = base64.b64encode(picture()).decode()


def made(sampling: Sampling = WHOLE, **more: Any) -> Recipe:
    return Recipe(
        model="m", source="some/one", pipeline="StableDiffusionPipeline", prompt="a cat", seed=1, sampling=sampling,
        image_sha256=("ab",), mask_sha256=None, device="cpu", dtype="fp32", **more,
    )  # fmt: skip


def test_every_field_is_described() -> None:
    assert [each.name for each in PARAMETERS] == [spec.name for spec in fields(Sampling)] == list(NAMED)
    assert all(each.kind in (int, float, str) and each.help and each.flag.startswith("--") for each in PARAMETERS)
    for names in ("argument", "a1111", "infotext", "invoke", "flag"):
        given = [getattr(each, names) for each in PARAMETERS if getattr(each, names)]
        assert len(given) == len(set(given)), names
    everywhere = [name for each in PARAMETERS for name in (each.name, *each.aliases)]
    assert len(everywhere) == len(set(everywhere))


# The doors


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Inside:
    folder = tmp_path_factory.mktemp("inside")
    inside = Inside(folder)
    (folder / "models" / "m.yaml").write_text(
        f"name: m\nparameters: {{model: some/one}}\ndiffusers: {{enable_parameters: '{ENABLED}'}}\n"
    )
    return inside


def seen(inside: Inside, path: str, **body: Any) -> Sampling:
    """What the engine is given of a request."""
    inside.engine.seen.clear()
    with inside.client() as client:
        answer = client.post(path, **body)
    assert answer.status_code == 200, answer.text
    assert "x-sfumato-ignored" not in answer.headers
    (generation,) = inside.engine.seen
    return generation.sampling


def said_of(parameter: Parameter) -> dict[str, Any]:
    """What stands beside a parameter in a request of OpenAI's kind: the other side, or the picture that it needs."""
    return {"image": SOURCE} if parameter.source else {}


@pytest.mark.parametrize("parameter", EVERY)
def test_openai_json(inside: Inside, parameter: Parameter) -> None:
    value = value_of(parameter)
    if parameter.side:
        assert seen(inside, "/v1/images/generations", json={"prompt": "a", "size": "64x128"})[parameter] == value
        return
    for name in (parameter.name, *parameter.aliases):
        body = {"prompt": "a", name: value, **said_of(parameter)}
        assert seen(inside, "/v1/images/generations", json=body) == Sampling(**{parameter.name: value})


@pytest.mark.parametrize("place", ["top level", "extra_body"])
@pytest.mark.parametrize("parameter", EVERY)
def test_chat(inside: Inside, parameter: Parameter, place: str) -> None:
    value, path = value_of(parameter), "/v1/chat/completions"
    fields = {"size": "64x128"} if parameter.side else {parameter.name: value, **said_of(parameter)}
    fields = fields if place == "top level" else {"extra_body": fields}
    sampling = seen(inside, path, json={"messages": [{"role": "user", "content": "a"}], **fields})
    assert sampling[parameter] == value


@pytest.mark.parametrize("parameter", EVERY)
def test_hugging_face(inside: Inside, parameter: Parameter) -> None:
    size = {"width": value_of(NAMED["width"]), "height": value_of(NAMED["height"])}
    fields = size if parameter.side else {parameter.name: value_of(parameter)}
    source = {"prompt": "a"} if parameter.source else {}
    body = {"inputs": SOURCE if source else "a", "parameters": {**fields, **source}}
    assert seen(inside, "/models/m", json=body)[parameter] == value_of(parameter)


def test_a_blank_name_does_not_hide_another() -> None:
    body = GenerationsBody.model_validate({"prompt": "a cat", "steps": "", "step": 20, "cfg_scale": " "})
    assert (body.to_request().sampling.steps, body.to_request().sampling.guidance_scale) == (20, None)


def test_openai_forms(inside: Inside) -> None:
    """All at once: every scalar of a form is a string."""
    form = {each.name: str(value_of(each)) for each in OF_PICTURES if not each.side} | {"size": "64x128", "prompt": "a"}
    assert seen(inside, "/v1/images/edits", data=form, files={"image": ("a.png", picture())}) == WHOLE


@pytest.mark.parametrize("parameter", EVERY)
def test_ollama(inside: Inside, parameter: Parameter) -> None:
    """Beside the prompt and in `options`."""
    value = value_of(parameter)
    for name in (parameter.name, *parameter.aliases):
        fields = {"width": 64, "height": 128} if parameter.side else {name: value}
        body = {"prompt": "a", "images": [SOURCE] if parameter.source else [], "stream": False}
        assert seen(inside, "/api/generate", json=body | fields)[parameter] == value
        assert seen(inside, "/api/generate", json=body | {"options": fields})[parameter] == value


@pytest.mark.parametrize("parameter", EVERY)
def test_a1111(inside: Inside, parameter: Parameter) -> None:
    value = value_of(parameter)
    sent = value + 1 if parameter.one_based else value
    if parameter.name == "scheduler":
        body: dict[str, Any] = {"sampler_name": "DPM++ 2M", "scheduler": "Karras"}
    else:
        body = {parameter.a1111 or parameter.name: sent}
    path = "txt2img"
    if parameter.source:
        path, body = "img2img", body | {"init_images": [SOURCE]}
    assert seen(inside, f"/sdapi/v1/{path}", json={"prompt": "a"} | body)[parameter] == value


def test_a1111_sizes_of_large_models(inside: Inside) -> None:
    assert seen(inside, "/sdapi/v1/txt2img", json={"prompt": "a", "width": 1024, "height": 1216}).size == (1024, 1216)


def test_a1111_values_that_ask_for_nothing(inside: Inside) -> None:
    for each in PARAMETERS:
        for neutral in each.neutral:
            assert seen(inside, "/sdapi/v1/txt2img", json={"prompt": "a", str(each.a1111): neutral}) == Sampling()


@pytest.mark.parametrize("parameter", ALL)
def test_command_line(parameter: Parameter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    painter = Painter()
    monkeypatch.setattr(command, "Local", lambda settings: painter)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source.png").write_bytes(picture())
    flags = ["--size", "64x128"] if parameter.side else [parameter.flag, str(value_of(parameter))]
    flags += ["--image", "source.png"] if parameter.source else []
    kind = "WanPipeline" if format_of(parameter) == "gif" else "AceStepPipeline"
    (tmp_path / "m.yaml").write_text(f"parameters: {{model: o/r}}\ndiffusers: {{pipeline_type: {kind}}}")
    named = ["-o", f"a.{format_of(parameter)}", "--models", str(tmp_path), "-m", "m"]
    flags += [] if IMAGE in parameter.of else named
    ran = CliRunner().invoke(app, ["generate", "a cat", *flags])
    assert ran.exit_code == 0, ran.output
    assert painter.seen[0].sampling[parameter] == value_of(parameter)


def of_file(parameter: Parameter, key: str) -> str:
    section, _, word = key.rpartition(".")
    line = f"{word}: {json.dumps(value_of(parameter))}"
    sections = {"diffusers": f"enable_parameters: '{ENABLED}'", "parameters": "model: some/one"}
    if section:
        sections[section] += f", {line}"
    text = "".join(f"{name}: {{{inner}}}\n" for name, inner in sections.items())
    return text if section else f"{text}{line}\n"


@pytest.mark.parametrize("parameter", ALL)
def test_model_file(parameter: Parameter, tmp_path: Path) -> None:
    """Each key; and the default is in a generation that says nothing, for which a request can say another."""
    for key in parameter.keys or ("size",):
        text = of_file(parameter, key) if parameter.keys else 'parameters: {model: some/one}\nsize: "64x128"\n'
        (tmp_path / "m.yaml").write_text(text)
        (config,) = load(tmp_path / "m.yaml")
        assert config.sampling[parameter] == value_of(parameter), key
        made = {"format": format_of(parameter), "images": (picture(),) if parameter.source else ()}
        filled = arguments.fill(loaded(config), PIPELINE, asked(**made))
        assert filled.sampling[parameter] == value_of(parameter), key
        other = value_of(parameter) * 2
        own = asked(**made, sampling=Sampling(**{parameter.name: other}))
        assert arguments.fill(loaded(config), PIPELINE, own).sampling[parameter] == other


@pytest.mark.parametrize("parameter", ALL)
def test_limits(parameter: Parameter) -> None:
    if parameter.most is None or parameter.kind is str:
        assert parameter.side or parameter.kind is str  # `refuse_size` and `schedulers.parse` say what is valid
        return
    config = ModelConfig(name="m", model="m", enable_parameters=frozenset(ENABLED.split(",")))
    for wrong in ((parameter.least or 0) - 1, parameter.most + 1, float("nan")):
        request = ImageRequest(
            prompts=["a"], sampling=Sampling(**{parameter.name: wrong}), images=[picture()], format=format_of(parameter)
        )
        with pytest.raises(InvalidRequest, match=f"^{parameter.name}: .*; .* to .* are valid$") as caught:
            plan(request, config, LIMITS, 1)
        assert caught.value.param == parameter.name


# The ways back


def test_a_recipe_is_flat_json_and_comes_back() -> None:
    text = json.dumps(recipe.as_json(made()))
    values = json.loads(text)
    assert values | flat(WHOLE) == values
    assert "sampling" not in values
    assert recipe.from_json(values) == made()
    assert files.read({recipe.RECIPE_CHUNK: text}).fields == flat(WHOLE) | {
        "model": "m",
        "prompt": "a cat",
        "seed": 1,
    }


def test_a_recipe_has_only_what_was_set_of_newer_parameters() -> None:
    names = set(recipe.as_json(made(Sampling())))
    assert {each.name for each in PARAMETERS if each.reported} <= names
    assert not names & {each.name for each in PARAMETERS if not each.reported}


def test_an_infotext_comes_back() -> None:
    fields = files.read({recipe.INFOTEXT_CHUNK: recipe.infotext(made())}).fields
    assert fields == flat(WHOLE) | {"model": "m", "prompt": "a cat", "seed": 1}
    assert ", Eta: 0.25, CFG Rescale: 0.25, CFG start: 0.25, CFG end: 0.75, Version" in recipe.infotext(made())


EARLIER = {
    "model": "m", "source": "some/one", "pipeline": "StableDiffusionPipeline", "prompt": "a cat",
    "negative_prompt": "dog", "width": 64, "height": 48, "steps": 20, "guidance_scale": 7.5, "seed": 7,
    "scheduler": "euler_a", "clip_skip": 2, "strength": None, "image_sha256": [], "mask_sha256": None, "device": "cpu",
    "dtype": "fp32", "versions": {"torch": "2"}, "savings": [], "masked_area": None, "priority": 1,
}  # fmt: skip
"""As pictures have it that were made before there was a `Sampling`; the last field was dropped since."""


def test_pictures_of_earlier_versions_are_read(tmp_path: Path) -> None:
    image, chunks = Image.new("RGB", (64, 48)), recipe.PngImagePlugin.PngInfo()
    chunks.add_text(recipe.RECIPE_CHUNK, json.dumps(EARLIER))
    image.save(tmp_path / "earlier.png", pnginfo=chunks)
    read = recipe.read(tmp_path / "earlier.png")
    assert read.sampling == Sampling(
        negative_prompt="dog", width=64, height=48, steps=20, guidance_scale=7.5, scheduler="euler_a", clip_skip=2
    )
    assert (read.seed, read.image_sha256, read.size) == (7, (), (64, 48))
    again = json.loads(json.dumps(recipe.as_json(read)))
    assert again == {key: value for key, value in EARLIER.items() if key != "priority"}
    told = files.read({recipe.RECIPE_CHUNK: json.dumps(EARLIER)}).fields
    assert (told["steps"], told["guidance_scale"], told["clip_skip"]) == (20, 7.5, 2)


@pytest.mark.parametrize("name", ["euler_beta", "dpmpp_2m_sgm_uniform", "k_euler", "ddim"])
def test_like_takes_every_scheduler_over(name: str) -> None:
    """Names with a schedule behind them, too."""
    request = command._as_request(made(Sampling(scheduler=name)))
    assert request["sampling"].scheduler == name
    assert schedulers.canonical_name(name) == name


def test_the_model_list_has_each(inside: Inside) -> None:
    with inside.client() as client:
        document = client.get("/openapi.json").json()["components"]["schemas"]
        told = client.get("/v1/models/m").json()["sfumato"]["defaults"]
        assert "eta" in document["FileRecipe"]["properties"]["recipe"]["description"]
    named = {each.name for each in PARAMETERS if not each.side}
    assert set(told) == named | {"size", "n", "seed"} == set(document["ModelDefaults"]["properties"])
    known = model_info(loaded(ModelConfig(name="m", model="m", sampling=Sampling(eta=0.5)))).sampling
    assert (known.eta, known.guidance_rescale, known.steps, known.guidance_scale) == (0.5, 0.0, 30, 8.0)


@pytest.mark.parametrize("parameter", EVERY)
def test_the_pages_have_each(parameter: Parameter) -> None:
    http, files = (DOCS / "reference" / "http.md").read_text(), reference.markdown()
    names = [parameter.name, *parameter.aliases] if not parameter.side else ["size"]
    assert all(f"| `{name}` |" in http for name in [*names, *([parameter.a1111] if parameter.a1111 else [])])
    assert all(f"| `{key}` |" in files for key in parameter.keys or ["size"])
    if not parameter.side:
        assert parameter.flag in CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200"}).output


@pytest.mark.parametrize("parameter", [each for each in ALL if IMAGE not in each.values[0].of])
def test_those_of_clips_are_in_files_on_the_command_line_and_in_no_request_for_a_picture(
    inside: Inside, parameter: Parameter
) -> None:
    assert all(f"| `{key}` |" in reference.markdown() for key in parameter.keys)
    assert parameter.flag in CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200"}).output
    with inside.client() as client:
        answer = client.post("/v1/images/generations", json={"prompt": "a", parameter.name: value_of(parameter)})
    assert answer.headers["x-sfumato-ignored"] == parameter.name
    request = ImageRequest(prompts=["a"], sampling=Sampling(**{parameter.name: value_of(parameter)}))
    with pytest.raises(InvalidRequest, match=f"{parameter.name}: .* the request is for pictures") as caught:
        plan(request, ModelConfig(name="m", model="m"), LIMITS, 1)
    assert caught.value.param == parameter.name


def test_it_crosses_the_wire() -> None:
    sent = asked(sampling=WHOLE)
    assert wire._unpack(wire.pack(sent)[8:]) == sent
    assert hash(WHOLE) == hash(replace(WHOLE))


def test_merged_is_field_by_field() -> None:
    first, second = Sampling(steps=1, eta=0.0), Sampling(steps=2, eta=0.5, clip_skip=1)
    assert merged(first, second, Sampling(strength=0.5)) == Sampling(steps=1, eta=0.0, clip_skip=1, strength=0.5)
    assert nested({"id": "a", "steps": 1}) == {"id": "a", "sampling": Sampling(steps=1)}


# What they do

PIPELINE: Any = tiny.stable_diffusion()


def loaded(config: ModelConfig | None = None, pipeline: Any = PIPELINE) -> Loaded:
    pipeline.set_progress_bar_config(disable=True)
    return Loaded(config or ModelConfig(name="m", model="m", dtype="fp32"), pipeline, "m", "cpu", "fp32")


def asked(**more: Any) -> Generation:
    return Generation(**{"id": "1", "prompt": "a cat", "seed": 1, **more})


def drawn(model: Loaded, **sampling: Any) -> Done:
    small = {"steps": 3, "width": 64, "height": 64, "guidance_scale": 5.0, "scheduler": "ddim"}
    return draw(model, asked(sampling=Sampling(**(small | sampling))), lambda *_: None)


def pixels(done: Done) -> Any:
    return np.asarray(decoded(done.file)).astype(int)


@pytest.mark.parametrize("name", ["eta", "guidance_rescale"])
def test_it_changes_the_picture_and_can_be_had_again(name: str) -> None:
    model = loaded()
    plain, once, twice = drawn(model), drawn(model, **{name: 0.75}), drawn(model, **{name: 0.75})
    assert np.abs(pixels(once) - pixels(plain)).max() > 0
    assert np.array_equal(pixels(once), pixels(twice))
    assert once.warnings == plain.warnings == ()
    assert (getattr(once.recipe.sampling, name), getattr(plain.recipe.sampling, name)) == (0.75, None)
    assert json.loads(Image.open(io.BytesIO(once.file)).info["sfumato"])[name] == 0.75
    like = command._as_request(once.recipe)["sampling"]
    again = draw(model, asked(sampling=like), lambda *_: None)
    assert np.array_equal(pixels(again), pixels(once))
    by_file = loaded(ModelConfig(name="m", model="m", dtype="fp32", sampling=Sampling(**{name: 0.75})))
    assert np.array_equal(pixels(drawn(by_file)), pixels(once))
    assert np.array_equal(pixels(drawn(by_file, **{name: 0.0})), pixels(plain))


@pytest.mark.slow
def test_requests_that_differ_in_it_share_forwards() -> None:
    """And each is the picture that it is alone."""
    call = {
        "prompt": "a cat",
        "num_inference_steps": 3,
        "output_type": "np",
        "scheduler": DDIMScheduler.from_config(PIPELINE.scheduler.config),
        "width": 64,
        "height": 64,
    }
    more = [{}, {"eta": 1.0}, {"guidance_rescale": 0.7}, {"eta": 0.5, "guidance_rescale": 0.5}]

    def calls() -> list[dict[str, Any]]:
        return [call | each | {"generator": torch.Generator().manual_seed(1)} for each in more]

    alone = [sfumato.gather(PIPELINE, [each])[0].images for each in calls()]
    stats: dict[str, dict[str, Any]] = {}
    together = [each.images for each in sfumato.gather(PIPELINE, calls(), stats=stats)]
    assert stats["unet"]["calls"] > stats["unet"]["forwards"]
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one - other).max() < 1e-4
    for other in together[1:]:
        assert np.abs(together[0] - other).max() > 1e-2


def test_a_scheduler_that_takes_no_eta_is_told_of() -> None:
    model = loaded()
    plain, noisy, none = (drawn(model, scheduler="euler", eta=eta) for eta in (None, 0.5, 0.0))
    assert np.array_equal(pixels(plain), pixels(noisy))
    assert noisy.warnings == ("eta: 0.5 has no effect, EulerDiscreteScheduler does not take it",)
    assert plain.warnings == none.warnings == ()


def test_what_rescales_no_guidance_is_told_of() -> None:
    model = loaded()
    plain, rescaled = (drawn(model, guidance_scale=1.0, guidance_rescale=value) for value in (None, 0.5))
    assert np.array_equal(pixels(plain), pixels(rescaled))
    assert rescaled.warnings == ("guidance_rescale: 0.5 has no effect without guidance",)
    assert plain.warnings == ()


@pytest.mark.parametrize("name", ["eta", "guidance_rescale"])
def test_a_class_that_does_not_take_it(name: str) -> None:
    """A request is refused; a model file's default is left out with a warning."""
    pipeline = tiny.flux()
    words = f"^{name}: 0.5; m \\(FluxPipeline\\) does not take it. Leave it out"
    with pytest.raises(InvalidRequest, match=words) as caught:
        drawn(loaded(pipeline=pipeline), scheduler=None, **{name: 0.5})
    assert caught.value.param == name
    config = ModelConfig(name="m", model="m", dtype="fp32", sampling=Sampling(**{name: 0.5}))
    done = drawn(loaded(config, pipeline), scheduler=None)
    assert done.warnings == (f"{name}: 0.5 of the model file has no effect, FluxPipeline does not take it",)
    assert getattr(done.recipe.sampling, name) is None
    assert getattr(model_info(loaded(config, pipeline)).sampling, name) is None

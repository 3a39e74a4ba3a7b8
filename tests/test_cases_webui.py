"""AUTOMATIC1111's clients: rows 5, 6, 13, 18 and 34 of the cases that failed, on real tiny pipelines."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import httpx
import pytest
from PIL import Image

import sfumato.commands.generate as command
from sfumato.api import file_parameters
from sfumato.drawing import crop
from sfumato.drawing.draw import draw
from sfumato.errors import InvalidRequest
from sfumato.pipelines.capabilities import most_clip_skip
from sfumato.sampling import PARAMETERS, clip_layer
from support import tiny, upscalers
from support.answers import error_of
from support.drawing import Drawing, loaded, quiet, source, wanted
from support.inside import Inside

EVERY_FIELD = {
    "prompt": "a cat", "negative_prompt": "dog", "steps": 2, "cfg_scale": 7, "seed": 1, "width": 64, "height": 64,
    "clip_skip": 2, "eta": 0.5, "guidance_rescale": 0.5, "denoising_strength": 0.75, "sampler_name": "DPM++ 2M",
    "scheduler": "Karras",
}  # fmt: skip
"""What clients send to every model."""

ENABLED = "image,negative_prompt,num_inference_steps,clip_skip"

PIPELINES: dict[str, Any] = {
    "flux": tiny.flux(),
    "sd": tiny.stable_diffusion(),
    "xl": tiny.stable_diffusion_xl(),
    "unconditional": tiny.ddpm(),
    "upscaler": upscalers.four_times(),
}


class Door:
    """The application over one real pipeline."""

    def __init__(self, folder: Path, pipeline: str, enabled: str = ENABLED, **settings: Any) -> None:
        self.inside = Inside(folder, **settings)
        self.inside.engine = self.inside.service.engine = Drawing(PIPELINES[pipeline])
        (folder / "models" / "m.yaml").write_text(
            f"name: m\nparameters: {{model: some/one}}\ndiffusers: {{enable_parameters: '{enabled}'}}\n"
        )

    def post(self, path: str, **body: Any) -> httpx.Response:
        with self.inside.client() as client:
            answer: httpx.Response = client.post(path, json=body)
        return answer

    def drawn(self, path: str, **body: Any) -> tuple[Image.Image, dict[str, Any], list[str]]:
        """The picture of one of AUTOMATIC1111's routes, its recipe, and the fields that the warnings begin with."""
        answer = self.post(f"/sdapi/v1/{path}", **body)
        assert answer.status_code == 200, answer.text
        image = opened(answer.json()["images"][0])
        warnings = json.loads(answer.json()["info"])["warnings"]
        assert bool(warnings) == ("x-sfumato-warning" in answer.headers)
        return image, json.loads(image.info["sfumato"]), [warning.partition(":")[0] for warning in warnings]


def opened(text: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image


def _base64(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def picture(width: int, height: int) -> str:
    return base64.b64encode(source(width, height)).decode()


# Row 6: what a model cannot use is left out.

LEFT_OUT = [
    ("flux", "txt2img", {"negative_prompt", "clip_skip", "eta", "guidance_rescale", "scheduler"}),
    ("flux", "img2img", {"negative_prompt", "clip_skip", "eta", "guidance_rescale", "scheduler"}),
    ("sd", "txt2img", {"eta"}),
    ("unconditional", "txt2img", {"negative_prompt", "clip_skip", "guidance_rescale", "guidance_scale", "size"}),
    ("upscaler", "img2img", {"guidance_rescale", "strength", "size"}),
]  # fmt: skip


@pytest.mark.parametrize(("pipeline", "path", "left_out"), LEFT_OUT)
def test_row_6_every_field_is_sent_to_every_model(pipeline: str, path: str, left_out: set[str], tmp_path: Path) -> None:
    door = Door(tmp_path, pipeline)
    body = EVERY_FIELD | ({"init_images": [picture(64, 64)]} if path == "img2img" else {})
    body = body | ({"prompt": ""} if pipeline == "unconditional" else {})
    _, recipe, fields = door.drawn(path, **body)
    assert left_out <= set(fields), fields
    assert not recipe.get("negative_prompt") or "negative_prompt" not in left_out
    assert all(recipe.get(name) is None for name in {"clip_skip", "guidance_rescale"} & left_out)
    assert len(door.inside.engine.seen) == 1  # it was queued once, not once for each field


@pytest.mark.parametrize("enabled", ["none", "image"])
def test_row_6_what_a_model_file_does_not_enable(enabled: str, tmp_path: Path) -> None:
    _, recipe, fields = Door(tmp_path, "sd", enabled).drawn("txt2img", **EVERY_FIELD)
    assert {each.name for each in PARAMETERS if each.guarded} <= set(fields)
    assert (recipe["steps"], recipe["clip_skip"], recipe["negative_prompt"]) == (30, None, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [("negative_prompt", "dog"), ("clip_skip", 1), ("eta", 0.5), ("guidance_rescale", 0.5), ("scheduler", "euler_a")],
)
def test_row_6_openai_s_routes_name_the_field(field: str, value: Any, tmp_path: Path) -> None:
    door = Door(tmp_path, "flux")
    for path in ("/v1/images/generations", "/images/generations"):
        answer = door.post(path, prompt="a cat", size="64x64", steps=2, **{field: value})
        assert (answer.status_code, error_of(answer)["param"]) == (400, field), answer.text


def test_row_6_pictures_are_not_left_out(tmp_path: Path) -> None:
    """Without them it would be another picture altogether."""
    door = Door(tmp_path, "sd", "none")
    answer = door.post("/sdapi/v1/img2img", init_images=[picture(64, 64)])
    assert (answer.status_code, error_of(answer)["param"]) == (400, "image")


# Row 18: sizes that are no multiples are drawn at the next one and cropped.

SIZES = [(100, 60), (127, 129), (64, 65), (1, 72)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pipeline", ["sd", "flux"])
def test_row_18_any_size_is_drawn(size: tuple[int, int], pipeline: str, tmp_path: Path) -> None:
    door, (width, height) = Door(tmp_path, pipeline, max_aspect=100), size
    image, recipe, _ = door.drawn("txt2img", prompt="a cat", steps=2, seed=1, width=width, height=height)
    multiple = 8 if pipeline == "sd" else 16
    drawn = -(-width // multiple) * multiple, -(-height // multiple) * multiple
    assert image.size == size == (recipe["width"], recipe["height"])
    assert tuple(recipe["drawn_size"]) == drawn
    assert f"Size: {width}x{height}," in image.info["parameters"]
    whole, other, _ = door.drawn("txt2img", prompt="a cat", steps=2, seed=1, width=drawn[0], height=drawn[1])
    left, top = (drawn[0] - width) // 2, (drawn[1] - height) // 2
    assert whole.crop((left, top, left + width, top + height)).tobytes() == image.tobytes()
    assert "drawn_size" not in other


def test_row_18_openai_s_routes_name_the_nearest(tmp_path: Path) -> None:
    answer = Door(tmp_path, "sd").post("/v1/images/generations", prompt="a cat", size="100x60")
    assert (answer.status_code, error_of(answer)["param"]) == (400, "size")


@pytest.mark.parametrize("sizes", [{}, {"width": 100, "height": 60}])
@pytest.mark.parametrize("masked", [False, True])
def test_row_18_a_picture_of_any_size_is_redrawn(sizes: dict[str, int], masked: bool, tmp_path: Path) -> None:
    door = Door(tmp_path, "sd")
    gradient = Image.linear_gradient("L").resize((77, 91)).convert("RGB")
    mask = Image.new("L", (77, 91), 0)
    mask.paste(255, (40, 0, 77, 91))
    body = {
        "prompt": "a cat",
        "steps": 3,
        "init_images": [_base64(gradient)],
        "denoising_strength": 0.9,
        "mask_blur": 0,
    }
    image, recipe, _ = door.drawn("img2img", **body, **sizes, **({"mask": _base64(mask)} if masked else {}))
    assert image.size == (tuple(sizes.values()) or (77, 91))
    assert recipe["drawn_size"] == ([104, 64] if sizes else [80, 96])
    if masked and not sizes:
        left = (0, 0, 40, 91)
        assert image.crop(left).tobytes() == gradient.crop(left).tobytes()  # outside the mask nothing changed
        assert image.crop((40, 0, 77, 91)).tobytes() != gradient.crop((40, 0, 77, 91)).tobytes()


def test_row_18_around_a_picture_its_edge_is_repeated() -> None:
    halves = Image.new("RGB", (77, 91), "black")
    halves.paste("white", (0, 0, 77, 40))
    extended = crop.extended(halves, crop.centred((77, 91), (80, 96)), (80, 96))
    assert extended.crop((1, 2, 78, 93)).tobytes() == halves.tobytes()
    assert extended.getpixel((0, 0)) == (255, 255, 255) and extended.getpixel((79, 95)) == (0, 0, 0)


def test_row_18_only_the_masked_area_at_any_size(tmp_path: Path) -> None:
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (40, 40, 90, 90))
    body = {"init_images": [picture(128, 128)], "mask": _base64(mask), "inpaint_full_res": True, "width": 60,
            "height": 50, "steps": 2, "prompt": "a cat"}  # fmt: skip
    image, recipe, _ = Door(tmp_path, "sd").drawn("img2img", **body)
    assert (image.size, recipe["masked_area"], "drawn_size" in recipe) == ((128, 128), [0, 64, 56], False)


def test_row_18_an_upscaler_takes_any_size(tmp_path: Path) -> None:
    door = Door(tmp_path, "upscaler")
    (tmp_path / "models" / "m.yaml").write_text(
        "name: m\nparameters: {model: some/one}\nstep: 2\n"
        "diffusers: {pipeline_type: StableDiffusionUpscalePipeline, enable_parameters: image}\n"
    )
    answer = door.post("/sdapi/v1/extra-single-image", image=picture(17, 22), upscaler_1="m", upscaling_resize=4)
    assert answer.status_code == 200, answer.text
    assert opened(answer.json()["image"]).size == (68, 88)


def test_row_18_limits_hold_for_the_size_that_is_drawn(tmp_path: Path) -> None:
    door = Door(tmp_path, "sd", max_side=100, max_pixels=100 * 96)
    for path, size in (
        ("txt2img", (100, 60)),
        ("img2img", (100, 60)),
        ("img2img", (None, None)),
        ("txt2img", (98, 97)),
    ):
        width, height = size
        pictures = {"init_images": [picture(100, 60)]} if path == "img2img" else {}
        answer = door.post(f"/sdapi/v1/{path}", prompt="a cat", width=width, height=height, **pictures)
        assert error_of(answer)["param"] in ("size", "image"), answer.text
        assert "104" in error_of(answer)["message"], answer.text


def test_row_18_previews_have_the_picture_s_size_and_shape() -> None:
    events: list[Any] = []
    model, size = loaded(PIPELINES["sd"]), {"width": 25, "height": 57}
    draw(model, wanted(steps=4, previews=2, crop=True, **size), quiet, events.append)
    assert [(each.width, each.height) for each in events] == [(25, 57)] * 2
    small = opened(base64.b64encode(events[0].png).decode())
    assert abs(small.width / small.height - 25 / 57) < 0.1  # of one pixel to a latent: 3 x 7, not 4 x 8


def test_row_18_it_can_be_made_again() -> None:
    model = loaded(PIPELINES["sd"])
    gradient = source(77, 91)
    first = draw(model, wanted(crop=True, images=(gradient,)), quiet)
    again = command._as_request(first.recipe)
    assert again["crop"] and again["sampling"].size == (77, 91)
    second = draw(model, replace(wanted(crop=True, images=(gradient,)), sampling=again["sampling"]), quiet)
    assert second.file == first.file


# Row 12: the bar.

ONE_BAR = "portrait of a cat | dog"
TEXTS = ["portrait | 35mm | f/1.8", "{red|blue} car", "a {cat} | dog", "a||b", "a cat"]


def prompts_of(answer: httpx.Response) -> tuple[str, str | None]:
    assert answer.status_code == 200, answer.text
    recipe = json.loads(opened(answer.json()["data"][0]["b64_json"]).info["sfumato"])
    return recipe["prompt"], recipe["negative_prompt"]


def asked(door: Door, prompt: str, **more: Any) -> httpx.Response:
    body = {"prompt": prompt, "size": "64x64", "steps": 2, "seed": 1, "response_format": "b64_json"}
    return door.post("/v1/images/generations", **body, **more)


def test_row_12_one_bar_is_localai_s_split_and_said(tmp_path: Path) -> None:
    door = Door(tmp_path, "sd")
    answer = asked(door, ONE_BAR)
    assert prompts_of(answer) == ("portrait of a cat", "dog")
    assert "negative prompt" in answer.headers["x-sfumato-warning"]
    both = asked(door, ONE_BAR, negative_prompt="blurred", n=2)
    assert prompts_of(both) == ("portrait of a cat", "blurred, dog")
    assert both.headers["x-sfumato-warning"].count("split") == 1
    fields = asked(door, "portrait of a cat", negative_prompt="dog")
    assert "x-sfumato-warning" not in fields.headers
    assert (
        opened(fields.json()["data"][0]["b64_json"]).tobytes() == opened(answer.json()["data"][0]["b64_json"]).tobytes()
    )
    assert prompts_of(asked(door, "a cat |")) == ("a cat", None)


@pytest.mark.parametrize("prompt", TEXTS)
@pytest.mark.parametrize("pipeline", ["sd", "flux"])
def test_row_12_several_bars_and_braces_are_text(prompt: str, pipeline: str, tmp_path: Path) -> None:
    answer = asked(Door(tmp_path, pipeline), prompt)
    assert prompts_of(answer)[0] == prompt
    assert "x-sfumato-warning" not in answer.headers


@pytest.mark.parametrize(("pipeline", "enabled"), [("flux", ENABLED), ("sd", "num_inference_steps"), ("sd", "none")])
def test_row_12_without_a_negative_prompt_the_bar_is_text(pipeline: str, enabled: str, tmp_path: Path) -> None:
    body = {"prompt": ONE_BAR, "size": "64x64", "response_format": "b64_json"}
    answer = Door(tmp_path, pipeline, enabled).post("/v1/images/generations", **body)
    assert (prompts_of(answer)[0], prompts_of(answer)[1] or None) == (ONE_BAR, None)
    assert "bar" in answer.headers["x-sfumato-warning"]


def test_row_12_a_stream_says_it_with_the_picture(tmp_path: Path) -> None:
    events = asked(Door(tmp_path, "sd"), ONE_BAR, stream=True).text
    (completed,) = [line for line in events.splitlines() if line.startswith("data: ") and "completed" in line]
    assert "negative prompt" in json.loads(completed.removeprefix("data: "))["warnings"][0]


def test_row_12_a1111_s_prompts_are_not_split(tmp_path: Path) -> None:
    _, recipe, fields = Door(tmp_path, "sd").drawn("txt2img", prompt=ONE_BAR, steps=2, width=64, height=64)
    assert (recipe["prompt"], recipe["negative_prompt"], fields) == (ONE_BAR, None, [])


def test_row_12_what_was_split_is_made_again_as_two_prompts() -> None:
    model = loaded(PIPELINES["sd"])
    size = {"width": 64, "height": 64}
    first = draw(model, wanted(prompt=ONE_BAR, split_prompt=True, **size), quiet)
    again = command._as_request(first.recipe)
    assert not again["split_prompt"]
    second = draw(model, replace(wanted(prompt=again["prompts"][0]), sampling=again["sampling"]), quiet)
    assert (
        opened(base64.b64encode(second.file).decode()).tobytes()
        == opened(base64.b64encode(first.file).decode()).tobytes()
    )


# Row 5: clip skip counts from the last layer on AUTOMATIC1111's routes, whatever the class reads by itself.


def embeddings(kind: str, clip_skip: int | None) -> bytes:
    """The picture with diffusers' own argument; `test_compat` compares that with plain diffusers."""
    fields = {"prompt": "a cat", "clip_skip": clip_skip, "width": 64, "height": 64, "guidance_scale": 5.0}
    done = draw(loaded(PIPELINES[kind]), wanted(**fields), quiet)
    return opened(base64.b64encode(done.file).decode()).tobytes()


LAYERS = [
    ("sd", 1, None), ("sd", 2, 1), ("sd", 3, 2), ("xl", 1, None), ("xl", 2, None), ("xl", 2, 0), ("xl", 3, 1),
]  # fmt: skip
"""Pipeline, AUTOMATIC1111's clip skip, diffusers' own."""


@pytest.mark.parametrize(("kind", "layer", "own"), LAYERS)
@pytest.mark.parametrize("place", ["clip_skip", "CLIP_stop_at_last_layers"])
def test_row_5_the_layer_is_the_one_of_a1111(
    kind: str, layer: int, own: int | None, place: str, tmp_path: Path
) -> None:
    body = {"prompt": "a cat", "steps": 2, "seed": 1, "width": 64, "height": 64, "cfg_scale": 5}
    body |= {place: layer} if place == "clip_skip" else {"override_settings": {place: layer}}
    door = Door(tmp_path, kind)
    answer = door.post("/sdapi/v1/txt2img", **body)
    image, info = opened(answer.json()["images"][0]), json.loads(answer.json()["info"])
    assert image.tobytes() == embeddings(kind, own)
    assert info["clip_skip"] == max(layer, 2 if kind == "xl" else 1)
    parameters = door.post("/sdapi/v1/png-info", image=answer.json()["images"][0]).json()["parameters"]
    assert parameters.get("Clip skip") == (None if layer == 1 else str(layer))
    assert ("Clip skip: " in info["infotexts"][0]) == (layer > 1)


def test_row_5_other_routes_and_files_count_as_localai_does(tmp_path: Path) -> None:
    """As diffusers: from the layer that the class reads by itself."""
    for kind in ("sd", "xl"):
        door = Door(tmp_path, kind)
        body = {"prompt": "a cat", "step": 2, "seed": 1, "size": "64x64", "cfg_scale": 5, "response_format": "b64_json"}
        answer = door.post("/v1/images/generations", clip_skip=1, **body)
        assert opened(answer.json()["data"][0]["b64_json"]).tobytes() == embeddings(kind, 1)


@pytest.mark.parametrize(("kind", "most"), [("sd", 12), ("xl", 11)])
def test_row_5_as_many_as_there_are(kind: str, most: int) -> None:
    """The deepest is drawn, one more is refused, or left out for AUTOMATIC1111's clients."""
    model = loaded(PIPELINES[kind])
    assert most_clip_skip(model.pipeline) == most
    draw(model, wanted(clip_skip=most, width=64, height=64), quiet)
    with pytest.raises(InvalidRequest, match=f"^clip_skip: {most + 1}; .* 0 to {most} are valid$"):
        draw(model, wanted(clip_skip=most + 1, width=64, height=64), quiet)
    layer = most + clip_layer(0, type(model.pipeline).__name__)
    done = draw(model, wanted(clip_skip=layer, webui=True, width=64, height=64), quiet)
    assert (done.recipe.sampling.clip_skip, done.warnings[0][:20]) == (None, "clip_skip: left out:")


def test_row_5_every_class_of_diffusers_is_counted_right() -> None:
    folder = Path(diffusers.__file__).parent / "pipelines"
    seen = set()
    for path in folder.rglob("pipeline_*.py"):
        text = path.read_text()
        for name in re.findall(r"^class (\w+Pipeline\w*)\(", text, re.M):
            body = text[text.index(f"class {name}(") :]
            if "clip_skip: int" in body:
                penultimate = "clip_skip + 2)" in text
                assert clip_layer(0, name) == (2 if penultimate else 1), name
                seen.add(penultimate)
    assert seen == {True, False}


def test_row_5_options_say_the_layer_of_the_model(tmp_path: Path) -> None:
    door = Door(tmp_path, "xl")
    (tmp_path / "models" / "m.yaml").write_text(
        "name: m\nparameters: {model: some/one}\nclip_skip: 1\ndiffusers: {pipeline_type: StableDiffusionXLPipeline}\n"
    )
    with door.inside.client() as client:
        assert client.get("/sdapi/v1/options").json()["CLIP_stop_at_last_layers"] == 3


@pytest.mark.parametrize(
    ("model", "clip_skip"), [("dreamshaper_8", 1), ("ponyDiffusionV6XL", None), ("animagineXL", None)]
)
def test_row_5_the_infotext_of_another_program(model: str, clip_skip: int | None) -> None:
    text = f"a cat\nSteps: 20, Seed: 1, Size: 512x768, Model: {model}, Clip skip: 2"
    assert file_parameters.read({"parameters": text}).fields.get("clip_skip") == clip_skip


# Row 13, over HTTP; `test_weights` has the rest.


@pytest.mark.parametrize("pipeline", ["sd", "flux"])
def test_row_13_weights_are_read_or_a_warning_names_them(pipeline: str, tmp_path: Path) -> None:
    marked = "a (cat:1.5) ((dog)) [bird] BREAK x"
    door = Door(tmp_path, pipeline)
    body = {"steps": 2, "seed": 1, "width": 64, "height": 64}
    image, recipe, fields = door.drawn("txt2img", prompt=marked, **body)
    assert (recipe["prompt"], recipe.get("weights", False), fields) == (
        (marked, True, []) if pipeline == "sd" else (marked, False, ["prompt"])
    )
    plain, _, _ = door.drawn("txt2img", prompt="a cat dog bird x", **body)
    assert image.tobytes() != plain.tobytes()
    answer = asked(door, marked)  # on OpenAI's routes it is text, unless `prompt_weights` is sent
    assert prompts_of(answer)[0] == marked
    assert "prompt: '(cat:1.5)', 'BREAK' is read as text" in answer.headers["x-sfumato-warning"]

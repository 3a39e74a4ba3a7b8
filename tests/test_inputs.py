"""What a pipeline class takes and returns: told of every class, drawn over HTTP, refused where it is not told."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.checkpoints import (
    class_reading,
    clip_rules,
    diffusers_source,
    pipeline_class,
    sound_rules,
    static_capabilities,
)
from sfumato.checkpoints.class_reading import kin_of_pipeline as kin_of
from sfumato.commands.check import check
from sfumato.config import ModelConfig
from sfumato.drawing import outputs
from sfumato.drawing.draw import draw
from sfumato.errors import InvalidRequest, LoadError
from sfumato.models import load
from sfumato.pictures import recipe
from sfumato.pictures.images import decoded
from sfumato.pipelines import capabilities
from sfumato.pipelines.inputs import SOURCE_CLIPS, SOURCE_SOUNDS, of_signature
from sfumato.serving.catalog import Catalog
from support import (
    families,
    families_controlled,
    families_moving,
    families_newer,
    families_rare,
    families_transformers,
)
from support.drawing import loaded, quiet, wanted
from support.families import Family, picture
from support.families_served import MASK, Served, encoded, served

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and transformers' own, some about toy sizes

WITHOUT = {
    "StableDiffusion (IP adapter)": "takes a picture as embeddings",
    "StableDiffusionUpscale": "its toy is no upscaler; tests/test_kinds.py has some that are",
    "Flux2": "its toy has fewer layers of text than the class asks for",
    "Flux2Klein": "the same",
}
ALL: dict[str, Family] = {
    **families.FAMILIES,
    **families_controlled.FAMILIES,
    **families_transformers.FAMILIES,
    **families_newer.FAMILIES,
    **families_moving.FAMILIES,
    **families_rare.FAMILIES,
}
LOAD = load.load
"""The server of the families replaces it."""
FAMILIES = {name: family for name, family in ALL.items() if name not in WITHOUT}
PICTURE = encoded(picture(1))
MODE = "Union"
"""Classes whose nets tell kinds of controls apart are called so."""
QUICK = (
    "StableDiffusionInpaint (9 channels)", "StableDiffusionControlNet", "StableDiffusionAdapter", "FluxFill",
    "FluxControl", "QwenImageControlNet", "Wan", "DDPM", "DiT", "KandinskyV22",
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("families"), FAMILIES) as server:
        yield server


def requests(told: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A request for each task, with no more than what the list asks for."""
    inputs = {each["name"]: each for each in told["inputs"]}
    count = inputs.get("controls", {"least": 0})["least"]
    alone = inputs.get("image", {"roles": []})["roles"] == ["control"]
    images = [PICTURE] * max(count if alone else 1, inputs.get("image", {"least": 1})["least"])
    needed = {"controls": [{"image": PICTURE, "mode": 1} if MODE in told["pipeline"] else {"image": PICTURE}] * count}
    needed = needed if count else {}
    label = {"prompt": "1"} if inputs.get("prompt", {"roles": []})["roles"] == ["label"] else {}
    return {
        "text-to-image": {},
        "label-to-image": label,
        "image-to-image": {"image": images} | ({} if alone else needed),
        "upscaling": {"image": [encoded(picture(1, 32))]},
        "inpainting": {"image": images, "mask": MASK} | needed,
    }


@pytest.mark.parametrize(
    "family", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in FAMILIES]
)
def test_what_tasks_claims_is_drawn_and_all_else_is_refused(server: Served, family: str) -> None:
    model = server.model(family)
    before = server.told(model)
    if before["tasks"]:
        loaded = server.load(model)
        assert set(loaded["tasks"]) <= set(before["tasks"])  # there are no files that say what the weights are
        before = loaded
    for task, fields in requests(before).items():
        if task == "label-to-image" and task not in before["tasks"]:
            continue
        if task == "upscaling" and "image-to-image" in before["tasks"]:
            continue  # the same request
        answer = server.generate(model, **fields)
        if task in before["tasks"]:
            assert answer.status_code == 200, f"{task}: {answer.text}"
        elif not (task == "image-to-image" and "upscaling" in before["tasks"]):
            assert 400 <= answer.status_code < 500, f"{task}: {answer.text[:500]}"
            assert answer.json()["error"]["param"] in ("image", "mask", "controls", "model", "prompt"), answer.text
    if not before["tasks"]:
        assert before["status"] == "unloaded"
        assert "draws no picture" in server.generate(model).json()["error"]["message"]
        assert before["detail"]


# The reading of every class.

CLASSES = sorted(
    name
    for name, path in diffusers_source.files().items()
    if name.endswith("Pipeline") and "pipelines" in path.parts and "deprecated" not in path.parts
)


def imported(name: str) -> type[Any] | None:
    try:
        return getattr(diffusers, name, None)
    except (ImportError, RuntimeError):
        return None


@pytest.mark.slow
def test_the_reading_of_every_class_is_that_of_its_signature() -> None:
    """Without importing it, as the API process reads it, and imported, as the worker has it."""
    compared = 0
    for name in CLASSES:
        kind = imported(name)
        call: Any = getattr(kind, "__call__", None)  # noqa: B004
        if kind is None or not kind.__module__.startswith("diffusers.pipelines") or call is None:
            continue
        read, signature = class_reading.of_name(name), capabilities._parameters(call)
        if name == "DiffusionPipeline":
            continue
        assert read, name
        plain = of_signature(name, signature)
        assert read.parameters == plain.parameters, name
        # A signature does not say that a clip or a sound is needed whose default is None.
        assert set(read.unmet) - {*SOURCE_CLIPS, *SOURCE_SOUNDS} <= set(plain.unmet) <= set(read.unmet), name
        roles = {each.name: each.role for each in plain.inputs}
        moving = {clip_rules.SOURCES.get(name), *(each.parameter for each in (sound_rules.SOURCES.get(name),) if each)}
        pictures = [each for each in read.inputs if each.name not in moving]
        assert {each.name for each in pictures} <= roles.keys(), name
        assert all(roles[each.name] == each.role for each in pictures), name
        required = {each.name for each in plain.inputs if each.required}
        assert required <= {each.name for each in read.inputs if each.required}, name
        compared += 1
    assert compared > 200


OUTPUTS = {
    "FluxPipeline": "", "Kandinsky5T2IPipeline": "", "MarigoldDepthPipeline": "", "StableDiffusionLDM3DPipeline": "",
    "KandinskyV22CombinedPipeline": "", "StableCascadeCombinedPipeline": "", "QwenImageLayeredPipeline": "",
    "WanPipeline": "moving", "LTXPipeline": "moving", "TextToVideoZeroPipeline": "moving", "ShapEPipeline": "moving",
    "LTX2DFRPipeline": "moving", "StableAudioPipeline": "sound", "AudioLDM2Pipeline": "sound",
    "KandinskyV22PriorPipeline": "embeddings", "FluxPriorReduxPipeline": "embeddings",
    "StableCascadePriorPipeline": "embeddings", "LLaDA2Pipeline": "text",
}  # fmt: skip


@pytest.mark.parametrize(("name", "words"), OUTPUTS.items())
def test_what_comes_out_is_read(name: str, words: str) -> None:
    read = class_reading.of_name(name)
    assert read
    assert read.output.startswith(words) if words else read.output == ""


ABILITIES = {
    "FluxPipeline": ("text-to-image image-to-image inpainting", "prompt 1, image 0, mask 0"),
    "Flux2Pipeline": ("text-to-image image-to-image", "prompt 1, image 0"),
    "GlmImagePipeline": ("text-to-image image-to-image", "prompt 1, image 0"),
    "StableCascadeCombinedPipeline": ("text-to-image image-to-image", "prompt 1, image 0"),
    "QwenImageLayeredPipeline": ("image-to-image", "prompt 1, image 1"),
    "QwenImageEditPlusPipeline": ("image-to-image", "prompt 1, image 1"),
    "FluxFillPipeline": ("image-to-image inpainting", "prompt 1, image 1, mask 0"),
    "FluxControlPipeline": ("image-to-image inpainting", "prompt 1, image 0, mask 0, controls 1"),
    "FluxControlInpaintPipeline": ("image-to-image inpainting", "prompt 1, image 1, mask 0, controls 1"),
    "QwenImageControlNetPipeline": ("image-to-image", "prompt 1, image 0, controls 1"),
    "QwenImageControlNetInpaintPipeline": ("image-to-image inpainting", "prompt 1, image 1, mask 0"),
    "StableDiffusion3ControlNetPipeline": ("image-to-image", "prompt 1, image 0, controls 1"),
    "StableDiffusionAdapterPipeline": ("image-to-image", "prompt 1, image 0, controls 1"),
    "IFImg2ImgSuperResolutionPipeline": ("image-to-image", "prompt 1, image 2"),
    "PaintByExamplePipeline": ("image-to-image inpainting", "image 2, mask 0"),
    "DiTPipeline": ("label-to-image", "prompt 1"),
    "MarigoldDepthPipeline": ("image-to-image", "image 1"),
    "UniDiffuserPipeline": ("text-to-image", "prompt 1"),
    "DDPMPipeline": ("text-to-image", ""),
    "StableDiffusionUpscalePipeline": ("upscaling", "prompt 0, image 1"),
    "WanPipeline": ("text-to-video video-to-video", "prompt 1, video 0"),
    "WanVideoToVideoPipeline": ("video-to-video", "prompt 1, video 1"),
    "WanImageToVideoPipeline": ("image-to-video", "prompt 1, image 1"),
    "StableVideoDiffusionPipeline": ("image-to-video", "image 1"),
    "LLaDA2Pipeline": ("", ""),
}


@pytest.mark.parametrize(("name", "said"), ABILITIES.items())
def test_what_a_class_can_be_asked_for(name: str, said: tuple[str, str]) -> None:
    read = class_reading.of_name(name)
    assert read
    can = class_reading.abilities_of(ModelConfig(name="m", model="m"), class_reading.kin_of(read))
    inputs = ", ".join(f"{each.name} {each.least}" for each in can.inputs)
    assert (" ".join(can.tasks), inputs) == said
    assert bool(can.problem) == (not can.tasks)


# Rows 11 and 36: no picture.


def test_row_11_a_model_of_texts_says_so_before_anything_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("parameters: {model: o/r}\ndiffusers: {pipeline_type: LLaDA2Pipeline}")
    catalog = Catalog([tmp_path])
    (report,) = check(catalog)
    assert not report.ok
    assert "makes text" in str(report)
    told = static_capabilities.static_capabilities(catalog.get("m"))
    assert told.tasks == ()
    with pytest.raises(InvalidRequest, match="makes text"):
        LOAD(catalog.get("m"), "cpu", quiet)
    (tmp_path / "m.yaml").write_text(
        "parameters: {model: o/r}\ndiffusers: {pipeline_type: WanPipeline}\noptions: ['num_frames:1']"
    )
    catalog.refresh()
    (report,) = check(catalog)
    assert report.ok
    assert static_capabilities.static_capabilities(catalog.get("m")).tasks == ("text-to-image",)


def test_row_36_a_single_frame_is_a_picture() -> None:
    model = loaded(FAMILIES["Wan"].build(), option_lines=(("num_frames", "1"),))
    call = FAMILIES["Wan"].calls[0]
    done = draw(model, wanted(prompt="a cat", width=call["width"], height=call["height"]), quiet)
    assert decoded(done.file).size == (call["width"], call["height"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("images", [Image.new("RGB", (8, 6), "red")]),
        ("image", [Image.new("RGB", (8, 6), "red")]),
        ("images", np.array([[[[1.0, 0.0, 0.0]] * 8] * 6])),
        ("frames", [[Image.new("RGB", (8, 6), "red")]]),
        ("frames", np.array([[[[[1.0, 0.0, 0.0]] * 8] * 6]])),
        ("frames", torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 6, 8)),
        ("rgb", [Image.new("RGB", (8, 6), "red")]),
        ("images", [[Image.new("RGBA", (8, 6), "blue"), Image.new("RGBA", (8, 6), "red")]]),
    ],
)  # fmt: skip
def test_row_36_the_picture_of_any_output(field: str, value: Any) -> None:
    image, warnings = outputs.picture_of(object(), SimpleNamespace(**{field: value}))
    assert image.size == (8, 6)
    assert image.convert("RGB").getpixel((4, 4)) == (255, 0, 0)
    assert warnings == []


def test_row_11_a_file_that_was_mended_is_read_again(server: Served) -> None:
    file = server.folder / "mended.yaml"
    file.write_text("name: mended\nparameters: {model: o/r}\ndiffusers: {pipeline_type: LLaDA2Pipeline}\n")
    assert "makes text" in server.generate("mended").json()["error"]["message"]
    assert "makes text" in server.told("mended")["detail"]
    server.built["mended"] = FAMILIES["StableDiffusion"].build()
    file.write_text("name: mended\nparameters: {model: o/r}\nstep: 2\n")
    assert server.generate("mended").status_code == 200


def test_row_39_every_class_says_which_package_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    needing = [name for name in CLASSES if pipeline_class.packages(name)]
    assert len(needing) > 15
    for name in needing:
        with pytest.raises(LoadError, match="pip install"):
            pipeline_class.choose(ModelConfig(name="m", model="o/r", pipeline_type=name), None)


# Rows 37 and 38: what is missing is named.


@pytest.mark.parametrize(
    ("family", "fields", "param", "words"),
    [
        ("FluxFill", {}, "image", "needs a source picture"),
        ("FluxControl", {}, "controls", "needs a control picture"),
        ("QwenImageControlNet", {}, "controls", "needs a control picture"),
        ("StableDiffusionAdapter", {}, "controls", "needs a control picture"),
        ("StableDiffusionInpaint (9 channels)", {}, "image", "needs a source picture"),
        ("StableDiffusionControlNet", {"image": PICTURE, "mask": MASK}, "controls", "besides image and mask"),
        ("StableDiffusionControlNetImg2Img", {"image": PICTURE}, "controls", "besides image"),
        ("QwenImageControlNet", {"image": PICTURE, "controls": [{"image": PICTURE}]}, "image", "besides controls"),
        ("QwenImageControlNet", {"image": PICTURE, "mask": MASK}, "mask", "does not take mask_image"),
        ("QwenImageControlNet", {"controls": [{"image": PICTURE}] * 2}, "controls", "takes 1 control pictures, got 2"),
        ("StableDiffusion", {"controls": [{"image": PICTURE}]}, "controls", "takes no control pictures"),
        ("StableDiffusion", {"image": [PICTURE] * 2}, "image", "takes one picture, got 2"),
        ("Chroma", {"image": PICTURE}, "image", "takes no picture"),
        ("StableDiffusion", {"controls": [{"image": PICTURE, "kind": "canny"}]}, "controls", "kind is not known"),
        ("StableDiffusion", {"controls": [{"weight": 1}]}, "controls[0].image", ""),
        ("StableDiffusion", {"controls": "x"}, "controls", "list as JSON"),
        (
            "StableDiffusion",
            {"controls": [{"image": PICTURE, "start": 2}]},
            "controls[0].start",
            "less than or equal to 1",
        ),
    ],
)
def test_rows_37_and_38_what_is_missing_is_named(
    server: Served, family: str, fields: dict[str, Any], param: str, words: str
) -> None:
    model = server.model(family)
    answer = server.generate(model, **fields)
    assert answer.status_code == 400, answer.text[:300]
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]


def pixels(answer: Any) -> np.ndarray[Any, Any]:
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


CONTROLLED = "StableDiffusionControlNet (12 residuals)"


def test_row_38_a_control_net_with_picture_and_mask(server: Served) -> None:
    model = server.model(CONTROLLED)
    control = [{"image": PICTURE}]
    alone, as_control = server.generate(model, image=PICTURE), server.generate(model, controls=control)
    assert np.array_equal(pixels(alone), pixels(as_control))
    weightless = server.generate(model, controls=[{"image": PICTURE, "weight": 0}])
    assert not np.array_equal(pixels(weightless), pixels(as_control))
    never = server.generate(model, controls=[{"image": PICTURE, "start": 0.99, "end": 1}])
    assert np.array_equal(pixels(never), pixels(weightless))
    source = encoded(picture(2))
    redrawn = server.generate(model, image=source, controls=control)
    masked = server.generate(model, image=source, mask=MASK, controls=control)
    assert not np.array_equal(pixels(redrawn), pixels(as_control))
    kept, drawn = np.asarray(picture(2)).astype(int)[:, :32], pixels(masked)
    assert np.array_equal(drawn[:, :32], kept)
    assert not np.array_equal(drawn[:, 33:], np.asarray(picture(2)).astype(int)[:, 33:])


def test_row_38_two_control_nets_in_a_form_and_their_recipe(server: Served) -> None:
    model = server.model("StableDiffusionControlNet (two)")
    controls = [{"image": PICTURE, "weight": 0.5}, {"image": encoded(picture(2)), "end": 0.5}]
    body = {"model": model, "prompt": "a cat", "seed": "1", "controls": json.dumps(controls)}
    body |= {"response_format": "b64_json"}
    form = server.client.post("/v1/images/generations", data=body)
    assert np.array_equal(pixels(form), pixels(server.generate(model, controls=controls)))
    assert not np.array_equal(pixels(form), pixels(server.generate(model, controls=controls[::-1])))
    data = base64.b64decode(form.json()["data"][0]["b64_json"])
    made = json.loads(Image.open(io.BytesIO(data)).info["sfumato"])
    read = recipe.from_json(made)
    first, second = read.controls
    assert (first.weight, first.end, second.weight, second.end) == (0.5, None, None, 0.5)
    assert first.image_sha256 != second.image_sha256
    made["controls"] = [list(each.values())[:5] for each in made["controls"]]  # as it was written before
    assert recipe.from_json(made).controls == read.controls


# Rows 16 and 17: masks that nobody sent.


@pytest.mark.parametrize("family", ["StableDiffusionInpaint (9 channels)", "FluxFill"])
def test_row_17_without_a_mask_the_whole_picture_is_redrawn(server: Served, family: str) -> None:
    model = server.model(family)
    whole = encoded(Image.new("L", (64, 64), 255))
    assert np.array_equal(
        pixels(server.generate(model, image=PICTURE)), pixels(server.generate(model, image=PICTURE, mask=whole))
    )
    assert "x-sfumato-warning" not in server.generate(model, image=PICTURE).headers


def with_holes() -> tuple[Image.Image, Image.Image]:
    """A picture whose left is opaque, whose middle is half and whose right is fully transparent; and that mask."""
    source = picture(3).convert("RGBA")
    alpha = Image.new("L", (64, 64), 255)
    alpha.paste(128, (24, 0, 32, 64))
    alpha.paste(0, (32, 0, 64, 64))
    source.putalpha(alpha)
    return source, alpha.point([255] + [0] * 255)


@pytest.mark.parametrize("family", ["StableDiffusion", "StableDiffusionInpaint (9 channels)"])
def test_row_16_transparency_is_the_mask(server: Served, family: str) -> None:
    model = server.model(family)
    source, mask = with_holes()
    edited = server.edit(model, image=encoded(source))
    drawn = pixels(edited)
    assert np.array_equal(drawn, pixels(server.edit(model, image=encoded(source), mask=encoded(mask))))
    flat = Image.alpha_composite(Image.new("RGBA", source.size, "white"), source).convert("RGB")
    assert np.array_equal(drawn[:, :32], np.asarray(flat).astype(int)[:, :32])
    assert not np.array_equal(drawn[:, 32:], np.asarray(flat).astype(int)[:, 32:])
    # On the other route, and where nothing is fully transparent, a picture is a picture.
    opaque = encoded(flat)
    assert np.array_equal(
        pixels(server.generate(model, image=encoded(source))), pixels(server.generate(model, image=opaque))
    )


def test_row_16_a_model_without_masks_redraws_all(server: Served) -> None:
    source, _ = with_holes()
    answer = server.edit(server.model("StableDiffusionInstructPix2Pix"), image=encoded(source))
    assert pixels(answer).shape == (64, 64, 3)


def test_a_prompt_that_is_not_taken_is_told(server: Served) -> None:
    answer = server.generate(server.model("DDPM"))
    assert answer.status_code == 200
    assert "prompt: it was not used" in answer.headers["x-sfumato-warning"]


def test_a_label_is_a_prompt(server: Served) -> None:
    model = server.model("DiT")
    one, two = server.generate(model, prompt="1"), server.generate(model, prompt=" 2 ")
    assert not np.array_equal(pixels(one), pixels(two))
    for prompt in ("a cat", "", "-1", "99999999"):
        answer = server.generate(model, prompt=prompt)
        assert answer.status_code == 400
        assert "is no class" in answer.json()["error"]["message"]


# What a class takes depends on the components that it can be without.


def test_without_its_encoder_of_pictures_a_model_takes_none(tmp_path: Path) -> None:
    for family, tasks in (
        ("StableCascadeCombined", ("text-to-image",)),
        ("StableCascadeCombined (pictures)", ("text-to-image", "image-to-image")),
    ):
        pipeline = ALL[family].build()
        assert class_reading.abilities_of(ModelConfig(name="m", model="m"), kin_of(pipeline)).tasks == tasks
        index = {
            name: [None, None] if part is None else ["diffusers", type(part).__name__]
            for name, part in pipeline.components.items()
        }
        (tmp_path / "w").mkdir(exist_ok=True)
        (tmp_path / "w" / "model_index.json").write_text(json.dumps({"_class_name": type(pipeline).__name__, **index}))
        config = ModelConfig(name="m", model="w", folder=tmp_path)
        assert static_capabilities.static_capabilities(config).tasks == tasks


def test_without_a_text_encoder_a_model_draws_nothing(tmp_path: Path) -> None:
    index = {"_class_name": "FluxPipeline", "text_encoder": [None, None], "text_encoder_2": [None, None]}
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "model_index.json").write_text(json.dumps(index))
    told = static_capabilities.static_capabilities(ModelConfig(name="m", model="w", folder=tmp_path)).abilities
    assert told
    assert told.tasks == ()
    assert told.problem == "FluxPipeline needs text_encoder and text_encoder_2, which this model does not have"
    one = index | {"text_encoder": ["transformers", "CLIPTextModel"]}
    (tmp_path / "w" / "model_index.json").write_text(json.dumps(one))
    told = static_capabilities.static_capabilities(ModelConfig(name="m", model="w", folder=tmp_path)).abilities
    assert told
    assert "text-to-image" in told.tasks


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "FluxPriorReduxPipeline",
            "Name a Flux model in parameters.model, and this one as its `diffusers: {prior: ...}`",
        ),
        ("StableCascadePriorPipeline", "Write `pipeline_type: StableCascadeCombinedPipeline`"),
        ("KandinskyV22PriorPipeline", "Write `pipeline_type: KandinskyV22CombinedPipeline`"),
    ],
)
def test_a_class_of_embeddings_is_refused_with_what_would_work(kind: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(f"parameters: {{model: o/r}}\ndiffusers: {{pipeline_type: {kind}}}")
    (report,) = check(Catalog([tmp_path]))
    assert not report.ok
    assert words in str(report)
    assert static_capabilities.static_capabilities(Catalog([tmp_path]).get("m")).tasks == ()


def test_a_picture_with_its_depth_has_no_alpha_channel() -> None:
    pipeline = ALL["StableDiffusionLDM3D"].build()
    pipeline.vae.register_to_config(out_channels=4)
    assert not capabilities.transparent(pipeline)


def test_a_unet_with_an_ip_adapter_claims_nothing_that_it_cannot_draw(tmp_path: Path) -> None:
    pipeline = families_controlled.ip_adapted()
    model = loaded(pipeline)
    can = class_reading.abilities_of(model.config, class_reading.kin_of_pipeline(pipeline))
    assert can.tasks == ()
    with pytest.raises(InvalidRequest, match="needs ip_adapter_image, which a request cannot give"):
        draw(model, wanted(prompt="a cat"), quiet)
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]})
    )
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"encoder_hid_dim_type": "ip_image_proj"}))
    told = static_capabilities.static_capabilities(ModelConfig(name="m", model=str(tmp_path)))
    assert told.abilities is not None
    assert "ip_adapter_image" in told.abilities.problem

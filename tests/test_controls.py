"""ControlNets that requests name: each draws what diffusers draws with that pipeline, and leaves nothing behind."""

from __future__ import annotations

import base64
import hashlib
import inspect
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import sfumato.commands.generate as command
from sfumato.checkpoints import ip_adapters, net_classes
from sfumato.core import Control
from sfumato.errors import InvalidRequest
from sfumato.pictures import recipe
from sfumato.settings import Settings
from support import estimators, nets
from support.families import picture
from support.families_served import MASK, Served, encoded, served
from support.hub import Hub

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and transformers' own, some about toy sizes

PICTURE, OTHER = picture(1), picture(2)
SENT, OTHER_SENT = encoded(PICTURE), encoded(OTHER)
WHITE = encoded(Image.new("RGB", (64, 64), "white"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    estimated_by = {kind: f"{kind}-here" for kind in estimators.SAVED}
    with served(tmp_path_factory.mktemp("nets"), nets.families(), **estimated_by) as server:
        for family in nets.CONTROLLED:
            nets.save_nets(server.folder, family)
        for kind, save in estimators.SAVED.items():
            save(server.folder / estimated_by[kind])
        nets.another("sd").save_pretrained(server.folder / "controlnets" / "sd" / "pose")
        yield server


def pixels(answer: Any) -> np.ndarray[Any, Any]:
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def of_diffusers(pipeline: Any, **call: Any) -> np.ndarray[Any, Any]:
    call = {"prompt": "a cat", "num_inference_steps": 4, "width": 64, "height": 64, **call}
    torch.manual_seed(1)  # the pipeline of Stable Diffusion 3 draws noise without its generator
    image = pipeline(generator=torch.Generator().manual_seed(1), **call).images[0]
    return np.asarray(image.convert("RGB")).astype(int)


def drawn(server: Served, family: str, **fields: Any) -> Any:
    return server.generate(server.model(family), **{"step": 4, "size": "64x64", **fields})


def guidance(family: str) -> dict[str, Any]:
    longest = {"max_sequence_length": 64} if family == "flux" else {}  # its classes have different defaults
    return longest | ({} if family == "qwen" else {"guidance_scale": 5.0})


@pytest.mark.parametrize("family", nets.CONTROLLED)
def test_one_net_by_name_is_the_pipeline_of_diffusers(server: Served, family: str) -> None:
    argument = nets.CONTROLLED[family][2]
    control = {"name": f"{family}/canny", "image": SENT, "weight": 0.7}
    answer = drawn(server, family, controls=[control], **guidance(family))
    expected = of_diffusers(
        nets.whole(family), **{argument: PICTURE}, controlnet_conditioning_scale=0.7, **guidance(family)
    )
    assert np.abs(pixels(answer) - expected).max() <= 1
    without = drawn(server, family, **guidance(family))
    assert np.abs(pixels(without) - of_diffusers(nets.plain(family), **guidance(family))).max() <= 1
    assert np.abs(pixels(without) - expected).max() > 1


@pytest.mark.parametrize("family", [name for name in nets.CONTROLLED if name != "qwen"])
def test_two_nets_with_their_own_weights_starts_and_ends(server: Served, family: str) -> None:
    argument = nets.CONTROLLED[family][2]
    controls = [
        {"name": f"{family}/canny", "image": SENT, "weight": 0.7, "end": 0.5},
        {"name": f"{family}/depth", "image": OTHER_SENT, "start": 0.5},
    ]
    answer = drawn(server, family, controls=controls, **guidance(family))
    whole = nets.whole(family)
    both = type(whole)(**{**whole.components, "controlnet": [whole.controlnet, nets.another(family)]})
    both.set_progress_bar_config(disable=True)
    expected = of_diffusers(
        both, **{argument: [PICTURE, OTHER]}, controlnet_conditioning_scale=[0.7, 1.0],
        control_guidance_start=[0.0, 0.5], control_guidance_end=[0.5, 1.0], **guidance(family),
    )  # fmt: skip
    assert np.abs(pixels(answer) - expected).max() <= 1
    swapped = [{**controls[0], "name": f"{family}/depth"}, {**controls[1], "name": f"{family}/canny"}]
    assert not np.array_equal(pixels(drawn(server, family, controls=swapped, **guidance(family))), pixels(answer))


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_a_picture_and_a_mask_are_redrawn_under_a_net_by_name(server: Served, family: str) -> None:
    source, control = picture(3), [{"name": f"{family}/canny", "image": SENT, "weight": 1}]
    fields: dict[str, Any] = {"image": encoded(source), "strength": 0.8, "guidance_scale": 5.0, "size": None}
    redrawn = pixels(drawn(server, family, controls=control, **fields))
    pipeline = {"sd": diffusers.StableDiffusionControlNetImg2ImgPipeline,
                "xl": diffusers.StableDiffusionXLControlNetImg2ImgPipeline}[family]  # fmt: skip
    taken = pipeline._get_signature_keys(pipeline)[0]
    more = {"requires_safety_checker": False} if family == "sd" else {}
    parts = {name: part for name, part in nets.whole(family).components.items() if name in taken}
    expected = of_diffusers(
        pipeline(**parts, **more), image=source, control_image=PICTURE, strength=0.8, guidance_scale=5.0,
        controlnet_conditioning_scale=1.0, width=None, height=None,
    )  # fmt: skip
    assert np.abs(redrawn - expected).max() <= 1
    masked = pixels(drawn(server, family, mask=MASK, controls=control, **fields))
    left = np.asarray(source).astype(int)[:, :32]
    assert np.array_equal(masked[:, :32], left)
    assert not np.array_equal(masked, redrawn)


def test_a_plain_request_after_a_controlled_one_is_that_of_a_fresh_pipeline(server: Served) -> None:
    before = pixels(drawn(server, "sd"))
    controlled = pixels(drawn(server, "sd", controls=[{"name": "sd/canny", "image": SENT}]))
    refused = drawn(server, "sd", controls=[{"name": "xl/canny", "image": SENT}])
    after = pixels(drawn(server, "sd"))
    assert refused.status_code == 400
    assert np.array_equal(before, after)
    assert not np.array_equal(before, controlled)
    fresh = of_diffusers(nets.plain("sd"), guidance_scale=8.0)
    assert np.abs(after - fresh).max() <= 1


@pytest.mark.parametrize(
    ("controls", "param", "says"),
    [
        ([{"name": "sd/nothing", "image": SENT}], "controls[0].name", "controlnets/ there are"),
        ([{"name": "../sd/canny", "image": SENT}], "controls[0].name", "there is no ControlNet"),
        ([{"name": "sd/canny", "image": SENT}, {"name": "?", "image": SENT}], "controls[1].name", "no ControlNet '?'"),
        ([{"name": "sd/canny", "image": SENT}, {"image": SENT}], "controls[1].name", "names no ControlNet"),
        ([{"name": "xl/canny", "image": SENT}], "controls[0].name", "made for another model"),
        ([{"name": "flux/canny", "image": SENT}], "controls[0].name", "takes ControlNetModel"),
        ([{"name": "qwen/canny", "image": SENT}], "controls[0].name", "takes ControlNetModel"),
        ([{"name": "damaged", "image": SENT}], "controls[0].name", "'damaged'"),
        ([{"name": "pickled", "image": SENT}], "controls[0].name", "no diffusion_pytorch_model.safetensors"),
        ([{"name": "sd/canny", "image": "bm90IGEgcGljdHVyZQ=="}], "controls[0].image", ""),
        ([{"name": "sd/canny", "image": SENT}, {"name": "sd/canny", "image": "!"}], "controls[1].image", ""),
        ([{"name": "sd/canny", "image": SENT, "mode": 1}], "controls", "mode"),
        ([{"name": "sd/canny", "image": SENT, "start": 0.5, "end": 0.5}], "controls[0].start", "is not before end 0.5"),
        ([{"name": "sd/canny", "image": SENT, "start": 1}], "controls[0].start", "start 1 is not before end 1"),
        ([{"name": "sd/canny", "image": SENT, "end": 0}], "controls[0].end", "start 0 is not before end 0"),
        ([{"name": "sd/canny", "image": SENT, "weight": 10.1}], "controls[0].weight", "10"),
        ([{"name": "sd/canny", "image": SENT, "weight": -1}], "controls[0].weight", "0"),
        ([{"name": "sd/canny", "image": SENT, "mode": 101}], "controls[0].mode", "100"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_field(
    server: Served, controls: list[dict[str, Any]], param: str, says: str, here: Hub
) -> None:
    folder = server.folder / "controlnets"
    for name in ("damaged", "pickled"):
        shutil.copytree(folder / "sd" / "canny", folder / name, dirs_exist_ok=True)
    weights = "diffusion_pytorch_model.safetensors"
    (folder / "damaged" / weights).write_bytes(b"no tensors")
    (folder / "pickled" / weights).rename(folder / "pickled" / "diffusion_pytorch_model.bin")
    answer = drawn(server, "sd", controls=controls)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], says in error["message"]) == (param, True), error


def test_nets_are_found_by_the_last_part_of_their_path_and_case_does_not_count(server: Served) -> None:
    shutil.copytree(server.folder / "controlnets" / "sd" / "canny", server.folder / "controlnets" / "deep" / "My Lines")
    try:
        by_path = drawn(server, "sd", controls=[{"name": "sd/canny", "image": SENT}])
        for name in ("my lines", "deep/My Lines", "My Lines [d14c016b]"):
            answer = drawn(server, "sd", controls=[{"name": name, "image": SENT}])
            assert np.array_equal(pixels(answer), pixels(by_path)), name
    finally:
        shutil.rmtree(server.folder / "controlnets" / "deep")


# AUTOMATIC1111's route.


def unit(**fields: Any) -> dict[str, Any]:
    """As webuiapi's ControlNetUnit sends it."""
    return {
        "image": SENT, "mask": None, "module": "none", "model": "sd/canny [d14c016b]", "weight": 1.0,
        "resize_mode": "Crop and Resize", "low_vram": False, "processor_res": 512, "threshold_a": 64, "threshold_b": 64,
        "guidance_start": 0.0, "guidance_end": 1.0, "control_mode": "Balanced", "pixel_perfect": False,
        "hr_option": "Both", "enabled": True, **fields,
    }  # fmt: skip


def by_webui(server: Served, *units: Any, route: str = "txt2img", **fields: Any) -> Any:
    body = {"prompt": "a cat", "seed": 1, "steps": 4, "width": 64, "height": 64, "cfg_scale": 5.0, **fields}
    body |= {"override_settings": {"sd_model_checkpoint": server.model("sd")}}
    body |= {"alwayson_scripts": {"ControlNet": {"args": list(units)}}}
    return server.client.post(f"/sdapi/v1/{route}", json=body)


def first(answer: Any) -> np.ndarray[Any, Any]:
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["images"][0])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_units_of_automatic1111_draw_what_controls_draw(server: Served) -> None:
    units = [unit(weight=0.7, guidance_end=0.5), unit(enabled=False), unit(model="None")]
    units.append(unit(image={"image": OTHER_SENT, "mask": None}, model="sd/depth", guidance_start=0.5))
    answer = by_webui(server, *units)
    controls = [
        {"name": "sd/canny", "image": SENT, "weight": 0.7, "end": 0.5, "start": 0},
        {"name": "sd/depth", "image": OTHER_SENT, "weight": 1, "start": 0.5, "end": 1},
    ]
    expected = drawn(server, "sd", controls=controls, guidance_scale=5.0)
    assert np.array_equal(first(answer), pixels(expected))
    assert "alwayson" not in answer.headers.get("x-sfumato-ignored", "")
    echoed = answer.json()["parameters"]["alwayson_scripts"]["ControlNet"]["args"]
    assert [each["image"] for each in echoed] == [None] * 4
    info = json.loads(answer.json()["info"])["infotexts"][0]
    assert 'ControlNet 0: "Module: none, Model: sd/canny [' in info
    sent = {"image": answer.json()["images"][0]}
    told = server.client.post("/sdapi/v1/png-info", json=sent).json()["parameters"]
    assert "Model: sd/depth [" in told["ControlNet 1"]
    assert "Guidance Start: 0.5, Guidance End: 1" in told["ControlNet 1"]
    assert told["Sampler"]


def test_a_unit_without_a_picture_follows_the_source_picture(server: Served) -> None:
    source = encoded(picture(3))
    fields: dict[str, Any] = {"init_images": [source], "denoising_strength": 0.8}
    answer = by_webui(server, unit(image="", weight=10), route="img2img", **fields)
    given = by_webui(server, unit(image="", input_image=source, weight=10), route="img2img", **fields)
    other = by_webui(server, unit(image=WHITE, weight=10), route="img2img", **fields)
    assert np.array_equal(first(answer), first(given))
    assert not np.array_equal(first(answer), first(other))


def test_what_a_unit_says_without_effect_is_told(server: Served) -> None:
    fields = {"resize_mode": "Resize and Fill", "control_mode": 2, "mask": SENT, "advanced_weighting": [1, 2]}
    warnings = json.loads(by_webui(server, unit(**fields)).json()["info"])["warnings"]
    text = json.dumps(warnings)
    for said in ("resize_mode", "control_mode", "mask has no effect", "advanced_weighting"):
        assert f"controlnet unit 0: {said}" in text, text


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"module": "lineart"}, "none, canny, invert, depth"),
        ({"weight": 99}, "weight: 99; 0 to 10 are valid"),
        ({"guidance_end": "late"}, "guidance_end: 'late'"),
        ({"image": 7}, "image must be base64"),
        ({"image": None}, "it has no image"),
        ({"model": "sd/no-such net"}, "there is no ControlNet"),
    ],
)
def test_a_unit_that_cannot_be_drawn_is_refused(server: Served, fields: dict[str, Any], says: str) -> None:
    answer = by_webui(server, unit(**fields))
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]["message"]


def test_the_lists_of_the_extension(server: Served) -> None:
    def read(name: str) -> Any:
        return server.client.get(f"/controlnet/{name}").json()

    assert {"sd/canny", "flux/depth"} <= set(read("model_list")["model_list"])
    assert read("module_list")["module_list"][:3] == ["none", "canny", "invert"]
    assert read("version") == {"version": 2}
    assert "sd/canny" in read("control_types")["control_types"]["All"]["model_list"]
    assert read("settings")["control_net_unit_count"] >= 3


# Preprocessors.


def test_canny_is_that_of_opencv_at_the_drawn_size(server: Served) -> None:
    smooth = Image.fromarray(np.asarray(Image.radial_gradient("L").resize((100, 100)).convert("RGB")) // 64 * 64)
    edges = cv2.Canny(np.asarray(ImageOps.fit(smooth, (64, 64), Image.Resampling.LANCZOS)), 100, 200)
    assert edges.any()
    prepared = drawn(server, "sd", controls=[{"name": "sd/canny", "image": encoded(Image.fromarray(edges))}])
    answer = drawn(server, "sd", controls=[{"name": "sd/canny", "image": encoded(smooth), "preprocess": "canny"}])
    assert np.array_equal(pixels(answer), pixels(prepared))
    both = {"threshold_a": 10, "threshold_b": 20}
    fine = by_webui(server, unit(image=encoded(smooth), module="canny", **both), cfg_scale=8.0)
    edges = cv2.Canny(np.asarray(ImageOps.fit(smooth, (64, 64), Image.Resampling.LANCZOS)), 10, 20)
    expected = by_webui(server, unit(image=encoded(Image.fromarray(edges))), cfg_scale=8.0)
    assert np.array_equal(first(fine), first(expected))


def test_a_preprocessor_that_is_not_there_is_refused_with_the_remedy(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = drawn(server, "sd", controls=[{"name": "sd/canny", "image": SENT, "preprocess": "lineart"}])
    assert unknown.status_code == 400
    assert unknown.json()["error"]["param"] == "controls[0].preprocess"
    assert "prepared already" in unknown.json()["error"]["message"]
    monkeypatch.setitem(sys.modules, "cv2", None)
    missing = drawn(server, "sd", controls=[{"name": "sd/canny", "image": SENT, "preprocess": "canny"}])
    assert missing.status_code == 400
    assert "sfumato[preprocess]" in missing.json()["error"]["message"]


# The recipe.


def test_the_recipe_has_the_nets_and_sfumato_generate_like_draws_it_again(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
    controls = [
        {"name": "sd/canny", "image": encoded(source), "weight": 2, "end": 0.5, "preprocess": "canny"},
        {"name": "sd/depth", "image": OTHER_SENT, "start": 0.25},
    ]
    answer = drawn(server, "sd", controls=controls)
    files = [tmp_path / name for name in ("made.png", "one.png", "two.png")]
    for file, data in zip(files, (answer.json()["data"][0]["b64_json"], encoded(source), OTHER_SENT), strict=True):
        file.write_bytes(base64.b64decode(data))
    first, second = recipe.read(files[0]).controls
    digest = hashlib.sha256((server.folder / "controlnets/sd/canny/diffusion_pytorch_model.safetensors").read_bytes())
    assert (first.name, first.net_sha256, first.weight, first.end) == ("sd/canny", digest.hexdigest(), 2, 0.5)
    assert (first.preprocess, second.preprocess, second.start) == ("canny", None, 0.25)
    settings = Settings(models=server.folder, data=tmp_path, device="cpu")
    again = command.generate(
        {"controls": [Control(file.read_bytes()) for file in files[1:]]},
        files[0],
        files[0].with_stem("again"),
        settings,
    )
    images = [np.asarray(Image.open(file)) for file in (files[0], *again)]
    assert np.array_equal(*images)
    found = command.generate({}, files[0], files[0].with_stem("found"), settings)  # both lie beside it
    assert np.array_equal(images[0], np.asarray(Image.open(found[0])))
    with pytest.raises(InvalidRequest, match=r"--control: the recipe was made from 2 such pictures, but 1 were passed"):
        command.generate({"controls": [Control(files[1].read_bytes())]}, files[0], None, settings)
    with pytest.raises(InvalidRequest, match="--control: not the picture that the recipe was made from"):
        command.generate({"controls": [Control(files[2].read_bytes())] * 2}, files[0], None, settings)


# The guide.

GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "controls.md"


@pytest.mark.parametrize("example", re.findall(r"```json\n(.*?)```", GUIDE.read_text(), re.DOTALL))
def test_the_guide_s_examples_draw(server: Served, example: str) -> None:
    server.draw_example(server.model("sd"), example.replace("PHOTO", SENT).replace("DEPTH", OTHER_SENT))


def test_the_model_file_need_not_allow_controls(server: Served) -> None:
    """As with LoRAs; `none` allows nothing."""
    file = json.loads((server.folder / f"{server.model('sd')}.yaml").read_text())
    expected = pixels(drawn(server, "sd", controls=[{"name": "sd/canny", "image": SENT}]))
    for name, allowed in (("usual", "negative_prompt,num_inference_steps"), ("closed", "none")):
        file |= {"name": name, "diffusers": {**file["diffusers"], "enable_parameters": allowed}}
        (server.folder / f"{name}.yaml").write_text(json.dumps(file))
        server.built[name] = server.built["sd"]
    controls = [{"name": "sd/canny", "image": SENT}]
    usual = server.generate("usual", controls=controls, size="64x64", step=4)
    assert np.array_equal(pixels(usual), expected)
    refused = server.generate("closed", controls=controls, size="64x64")
    assert refused.status_code == 400
    assert "does not allow requests to set it" in refused.json()["error"]["message"]


def test_an_option_that_the_class_of_the_nets_lacks_is_left_out(server: Served) -> None:
    """The file fits its own class; the request chose the other one."""
    control = {"name": "sd/canny", "image": SENT}
    expected = pixels(drawn(server, "sd", controls=[control]))
    file = json.loads((server.folder / f"{server.model('sd')}.yaml").read_text())
    assert "guidance_rescale" not in inspect.signature(diffusers.StableDiffusionControlNetPipeline.__call__).parameters
    file |= {"name": "lacking", "options": [*file["options"], "guidance_rescale:0.5"]}
    (server.folder / "lacking.yaml").write_text(json.dumps(file))
    server.built["lacking"] = server.built[server.model("sd")]
    answer = server.generate("lacking", step=4, size="64x64", controls=[control])
    assert np.abs(pixels(answer) - expected).max() <= 1


# What models take.


@pytest.mark.parametrize("family", nets.CONTROLLED)
def test_the_model_list_says_which_nets_a_model_takes(server: Served, family: str) -> None:
    """And it is so: the number, and the class of the net that is drawn with above."""
    name = server.model(family)
    listed = server.client.get(f"/v1/models/{name}").json()["sfumato"]["control_nets"]
    kind = type(nets.whole(family).controlnet).__name__
    (entry,) = [each for each in listed if each["class"] == kind]
    drawing = type(nets.whole(family))
    assert entry["mode"] == ("control_mode" in inspect.signature(drawing.__call__).parameters)
    control = {"name": f"{family}/canny", "image": SENT}
    answer = drawn(server, family, controls=[control, control], **guidance(family))
    assert (answer.status_code == 200) == (entry["most"] > 1), answer.text
    refused = {each for each in nets.CONTROLLED if type(nets.whole(each).controlnet).__name__ not in
               {known["class"] for known in listed}}  # fmt: skip
    for other in refused:
        answer = drawn(server, family, controls=[{"name": f"{other}/canny", "image": SENT}], **guidance(family))
        assert answer.status_code == 400
    assert refused


def test_the_classes_that_are_read_from_sources_are_those_of_diffusers() -> None:
    classes = [name for name in dir(diffusers) if name.endswith("Pipeline")]
    found = {each.name: each for name in classes for each in net_classes.of(name)}
    assert len(found) > 10
    for name, each in found.items():
        words = str(inspect.signature(getattr(diffusers, name).__init__).parameters["controlnet"].annotation)
        assert all(kind in words for kind in each.kinds), name
        assert each.kinds, name
        assert each.several == bool(re.search(r"\b(list|tuple)\[", words, re.IGNORECASE)), name


@pytest.mark.parametrize("described", ["[]", "{", '{"_class_name": "os.system"}', '{"_class_name": 3}'])
def test_a_folder_that_is_no_control_net_is_not_asked_of_the_hub(described: str, tmp_path: Path) -> None:
    folder = tmp_path / "controlnets" / "mine" / "canny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(described)
    with pytest.raises(InvalidRequest, match=r"is in controlnets/, but its config.json names no ControlNet"):
        ip_adapters.find_any(tmp_path, "mine/canny", "controls[0].name")


@pytest.mark.parametrize("name", ["/etc/passwd", "/models/nets/canny.safetensors", "~/canny/x", "./canny/x"])
def test_a_path_of_a_disk_is_not_asked_of_the_hub(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="there is no ControlNet") as refused:
        ip_adapters.find_any(tmp_path, name, "controls[0].name")
    assert refused.value.param == "controls[0].name"
    with pytest.raises(InvalidRequest, match="there is no ControlNet"):
        ip_adapters.find_any(tmp_path, f"{name}/ip-adapter.safetensors", "controls[0].name")

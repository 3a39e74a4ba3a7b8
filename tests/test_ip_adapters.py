"""IP-Adapters that requests name: each draws what diffusers draws with it, and leaves nothing behind."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from support import loras, nets, prompted
from support.answers import error_of, image_of
from support.families import picture
from support.families_served import MASK, Served, encoded, served

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and transformers' own, some about toy sizes

PICTURE, OTHER = picture(1), picture(2)
SENT, OTHER_SENT = encoded(PICTURE), encoded(OTHER)
FAMILIES = ("sd", "xl")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("prompted"), nets.families()) as server:
        folder = server.folder / "ip_adapters"
        prompted.save_encoder(folder / "image_encoder")
        for family in FAMILIES:
            unet = nets.plain(family).unet
            for form in prompted.FORMS:
                prompted.save_adapter(folder / family / f"{form}.safetensors", unet, form)
            nets.save_nets(server.folder, family)
        yield server


def drawn(server: Served, family: str, *controls: dict[str, Any], **fields: Any) -> Any:
    more = {"controls": list(controls)} if controls else {}
    return server.generate(
        server.model(family), **{"step": 4, "size": "64x64", "guidance_scale": 5.0, **more, **fields}
    )


def array(answer: Any) -> np.ndarray[Any, Any]:
    return np.asarray(image_of(answer).convert("RGB")).astype(int)


def of_diffusers(server: Served, family: str, files: list[str], scales: list[Any], **call: Any) -> Any:
    """What diffusers draws with these adapters on a pipeline of its own."""
    plain = nets.plain(family)
    more = {"requires_safety_checker": False} if family == "sd" else {}
    pipeline = call.pop("cls", type(plain))(
        **{name: copy.deepcopy(part) for name, part in plain.components.items()} | call.pop("parts", {}), **more
    )
    pipeline.set_progress_bar_config(disable=True)
    folder = server.folder / "ip_adapters"
    if files:
        pipeline.load_ip_adapter(
            str(folder), subfolder=family, weight_name=[f"{file}.safetensors" for file in files],
            image_encoder_folder="./image_encoder",
        )  # fmt: skip
        pipeline.set_ip_adapter_scale(scales)
    call = {"prompt": "a cat", "num_inference_steps": 4, "width": 64, "height": 64, "guidance_scale": 5.0, **call}
    image = pipeline(generator=torch.Generator().manual_seed(1), **call).images[0]
    return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("form", [*prompted.FORMS])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_by_name_is_what_diffusers_draws(server: Served, family: str, form: str) -> None:
    answer = drawn(server, family, {"name": f"{family}/{form}", "image": SENT, "weight": 0.6})
    expected = of_diffusers(server, family, [form], [0.6], ip_adapter_image=[[PICTURE]])
    assert np.abs(array(answer) - expected).max() <= 1
    assert np.abs(array(drawn(server, family)) - expected).max() > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_two_pictures_for_one_adapter_and_two_adapters(server: Served, family: str) -> None:
    two = drawn(server, family, {"name": f"{family}/plus", "image": [SENT, OTHER_SENT], "weight": 0.7})
    expected = of_diffusers(server, family, ["plus"], [0.7], ip_adapter_image=[[PICTURE, OTHER]])
    assert np.abs(array(two) - expected).max() <= 1
    adapters = [
        {"name": f"{family}/base", "image": SENT, "weight": 0.4},
        {"name": f"{family}/plus", "image": OTHER_SENT},
    ]
    both = drawn(server, family, *adapters)
    expected = of_diffusers(server, family, ["base", "plus"], [0.4, 1.0], ip_adapter_image=[[PICTURE], [OTHER]])
    assert np.abs(array(both) - expected).max() <= 1
    assert not np.array_equal(array(both), array(two))
    twice = drawn(server, family, *({**each, "name": f"{family}/base"} for each in adapters))
    expected = of_diffusers(server, family, ["base", "base"], [0.4, 1.0], ip_adapter_image=[[PICTURE], [OTHER]])
    assert np.abs(array(twice) - expected).max() <= 1


@pytest.mark.parametrize(("start", "end"), [(0.5, 1.0), (0.0, 0.5), (0.25, 0.75)])
def test_an_adapter_acts_in_a_part_of_the_steps(server: Served, start: float, end: float) -> None:
    control = {"name": "sd/plus", "image": SENT, "weight": 0.8, "start": start, "end": end}
    answer = drawn(server, "sd", control)

    def paced(pipeline: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        done, total = step + 1, len(pipeline.scheduler.timesteps)
        pipeline.set_ip_adapter_scale(0.8 if done / total >= start and (done + 1) / total <= end else 0.0)
        return kwargs

    first = 0.0 if start else 0.8
    expected = of_diffusers(server, "sd", ["plus"], [first], ip_adapter_image=[[PICTURE]], callback_on_step_end=paced)
    assert np.abs(array(answer) - expected).max() <= 1
    whole = drawn(server, "sd", {**control, "start": 0, "end": 1})
    assert not np.array_equal(array(answer), array(whole))


def test_an_adapter_of_weight_zero_changes_nothing(server: Served) -> None:
    control = {"name": "sd/base", "image": SENT, "weight": 0}
    assert np.abs(array(drawn(server, "sd", control)) - array(drawn(server, "sd"))).max() <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_request_after_it_is_that_of_a_fresh_pipeline(server: Served, family: str) -> None:
    before = array(drawn(server, family))
    prompted_ones = array(drawn(server, family, {"name": f"{family}/plus", "image": SENT}))
    unfit = drawn(server, family, {"name": "xl/plus" if family == "sd" else "sd/plus", "image": SENT})
    after = array(drawn(server, family))
    assert unfit.status_code == 400
    assert np.array_equal(before, after)
    assert not np.array_equal(before, prompted_ones)
    unet = server.built[family].unet
    assert unet.encoder_hid_proj is None
    assert not any(hasattr(each, "to_k_ip") for each in unet.attn_processors.values())
    assert server.built[family].image_encoder is None
    assert np.abs(after - of_diffusers(server, family, [], [])).max() <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_and_a_mask_are_redrawn_with_an_adapter(server: Served, family: str) -> None:
    source = picture(3)
    fields: dict[str, Any] = {"image": encoded(source), "strength": 0.8, "size": None}
    control = {"name": f"{family}/base", "image": OTHER_SENT, "weight": 0.9}
    redrawn = array(drawn(server, family, control, **fields))
    cls = {"sd": diffusers.StableDiffusionImg2ImgPipeline, "xl": diffusers.StableDiffusionXLImg2ImgPipeline}[family]
    call = {"image": source, "strength": 0.8, "ip_adapter_image": [[OTHER]], "width": None, "height": None}
    expected = of_diffusers(server, family, ["base"], [0.9], cls=cls, **call)
    assert np.abs(redrawn - expected).max() <= 1
    masked = array(drawn(server, family, control, mask=MASK, **fields))
    assert np.array_equal(masked[:, :32], np.asarray(source).astype(int)[:, :32])
    assert not np.array_equal(masked, redrawn)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_beside_a_control_net(server: Served, family: str) -> None:
    controls = [
        {"name": f"{family}/canny", "image": SENT, "weight": 0.7},
        {"name": f"{family}/plus", "image": OTHER_SENT, "weight": 0.6},
    ]
    answer = drawn(server, family, *controls)
    net = copy.deepcopy(nets.whole(family).controlnet)
    cls, parts = type(nets.whole(family)), {"controlnet": net}
    call = {"image": PICTURE, "controlnet_conditioning_scale": 0.7, "ip_adapter_image": [[OTHER]]}
    expected = of_diffusers(server, family, ["plus"], [0.6], cls=cls, parts=parts, **call)
    assert np.abs(array(answer) - expected).max() <= 1
    assert np.array_equal(array(drawn(server, family, *reversed(controls))), array(answer))


def test_an_adapter_beside_a_lora(server: Served) -> None:
    file = loras.saved(loras.kohya(nets.plain("sd")), server.folder / "loras" / "style.safetensors")
    answer = drawn(server, "sd", {"name": "sd/base", "image": SENT, "weight": 0.6}, loras=["style"])
    plain = nets.plain("sd")
    parts = {name: copy.deepcopy(part) for name, part in plain.components.items()}
    adapted = type(plain)(**parts, requires_safety_checker=False)
    adapted.load_lora_weights(str(file.parent), weight_name=file.name)
    expected = of_diffusers(server, "sd", ["base"], [0.6], ip_adapter_image=[[PICTURE]], parts={"unet": adapted.unet})
    assert np.abs(array(answer) - expected).max() <= 1
    assert not np.array_equal(array(answer), array(drawn(server, "sd", loras=["style"])))


@pytest.mark.parametrize(
    ("control", "param", "says"),
    [
        ({"name": "nothing", "image": SENT}, "controls[0].name", "In ip_adapters/ there are sd/base"),
        ({"name": "base", "image": SENT}, "controls[0].name", "may be sd/base or xl/base"),
        (
            {"name": "xl/base", "image": SENT},
            "controls[0].name",
            "has keys that the model has no place for ip_adapter.",
        ),
        ({"name": "sd/half", "image": SENT}, "controls[0].name", "lacks ip_adapter.1.to_k_ip.weight"),
        ({"name": "sd/shapes", "image": SENT}, "controls[0].name", "has shapes of another model in ip_adapter.1.to_k"),
        ({"name": "sd/shallow", "image": SENT}, "controls[0].name", "lacks tensors for layers.3"),
        ({"name": "sd/face", "image": SENT}, "controls[0].name", "FaceID"),
        ({"name": "sd/lora", "image": SENT}, "controls[0].name", "is no IP-Adapter"),
        ({"name": "sd/damaged", "image": SENT}, "controls[0].name", "damaged"),
        ({"name": "sd/strange", "image": SENT}, "controls[0].name", "no finite numbers in ip_adapter.1.to_k_ip"),
        ({"name": "sd/whole-numbers", "image": SENT}, "controls[0].name", "has no finite numbers in"),
        ({"name": "sd/wide", "image": SENT}, "controls[0].name", "needs an image encoder"),
        ({"name": "sd/base", "image": SENT, "mode": 1}, "controls[0].mode", "takes none"),
        ({"name": "sd/base", "image": SENT, "preprocess": "invert"}, "controls[0].preprocess", "takes none"),
        ({"name": "sd/base", "image": [SENT, "bm8="]}, "controls[0].image", ""),
        ({"name": "sd/base", "image": []}, "controls", "image"),
        ({"name": "sd/canny", "image": [SENT, SENT]}, "controls[0].image", "only an IP-Adapter takes several"),
        ({"name": "sd/both", "image": SENT}, "controls[0].name", "rename one of them"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_field(
    server: Served, control: dict[str, Any], param: str, says: str
) -> None:
    save_unfit(server.folder)
    error = error_of(drawn(server, "sd", control))
    assert (error["param"].startswith(param), says in error["message"]) == (True, True), error


def save_unfit(folder: Path) -> None:
    """Files that are no adapters for `sd`, one for each reason."""
    adapters = folder / "ip_adapters" / "sd"
    whole, plus = (load_file(adapters / f"{form}.safetensors") for form in ("base", "plus"))
    first = "ip_adapter.1.to_k_ip.weight"
    files = {
        "half": {name: tensor for name, tensor in whole.items() if name != first},
        "shapes": {**whole, first: whole[first][:, :-1].contiguous()},
        "shallow": {name: tensor for name, tensor in plus.items() if "layers.3" not in name},
        "face": {name.replace("proj.proj.", "proj.proj.0."): tensor for name, tensor in whole.items()},
        "lora": loras.kohya(nets.plain("sd")),
        "strange": {**whole, first: torch.full_like(whole[first], torch.nan)},
        "whole-numbers": {name: tensor.to(torch.int32) for name, tensor in whole.items()},
        "wide": {**whole, "image_proj.proj.weight": torch.zeros(128, 7)},
    }
    for name, tensors in files.items():
        loras.saved(tensors, adapters / f"{name}.safetensors")
    (adapters / "damaged.safetensors").write_bytes(b"no tensors")
    shutil.copy(adapters / "base.safetensors", adapters / "both.safetensors")
    shutil.copytree(folder / "controlnets" / "sd" / "canny", folder / "controlnets" / "sd" / "both", dirs_exist_ok=True)


def test_an_adapter_for_a_family_without_any_is_refused(server: Served) -> None:
    error = error_of(server.generate(server.model("qwen"), controls=[{"name": "sd/base", "image": SENT}], step=2))
    assert error["param"] == "controls[0].name"
    assert "takes no IP-Adapters" in error["message"]
    assert [server.told(server.model(each))["ip_adapters"] for each in ("sd", "xl", "qwen")] == [True, True, False]


def test_names_are_found_by_their_last_part_with_the_suffix_or_a_hash(server: Served) -> None:
    by_path = drawn(server, "sd", {"name": "sd/plus", "image": SENT})
    adapters = server.folder / "ip_adapters"
    shutil.copy(adapters / "sd" / "plus.safetensors", adapters / "IP-Adapter-Plus_sd.safetensors")
    for name in ("ip-adapter-plus_sd", "IP-Adapter-Plus_sd.safetensors", "IP-Adapter-Plus_sd [836b5c2e]"):
        assert np.array_equal(array(drawn(server, "sd", {"name": name, "image": SENT})), array(by_path)), name
    listed = server.client.get("/controlnet/model_list").json()["model_list"]
    assert {"IP-Adapter-Plus_sd", "sd/plus", "sd/canny"} <= set(listed)
    assert not any("image_encoder" in name for name in listed)


def by_webui(server: Served, *units: dict[str, Any], route: str = "txt2img", **fields: Any) -> Any:
    body = {"prompt": "a cat", "seed": 1, "steps": 4, "width": 64, "height": 64, "cfg_scale": 5.0, **fields}
    body |= {"override_settings": {"sd_model_checkpoint": server.model("sd")}}
    body |= {"alwayson_scripts": {"controlnet": {"args": list(units)}}}
    answer = server.client.post(f"/sdapi/v1/{route}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def first(answer: Any) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).convert("RGB")).astype(int)


def test_units_of_automatic1111_draw_what_controls_draw(server: Served) -> None:
    unit = {"module": "ip-adapter_clip_sd15", "model": "sd/plus [836b5c2e]", "image": SENT, "weight": 0.7}
    other = {"module": "none", "model": "sd/canny", "image": OTHER_SENT}
    answer = by_webui(server, {**unit, "guidance_end": 0.5}, other)
    controls = [
        {"name": "sd/plus", "image": SENT, "weight": 0.7, "end": 0.5},
        {"name": "sd/canny", "image": OTHER_SENT},
    ]
    assert np.array_equal(first(answer), array(drawn(server, "sd", *controls)))
    info = json.loads(answer["info"])
    digest = hashlib.sha256((server.folder / "ip_adapters" / "sd" / "plus.safetensors").read_bytes()).hexdigest()
    assert f"Model: sd/plus [{digest[:8]}], Weight: 0.7" in info["infotexts"][0]
    assert not info.get("warnings")
    assert "ip-adapter_clip_sd15" in server.client.get("/controlnet/module_list").json()["module_list"]


def test_the_picture_of_an_adapter_keeps_its_shape_where_a_source_is_stretched(server: Served) -> None:
    wide = Image.new("RGB", (128, 32), "red")
    wide.paste(PICTURE.resize((32, 32)), (48, 0))
    source = encoded(picture(3))
    unit = {"module": "ip-adapter-auto", "model": "sd/plus", "image": encoded(wide), "weight": 1.0}
    fields: dict[str, Any] = {"init_images": [source], "denoising_strength": 0.8, "resize_mode": 0}
    answer = by_webui(server, unit, route="img2img", **fields)
    control = {"name": "sd/plus", "image": encoded(wide), "weight": 1.0}
    expected = drawn(server, "sd", control, image=source, strength=0.8, size=None)
    assert np.array_equal(first(answer), array(expected))


# The guide and the model file.

GUIDE = (Path(__file__).parent.parent / "docs" / "guides" / "ip-adapter.md").read_text()


@pytest.mark.parametrize("example", re.findall(r"```json\n(.*?)```", GUIDE, re.DOTALL))
def test_the_examples_of_the_guide_draw(server: Served, example: str) -> None:
    server.model("sd")
    loras.saved(loras.kohya(nets.plain("sd")), server.folder / "loras" / "style.safetensors")
    server.draw_example("sd", example.replace("PHOTO", SENT).replace("OTHER", OTHER_SENT))


def test_an_adapter_of_the_model_file_follows_controls_without_a_name(server: Served) -> None:
    (of_guide,) = (yaml.safe_load(code) for code in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL))
    file = json.loads((server.folder / f"{server.model('sd')}.yaml").read_text())
    shutil.copy(server.folder / "ip_adapters" / "sd" / "plus.safetensors", server.folder / "beside.safetensors")
    of_files = {"portraits": of_guide["diffusers"]["ip_adapter"], "both": ["beside.safetensors", "sd/base"]}
    for name, adapters in of_files.items():
        file |= {"name": name, "diffusers": {**file["diffusers"], "ip_adapter": adapters}}
        (server.folder / f"{name}.yaml").write_text(json.dumps(file))
        server.built[name] = server.built["sd"]
    fields = {"step": 4, "size": "64x64", "guidance_scale": 5.0}
    named = drawn(server, "sd", {"name": "sd/plus", "image": SENT, "weight": 0.6})
    answer = server.generate("portraits", controls=[{"image": SENT, "weight": 0.6}], **fields)
    assert np.array_equal(array(answer), array(named))
    assert np.array_equal(array(server.generate("portraits", **fields)), array(drawn(server, "sd")))
    two = [{"image": SENT}, {"image": OTHER_SENT}]
    names = [{**control, "name": name} for control, name in zip(two, ("sd/plus", "sd/base"), strict=True)]
    assert np.array_equal(array(server.generate("both", controls=two, **fields)), array(drawn(server, "sd", *names)))
    assert error_of(server.generate("portraits", controls=two, **fields))["param"] == "controls[1].name"


@pytest.mark.parametrize("how", ["written over", "replaced"])
def test_an_adapter_whose_file_changes_is_read_again(server: Served, how: str) -> None:
    folder = server.folder / "ip_adapters" / "sd"
    file, name = folder / f"mine-{how.split()[0]}.safetensors", f"sd/mine-{how.split()[0]}"
    shutil.copy(folder / "base.safetensors", file)
    try:
        before = array(drawn(server, "sd", {"name": name, "image": SENT}))
        if how == "replaced":
            shutil.copy(folder / "plus.safetensors", folder / "new")
            (folder / "new").replace(file)
        else:
            shutil.copy(folder / "plus.safetensors", file)
        after = array(drawn(server, "sd", {"name": name, "image": SENT}))
    finally:
        file.unlink()
    assert np.array_equal(before, array(drawn(server, "sd", {"name": "sd/base", "image": SENT})))
    assert np.array_equal(after, array(drawn(server, "sd", {"name": "sd/plus", "image": SENT})))
    assert not np.array_equal(before, after)

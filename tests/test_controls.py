"""ControlNets that requests name: each draws what diffusers draws with that pipeline, and leaves nothing behind."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from support import nets
from support.families import picture
from support.families_served import MASK, Served, encoded, served

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and transformers' own, some about toy sizes

PICTURE, OTHER = picture(1), picture(2)
SENT, OTHER_SENT = encoded(PICTURE), encoded(OTHER)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("nets"), nets.families()) as server:
        for family in nets.CONTROLLED:
            nets.save_nets(server.folder, family)
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
        ([{"name": "damaged", "image": SENT}], "controls[0].name", "'damaged'"),
        ([{"name": "pickled", "image": SENT}], "controls[0].name", "no diffusion_pytorch_model.safetensors"),
        ([{"name": "sd/canny", "image": "bm90IGEgcGljdHVyZQ=="}], "controls[0].image", ""),
        ([{"name": "sd/canny", "image": SENT}, {"name": "sd/canny", "image": "!"}], "controls[1].image", ""),
        ([{"name": "sd/canny", "image": SENT, "mode": 1}], "controls", "mode"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_field(
    server: Served, controls: list[dict[str, Any]], param: str, says: str
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

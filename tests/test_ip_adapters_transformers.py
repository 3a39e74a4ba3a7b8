"""IP-Adapters of FLUX and Stable Diffusion 3: each draws what diffusers draws with it, and leaves nothing behind."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from safetensors.torch import load_file

from sfumato.checkpoints import ip_adapters as files
from support import loras, nets, prompted
from support.answers import error_of, image_of
from support.families import picture
from support.families_served import MASK, Served, encoded, served

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")

PICTURE, OTHER = picture(1), picture(2)
SENT, OTHER_SENT = encoded(PICTURE), encoded(OTHER)
FAMILIES = ("flux", "sd3")
TEXT = {"flux": {"max_sequence_length": 64}, "sd3": {}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("prompted"), nets.families()) as server:
        folder = server.folder / "ip_adapters"
        prompted.save_encoder(folder / "image_encoder")
        prompted.save_siglip(folder / "siglip")
        generator = torch.Generator().manual_seed(31)
        flux = nets.plain("flux").transformer
        for name in ("usual", "second"):
            tensors = prompted.flux(flux, generator)
            loras.saved(tensors, folder / "flux" / f"{name}.safetensors")
            if name == "usual":
                loras.saved(prompted.xlabs(tensors), folder / "flux" / "xlabs.safetensors")
        loras.saved(prompted.sd3(nets.plain("sd3").transformer, generator), folder / "sd3" / "usual.safetensors")
        for family in FAMILIES:
            nets.save_nets(server.folder, family)
        yield server


def drawn(server: Served, family: str, *controls: dict[str, Any], **fields: Any) -> Any:
    more = {"controls": list(controls)} if controls else {}
    return server.generate(
        server.model(family), **{"step": 4, "size": "64x64", "guidance_scale": 5.0, **TEXT[family], **more, **fields}
    )


def array(answer: Any) -> np.ndarray[Any, Any]:
    return np.asarray(image_of(answer).convert("RGB")).astype(int)


def of_diffusers(server: Served, family: str, names: list[str], scale: Any, **call: Any) -> Any:
    """What diffusers draws with these adapters on a pipeline of its own."""
    plain = nets.plain(family)
    parts = {name: copy.deepcopy(part) for name, part in plain.components.items()} | call.pop("parts", {})
    pipeline = call.pop("cls", type(plain))(**parts)
    pipeline.set_progress_bar_config(disable=True)
    folder = server.folder / "ip_adapters"
    if names and family == "flux":
        pipeline.load_ip_adapter(
            [str(folder / "flux")] * len(names), [f"{name}.safetensors" for name in names],
            image_encoder_pretrained_model_name_or_path=str(folder / "image_encoder"),
            image_encoder_dtype=torch.float32,
        )  # fmt: skip
    elif names:
        pipeline.load_ip_adapter(
            str(folder / "sd3"), f"{names[0]}.safetensors", image_encoder_folder=str(folder / "siglip")
        )
    if names:
        pipeline.set_ip_adapter_scale(scale)
    call = {"prompt": "a cat", "num_inference_steps": 4, "width": 64, "height": 64, "guidance_scale": 5.0, **call}
    torch.manual_seed(1)  # the pipeline of Stable Diffusion 3 draws noise without its generator
    image = pipeline(generator=torch.Generator().manual_seed(1), **TEXT[family], **call).images[0]
    return np.asarray(image.convert("RGB")).astype(int)


def taken(family: str, *pictures: Any) -> Any:
    return [list(each) for each in pictures] if family == "flux" else pictures[0][0]


@pytest.mark.parametrize(("family", "name"), [("flux", "usual"), ("flux", "xlabs"), ("sd3", "usual")])
def test_an_adapter_by_name_is_what_diffusers_draws(server: Served, family: str, name: str) -> None:
    answer = drawn(server, family, {"name": f"{family}/{name}", "image": SENT, "weight": 0.6})
    expected = of_diffusers(server, family, [name], 0.6, ip_adapter_image=taken(family, [PICTURE]))
    assert np.abs(array(answer) - expected).max() <= 1
    assert np.abs(array(drawn(server, family)) - expected).max() > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_request_after_it_is_that_of_a_fresh_pipeline(server: Served, family: str) -> None:
    before = array(drawn(server, family))
    prompted_ones = array(drawn(server, family, {"name": f"{family}/usual", "image": SENT}))
    unfit = drawn(server, family, {"name": "sd3/usual" if family == "flux" else "flux/usual", "image": SENT})
    after = array(drawn(server, family))
    assert error_of(unfit)["param"] == "controls[0].name"
    assert np.array_equal(before, after)
    assert not np.array_equal(before, prompted_ones)
    pipeline = server.built[family]
    processors = pipeline.transformer.attn_processors.values()
    assert not any(
        isinstance(each, SD3IPAdapterJointAttnProcessor2_0 | FluxIPAdapterAttnProcessor) for each in processors
    )
    assert getattr(pipeline.transformer, "encoder_hid_proj", None) is None
    assert getattr(pipeline.transformer, "image_proj", None) is None
    assert pipeline.image_encoder is None
    assert np.abs(after - of_diffusers(server, family, [], 0)).max() <= 1


def test_flux_takes_several_adapters_and_pictures(server: Served) -> None:
    two = drawn(server, "flux", {"name": "flux/usual", "image": [SENT, OTHER_SENT], "weight": 0.7})
    expected = of_diffusers(server, "flux", ["usual"], 0.7, ip_adapter_image=[[PICTURE, OTHER]])
    assert np.abs(array(two) - expected).max() <= 1
    controls = [{"name": "flux/usual", "image": SENT, "weight": 0.4}, {"name": "flux/second", "image": OTHER_SENT}]
    both = drawn(server, "flux", *controls)
    call: dict[str, Any] = {"ip_adapter_image": [[PICTURE], [OTHER]]}
    expected = of_diffusers(server, "flux", ["usual", "second"], [0.4, 1.0], **call)
    assert np.abs(array(both) - expected).max() <= 1
    assert not np.array_equal(array(both), array(two))
    redrawn = drawn(server, "flux", *controls, image=encoded(picture(3)), strength=0.8, size=None)
    black = [np.zeros((64, 64, 3), np.uint8)] * 2  # this class of diffusers makes one, and then counts two adapters
    call |= {"image": picture(3), "strength": 0.8, "negative_ip_adapter_image": black, "width": 64, "height": 64}
    expected = of_diffusers(server, "flux", ["usual", "second"], [0.4, 1.0], cls=diffusers.FluxImg2ImgPipeline, **call)
    assert np.abs(array(redrawn) - expected).max() <= 1


@pytest.mark.parametrize("controls", [
    [{"name": "sd3/usual", "image": [SENT, OTHER_SENT]}],
    [{"name": "sd3/usual", "image": SENT}, {"name": "sd3/usual", "image": OTHER_SENT}],
])  # fmt: skip
def test_stable_diffusion_3_takes_one_adapter_with_one_picture(server: Served, controls: list[dict[str, Any]]) -> None:
    error = error_of(drawn(server, "sd3", *controls))
    assert (error["param"], "takes 1 IP-Adapter, with 1 picture" in error["message"]) == ("controls[0].name", True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("start", "end"), [(0.5, 1.0), (0.0, 0.5)])
def test_an_adapter_acts_in_a_part_of_the_steps(server: Served, family: str, start: float, end: float) -> None:
    control = {"name": f"{family}/usual", "image": SENT, "weight": 0.8}
    answer = array(drawn(server, family, {**control, "start": start, "end": end}))

    def paced(pipeline: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        done, total = step + 1, 4
        pipeline.set_ip_adapter_scale(0.8 if done / total >= start and (done + 1) / total <= end else 0.0)
        return kwargs

    # Of weight 0 at the start, diffusers' pipeline of Stable Diffusion 3 leaves the adapter out altogether.
    first = 1e-30 if start else 0.8
    call: dict[str, Any] = {"ip_adapter_image": taken(family, [PICTURE]), "callback_on_step_end": paced}
    assert np.abs(answer - of_diffusers(server, family, ["usual"], first, **call)).max() <= 1
    assert not np.array_equal(answer, array(drawn(server, family, control)))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_weight_zero_changes_nothing(server: Served, family: str) -> None:
    control = {"name": f"{family}/usual", "image": SENT, "weight": 0}
    assert np.abs(array(drawn(server, family, control)) - array(drawn(server, family))).max() <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_beside_a_control_net_and_under_a_picture_and_a_mask(server: Served, family: str) -> None:
    controls = [
        {"name": f"{family}/canny", "image": SENT, "weight": 0.7},
        {"name": f"{family}/usual", "image": OTHER_SENT, "weight": 0.6},
    ]
    answer = drawn(server, family, *controls)
    net = copy.deepcopy(nets.whole(family).controlnet)
    call = {"control_image": PICTURE, "controlnet_conditioning_scale": 0.7}
    call |= {"ip_adapter_image": taken(family, [OTHER])}
    expected = of_diffusers(
        server, family, ["usual"], 0.6, cls=type(nets.whole(family)), parts={"controlnet": net}, **call
    )
    assert np.abs(array(answer) - expected).max() <= 1
    source = picture(3)
    masked = array(drawn(server, family, controls[1], image=encoded(source), mask=MASK, strength=0.8, size=None))
    assert np.array_equal(masked[:, :32], np.asarray(source).astype(int)[:, :32])


def test_an_adapter_of_the_model_file_and_the_list_of_models(server: Served) -> None:
    for family in FAMILIES:
        assert server.told(server.model(family))["ip_adapters"] is True
        file = json.loads((server.folder / f"{family}.yaml").read_text())
        file |= {"name": f"{family}-own", "diffusers": {**file["diffusers"], "ip_adapter": f"{family}/usual"}}
        (server.folder / f"{family}-own.yaml").write_text(json.dumps(file))
        server.built[f"{family}-own"] = server.built[family]
        fields = {"step": 4, "size": "64x64", "guidance_scale": 5.0, **TEXT[family]}
        own = server.generate(f"{family}-own", controls=[{"image": SENT, "weight": 0.6}], **fields)
        named = drawn(server, family, {"name": f"{family}/usual", "image": SENT, "weight": 0.6})
        assert np.array_equal(array(own), array(named))


@pytest.mark.parametrize(
    ("family", "lacking"), [("flux", "ip_adapter.0.to_k_ip.bias"), ("sd3", "ip_adapter.0.norm_ip_k.weight")]
)
def test_a_file_that_lacks_a_tensor_is_refused_with_its_key(server: Served, family: str, lacking: str) -> None:
    folder = server.folder / "ip_adapters" / family
    tensors = {name: each for name, each in load_file(folder / "usual.safetensors").items() if name != lacking}
    loras.saved(tensors, folder / "half.safetensors")
    error = error_of(drawn(server, family, {"name": f"{family}/half", "image": SENT}))
    assert (error["param"], f"lacks {lacking}" in error["message"]) == ("controls[0].name", True), error


def test_an_encoder_of_the_wrong_kind_is_not_taken(server: Served) -> None:
    """SigLIP and CLIP may be equally wide; a whole CLIP, as OpenAI's repository has it, is as good as its vision."""
    folder = server.folder / "ip_adapters"
    for family, kind in (("flux", files.CLIP), ("sd3", files.SIGLIP)):
        encoder = files.encoder_of(folder / family / "usual.safetensors")
        assert encoder.kind == kind
        width = {encoder.setting: encoder.width}
        assert encoder.fits({"model_type": kind, **width})
        assert not encoder.fits({"model_type": {files.CLIP: files.SIGLIP, files.SIGLIP: files.CLIP}[kind], **width})
        assert encoder.fits({"model_type": kind.partition("_")[0], "vision_config": width})
        assert not encoder.fits({"model_type": kind.partition("_")[0], "vision_config": {}, **width})
    assert transformers.AutoConfig.from_pretrained(folder / "siglip").model_type == files.SIGLIP

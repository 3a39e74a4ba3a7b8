"""AUTOMATIC1111's hires fix: a picture in two passes, the second from the first one's, enlarged."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionImg2ImgPipeline
from PIL import Image
from safetensors.torch import save_file

import sfumato
import sfumato.commands.generate as command
from sfumato.core import Generation
from sfumato.drawing import latent_sources, two_passes
from sfumato.pictures import recipe as recipes
from sfumato.sampling import UPSCALERS, Hires, Sampling, whole_steps
from sfumato.settings import Settings
from support import tiny
from support.drawing import loaded, quiet, wanted
from support.held import Held
from support.inside import Inside
from support.serving import Server

TINY = Path(sfumato.__file__).parent / "models" / "sfumato-tiny"
FIRST: dict[str, Any] = {"prompt": "a cat", "width": 64, "height": 64, "steps": 4, "seed": 7, "sampler_name": "Euler"}
HIRES: dict[str, Any] = {"enable_hr": True, "hr_scale": 2, "denoising_strength": 0.5, "hr_second_pass_steps": 3}


def post(server: Server, path: str = "txt2img", **body: Any) -> httpx.Response:
    answer = server.client.post(f"/sdapi/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer


def drawn(server: Server, path: str = "txt2img", **body: Any) -> tuple[Image.Image, dict[str, Any]]:
    answer = post(server, path, **body).json()
    return Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))), json.loads(answer["info"])


def base64_of(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def apart(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one.convert("RGB"), int) - np.asarray(other.convert("RGB"), int)).mean())


def test_pixels_are_enlarged_and_drawn_from(server: Server) -> None:
    """The same as both requests one after the other: txt2img, then img2img from that picture at twice the size."""
    image, _ = drawn(server, **FIRST, **HIRES, hr_upscaler="Lanczos")
    assert image.size == (128, 128)
    first, _ = drawn(server, **FIRST)
    larger = first.convert("RGB").resize((128, 128), Image.Resampling.LANCZOS)
    second = FIRST | {"width": 128, "height": 128, "steps": whole_steps(3, 0.5), "denoising_strength": 0.5}
    again, _ = drawn(server, "img2img", **second, init_images=[base64_of(larger)])
    assert apart(image, again) < 0.5
    assert apart(image, larger) > 1


def test_each_upscaler_is_another(server: Server) -> None:
    names = ("Lanczos", "Latent", "Latent (bicubic)", "Latent (nearest)")
    pictures = {name: drawn(server, **FIRST, **HIRES, hr_upscaler=name) for name in names}
    for name, (image, info) in pictures.items():
        assert image.size == (128, 128)
        assert info["warnings"] == []
        assert json.loads(image.info["sfumato"])["hires"]["upscaler"] == name
    for name in names:
        assert all(apart(pictures[name][0], pictures[other][0]) > 0.1 for other in names if other != name)
    nearest, _ = drawn(server, **FIRST, **HIRES, hr_upscaler="Nearest")
    assert apart(nearest, pictures["Lanczos"][0]) > 0
    listed = [each["name"] for each in server.client.get("/sdapi/v1/latent-upscale-modes").json()]
    assert listed == [name for name, mode in UPSCALERS.items() if mode]


@pytest.mark.parametrize("upscaler", ["Lanczos", "Latent"])
def test_a_weak_second_pass_stays_near_the_first(server: Server, upscaler: str) -> None:
    weak = HIRES | {"denoising_strength": 0.05, "hr_second_pass_steps": 1, "hr_upscaler": upscaler}
    image, _ = drawn(server, **FIRST, **weak)
    first, _ = drawn(server, **FIRST)
    assert apart(image, first.convert("RGB").resize((128, 128), Image.Resampling.BICUBIC)) < 6


@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
def test_latents_are_diffusers(size: tuple[int, int]) -> None:
    """What the pipeline gets is what its own VAE makes of the picture, enlarged; and it takes that for latents."""
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(TINY, safety_checker=None)
    picture = Image.radial_gradient("L").convert("RGB").resize((64, 64))
    factor = pipeline.vae_scale_factor
    canvas = picture.resize((size[0] * factor, size[1] * factor))
    generation = Generation("", "a cat", 1, images=(base64.b64decode(base64_of(picture)),), latents="Latent (bicubic)")
    taken = latent_sources.of_source(pipeline, generation, {"image": canvas})["image"]
    assert taken.shape == (1, 4, size[1], size[0])
    pixels = pipeline.image_processor.preprocess(picture)
    with torch.no_grad():
        whole = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    if size[0] == size[1]:
        assert torch.allclose(taken, torch.nn.functional.interpolate(whole, size=(16, 16), mode="bicubic"), atol=1e-5)
    image = pipeline("a cat", image=taken, strength=0.5, num_inference_steps=2).images[0]
    assert image.size == canvas.size


def test_a_tiny_vae_has_latents_without_a_distribution() -> None:
    pipeline = tiny.stable_diffusion()
    pipeline.vae = AutoencoderTiny(
        latent_channels=4,
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).eval()
    second = Sampling(width=128, height=128, steps=2, strength=0.5)
    generation = replace(wanted(width=64, height=64), hires=Hires(upscaler="Latent", sampling=second))
    done = two_passes.picture(loaded(pipeline), generation, quiet)
    assert (done.recipe.size, done.warnings) == ((128, 128), ())


def as_in_playground(pipeline: Any) -> None:
    pipeline.vae.register_to_config(latents_mean=[0.1] * 4, latents_std=[1.0] * 4)


@pytest.mark.parametrize("change", [lambda pipeline: pipeline.to(torch.float16), as_in_playground])
def test_pixels_are_enlarged_where_the_pipeline_does_more_than_encode(change: Callable[[Any], Any]) -> None:
    pipeline = tiny.stable_diffusion_xl()
    generation = Generation("", "a cat", 1, latents="Latent")
    assert latent_sources.taken(pipeline, generation)
    change(pipeline)
    assert not latent_sources.taken(pipeline, generation)
    assert "as Lanczos does" in latent_sources.warnings(pipeline, generation)[0]
    assert latent_sources.taken(tiny.stable_diffusion().to(torch.float16), generation), "which does not upcast its VAE"


def test_infotext_and_info_are_automatic1111s(server: Server) -> None:
    more = {"hr_upscaler": "Latent", "hr_prompt": "a dog, wet", "hr_negative_prompt": "red", "hr_cfg": 5}
    image, info = drawn(server, **FIRST, **HIRES, **more, hr_sampler_name="DPM++ 2M", hr_scheduler="Karras")
    text = image.info["parameters"]
    for pair in (
        "Steps: 4", "Sampler: Euler", "Seed: 7", "Size: 64x64", "Denoising strength: 0.5", "Hires upscale: 2",
        "Hires steps: 3", "Hires upscaler: Latent", "Hires sampler: DPM++ 2M", "Hires schedule type: Karras",
        "Hires CFG Scale: 5", 'Hires prompt: "a dog, wet"', "Hires negative prompt: red",
    ):  # fmt: skip
        assert pair in text, text
    assert (info["width"], info["height"], info["denoising_strength"]) == (64, 64, None)
    assert info["extra_generation_params"]["Hires steps"] == 3
    read = server.client.post("/sdapi/v1/png-info", json={"image": base64_of_file(image)}).json()
    assert read["info"] == text
    assert read["parameters"]["Hires upscale"] == "2"
    assert read["parameters"]["Hires prompt"] == "a dog, wet"
    assert (read["parameters"]["Size-1"], read["parameters"]["Hires upscaler"]) == ("64", "Latent")


def base64_of_file(image: Image.Image) -> str:
    """With its texts."""
    from PIL import PngImagePlugin

    chunks = PngImagePlugin.PngInfo()
    for name, text in image.info.items():
        chunks.add_text(name, str(text))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=chunks)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("fields", "size", "pair"),
    [
        ({"hr_scale": 1.5}, (96, 96), "Hires upscale: 1.5"),
        ({"hr_resize_x": 96, "hr_resize_y": 0}, (96, 96), "Hires resize: 96x96"),
        ({"hr_resize_x": 0, "hr_resize_y": 80}, (80, 80), "Hires resize: 80x80"),
        ({"hr_resize_x": 128, "hr_resize_y": 96}, (128, 96), "Hires resize: 128x96"),
        ({"hr_resize_x": 100, "hr_resize_y": 75, "hr_upscaler": "Lanczos"}, (100, 75), "Hires resize: 100x75"),
    ],
)
def test_sizes(server: Server, fields: dict[str, Any], size: tuple[int, int], pair: str) -> None:
    image, _ = drawn(server, **FIRST, **HIRES | fields)
    assert image.size == size
    assert pair in image.info["parameters"]


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"hr_resize_x": 96, "hr_resize_y": 128, "hr_prompt": "a dog"}, (96, 128)),
        ({"height": 72, "hr_scale": 1.3, "hr_upscaler": "Lanczos"}, (83, 93)),
        ({"hr_prompt": "a (dog:1.5)"}, (128, 128)),
    ],
    ids=["resized", "odd sides", "weights in hr_prompt"],
)
def test_drawn_again_from_the_recipe(
    server: Server, tmp_path: Path, fields: dict[str, Any], size: tuple[int, int]
) -> None:
    image, _ = drawn(server, **FIRST | HIRES | {"hr_upscaler": "Latent"} | fields)
    (tmp_path / "like.png").write_bytes(base64.b64decode(base64_of_file(image)))
    settings = Settings(models=tmp_path / "models", data=tmp_path / "data")
    (again,) = command.generate({}, tmp_path / "like.png", tmp_path / "again.png", settings)
    redrawn = Image.open(again)
    assert redrawn.size == size
    assert apart(image, redrawn) < 0.5
    assert recipes.read(again).hires == recipes.read(tmp_path / "like.png").hires


def test_several_pictures_and_their_seeds(server: Server) -> None:
    answer = post(server, **FIRST, **HIRES, batch_size=2).json()
    pictures = [Image.open(io.BytesIO(base64.b64decode(each))) for each in answer["images"]]
    assert [picture.size for picture in pictures] == [(128, 128)] * 2
    assert json.loads(answer["info"])["all_seeds"] == [7, 8]
    assert apart(*pictures) > 1


def test_progress_and_interrupt_over_both_passes(server: Server) -> None:
    """The first pass is short, the second long: it is cancelled in that one."""
    body = FIRST | HIRES | {"hr_second_pass_steps": 400, "hr_resize_x": 512, "hr_resize_y": 512}
    with Held(server, body, "/sdapi/v1/txt2img") as held:
        seen = held.drawing(6)  # of 4 in the first pass
        assert seen["total"] == 404
        state = server.client.get("/sdapi/v1/progress").json()
        assert state["state"]["sampling_steps"] == 404
        assert 0 < state["progress"] < 1
        server.client.post("/sdapi/v1/interrupt")
        assert held.answer().status_code == 499
    assert held.progress()["status"] == "cancelled"


def seen(inside: Inside, status: int = 200, **body: Any) -> tuple[Generation | None, httpx.Response]:
    inside.engine.seen.clear()
    with inside.client() as client:
        answer = client.post("/sdapi/v1/txt2img", json=FIRST | body)
    assert answer.status_code == status, answer.text
    return (inside.engine.seen[0] if inside.engine.seen else None), answer


def test_what_is_asked_of_the_engine(tmp_path: Path) -> None:
    generation, answer = seen(Inside(tmp_path), enable_hr=True, steps=None, hr_cfg=3)
    assert generation
    assert generation.hires == Hires(
        upscaler="Latent",
        sampling=Sampling(scheduler="euler", guidance_scale=3, width=128, height=128, strength=0.75),
        scale=2,
    )
    assert "x-sfumato-warning" not in answer.headers
    generation, _ = seen(Inside(tmp_path), enable_hr=False, hr_scale=3, hr_checkpoint_name="other")
    assert generation
    assert generation.hires is None


def test_without_enable_hr_its_fields_are_not_read(tmp_path: Path) -> None:
    """Clients send them with whatever values: AUTOMATIC1111 does not look at them either."""
    others = {"hr_scale": 0, "hr_second_pass_steps": -1, "hr_cfg": -1, "hr_upscaler": 5, "denoising_strength": 20}
    inside = Inside(tmp_path)
    for switch in ({}, {"enable_hr": False}, {"enable_hr": None}, {"enable_hr": "false"}):
        generation, _ = seen(inside, **switch, **others)
        assert generation
        assert generation.hires is None
    for switch in (True, "true", 1):
        seen(inside, 400, enable_hr=switch, **others)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"hr_scale": 16, "width": 1024, "height": 1024}, "hr_scale: 16384x16384"),
        ({"hr_resize_x": 4000, "hr_resize_y": 4000}, "hr_scale: 4000x4000"),
        ({"hr_scale": 17}, "hr_scale"),
        ({"denoising_strength": 2}, "denoising_strength"),
        ({"hr_second_pass_steps": 5000}, "hr_second_pass_steps"),
        ({"hr_checkpoint_name": "no-such"}, "There is no model 'no-such'"),
    ],
)
def test_refused_before_any_work(tmp_path: Path, fields: dict[str, Any], word: str) -> None:
    status = 404 if "hr_checkpoint_name" in fields else 400
    generation, answer = seen(Inside(tmp_path), status, enable_hr=True, **fields)
    assert generation is None
    error = answer.json()["error"]
    assert word in error["message"]
    if status == 404:
        assert error["param"] == "hr_checkpoint_name"


def test_loras_in_the_prompts_of_the_second_pass(tmp_path: Path) -> None:
    """Both passes have those of the first; a tag is never drawn as words."""
    loras = tmp_path / "models" / "loras"
    loras.mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, loras / "pen.safetensors")
    inside = Inside(tmp_path)
    config = "name: m\nparameters:\n  model: some/one\ndiffusers:\n  enable_parameters: negative_prompt\n"
    (tmp_path / "models" / "m.yaml").write_text(config)
    body = {"enable_hr": True, "steps": None, "prompt": "a cat <lora:pen:0.5>"}
    told = {}
    for name, negative in (("pen:0.5", "red"), ("pen:0.9", "red"), ("pen:0.5", "red <lora:ink:1>")):
        generation, answer = seen(inside, **body, hr_prompt=f"a dog <lora:{name}>", hr_negative_prompt=negative)
        assert generation
        assert generation.hires
        assert [(each.source, each.weight) for each in generation.loras] == [("pen", 0.5)]
        assert (generation.hires.prompt, generation.hires.sampling.negative_prompt) == ("a dog", "red")
        told[name, negative] = generation.notes
    assert [len(notes) for notes in told.values()] == [0, 1, 1]
    assert told["pen:0.9", "red"][0].startswith("hr_prompt: <lora:pen:0.9> left out")
    assert told["pen:0.5", "red <lora:ink:1>"][0].startswith("hr_negative_prompt: <lora:ink:1> left out")
    _, answer = seen(inside, 400, **body, hr_prompt="a dog <lora:pen:much>")
    assert answer.json()["error"]["param"] == "hr_prompt"


def test_another_model_for_the_second_pass_is_refused(tmp_path: Path) -> None:
    inside = Inside(tmp_path)
    (tmp_path / "models" / "other.yaml").write_text("name: other\nparameters:\n  model: some/other\n")
    _, answer = seen(
        inside, 400, enable_hr=True, hr_checkpoint_name="other", override_settings={"sd_model_checkpoint": "m"}
    )
    assert answer.json()["error"]["param"] == "hr_checkpoint_name"
    for same in ("m", "Use same checkpoint", ""):
        generation, _ = seen(
            inside, enable_hr=True, hr_checkpoint_name=same, override_settings={"sd_model_checkpoint": "m"}
        )
        assert generation


def test_the_first_pass_has_the_models_own_size_before_it_is_loaded(tmp_path: Path) -> None:
    """A model file does not say it: its files do, and a loaded model."""
    inside = Inside(tmp_path)
    (tmp_path / "models" / "m.yaml").write_text(f"name: m\nparameters:\n  model: {TINY}\n")
    generation, _ = seen(inside, enable_hr=True, hr_scale=1, width=None, height=None, steps=None)
    assert generation
    assert generation.hires
    assert generation.sampling.size == generation.hires.sampling.size == (128, 128)


def test_steps_that_are_left_out_are_told(server: Server) -> None:
    weak = {"enable_hr": True, "hr_scale": 1, "denoising_strength": 0.01}
    image, info = drawn(server, **FIRST, **weak, hr_second_pass_steps=150)
    assert any("hr_second_pass_steps: 10 of 150 are run" in warning for warning in info["warnings"])
    assert "Hires steps: 10" in image.info["parameters"]
    _, info = drawn(server, **FIRST, **weak, hr_second_pass_steps=10)
    assert info["warnings"] == []
    # The model's own steps are known when they have been run.
    _, info = drawn(server, **FIRST | {"steps": None}, enable_hr=True, hr_scale=1, denoising_strength=0.001)
    assert any("hr_second_pass_steps: 1 of" in warning for warning in info["warnings"])


def test_what_is_not_here_is_told(tmp_path: Path) -> None:
    inside = Inside(tmp_path)
    generation, answer = seen(inside, enable_hr=True, hr_upscaler="R-ESRGAN 4x+", hr_sampler_name="no such")
    assert generation
    assert generation.hires
    assert generation.hires.upscaler == "Lanczos"
    told = answer.headers["x-sfumato-warning"]
    assert "hr_upscaler: there is no 'R-ESRGAN 4x+'; Lanczos is used" in told
    assert "hr_sampler_name: there is no sampler 'no such'" in told
    with inside.client() as client:
        body = FIRST | {"enable_hr": True, "init_images": [base64_of(Image.new("RGB", (64, 64)))]}
        once = client.post("/sdapi/v1/img2img", json=body)
    assert once.headers["x-sfumato-warning"].startswith("enable_hr: a second pass is for txt2img")


def test_a_model_in_the_body_is_for_that_request(tmp_path: Path) -> None:
    """`model` chooses for one request, as gateways send it."""
    inside = Inside(tmp_path)
    (tmp_path / "models" / "other.yaml").write_text("name: other\nparameters:\n  model: some/other\n")
    with inside.client() as client:
        for body, name in (
            ({"model": "other"}, "other"),
            ({"model": "other", "override_settings": {"sd_model_checkpoint": "m"}}, "m"),
        ):
            answer = client.post("/sdapi/v1/txt2img", json=FIRST | body)
            assert json.loads(answer.json()["info"])["sd_model_name"] == name
        missing = client.post("/sdapi/v1/txt2img", json=FIRST | {"model": "no-such"})
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
        before = client.get("/sdapi/v1/options").json()["sd_model_checkpoint"]
        assert before == "m"

"""AUTOMATIC1111's API, over a real server with two callers."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops

from sfumato import schedulers
from sfumato.api.a1111 import samplers as a1111_samplers
from sfumato.api.a1111.bodies import NEUTRAL, DrawBody, Img2ImgBody, Txt2ImgBody, UpscaleBody
from sfumato.config import ModelConfig
from sfumato.core import Event, Generation
from sfumato.errors import InvalidPicture
from sfumato.pictures.sources import Decoded, Sources
from sfumato.serving.catalog import EMBEDDED, Catalog
from sfumato.serving.service import Service
from sfumato.settings import Settings
from support import broken_pictures, tiny, upscalers
from support.answers import error_of
from support.fake_engine import FakeEngine
from support.inside import Inside, Painter
from support.pictures import base64_of
from support.serving import TIMEOUT_S, Server

FEW = {"prompt": "a cat", "steps": 2, "seed": 5, "width": 64, "height": 64}
LONG = {"prompt": "a cat", "steps": 1000, "sampler_name": "Euler", "width": 256, "height": 256}
UPSCALER = "enlarge"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's model files."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tiny.save(tiny.flux(), models / "flowing-weights")
    tiny.save(upscalers.four_times(), models / "enlarge-weights")
    (models / "flowing.yaml").write_text("name: flowing\nparameters:\n  model: flowing-weights\n")
    (models / "fixed.yaml").write_text(
        f"name: fixed\nparameters:\n  model: {EMBEDDED}/sfumato-tiny\nclip_skip: 1\n"
        "diffusers:\n  enable_parameters: image\n"
    )
    (models / "enlarge.yaml").write_text(
        f"name: {UPSCALER}\nparameters:\n  model: enlarge-weights\nstep: 2\n"
        "diffusers:\n  pipeline_type: StableDiffusionUpscalePipeline\n"
    )
    # Two places: a caller has one of them, the other is kept for who has none.
    flags = ("--api-keys", "ann:key-a,bob:key-b", "--max-n", "4", "--max-active", "2")
    flags += ("--default-model", "sfumato-tiny")
    with Server(models, tmp_path_factory.mktemp("data"), *flags) as server:
        yield server


def client_of(server: Server, name: str) -> httpx.Client:
    """As webuiapi's `set_auth` and SillyTavern sign in."""
    return httpx.Client(base_url=f"{server.url}/sdapi/v1/", auth=(name, f"key-{name[0]}"), timeout=TIMEOUT_S)


@pytest.fixture
def ann(server: Server) -> Iterator[httpx.Client]:
    with client_of(server, "ann") as client:
        client.post("options", json={"sd_model_checkpoint": "sfumato-tiny"})
        yield client


@pytest.fixture
def bob(server: Server) -> Iterator[httpx.Client]:
    with client_of(server, "bob") as client:
        client.post("options", json={"sd_model_checkpoint": "sfumato-tiny"})
        yield client


def drawn(answer: httpx.Response) -> tuple[list[Image.Image], dict[str, Any]]:
    """Pictures and info, as webuiapi reads them."""
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return [opened(text) for text in body["images"]], json.loads(body["info"])


def opened(text: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image


def most_apart(one: Image.Image, other: Image.Image) -> int:
    """Levels, 0 .. 255."""
    return max(high for _, high in ImageChops.difference(one.convert("RGB"), other.convert("RGB")).getextrema())


SOURCE = Image.radial_gradient("L").convert("RGB").resize((128, 128))
LEFT = Image.new("L", (128, 128), 0)
LEFT.paste(255, (0, 0, 64, 128))


# Lists


@pytest.mark.parametrize(
    "path",
    [
        "sd-vae",
        "hypernetworks",
        "face-restorers",
        "realesrgan-models",
        "prompt-styles",
        "script-info",
        "extensions",
    ],
)
def test_lists_of_what_is_not_here_are_empty(ann: httpx.Client, path: str) -> None:
    answer = ann.get(path)
    assert (answer.status_code, answer.json()) == (200, [])


def test_lists_that_clients_choose_from(ann: httpx.Client) -> None:
    models = ann.get("sd-models").json()
    assert {model["title"] for model in models} == {"flowing", "fixed", UPSCALER, "sfumato-tiny"}
    assert set(models[0]) == {"title", "model_name", "hash", "sha256", "filename", "config"}
    samplers = ann.get("samplers").json()
    assert {"Euler a", "DPM++ 2M", "DPM++ SDE", "DDIM", "UniPC", "LMS", "Heun", "DPM2", "DPM2 a", "LCM"} <= {
        sampler["name"] for sampler in samplers
    }
    assert {"name": "DPM++ 2M", "aliases": ["k_dpmpp_2m"], "options": {"scheduler": "karras"}} in samplers
    labels = [each["label"] for each in ann.get("schedulers").json()]
    assert labels == ["Automatic", "Uniform", "Karras", "Exponential", "SGM Uniform", "Beta"]
    assert [each["name"] for each in ann.get("upscalers").json()] == ["None", UPSCALER]
    assert ann.get("embeddings").json() == {"loaded": {}, "skipped": {}}
    assert ann.get("scripts").json() == {"txt2img": [], "img2img": []}
    assert ann.get("cmd-flags").json() == {}
    assert ann.post("refresh-checkpoints").json() is None


def test_memory_is_counted(ann: httpx.Client) -> None:
    drawn(ann.post("txt2img", json=FEW))  # the one who holds memory starts with the first picture
    ram = ann.get("memory").json()["ram"]
    assert 0 < ram["used"] < ram["total"]
    assert 0 < ram["free"] < ram["total"]


def test_without_a_key_nothing_is_told(server: Server) -> None:
    error_of(httpx.get(f"{server.url}/sdapi/v1/options"), 401)


# Options


@pytest.mark.parametrize("title", ["fixed", "fixed [0123456789]", "fixed.safetensors [abc]", "fixed.ckpt", "fixed "])
def test_a_model_is_chosen_by_its_title(ann: httpx.Client, title: str) -> None:
    assert ann.post("options", json={"sd_model_checkpoint": title}).json() is None
    assert ann.get("options").json()["sd_model_checkpoint"] == "fixed"
    _, info = drawn(ann.post("txt2img", json={"prompt": "a cat", "width": 64, "height": 64}))
    assert info["sd_model_name"] == "fixed"


def test_a_choice_is_the_callers_own(ann: httpx.Client, bob: httpx.Client) -> None:
    ann.post("options", json={"sd_model_checkpoint": "fixed"})
    assert bob.get("options").json()["sd_model_checkpoint"] == "sfumato-tiny"
    assert ann.get("options").json()["CLIP_stop_at_last_layers"] == 2
    assert bob.get("options").json()["CLIP_stop_at_last_layers"] == 1


def test_options_take_back_what_they_gave(ann: httpx.Client) -> None:
    before = ann.get("options").json()
    assert {"sd_model_checkpoint", "sd_vae", "CLIP_stop_at_last_layers", "samples_format"} <= set(before)
    answer = ann.post("options", json=before | {"sd_model_checkpoint": "fixed"})
    assert (answer.status_code, answer.headers.get("x-sfumato-ignored")) == (200, None)
    before = ann.get("options").json()
    answer = ann.post("options", json=before | {"samples_format": "jpg", "img2img_color_correction": True})
    assert answer.headers["x-sfumato-ignored"] == "samples_format, img2img_color_correction"


def test_a_chosen_model_that_is_gone_is_missed(ann: httpx.Client, models: Path) -> None:
    file = models / "passing.yaml"
    file.write_text("name: passing\nparameters:\n  model: nowhere\n")
    ann.post("options", json={"sd_model_checkpoint": "passing"})
    file.unlink()
    assert ann.get("options").json()["sd_model_checkpoint"] == "passing"
    assert error_of(ann.post("txt2img", json=FEW), 404)["code"] == "model_not_found"
    ann.post("options", json={"sd_model_checkpoint": "fixed"})
    assert ann.get("options").json()["sd_model_checkpoint"] == "fixed"


@pytest.mark.parametrize("title", ["nothing", "fixed2", "fixe", "fixed [no hash!]"])
def test_an_unknown_model_is_not_found(ann: httpx.Client, title: str) -> None:
    error = error_of(ann.post("options", json={"sd_model_checkpoint": title}), 404)
    assert (error["code"], title in error["message"]) == ("model_not_found", True)
    assert ann.get("options").json()["sd_model_checkpoint"] == "sfumato-tiny"
    error_of(ann.post("txt2img", json=FEW | {"override_settings": {"sd_model_checkpoint": title}}), 404)


@pytest.mark.parametrize("title", [1, "", ["fixed"]])
def test_a_title_is_a_text(ann: httpx.Client, title: Any) -> None:
    assert error_of(ann.post("options", json={"sd_model_checkpoint": title}), 400)["param"] == "sd_model_checkpoint"


def test_a_setting_of_one_request(ann: httpx.Client) -> None:
    body = {"prompt": "a cat", "width": 64, "height": 64, "override_settings": {"sd_model_checkpoint": "fixed"}}
    assert drawn(ann.post("txt2img", json=body))[1]["sd_model_name"] == "fixed"
    assert ann.get("options").json()["sd_model_checkpoint"] == "sfumato-tiny"
    drawn(ann.post("txt2img", json=body | {"override_settings_restore_afterwards": False}))
    assert ann.get("options").json()["sd_model_checkpoint"] == "fixed"


def test_layers_are_counted_from_the_last(ann: httpx.Client) -> None:
    def draw(**more: Any) -> tuple[bytes, dict[str, Any]]:
        images, info = drawn(ann.post("txt2img", json=FEW | more))
        return images[0].tobytes(), info

    plain, info = draw()
    assert (info["clip_skip"], "Clip skip" in info["infotexts"][0]) == (1, False)
    assert draw(override_settings={"CLIP_stop_at_last_layers": 1})[0] == plain
    skipped, info = draw(override_settings={"CLIP_stop_at_last_layers": 2})
    assert (info["clip_skip"], "Clip skip: 2" in info["infotexts"][0]) == (2, True)
    assert skipped != plain
    assert draw(clip_skip=2)[0] == skipped


# Drawing


def test_an_answer_is_as_clients_read_it(ann: httpx.Client) -> None:
    body = {
        "prompt": "a cat",
        "negative_prompt": "blue",
        "steps": 3,
        "seed": 7,
        "cfg_scale": 4,
        "width": 64,
        "height": 96,
    }
    answer = ann.post("txt2img", json=body | {"sampler_name": "Euler a", "scheduler": "Automatic"})
    images, info = drawn(answer)
    assert [image.size for image in images] == [(64, 96)]
    told = {
        "prompt": "a cat", "negative_prompt": "blue", "steps": 3, "seed": 7, "all_seeds": [7], "cfg_scale": 4.0,
        "width": 64, "height": 96, "sampler_name": "Euler a", "batch_size": 1, "sd_model_name": "sfumato-tiny",
        "clip_skip": 1, "warnings": [], "all_prompts": ["a cat"], "all_negative_prompts": ["blue"],
    }  # fmt: skip
    assert {key: info[key] for key in told} == told
    assert info["infotexts"] == [images[0].info["parameters"]]
    assert {key: answer.json()["parameters"][key] for key in body} == body


def test_a_bare_prompt_is_drawn_as_the_model_does(ann: httpx.Client) -> None:
    images, info = drawn(ann.post("txt2img", json={"prompt": "a cat"}))
    assert (images[0].size, info["steps"], info["cfg_scale"], info["warnings"]) == ((128, 128), 20, 3.0, [])


def test_pictures_are_batches_times_their_size(ann: httpx.Client) -> None:
    images, info = drawn(ann.post("txt2img", json=FEW | {"batch_size": 2, "n_iter": 2}))
    assert len(images) == len(info["infotexts"]) == 4
    assert info["all_seeds"] == [5, 6, 7, 8]
    alone, _ = drawn(ann.post("txt2img", json=FEW | {"seed": 7}))
    assert most_apart(alone[0], images[2]) <= 2 < most_apart(images[1], images[2])


def test_more_pictures_than_may_be_are_refused(ann: httpx.Client) -> None:
    error = error_of(ann.post("txt2img", json=FEW | {"batch_size": 5, "n_iter": 900}), 400)
    assert "4500 pictures; at most 4" in error["message"]
    assert "1000" in error_of(ann.post("txt2img", json=FEW | {"n_iter": 10**300}), 400)["message"]
    assert "400 digits" in error_of(ann.post("txt2img", json=FEW | {"n_iter": 10**4000}), 400)["message"]


def test_a_random_seed_is_told(ann: httpx.Client) -> None:
    seeds = {drawn(ann.post("txt2img", json=FEW | {"seed": -1}))[1]["seed"] for _ in range(2)}
    assert len(seeds) == 2
    assert min(seeds) >= 0


def test_pictures_are_sent_and_kept_as_asked(server: Server, ann: httpx.Client) -> None:
    images, info = drawn(ann.post("txt2img", json=FEW | {"send_images": False, "save_images": True}))
    assert images == []
    kept = Image.open(io.BytesIO(httpx.get(info["urls"][0]).content))
    assert kept.info["parameters"] == info["infotexts"][0]
    assert drawn(ann.post("txt2img", json=FEW))[1]["urls"] == []


def test_foreign_fields_are_ignored_and_told_nowhere(server: Server, ann: httpx.Client) -> None:
    foreign = {"url": "http://secret-host:7860", "auth": "someone:secret-word"}
    answer = ann.post("txt2img", json=FEW | foreign)
    drawn(answer)
    assert answer.headers["x-sfumato-ignored"] == "url, auth"
    refused = ann.post("txt2img", json=foreign | {"steps": -1})
    error_of(refused, 400)
    for said in (answer.text, refused.text, server.log):
        assert "secret-" not in said


def test_what_has_no_effect_is_named(ann: httpx.Client) -> None:
    body = FEW | {
        "prompt": "cat <hypernet:fur:1>", "enable_hr": False, "hr_scale": 2, "denoising_strength": 0.7, "tiling": True,
        "restore_faces": False, "eta": 1.0, "subseed": 3, "s_noise": 1, "styles": ["noir"], "script_args": [],
        "alwayson_scripts": {"ControlNet": {"args": []}, "ADetailer": {"args": []}},
        "override_settings": {"sd_vae": "x", "eta_noise_seed_delta": 0},
    }  # fmt: skip
    answer = ann.post("txt2img", json=body)
    images, info = drawn(answer)
    assert images[0].size == (64, 64)
    assert answer.headers["x-sfumato-ignored"] == "tiling, override_settings.sd_vae, alwayson_scripts.ADetailer, styles"
    assert [warning.split(":")[0] for warning in info["warnings"]] == ["prompt"]
    assert answer.headers["x-sfumato-warning"] == "; ".join(info["warnings"])


def test_a_model_that_fixes_its_steps_draws_with_them(ann: httpx.Client) -> None:
    """Clients send steps and an empty negative prompt to every model."""
    body = FEW | {"negative_prompt": "", "override_settings": {"sd_model_checkpoint": "fixed"}}
    _, info = drawn(ann.post("txt2img", json=body))
    assert info["steps"] != 2
    assert [warning.split(":")[:2] for warning in info["warnings"]] == [["steps", " left out"]]
    _, info = drawn(ann.post("txt2img", json=body | {"negative_prompt": "blue"}))
    assert [warning.split(":")[0] for warning in info["warnings"]] == ["steps", "negative_prompt"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"steps": 0}, "steps"),
        ({"width": -1}, "width"),
        ({"width": 10**6, "height": 10**6}, "width"),
        ({"cfg_scale": "warm"}, "cfg_scale"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -2}, "seed"),
    ],
)
def test_a_wrong_value_is_named(ann: httpx.Client, body: dict[str, Any], param: str) -> None:
    assert error_of(ann.post("txt2img", json=FEW | body), 400)["param"] == param


# Samplers


@pytest.mark.parametrize("name", schedulers.SAMPLERS)
def test_every_sampler_of_the_list_draws(ann: httpx.Client, name: str) -> None:
    answer = ann.post("txt2img", json=FEW | {"sampler_name": name, "scheduler": "Automatic"})
    _, info = drawn(answer)
    assert (info["sampler_name"], info["warnings"]) == (name, [])
    assert f"Sampler: {name}, Schedule type: " in info["infotexts"][0]


def test_the_table_has_every_solver_once() -> None:
    assert sorted(each.solver for each in schedulers.SAMPLERS.values()) == sorted(schedulers.SOLVERS)
    for name, each in schedulers.SAMPLERS.items():
        assert schedulers.parse(each.solver, each.default_schedule).solver == each.solver
        assert [a1111_samplers.SAMPLER_OF[alias] for alias in each.aliases] == [name] * len(each.aliases)


@pytest.mark.parametrize(
    ("sampler", "schedule", "ours"),
    [
        ("Euler a", None, "euler_a"),
        ("euler A", "automatic", "euler_a"),
        ("k_euler_a", None, "euler_a"),
        ("k_euler", None, "euler"),
        ("k_euler", "karras", "k_euler"),
        ("k_dpm_2_a_ka", None, "k_dpm_2_a"),
        ("Euler", "SGM Uniform", "euler_sgm_uniform"),
        ("Euler", "SGMUniform", "euler_sgm_uniform"),
        ("DPM++ 2M", None, "k_dpmpp_2m"),
        ("DPM++ 2M", "Automatic", "k_dpmpp_2m"),
        ("DPM++ 2M", "Uniform", "dpmpp_2m"),
        ("DPM++ 2M", "Exponential", "dpmpp_2m_exponential"),
        ("DPM++ 2M Karras", "Automatic", "k_dpmpp_2m"),
        ("dpm++  2m   karras", "Exponential", "k_dpmpp_2m"),
        ("DPM++ 2M SDE", None, "dpmpp_2m_sde_exponential"),
        ("DPM++ 2M SDE Karras", None, "k_dpmpp_2m_sde"),
        ("LMS Karras", None, "k_lms"),
        ("plms", None, "pndm"),
        ("PNDM", None, "pndm"),
        ("euler_beta", None, "euler_beta"),
        ("dpmpp_2m", None, "dpmpp_2m"),
        ("k_dpp_sde", None, "k_dpmpp_sde"),
        ("", None, None),
        (None, "Automatic", None),
    ],
)
def test_names_are_understood(sampler: str | None, schedule: str | None, ours: str | None) -> None:
    assert a1111_samplers.choose(sampler, schedule) == a1111_samplers.SamplerChoice(ours)


@pytest.mark.parametrize(
    ("sampler", "schedule", "ours", "words"),
    [
        (None, "Karras", None, "needs a sampler_name"),
        ("No such sampler", None, None, "sampler_name: there is no sampler 'No such sampler'."),
        ("DPM++ 2S a", None, None, "Did you mean 'DPM++ 2S'?"),
        ("Euler a", "Karras", "euler_a", "scheduler: Euler a does not support the schedule 'Karras'"),
        ("UniPC Karras", None, "k_unipc", None),
        ("DPM++ 2M", "KL Optimal", "k_dpmpp_2m", "scheduler: 'KL Optimal' is not a schedule type"),
    ],
)
def test_names_that_are_not_here_are_told(
    sampler: str, schedule: str | None, ours: str | None, words: str | None
) -> None:
    chosen = a1111_samplers.choose(sampler, schedule)
    assert chosen.scheduler == ours
    assert words in chosen.warnings[0] if words else not chosen.warnings


@given(st.text(), st.none() | st.text())
def test_no_name_is_an_error(sampler: str, schedule: str | None) -> None:
    chosen = a1111_samplers.choose(sampler, schedule)
    assert chosen.scheduler is None or schedulers.parse(chosen.scheduler)


@given(
    st.sampled_from(list(schedulers.SAMPLERS)), st.sampled_from(["Automatic", "Uniform", *schedulers.SCHEDULE_TYPES])
)
def test_what_the_infotext_says_chooses_the_same_again(sampler: str, schedule: str) -> None:
    scheduler = a1111_samplers.choose(sampler, schedule).scheduler
    assert scheduler is not None
    told = schedulers.sampler_of(scheduler)
    assert told
    assert a1111_samplers.choose(*told) == a1111_samplers.SamplerChoice(scheduler)


def test_an_unknown_sampler_draws_as_the_model_does(ann: httpx.Client) -> None:
    answer = ann.post("txt2img", json=FEW | {"sampler_name": "No such sampler", "scheduler": "Karras"})
    images, info = drawn(answer)
    own, _ = drawn(ann.post("txt2img", json=FEW))
    assert images[0].tobytes() == own[0].tobytes()
    assert "No such sampler" in info["warnings"][0]
    assert answer.headers["x-sfumato-warning"] == info["warnings"][0]


def test_a_sampler_that_the_model_cannot_use_is_left_out(server: Server, ann: httpx.Client) -> None:
    flowing = FEW | {"override_settings": {"sd_model_checkpoint": "flowing"}}
    _, own = drawn(ann.post("txt2img", json=flowing))
    _, info = drawn(ann.post("txt2img", json=flowing | {"sampler_name": "DDIM"}))
    assert info["infotexts"] == own["infotexts"]
    assert [warning.split(":")[:2] for warning in info["warnings"]] == [["scheduler", " left out"]]
    # With the schedule that goes with it the solver has no flow form; without one it has.
    _, info = drawn(ann.post("txt2img", json=flowing | {"sampler_name": "DPM++ 2M"}))
    assert info["sampler_name"] == "DPM++ 2M"
    assert len(info["warnings"]) == 1


# From a picture


def test_a_picture_is_drawn_over(ann: httpx.Client) -> None:
    body = {"prompt": "a cat", "init_images": [base64_of(SOURCE)], "steps": 8, "seed": 1}
    images, info = drawn(ann.post("img2img", json=body | {"denoising_strength": 0.5}))
    assert (images[0].size, info["denoising_strength"]) == ((128, 128), 0.5)
    assert "Denoising strength: 0.5" in info["infotexts"][0]
    uri = "data:image/png;base64," + base64_of(SOURCE)
    again, _ = drawn(ann.post("img2img", json=body | {"denoising_strength": 0.5, "init_images": [uri]}))
    assert again[0].tobytes() == images[0].tobytes()
    strong, _ = drawn(ann.post("img2img", json=body | {"denoising_strength": 1}))
    assert strong[0].tobytes() != images[0].tobytes()


SIDES = {"left": (0, 0, 64, 128), "right": (64, 0, 128, 128)}


@pytest.mark.parametrize(("invert", "kept", "new"), [(0, "right", "left"), (1, "left", "right")])
def test_a_mask_redraws_where_it_is_white(ann: httpx.Client, invert: int, kept: str, new: str) -> None:
    body = {
        "prompt": "a cat", "init_images": [base64_of(SOURCE)], "mask": base64_of(LEFT), "mask_blur": 0, "steps": 8,
        "inpainting_mask_invert": invert, "denoising_strength": 1, "seed": 1, "width": 128, "height": 128,
    }  # fmt: skip
    answer = ann.post("img2img", json=body)
    images, _ = drawn(answer)
    result = images[0].convert("RGB")
    assert result.size == (128, 128)
    assert result.crop(SIDES[kept]).tobytes() == SOURCE.crop(SIDES[kept]).tobytes()
    assert result.crop(SIDES[new]).tobytes() != SOURCE.crop(SIDES[new]).tobytes()
    assert not {"init_images", "mask"} & set(answer.json()["parameters"])


def test_a_blurred_mask_leaves_what_is_far(ann: httpx.Client) -> None:
    body = {"prompt": "a cat", "init_images": [base64_of(SOURCE)], "mask": base64_of(LEFT), "steps": 4, "seed": 1}
    images, _ = drawn(ann.post("img2img", json=body))
    far = (64 + 4 * 4, 0, 128, 128)
    assert images[0].convert("RGB").crop(far).tobytes() == SOURCE.crop(far).tobytes()


def prepared(body: Img2ImgBody, **settings: Any) -> Decoded:
    """Pictures and mask of a body, as the engine gets them."""
    service = Service(Catalog([]), FakeEngine(), Settings(**settings))
    fitting = body.fitting()
    images, mask = body.sources()
    assert (body.init_images, body.mask) == ([], None)

    async def run() -> Decoded:
        scale = None if fitting.size else 1
        sources = Sources(
            images, mask, share=service.budget.share(), limits=service.limits, fitting=fitting, scale=scale
        )
        try:
            await sources.fetch(service.fetcher, service.decoders)
            return await sources.decode(service.decoders)
        finally:
            await service.stop()

    return asyncio.run(run())


def mask_of(mask: Image.Image, **more: Any) -> Image.Image:
    body = Img2ImgBody(init_images=[base64_of(SOURCE)], mask=base64_of(mask), mask_blur=0, **more)
    prepared_mask = prepared(body).mask
    assert prepared_mask
    return Image.open(io.BytesIO(prepared_mask))


def test_an_alpha_channel_says_where_to_redraw() -> None:
    transparent = Image.new("RGBA", (128, 128), "white")
    transparent.putalpha(LEFT)
    assert mask_of(transparent).tobytes() == LEFT.tobytes()
    opaque = LEFT.convert("RGBA")
    assert mask_of(opaque).tobytes() == LEFT.tobytes()


def test_a_mask_of_another_size_is_fitted() -> None:
    assert mask_of(LEFT.resize((32, 32), Image.Resampling.NEAREST)).size == (128, 128)
    assert mask_of(LEFT, width=64, height=96).size == (64, 96)


@pytest.mark.parametrize(("mode", "corner"), [(0, "red"), (1, "lime"), (2, "lime"), (3, "red"), (None, "red")])
def test_a_picture_is_stretched_or_cropped(mode: int | None, corner: str) -> None:
    wide = Image.new("RGB", (128, 64), "lime")
    wide.paste("red", (0, 0, 32, 64))
    body = Img2ImgBody(init_images=[base64_of(wide)], width=64, height=64, resize_mode=mode)
    image = Image.open(io.BytesIO(prepared(body).images[0]))
    assert image.size == (64, 64)
    assert image.getpixel((2, 2)) == Image.new("RGB", (1, 1), corner).getpixel((0, 0))
    assert bool(body.warnings()) == (mode in (2, 3))


@pytest.mark.parametrize("picture", ["nonsense", "http://127.0.0.1/x.png", base64.b64encode(b"text").decode()])
def test_what_is_no_picture_is_refused(ann: httpx.Client, picture: str) -> None:
    error = error_of(ann.post("img2img", json={"init_images": [picture]}), 400)
    assert (error["code"], error["param"]) == ("invalid_image", "init_images[0]")


def test_a_picture_is_needed(ann: httpx.Client) -> None:
    assert error_of(ann.post("img2img", json={"prompt": "a cat"}), 400)["param"] == "init_images"
    assert error_of(ann.post("img2img", json={"init_images": []}), 400)["param"] == "init_images"


def test_a_huge_picture_is_not_decoded() -> None:
    with pytest.raises(InvalidPicture, match="at most 100 pixels"):
        prepared(Img2ImgBody(init_images=[base64_of(SOURCE)]), max_source_pixels=100)


# Progress


class Drawing:
    """A long request in a thread of its own; `seen` is where it stands once it draws."""

    def __init__(self, client: httpx.Client, **more: Any) -> None:
        self.client = client
        self._work = threading.Thread(target=self._draw, args=(LONG | more,))

    def __enter__(self) -> Drawing:
        self._work.start()
        try:
            self.seen = self.until(lambda seen: seen["progress"] > 0)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.client.post("interrupt")
        self._work.join(TIMEOUT_S)

    def until(self, true: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        while True:
            seen: dict[str, Any] = self.client.get("progress").json()
            if true(seen):
                return seen
            assert self._work.is_alive(), self.answer.text
            time.sleep(0.01)

    def end(self) -> httpx.Response:
        self._work.join(TIMEOUT_S)
        assert not self._work.is_alive()
        return self.answer

    @property
    def going(self) -> bool:
        return self._work.is_alive()

    def _draw(self, body: dict[str, Any]) -> None:
        self.answer = self.client.post("txt2img", json=body)


IDLE = {
    "skipped": False, "interrupted": False, "job": "", "job_count": 0, "job_no": 0, "job_timestamp": "0",
    "sampling_step": 0, "sampling_steps": 0,
}  # fmt: skip


def test_who_draws_nothing_sees_nothing(ann: httpx.Client) -> None:
    assert ann.get("progress").json() == {
        "progress": 0.0, "eta_relative": 0.0, "state": IDLE, "current_image": None, "textinfo": None,
    }  # fmt: skip


def test_progress_is_the_callers_own(server: Server, ann: httpx.Client, bob: httpx.Client) -> None:
    with Drawing(ann) as drawing:
        seen = drawing.until(lambda seen: seen["current_image"])
        assert 0 < seen["progress"] < 1
        assert seen["state"] | {"sampling_step": 0, "job_timestamp": "0"} == IDLE | {
            "job": "txt2img", "job_count": 1, "sampling_steps": 1000,
        }  # fmt: skip
        assert 0 < seen["state"]["sampling_step"] < 1000
        assert seen["eta_relative"] >= 0
        assert opened(seen["current_image"]).size == (256, 256)
        assert ann.get("progress", params={"skip_current_image": True}).json()["current_image"] is None
        further = drawing.until(lambda later: later["progress"] > seen["progress"])
        assert further["state"]["sampling_step"] > seen["state"]["sampling_step"]
        assert bob.get("progress").json()["state"] == IDLE


@pytest.mark.parametrize("path", ["interrupt", "skip"])
def test_an_interruption_ends_the_callers_own(ann: httpx.Client, bob: httpx.Client, path: str) -> None:
    with Drawing(ann) as anns, Drawing(bob) as bobs:
        assert bob.post(path).json() == {}
        assert error_of(bobs.end(), 499)["code"] == "cancelled"
        assert bob.get("progress").json()["state"] == IDLE
        assert anns.going
        later = ann.get("progress").json()
        assert later["progress"] >= anns.seen["progress"]
        ann.post(path)
        error_of(anns.end(), 499)


def test_an_interrupted_request_answers_with_what_is_done(ann: httpx.Client) -> None:
    with Drawing(ann, steps=100, seed=5, n_iter=4) as drawing:
        seen = drawing.until(lambda seen: seen["state"]["job_no"] >= 2)
        assert seen["state"]["job_count"] == 4
        assert 0.5 <= seen["progress"] < 1
        ann.post("interrupt")
        images, info = drawn(drawing.end())
    assert len(images) in (2, 3)
    assert info["all_seeds"] == [5 + at for at in range(len(images))]
    assert info["warnings"] == [f"interrupted: {len(images)} of 4 pictures were finished"]


def test_an_interruption_ends_nothing_of_other_routes(server: Server, ann: httpx.Client) -> None:
    headers = {"authorization": "Bearer key-a", "x-request-id": "others"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=TIMEOUT_S) as openai:
        body = {"prompt": "a cat", "steps": 60, "seed": 1}
        answers: list[httpx.Response] = []
        work = threading.Thread(target=lambda: answers.append(openai.post("/v1/images/generations", json=body)))
        work.start()
        going = True
        while openai.get("/v1/images/progress/others").status_code == 404:
            assert going
            going = work.is_alive()
        assert ann.get("progress").json()["state"] == IDLE
        ann.post("interrupt")
        work.join(TIMEOUT_S)
        assert answers[0].status_code == 200


# What a picture says


def test_the_infotext_is_read_back(ann: httpx.Client) -> None:
    prompt = 'a "cat": 3, legs\nand a hat'
    body = FEW | {"prompt": prompt, "negative_prompt": "dog, blue: sky", "sampler_name": "DPM++ 2M", "cfg_scale": 7}
    answer = ann.post("txt2img", json=body)
    _, info = drawn(answer)
    said = ann.post("png-info", json={"image": answer.json()["images"][0]}).json()
    assert said["info"] == info["infotexts"][0]
    expected = {
        "Prompt": prompt, "Negative prompt": "dog, blue: sky", "Steps": "2", "Sampler": "DPM++ 2M",
        "Schedule type": "Karras", "CFG scale": "7.0", "Seed": "5", "Size-1": "64", "Size-2": "64",
        "Model": "sfumato-tiny",
    }  # fmt: skip
    assert said["parameters"].items() >= expected.items()
    assert json.loads(said["items"]["sfumato"])["seed"] == 5
    image = "data:image/png;base64," + answer.json()["images"][0]
    assert ann.post("png-info", json={"image": image}).json() == said


def test_a_picture_that_says_nothing(ann: httpx.Client) -> None:
    answer = ann.post("png-info", json={"image": base64_of(SOURCE)})
    assert answer.json() == {"info": "", "items": {}, "parameters": {}}
    for picture in ("nonsense", base64.b64encode(b"text").decode()):
        assert error_of(ann.post("png-info", json={"image": picture}), 400)["code"] == "invalid_image"


# Upscaling


def test_a_model_enlarges(ann: httpx.Client) -> None:
    body = {"image": base64_of(SOURCE.resize((16, 16))), "upscaler_1": UPSCALER, "upscaling_resize": 4}
    answer = ann.post("extra-single-image", json=body | {"gfpgan_visibility": 1, "codeformer_visibility": 0})
    assert answer.status_code == 200, answer.text
    assert opened(answer.json()["image"]).size == (64, 64)
    assert answer.headers["x-sfumato-ignored"] == "gfpgan_visibility"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({}, "upscaler_1"),
        ({"upscaler_1": "None"}, "upscaler_1"),
        ({"upscaler_1": "Lanczos"}, "upscaler_1"),
        ({"upscaler_1": UPSCALER, "upscaling_resize": 3}, "upscaling_resize"),
        ({"upscaler_1": UPSCALER, "resize_mode": 1}, "resize_mode"),
    ],
)
def test_nothing_is_enlarged_without_a_model(ann: httpx.Client, more: dict[str, Any], param: str) -> None:
    assert error_of(ann.post("extra-single-image", json={"image": base64_of(SOURCE)} | more), 400)["param"] == param


# The shapes themselves


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def test_a_blank_number_is_none() -> None:
    assert Txt2ImgBody.model_validate({"denoising_strength": ""}).denoising_strength is None
    assert UpscaleBody.model_validate({"image": "x", "upscaling_resize": ""}).upscaling_resize is None


@given(st.dictionaries(st.text(max_size=5), JSON), st.dictionaries(st.text(max_size=5), JSON), JSON)
def test_any_foreign_field_is_survived(extra: dict[str, Any], overrides: dict[str, Any], layers: Any) -> None:
    known = DrawBody.model_fields.keys() | NEUTRAL.keys()
    extra = {name: value for name, value in extra.items() if name not in known}
    body = DrawBody.model_validate(extra | {"override_settings": overrides | {"CLIP_stop_at_last_layers": layers}})
    overrides["CLIP_stop_at_last_layers"] = layers
    assert set(body.ignored()) <= {*extra, *(f"override_settings.{name}" for name in overrides)}
    assert "override_settings.CLIP_stop_at_last_layers" in body.ignored() or not isinstance(layers, list) or not layers
    clip_skip = body.sampling(None).clip_skip
    assert clip_skip is None or clip_skip > 0
    assert not set(extra) & set(body.understood())
    assert set(UpscaleBody.model_validate(extra | {"image": "x"}).ignored()) <= set(extra)


def test_openapi_says_what_is_sent_and_answered(ann: httpx.Client, server: Server) -> None:
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    ours = {path: route for path, route in paths.items() if path.startswith("/sdapi/")}
    assert len(ours) > 20
    for route in ours.values():
        for operation in route.values():
            assert operation["tags"] == ["AUTOMATIC1111"]
            assert {"200", "401"} <= set(operation["responses"])
    schema = paths["/sdapi/v1/img2img"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"init_images", "mask", "prompt", "sampler_name"} <= set(schema["properties"])


def test_the_page_names_every_sampler() -> None:
    page = (Path(__file__).parent.parent / "docs/clients/automatic1111.md").read_text()
    assert [name for name in schedulers.SAMPLERS if f"| {name} |" not in page] == []


def test_a_picture_to_enlarge_is_not_held_as_text_while_it_waits(tmp_path: Path) -> None:
    inside = Inside(tmp_path)
    (tmp_path / "models" / "up.yaml").write_text(
        "name: up\nparameters:\n  model: some/one\ndiffusers:\n  pipeline_type: StableDiffusionUpscalePipeline\n"
    )
    held: list[str] = []

    class Looking(Painter):
        def submit(self, config: ModelConfig, generation: Generation) -> AsyncGenerator[Event, None]:
            held.extend(each.image for each in gc.get_objects() if type(each) is UpscaleBody)
            return super().submit(config, generation)

    inside.service.engine = Looking()
    body = {
        "image": base64.b64encode(broken_pictures.good()["png"]).decode(),
        "upscaler_1": "up",
        "upscaling_resize": 4,
    }
    with inside.client() as client:
        answer = client.post("/sdapi/v1/extra-single-image", json=body)
    assert answer.status_code == 200, answer.text
    assert held == [""]

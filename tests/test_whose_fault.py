"""A value that cannot be used is the fault of whoever set it: the request's (400), or the model file's (500)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sfumato.cli import app
from sfumato.commands.check import check
from sfumato.config import ModelConfig, at_fault
from sfumato.core import MAX_SEED
from sfumato.errors import InvalidRequest, ModelFileError, first_line, told
from sfumato.sampling import Sampling
from sfumato.serving.catalog import Catalog
from support import families, families_transformers, tiny
from support.families import picture
from support.families_served import Served, encoded, served

pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = {
    "StableDiffusion": families.FAMILIES["StableDiffusion"],
    "Flux": families.Family(tiny.flux, families.FLOW),
    "DiT": families_transformers.FAMILIES["DiT"],
    "DDPM": families.FAMILIES["DDPM"],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("fault"), FAMILIES) as server:
        yield server


WRONG: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "size": ("StableDiffusion", {"size": "64x63"}, {"size": "64x64"}, "size"),
    "option": ("StableDiffusion", {"options": ["guidanc_scale:3"]}, {}, "options"),
    "sampled option": ("StableDiffusion", {"options": ["clip_skip:50"]}, {"clip_skip": 1}, "clip_skip"),
    "clip_skip": ("StableDiffusion", {"clip_skip": 50}, {"clip_skip": 1}, "clip_skip"),
    "scheduler": ("Flux", {"diffusers": {"scheduler_type": "lms"}}, {"scheduler": "lcm"}, "diffusers.scheduler_type"),
    "checked": ("Flux", {"max_sequence_length": 600}, {"max_sequence_length": 16}, "max_sequence_length"),
    "checked option": (
        "StableDiffusion", {"options": ["num_images_per_prompt:1", "height:60"]}, {"size": "64x64"}, "size",
    ),
    "seed": ("StableDiffusion", {"parameters": {"model": "tiny/x", "seed": MAX_SEED, "n": 2}}, {"seed": 1},
             "parameters.seed"),
}  # fmt: skip
"""Family, keys of its model file, a request that sets them right if it can, and the key that is told of."""


def file_of(server: Served, name: str, family: str, keys: dict[str, Any]) -> str:
    server.built[name] = FAMILIES[family].build()
    kind = {"pipeline_type": type(server.built[name]).__name__, "enable_parameters": "num_inference_steps,clip_skip"}
    text = {"name": name, "parameters": {"model": "tiny/x"}, "step": 2, "cuda": False, "size": "64x64", **keys}
    text["diffusers"] = kind | keys.get("diffusers", {})
    (server.folder / f"{name}.yaml").write_text(json.dumps(text))
    return name


@pytest.mark.parametrize("case", WRONG)
def test_a_default_that_cannot_be_used_is_the_files_fault(server: Served, case: str) -> None:
    family, keys, right, key = WRONG[case]
    model = file_of(server, f"wrong-{case}".replace(" ", "-"), family, keys)
    body = {"model": model, "prompt": "a cat", "response_format": "b64_json"}
    answer = server.client.post("/v1/images/generations", json=body)
    assert answer.status_code == 500, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("model_file_invalid", key)
    assert f"{model}.yaml" in error["message"]
    if right:
        answer = server.client.post("/v1/images/generations", json={**body, **right})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("family", "fields", "param"),
    [
        ("StableDiffusion", {"size": "64x63"}, "size"),
        ("StableDiffusion", {"clip_skip": 50}, "clip_skip"),
        ("Flux", {"scheduler": "ddim"}, "scheduler"),
        ("Flux", {"max_sequence_length": 600}, "max_sequence_length"),
        ("StableDiffusion", {"seed": MAX_SEED, "n": 2}, "seed"),
    ],
)
def test_the_same_value_of_a_request_is_its_own_fault(
    server: Served, family: str, fields: dict[str, Any], param: str
) -> None:
    model = file_of(server, f"right-{family}", family, {"clip_skip": 1} if family == "StableDiffusion" else {})
    answer = server.client.post("/v1/images/generations", json={"model": model, "prompt": "a cat", **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_what_the_file_locks_is_its_fault_whatever_the_request_says() -> None:
    locked = ModelConfig(name="m", model="m", sampling=Sampling(clip_skip=50), locked=frozenset({"clip_skip"}))
    refused = InvalidRequest("clip_skip: 50; too deep", param="clip_skip")
    assert isinstance(at_fault.error_of(refused, locked, {"clip_skip"}), ModelFileError)


def test_steps_are_the_requests_fault_if_its_scheduler_cannot_draw_in_them() -> None:
    config = ModelConfig(name="m", model="m", sampling=Sampling(steps=1))
    refused = InvalidRequest("Scheduler 'x' cannot draw in 1 steps", param="step")
    assert at_fault.error_of(refused, config, {"scheduler"}) is refused
    assert isinstance(at_fault.error_of(refused, config, ()), ModelFileError)


CHECKED = {
    "size": ("stable_diffusion", "size: 64x63", "multiples of 8; the nearest is 64x64"),
    "option": ("stable_diffusion", "options: ['guidanc_scale:3']", "Did you mean 'guidance_scale'?"),
    "clip_skip": ("stable_diffusion", "clip_skip: 50", "0 to 12 are valid"),
    "scheduler": ("flux", "diffusers: {scheduler_type: ddim}", "no DDIM for flow-matching models"),
    "seed": ("flux", f"parameters: {{model: w, seed: {MAX_SEED}, n: 2}}", "with n 2"),
    "max_sequence_length": ("flux", "max_sequence_length: 600", "takes at most 512"),
}


@pytest.mark.parametrize("case", CHECKED)
def test_check_tells_of_it_beforehand(case: str, tmp_path: Path) -> None:
    build, key, words = CHECKED[case]
    tiny.save(getattr(tiny, build)(), tmp_path / "w")
    source = "" if key.startswith("parameters") else "parameters: {model: w}\n"
    (tmp_path / "m.yaml").write_text(f"{source}{key}\n")
    (report,) = check(Catalog([tmp_path]))
    assert not report.ok
    assert words in str(report)
    good = "size: 64x64\nclip_skip: 2\noptions: ['guidance_scale:3']\nmax_sequence_length: 77\n"
    (tmp_path / "m.yaml").write_text(f"parameters: {{model: w}}\n{good}")
    (report,) = check(Catalog([tmp_path]))
    assert report.ok, str(report)


# Messages are for people who do not know diffusers, nor Python.


@pytest.mark.parametrize("family", ["DDPM", "DiT"])
def test_what_a_class_does_not_take_is_said_in_the_words_of_requests(server: Served, family: str) -> None:
    answer = server.generate(server.model(family), size="64x64", prompt="1")
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "does not take it" in message
    taken = message.split("It takes: ")[1].split(", ")
    assert {"steps", "seed", "scheduler"} <= set(taken)
    assert not set(taken) & {"generator", "output_type", "return_dict", "num_inference_steps", "class_labels"}


def test_a_schedule_that_a_flow_model_does_not_take_is_left_out_in_words(server: Served) -> None:
    body = {"prompt": "a cat", "steps": 2, "width": 64, "height": 64, "sampler_name": "DPM++ 2M Karras", "seed": 1}
    body["override_settings"] = {"sd_model_checkpoint": server.model("Flux")}
    answer = server.client.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    (warning,) = json.loads(answer.json()["info"])["warnings"]
    assert warning == (
        "scheduler: the schedule karras was left out, dpmpp_2m is used without it: with flow-matching models, and this "
        "is one, DPM++ 2M takes no schedule"
    )
    body["sampler_name"] = "DDIM"
    answer = server.client.post("/sdapi/v1/txt2img", json=body)
    (warning,) = json.loads(answer.json()["info"])["warnings"]
    assert warning.startswith("scheduler: left out: ddim: there is no DDIM for flow-matching models")
    assert warning.endswith("The model's own is used (FlowMatchEulerDiscreteScheduler)")


def test_clip_skip_is_told_as_the_client_counts_it(server: Served) -> None:
    for family, layer, words in (
        ("Flux", 2, "clip_skip: left out: 2; Flux (FluxPipeline) does not take it"),
        ("StableDiffusion", 40, "clip_skip: left out: 40; "),
    ):
        model = file_of(server, f"skip-{family}", family, {})
        body = {"prompt": "a cat", "steps": 2, "width": 64, "height": 64, "clip_skip": layer}
        body["override_settings"] = {"sd_model_checkpoint": model}
        answer = server.client.post("/sdapi/v1/txt2img", json=body)
        (warning,) = json.loads(answer.json()["info"])["warnings"]
        assert warning.startswith(words.replace("Flux (", f"{model} ("))


def test_a_clip_skip_that_requests_may_not_set_is_told_as_the_client_counts_it(server: Served) -> None:
    model = file_of(server, "closed", "StableDiffusion", {"diffusers": {"enable_parameters": "num_inference_steps"}})
    body = {"prompt": "a cat", "steps": 2, "width": 64, "height": 64, "clip_skip": 2}
    body["override_settings"] = {"sd_model_checkpoint": model}
    answer = server.client.post("/sdapi/v1/txt2img", json=body)
    (warning,) = json.loads(answer.json()["info"])["warnings"]
    assert warning.startswith("clip_skip: left out: 2; ")


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/images/generations", {"prompt": None}),
        ("/v1/images/generations", {"prompt": "a cat", "n": {"a": None, "b": True}}),
        ("/v1/images/generations", {"prompt": "a cat", "keep_alive": [None, True]}),
        ("/v1/images/generations", {"prompt": "a cat", "controls": [None]}),
        ("/sdapi/v1/txt2img", {"prompt": ["a", None]}),
        ("/sdapi/v1/txt2img", {"override_settings": True}),
        ("/sdapi/v1/extra-single-image", {"image": encoded(picture(1)), "upscaling_resize": None}),
        ("/sdapi/v1/extra-single-image", {"image": encoded(picture(1))}),
        ("/v1/models/load", {"model": None}),
        ("/v1/models/load", {"model": [True]}),
        ("/v1/models/pin", {"model": "m", "pinned": None}),
    ],
)
def test_no_word_of_python_is_in_a_message(server: Served, route: str, body: dict[str, Any]) -> None:
    answer = server.client.post(route, json=body)
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    for word in ("None", "True", "False", "Value error", "dictionary", "instance", "tuple", "Input"):
        assert word not in message, message


def test_nor_in_what_check_says(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("parameters: {model: o/r}\noptions: ['x:true', 'y:none']\n")
    (report,) = check(Catalog([tmp_path]))
    assert "x=true" in str(report)
    (tmp_path / "m.yaml").write_text("parameters: {model: o/r}\nstep: [true, null]\n")
    (report,) = check(Catalog([tmp_path]))
    assert "[true, null]" in str(report)


@pytest.mark.parametrize("route", ["/v1/models/load", "/models/load", "/v1/models/unload", "/v1/models/pin"])
def test_a_misspelt_field_of_an_order_is_refused(server: Served, route: str) -> None:
    answer = server.client.post(route, json={"model": "StableDiffusion", "modle": "x"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "modle"
    assert "Did you mean 'model'?" in error["message"]


def test_a_misspelt_field_of_other_bodies_is_refused_or_told(server: Served) -> None:
    image = encoded(picture(1))
    assert server.client.post("/v1/images/recipe", json={"image": image, "imag": 1}).status_code == 400
    told = server.client.post("/sdapi/v1/png-info", json={"image": image, "imag": 1})
    assert told.headers["x-sfumato-ignored"] == "imag"
    told = server.generate(server.model("StableDiffusion"), stepz=3)
    assert told.headers["x-sfumato-ignored"] == "stepz"


def test_a_label_is_read_however_it_is_written(server: Served) -> None:
    name = file_of(server, "labels", "DiT", {"size": None})
    server.built[name].labels = {"white shark": 1, "Great_White": 2, "crane": 3, "Crane": 0}
    for prompt, same in ((" White   Shark ", "1"), ("great white", "2"), ("crane", "3"), ("Crane", "0")):
        answers = [server.generate(name, prompt=text) for text in (prompt, same)]
        pictures = [answer.json()["data"][0]["b64_json"] for answer in answers]
        assert [answer.status_code for answer in answers] == [200, 200]
        one, two = (pixels(text) for text in pictures)
        assert one == two


def pixels(text: str) -> bytes:
    import base64
    import io

    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(text))).tobytes()


@pytest.mark.parametrize("command", [["models"], ["generate", "x"], ["remove", "x"], ["pull", "x"], ["prove", "x"]])
def test_a_folder_of_models_that_is_not_there_is_refused(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = str(tmp_path / "nowhere")
    done = CliRunner().invoke(app, [*command, "--models", nowhere])
    assert done.exit_code == 2, done.output
    monkeypatch.setenv("SFUMATO_MODELS", nowhere)
    for each in (command, ["check"]):
        assert CliRunner().invoke(app, each).exit_code == 2


@pytest.mark.parametrize(
    ("error", "line"), [(ValueError(), "ValueError"), (KeyError("a\nb"), r"'a\nb'"), (OSError("\n one \ntwo"), "one ")]
)
def test_a_librarys_error_is_told_in_one_line(error: Exception, line: str) -> None:
    assert first_line(error) == line
    assert told(error) == f"{type(error).__name__}: {line}"
    assert len(first_line(ValueError("x" * 1000))) == 200

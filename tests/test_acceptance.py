"""Failure cases from users' threads, over HTTP, by the number of their row."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support import tiny
from support.answers import error_of, image_of, pixels
from support.hub import Hub
from support.pictures import uri
from support.serving import Server

FILES = {
    "plain": {"model": "nitrosocke/Ghibli-Diffusion", "top": "dtype: fp32\n"},
    "half": {"model": "nitrosocke/Ghibli-Diffusion", "top": "f16: true\n", "diffusers": "  cuda: false\n"},
    "flow": {"model": "tiny/flux", "diffusers": "  scheduler_type: euler_a\n"},
    "fine-flow": {"model": "tiny/flux"},
    "only-text": {"model": "nitrosocke/Ghibli-Diffusion", "enable": "none"},
}


def write(models: Path, name: str, model: str, top: str = "", diffusers: str = "", enable: str = "") -> None:
    enable = enable or "negative_prompt,num_inference_steps,clip_skip,image"
    (models / f"{name}.yaml").write_text(
        f"name: {name}\nparameters:\n  model: {model}\n{top}step: 3\n"
        f"diffusers:\n{diffusers}  enable_parameters: {enable}\n"
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("acceptance")
    models = folder / "models"
    models.mkdir()
    for name, keys in FILES.items():
        write(models, name, **keys)
    with Server(models, folder / "data", "--loaded-models", "10", env=hub.environment(folder / "hf")) as server:
        yield server


def test_row_05_every_image_can_be_made_again(server: Server) -> None:
    four = server.draw(model="plain", prompt="a cat", size="64x64", n=4, seed=7)
    again = server.draw(model="plain", prompt="a cat", size="64x64", n=1, seed=9)
    assert [item["seed"] for item in four.json()["data"]] == [7, 8, 9, 10]
    # Drawn beside three others and drawn alone: rounding at 1e-6 may move an 8-bit value by one, not more.
    assert np.abs(pixels(image_of(four, 2)).astype(int) - pixels(image_of(again)).astype(int)).max() <= 1
    assert not np.array_equal(pixels(image_of(four, 0)), pixels(image_of(four, 1)))


@pytest.mark.parametrize("size", ["512x511", "0x0", "100000x10000", "abc", "64x-64", "64", "1e3x64"])
def test_row_12_bad_sizes_are_refused(server: Server, size: str) -> None:
    error = error_of(server.draw(model="plain", prompt="a cat", size=size))
    assert error["param"] == "size"
    assert size.split("x")[0] in error["message"]


@pytest.mark.parametrize("size", ["auto", "AUTO", None, ""])
def test_row_12_no_size_is_the_models_own(server: Server, size: str | None) -> None:
    assert image_of(server.draw(model="plain", prompt="a cat", size=size)).size == (64, 64)


@pytest.mark.parametrize(("size", "expected"), [("96x72", (96, 72)), ("72X96", (72, 96)), (" 64 x 64 ", (64, 64))])
def test_row_12_the_file_has_the_size_asked_for(server: Server, size: str, expected: tuple[int, int]) -> None:
    assert image_of(server.draw(model="plain", prompt="a cat", size=size)).size == expected


def test_row_13_a_noise_solver_on_a_flow_model_is_refused(server: Server) -> None:
    at_load = error_of(server.draw(model="flow", prompt="a cat"), 500)
    assert at_load["code"] == "model_file_invalid"
    per_request = error_of(server.draw(model="fine-flow", prompt="a cat", scheduler="euler_a"))
    assert per_request["param"] == "scheduler"
    for error in (at_load, per_request):
        assert "euler_a" in error["message"]
        assert "euler," in error["message"]
    assert image_of(server.draw(model="fine-flow", prompt="a cat", scheduler="euler")).mode == "RGB"


def test_row_14_f16_on_a_cpu(server: Server) -> None:
    for _ in range(2):
        image = image_of(server.draw(model="half", prompt="a cat", size="64x64"))
        assert json.loads(image.info["sfumato"])["dtype"] in ("bf16", "fp32")
    assert server.log.count("f16: true") == 1


@pytest.mark.parametrize("strength", [0, 0.01, 1])
def test_row_16_every_strength_draws(server: Server, strength: float) -> None:
    answer = server.draw(model="plain", prompt="a cat", image=server.png_data_uri(), strength=strength)
    assert image_of(answer).size == (64, 64)


@pytest.mark.parametrize("strength", [1.5, -0.1])
def test_row_16_strength_out_of_range(server: Server, strength: float) -> None:
    answer = server.draw(model="plain", prompt="a cat", image=server.png_data_uri(), strength=strength)
    assert error_of(answer)["param"] == "strength"


GRADIENT = Image.linear_gradient("L").resize((96, 64)).convert("RGB")


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        ("!!!", "neither base64"),
        (base64.b64encode(b"hello, this is a text file").decode(), "not a picture"),
        ("data:image/png,plain", "must be base64"),
        (uri(Image.new("RGB", (1, 1))), "1x1"),
        (uri(Image.new("1", (30000, 30000))), "pixels"),
        (uri(GRADIENT, "GIF", save_all=True, append_images=[Image.new("RGB", (96, 64))]), "animated"),
        (base64.b64encode(base64.b64decode(uri(GRADIENT).split(",")[1])[:150]).decode(), "damaged"),
        ("http://127.0.0.1:9/picture.png", "not a public address"),
        ("http://no-such-host.invalid/picture.png", "does not resolve"),
    ],
    ids=[
        "junk",
        "text",
        "plain-uri",
        "one-pixel",
        "huge",
        "animated",
        "truncated",
        "loopback",
        "unknown-host",
    ],
)
def test_row_17_pictures_that_cannot_be_used(server: Server, picture: str, reason: str) -> None:
    error = error_of(server.draw(model="plain", prompt="a cat", image=picture))
    assert error["code"] == "invalid_image"
    assert reason in error["message"]


def test_row_17_pictures_are_decoded_right(server: Server) -> None:
    """However a picture is packed, the model sees the same one: the same seed draws the same picture."""

    def drawn(picture: str) -> Any:
        answer = server.draw(model="plain", prompt="a cat", image=picture, seed=1, strength=0.3, size="96x64")
        return pixels(image_of(answer)).astype(int)

    plain = drawn(uri(GRADIENT))
    turned = GRADIENT.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn clockwise to show"
    assert np.array_equal(plain, drawn(uri(GRADIENT).split(",")[1]))
    assert np.array_equal(
        plain,
        drawn("\n".join(base64.encodebytes(base64.b64decode(uri(GRADIENT).split(",")[1])).decode().split())),
    )
    assert np.array_equal(plain, drawn(uri(turned, "PNG", exif=exif)))
    assert np.array_equal(plain, drawn(uri(GRADIENT, "WEBP", lossless=True)))
    jpeg = io.BytesIO()
    GRADIENT.convert("CMYK").save(jpeg, "JPEG", quality=98)
    cmyk = drawn("data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode())
    assert np.abs(plain - cmyk).mean() < 8


def test_row_18_a_failed_load_is_an_error_and_the_next_request_tries_again(
    tmp_path: Path, repositories: dict[str, Path]
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    write(models, "late", "some/one")
    with Hub() as hub, Server(models, tmp_path / "data", env=hub.environment(tmp_path / "hf")) as server:
        error = error_of(server.draw(model="late", prompt="a cat"), 500)
        assert error["code"] == "model_load_failed"
        assert "some/one" in error["message"]
        assert server.client.get("/v1/models").json()["data"][0]["sfumato"]["status"] == "failed"
        hub.add("some/one", repositories["nitrosocke/Ghibli-Diffusion"])
        assert image_of(server.draw(model="late", prompt="a cat")).size == (64, 64)
        assert server.client.get("/v1/models").json()["data"][0]["sfumato"]["status"] == "ready"


def test_row_20_unknown_fields_are_ignored_and_named(server: Server) -> None:
    answer = server.draw(model="plain", prompt="a cat", extra_body={"x": 1}, foo="bar", style="vivid")
    image_of(answer)
    assert set(answer.headers["x-sfumato-ignored"].split(", ")) == {"extra_body", "foo", "style"}
    assert "x-sfumato-ignored" not in server.draw(model="plain", prompt="a cat").headers


def test_a_parameter_that_the_model_does_not_enable(server: Server) -> None:
    for field, value in {
        "negative_prompt": "dog",
        "step": 4,
        "clip_skip": 1,
        "image": server.png_data_uri(),
    }.items():
        error = error_of(server.draw(model="only-text", prompt="a cat", **{field: value}))
        assert "enable_parameters" in error["message"]
        assert "only-text.yaml" in error["message"]


def test_row_15_a_single_file_without_a_network(tmp_path: Path, repositories: dict[str, Path]) -> None:
    models = tmp_path / "models"
    models.mkdir()
    tiny.single_file(tiny.stable_diffusion(), models / "local.safetensors")
    write(models, "local", "local.safetensors")
    with Hub() as hub:
        repo = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        hub.add(repo, repositories[repo])
        gone = {**hub.environment(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
        with Server(models, tmp_path / "data", env=gone) as server:
            error = error_of(server.draw(model="local", prompt="a cat"), 503)
            assert "sfumato pull local" in error["message"]
        with Server(models, tmp_path / "data", env=hub.environment(tmp_path / "hf")) as server:
            drawn = pixels(image_of(server.draw(model="local", prompt="a cat", seed=3)))
        with Server(models, tmp_path / "data", env=gone) as server:
            assert np.array_equal(drawn, pixels(image_of(server.draw(model="local", prompt="a cat", seed=3))))
        assert not any(path.endswith(".safetensors") for path in hub.downloads(repo))

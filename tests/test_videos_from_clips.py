"""Clips from clips over HTTP and on the command line: every way to send one, what is refused, and a server that is
killed meanwhile."""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image
from typer.testing import CliRunner

from sfumato.cli import app
from sfumato.pictures import recipe
from support.answerable import within
from support.clip_classes import wan_image
from support.drawing import source
from support.families_moving import FAMILIES
from support.moving import animated, contained
from support.probed import needs
from support.serving import TIMEOUT_S, Server
from support.sites import Site

SIZE = (16, 16)
FILM = animated("WEBP", 7, SIZE)
GIF = animated("GIF", 7, SIZE)
PICTURE = source(*SIZE)
DRAWN: dict[str, Any] = {"prompt": "a cat", "seed": 3, "steps": 3, "output_format": "webp"}


def text(data: bytes, type: str = "") -> str:
    return (f"data:{type};base64," if type else "") + base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("from-clips")
    FAMILIES["Wan"].build().save_pretrained(models / "weights" / "film")
    wan_image().save_pretrained(models / "weights" / "from-picture")
    more = {"film": "", "film-only": "diffusers: {pipeline_type: WanVideoToVideoPipeline}\n", "from-picture": ""}
    for name, keys in more.items():
        weights = "film" if name == "film-only" else name
        (models / f"{name}.yaml").write_text(f"name: {name}\nparameters: {{model: weights/{weights}}}\n{keys}")
    shut = "diffusers: {enable_parameters: none}\n"
    (models / "shut.yaml").write_text(f"name: shut\nparameters: {{model: weights/film}}\n{shut}")
    return models


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--default-model", "film", "--picture-hosts", "127.0.0.1")
    with Server(models, tmp_path_factory.mktemp("data"), *flags) as server:
        for name in ("film", "film-only", "from-picture"):  # reads diffusers' source
            body = DRAWN | {"model": name, "size": "24x24"}
            assert server.client.post("/v1/videos/sync", json=body).status_code == 400
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with warnings.catch_warnings(), openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        warnings.simplefilter("ignore", DeprecationWarning)
        yield client


def ended(server: Server, id: str) -> dict[str, Any]:
    def state() -> dict[str, Any]:
        found: dict[str, Any] = server.client.get(f"/v1/videos/{id}").json()
        return found

    within(TIMEOUT_S, lambda: state()["status"] in ("completed", "failed"))
    return state()


def sync(server: Server, **fields: Any) -> Any:
    return server.client.post("/v1/videos/sync", json=DRAWN | fields)


@pytest.fixture(scope="module")
def drawn(server: Server) -> bytes:
    """The clip that all ways to send the same one make."""
    answer = sync(server, input_reference=text(FILM))
    assert answer.status_code == 200, answer.text
    content: bytes = answer.content
    return content


def test_the_sdk_sends_a_clip_as_the_reference(server: Server, client: openai.OpenAI, drawn: bytes) -> None:
    made = client.videos.create(prompt="a cat", input_reference=("film.webp", FILM), extra_body=DRAWN)
    video = ended(server, made.id)
    assert (video["status"], video["num_frames"], video["fps"], video["size"]) == ("completed", 5, 20, "16x16"), video
    assert video["warnings"] == ["num_frames: 5, and the source clip has 7: the class does not draw as many"]
    assert client.videos.download_content(made.id).read() == drawn
    with Image.open(io.BytesIO(drawn)) as image:
        assert image.n_frames == 5
    made_of = recipe.read_open(io.BytesIO(drawn), "x.webp")
    assert made_of.pipeline == "WanVideoToVideoPipeline"
    assert made_of.video_sha256


def test_every_way_to_send_a_clip(server: Server, drawn: bytes) -> None:
    form = {name: str(value) for name, value in DRAWN.items()}
    file = {"file": ("film.webp", FILM), "purpose": (None, "vision")}
    id = server.client.post("/v1/files", files=file).json()["id"]
    uri = text(FILM, "image/webp")
    for fields in (
        {"input_reference": uri},
        {"input_reference": {"video_url": uri}},
        {"input_reference": {"file_id": id}},
        {"video_reference": {"video_url": uri}},
        {"video_reference": {"video_url": {"url": uri}}},
        {"video_reference": {"file_id": id}},
        {"video_reference": uri},
    ):
        answer = sync(server, **fields)
        assert (answer.status_code, answer.content == drawn) == (200, True), (fields, answer.text[:300])
    for files in ({"input_reference": ("film.webp", FILM)}, {"video_reference": ("film.webp", FILM)}):
        assert server.client.post("/v1/videos/sync", data=form, files=files).content == drawn
    for more in (
        {"video_reference": json.dumps({"video_url": uri})},  # as vLLM-Omni's clients send it
        {"video_reference[video_url]": uri},
    ):
        assert server.client.post("/v1/videos/sync", data=form | more).content == drawn
    local = server.client.post("/video", json=DRAWN | {"start_image": uri, "response_format": "b64_json"}).json()
    assert base64.b64decode(local["data"][0]["b64_json"]) == drawn


def test_a_clip_behind_a_url_and_one_that_was_drawn_here(server: Server, drawn: bytes) -> None:
    with Site(lambda site: site.say(200, FILM)) as site:
        assert sync(server, input_reference=site.url).content == drawn
        assert sync(server, input_reference=site.url, model="film-only").status_code == 200
    made = server.client.post("/video", json=DRAWN | {"input_reference": text(FILM)}).json()
    again = sync(server, input_reference=made["data"][0]["url"])
    assert again.status_code == 200, again.text
    made_of = recipe.read_open(io.BytesIO(again.content), "x.webp")
    assert (made_of.sampling.num_frames, made_of.sampling.fps) == (5, 20)


@pytest.mark.parametrize("format", ["mp4", "webm", "mov"])
def test_films_in_containers(server: Server, format: str) -> None:
    needs("mp4")
    answer = sync(server, input_reference=text(contained(format, 7, SIZE), f"video/{format}"), num_frames=5)
    assert answer.status_code == 200, answer.text
    sampling = recipe.read_open(io.BytesIO(answer.content), "x.webp").sampling
    assert (sampling.num_frames, sampling.fps) == (5, 16)


def test_the_result_has_the_length_rate_size_and_strength_of_the_request(server: Server) -> None:
    fields = {"num_frames": 5, "fps": 8, "size": "32x16", "strength": 0.5, "model": "film-only"}
    answer = sync(server, input_reference=text(GIF), **fields)
    made = recipe.read_open(io.BytesIO(answer.content), "x.webp").sampling
    assert (made.num_frames, made.fps, made.size, made.strength) == (5, 8, (32, 16), 0.5)
    long = sync(server, input_reference=text(animated("GIF", 9, SIZE, ms=1000)), seconds=8)  # at its own rate
    assert recipe.read_open(io.BytesIO(long.content), "x.webp").sampling.num_frames == 5, long.text
    weaker = sync(server, input_reference=text(GIF), **fields | {"steps": 9, "strength": 0.2})
    assert weaker.status_code == 200


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"input_reference": text(PICTURE)}, "input_reference", "film takes no picture; leave it out, or send a clip"),
    ({"input_reference": text(PICTURE), "model": "film-only"}, "input_reference", "film-only needs a source clip"),
    ({"model": "film-only"}, "input_reference", "film-only needs a source clip: MP4"),
    ({"input_reference": text(FILM), "model": "from-picture"}, "input_reference", "takes no clip .image-to-video."),
    ({"video_reference": text(FILM), "model": "from-picture"}, "video_reference", "takes no clip"),
    ({"video_reference": text(FILM), "model": "sfumato-tiny"}, "model", "makes pictures"),
    ({"video_reference": [text(FILM)] * 2}, "video_reference", "at most 1"),
    ({"video_reference": {}}, "video_reference", "no picture"),
    ({"input_reference": {"image_url": text(PICTURE), "video_url": text(FILM)}}, "input_reference",
     "image_url and video_url in one object: only one"),
    ({"video_reference": "{"}, "video_reference", "no picture"),
    ({"input_reference": text(FILM), "end_image": text(PICTURE)}, "end_image", "takes no picture"),
    ({"input_reference": text(FILM), "num_frames": 8}, "num_frames", "frames of the form 4k.1"),
    ({"input_reference": text(FILM), "size": "24x24"}, "size", "multiples of 16"),
    ({"input_reference": text(FILM), "model": "shut"}, "input_reference", "Add image to diffusers"),
    ({"strength": 0.5}, "strength", "applies only to a source picture or clip"),
]  # fmt: skip


@pytest.mark.parametrize("fields", REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused_before_any_work(server: Server, fields: tuple[dict[str, Any], str, str]) -> None:
    body, param, words = fields
    for path in ("/v1/videos", "/v1/videos/sync"):
        answer = server.client.post(path, json=DRAWN | body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), (path, answer.text)
        assert re.search(words, answer.json()["error"]["message"]), answer.text


DAMAGED: list[tuple[dict[str, Any], str, str]] = [
    ({"video_reference": text(PICTURE)}, "video_reference", "it is a picture (PNG)"),
    ({"video_reference": "no clip"}, "video_reference", "neither base64"),
    ({"video_reference": text(b"no clip")}, "video_reference", "not a clip in a known format (MP4, MOV, WebM"),
    ({"video_reference": text(GIF[: len(GIF) // 2])}, "video_reference", "damaged"),
    ({"video_reference": text(animated("GIF", 300, (8, 8)))}, "video_reference", "more than 257 frames"),
    ({"video_reference": text(animated("GIF", 3, SIZE, ms=0))}, "fps", "does not say its frames a second"),
    ({"video_reference": text(animated("GIF", 3, SIZE, ms=2000))}, "fps", "has 0.5 frames a second; 1 to 120"),
    ({"video_reference": text(FILM), "num_frames": 9}, "num_frames", "has 7 frames"),
    ({"video_reference": text(FILM), "seconds": 5}, "seconds", "has 7 frames, and 100 would be drawn"),
    ({"video_reference": {"file_id": "file-of-nobody"}}, "video_reference", "file-of-nobody"),
    ({"video_reference": "http://127.0.0.1:1/film.mp4"}, "video_reference", "could not be fetched"),
]  # fmt: skip


@pytest.mark.parametrize("fields", DAMAGED, ids=range(len(DAMAGED)))
def test_a_clip_that_cannot_be_drawn_from(server: Server, fields: tuple[dict[str, Any], str, str]) -> None:
    body, param, words = fields
    answer = sync(server, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert words in answer.json()["error"]["message"]
    video = ended(server, server.client.post("/v1/videos", json=DRAWN | body).json()["id"])
    assert (video["status"], words in video["error"]["message"]) == ("failed", True), video


def test_the_model_list_says_what_takes_a_clip(server: Server) -> None:
    listed = {each["id"]: each for each in server.client.get("/v1/models").json()["data"]}
    assert listed["film-only"]["architecture"]["input_modalities"] == ["text", "video"]
    capable = {each["id"]: each for each in server.client.get("/v1/models/capabilities").json()["data"]}
    assert capable["film-only"]["capabilities"] == ["video"]
    told = {name: each["sfumato"] for name, each in listed.items()}
    assert told["film"]["tasks"] == ["text-to-video", "video-to-video"]
    assert told["film-only"]["tasks"] == ["video-to-video"]
    video = next(each for each in told["film-only"]["inputs"] if each["name"] == "video")
    assert (video["least"], video["most"], video["roles"]) == (1, 1, ["clip"]), video


def test_a_clip_from_a_clip_is_cancelled(server: Server) -> None:
    body = DRAWN | {"input_reference": text(FILM), "steps": 1000}
    id = server.client.post("/v1/videos", json=body).json()["id"]
    within(TIMEOUT_S, lambda: server.client.get(f"/v1/videos/{id}").json()["status"] == "in_progress")
    assert server.client.delete(f"/v1/videos/{id}").json()["deleted"]
    assert server.client.get(f"/v1/videos/{id}").status_code == 404


@pytest.mark.slow
def test_a_clip_from_a_clip_is_drawn_again_after_the_server_was_killed(models: Path, tmp_path: Path) -> None:
    """The same id, the same seed, the same file: the source is in the stored request."""
    body = {"prompt": "a cat", "steps": 60, "output_format": "webp"}
    form, files = {name: str(value) for name, value in body.items()}, {"input_reference": ("film.gif", GIF)}
    with Server(models, tmp_path, "--default-model", "film-only") as server:
        id = server.client.post("/v1/videos", data=form, files=files).json()["id"]
        within(TIMEOUT_S, lambda: server.client.get(f"/v1/videos/{id}").json()["progress"] > 10)
        server.signal(signal.SIGKILL)
        server.wait()
    with Server(models, tmp_path, "--default-model", "film-only") as server:
        video = ended(server, id)
        assert video["status"] == "completed", video
        content = server.client.get(f"/v1/videos/{id}/content").content
        same = server.client.post("/v1/videos/sync", data=form | {"seed": str(video["seed"])}, files=files).content
        assert content == same


def test_the_command_line_draws_from_a_clip_and_again_from_its_recipe(models: Path, tmp_path: Path) -> None:
    film, other = tmp_path / "film.webp", tmp_path / "other.webp"
    film.write_bytes(FILM)
    other.write_bytes(animated("WEBP", 8, SIZE))
    first, again = tmp_path / "first.webp", tmp_path / "again.webp"
    flags = ["--models", str(models), "-m", "film", "--strength", "0.6", "--steps", "3", "--frames", "5"]
    ran = CliRunner().invoke(app, ["generate", "a cat", *flags, "--video", str(film), "-o", str(first)])
    assert ran.exit_code == 0, (ran.output, ran.exception)
    made = recipe.read(first)
    assert (made.pipeline, made.sampling.num_frames, made.sampling.fps) == ("WanVideoToVideoPipeline", 5, 20)
    like = ["generate", "--like", str(first), "--models", str(models), "-o", str(again)]
    ran = CliRunner().invoke(app, [*like, "--video", str(film)])
    assert ran.exit_code == 0, (ran.output, ran.exception)
    assert again.read_bytes() == first.read_bytes()
    for more, words in (([], "none was passed"), (["--video", str(other)], "from another one")):
        ran = CliRunner().invoke(app, [*like, *more])
        assert ran.exit_code != 0
        assert words in f"{ran.output} {ran.exception}"

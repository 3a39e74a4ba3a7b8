"""Clips over HTTP: the official OpenAI SDK's `videos`, LocalAI's `/video`, and a server that is killed meanwhile."""

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

import httpx
import openai
import pytest
from openai.types import Video
from PIL import Image

from sfumato.formats import of_kind, written_here
from support.answerable import within
from support.clip_classes import wan_image
from support.drawing import source
from support.families_moving import FAMILIES
from support.families_newer import wan_between
from support.held import Held, left
from support.probed import needs
from support.serving import TIMEOUT_S, Server

ENABLE = "diffusers: {enable_parameters: 'negative_prompt,num_inference_steps,image'}\n"
SMALL: dict[str, Any] = {"width": 16, "height": 16, "num_frames": 5, "fps": 8, "steps": 2, "output_format": "webp"}
PICTURE = base64.b64encode(source(16, 16)).decode()
DAY_S = 24 * 3600
LONG = SMALL | {"steps": 1000}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("videos")
    for name, build in (("film", FAMILIES["Wan"].build), ("from-picture", wan_image), ("between", wan_between)):
        build().save_pretrained(models / "weights" / name)
        (models / f"{name}.yaml").write_text(f"name: {name}\nparameters: {{model: weights/{name}}}\n{ENABLE}")
    return models


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(models, tmp_path_factory.mktemp("data"), "--default-model", "film") as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with warnings.catch_warnings(), openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        warnings.simplefilter("ignore", DeprecationWarning)  # the SDK says that OpenAI closes its own API
        yield client


def frames(data: bytes) -> list[bytes]:
    with Image.open(io.BytesIO(data)) as image:
        pixels = []
        for index in range(image.n_frames):
            image.seek(index)
            pixels.append(image.convert("RGB").tobytes())
    return pixels


def create(client: openai.OpenAI, **fields: Any) -> Video:
    return client.videos.create(prompt="a cat", extra_body=SMALL | fields)


def ended(server: Server, id: str) -> dict[str, Any]:
    def state() -> dict[str, Any]:
        found: dict[str, Any] = server.client.get(f"/v1/videos/{id}").json()
        return found

    within(TIMEOUT_S, lambda: state()["status"] in ("completed", "failed"))
    return state()


def test_a_clip_from_its_creation_to_its_file(server: Server, client: openai.OpenAI) -> None:
    made = create(client, seed=3)
    assert (made.object, made.status in ("queued", "in_progress")) == ("video", True)
    ended(server, made.id)
    video = client.videos.retrieve(made.id)
    Video.model_validate(video.to_dict() | {"size": "720x1280"})  # of which the SDK's type knows four
    assert (video.status, video.progress, video.model, video.prompt) == ("completed", 100, "film", "a cat")
    assert (video.seconds, video.size, video.error) == ("0.625", "16x16", None)
    told = video.to_dict()
    assert (told["num_frames"], told["fps"], told["seed"], told["warnings"]) == (5, 8, 3, [])
    assert video.completed_at and video.completed_at >= video.created_at
    content = client.videos.download_content(made.id)
    assert content.response.headers["content-type"] == "image/webp"
    assert len(frames(content.read())) == 5
    part = server.client.get(f"/v1/videos/{made.id}/content", headers={"range": "bytes=0-3"})
    assert (part.status_code, part.content) == (206, b"RIFF")
    job = server.client.get(f"/v1/jobs/{made.id}").json()
    assert (job["status"], job["path"]) == ("completed", "/v1/videos")


GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "video.md"
EXAMPLES = re.findall(r"```json\n(.*?)```", GUIDE.read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_the_guide_make_clips(server: Server, example: str) -> None:
    small = {"model": "film", "size": "16x16", "fps": 8, "steps": 2, "output_format": "webp"}
    made = server.client.post("/v1/videos", json=json.loads(example) | small)
    assert made.status_code == 200, made.text
    assert ended(server, made.json()["id"])["num_frames"] == 33  # four seconds, as frames that the class draws


def test_a_list_in_pages_and_deletion(server: Server, client: openai.OpenAI) -> None:
    ids = [create(client, seed=seed).id for seed in (1, 2, 3)]
    for id in ids:
        ended(server, id)
    listed = [video.id for video in client.videos.list(limit=2)]  # follows pages
    assert [id for id in listed if id in ids] == ids[::-1]
    oldest = [video.id for video in client.videos.list(limit=2, order="asc")]
    assert [id for id in oldest if id in ids] == ids
    name = client.videos.retrieve(ids[0]).to_dict()["file"]
    assert server.client.get(f"/generated-images/{name}").status_code == 200
    assert client.videos.delete(ids[0]).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(ids[0])
    assert server.client.get(f"/generated-images/{name}").status_code == 404
    assert ids[0] not in [video.id for video in client.videos.list(limit=100)]


def test_a_clip_that_is_drawn_is_cancelled_by_deleting_it(server: Server, client: openai.OpenAI) -> None:
    made = create(client, **LONG)

    def state() -> Any:
        return server.client.get(f"/v1/videos/{made.id}").json()

    within(TIMEOUT_S, lambda: state()["status"] == "in_progress")
    assert 0 <= state()["progress"] < 100 and state()["size"] == "16x16"
    answer = server.client.get(f"/v1/videos/{made.id}/content")
    assert (answer.status_code, "it is in_progress" in answer.text) == (404, True)
    assert client.videos.delete(made.id).deleted
    assert server.client.get(f"/v1/videos/{made.id}").status_code == 404


@pytest.mark.parametrize("path", ["/v1/videos/sync", "/video"])
def test_a_clip_ends_with_the_client_that_waits_for_it(server: Server, path: str) -> None:
    id = left(server, {"prompt": "a cat"} | LONG, path)

    def state() -> Any:
        return server.client.get(f"/v1/images/progress/{id}").json()["status"]

    within(TIMEOUT_S, lambda: state() in ("completed", "cancelled"))
    assert state() == "cancelled"


def test_a_key_again_is_answered_with_the_clip_as_it_is_then(server: Server) -> None:
    bad = {"model": "from-picture", "input_reference": base64.b64encode(b"no picture").decode()}
    for key, fields in (("good", {}), ("bad", bad)):
        body, headers = {"prompt": "a cat"} | SMALL | fields, {"idempotency-key": f"of the {key} clip"}
        id = server.client.post("/v1/videos", json=body, headers=headers).json()["id"]
        video = ended(server, id)
        again = server.client.post("/v1/videos", json=body, headers=headers)
        assert (again.status_code, again.headers["idempotency-replayed"], again.json()) == (200, "true", video)
    assert video["error"]["code"] == "invalid_image"


def test_a_client_that_waits_gets_the_clip_once_it_is_drawn(server: Server) -> None:
    headers = {"prefer": f"respond-async, wait={TIMEOUT_S}"}
    answer = server.client.post("/v1/videos", json={"prompt": "a cat"} | SMALL, headers=headers)
    video = answer.json()
    assert (answer.status_code, video["object"], video["model"]) == (200, "video", "film")
    now = ended(server, video["id"])
    assert now["status"] == "completed"
    assert video == now or video["status"] in ("queued", "in_progress")  # a minute is all that it waits


def test_a_picture_of_an_image_job_is_no_clip(server: Server) -> None:
    body = {"prompt": "a cup", "model": "sfumato-tiny", "steps": 1, "size": "64x64"}
    server.client.post("/v1/images/generations", json=body, headers={"idempotency-key": "of a picture"})
    job = server.client.get("/v1/jobs").json()["data"][0]
    assert job["path"] == "/v1/images/generations"
    after = server.client.get("/v1/videos", params={"after": job["id"]})
    assert (after.status_code, after.json()["error"]["param"]) == (400, "after")
    refused = server.client.post("/v1/images/generations", json={"prompt": "a cat", "model": "film"})
    assert refused.status_code == 400
    assert (
        "film makes clips (text-to-video, video-to-video), and the request is for pictures"
        in refused.json()["error"]["message"]
    )
    assert server.client.get("/v1/videos/no-such").status_code == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"num_frames": 6}, "num_frames"),
        ({"num_frames": 100_000}, "num_frames"),
        ({"num_frames": 9, "seconds": 1}, "seconds"),
        ({"num_frames": None, "seconds": 500}, "seconds"),
        ({"num_frames": None, "seconds": 60, "fps": 60}, "seconds"),
        ({"num_frames": None, "seconds": 60, "fps": None}, "seconds"),
        ({"num_frames": None, "seconds": 15, "width": 1536, "height": 1536}, "seconds"),
        ({"width": 24}, "size"),
        ({"output_format": "png"}, "output_format"),
        ({"width": None}, "width"),
        ({"input_reference": PICTURE}, "input_reference"),
        ({"input_reference": PICTURE, "end_image": PICTURE, "model": "from-picture"}, "end_image"),
        ({"input_reference": PICTURE, "end_image": [PICTURE, PICTURE], "model": "between"}, "end_image"),
        ({"input_reference": PICTURE, "end_image": PICTURE, "model": "between", "num_frames": 1}, "num_frames"),
        ({"input_reference": PICTURE, "model": "between"}, "end_image"),
        ({"model": "sfumato-tiny"}, "model"),
        ({"prompt": None}, "prompt"),
        ({"n": 2}, "n"),
    ],
)
def test_what_is_refused_at_once(server: Server, fields: dict[str, Any], param: str) -> None:
    for path in ("/v1/videos", "/v1/videos/sync", "/video"):
        answer = server.client.post(path, json={"prompt": "a cat"} | SMALL | fields)
        assert answer.status_code == 400, (path, answer.text)
        assert answer.json()["error"]["param"] == param, answer.text


def test_a_missing_picture_is_asked_for_by_the_name_of_its_route(server: Server) -> None:
    for path, field in (
        ("/v1/videos", "input_reference"),
        ("/v1/videos/sync", "input_reference"),
        ("/video", "start_image"),
    ):
        for fields in ({"model": "from-picture"}, {"model": "between", "end_image": PICTURE}):
            answer = server.client.post(path, json={"prompt": "a cat"} | SMALL | fields)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), answer.text
            assert field in answer.json()["error"]["message"]
    for field in ("input_reference", "end_image"):
        pictures = {"input_reference": PICTURE, "end_image": PICTURE} | {field: "no picture"}
        answer = server.client.post("/v1/videos/sync", json={"prompt": "a cat", "model": "between"} | SMALL | pictures)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), answer.text
    both = {"prompt": "a cat", "model": "from-picture", "start_image": PICTURE, "input_reference": PICTURE} | SMALL
    answer = server.client.post("/video", json=both)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_reference")


def test_a_clip_between_two_pictures(server: Server) -> None:
    end = base64.b64encode(source(20, 40)).decode()
    body = {"prompt": "a cat", "seed": 3, "model": "between", "end_image": end} | SMALL
    answer = server.client.post("/v1/videos/sync", json=body | {"input_reference": PICTURE})
    assert answer.status_code == 200, answer.text
    listed = server.client.post("/v1/videos/sync", json=body | {"input_reference": [PICTURE, end], "end_image": None})
    local = server.client.post("/video", json=body | {"start_image": PICTURE, "response_format": "b64_json"})
    assert base64.b64decode(local.json()["data"][0]["b64_json"]) == answer.content == listed.content
    forms = {"input_reference": ("a.png", base64.b64decode(PICTURE)), "end_image": ("b.png", base64.b64decode(end))}
    fields = {name: value for name, value in body.items() if name != "end_image"}
    assert server.client.post("/v1/videos/sync", data=fields, files=forms).content == answer.content
    told = {each["id"]: each["sfumato"] for each in server.client.get("/v1/models").json()["data"]}
    (image,) = [each for each in told["between"]["inputs"] if each["name"] == "image"]
    assert (image["roles"], image["least"], image["most"]) == (["picture", "last"], 2, 2)


def test_what_is_refused_at_its_turn_is_the_error_of_the_clip(server: Server, client: openai.OpenAI) -> None:
    broken = base64.b64encode(b"no picture").decode()
    body = {"prompt": "a cat", "model": "from-picture", "input_reference": broken} | SMALL
    refused = server.client.post("/v1/videos/sync", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input_reference")
    answer = server.client.post("/v1/videos", json=body)
    ended(server, answer.json()["id"])
    video = client.videos.retrieve(answer.json()["id"])
    assert video.status == "failed" and video.error
    assert (video.error.code, video.error.message) == ("invalid_image", refused.json()["error"]["message"])
    assert (video.model, video.prompt, video.size, video.seconds) == ("from-picture", "a cat", "16x16", "0.625")
    assert video.to_dict()["expires_at"] > answer.json()["created_at"] + DAY_S - 1
    listed = {each["id"]: each for each in server.client.get("/v1/videos?limit=100").json()["data"]}
    assert listed[video.id] == video.to_dict()


def test_a_cancelled_clip_says_what_it_was(server: Server, client: openai.OpenAI) -> None:
    made = create(client, seed=5, **LONG)
    within(TIMEOUT_S, lambda: server.client.get(f"/v1/videos/{made.id}").json()["status"] == "in_progress")
    assert server.client.get(f"/v1/videos/{made.id}").json()["expires_at"] is None
    assert server.client.delete(f"/v1/jobs/{made.id}").status_code == 200
    video = ended(server, made.id)
    assert (video["status"], video["error"]["code"]) == ("failed", "cancelled")
    told = (video["model"], video["size"], video["seconds"], video["num_frames"], video["fps"], video["seed"])
    assert told == ("film", "16x16", "0.625", 5, 8, 5)
    assert video["expires_at"] > made.created_at + DAY_S - 1


def test_the_file_at_once(server: Server) -> None:
    answer = server.client.post("/v1/videos/sync", json={"prompt": "a cat", "seed": 3} | SMALL)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")
    assert answer.headers["x-sfumato-seed"] == "3"
    again = server.client.post("/v1/videos/sync", data={"prompt": "a cat", "seed": "3", "n": "1"} | SMALL)  # a form
    assert again.content == answer.content


def test_a_clip_from_a_picture_in_every_form(server: Server, client: openai.OpenAI) -> None:
    picture = source(32, 16)
    uri = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    sized = {name: value for name, value in SMALL.items() if name not in ("width", "height")}
    fields = sized | {"prompt": "a cat", "seed": 3, "model": "from-picture"}
    asked: list[httpx.Response] = [
        server.client.post("/v1/videos/sync", json=fields | {"input_reference": uri}),
        server.client.post("/v1/videos/sync", json=fields | {"input_reference": {"image_url": uri}}),
        server.client.post("/v1/videos/sync", data=fields, files={"input_reference": ("a.png", picture)}),
    ]
    assert [answer.status_code for answer in asked] == [200] * 3, asked[0].text
    assert len({answer.content for answer in asked}) == 1
    with Image.open(io.BytesIO(asked[0].content)) as image:
        assert (image.size, image.n_frames) == ((32, 16), 5)
    made = client.videos.create(
        prompt="a cat", model="from-picture", input_reference=("a.png", picture), extra_body=sized | {"seed": 3}
    )
    ended(server, made.id)
    assert client.videos.download_content(made.id).read() == asked[0].content


def test_localais_route(server: Server) -> None:
    body = {"model": "film", "prompt": "a cat", "seed": 3, "cfg_scale": 5, "step": 2} | SMALL
    body.pop("steps")
    url = server.client.post("/video", json=body).json()["data"][0]["url"]
    b64 = server.client.post("/video", json=body | {"response_format": "b64_json"}).json()["data"][0]["b64_json"]
    assert server.client.get(url).content == base64.b64decode(b64)
    assert len(frames(base64.b64decode(b64))) == 5
    picture = base64.b64encode(source(32, 16)).decode()
    started = {**body, "model": "from-picture", "start_image": picture}
    assert server.client.post("/video", json=started).status_code == 200


def test_clips_are_in_the_gallery(server: Server) -> None:
    """Whichever route drew them; and what is deleted there is no clip's content any more."""
    body = {"prompt": "a cat"} | SMALL | {"output_format": "gif"}
    url = server.client.post("/video", json=body).json()["data"][0]["url"]
    sync = server.client.post("/v1/videos/sync", json=body).headers["x-sfumato-file"]
    id = server.client.post("/v1/videos", json=body).json()["id"]
    name = ended(server, id)["file"]
    listed = {each["name"]: each for each in server.client.get("/v1/images/gallery?limit=100").json()["data"]}
    assert listed.keys() >= {url.rpartition("/")[2], sync, name}
    recipe = listed[name]["recipe"]
    assert (recipe["prompt"], recipe["num_frames"], recipe["fps"]) == ("a cat", 5, 8)
    with Image.open(io.BytesIO(server.client.get(f"/generated-images/{name}/thumbnail").content)) as image:
        assert (image.format, image.size) == ("WEBP", (16, 16))
    assert server.client.delete(f"/v1/images/gallery/{name}").status_code == 200
    assert "expired" in server.client.get(f"/v1/videos/{id}/content").text


def test_previews_of_the_first_frame_are_in_the_progress(server: Server) -> None:
    id = server.client.post("/v1/videos", json={"prompt": "a cat"} | LONG | {"partial_images": 3}).json()["id"]

    def preview() -> Any:
        (state,) = server.client.get(f"/v1/images/progress?preview=true&id={id}").json()["data"]
        return state["preview"]

    within(TIMEOUT_S, lambda: preview() is not None)
    with Image.open(io.BytesIO(base64.b64decode(preview()["b64_json"]))) as image:
        assert image.size == (16, 16)
    server.client.delete(f"/v1/videos/{id}")


def test_mp4_is_the_default(server: Server, client: openai.OpenAI) -> None:
    needs("mp4")
    made = create(client, output_format="")
    ended(server, made.id)
    content = client.videos.download_content(made.id)
    assert content.response.headers["content-type"] == "video/mp4"
    assert content.read()[4:8] == b"ftyp"


def test_the_model_list_says_what_it_makes(server: Server) -> None:
    told = {each["id"]: each for each in server.client.get("/v1/models").json()["data"]}
    assert told["film"]["sfumato"]["tasks"] == ["text-to-video", "video-to-video"]
    assert told["from-picture"]["sfumato"]["tasks"] == ["image-to-video"]
    assert told["film"]["architecture"]["output_modalities"] == ["video"]
    assert told["film"]["sfumato"]["formats"] == written_here("video")
    assert told["sfumato-tiny"]["sfumato"]["formats"] == ["png"]
    assert set(of_kind("video")) == {"mp4", "webm", "webp", "gif"}


def test_lists_of_picture_models_leave_it_out(server: Server) -> None:
    tags = {each["name"] for each in server.client.get("/api/tags").json()["models"]}
    titles = {each["title"] for each in server.client.get("/sdapi/v1/sd-models").json()}
    assert (tags, titles) == ({"sfumato-tiny:latest"}, {"sfumato-tiny"})
    shown = [server.client.post("/api/show", json={"model": name}).json() for name in ("film", "from-picture")]
    assert [each["capabilities"] for each in shown] == [["video"], ["video", "vision"]]
    refused = server.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "film"})
    assert (refused.status_code, "film makes clips (text-to-video, video-to-video)" in refused.text) == (400, True)


@pytest.mark.slow
def test_deleting_a_clip_ends_the_work_of_another_server(models: Path, tmp_path: Path) -> None:
    shared = ("--default-model", "film", "--database", f"sqlite:///{tmp_path / 'shared.db'}")
    body = {"prompt": "a cat"} | LONG | {"width": 256, "height": 256}
    with Server(models, tmp_path / "one", *shared) as one, Server(models, tmp_path / "two", *shared) as two:
        id = one.client.post("/v1/videos", json=body).json()["id"]
        within(TIMEOUT_S, lambda: one.client.get(f"/v1/videos/{id}").json()["status"] == "in_progress")
        assert two.client.delete(f"/v1/videos/{id}").json()["deleted"]
        assert one.client.get(f"/v1/images/progress/{id}").json()["status"] == "cancelled"
        assert one.client.get(f"/v1/videos/{id}").status_code == 404


@pytest.mark.slow
def test_a_clip_is_drawn_again_after_the_server_was_killed(models: Path, tmp_path: Path) -> None:
    """The same id, the same seed, the same file."""
    body = {"prompt": "a cat"} | SMALL | {"steps": 40}
    with Server(models, tmp_path, "--default-model", "film") as server:
        id = server.client.post("/v1/videos", json=body).json()["id"]
        within(TIMEOUT_S, lambda: server.client.get(f"/v1/videos/{id}").json()["progress"] > 10)
        server.signal(signal.SIGKILL)
        server.wait()
    with Server(models, tmp_path, "--default-model", "film") as server:
        video = ended(server, id)
        assert video["status"] == "completed", video
        content = server.client.get(f"/v1/videos/{id}/content").content
        same = server.client.post("/v1/videos/sync", json=body | {"seed": video["seed"]}).content
        assert content == same


def test_a_picture_is_drawn_while_a_clip_is(server: Server) -> None:
    with Held(server, {"prompt": "a cat"} | LONG, "/v1/videos/sync"):
        body = {"prompt": "a cup", "model": "sfumato-tiny", "steps": 2, "size": "64x64"}
        assert server.client.post("/v1/images/generations", json=body).status_code == 200

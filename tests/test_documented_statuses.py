"""Every status that OpenAPI promises of an operation is reached by a request; one that cannot be fails here.

That no other status is given is `test_schemathesis.py`'s.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import sqlite3
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image, PngImagePlugin

import sfumato
from sfumato.api.batches.store import MAX_OPEN
from support import tiny, upscalers
from support.answerable import within
from support.families_moving import FAMILIES, stable_audio
from support.held import Held
from support.inside import Inside
from support.serving import Server

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")

TINY = Path(sfumato.__file__).parent / "models" / "sfumato-tiny"
ENABLE = "  enable_parameters: image,num_inference_steps\n"
UPSCALER = f"diffusers:\n  pipeline_type: StableDiffusionUpscalePipeline\n{ENABLE}"
FILES = {
    "painter": f"parameters:\n  model: {TINY}\ndiffusers:\n{ENABLE}",
    "broken": "parameters:\n  modle: none\n",
    "offline": f"parameters:\n  model: someone/not-on-this-machine\ndiffusers:\n{ENABLE}",
    "enlarge": f"parameters:\n  model: enlarge\nstep: 2\n{UPSCALER}",
    "enlarge-long": f"parameters:\n  model: enlarge\nstep: 1000\n{UPSCALER}",
    "enlarge-broken": f"parameters:\n  model: nowhere\n{UPSCALER}",
    "huge": "parameters:\n  model: huge\n",
    "film": f"parameters:\n  model: film\ndiffusers:\n{ENABLE}",
    "film-broken": "parameters:\n  modle: none\n",
    "film-huge": "parameters:\n  model: film-huge\n",
    "film-offline": "parameters:\n  model: someone/not-on-this-machine\ndiffusers:\n  pipeline_type: WanPipeline\n",
    "noises": f"parameters:\n  model: noises\ndiffusers:\n{ENABLE}",
    "noises-huge": "parameters:\n  model: noises-huge\n",
    "enlarge-offline": f"parameters:\n  model: someone/not-on-this-machine\n{UPSCALER}",
}
VIDEOS, SYNC, VIDEO = "POST /v1/videos", "POST /v1/videos/sync", "POST /video"
RELOAD = "POST /sdapi/v1/reload-checkpoint"
HUGGING_FACE = "POST /models/{id}"
SOUNDS = ("POST /v1/audio/generate", "POST /v1/sound-generation")
UPLOAD, BATCHES = "POST /v1/files", "POST /v1/batches"
CANCEL = "POST /v1/batches/{id}/cancel"
KEY = {"authorization": "Bearer the-key"}
STORED = f"{uuid.UUID(int=7).hex}.png"


def picture(side: int, format: str = "PNG", **options: Any) -> str:
    file = io.BytesIO()
    Image.new("RGB", (side, side), "orange").save(file, format, **options)
    return base64.b64encode(file.getvalue()).decode()


PHOTO, SMALL = picture(64), picture(16)
LARGE = picture(480, "BMP")
"""Half a mebibyte and more."""
CHUNKS = PngImagePlugin.PngInfo()
CHUNKS.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64")
MADE = picture(64, pnginfo=CHUNKS)
OPENAI = {"prompt": "a cat", "size": "64x64", "steps": 2, "response_format": "url"}
A1111 = {"prompt": "a cat", "width": 64, "height": 64, "steps": 2, "save_images": True}
CLIP = {"prompt": "a cat", "model": "film", "size": "16x16", "num_frames": 1, "steps": 2, "output_format": "gif"}
BODIES: dict[str, dict[str, Any]] = {
    "POST /v1/images/generations": OPENAI,
    "POST /v1/images/edits": OPENAI | {"image": PHOTO},
    "POST /v1/chat/completions": OPENAI | {"messages": [{"role": "user", "content": "a cat"}]},
    "POST /v1/images/variations": {"image": PHOTO, "steps": 2},
    "POST /v1/images/inpainting": {"prompt": "a cat", "image": PHOTO, "mask": PHOTO, "steps": 2},
    "POST /v1/images/upscale": {"image": SMALL, "scale": 4, "model": "enlarge"},
    "POST /v1/audio/generate": {"input": "rain", "model": "noises", "seconds": 1, "steps": 2},
    "POST /v1/sound-generation": {"text": "rain", "model_id": "noises", "duration_seconds": 1, "steps": 2},
    "POST /sdapi/v1/txt2img": A1111,
    "POST /sdapi/v1/img2img": A1111 | {"init_images": [PHOTO]},
    "POST /sdapi/v1/extra-single-image": {"image": SMALL, "upscaling_resize": 4, "upscaler_1": "enlarge"},
    "POST /sdapi/v1/png-info": {"image": PHOTO},
    "POST /sdapi/v1/options": {"sd_model_checkpoint": "painter"},
    "POST /v1/models/load": {"model": "painter"},
    "POST /v1/models/unload": {"model": "painter"},
    "POST /v1/models/pin": {"model": "painter", "pinned": False},
    "POST /v1/images/recipe": {"image": MADE},
    "PATCH /v1/images/gallery/{name}": {"starred": True},
    "POST /api/generate": {"model": "painter", "prompt": "a cat", "width": 64, "steps": 2, "stream": False},
    "POST /api/show": {"model": "painter"},
    HUGGING_FACE: {"inputs": "a cat", "parameters": {"size": "64x64"}},
    VIDEOS: CLIP,
    SYNC: CLIP,
    VIDEO: CLIP,
    BATCHES: {"endpoint": "/v1/images/generations", "completion_window": "24h"},
}
"""A request of each operation that takes a body, for which the answer is 200."""

WRONG: dict[str, dict[str, Any]] = {
    **{label: {"num_frames": 2} for label in (VIDEOS, SYNC, VIDEO)},
    "POST /v1/images/upscale": {"scale": 3},
    **{route: {"response_format": "midi"} for route in SOUNDS},
    "POST /sdapi/v1/txt2img": {"steps": 0},
    "POST /sdapi/v1/img2img": {"steps": 0},
    "POST /sdapi/v1/extra-single-image": {"upscaling_resize": 3},
    "POST /sdapi/v1/png-info": {"image": "no picture"},
    "POST /sdapi/v1/options": {"sd_model_checkpoint": 5},
    "POST /v1/models/load": {"model": 5},
    "POST /v1/models/unload": {"model": 5},
    "POST /v1/models/pin": {"pinned": "perhaps"},
    "POST /v1/images/recipe": {"image": "no picture"},
    "POST /api/generate": {"steps": "many"},
    "POST /api/show": {"model": 5},
    UPLOAD: {"purpose": "assistants"},
}
"""What makes it a 400; of others `n: 0` does."""

ASKED_WRONGLY = {
    "GET /v1/images/gallery": "?limit=0",
    "GET /v1/jobs": "?limit=0",
    "GET /v1/files": "?limit=0",
    "GET /v1/batches": "?limit=0",
    "GET /v1/videos": "?limit=0",
    "GET /v1/videos/{id}/content": "?variant=thumbnail",
    "GET /v1/images/progress": "?preview=perhaps",
    "GET /v1/images/progress/{id}": "?preview=perhaps",
}
"""The same of what has no body."""

PATHS = {
    "/v1/models/{id}": "painter",
    "/models/{id}": "painter",
    "/generated-images/{name}": STORED,
    "/generated-images/{name}/thumbnail": f"{STORED}/thumbnail",
    "/v1/images/progress/{id}": "known",
    "/v1/images/gallery/{name}": STORED,
}
JOBS = "/v1/jobs"
ASYNC = {"prefer": "respond-async"}
"""Values of path parameters for which the answer is 200."""


class Servers:
    """Of the module: `plain`, where one picture is drawn and one waits, and `strict`, with a key and a clock."""

    def __init__(self, folder: Path, plain: Server, strict: Server) -> None:
        self.folder, self.plain, self.strict = folder, plain, strict


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("statuses")
    models, pictures = folder / "models", folder / "data" / "generated-images"
    models.mkdir()
    pictures.mkdir(parents=True)
    (pictures / STORED).write_bytes(base64.b64decode(PHOTO))
    tiny.save(upscalers.four_times(), models / "enlarge")
    FAMILIES["Wan"].build().save_pretrained(models / "film")
    stable_audio().save_pretrained(models / "noises")
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    copies = (("huge", TINY, "unet"), ("film-huge", models / "film", "transformer"),
              ("noises-huge", models / "noises", "transformer"))  # fmt: skip
    for name, origin, part in copies:
        shutil.copytree(origin, models / name)
        weights = next((models / name / part).glob("*.safetensors"))
        weights.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(weights, 8 + len(header) + 2**40)  # a hole, which takes no room on the disk
    for name, text in FILES.items():
        (models / f"{name}.yaml").write_text(f"name: {name}\n{text}")
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(folder / "hf")}  # nobody listens there
    flags = ("--default-model", "painter", "--loaded-models", "10")
    plain = Server(
        models, folder / "data", *flags, "--max-active", "1", "--max-queue", "1", "--max-waiting-mb", "1", env=env
    )
    strict_flags = ("--api-keys", "someone:the-key", "--max-body-mb", "1", "--time-limit-s", "1")
    strict = Server(models, folder / "strict", *flags, *strict_flags, env=env)
    with plain, strict:
        job = send(plain, "POST /v1/images/generations", headers=ASYNC).json()["id"]
        PATHS.update({f"{JOBS}/{{id}}": job, f"{JOBS}/{{id}}/events": f"{job}/events"})
        within(300, lambda: plain.client.get(f"{JOBS}/{job}").json()["ended"] is not None)
        clip = send(plain, VIDEOS).json()["id"]
        within(300, lambda: plain.client.get(f"/v1/videos/{clip}").json()["status"] == "completed")
        PATHS.update({"/v1/videos/{id}": clip, "/v1/videos/{id}/content": f"{clip}/content"})
        file = send(plain, UPLOAD).json()["id"]
        BODIES[BATCHES]["input_file_id"] = file
        batch = send(plain, BATCHES).json()["id"]
        PATHS.update({"/v1/files/{id}": file, "/v1/files/{id}/content": f"{file}/content"})
        PATHS.update({"/v1/batches/{id}": batch, "/v1/batches/{id}/cancel": f"{batch}/cancel"})
        within(300, lambda: plain.client.get(f"/v1/batches/{batch}").json()["status"] == "completed")
        yield Servers(folder, plain, strict)


def send(server: Server, label: str, *, headers: dict[str, str] | None = None, **changes: Any) -> httpx.Response:
    path = path_of(label)
    if label == HUGGING_FACE and "model" in changes:
        path = f"/models/{changes.pop('model')}"
    if label == UPLOAD:
        line = {"custom_id": "a", "method": "POST", "url": "/v1/images/generations", "body": OPENAI}
        files = {"file": ("a.jsonl", json.dumps(line).encode())}
        return server.client.post(path, files=files, data={"purpose": "batch"} | changes, headers=headers)
    body = BODIES.get(label)
    sent = None if body is None else body | changes
    return server.client.request(label.split()[0], path, json=sent, headers=headers)


def path_of(label: str) -> str:
    path = label.split()[1]
    return f"{path.partition('{')[0]}{PATHS[path]}" if path in PATHS else path


def of_model(label: str, name: str) -> dict[str, Any]:
    """How a body of that operation says its model."""
    if label == "POST /v1/images/upscale":
        return {"model": name if name == "no-such" else f"enlarge-{name}"}
    if label in (VIDEOS, SYNC, VIDEO):
        return {"model": name if name == "no-such" else f"film-{name}"}
    if label == "POST /sdapi/v1/extra-single-image":
        return {"upscaler_1": f"enlarge-{name}"}
    if label == "POST /sdapi/v1/options":
        return {"sd_model_checkpoint": name}
    if label.startswith("POST /sdapi/"):
        return {"override_settings": {"sd_model_checkpoint": name}}
    return {"model": name}


def in_the_queue(server: Server, label: str, **changes: Any) -> Held:
    return Held(server, BODIES[label] | changes, path_of(label))


@contextmanager
def held(server: Server, pictures: int, **more: Any) -> Iterator[None]:
    """So many pictures are drawn or wait their turn."""
    with ExitStack() as stack:
        for _ in range(pictures):
            stack.enter_context(in_the_queue(server, "POST /v1/images/generations", steps=1000, **more))
        yield


def known(servers: Servers, label: str) -> httpx.Response:
    if "progress/{id}" in label:
        send(servers.plain, "POST /v1/images/generations", headers={"x-request-id": "known"})
    if label == "DELETE /v1/images/gallery/{name}":
        url = send(servers.plain, "POST /v1/images/generations").json()["data"][0]["url"]
        return servers.plain.client.delete(f"/v1/images/gallery/{url.rsplit('/', 1)[1]}")
    if label == "DELETE /v1/videos/{id}":
        return servers.plain.client.delete(f"/v1/videos/{send(servers.plain, VIDEOS).json()['id']}")
    if label == "DELETE /v1/files/{id}":
        return servers.plain.client.delete(f"/v1/files/{send(servers.plain, UPLOAD).json()['id']}")
    if label == CANCEL:
        with held(servers.plain, 1):
            return cancelled_batch(servers, send(servers.plain, BATCHES))
    return send(servers.plain, label)


def cancelled_batch(servers: Servers, begun: httpx.Response) -> httpx.Response:
    return servers.plain.client.post(f"/v1/batches/{begun.json()['id']}/cancel")


def reloaded(servers: Servers, name: str) -> httpx.Response:
    """What AUTOMATIC1111's route says of the model that its caller has selected."""
    file, choose = servers.folder / "models" / "selected.yaml", "POST /sdapi/v1/options"
    file.write_text(f"name: selected\n{FILES['painter']}")
    try:
        send(servers.plain, choose, sd_model_checkpoint="selected")
        file.write_text(f"name: selected\n{FILES[name]}") if name else file.unlink()
        return send(servers.plain, RELOAD)
    finally:
        file.unlink(missing_ok=True)
        send(servers.plain, choose)


def without_a_key(servers: Servers, label: str) -> httpx.Response:
    return send(servers.strict, label)


def wrong(servers: Servers, label: str) -> httpx.Response:
    if label == "GET /sdapi/v1/progress":
        return servers.plain.client.get("/sdapi/v1/progress?skip_current_image=perhaps")
    if label in ASKED_WRONGLY:
        if "/content" in label:
            return servers.plain.client.get(path_of(label) + ASKED_WRONGLY[label])
        return servers.plain.client.get(label.split()[1].format(id="known") + ASKED_WRONGLY[label])
    return send(servers.plain, label, **WRONG.get(label, {"n": 0}))


def missing(servers: Servers, label: str) -> httpx.Response:
    if label == RELOAD:
        return reloaded(servers, "")
    if label in BODIES and "{" not in label:
        return send(servers.plain, label, **of_model(label, "no-such"))
    if label == "GET /sdapi/v1/options":
        return options_after(servers, Path.unlink)
    method, path = label.split()
    return servers.plain.client.request(method, re.sub("{.*?}", "no-such", path), json=BODIES.get(label))


def too_large(servers: Servers, label: str) -> httpx.Response:
    return send(servers.strict, label, headers=KEY, padding="x" * 2**20)


def of_another_page(servers: Servers, label: str) -> httpx.Response:
    return send(servers.plain, label, headers={"origin": "https://elsewhere.example"})


def of_another_kind(servers: Servers, label: str) -> httpx.Response:
    return send(servers.plain, label, headers={"content-type": "text/csv"})


def a_part(servers: Servers, label: str) -> httpx.Response:
    return send(servers.plain, label, headers={"range": "bytes=0-9"})


def no_such_part(servers: Servers, label: str) -> httpx.Response:
    return send(servers.plain, label, headers={"range": "bytes=1000000-"})


def unchanged(servers: Servers, label: str) -> httpx.Response:
    return send(servers.plain, label, headers={"if-none-match": "*"})


def full(servers: Servers, label: str) -> httpx.Response:
    if label == BATCHES:
        with held(servers.plain, 1):
            begun = [send(servers.plain, label) for _ in range(MAX_OPEN + 1)]
            for each in begun:
                if each.status_code == 200:
                    cancelled_batch(servers, each)
            return begun[-1]
    if label in (
        "POST /sdapi/v1/png-info",
        "POST /v1/images/recipe",
    ):  # nothing is drawn: it is the bytes of pictures that are too many
        # One is drawn, and the other holds its source while it waits.
        with held(servers.plain, 1), held(servers.plain, 1, image=LARGE):
            return send(servers.plain, label, image=LARGE)
    with held(servers.plain, 2):
        return send(servers.plain, label)


def cancelled(servers: Servers, label: str) -> httpx.Response:
    with held(servers.plain, 1), in_the_queue(servers.plain, label) as request:
        return request.cancel()


def broken(servers: Servers, label: str) -> httpx.Response:
    if label == RELOAD:
        return reloaded(servers, "broken")
    if label == "GET /sdapi/v1/options":
        return options_after(servers, lambda file: file.write_text("name: painter\n" + FILES["broken"]))
    if label == "GET /v1/models/{id}":
        return servers.plain.client.get("/v1/models/broken")
    return send(servers.plain, label, **of_model(label, "broken"))


def accepted(servers: Servers, label: str) -> httpx.Response:
    return send(servers.plain, label, headers=ASYNC)


def told_already(servers: Servers, label: str) -> httpx.Response:
    return send(servers.plain, label, headers={"last-event-id": "end"})


def with_a_used_key(servers: Servers, label: str) -> httpx.Response:
    key = {"idempotency-key": label.encode().hex()}
    send(servers.plain, label, headers=key)
    return send(servers.plain, label, headers=key, seed=7)


def offline(servers: Servers, label: str) -> httpx.Response:
    for name, table in (("jobs", "jobs"), ("files", "files"), ("batches", "batches"), ("videos", "jobs")):
        if f"/v1/{name}" in label and label != SYNC:
            return without_its_table(servers, label, table)
    if label == RELOAD:
        return reloaded(servers, "offline")
    return send(servers.plain, label, **of_model(label, "offline"))


def too_slow(servers: Servers, label: str) -> httpx.Response:
    slow = {"steps": 1000} | (of_model(label, "long") if "enlarge" in str(BODIES[label]) else {})
    return send(servers.strict, label, headers=KEY, **slow)


def unwritable(servers: Servers, label: str) -> httpx.Response:
    if label == RELOAD:  # there it is the memory that is too small
        return reloaded(servers, "huge")
    if label == SYNC:
        return send(servers.plain, label, model="film-huge")
    if label in ("POST /api/generate", HUGGING_FACE):  # its pictures are in the answer
        return send(servers.plain, label, model="huge")
    if label in SOUNDS:
        return send(servers.plain, label, model="noises-huge")
    if label == "GET /v1/images/gallery":
        return without_its_table(servers, label, "gallery")
    folder = servers.folder / "data" / "generated-images"
    aside = folder.rename(folder.with_name("aside"))
    folder.write_text("not a folder")
    try:
        return send(servers.plain, label)
    finally:
        folder.unlink()
        aside.rename(folder)


def without_its_table(servers: Servers, label: str, name: str) -> httpx.Response:
    table = {"gallery": "pictures"}.get(name, name)
    file = name if name == "gallery" else "jobs"
    with sqlite3.connect(servers.folder / "data" / f"{file}.db") as database:
        database.execute(f"ALTER TABLE {table} RENAME TO aside")
        database.commit()
        try:
            return send(servers.plain, label)
        finally:
            database.execute(f"ALTER TABLE aside RENAME TO {table}")


def options_after(servers: Servers, change: Callable[[Path], object]) -> httpx.Response:
    """What GET options says, to who never chose a model, after something happened to the default model's file."""
    file = servers.folder / "models" / "painter.yaml"
    text = file.read_text()
    change(file)
    try:
        return send(servers.strict, "GET /sdapi/v1/options", headers=KEY)
    finally:
        file.write_text(text)


REACHED_BY: dict[str, Callable[[Servers, str], httpx.Response]] = {
    "200": known,
    "202": accepted,
    "204": told_already,
    "206": a_part,
    "304": unchanged,
    "400": wrong,
    "401": without_a_key,
    "403": of_another_page,
    "404": missing,
    "413": too_large,
    "415": of_another_kind,
    "416": no_such_part,
    "422": with_a_used_key,
    "429": full,
    "499": cancelled,
    "500": broken,
    "503": offline,
    "504": too_slow,
    "507": unwritable,
}


def promised() -> list[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        paths = Inside(Path(folder)).app.openapi()["paths"]
    return [
        (f"{method.upper()} {path}", status)
        for path, methods in paths.items()
        for method, operation in methods.items()
        for status in operation["responses"]
        if (path, status) != ("/readyz", "503")  # test_operations.py and test_faults.py have that one
    ]


@pytest.mark.parametrize(("label", "status"), promised())
def test_what_is_promised_can_happen(servers: Servers, label: str, status: str) -> None:
    assert status in REACHED_BY, "no request is known that has this answer"
    answer = REACHED_BY[status](servers, label)
    assert answer.status_code == int(status), answer.text[:500]
    if int(status) >= 400:
        error = answer.json()["error"]
        if "/api/" in label or label == HUGGING_FACE:
            assert error
            assert isinstance(error, str)
            assert set(answer.json()) == {"error"}
        else:
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]
        assert answer.headers["x-request-id"]

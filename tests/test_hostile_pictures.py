"""Pictures that take long, are large or lie: the server stays answerable, and has everything back afterwards."""

from __future__ import annotations

import base64
import http.client
import io
import json
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from PIL import Image

from support.answerable import answerable, descriptors, memory_mb, threads, within
from support.answers import error_of
from support.held import Held
from support.hostile import many_scans
from support.quick import FOR_EVER, NOISE, Server

DRAW = {"prompt": "a cat", "size": "64x64", "steps": 2, "response_format": "b64_json"}
LIMITS = ("--decode-s", "1", "--decoders", "2", "--max-waiting-mb", "2", "--max-active", "2", "--max-queue", "8")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "models").mkdir()
    with Server(folder / "models", folder / "data", *LIMITS) as server:
        assert server.draw(**DRAW, image=server.png_data_uri()).status_code == 200
        # As many decoders as there may be.
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: server.draw(**DRAW, image=server.png_data_uri()), range(4)))
        yield server


@pytest.fixture
def given_back(server: Server) -> Iterator[None]:
    """Memory, threads and descriptors of the process that answers are back afterwards."""
    before = threads(server.pid), descriptors(server.pid), memory_mb(server.pid)
    yield
    within(120, lambda: threads(server.pid) <= before[0] + 2)
    within(120, lambda: descriptors(server.pid) <= before[1] + 4)
    within(120, lambda: memory_mb(server.pid) <= before[2] + 60)


def decoders(server: Server) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(server.pid).children():
        try:
            if "sfumato.pictures.decoder_process" in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


# Decoding.

SCANS = text(many_scans())


@pytest.mark.usefixtures("given_back")
def test_a_picture_that_takes_too_long_is_refused(server: Server) -> None:
    with answerable(server.url, server.pid), ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: server.draw(**DRAW, image=SCANS), range(6)))
    for answer in answers:
        error = error_of(answer, 400)
        assert (error["code"], error["param"]) == ("invalid_image", "image")
        assert "1 s" in error["message"]
        assert "decode_s" in error["message"]
    assert server.draw(**DRAW, image=server.png_data_uri()).status_code == 200


def test_so_is_one_whose_text_is_asked_for(server: Server) -> None:
    """Its pixels are not decoded: it is answered."""
    answer = server.client.post("/sdapi/v1/png-info", json={"image": SCANS})
    assert answer.json() == {"info": "", "items": {}, "parameters": {}} | {"items": answer.json()["items"]}


@pytest.mark.parametrize("route", ["/v1/images/generations", "/sdapi/v1/img2img"])
@pytest.mark.usefixtures("given_back")
def test_decoding_ends_with_its_client(tmp_path_factory: pytest.TempPathFactory, server: Server, route: str) -> None:
    """With nobody left to wait, no decoder goes on: other limits would let these go on for minutes."""
    folder = tmp_path_factory.mktemp("patient")
    (folder / "models").mkdir()
    body = {"prompt": "a cat", "size": "64x64", "width": 64, "height": 64, "image": SCANS, "init_images": [SCANS]}
    with Server(folder / "models", folder / "data", "--decode-s", "600") as patient:
        clients = [http.client.HTTPConnection(urlsplit(patient.url).netloc) for _ in range(3)]
        for client in clients:
            client.request("POST", route, json.dumps(body), {"content-type": "application/json"})
        within(120, lambda: bool(busy(patient)))
        working = busy(patient)
        for client in clients:
            client.close()
        within(60, lambda: not any(process.is_running() for process in working))
        within(60, lambda: not busy(patient))
        assert patient.draw(**DRAW, image=patient.png_data_uri()).status_code == 200


def busy(server: Server) -> list[psutil.Process]:
    """Decoders that have worked for a second at least: longer than it takes to start one."""
    found = []
    for process in decoders(server):
        try:
            if process.cpu_times().user > 1:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.usefixtures("given_back")
def test_a_decoder_that_is_killed_is_replaced(server: Server) -> None:
    for process in decoders(server):
        process.send_signal(signal.SIGKILL)
    assert server.draw(**DRAW, image=server.png_data_uri()).status_code == 200


def test_large_pictures_leave_nothing_behind(tmp_path: Path) -> None:
    """Of 36 megapixels: the process that answers never holds their pixels, and that which decodes gives them back."""
    file = io.BytesIO()
    Image.new("RGB", (6000, 6000), "orange").save(file, "JPEG")
    picture = text(file.getvalue())
    (tmp_path / "models").mkdir()
    with Server(tmp_path / "models", tmp_path / "data", "--decode-s", "60") as server:
        assert server.draw(**DRAW, image=server.png_data_uri()).status_code == 200
        before, peak = memory_mb(server.pid), 0.0
        with answerable(server.url, server.pid), ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(server.draw, **DRAW, image=picture) for _ in range(4)]
            while not all(answer.done() for answer in answers):
                peak = max(peak, memory_mb(server.pid))
        assert [answer.result().status_code for answer in answers] == [200] * 4
        assert peak < before + 100  # one of them has 108 MB of pixels
        within(120, lambda: all(process.memory_info().rss < 120 * 2**20 for process in decoders(server)))


# The line.


def held(server: Server, **more: Any) -> Held:
    return Held(server, DRAW | {"steps": FOR_EVER} | more)


def photo(kilobytes: int) -> str:
    """A BMP, which is as large as it says."""
    file = io.BytesIO()
    Image.new("RGB", (512, kilobytes * 1024 // (512 * 3))).save(file, "BMP")
    return text(file.getvalue())


@pytest.mark.usefixtures("given_back")
def test_bytes_that_wait_are_bounded(server: Server) -> None:
    with answerable(server.url, server.pid):
        with held(server, n=2), held(server, image=photo(300)):
            # The one that waits has 0.3 of the 2 MiB.
            assert error_of(server.draw(**DRAW, image=photo(2800)), 413)["code"] == "request_too_large"
            refused = server.draw(**DRAW, image=photo(1990))
            error = error_of(refused, 429)
            assert "max_waiting_mb" in error["message"]
            assert 0 < int(refused.headers["retry-after"]) <= 120
            with held(server, image=photo(300)) as fits:
                assert fits.cancel().status_code == 499
        assert server.draw(**DRAW, image=photo(1750)).status_code == 200  # it is let in again


@pytest.mark.usefixtures("given_back")
def test_what_waits_is_not_decoded(server: Server) -> None:
    """Neither in this process nor in another, until its turn comes."""
    with held(server, n=2):
        used = {process.pid: process.cpu_times().user for process in decoders(server)}
        with held(server, image=SCANS) as waits:
            assert waits.progress()["status"] == "queued"
            # Its header was read: a text is refused at once, without waiting.
            assert error_of(server.draw(**DRAW, image=text(b"a text" * 50)), 400)["param"] == "image"
            assert waits.cancel().status_code == 499
        assert all(process.cpu_times().user - used.get(process.pid, 0) < 0.9 for process in decoders(server))


# Shapes.


def png(width: int, height: int) -> str:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return text(file.getvalue())


@pytest.mark.parametrize("size", ["8x4000000", "4104x1000", "4096x8", "2056x2048", "99999999x1"])
@pytest.mark.usefixtures("given_back")
def test_sizes_that_are_asked_for_are_bounded(server: Server, size: str) -> None:
    error = error_of(server.draw(**DRAW | {"size": size}), 400)
    assert error["param"] == "size"
    assert size in error["message"]
    assert "max_" in error["message"]
    width, height = map(int, size.split("x"))
    for body in ({"width": width, "height": height}, {"width": height, "height": width}):
        answer = server.client.post("/sdapi/v1/txt2img", json={"prompt": "a cat", **body})
        assert error_of(answer, 400)["param"] in ("width", "height")


@pytest.mark.parametrize("size", [(8, 400_000), (400_000, 8), (8, 72), (4104, 1024), (2056, 2048)])
@pytest.mark.parametrize("route", ["generations", "edits", "variations", "inpainting", "mask", "img2img"])
@pytest.mark.usefixtures("given_back")
def test_sizes_of_source_pictures_are_bounded(server: Server, route: str, size: tuple[int, int]) -> None:
    picture = png(*size)
    body: dict[str, Any] = {"prompt": "a cat", "image": picture}
    url, param = f"/v1/images/{route}", "image"
    if route == "inpainting":
        body["mask"] = picture
    if route == "mask":
        url = "/v1/images/edits"
        body |= {"image": server.png_data_uri(), "mask": picture}
        param = "mask"
    if route == "img2img":
        url, param = "/sdapi/v1/img2img", "init_images[0]"
        body = {"init_images": [picture]}
    error = error_of(server.client.post(url, json=body), 400)
    assert error["param"] == param
    if route != "mask" or max(size) > 8 * min(size):
        assert f"{size[0]}x{size[1]}" in error["message"]
        assert "max_" in error["message"]


# The id.


class Dripping:
    """A request to draw whose body comes in two pieces; the connection is ours."""

    def __init__(self, server: Server, id: str, path: str = "/v1/images/generations") -> None:
        host, _, port = server.url.removeprefix("http://").partition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=30)
        self.body = b'{"prompt": "a cat", "size": "64x64", "width": 64, "height": 64, "steps": 2}'
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nx-request-id: {id}\r\ncontent-type: application/json\r\n"
        self.socket.sendall(head.encode() + f"content-length: {len(self.body)}\r\n\r\n".encode() + self.body[:10])

    def rest(self) -> None:
        self.socket.sendall(self.body[10:])

    def status(self) -> int:
        return int(self.socket.recv(65536).split()[1])


@pytest.mark.parametrize(
    "path", ["/v1/images/generations", "/images/generations", "/sdapi/v1/txt2img", "/v1/images/upscale"]
)
@pytest.mark.usefixtures("given_back")
def test_a_request_is_cancelled_before_its_body_is_there(server: Server, path: str) -> None:
    id = f"early{path.replace('/', '-')}"
    request = Dripping(server, id, path)
    where = f"/v1/images/progress/{id}"
    with closing(request.socket):
        within(60, lambda: server.client.get(where).status_code == 200)
        seen = server.client.get(where).json()
        assert (seen["status"], seen["model"], seen["pictures"]) == ("queued", "", 0)
        assert server.client.delete(where).json()["status"] == "cancelled"
        assert request.status() == 499
    assert server.client.get(where).json()["status"] == "cancelled"
    assert server.draw(**DRAW).status_code == 200


def test_one_that_is_not_cancelled_is_drawn(server: Server) -> None:
    request = Dripping(server, "late")
    with closing(request.socket):
        within(60, lambda: server.client.get("/v1/images/progress/late").status_code == 200)
        request.rest()
        assert request.status() == 200
    assert server.client.get("/v1/images/progress/late").json()["status"] == "completed"


def test_one_that_hangs_up_is_forgotten(server: Server) -> None:
    request = Dripping(server, "gone")
    within(60, lambda: server.client.get("/v1/images/progress/gone").status_code == 200)
    request.socket.close()
    within(60, lambda: server.client.get("/v1/images/progress/gone").status_code == 404)


# Disks.


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux lets us limit another process")
@pytest.mark.parametrize("folder", ["full", "missing"])
def test_a_form_needs_no_temporary_folder(tmp_path: Path, folder: str) -> None:
    """Large files of a form neither: nothing of a request is on the disk before it is drawn."""
    (tmp_path / "models").mkdir()
    place = tmp_path / folder
    place.mkdir()
    with Server(tmp_path / "models", tmp_path / "data", "--max-body-mb", "8", env={"TMPDIR": str(place)}) as server:
        files = {"image": ("a.bmp", base64.b64decode(photo(3000)), "image/bmp")}
        data = {"prompt": "a cat", "size": "64x64", "steps": "2"}
        if folder == "full":
            full(server, 2**20)
        else:
            place.rmdir()
        assert server.client.post("/v1/images/edits", data=data, files=files).status_code == 200


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux lets us limit another process")
@pytest.mark.parametrize("route", ["generations", "txt2img"])
def test_a_request_that_fails_while_its_pictures_are_stored_leaves_none(server: Server, route: str) -> None:
    """The first two fit on the disk, the third does not."""
    kept = server.data / "generated-images"
    before = set(kept.iterdir()) if kept.exists() else set()
    body: dict[str, Any] = {"prompt": ["a cat", "a dog", NOISE], "response_format": "url"}
    url = "/v1/images/generations"
    if route == "txt2img":  # it draws one prompt, so there all of them are too large
        body, url = {"prompt": NOISE, "batch_size": 3, "save_images": True}, "/sdapi/v1/txt2img"
    undo = full(server, 100_000)
    try:
        error = error_of(server.client.post(url, json=body), 507)
    finally:
        undo()
    assert error["code"] == "storage_failed"
    assert (set(kept.iterdir()) if kept.exists() else set()) == before
    answer = server.client.post(url, json=body)
    assert answer.status_code == 200
    assert len(set(kept.iterdir()) - before) == 3


def full(server: Server, most: int) -> Callable[[], object]:
    """No file may have more bytes; call what is returned to end that."""
    _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (most, hard))
    return lambda: resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (hard, hard))

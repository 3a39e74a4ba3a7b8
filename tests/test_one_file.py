"""Processes that want one file at once, die in the middle, and find what others left; against the hub on localhost."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from sfumato.checkpoints import weight_file
from sfumato.errors import DownloadError
from support import tiny
from support.hub import Hub
from support.serving import Server

REPO = "acme/one"
NAME = "model.safetensors"
SIZE = 6_000_000
CONTENT, OTHER = (bytes([value]) * SIZE for value in (1, 2))

FETCH = """
import sys
from pathlib import Path
from sfumato.checkpoints import weight_file
def report(fraction, what):
    print("waits" if "another process" in what else "fetches", flush=True)
weight_file.fetch(sys.argv[1], Path(sys.argv[2]), sha256=None, report=report)
print("done", flush=True)
"""


class Shop(NamedTuple):
    """A hub with one file, and where it is to be."""

    hub: Hub
    url: str
    source: Path
    target: Path

    def offer(self, content: bytes) -> None:
        self.source.write_bytes(content)
        self.hub.add(REPO, self.source.parent)

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", FETCH, self.url, str(self.target)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def fetch(self, sha256: str | None = None) -> bytes:
        return weight_file.fetch(self.url, self.target, sha256=sha256, report=lambda *_: None).read_bytes()

    def ranges(self) -> list[str | None]:
        return [request.range for request in self.hub.requests if request.method == "GET"]

    def part(self) -> Path:
        return self.target.with_name(f".{NAME}.part")


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    folder = tmp_path / "repository"
    folder.mkdir()
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        url = f"{hub.url}/{REPO}/resolve/main/{NAME}"
        shop = Shop(hub, url, folder / NAME, tmp_path / "models" / NAME)
        shop.offer(CONTENT)
        yield shop


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout
    for line in process.stdout:
        if line.strip() == word:
            return
    assert process.stderr
    raise AssertionError(f"never {word!r}: {process.stderr.read()}")


def end(process: subprocess.Popen[str]) -> None:
    with process:
        wait_for(process, "done")


def begun(shop: Shop) -> subprocess.Popen[str]:
    """A process that stands in the middle of the file, half of which the hub has sent."""
    shop.hub.hold(REPO)
    process = shop.start()
    shop.hub.wait_held(REPO)
    wait_for(process, "fetches")
    return process


def kill(process: subprocess.Popen[str]) -> None:
    with process:
        process.send_signal(signal.SIGKILL)


def test_of_two_processes_one_fetches_and_both_have_it(shop: Shop) -> None:
    first = begun(shop)
    second = shop.start()
    wait_for(second, "waits")
    assert not shop.target.exists()
    shop.hub.release(REPO)
    end(first)
    end(second)
    assert shop.target.read_bytes() == CONTENT
    assert shop.hub.downloads(REPO) == {NAME: 1}
    assert {path.name for path in shop.target.parent.iterdir()} == {NAME, f".{NAME}.source"}


def test_many_processes_at_once(shop: Shop) -> None:
    for process in [shop.start() for _ in range(6)]:
        end(process)
    assert shop.target.read_bytes() == CONTENT
    assert shop.hub.downloads(REPO) == {NAME: 1}


def test_who_waits_takes_over_from_one_that_is_killed_and_goes_on_where_it_was(shop: Shop) -> None:
    first = begun(shop)
    second = shop.start()
    wait_for(second, "waits")
    kill(first)
    had = shop.part().stat().st_size
    assert had > 0
    shop.hub.release(REPO)
    end(second)
    assert shop.target.read_bytes() == CONTENT
    assert shop.ranges() == [None, f"bytes={had}-"]


def test_a_download_that_was_killed_is_gone_on_with(shop: Shop) -> None:
    kill(begun(shop))
    had = shop.part().stat().st_size
    assert 0 < had < SIZE
    shop.hub.release(REPO)
    assert shop.fetch() == CONTENT
    assert shop.ranges() == [None, f"bytes={had}-"]


def test_what_has_changed_meanwhile_is_fetched_from_the_start(shop: Shop) -> None:
    kill(begun(shop))
    shop.hub.release(REPO)
    shop.offer(OTHER)
    assert shop.fetch() == OTHER


def test_a_part_of_nobody_knows_what_is_not_gone_on_with(shop: Shop) -> None:
    shop.target.parent.mkdir()
    for name in (f"{NAME}.part", f".{NAME}.part"):
        (shop.target.parent / name).write_bytes(OTHER[:1000])
    assert shop.fetch() == CONTENT
    assert shop.ranges() == [None]


def test_a_part_with_a_hole_is_found_out_and_fetched_from_the_start(shop: Shop) -> None:
    kill(begun(shop))
    shop.hub.release(REPO)
    with shop.part().open("r+b") as part:
        part.write(bytes(1000))
    assert shop.fetch() == CONTENT
    assert len(shop.ranges()) == 3


def test_a_part_that_is_too_long_is_fetched_from_the_start(shop: Shop) -> None:
    kill(begun(shop))
    shop.hub.release(REPO)
    shop.part().write_bytes(CONTENT + b"more")
    assert shop.fetch() == CONTENT


def test_a_file_that_does_not_have_the_hubs_checksum_is_refused(shop: Shop) -> None:
    """The hub promises one content, and sends another of the same length."""
    shop.source.write_bytes(OTHER)
    with pytest.raises(DownloadError, match="sha256"):
        shop.fetch()
    assert not list(shop.target.parent.iterdir())


def test_a_file_that_is_there_is_checked_once(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    right = weight_file._sha256_of(shop.source)
    shop.target.parent.mkdir()
    shop.target.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(DownloadError, match="Remove it"):
        shop.fetch(sha256=right)
    shop.target.write_bytes(CONTENT)
    assert shop.fetch(sha256=right.upper()) == CONTENT
    monkeypatch.setattr(weight_file, "_sha256_of", None)
    assert shop.fetch(sha256=right) == CONTENT
    assert shop.ranges() == []


def test_two_urls_have_two_places(shop: Shop, tmp_path: Path) -> None:
    other = shop.url.replace("/one/", "/two/")
    places = {weight_file.path_for(url, tmp_path) for url in (shop.url, other, f"{other}?version=2")}
    assert len(places) == 3
    assert all(place.suffix == ".safetensors" and place.name.startswith("model-") for place in places)
    assert weight_file.path_for(f"{other}?token=secret", tmp_path) == weight_file.path_for(other, tmp_path)
    (tmp_path / NAME).write_bytes(b"put there by hand")
    assert weight_file.path_for(shop.url, tmp_path) == tmp_path / NAME


def test_two_urls_cannot_have_one_name(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.fetch()
    with pytest.raises(DownloadError, match="another URL"):
        weight_file.fetch(shop.url.replace("/one/", "/two/"), shop.target, sha256=None, report=lambda *_: None)
    mirror = shop.url.replace(shop.hub.url, "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert weight_file.fetch(mirror, shop.target, sha256=None, report=lambda *_: None) == shop.target


def test_what_a_url_carries_is_neither_told_nor_kept(shop: Shop) -> None:
    secret = shop.url.replace("http://", "http://user:SECRET@") + "?token=SECRET"
    shop.hub.fail(REPO, NAME, 500)
    with pytest.raises(DownloadError) as raised:
        weight_file.fetch(secret, shop.target, sha256=None, report=lambda *_: None)
    assert "SECRET" not in raised.value.message
    weight_file.fetch(secret, shop.target, sha256=None, report=lambda *_: None)
    assert "SECRET" not in json.dumps([path.read_text("latin1") for path in shop.target.parent.iterdir()])


def test_a_disk_without_room_is_told_before_anything_is_written(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**7, 10**7, 10**6))
    with pytest.raises(DownloadError, match=r"6 MB are needed but .* has 1 MB free"):
        shop.fetch()
    assert not list(shop.target.parent.iterdir())


def test_a_disk_that_is_full_is_told_and_given_back(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DownloadError, match="is full"):
            shop.fetch()
    assert not shop.part().exists()
    assert shop.fetch() == CONTENT


def test_a_folder_that_cannot_be_written_is_told(shop: Shop) -> None:
    shop.target.parent.write_text("a file, where the folder should be")
    with pytest.raises(DownloadError, match="Let the server write to"):
        shop.fetch()


@pytest.mark.slow
def test_a_server_and_a_pull_beside_it_draw_the_same(repositories: dict[str, Path], tmp_path: Path) -> None:
    """Two files of one name, fetched into one folder by two processes at once."""
    configs = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    models = tmp_path / "models"
    models.mkdir()
    with Hub() as hub:
        hub.add(configs, repositories[configs])
        for seed, name in enumerate(("one", "two")):
            (tmp_path / name).mkdir()
            tiny.single_file(tiny.stable_diffusion(seed=seed), tmp_path / name / NAME)
            hub.add(f"acme/{name}", tmp_path / name)
            (models / f"{name}.yaml").write_text(
                f"name: {name}\nparameters:\n  model: huggingface://acme/{name}/{NAME}\ndtype: fp32\nstep: 2\n"
                "size: 64x64\n"
            )
            hub.hold(f"acme/{name}")
        environment = hub.environment(tmp_path / "home")
        with Server(models, tmp_path / "data", env=environment) as server:
            pull = [sys.executable, "-m", "sfumato.cli", "pull", "one", "--models", str(models)]
            with subprocess.Popen(pull, env=environment) as beside:
                hub.wait_held("acme/one")
                # Also of the server's own: whoever comes second waits for the first.
                hub.release("acme/one")
                hub.release("acme/two")
                drawn = [server.draw(model=name, prompt="a cat", seed=1) for name in ("one", "two", "one")]
                assert beside.wait() == 0
            assert [answer.status_code for answer in drawn] == [200] * 3, server.log
            pictures = [server.client.get(answer.json()["data"][0]["url"]).content for answer in drawn]
        assert hub.downloads("acme/one") == {NAME: 1}
        assert pixels(pictures[0]) == pixels(pictures[2]) != pixels(pictures[1])


def pixels(png: bytes) -> bytes:
    with Image.open(io.BytesIO(png)) as picture:
        return picture.tobytes()

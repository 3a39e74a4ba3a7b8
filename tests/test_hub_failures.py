"""A hub that is slow, cuts, refuses, sends something else: repositories and single files, each its right error."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import _http
from safetensors.torch import load_file

from sfumato.api.http import errors as http_errors
from sfumato.checkpoints import checked, weight_file
from sfumato.commands.check import check
from sfumato.errors import DownloadError, LoadError, SfumatoError
from sfumato.models import fetch as fetching
from sfumato.models import load
from sfumato.serving.catalog import Catalog
from support.here import config, quiet, use
from support.hub import Hub

REPO = "acme/one"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FILE = "huggingface://acme/files/model.safetensors"


@pytest.fixture
def hub(
    repositories: dict[str, Path], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    """A hub with a repository and a single file, asked by this process without waiting between tries."""
    (tmp_path / "files").mkdir()
    shutil.copy(checkpoint, tmp_path / "files" / "model.safetensors")
    for module in (_http, weight_file):
        monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with Hub() as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        hub.add(REPO, repositories["nitrosocke/Ghibli-Diffusion"])
        hub.add("acme/files", tmp_path / "files")
        hub.add(
            "stable-diffusion-v1-5/stable-diffusion-v1-5", repositories["stable-diffusion-v1-5/stable-diffusion-v1-5"]
        )
        yield hub


def fetch(tmp_path: Path, model: str) -> fetching.Fetched:
    (tmp_path / "models").mkdir(exist_ok=True)
    return fetching.fetch(config(tmp_path / "models", model), "fp32", quiet)


def test_a_repository_of_single_files_says_which_it_has(hub: Hub, tmp_path: Path) -> None:
    """As LocalAI's gallery names Lightricks/LTX-2.3."""
    for name in ("a", "b", "c", "d", "e"):
        shutil.copy(tmp_path / "files" / "model.safetensors", tmp_path / "files" / f"{name}.safetensors")
    hub.add("acme/files", tmp_path / "files")
    with pytest.raises(LoadError) as raised:
        fetch(tmp_path, "acme/files")
    assert "a.safetensors, b.safetensors, c.safetensors, d.safetensors and 2 more" in str(raised.value)
    assert "huggingface://acme/files/a.safetensors" in str(raised.value)


PLACES = {REPO: (REPO, WEIGHTS), FILE: ("acme/files", "model.safetensors")}

STATUSES = [
    (401, LoadError, 500, "HF_TOKEN"), (403, LoadError, 500, "HF_TOKEN"), (404, LoadError, 500, ""),
    (429, DownloadError, 503, "Try again in 7 s"), (500, DownloadError, 503, ""), (503, DownloadError, 503, ""),
]  # fmt: skip


@pytest.mark.parametrize(("status", "error", "answered", "words"), STATUSES)
@pytest.mark.parametrize("model", PLACES)
@pytest.mark.parametrize("what", ["content", "list"])
def test_what_the_hub_refuses_is_said(
    status: int, error: type[SfumatoError], answered: int, words: str, model: str, what: str, hub: Hub, tmp_path: Path
) -> None:
    repo, path = PLACES[model]
    if what == "list" and model == FILE:
        path = "model.safetensors"  # a single file needs no list
    hub.fail(repo, None if what == "list" and model == REPO else path, status, times=40, retry_after=7)
    if model == FILE and status == 404:
        error, answered = DownloadError, 503  # it may come
    with pytest.raises(error) as raised:
        fetch(tmp_path, model)
    assert raised.value.status == answered
    assert type(raised.value) is error
    assert words in raised.value.message
    assert repo in raised.value.message
    answer = http_errors.response(raised.value)
    assert (answer.headers.get("retry-after") == "7") == (status == 429 or (model == FILE and error is DownloadError))
    assert not list((tmp_path / "models").glob("model*"))


@pytest.mark.parametrize("model", PLACES)
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_failure_that_passes_is_no_failure_the_next_time(model: str, status: int, hub: Hub, tmp_path: Path) -> None:
    repo, path = PLACES[model]
    hub.fail(repo, path, status, times=1, retry_after=0)
    try:
        fetched = fetch(tmp_path, model)
    except DownloadError:
        fetched = fetch(tmp_path, model)
    assert fetched.path.exists()


@pytest.mark.parametrize("model", PLACES)
@pytest.mark.parametrize("times", [1, 3])
def test_a_download_that_is_cut_goes_on_where_it_was(model: str, times: int, hub: Hub, tmp_path: Path) -> None:
    repo, path = PLACES[model]
    before = hub.sent[repo, path]
    hub.cut(repo, path, times)
    fetched = fetch(tmp_path, model)
    assert fetched.path.exists()
    entry = hub.find(repo, None).entries[path]
    look = 256 * 1024 if model == FILE else 0  # at the header, before the download
    lost = times * 2**18 if model == REPO else 0  # huggingface_hub keeps whole chunks
    assert hub.sent[repo, path] - before <= entry.size + look + lost
    ranges = [each.range for each in hub.requests if each.method == "GET" and each.path.endswith(path) and each.range]
    assert [each for each in ranges if not each.startswith("bytes=0-")]


def test_a_connection_that_always_breaks_is_given_up_and_gone_on_with_later(hub: Hub, tmp_path: Path) -> None:
    url = f"{hub.url}/acme/files/resolve/main/model.safetensors"
    target = tmp_path / "x" / "model.safetensors"
    hub.cut("acme/files", "model.safetensors", 100)
    with pytest.raises(DownloadError, match="could not be downloaded"):
        weight_file.fetch(url, target, sha256=None, report=quiet)
    assert not target.exists()
    part = target.with_name(f".{target.name}.part")
    had = part.stat().st_size
    assert had > hub.find("acme/files", None).entries["model.safetensors"].size / 2
    hub._cuts.clear()
    weight_file.fetch(url, target, sha256=None, report=quiet)
    assert hub.requests[-1].range == f"bytes={had}-"


def test_a_slow_hub_is_waited_for_while_bytes_come(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_file, "TIMEOUT_S", 0.3)
    url = f"{hub.url}/acme/files/resolve/main/model.safetensors"
    hub.hold("acme/files")
    told: list[str] = []

    def released(fraction: float | None, name: str) -> None:
        told.append(name)

    failed: list[SfumatoError] = []

    def run() -> None:
        try:
            weight_file.fetch(url, tmp_path / "y.safetensors", sha256=None, report=released)
        except SfumatoError as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    hub.wait_held("acme/files")
    thread.join(60)
    assert isinstance(failed[0], DownloadError)  # it never said another byte
    hub.release("acme/files")
    weight_file.fetch(url, tmp_path / "y.safetensors", sha256=None, report=quiet)
    ranges = [each.range for each in hub.requests if each.method == "GET"]
    assert ranges[0] is None
    assert all(each and not each.startswith("bytes=0-") for each in ranges[1:])


# Checksums.


def other(content: bytes) -> bytes:
    return content[:-8] + bytes(8 * [255])


@pytest.mark.parametrize("model", PLACES)
def test_what_does_not_have_its_checksum_is_not_kept(
    model: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, path = PLACES[model]
    content = hub.find(repo, None).entries[path].source.read_bytes()
    hub.damage(repo, path, other(content), times=9)
    with pytest.raises(DownloadError, match="sha256"):
        fetch(tmp_path, model)
    hub._damages.clear()
    fetched = fetch(tmp_path, model)
    whole = fetched.path / path if model == REPO else fetched.path
    assert whole.read_bytes() == content


def test_what_lies_damaged_in_the_cache_is_found_once_and_fetched_again(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch(tmp_path, REPO).path
    blob = (folder / WEIGHTS).resolve()
    content = blob.read_bytes()
    counts = hub.downloads(REPO)
    hashed: list[Any] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *each: hashed.append(each) or digest(*each))
    fetch(tmp_path, REPO)
    assert hashed == []  # nothing is read twice
    blob.write_bytes(other(content))
    os.utime(blob, ns=(1, 1))
    assert (fetch(tmp_path, REPO).path / WEIGHTS).read_bytes() == content
    assert hub.downloads(REPO) == {**counts, WEIGHTS: 2}
    assert checked.damaged(folder.rglob("*")) == []


def test_a_file_of_download_files_that_is_there_is_checked(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(
        "parameters: {model: x.safetensors}\n"
        f"download_files: [{{uri: '{FILE}', filename: x.safetensors, sha256: '{'0' * 64}'}}]\n"
    )
    shutil.copy(tmp_path / "files" / "model.safetensors", tmp_path / "x.safetensors")
    with pytest.raises(DownloadError, match="Remove it"):
        load.load(Catalog([tmp_path / "m.yaml"]).get("m"), "cpu", quiet)


# Many at once.


@pytest.mark.parametrize("model", PLACES)
def test_many_that_wait_share_one_download(model: str, hub: Hub, tmp_path: Path) -> None:
    repo, path = PLACES[model]
    hub.hold(repo)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            fetch(tmp_path, model)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    hub.wait_held(repo)
    hub.release(repo)
    for thread in threads:
        thread.join()
    assert failed == []
    plain = [each for each in hub.requests if each.method == "GET" and each.path.endswith(path) and not
             (each.range or "").startswith("bytes=0-")]  # fmt: skip
    assert len(plain) == 1


# Repositories as they are.


def add(hub: Hub, folder: Path, change: Callable[[Path], None], source: Path) -> Path:
    shutil.copytree(source, folder)
    change(folder)
    hub.add("acme/odd", folder)
    return folder


def sharded(folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    (folder / WEIGHTS).unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1


def half_only(folder: Path) -> None:
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))


def pickles_only(folder: Path) -> None:
    for path in list(folder.rglob("*.safetensors")):
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()


def truncated(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def corrupted(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\xff" * 5000)


def a_shard_is_missing(folder: Path) -> None:
    sharded(folder)
    sorted((folder / "unet").glob("*.safetensors"))[0].unlink()


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


REPOSITORIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "sharded": (sharded, ""), "half only": (half_only, ""),
    "pickles only": (pickles_only, "safetensors"), "truncated": (truncated, "cut short"),
    "corrupted": (corrupted, "damaged"), "a shard is missing": (a_shard_is_missing, "unet"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REPOSITORIES)
@pytest.mark.parametrize("where", ["hub", "folder"])
def test_repositories_as_they_are(
    kind: str, where: str, hub: Hub, repositories: dict[str, Path], tmp_path: Path
) -> None:
    change, words = REPOSITORIES[kind]
    folder = add(hub, tmp_path / "odd", change, repositories["nitrosocke/Ghibli-Diffusion"])
    made = config(tmp_path, folder if where == "folder" else "acme/odd")
    if not words:
        assert type(load.load(made, "cpu", quiet).pipeline).__name__ == "StableDiffusionPipeline"
        return
    with pytest.raises(LoadError, match=words) as raised:
        load.load(made, "cpu", quiet)
    assert raised.value.status in (500, 503)
    if where == "folder":
        (tmp_path / "m.yaml").write_text("parameters: {model: odd}")
        (report,) = check(Catalog([tmp_path / "m.yaml"]))
        assert words in str(report)

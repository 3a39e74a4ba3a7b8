"""The test hub against the real clients."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from support import tiny
from support.hub import Hub
from support.tiny_checkpoint import CONFIGS

REPO = "someone/something"
CONTENT = {"README.md": b"# Hello\n", "unet/config.json": b"{}", "unet/weights.safetensors": bytes(1000)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    for path, content in CONTENT.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def read(root: str) -> dict[str, bytes]:
    files = (path for path in Path(root).rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def run(script: str, environment: dict[str, str]) -> str:
    """The last line that `script` prints in a process of its own; its failure is the test's."""
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_snapshot_is_the_folder_and_comes_once(folder: Path, tmp_path: Path) -> None:
    with Hub() as hub:
        commit = hub.add(REPO, folder)
        for _ in range(2):
            snapshot = snapshot_download(REPO, endpoint=hub.url, cache_dir=tmp_path / "cache")
            assert Path(snapshot).name == commit
            assert read(snapshot) == CONTENT
        assert hub.downloads(REPO) == dict.fromkeys(CONTENT, 1)


def test_new_content_is_a_new_commit(folder: Path, tmp_path: Path) -> None:
    with Hub() as hub:
        first = hub.add(REPO, folder)
        snapshot_download(REPO, endpoint=hub.url, cache_dir=tmp_path / "cache")
        (folder / "README.md").write_bytes(b"# Goodbye\n")
        assert hub.add(REPO, folder) != first
        snapshot = snapshot_download(REPO, endpoint=hub.url, cache_dir=tmp_path / "cache")
        assert read(snapshot) == CONTENT | {"README.md": b"# Goodbye\n"}
        assert hub.downloads(REPO)["unet/weights.safetensors"] == 1


def test_model_info(folder: Path) -> None:
    with Hub() as hub:
        commit = hub.add(REPO, folder)
        info = HfApi(endpoint=hub.url).model_info(REPO)
        assert (info.id, info.sha) == (REPO, commit)
        assert {sibling.rfilename for sibling in info.siblings or []} == set(CONTENT)
        assert HfApi(endpoint=hub.url).model_info(REPO, revision=commit).sha == commit


def test_what_is_missing_has_its_own_error(folder: Path, tmp_path: Path) -> None:
    with Hub() as hub:
        hub.add(REPO, folder)
        with pytest.raises(RepositoryNotFoundError):
            snapshot_download("no/body", endpoint=hub.url, cache_dir=tmp_path)
        with pytest.raises(RevisionNotFoundError):
            snapshot_download(REPO, revision="nowhere", endpoint=hub.url, cache_dir=tmp_path)
        with pytest.raises(RemoteEntryNotFoundError):
            hf_hub_download(REPO, "nothing.json", endpoint=hub.url, cache_dir=tmp_path)


def test_gated_repository_wants_its_token(folder: Path, tmp_path: Path) -> None:
    with Hub() as hub:
        hub.add(REPO, folder, token="hf_right")
        for token, status in ((False, 401), ("hf_wrong", 403)):
            with pytest.raises(GatedRepoError) as refused:
                snapshot_download(REPO, endpoint=hub.url, cache_dir=tmp_path / "cache", token=token)
            assert refused.value.response.status_code == status
        script = f"import huggingface_hub as hub; print(hub.hf_hub_download({REPO!r}, 'README.md'))"
        path = run(script, hub.environment(tmp_path / "home", token="hf_right"))
        assert Path(path).read_bytes() == CONTENT["README.md"]
        assert hub.requests[-1].authorization == "Bearer hf_right"


def test_offline_works_from_the_cache(folder: Path, tmp_path: Path) -> None:
    script = f"import huggingface_hub as hub; print(hub.snapshot_download({REPO!r}))"
    with Hub() as hub:
        hub.add(REPO, folder)
        first = run(script, hub.environment(tmp_path))
        asked = len(hub.requests)
        assert run(script, hub.environment(tmp_path, offline=True)) == first
        assert len(hub.requests) == asked


def test_failure_comes_as_often_as_asked(folder: Path, tmp_path: Path) -> None:
    with Hub() as hub:
        hub.add(REPO, folder)
        hub.fail(REPO, "README.md", 503)
        with pytest.raises(HfHubHTTPError):
            get_hf_file_metadata(f"{hub.url}/{REPO}/resolve/main/README.md", endpoint=hub.url)
        path = hf_hub_download(REPO, "README.md", endpoint=hub.url, cache_dir=tmp_path / "cache")
        assert Path(path).read_bytes() == CONTENT["README.md"]


def test_held_download_stands_still_until_released(folder: Path, tmp_path: Path) -> None:
    snapshots: list[str] = []

    def download() -> None:
        snapshots.append(snapshot_download(REPO, endpoint=hub.url, cache_dir=tmp_path / "cache"))

    with Hub() as hub:
        hub.add(REPO, folder)
        hub.hold(REPO)
        thread = threading.Thread(target=download)
        thread.start()
        hub.wait_held(REPO)
        assert not snapshots
        hub.release(REPO)
        thread.join(60)
        assert read(snapshots[0]) == CONTENT


def test_interrupted_download_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    with Hub() as hub:
        commit = hub.add(REPO, folder)
        path = hf_hub_download(REPO, "unet/weights.safetensors", endpoint=hub.url, cache_dir=tmp_path)
        blob = Path(path).resolve()
        blob.with_name(blob.name + ".incomplete").write_bytes(blob.read_bytes()[:600])
        blob.unlink()
        again = hf_hub_download(REPO, "unet/weights.safetensors", revision=commit, endpoint=hub.url, cache_dir=tmp_path)
        assert Path(again).read_bytes() == CONTENT["unet/weights.safetensors"]


LOAD = """
import json, sys
from diffusers import DiffusionPipeline, StableDiffusionPipeline
names = [type(DiffusionPipeline.from_pretrained("Linaqruf/animagine-xl")).__name__ for _ in range(2)]
names.append(type(StableDiffusionPipeline.from_single_file(sys.argv[1])).__name__)
print(json.dumps(names))
"""


def test_diffusers_loads_from_it_by_hub_id_and_single_file(repositories: dict[str, Path], tmp_path: Path) -> None:
    configs = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    checkpoint = tiny.single_file(tiny.stable_diffusion(), tmp_path / "toonyou_beta6.safetensors")
    with Hub() as hub:
        for repo in ("Linaqruf/animagine-xl", configs):
            hub.add(repo, repositories[repo])
        script = LOAD.replace("sys.argv[1]", repr(str(checkpoint)))
        names = json.loads(run(script, hub.environment(tmp_path / "home")))
        assert names == ["StableDiffusionXLPipeline", "StableDiffusionXLPipeline", "StableDiffusionPipeline"]
        assert set(hub.downloads("Linaqruf/animagine-xl").values()) == {1}
        assert hub.downloads(configs) == dict.fromkeys(CONFIGS, 1)

"""Where weights come from, decided without loading anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.checkpoints.sources import File, Folder, HubRepository, Url, download_url, resolve
from sfumato.config import Download, ModelConfig
from sfumato.errors import LoadError, ModelFileError


def config(folder: Path, model: str, **fields: Any) -> ModelConfig:
    return ModelConfig(name="m", model=model, file=folder / "m.yaml", folder=folder, **fields)


REMOTE = [
    ("Linaqruf/animagine-xl", HubRepository("Linaqruf/animagine-xl")),
    ("a/b@fp16", HubRepository("a/b", "fp16")),
    ("huggingface://a/b", HubRepository("a/b")),
    ("hf://a/b@v1", HubRepository("a/b", "v1")),
    ("https://huggingface.co/a/b", HubRepository("a/b")),
    ("https://huggingface.co/a/b/blob/main/x.safetensors", Url("https://huggingface.co/a/b/resolve/main/x.safetensors")),
    ("hf://a/b/sub/x.gguf", Url("https://hub/a/b/resolve/main/sub/x.gguf")),
    ("huggingface://a/b@v1/x.safetensors", Url("https://hub/a/b/resolve/v1/x.safetensors")),
    ("huggingface://a/b/x.safetensors@v1", Url("https://hub/a/b/resolve/v1/x.safetensors")),
    ("http://h/x.safetensors?token=1", Url("http://h/x.safetensors?token=1")),
]  # fmt: skip


@pytest.mark.parametrize(("model", "source"), REMOTE)
def test_what_is_not_on_the_disk(model: str, source: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub/")
    assert resolve(config(tmp_path, model)) == source


def test_the_disk_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "model_index.json").touch()
    (tmp_path / "x.safetensors").touch()
    assert resolve(config(tmp_path, "a/b")) == Folder(tmp_path / "a" / "b")
    assert resolve(config(tmp_path, "x.safetensors")) == File(tmp_path / "x.safetensors")
    assert resolve(config(tmp_path / "a", "../x.safetensors")) == File(tmp_path / "a" / ".." / "x.safetensors")
    assert resolve(config(Path("/"), str(tmp_path / "x.safetensors"))) == File(tmp_path / "x.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(config(Path("/"), "~/x.safetensors")) == File(tmp_path / "x.safetensors")


def test_artifacts_take_the_place_of_the_model(tmp_path: Path) -> None:
    assert resolve(config(tmp_path, "x", repo="a/b", revision="v2")) == HubRepository("a/b", "v2")


def test_a_file_that_download_files_will_bring(tmp_path: Path) -> None:
    awaited = (Download("https://h/x.gguf", "x.gguf"),)
    assert resolve(config(tmp_path, "x.gguf", downloads=awaited)) == File(tmp_path / "x.gguf")


@pytest.mark.parametrize("name", ["x.ckpt", "x.bin", "x.PT"])
def test_pickles_only_on_request(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    for model in (name, f"https://h/{name}", f"hf://a/b/{name}"):
        with pytest.raises(ModelFileError, match="allow_pickle: true"):
            resolve(config(tmp_path, model))
    assert resolve(config(tmp_path, name, allow_pickle=True)) == File(tmp_path / name)


ABSENT = [
    "toonyou.safetensors",
    "sub/x.safetensors",
    "./here",
    "/nowhere/at/all",
    "~/nowhere",
    "word",
    "a/b/c",
    "a b/c",
]


@pytest.mark.parametrize("model", ABSENT)
def test_what_is_not_there_names_where_it_was_looked_for(model: str, tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(LoadError) as caught:
        resolve(config(tmp_path, model))
    assert "does not exist" in caught.value.message
    assert "other.safetensors" in caught.value.message
    assert str(tmp_path / "m.yaml") in caught.value.message


@pytest.mark.parametrize(
    "model", ["oci://a/b", "ollama://x", "https://", "hf://a", "https://h/picture.png", "hf://a/b/x.txt"]
)
def test_words_that_are_no_source(model: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError):
        resolve(config(tmp_path, model))


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(LoadError, match=r"no model_index\.json"):
        resolve(config(tmp_path, "d"))
    (tmp_path / "d" / "w.safetensors").touch()
    with pytest.raises(LoadError, match=r"d/w\.safetensors"):
        resolve(config(tmp_path, "d"))
    (tmp_path / "readme.txt").touch()
    with pytest.raises(ModelFileError, match="not a weight file"):
        resolve(config(tmp_path, "readme.txt"))


def test_download_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert download_url("https://h/x") == "https://h/x"
    assert download_url("huggingface://a/b/c/x") == "https://huggingface.co/a/b/resolve/main/c/x"
    for bad in ("huggingface://a/b", "ftp://h/x", "x"):
        with pytest.raises(ModelFileError):
            download_url(bad)


@given(st.text(min_size=1, max_size=400))
def test_any_text_is_a_source_or_an_error_in_words(model: str) -> None:
    try:
        assert isinstance(resolve(config(Path("/nonexistent"), model)), HubRepository | Url | File | Folder)
    except (ModelFileError, LoadError) as error:
        assert "/nonexistent/m.yaml" in error.message

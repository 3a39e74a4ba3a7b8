"""Weights come into the page cache while the worker starts: what the system is asked to read."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from sfumato.checkpoints import read_ahead
from sfumato.serving.catalog import Catalog
from sfumato.serving.planning import ImageRequest
from sfumato.serving.service import Service
from sfumato.settings import Settings
from support import tiny
from support.fake_engine import FakeEngine

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be asked to read ahead")


class Asked:
    """File, as it is named in its model's folder → the bytes that the system was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes: dict[str, int] = {}
        monkeypatch.setattr(os, "posix_fadvise", self)

    def __call__(self, file: int, start: int, length: int, advice: int) -> None:
        path = Path(f"/proc/self/fd/{file}").resolve()
        name = f"{path.parent.name}/{path.name}"
        assert (advice, start) == (os.POSIX_FADV_WILLNEED, self.bytes.get(name, 0))
        self.bytes[name] = start + length


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sd` is a folder of two variants, and of pickles for one part."""
    folder = tmp_path_factory.mktemp("models")
    pipeline = tiny.stable_diffusion()
    pipeline.save_pretrained(folder / "sd")
    pipeline.save_pretrained(folder / "sd", variant="fp16")
    (folder / "sd" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not loaded")
    for name in ("sd", "half"):
        dtype = "fp16" if name == "half" else "fp32"
        (folder / f"{name}.yaml").write_text(f"name: {name}\nparameters: {{model: {folder / 'sd'}}}\ndtype: {dtype}\n")
    (folder / "gone.yaml").write_text(f"name: gone\nparameters: {{model: {folder / 'gone'}}}\n")
    return folder


def read(models: Path, name: str) -> None:
    read_ahead.begin(Catalog([models]).get(name)).join()


@pytest.mark.parametrize(("name", "variant"), [("sd", ""), ("half", ".fp16")])
def test_what_is_loaded_is_read_whole(models: Path, name: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "CHUNK", 1000)
    asked = Asked(monkeypatch)
    read(models, name)
    files = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    loaded = [models / "sd" / part / f"{file}{variant}.safetensors" for part, file in files.items()]
    assert asked.bytes == {f"{path.parent.name}/{path.name}": path.stat().st_size for path in loaded}


def test_more_than_fits_into_memory_is_not_read(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = read_ahead.psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(read_ahead.psutil, "virtual_memory", lambda: memory)
    asked = Asked(monkeypatch)
    read(models, "sd")
    assert asked.bytes == {}


def test_what_is_not_there_is_left_to_loading(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    read(models, "gone")
    assert asked.bytes == {}


def test_only_while_the_worker_starts_and_once_for_a_model(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, engine = Asked(monkeypatch), FakeEngine()
    service = Service(Catalog([models]), engine, Settings())

    def draw() -> dict[str, int]:
        asked.bytes.clear()
        before = set(threading.enumerate())
        asyncio.run(service.draw(ImageRequest(prompts=["a cat"], model="sd")))
        for thread in set(threading.enumerate()) - before:
            if thread.name == "sfumato-read-ahead":
                thread.join()
        return dict(asked.bytes)

    assert draw() == {}
    engine.ready = False
    assert len(draw()) == 3
    assert draw() == {}

"""What is told of a model before it was loaded is what is told of it after."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers.loaders import single_file_utils

from conftest import REPOSITORIES
from sfumato.checkpoints import class_reading, single_file, static_capabilities
from sfumato.config import ModelConfig
from sfumato.drawing import arguments, clips
from sfumato.drawing.info import model_info
from sfumato.models import load
from sfumato.pipelines import capabilities, tokens
from sfumato.pipelines.inputs import MOVING
from sfumato.serving.catalog import Catalog
from support import families, families_moving, families_transformers, tiny
from support.drawing import loaded
from support.hub import Hub
from support.serving import Server

FAMILIES = {**families.FAMILIES, **families_transformers.FAMILIES, **families_moving.FAMILIES}
MODEL = "name: m\nparameters:\n  model: {model}\ncuda: false\n"


def told(folder: Path, model: object, more: str = "") -> static_capabilities.StaticCapabilities:
    """Of a model file that says no more than where the weights are."""
    (folder / "m.yaml").write_text(MODEL.format(model=model) + more)
    return static_capabilities.static_capabilities(Catalog([folder / "m.yaml"]).get("m"))


def as_loaded(pipeline: Any) -> static_capabilities.StaticCapabilities:
    larger = capabilities.upscaler(pipeline)
    multiple = larger.multiple * larger.factor if larger else arguments.size_multiple(pipeline)
    moves = class_reading.of_pipeline(pipeline).output == MOVING
    return static_capabilities.StaticCapabilities(
        type(pipeline).__name__,
        class_reading.abilities_of(ModelConfig(name="m", model="m"), class_reading.kin_of_pipeline(pipeline)),
        multiple,
        tokens.capacity(pipeline, {}),
        clips.rate(loaded(pipeline), pipeline) if moves else None,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # diffusers', on saving toys
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_foreseen(family: str, tmp_path: Path) -> None:
    pipeline = FAMILIES[family].build()
    pipeline.save_pretrained(tmp_path / "weights")
    assert told(tmp_path, tmp_path / "weights") == as_loaded(pipeline)


@pytest.mark.parametrize("repo", REPOSITORIES)
def test_a_repository_is_foreseen_as_the_engine_loads_it(
    repo: str, repositories: dict[str, Path], tmp_path: Path
) -> None:
    before = told(tmp_path, repositories[repo])
    config = Catalog([tmp_path]).get("m")
    after = model_info(load.load(config, "cpu", lambda status: None))
    assert before == static_capabilities.StaticCapabilities(
        after.pipeline, after.abilities, after.size_multiple, after.prompt_tokens
    )
    assert None not in (before.tasks, before.size_multiple, before.prompt_tokens)


def test_a_snapshot_in_the_hubs_cache_is_read_and_nothing_is_fetched(
    repositories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert told(tmp_path, "tiny/flux") == static_capabilities.StaticCapabilities()
    named = "diffusers:\n  pipeline_type: FluxPipeline\n"
    before = told(tmp_path, "tiny/flux", named)  # what the class alone says
    assert (before.pipeline, before.tasks, before.size_multiple, before.prompt_tokens) == (
        "FluxPipeline", ("text-to-image", "image-to-image", "inpainting"), None, None,
    )  # fmt: skip
    cached = tmp_path / "hf" / "hub" / "models--tiny--flux"
    shutil.copytree(repositories["tiny/flux"], cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    for model in ("tiny/flux", "tiny/flux@abc"):
        assert told(tmp_path, model) == told(tmp_path, repositories["tiny/flux"])


def test_a_single_file_is_told_by_its_header_and_the_repository_that_describes_it(
    repositories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    file = tiny.single_file(tiny.stable_diffusion(), tmp_path / "one.safetensors")
    # Nothing was downloaded: what describes it comes with Sfumato.
    assert told(tmp_path, file).pipeline == "StableDiffusionPipeline"
    checkpoint = single_file_utils.load_single_file_checkpoint(str(file))
    repo = single_file_utils.fetch_diffusers_config(checkpoint)["pretrained_model_name_or_path"]
    assert single_file.described_by(file) == repo == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    cached = tmp_path / "hf" / "hub" / ("models--" + repo.replace("/", "--"))
    shutil.copytree(repositories[repo], cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    assert told(tmp_path, file) == told(tmp_path, repositories[repo])
    assert told(tmp_path, file).size_multiple
    url = "https://models.example/download/one.safetensors"
    assert told(tmp_path, url) == told(tmp_path, file)  # put there by hand
    assert told(tmp_path, url.replace("one", "another")) == static_capabilities.StaticCapabilities()


@pytest.mark.parametrize(
    "data",
    [b"", b"x" * 7, b"\xff" * 99, struct.pack("<Q", 2**24) + b"{}", struct.pack("<Q", 2) + b"[]",
     struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 7) + b'{"a":1}', struct.pack("<Q", 9) + b"[" * 9,
     struct.pack("<Q", 100_000) + b"[" * 100_000, struct.pack("<Q", 20) + b'{"a":{"shape":null}}'],
)  # fmt: skip
def test_single_files_that_say_nothing_are_no_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes(data)
    assert told(tmp_path, tmp_path / "one.safetensors").tasks is None
    (tmp_path / "one.safetensors").unlink()
    assert single_file.described_by(tmp_path / "one.safetensors") is None


def test_the_model_files_options_count(repositories: dict[str, Path], tmp_path: Path) -> None:
    flux = repositories["tiny/flux"]
    assert told(tmp_path, flux).prompt_tokens == 512
    assert told(tmp_path, flux, "options:\n  - max_sequence_length:128\n").prompt_tokens == 128
    sibling = told(tmp_path, flux, "diffusers:\n  pipeline_type: FluxImg2ImgPipeline\n")
    assert sibling.tasks == ("image-to-image", "inpainting")


@pytest.mark.parametrize(
    "index",
    [b"", b"{", b"[]", b"{}", b"[" * 100_000, b'{"_class_name": 5}', b'{"_class_name": "NoSuchPipeline"}', b"\xff"],
)
def test_files_that_say_nothing_are_no_error(index: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model_index.json").write_bytes(index)
    assert told(tmp_path, tmp_path / "weights").tasks is None
    assert told(tmp_path, tmp_path / "nowhere").tasks is None


def test_what_needs_the_model_itself_is_left_open(tmp_path: Path) -> None:
    tiny.save(tiny.stable_diffusion(), tmp_path / "weights")
    config = tmp_path / "weights" / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"block_out_channels": None}))
    assert told(tmp_path, tmp_path / "weights").size_multiple is None


def test_neither_torch_nor_diffusers_is_imported(repositories: dict[str, Path], tmp_path: Path) -> None:
    told(tmp_path, repositories["tiny/sd3"])
    program = (
        "import sys; from pathlib import Path; from sfumato.serving.catalog import Catalog; "
        "from sfumato.checkpoints.static_capabilities import static_capabilities; "
        f"assert static_capabilities(Catalog([Path({str(tmp_path)!r})]).get('m')).size_multiple; "
        "sys.exit(' '.join({'torch', 'diffusers', 'transformers'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_list_says_it_before_and_after(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "hub.yaml").write_text("name: hub\nparameters:\n  model: nitrosocke/Ghibli-Diffusion\n")

    def listed(server: Server) -> dict[str, Any]:
        models = server.client.get("/v1/models").json()["data"]
        return {each["id"]: each["sfumato"] for each in models}

    with Server(tmp_path / "models", tmp_path / "data", env=hub.environment(tmp_path / "hf")) as server:
        before = listed(server)
        assert before["sfumato-tiny"]["status"] != "ready"
        assert before["hub"]["tasks"] is None  # nothing of it is on this disk
        for name in before:
            assert server.draw(model=name, prompt="a cat", steps=1, size="64x64").status_code == 200
        after = listed(server)
    assert before["sfumato-tiny"]["tasks"] == after["sfumato-tiny"]["tasks"] != []
    for limit in ("size_multiple", "prompt_tokens"):
        assert before["sfumato-tiny"]["limits"][limit] == after["sfumato-tiny"]["limits"][limit] > 0
    with Server(tmp_path / "models", tmp_path / "again", env=hub.environment(tmp_path / "hf")) as server:
        again = listed(server)["hub"]  # of the cache, in a server that has not loaded it
    assert (again["tasks"], again["limits"]) == (after["hub"]["tasks"], after["hub"]["limits"])

"""Downloads from a hub: exactly the files that diffusers itself would fetch, once, with every byte told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from sfumato.checkpoints import hub_files
from sfumato.errors import DownloadError
from support import here
from support.hub import Hub

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}
COMMON = (
    "README.md", "v1-5-pruned.safetensors", "picture.png", "config.json", "scheduler/scheduler_config.json",
    "tokenizer/vocab.json", "tokenizer/merges.txt", "unet/config.json", "vae/config.json",
    "text_encoder/config.json", "text_encoder/notes.txt", "other/config.json", "text_encoder/model.onnx",
)  # fmt: skip
MODELS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def weights(ending: str, *folders: str) -> tuple[str, ...]:
    """Of all components, or of these."""
    named = {folder: "pytorch_model" if ending.endswith("bin") else MODELS[folder] for folder in folders or MODELS}
    return tuple(f"{folder}/{MODELS[folder] if folder != 'text_encoder' else name}.{ending}"
                 for folder, name in named.items())  # fmt: skip


SHARDS = (
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json", "unet/diffusion_pytorch_model.bin.index.json",
)  # fmt: skip
HALF_SHARDS = tuple(name.replace("model-", "model.fp16-").replace(".index", ".index.fp16") for name in SHARDS)


@dataclass(frozen=True)
class Layout:
    files: tuple[str, ...]
    variants: tuple[str | None, ...] = (None,)
    pickles: bool = False
    without: tuple[str, ...] = ()


HALF = ("fp16", None)
ALL = weights("safetensors") + weights("fp16.safetensors") + weights("bin") + weights("fp16.bin")

LAYOUTS = {
    "plain": Layout(weights("safetensors")),
    "everything": Layout(ALL),
    "everything-half": Layout(ALL, HALF),
    "everything-pickles": Layout(ALL, HALF, pickles=True),
    "no-half": Layout(weights("safetensors"), HALF),
    "half-only": Layout(weights("fp16.safetensors"), HALF),
    "half-in-part": Layout(weights("fp16.safetensors", "unet") + weights("safetensors"), HALF),
    "sharded": Layout(SHARDS + HALF_SHARDS + weights("safetensors", "vae", "text_encoder")),
    "sharded-half": Layout(SHARDS + HALF_SHARDS + weights("safetensors", "vae", "text_encoder"), HALF),
    "without-a-part": Layout(ALL, HALF, without=("unet",)),
    "pickles": Layout(weights("bin") + weights("fp16.bin"), HALF, pickles=True),
    "more-than-asked": Layout((*weights("safetensors"), "vae_1_0/diffusion_pytorch_model.safetensors")),
    "odd-names": Layout((*weights("safetensors"), "tokenizer/a[1].json", "tokenizer/sub/b.json")),
}  # fmt: skip

REFUSED = {
    "pickles-refused": Layout(weights("bin"), HALF),
    "no-index": Layout(()),
    "failing": Layout(weights("safetensors")),
}

SCRIPT = """
import json, sys
from diffusers import DiffusionPipeline
from sfumato.checkpoints import download, hub_files, variants
from sfumato.errors import SfumatoError
told = {}
for name, layout in json.load(sys.stdin).items():
    told[name] = parts = []
    report = lambda part, what: parts.append(part)
    try:
        given = {"revision": None, "pickles": layout["pickles"], "without": layout["without"]}
        given["variant"] = variants.pick(layout["files"], layout["variants"])
        with hub_files.as_download_errors(f"first/{name}"):
            download._fetch_files(f"first/{name}", **given, report=report)
        download.from_hub(f"whole/{name}", **given, report=lambda part, what: None)
    except (SfumatoError, ValueError) as error:
        told[name] = f"{type(error).__name__}: {error}"
        continue
    for variant in layout["variants"]:
        try:
            DiffusionPipeline.download(
                f"plain/{name}", variant=variant, use_safetensors=None if layout["pickles"] else True,
                **dict.fromkeys(layout["without"]),
            )
            break
        except ValueError: ...
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, dict[str, Any]]]:
    """A hub that was asked for every layout three times, and what was told of the first."""
    root = tmp_path_factory.mktemp("layouts")
    layouts = LAYOUTS | REFUSED
    with Hub() as hub:
        for name, layout in layouts.items():
            for number, file in enumerate((*COMMON, *layout.files)):
                path = root / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(f"{name} {file}".encode() * (number + 1))
            if name != "no-index":
                (root / name / "model_index.json").write_text(json.dumps(INDEX))
            for way in ("first", "whole", "plain"):
                hub.add(f"{way}/{name}", root / name)
        hub.fail("first/failing", None, 500, times=9)
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            input=json.dumps({name: asdict(layout) for name, layout in layouts.items()}),
            env=hub.environment(root / "home"), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        yield hub, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_fetched_is_what_diffusers_would_fetch(downloads: tuple[Hub, dict[str, Any]], name: str) -> None:
    hub, told = downloads
    plain = hub.downloads(f"plain/{name}")
    assert set(plain.values()) == {1}
    configurations = {f"{part}/config.json": 1 for part in LAYOUTS[name].without}
    assert hub.downloads(f"whole/{name}") == plain | configurations
    # Before diffusers is asked, which would tell nobody how far it is.
    assert hub.downloads(f"first/{name}") == plain
    assert all(0 < part <= 1 for part in told[name])
    assert told[name][-1] == 1.0


def test_the_layouts_differ_in_what_matters(downloads: tuple[Hub, dict[str, Any]]) -> None:
    hub, _ = downloads
    half = hub.downloads("whole/everything-half")
    assert {name for name in half if name.endswith(".safetensors")} == set(weights("fp16.safetensors"))
    assert set(SHARDS[:2]) <= hub.downloads("whole/sharded").keys()
    assert set(HALF_SHARDS[:2]) <= hub.downloads("whole/sharded-half").keys()
    assert set(weights("fp16.bin")) == {name for name in hub.downloads("whole/pickles") if "fp16" in name}


@pytest.mark.parametrize(("name", "words"), [
    ("pickles-refused", "safetensors"), ("no-index", "model_index.json"),
    ("failing", "first/failing could not be fetched"),
])  # fmt: skip
def test_what_cannot_be_loaded_is_refused_in_words(
    downloads: tuple[Hub, dict[str, Any]], name: str, words: str
) -> None:
    hub, told = downloads
    assert words in told[name]
    assert not any(Path(file).suffix in (".bin", ".safetensors") for file in hub.downloads(f"first/{name}"))


def test_a_hub_that_is_away_is_asked_once_and_the_cache_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "model_index.json").write_text(json.dumps(INDEX))
    with Hub() as hub:
        here.use(hub, tmp_path / "cache", monkeypatch)
        hub.add("some/one", tmp_path / "one")
        assert hub_files.index_of("some/one", None) == INDEX
    with Hub() as away:
        pass
    here.use(away, tmp_path / "cache", monkeypatch)

    def sleep(seconds: float) -> None:
        raise AssertionError(f"it waits {seconds} s, to ask again")

    monkeypatch.setattr("time.sleep", sleep)
    assert hub_files.index_of("some/one", None) == INDEX
    assert hub_files.files_of("some/one", None) == ["model_index.json"]
    with pytest.raises(DownloadError, match="sfumato pull some/two"):
        hub_files.index_of("some/two", None)
    assert hub_files.files_of("some/two", None) == []


def test_the_signature_of_an_address_is_in_no_message() -> None:
    error = OSError("503 Server Error for url: https://cdn.example/x?X-Amz-Signature=secret&token=hidden (id: 7)\nmore")
    line = hub_files.redacted_line(error)
    assert "https://cdn.example/x" in line
    assert not any(word in line for word in ("secret", "hidden", "more"))

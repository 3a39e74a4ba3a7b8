"""LocalAI's gallery as it lies on its disk, and the promise that what was pulled once draws without a network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from diffusers import FluxPipeline
from huggingface_hub import export_folder_as_dduf
from safetensors.torch import save_file

from sfumato.commands.check import check
from sfumato.commands.pull import pull
from sfumato.config import ModelConfig
from sfumato.drawing.draw import draw
from sfumato.models import load
from sfumato.serving.catalog import Catalog
from sfumato.settings import Settings
from support import families_transformers, tiny
from support.here import asked, cut, drawn, quiet, use
from support.hub import Hub

INFERENCE = "temperature: 0.8\ntop_p: 0.95\ntop_k: 40\nmin_p: 0\nrepeat_penalty: 1\n"
"""Defaults that LocalAI writes into every file that it installs."""


def artifacts(repo: str, key: str) -> str:
    return f"""
artifacts:
- name: model
  target: model
  source: {{type: huggingface, repo: {repo}, revision: main, allow_patterns: ['*.json', '*.safetensors', '*.txt']}}
  resolved: {{endpoint: 'https://huggingface.co', revision: {"a1" * 20}, cache_key: {key}}}
"""


FLUX = """backend: diffusers
cfg_scale: 1
diffusers: {cuda: true, enable_parameters: num_inference_steps, pipeline_type: FluxPipeline}
f16: true
low_vram: true
step: 25
"""
FILES = {
    "dreamshaper": """backend: diffusers
diffusers:
  cuda: true
  enable_parameters: negative_prompt,num_inference_steps
  pipeline_type: StableDiffusionPipeline
  scheduler_type: k_dpmpp_2m
download_files:
- filename: DreamShaper_8_pruned.safetensors
  sha256: ""
  uri: huggingface://Lykon/DreamShaper/DreamShaper_8_pruned.safetensors
f16: true
known_usecases: [FLAG_IMAGE]
name: dreamshaper
parameters: {model: DreamShaper_8_pruned.safetensors}
step: 25
""",
    "stable-diffusion-3-medium": """backend: diffusers
diffusers:
  cuda: true
  enable_parameters: negative_prompt,num_inference_steps
  pipeline_type: StableDiffusion3Pipeline
f16: false
low_vram: true
name: stable-diffusion-3-medium
parameters: {model: v2ray/stable-diffusion-3-medium-diffusers}
step: 25
""",
    "flux.1-dev": f"{FLUX}name: flux.1-dev\nparameters: {{model: ChuckMcSneed/FLUX.1-dev}}\n",
    "flux.1-schnell": f"{FLUX}name: flux.1-schnell\nparameters: {{model: black-forest-labs/FLUX.1-schnell}}\n"
    + artifacts("black-forest-labs/FLUX.1-schnell", "f" * 64),
    "qwen-image": """backend: diffusers
cfg_scale: 0
diffusers: {cuda: true, enable_parameters: num_inference_steps, pipeline_type: DiffusionPipeline}
f16: true
low_vram: true
name: qwen-image
options: ['true_cfg_scale:4.0', 'torch_dtype:bf16']
parameters: {model: Qwen/Qwen-Image}
step: 50
""",
    "animagine-xl": "backend: diffusers\nname: animagine-xl\nparameters: {model: Linaqruf/animagine-xl}\n"
    "diffusers: {pipeline_type: StableDiffusionPipeline, scheduler_type: k_euler_a, cuda: true}\n"
    + artifacts("Linaqruf/animagine-xl", "e" * 64),
}  # fmt: skip
OTHERS = {
    "llama-3.2-1b": "context_size: 8192\nparameters: {model: llama-3.2-1b-q4_k_m.gguf}\nstopwords: ['<|eot_id|>']\n"
    "template: {chat: x, completion: y}\nname: llama-3.2-1b\nmmap: true\n",
    "whisper-1": "backend: whisper\nname: whisper-1\nparameters: {model: ggml-whisper-base.bin}\n",
    "sd-1.5-ggml": "backend: stablediffusion-ggml\nname: sd-1.5-ggml\noptions: ['sampler:euler']\nstep: 25\n"
    "parameters: {model: stable-diffusion-v1-5-pruned-emaonly-Q4_0.gguf}\n",
    "bert-embeddings": "embeddings: true\nname: bert-embeddings\nparameters: {model: bert.gguf}\n",
    "qwen3-8b": "known_usecases: [FLAG_CHAT]\nname: qwen3-8b\nparameters: {model: Qwen3-8B.Q4_K_M.gguf}\n",
}


@pytest.fixture(scope="module")
def models(
    repositories: dict[str, Path], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Hub, Path]]:
    """A folder as LocalAI has it, and a hub with tiny weights under the real ids of what it has not fetched."""
    root = tmp_path_factory.mktemp("localai")
    folder = root / "models"
    folder.mkdir()
    for name, text in {**FILES, **OTHERS}.items():
        (folder / f"{name}.yaml").write_text(text + INFERENCE)
    shutil.copytree(repositories["tiny/flux"], folder / ".artifacts" / "huggingface" / ("f" * 64) / "snapshot")
    shutil.copytree(
        repositories["Linaqruf/animagine-xl"], folder / ".artifacts" / "huggingface" / ("e" * 64) / "snapshot"
    )
    (root / "dreamshaper").mkdir()
    shutil.copy(checkpoint, root / "dreamshaper" / "DreamShaper_8_pruned.safetensors")
    with Hub() as hub:
        hub.add("Lykon/DreamShaper", root / "dreamshaper")
        hub.add("v2ray/stable-diffusion-3-medium-diffusers", repositories["tiny/sd3"])
        hub.add("ChuckMcSneed/FLUX.1-dev", repositories["tiny/flux"])
        hub.add("Qwen/Qwen-Image", tiny.save(families_transformers.qwen_image(), root / "qwen"))
        v1 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        hub.add(v1, repositories[v1])
        yield hub, folder


CLASSES = {
    "dreamshaper": "StableDiffusionPipeline", "stable-diffusion-3-medium": "StableDiffusion3Pipeline",
    "flux.1-dev": "FluxPipeline", "flux.1-schnell": "FluxPipeline", "qwen-image": "QwenImagePipeline",
    "animagine-xl": "StableDiffusionXLPipeline",
}  # fmt: skip


@pytest.fixture
def at_hub(models: tuple[Hub, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Hub, Path]:
    use(models[0], tmp_path / "cache", monkeypatch)
    return models


def test_the_image_models_are_listed_and_the_others_are_not(at_hub: tuple[Hub, Path]) -> None:
    catalog = Catalog([at_hub[1]])
    assert {config.name for config in catalog.all()} == set(FILES)
    assert catalog.problems() == []
    reports = {report.file.stem: report for report in check(catalog, ask=True)}
    assert [str(report) for report in reports.values() if not report.ok] == []
    for name in OTHERS:
        assert "skipped" in str(reports[name])
    assert "fetched by LocalAI" in str(reports["flux.1-schnell"])
    for name in FILES:
        assert "temperature (is about sampling text)" in str(reports[name])


@pytest.mark.parametrize("name", FILES)
def test_each_is_drawn_right(name: str, at_hub: tuple[Hub, Path]) -> None:
    hub, folder = at_hub
    before = len(hub.requests)
    model = load.load(Catalog([folder]).get(name), "cpu", quiet)
    assert type(model.pipeline).__name__ == CLASSES[name]
    made = draw(model, asked(steps=2, width=64, height=64), quiet)
    assert made.recipe.sampling.steps == 2
    if "artifacts" in FILES[name]:
        assert model.source.endswith(f"@{'a1' * 20}")
        assert len(hub.requests) == before  # it lies there
    assert name != "qwen-image" or model.dtype == "bf16"  # as its options say


# Offline.


SOURCES = {
    "repository": "parameters: {model: acme/sd}",
    "repository at a commit": "parameters: {model: 'acme/sd@COMMIT'}",
    "artifacts": "artifacts: {source: {repo: acme/sd}}",
    "file of a repository": "parameters: {model: 'huggingface://acme/files/one.safetensors'}",
    "file by its page": "parameters: {model: 'HUB/acme/files/resolve/main/one.safetensors'}",
    "url without a name": "parameters: {model: 'HUB/acme/files/resolve/main/one'}",
    "download_files": "parameters: {model: x.safetensors}\n"
    "download_files: [{uri: 'hf://acme/files/one.safetensors', filename: x.safetensors}]",
    "gguf": "parameters: {model: 'hf://acme/files/flux.gguf'}\nbackend: diffusers\ndiffusers: {base_model: acme/flux}",
    "denoiser alone": "parameters: {model: 'hf://acme/files/denoiser.safetensors'}\ndiffusers: {base_model: acme/flux}",
    "several files": "parameters: {model: 'hf://acme/files/denoiser.safetensors'}\n"
    "diffusers: {base_model: acme/flux, text_encoders: [acme/files/t5.safetensors]}\nvae: acme/flux",
    "dduf": "parameters: {model: 'hf://acme/files/one.dduf'}",
    "with a vae": "parameters: {model: acme/sd}\nvae: acme/sd",
}


@pytest.fixture(scope="module")
def sources(
    repositories: dict[str, Path], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("files")
    shutil.copy(checkpoint, root / "one.safetensors")
    shutil.copy(checkpoint, root / "one")
    tiny.gguf(root / "flux.gguf")
    save_file(tiny.flux(seed=9).transformer.state_dict(), root / "denoiser.safetensors")
    encoder = FluxPipeline.from_pretrained(repositories["tiny/flux"]).text_encoder_2
    kept = {name: tensor for name, tensor in encoder.state_dict().items() if "embed_tokens" not in name}
    save_file(kept, root / "t5.safetensors")
    export_folder_as_dduf(root / "one.dduf", repositories["nitrosocke/Ghibli-Diffusion"])
    v1 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    return {"acme/sd": repositories["nitrosocke/Ghibli-Diffusion"], "acme/flux": repositories["tiny/flux"],
            "acme/files": root, v1: repositories[v1]}  # fmt: skip


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("way", ["HF_HUB_OFFLINE", "unreachable"])
def test_what_was_pulled_draws_without_a_network(
    kind: str, way: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(models=tmp_path / "models", data=tmp_path / "data", device="cpu")
    settings.models.mkdir()
    with Hub() as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        commits = {repo: hub.add(repo, folder) for repo, folder in sources.items()}
        text = SOURCES[kind].replace("COMMIT", commits["acme/sd"]).replace("HUB", hub.url)
        (settings.models / "m.yaml").write_text(f"{text}\ndtype: fp32\n")
        pull("m", settings)
        before = len(hub.requests)
        if way == "HF_HUB_OFFLINE":
            cut(monkeypatch)
            offline = drawn(made(settings))
            assert len(hub.requests) == before
    if way == "unreachable":  # the hub is gone, and nobody said so
        offline = drawn(made(settings))
    assert np.ptp(offline) > 0


def made(settings: Settings) -> ModelConfig:
    return Catalog([settings.models]).get("m")

"""`sfumato check`: what each file leads to, and what has to be mended."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sfumato.commands.check import FileReport, check
from sfumato.serving.catalog import EMBEDDED, Catalog

PAGE = (Path(__file__).parent / "data" / "seed.md").read_text()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    import huggingface_hub.file_download

    cache = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr(huggingface_hub.file_download.constants, "HF_HUB_CACHE", str(cache))
    return cache


def reports(folder: Path, **files: str) -> dict[str, FileReport]:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return {report.file.stem: report for report in check(Catalog([folder]))}


def test_the_files_of_the_page(tmp_path: Path) -> None:
    texts = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    save_file({"w": np.zeros(750_000, np.float32)}, tmp_path / "toonyou_beta6.safetensors")
    found = reports(tmp_path, **{f"f{index}": text for index, text in enumerate(texts)})
    assert all(report.ok for report in found.values())
    assert "Linaqruf/animagine-xl from the hub, not here yet" in str(found["f0"])
    assert "StableDiffusionXLPipeline" in str(found["f0"])
    assert "device:      CPU" in str(found["f0"])
    assert "toonyou_beta6.safetensors, 3 MB" in str(found["f1"])
    assert "steps 30, guidance 8, clip_skip 11" in str(found["f1"])
    assert "fp16 on CUDA" in str(found["f1"])
    assert "may set image, negative_prompt, num_inference_steps" in str(found["f2"])


def test_a_repository_in_the_cache(tmp_path: Path, cache: Path) -> None:
    commit = "a" * 40
    snapshot = cache / "models--o--r" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (cache / "models--o--r" / "refs").mkdir()
    (cache / "models--o--r" / "refs" / "main").write_text(commit)
    assert "in the local cache (aaaaaaaa)" in str(reports(tmp_path, a="parameters: {model: o/r}")["a"])


def test_a_folder_says_its_class(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    index = tmp_path / "w" / "model_index.json"
    index.write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert "FluxPipeline, as model_index.json says" in str(reports(tmp_path, a="parameters: {model: w}")["a"])
    index.write_text("[]")
    assert not reports(tmp_path)["a"].ok


def test_what_has_to_be_mended_and_what_has_no_effect(tmp_path: Path) -> None:
    found = reports(
        tmp_path,
        gone="parameters: {model: gone.safetensors}",
        typo="parameters: {model: o/r}\nstepp: 3",
        half="name: [",
        llama="name: l\nbackend: llama-cpp",
        gpt="name: gpt\nalias: twice",
        twice="parameters: {model: o/r}\nmmap: true",
        twice2="name: twice\nparameters: {model: o/r}",
    )
    assert {name for name, report in found.items() if not report.ok} == {"gone", "typo", "half", "twice2"}
    assert "does not exist" in str(found["gone"])
    assert str(found["typo"]).count("Did you mean 'step'?") == 1
    assert "no effect:   mmap" in str(found["twice"])
    assert "skipped: l: backend llama-cpp" in str(found["llama"])
    assert "gpt is served by twice" in str(found["gpt"])
    assert "which wins" in str(found["twice2"])


def test_what_the_file_puts_into_the_model_is_told(tmp_path: Path) -> None:
    text = f"parameters: {{model: {EMBEDDED / 'sfumato-tiny'}}}\nvae: tiny\naccelerate: openvino\n"
    (tmp_path / "m.yaml").write_text(text)
    (report,) = check(Catalog([tmp_path]))
    facts = dict(report.facts)
    assert facts["runner"] == "openvino"
    assert facts["VAE"] == "the tiny one for its latents"


def test_an_ip_adapter_that_is_nowhere_is_told(tmp_path: Path) -> None:
    text = f"parameters: {{model: {EMBEDDED / 'sfumato-tiny'}}}\ndiffusers: {{ip_adapter: nope/plus}}\n"
    (tmp_path / "m.yaml").write_text(text)
    (report,) = check(Catalog([tmp_path]))
    assert any("diffusers.ip_adapter: there is no IP-Adapter 'nope/plus'" in problem for problem in report.problems)

"""`sfumato add`, `models`, `pull` and `remove`, over every kind of source."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sfumato.cli import app
from sfumato.commands.add import add
from sfumato.commands.models import table
from sfumato.commands.pull import pull
from sfumato.commands.remove import carry_out, plan
from sfumato.config import ModelConfig
from sfumato.errors import InvalidRequest, LoadError, ModelNotFound, SfumatoError
from sfumato.serving.catalog import Catalog
from sfumato.settings import Settings
from support import tiny
from support.here import cut, drawn, use
from support.hub import Hub

TOKEN = "hf_secret"


@pytest.fixture(scope="module")
def sources(
    repositories: dict[str, Path], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Hub, Path]]:
    """A hub with a source of each kind, and a folder with the same."""
    root = tmp_path_factory.mktemp("sources")
    (root / "files").mkdir()
    shutil.copy(checkpoint, root / "files" / "one.safetensors")
    tensors = load_file(checkpoint)
    save_file({**tensors, "v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}, root / "files" / "vpred.safetensors")
    denoiser = tiny.flux(seed=9).transformer
    save_file(denoiser.state_dict(), root / "files" / "denoiser.safetensors")
    writer = GGUFWriter(root / "files" / "flux.gguf", "flux")
    writer.add_string("general.name", "x" * 300_000)  # a header longer than the first request for it
    for name, tensor in denoiser.state_dict().items():
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with Hub() as hub:
        for repo, folder in repositories.items():
            hub.add(repo, folder)
        hub.add("acme/files", root / "files")
        hub.add("acme/gated", repositories["tiny/flux"], token=TOKEN)
        yield hub, root / "files"


@pytest.fixture
def settings(sources: tuple[Hub, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    use(sources[0], tmp_path / "cache", monkeypatch)
    (tmp_path / "models").mkdir()
    return Settings(models=tmp_path / "models", data=tmp_path / "data", device="cpu")


WRITTEN: dict[str, dict[str, Any]] = {
    "nitrosocke/Ghibli-Diffusion": {
        "name": "Ghibli-Diffusion", "size": "64x64", "step": 30, "cfg_scale": 8.0,
        "pipeline_type": "StableDiffusionPipeline", "scheduler_type": "pndm", "prediction_type": "epsilon",
    },
    "Linaqruf/animagine-xl@main": {
        "name": "animagine-xl", "pipeline_type": "StableDiffusionXLPipeline", "scheduler_type": "euler",
    },
    "huggingface://tiny/sd3": {"name": "sd3", "pipeline_type": "StableDiffusion3Pipeline", "scheduler_type": "euler"},
    "huggingface://acme/files/one.safetensors": {
        "name": "one", "pipeline_type": "StableDiffusionPipeline", "step": 30,
    },
    "{hub}/acme/files/resolve/main/vpred.safetensors?token=S3CRET": {
        "name": "vpred", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
    },
    "{files}/one.safetensors": {"name": "one", "pipeline_type": "StableDiffusionPipeline"},
    "{folder}": {"pipeline_type": "FluxPipeline", "scheduler_type": "euler"},
    "huggingface://acme/files/flux.gguf --base tiny/flux": {
        "name": "flux", "pipeline_type": "FluxPipeline", "base_model": "tiny/flux", "scheduler_type": "euler",
    },
    "{files}/flux.gguf --base tiny/flux": {"base_model": "tiny/flux", "pipeline_type": "FluxPipeline"},
    "{files}/denoiser.safetensors --base tiny/flux": {"base_model": "tiny/flux", "pipeline_type": "FluxPipeline"},
}  # fmt: skip


@pytest.mark.parametrize("what", WRITTEN)
def test_add_looks_at_the_source_and_what_it_writes_draws(
    what: str, sources: tuple[Hub, Path], settings: Settings, repositories: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    hub, files = sources
    source, _, base = what.format(hub=hub.url, files=files, folder=repositories["tiny/flux"]).partition(" --base ")
    before = {repo: hub.downloads(repo) for repo in ("acme/files", *repositories)}
    file, told = add(source, None, base or None, settings)
    for repo, counts in before.items():
        fetched = {path for path, count in hub.downloads(repo).items() if count > counts.get(path, 0)}
        assert repo == "acme/files" or not [path for path in fetched if path.endswith(".safetensors")]
    assert not [path for path in settings.models.iterdir() if path != file]
    assert "S3CRET" not in told
    written = yaml.safe_load(file.read_text())
    flat = {**written, **written["diffusers"]}
    assert {key: flat.get(key) for key in WRITTEN[what]} == WRITTEN[what]
    assert "pipeline_type" in flat
    made = Catalog([settings.models]).get(written["name"])
    assert isinstance(made, ModelConfig)
    # What it says is what is drawn without it: nothing it writes changes the picture.
    pull(written["name"], settings)
    cut(monkeypatch)
    picture = drawn(made, width=64, height=64)
    assert np.ptp(picture) > 0
    with pytest.raises(InvalidRequest, match="--name"):
        add(source, None, base or None, settings)
    line = next(line for line in table(Catalog([settings.models]), settings) if line.startswith(written["name"]))
    assert line.split()[-1] == "yes"
    assert "S3CRET" not in line


def test_add_writes_what_a_distilled_model_needs(settings: Settings, repositories: dict[str, Path]) -> None:
    text = add("tiny/flux", "flux-schnell", None, settings)[0].read_text()
    assert yaml.safe_load(text)["step"] == 4
    folder = shutil.copytree(repositories["Linaqruf/animagine-xl"], settings.models / "lcm")
    described = folder / "scheduler" / "scheduler_config.json"
    described.write_text(json.dumps({"_class_name": "LCMScheduler", "prediction_type": "epsilon"}))
    written = yaml.safe_load(add("lcm", None, None, settings)[0].read_text())
    assert (written["step"], written["cfg_scale"], written["diffusers"]["scheduler_type"]) == (4, 1.0, "lcm")
    assert written["parameters"]["model"] == "lcm"


@pytest.mark.parametrize(
    ("source", "words"),
    [("acme/no-such", "not on"), ("acme/gated", "gated"), ("{files}/flux.gguf", "base_model"),
     ("huggingface://acme/files/flux.gguf", "base_model"), ("{files}/none.safetensors", "does not exist"),
     ("{hub}/acme/files/resolve/main/none.safetensors", "404"), ("ftp://x/y", "not supported")],
)  # fmt: skip
def test_add_says_what_cannot_be_and_writes_nothing(
    source: str, words: str, sources: tuple[Hub, Path], settings: Settings
) -> None:
    with pytest.raises(SfumatoError, match=words):
        add(source.format(hub=sources[0].url, files=sources[1]), None, None, settings)
    assert not list(settings.models.iterdir())


def test_the_token_opens_what_is_gated_and_offline_asks_nobody(
    sources: tuple[Hub, Path], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "FluxPipeline" in add("acme/gated", None, None, settings)[1]
    cut(monkeypatch)
    before = len(sources[0].requests)
    assert "FluxPipeline" in add("acme/gated", "again", None, settings)[1]  # from the cache
    with pytest.raises(LoadError, match="HF_HUB_OFFLINE"):
        add("nitrosocke/Ghibli-Diffusion", None, None, settings)
    with pytest.raises(LoadError, match="HF_HUB_OFFLINE"):
        add("huggingface://acme/files/one.safetensors", None, None, settings)
    assert len(sources[0].requests) == before


def test_models_tells_what_is_here(settings: Settings) -> None:
    add("tiny/flux", None, None, settings)
    (settings.models / "gone.yaml").write_text("parameters: {model: gone.safetensors}")
    header, *rows = table(Catalog([settings.models]), settings)
    assert header.split() == ["name", "class", "source", "runner", "on", "disk", "downloaded"]
    assert [row.split()[-1] for row in rows] == ["part", "no"]
    pull("flux", settings)
    assert [row.split()[-1] for row in list(table(Catalog([settings.models]), settings))[1:]] == [
        "yes",
        "no",
    ]


def test_pull_tells_of_each_file_on_a_line(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    pull("tiny/flux", settings)
    lines = capsys.readouterr().err.splitlines()
    for name in ("transformer/diffusion_pytorch_model.safetensors", "model_index.json", "vae/config.json"):
        assert lines.count(f"have tiny/flux/{name}") == 1
    assert lines.count("downloading tiny/flux/transformer/diffusion_pytorch_model.safetensors") == 1
    assert "\r" not in "".join(lines)


def test_remove_deletes_what_the_model_alone_downloaded(sources: tuple[Hub, Path], settings: Settings) -> None:
    models = settings.models
    add("huggingface://acme/files/one.safetensors", "a", None, settings)
    add("huggingface://acme/files/vpred.safetensors", "b", None, settings)
    (models / "b2.yaml").write_text((models / "b.yaml").read_text().replace("name: b", "name: b2"))
    for name in ("a", "b"):
        pull(name, settings)
    (models / "mine.safetensors").write_bytes((sources[1] / "one.safetensors").read_bytes())
    add("mine.safetensors", "c", None, settings)
    add("tiny/flux", "d", None, settings)
    pull("d", settings)
    (weights,) = models.glob("one-*.safetensors")
    removal = plan("a", settings)
    assert set(removal.files) == {models / "a.yaml", weights, weights.with_name(f".{weights.name}.source")}
    assert f"{weights}  {weights.stat().st_size / 1e6:.1f} MB" in str(removal)
    carry_out(removal)
    assert not weights.exists()
    shared = plan("b", settings)
    assert set(shared.files) == {models / "b.yaml"}
    assert "b2 uses it" in str(shared)
    carry_out(shared)
    mine = plan("c", settings)
    assert mine.files == (models / "c.yaml",)
    assert "did not download it" in str(mine)
    hub = plan("d", settings)
    assert hub.files == (models / "d.yaml",)
    assert "hf cache" in str(hub)
    (models / "typo.yaml").write_text("name: typo\nparameters: {modle: vpred.safetensors}\n")
    (vpred,) = models.glob("vpred-*.safetensors")
    (models / "typo.yaml").write_text(f"name: typo\nparameters: {{modle: {vpred.name}}}\n")
    assert "has an error and names it" in str(plan("b2", settings))
    carry_out(plan("typo", settings))
    carry_out(plan("b2", settings))
    assert not vpred.exists()
    assert (models / "mine.safetensors").exists()


def test_remove_never_leaves_the_folder(sources: tuple[Hub, Path], settings: Settings, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    models = settings.models
    (models / "link").symlink_to(elsewhere)
    (models / "m.yaml").write_text(
        "parameters: {model: link/x.safetensors}\n"
        "download_files: [{uri: 'hf://acme/files/one.safetensors', filename: link/x.safetensors}]\n"
    )
    pull("m", settings)
    assert (elsewhere / "x.safetensors").is_file()
    removal = plan("m", settings)
    assert removal.files == (models / "m.yaml",)
    assert "outside" in str(removal)
    (models / "two.yaml").write_text("- {name: p, parameters: {model: a/b}}\n- {name: q, parameters: {model: a/c}}\n")
    with pytest.raises(InvalidRequest, match="2 models"):
        plan("p", settings)
    with pytest.raises(InvalidRequest, match="comes with Sfumato"):
        plan("sfumato-tiny", settings)
    with pytest.raises(ModelNotFound, match="no model"):
        plan("nobody", settings)


def test_remove_leaves_what_others_use(sources: tuple[Hub, Path], settings: Settings) -> None:
    """Inside a folder that another model loads, in the file of another backend, and what was put there since."""
    models = settings.models
    here = "download_files: [{{uri: 'hf://acme/files/one.safetensors', filename: {}}}]\nparameters: {{model: {}}}\n"
    for name, file in (("a", "base/x.safetensors"), ("b", "clip.safetensors"), ("c", "mine.safetensors")):
        (models / f"{name}.yaml").write_text(here.format(file, file))
        pull(name, settings)
    (models / "base" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (models / "other.yaml").write_text("name: other\nparameters: {model: base}\n")
    (models / "llm.yaml").write_text("name: llm\nbackend: llama-cpp\nparameters: {model: clip.safetensors}\n")
    (models / "mine.safetensors").write_bytes(b"by hand")
    for name, why in (("a", "other uses it"), ("b", "another backend"), ("c", "did not download it")):
        removal = plan(name, settings)
        assert removal.files == (models / f"{name}.yaml",)
        assert why in str(removal)


def test_remove_takes_the_model_of_that_name_before_an_alias(settings: Settings) -> None:
    (settings.models / "a.yaml").write_text("name: a\naliases: [b]\nparameters: {model: acme/a}\n")
    (settings.models / "b.yaml").write_text("name: b\nparameters: {model: acme/b}\n")
    assert plan("b", settings).files == (settings.models / "b.yaml",)


@pytest.mark.parametrize("name", ["x" * 300, "new\nline", "..."])
def test_names_that_cannot_be_a_files_are_refused(settings: Settings, name: str) -> None:
    with pytest.raises(InvalidRequest, match="name"):
        add("tiny/flux", name, None, settings)
    assert not list(settings.models.glob("*.yaml"))


def test_the_command_line_asks_before_it_deletes(settings: Settings) -> None:
    folder = ["--models", str(settings.models)]
    add("tiny/flux", None, None, settings)
    run = CliRunner()
    kept = run.invoke(app, ["remove", "flux", *folder], input="n\n")
    assert kept.exit_code == 1
    assert (settings.models / "flux.yaml").exists()
    assert "delete" in kept.output
    assert run.invoke(app, ["remove", "flux", "--yes", *folder]).exit_code == 0
    assert not (settings.models / "flux.yaml").exists()
    added = run.invoke(app, ["add", "tiny/flux", "--name", "two words", *folder])
    assert added.exit_code == 0
    assert (settings.models / "two-words.yaml").exists()
    assert "two words" in run.invoke(app, ["models", *folder]).output


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/evil", "a/b", "..", ".hidden", "a\tb", "-x", "a:b", "x" * 101, " "]
)
def test_a_name_that_no_file_may_have_is_refused(name: str, settings: Settings, repositories: dict[str, Path]) -> None:
    with pytest.raises(InvalidRequest, match="letters, digits, spaces and any of") as caught:
        add(str(repositories["tiny/flux"]), name, None, settings)
    assert caught.value.param == "name"
    assert not [*settings.models.parent.rglob("*evil*"), *settings.models.rglob("*.yaml")]

"""`sfumato prove`: what batches is known before the first request, and what does not is said with its reason."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import diffusers as d
import pytest
import torch
from typer.testing import CliRunner

from sfumato.batching.batcher import Batcher
from sfumato.batching.proof_store import Proofs
from sfumato.batching.verification import Verification
from sfumato.cli import app
from sfumato.commands import prove as command
from sfumato.config import ModelConfig
from sfumato.drawing.draw import draw
from sfumato.engine import proving
from sfumato.models import load
from sfumato.settings import Settings
from support import modular, tiny
from support.drawing import loaded, quiet, wanted
from support.families_transformers import cogview4

SIZE = "64x64"


def settings(folder: Path) -> Settings:
    return Settings.load(
        {"models": folder / "models", "data": folder / "data", "proofs": str(folder / "data" / "proofs.json")}
    )


def model_file(folder: Path, weights: Path) -> Path:
    (folder / "models").mkdir()
    (folder / "models" / "m.yaml").write_text(f"name: m\nparameters:\n  model: {weights}\ndtype: fp32\n")
    return folder


def test_the_first_requests_batch_at_once_afterwards(tmp_path: Path) -> None:
    folder = model_file(tmp_path, modular.save(modular.BUILD["Anima"](), tmp_path / "anima"))
    lines: list[str] = []
    assert command.prove("m", SIZE, settings(folder), lines.append) == 0
    text = "\n".join(lines)
    assert "drawing: text-to-image\ndrawing: image-to-image" in text
    rows = {line.split()[0]: line for line in lines if "  yes  " in line}
    assert rows.keys() == {"text_encoder", "text_conditioner", "vae", "transformer"}
    assert "proved now" in rows["text_conditioner"]
    kept = json.loads((tmp_path / "data" / "proofs.json").read_text())["proofs"]
    assert any("AnimaTextConditioner" in entry["signature"] for entry in kept.values())

    # As the server does it, with the file: no forward pass of a proof.
    model = load.load(ModelConfig(name="m", model=str(tmp_path / "anima"), dtype="fp32"), "cpu", quiet)
    batcher = Batcher(verification=Verification(proofs=Proofs(tmp_path / "data" / "proofs.json")))
    for seed, prompt in enumerate(("a cat", "a dog", "something longer")):
        batcher.submit(partial(draw, model, wanted(prompt=prompt, seed=seed, width=64, height=64), quiet))
    with torch.no_grad():
        while batcher.step():
            pass
    assert batcher.counts["text_conditioner"].calls == 6
    assert batcher.counts["text_conditioner"].forwards < 6
    assert not any(count.proving for count in batcher.counts.values())

    again: list[str] = []
    assert command.prove("m", SIZE, settings(folder), again.append) == 0
    assert "0 kinds of calls were proved now" in again[-1]
    assert any("text_conditioner" in line and "proved on " in line for line in again)


def test_a_module_that_cannot_batch_is_named_with_the_reason(tmp_path: Path) -> None:
    weights = tmp_path / "pag"
    d.StableDiffusionPAGPipeline(**tiny.stable_diffusion().components).save_pretrained(weights)
    result = CliRunner().invoke(
        app, ["prove", "m", "--size", SIZE, "--models", str(model_file(tmp_path, weights) / "models"),
              "--data", str(tmp_path / "data")],
    )  # fmt: skip
    assert result.exit_code == command.ALONE
    (row,) = [line for line in result.output.splitlines() if line.startswith("unet")]
    assert "  no  " in row
    assert "set_attn_processor" in row


def found(pipeline: object, size: tuple[int, int] = (64, 64)) -> dict[str, proving.Finding]:
    # Nothing is trusted without a proof.
    result = proving.prove(loaded(pipeline), Verification(shipped=frozenset()), 8, size, quiet)
    assert not result.failures
    return {finding.module: finding for finding in result.findings}


def test_rows_that_depend_on_each_other_are_found_by_the_proof() -> None:
    pipeline = tiny.stable_diffusion()
    forward = pipeline.unet.conv_out.forward
    pipeline.unet.conv_out.forward = lambda sample: forward(sample - sample.mean())  # of the whole batch
    findings = found(pipeline)
    assert findings["unet"].batches == "no"
    assert "a row changes with the rows beside it" in findings["unet"].why
    assert findings["text_encoder"].batches == "yes"


def test_texts_of_different_lengths_are_said_apart() -> None:
    findings = found(cogview4())
    assert findings["transformer"].batches == "yes"
    assert "but not with texts of different lengths: a row changes" in findings["transformer"].why


def test_what_cannot_be_drawn_is_a_failure(tmp_path: Path) -> None:
    folder = model_file(tmp_path, modular.save(modular.BUILD["Anima"](), tmp_path / "anima"))
    lines: list[str] = []
    assert command.prove("m", "72x72", settings(folder), lines.append) == 1
    assert any(line.startswith("could not be drawn: text-to-image: ") and "divisible by 16" in line for line in lines)


@pytest.mark.parametrize("build", [tiny.pixart, tiny.ddpm])
def test_every_kind_of_pipeline_can_be_proved(build: object) -> None:
    assert callable(build)
    assert all(finding.batches == "yes" for finding in found(build()).values())

"""A single file of Stable Diffusion 1.5's real size, with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import tiny
from support.hub import Hub
from support.serving import Server


@pytest.mark.slow
def test_a_full_size_single_file_loads_by_name_and_draws(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    pipeline = tiny.stable_diffusion_15()
    tiny.single_file(pipeline, models / "big.safetensors")
    repo = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    described = tmp_path / "described"
    pipeline.save_pretrained(described)
    del pipeline
    (models / "big.yaml").write_text("name: big\nparameters:\n  model: big.safetensors\nstep: 2\n")
    with Hub() as hub:
        hub.add(repo, described)
        with Server(models, tmp_path / "data", env=hub.environment(tmp_path / "hf")) as server:
            answer = server.draw(model="big", prompt="a cat", size="64x64", seed=1)
            assert answer.status_code == 200, answer.text
            assert (models / "big.safetensors").stat().st_size > 2e9
        assert not any(path.endswith(".safetensors") for path in hub.downloads(repo))

"""What code decides by the source of diffusers' classes: the table is of the installed ones; no source is no error."""

from __future__ import annotations

import importlib.util
import json
import linecache
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import sfumato
from benchmarks import sources
from sfumato.batching.views import exclusive
from sfumato.config import ModelConfig
from sfumato.core import Generation
from sfumato.drawing.draw import draw
from sfumato.models import load
from sfumato.pipelines import generators, request_scheduler, scheduler_calls, source_table
from sfumato.sampling import nested
from support import tiny

REMEDY = "run `python -m benchmarks.sources` and look at what changed"

SOME = ("StableDiffusionPipeline", "FluxPipeline", "StableDiffusionPAGPipeline", "AutoencoderKL", "UnCLIPPipeline")


@pytest.mark.parametrize("name", SOME)
def test_a_row_is_what_the_readers_read(name: str) -> None:
    kind = getattr(diffusers, name)
    assert json.loads(json.dumps(sources.of(kind))) == source_table.row(kind), REMEDY


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the pipelines' own modules, as they are imported
def test_the_table_is_of_the_installed_diffusers() -> None:
    rows = sources.made()
    assert list(sources.differences(source_table.table(), json.loads(json.dumps(rows)))) == [], REMEDY
    assert sources.TABLE.read_text() == sources.written(rows)
    assert sum(bool(row.get("scheduler")) for row in rows.values()) > 250


def test_what_is_in_the_table_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: type) -> Any:
        raise AssertionError(f"{kind} was read")

    monkeypatch.setattr(source_table, "read", refuse)
    scheduler_calls._cached.cache_clear()
    generators.reads.cache_clear()
    handover = scheduler_calls.read(diffusers.StableDiffusion3Pipeline)
    assert handover == scheduler_calls.from_source(diffusers.StableDiffusion3Pipeline)
    assert generators.reads(diffusers.AutoencoderKL, "decode", "generator") is False
    assert exclusive(tiny.stable_diffusion()) == ""


def test_a_row_of_another_source_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "diffusers.pipelines.flux.pipeline_flux.FluxPipeline"
    stale = {path: {"source": "0", "scheduler": None, "intrusion": "never written"}}
    monkeypatch.setattr(source_table, "table", lambda: stale)
    scheduler_calls._cached.cache_clear()
    try:
        assert source_table.row(diffusers.FluxPipeline) is None
        assert scheduler_calls.read(diffusers.FluxPipeline) == scheduler_calls.from_source(diffusers.FluxPipeline)
    finally:
        scheduler_calls._cached.cache_clear()


def test_every_difference_is_told() -> None:
    old = {"a": {"source": "1", "intrusion": ""}, "b": {"source": "1"}, "c": {"source": "1", "intrusion": ""}}
    new = {"a": {"source": "2", "intrusion": "x"}, "c": {"source": "2", "intrusion": ""}, "d": {"source": "1"}}
    assert list(sources.differences(old, new)) == [
        'a: intrusion was "", is "x"', "b: gone", "c: another source, which says the same", "d: new",
    ]  # fmt: skip


# Classes that nobody can read.

CODE = """
from diffusers import StableDiffusionPipeline

class Strange(StableDiffusionPipeline):
    def prepare_extra_step_kwargs(self, generator, eta):
        assert self.scheduler is not None
        return super().prepare_extra_step_kwargs(generator, eta)
"""


class Strange(diffusers.StableDiffusionPipeline):
    """One of the same name whose source is here."""


@pytest.fixture(params=["no source", "a source that is another one", "a source that is no Python"])
def strange(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stable Diffusion, of a class that is not to be read."""
    if request.param == "no source":
        names: dict[str, Any] = {"__name__": "diffusers.pipelines.strange"}
        exec(CODE, names)
        kind = names["Strange"]
    else:
        file = tmp_path / "strange.py"
        file.write_text(CODE)
        spec = importlib.util.spec_from_file_location("strange", file)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "strange", module)
        spec.loader.exec_module(module)
        kind = module.Strange
        # As with a source file that was changed, or left out, after the class was made.
        file.write_text("" if request.param.endswith("another one") else CODE.replace("assert", "assert )"))
        linecache.clearcache()
    parts = tiny.stable_diffusion().components
    made = kind(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def loaded(pipeline: Any, **fields: Any) -> load.Loaded:
    config = ModelConfig(**nested({"name": "m", "model": "x", "dtype": "fp32", **fields}))
    return load.Loaded(config, pipeline, "x", "cpu", "fp32")


def asked(**fields: Any) -> Generation:
    made = {"id": "1", "prompt": "a cat", "seed": 1, "steps": 2, "width": 64, "height": 64, **fields}
    return Generation(**nested(made))


def test_a_pipeline_that_cannot_be_read_draws_with_its_own_scheduler_and_alone(strange: Any) -> None:
    assert "cannot be read" in exclusive(strange)
    assert "cannot be read" in request_scheduler.keeps_own(strange)
    known = Strange(**tiny.stable_diffusion().components, requires_safety_checker=False)
    assert exclusive(known) == request_scheduler.keeps_own(known) == ""
    plain = draw(loaded(known), asked(), lambda *_: None)
    done = draw(loaded(strange), asked(), lambda *_: None)
    assert done.warnings == ()
    assert np.array_equal(pixels(done), pixels(plain))


@pytest.mark.parametrize("asks", ["the request", "the model file"])
def test_another_scheduler_is_left_out_with_a_warning(strange: Any, asks: str) -> None:
    model = loaded(strange, scheduler="euler" if asks == "the model file" else None)
    load._check(model.config, strange)
    own = draw(loaded(strange), asked(), lambda *_: None)
    done = draw(model, asked(scheduler="euler" if asks == "the request" else None), lambda *_: None)
    assert done.recipe.sampling.scheduler == "PNDMScheduler"
    assert np.array_equal(pixels(done), pixels(own))
    if asks == "the request":
        (warning,) = done.warnings
        assert warning.startswith("scheduler: euler was not used but the model's own (PNDMScheduler): ")


def test_calls_of_such_a_pipeline_are_gathered_one_by_one(strange: Any) -> None:
    calls = [
        {"prompt": "a", "num_inference_steps": 2, "generator": torch.Generator().manual_seed(n), "output_type": "np"}
        for n in range(2)
    ]
    stats: dict[str, dict[str, Any]] = {}
    pictures = sfumato.gather(strange, calls, stats=stats)
    assert all(np.isfinite(picture.images).all() for picture in pictures)
    assert stats["unet"]["mean_batch"] == 1.0


def test_a_vae_that_cannot_be_read_is_taken_to_draw_random_numbers() -> None:
    class Odd(torch.nn.Module):
        decode = len

    assert generators.reads(Odd, "decode", "generator")


def pixels(done: Any) -> Any:
    from sfumato.pictures.images import decoded

    return np.asarray(decoded(done.file)).astype(int)

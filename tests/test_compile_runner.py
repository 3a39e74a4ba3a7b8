"""`accelerate: compile`: a copy of a module compiled in the background, for sizes and batches of any kind."""

from __future__ import annotations

import functools
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from sfumato.batching.batcher import Batcher
from sfumato.batching.calls import target
from sfumato.drawing.draw import draw
from sfumato.pictures.images import decoded
from sfumato.runners import compiled, module_state
from sfumato.runners.auto import Auto
from sfumato.runners.background import Background
from sfumato.runners.choice import Runners
from sfumato.runners.compiled import Compiled
from sfumato.runners.measuring import Sample, compared
from sfumato.status import RunnerState
from support import families_transformers, tiny
from support.drawing import loaded, quiet, wanted

SIZE = {"width": 64, "height": 64}

needs_compiler = pytest.mark.skipif(not compiled.compiler(), reason="there is no C++ compiler")


def call(rows: int, height: int = 8, width: int = 8) -> dict[str, Any]:
    torch.manual_seed(rows * height + width)
    return {
        "sample": torch.randn(rows, 4, height, width), "timestep": torch.tensor(5),
        "encoder_hidden_states": torch.randn(rows, 77, 32), "return_dict": False,
    }  # fmt: skip


def pixels(done: Any) -> Any:
    return np.asarray(decoded(done.file)).astype(int)


def runner_of(module: Any) -> Compiled:
    return Compiled(module, torch.get_num_threads(), Background())


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch traces is run as it is: what is compiled, and when, without minutes of compiling."""
    monkeypatch.setattr(compiled, "_built", lambda graph, inputs: graph.forward)


def test_without_a_compiler_modules_compute_and_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    model, runners = loaded(tiny.stable_diffusion(), **SIZE), Runners("compile", tmp_path)
    chosen = runners.of(model.computing(), model.state.runners, None, None)
    assert chosen == {}
    assert draw(model, wanted(**SIZE), quiet, None, chosen).recipe.runner == "eager"
    assert runners.states(model.computing(), {}, None)[0] == RunnerState("unet", "eager", compiled.NO_COMPILER)


@needs_compiler
def test_a_picture_is_drawn_by_what_was_ready_when_it_began(
    interpreted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, runners = loaded(tiny.stable_diffusion(), **SIZE), Runners("compile", tmp_path)
    submitted: list[Any] = []
    monkeypatch.setattr(runners._compiling, "submit", submitted.append)

    def drawn() -> str:
        chosen = runners.of(model.computing(), model.state.runners, None, None)
        return draw(model, wanted(**SIZE, guidance_scale=4.0), quiet, None, chosen).recipe.runner

    assert drawn() == "eager"
    assert len(submitted) == 2  # the denoiser's and the VAE's, once each
    for work in submitted:
        work()
    assert drawn() == "text_encoder eager, unet compile-fp32, vae compile-fp32"
    assert len(submitted) == 2
    states = runners.states(model.computing(), model.state.runners, None)
    assert [state.runner for state in states] == ["compile-fp32", "eager", "compile-fp32"]


@needs_compiler
@torch.no_grad()
def test_any_size_and_batch_is_compiled_once_and_never_while_a_request_waits(interpreted: None) -> None:
    unet = tiny.stable_diffusion().unet.eval()
    state, runner = module_state.state_of(unet), runner_of(unet)
    before = runner.for_request()
    assert before
    assert runner.prepare("__call__", (), call(2), wait=True)
    assert before.run("__call__", (), call(2))[1] == "eager"  # it began before that
    compilations, now = runner.compilations, runner.for_request()
    assert now
    assert compilations
    frames = counters["stats"]["unique_graphs"]
    for rows, height, width in ((2, 8, 8), (4, 8, 8), (6, 12, 8), (8, 16, 8), (2, 16, 16), (2, 9, 8)):
        asked = call(rows, height, width)
        output, by = now.run("__call__", (), asked)
        assert by == "compile-fp32"
        torch.testing.assert_close(output[0], unet(**asked)[0], atol=1e-5, rtol=1e-4)
    assert now.run("__call__", (), call(1))[1] == "eager"  # a single row is a kind of its own
    assert (runner.compilations, counters["stats"]["unique_graphs"]) == (compilations, frames)
    # The module itself is what it was.
    assert module_state.state_of(unet) == state
    assert not [part for part in unet.modules() if part._compiled_call_impl is not None]
    # Nor is anything compiled for a module that has changed.
    unet.conv_in.weight.mul_(2)
    assert runner.for_request() is None


@needs_compiler
@torch.no_grad()
def test_what_would_be_compiled_again_is_left_to_the_module(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny.stable_diffusion().unet.eval()
    runner = runner_of(unet)
    runner.prepare("__call__", (), call(2), wait=True)
    now = runner.for_request()
    assert now
    submitted: list[Any] = []
    monkeypatch.setattr(runner._background, "submit", submitted.append)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)  # torch compiles for a number of threads
        output, by = now.run("__call__", (), call(2))
    finally:
        torch.set_num_threads(before)
    assert by == "eager"
    torch.testing.assert_close(output[0], unet(**call(2))[0])
    assert len(submitted) == 1
    assert now.run("__call__", (), call(2))[1] == "eager"  # to the end of this request
    assert not runner.why_eager
    submitted[0]()
    later = runner.for_request()
    assert later
    assert later.run("__call__", (), call(2))[1] == "compile-fp32"


@needs_compiler
@torch.no_grad()
def test_a_recipe_takes_no_runner_from_requests_beside_it(tmp_path: Path) -> None:
    model, runners = loaded(tiny.stable_diffusion(), **SIZE), Runners("auto", tmp_path)
    unet = {"unet": model.pipeline.unet}
    again = runners.of(unet, model.state.runners, None, None, "compile-fp32")[id(unet["unet"])]
    runners.of(unet, model.state.runners, None, None)  # another request begins, without a recipe
    kept = dict(model.state.runners)
    assert again
    assert again.run("__call__", (), call(2))[1] == "eager"  # nothing is compiled yet
    runners.of(unet, model.state.runners, None, None, "compile-fp32")
    assert model.state.runners == kept
    assert {type(runner) for runner in kept.values()} == {Auto, Compiled}


class Queued(Background):
    """Work that is done when a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.works: list[Any] = []

    @property
    def busy(self) -> bool:
        return bool(self.works)

    def submit(self, work: Any) -> None:
        self.works.append(work)

    def do_first(self) -> None:
        self.works[0]()
        del self.works[0]


@needs_compiler
@torch.no_grad()
def test_auto_measures_it_when_no_other_module_is_being_compiled(interpreted: None) -> None:
    unet, queue = tiny.stable_diffusion().unet.eval(), Queued()
    runner = Compiled(unet, torch.get_num_threads(), queue)
    sample = Sample("8x8", "__call__", (), call(2))
    trial = compared(weakref.ref(unet), sample, {"compile": runner})
    assert next(trial) is False
    queue.submit(lambda: None)  # another module's
    queue.do_first()
    shared = runner.for_request()
    assert shared
    assert shared.run("__call__", (), call(2))[1] == "eager"  # and it stays so for this request
    assert next(trial) is False
    queue.do_first()
    with pytest.raises(StopIteration) as end:
        while True:
            assert next(trial)
    assert end.value.value.refused == {}
    assert set(end.value.value.ratios) == {"compile"}


def test_auto_compiles_no_text_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "compiler", lambda: "g++")
    runners, encoder = Runners("auto", tmp_path), tiny.stable_diffusion().text_encoder.to("meta")
    kept: dict[str, Any] = {}
    assert runners.of({"text_encoder": encoder}, kept, None, None) == {id(encoder): None}
    assert kept == {}
    (state,) = runners.states({"text_encoder": encoder}, kept, None)
    assert "called once a prompt" in state.detail


@needs_compiler
@torch.no_grad()
def test_a_request_whose_runner_is_gone_is_computed_by_the_module() -> None:
    unet = tiny.stable_diffusion().unet.eval()
    now = runner_of(unet).for_request()
    assert now
    assert now._compiled() is None
    output, by = now.run("__call__", (), call(2))
    assert by == "eager"
    assert torch.equal(output[0], unet(**call(2))[0])


@needs_compiler
@torch.no_grad()
def test_a_transformer_and_a_vae(interpreted: None) -> None:
    transformer = families_transformers.qwen_image().transformer.eval()
    vae = tiny.stable_diffusion().vae.eval()
    asked = {
        "hidden_states": torch.randn(2, 24, 16), "encoder_hidden_states": torch.randn(2, 7, 32),
        "encoder_hidden_states_mask": torch.ones(2, 7).long(), "timestep": torch.tensor([0.5, 0.2]),
        "img_shapes": [[(1, 6, 4)]] * 2, "return_dict": False,
    }  # fmt: skip
    for module, method, kwargs in ((transformer, "__call__", asked), (vae, "decode", {"z": torch.randn(2, 4, 8, 8)})):
        runner = runner_of(module)
        runner.prepare(method, (), kwargs, wait=True)
        now = runner.for_request()
        assert now
        output, by = now.run(method, (), kwargs)
        assert by == "compile-fp32", runner.why_eager
        torch.testing.assert_close(output[0], target(module, method)(**kwargs)[0], atol=1e-4, rtol=1e-3)


@needs_compiler
def test_what_cannot_be_compiled_is_computed_by_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny.stable_diffusion().unet.eval()
    runner = runner_of(unet)

    def broken(*args: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(runner, "_made", broken)
    assert runner.prepare("__call__", (), call(2), wait=True)
    assert runner.for_request() is None
    assert "no such instruction" in runner.state("unet").detail


@needs_compiler
@torch.no_grad()
def test_memory_that_runs_out_is_for_the_batcher_and_compiles_no_less(
    interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = tiny.stable_diffusion().unet.eval()
    runner = runner_of(unet)
    assert runner.prepare("__call__", (), call(2), wait=True)
    now = runner.for_request()
    assert now

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(runner, "_twin", full)
        with pytest.raises(torch.OutOfMemoryError):
            now.run("__call__", (), call(2))
    assert runner.why_eager == ""
    assert now.run("__call__", (), call(2))[1] == "compile-fp32"


@pytest.mark.slow
@needs_compiler
@torch.no_grad()
def test_compiled_code_gives_the_modules_numbers() -> None:
    unet = tiny.stable_diffusion().unet.eval()
    runner = runner_of(unet)
    runner.prepare("__call__", (), call(2), wait=True)
    now = runner.for_request()
    assert now
    for rows, height, width in ((2, 8, 8), (4, 12, 8)):
        output, by = now.run("__call__", (), call(rows, height, width))
        assert by == "compile-fp32"
        torch.testing.assert_close(output[0], unet(**call(rows, height, width))[0], atol=1e-5, rtol=1e-4)


def _drawn_together_and_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three requests of other prompts, steps and guidance: by the runner each, alone and in shared forward passes."""
    model, runners = loaded(tiny.stable_diffusion(), **SIZE), Runners("compile", folder)
    works: list[Any] = []
    monkeypatch.setattr(runners._compiling, "submit", works.append)
    requests = [
        wanted(prompt=prompt, seed=seed, steps=steps, guidance_scale=scale, scheduler="ddim", **SIZE)
        for seed, (prompt, steps, scale) in enumerate([("a cat", 3, 4.0), ("a dog", 4, 8.0), ("two", 5, 3.0)])
    ]

    def drawn(request: Any) -> Any:
        return draw(model, request, quiet, None, runners.of(model.computing(), model.state.runners, None, None))

    by_module = [drawn(request) for request in requests]  # asks for what is compiled
    for work in works:
        work()
    alone = [drawn(request) for request in requests]
    batcher = Batcher()
    tasks = [batcher.submit(functools.partial(drawn, request)) for request in requests]
    with torch.no_grad():
        while batcher.step():
            pass
    for task, done, plain in zip(tasks, alone, by_module, strict=True):
        assert task.outcome is not None
        together = task.outcome.value
        assert together.recipe.runner == done.recipe.runner == "text_encoder eager, unet compile-fp32, vae compile-fp32"
        assert np.abs(pixels(together) - pixels(done)).max() <= 1
        assert np.abs(pixels(done) - pixels(plain)).max() <= 1
    assert batcher.counts["unet"].forwards < batcher.counts["unet"].calls


@needs_compiler
def test_requests_together_get_what_they_get_alone(
    interpreted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _drawn_together_and_alone(tmp_path, monkeypatch)


@pytest.mark.slow
@needs_compiler
def test_compiled_requests_together_get_what_they_get_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _drawn_together_and_alone(tmp_path, monkeypatch)

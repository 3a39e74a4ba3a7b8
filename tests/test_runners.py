"""Runners: the forward pass of a denoiser computed by something else, with the same picture."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.commands.generate import _warn_of_differences
from sfumato.config import ModelConfig
from sfumato.core import Done, Generation, Recipe
from sfumato.drawing.draw import draw
from sfumato.engine.local import Local
from sfumato.models.load import Loaded
from sfumato.pictures.images import decoded
from sfumato.runners import arguments, graph, kept, module_state, openvino
from sfumato.runners.arguments import Unserved
from sfumato.runners.background import Background
from sfumato.runners.candidate import KeptRunner
from sfumato.runners.choice import NOT_INSTALLED, Runners
from sfumato.sampling import Sampling
from sfumato.settings import Settings
from sfumato.status import RunnerState
from support import families_transformers, here, tiny
from support.drawing import loaded, quiet, wanted
from support.together import posted_together

needs_openvino = pytest.mark.skipif(not graph.installed(), reason="the package openvino is not installed")

SIZE = {"width": 64, "height": 64}
MODULES = ("unet", "text_encoder", "vae")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where graphs are kept: the tests convert each module once."""
    return tmp_path_factory.mktemp("runners")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.stable_diffusion(), tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def model() -> Loaded:
    return loaded(tiny.stable_diffusion(), **SIZE)


def pixels(done: Done) -> Any:
    return np.asarray(decoded(done.file)).astype(float)


def psnr(one: Any, other: Any) -> float:
    error = float(np.mean((one - other) ** 2))
    return float("inf") if not error else 10 * np.log10(255**2 / error)


def drawn(model: Loaded, runners: Runners, generation: Generation) -> Done:
    """In this thread: what has to be prepared is, at the first call."""
    chosen = runners.of(model.computing(), model.state.runners, "openvino", None)
    return draw(model, generation, quiet, None, chosen)


def call(module: Any, rows: int = 2, side: int = 8, **more: Any) -> dict[str, Any]:
    torch.manual_seed(rows * side)
    text = torch.randn(rows, 77, module.config.cross_attention_dim)
    return {"sample": torch.randn(rows, 4, side, side), "timestep": 500, "encoder_hidden_states": text,
            "return_dict": False, **more}  # fmt: skip


def runner_of(module: Any, folder: Path) -> openvino.OpenVino:
    return openvino.OpenVino(module, folder, 1, Background())


# What works without the package.


def test_without_the_package_modules_compute_and_say_why(
    model: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "installed", lambda: False)
    runners, kept_runners = Runners("eager", tmp_path), dict[str, KeptRunner]()
    assert runners.of(model.computing(), kept_runners, "openvino", None) == {}
    states = runners.states(model.computing(), kept_runners, "openvino")
    assert states == tuple(RunnerState(name, "eager", NOT_INSTALLED) for name in MODULES)
    assert drawn(model, runners, wanted(**SIZE)).recipe.runner == "eager"


def test_the_file_wins_over_the_setting(model: Loaded, tmp_path: Path) -> None:
    by_setting = Runners("openvino", tmp_path)
    states = by_setting.states(model.computing(), {}, "eager")
    assert states == tuple(RunnerState(name, "eager") for name in MODULES)
    assert by_setting.of(model.computing(), {}, "eager", None) == {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda unet: unet.train(), "training"),
        (lambda unet: unet.conv_in.register_forward_hook(lambda *_: None), "hooks"),
        (lambda unet: unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32), "float8_e4m3fn"),
        (lambda unet: unet.half(), "float16"),
    ],
)
def test_modules_that_no_graph_can_replace(change: Callable[[Any], Any], reason: str) -> None:
    unet = tiny.stable_diffusion().unet.eval()
    assert module_state.why_unserved(unet) == ""
    change(unet)
    assert reason in module_state.why_unserved(unet)


@pytest.mark.parametrize(
    "change",
    [
        lambda unet: unet.conv_in.weight.mul_(2),
        lambda unet: unet.set_attn_processor(type(next(iter(unet.attn_processors.values())))()),
        lambda unet: setattr(unet, "conv_in", torch.nn.Conv2d(4, 32, 3, padding=1)),
    ],
)
def test_a_module_that_changes_is_noticed(change: Callable[[Any], Any]) -> None:
    unet = tiny.stable_diffusion().unet.eval()
    before = module_state.state_of(unet)
    assert module_state.state_of(unet) == before
    with torch.no_grad():
        change(unet)
    assert module_state.state_of(unet) != before


def test_like_tells_of_another_runner(caplog: pytest.LogCaptureFixture) -> None:
    made = Recipe(
        model="m", source="m", pipeline="P", prompt="", seed=1, sampling=Sampling(), image_sha256=(), mask_sha256=None,
        device="cpu", dtype="fp32", runner="openvino-fp32",
    )  # fmt: skip
    _warn_of_differences(made, replace(made, runner="eager"))
    assert "runner was 'openvino-fp32', now it is 'eager'" in caplog.text
    caplog.clear()
    _warn_of_differences(replace(made, runner=""), replace(made, runner="eager"))  # of an earlier version
    assert not caplog.text


def test_diffusers_empty_registry_of_hooks_is_none() -> None:
    transformer = tiny.flux().transformer.eval()
    with transformer.cache_context("cond"):
        pass
    assert module_state.why_unserved(transformer) == ""


def test_calls_of_one_structure(model: Loaded) -> None:
    """However a scheduler writes its time, and with or without arguments that have their default value."""
    unet = model.pipeline.unet
    text = torch.randn(2, 77, 32)
    sample = torch.randn(2, 4, 8, 8)
    structures = {
        arguments.read(unet, args, kwargs).structure
        for args, kwargs in (
            ((sample, 5, text), {}),
            ((sample, torch.tensor(5)), {"encoder_hidden_states": text, "return_dict": False}),
            ((sample[:1], torch.tensor([5.0])), {"encoder_hidden_states": text[:1], "cross_attention_kwargs": None}),
            ((sample.bfloat16(), torch.tensor([5, 6]), text.bfloat16()), {"added_cond_kwargs": None}),
        )
    }
    assert len(structures) == 1
    other = arguments.read(unet, (sample, 5, text), {"cross_attention_kwargs": {"scale": 0.5}})
    assert other.structure not in structures


def test_calls_with_inputs_of_other_networks_are_not_served(model: Loaded) -> None:
    unet = model.pipeline.unet
    for extra in (
        {"down_block_additional_residuals": (torch.zeros(1),)},
        {"mid_block_additional_residual": torch.zeros(1)},
        {"down_intrablock_additional_residuals": [torch.zeros(1)]},
        {"cross_attention_kwargs": {"cache": object()}},
    ):
        with pytest.raises(Unserved):
            arguments.read(unet, (torch.randn(1, 4, 8, 8), 5, torch.randn(1, 77, 32)), extra)


def test_the_oldest_graphs_leave(tmp_path: Path) -> None:
    for number in range(kept.MAX_KEPT + 2):
        (tmp_path / str(number)).mkdir()
        os.utime(tmp_path / str(number), (number, number))
    (tmp_path / "new").mkdir()
    for name, written in ((".part-ended", 0.0), (".part-now", time.time())):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (written, written))
    kept.touch(tmp_path / "new")
    (tmp_path / ".part-now").rmdir()  # another process still writes it
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(["new", *map(str, range(3, kept.MAX_KEPT + 2))])


# With it.


@needs_openvino
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_gives_the_numbers_of_its_module_at_every_size_and_batch(dtype: torch.dtype, folder: Path) -> None:
    unet = tiny.stable_diffusion().unet.eval().to(dtype)
    full = tiny.stable_diffusion().unet.eval()
    full.load_state_dict({name: value.float() for name, value in unet.state_dict().items()})
    runner = runner_of(unet, folder)
    for rows, side, step in ((2, 8, 981), (1, 8, 3), (4, 16, 500), (2, 12, 981)):
        asked = call(unet, rows, side, timestep=torch.tensor(step))
        asked = {name: value.to(dtype) if name in ("sample", "encoder_hidden_states") else value
                 for name, value in asked.items()}  # fmt: skip
        assert runner.prepare("__call__", (), asked, wait=True)
        with torch.no_grad():
            (by_graph,), name = runner.run("__call__", (), asked)
            (own,) = unet(**asked)
            (exact,) = full(**{**asked, "sample": asked["sample"].float(),
                               "encoder_hidden_states": asked["encoder_hidden_states"].float()})  # fmt: skip
        assert name.startswith("openvino-")
        assert by_graph.dtype == own.dtype
        if dtype is torch.float32:
            assert (by_graph - own).abs().max() <= 1e-5 * own.abs().max()
            continue
        # In half precision no further from full precision than the module itself is.
        distance = [float((each.float() - exact).pow(2).mean()) ** 0.5 for each in (by_graph, own)]
        assert distance[0] <= 1.1 * distance[1]


@needs_openvino
def test_a_module_that_keeps_what_it_computes_for_a_size_stays_as_it_is(tmp_path: Path) -> None:
    """Qwen-Image keeps the positions of each size. Each size is a kind of calls of its own there: two have graphs."""
    module = families_transformers.qwen_image().transformer
    runner = runner_of(module, tmp_path)
    for height in (4, 6, 8, 10):
        torch.manual_seed(height)
        asked = {
            "hidden_states": torch.randn(1, height * 4, 16), "encoder_hidden_states": torch.randn(1, 7, 32),
            "encoder_hidden_states_mask": torch.ones(1, 7).long(), "timestep": torch.tensor([0.5]),
            "img_shapes": [[(1, height, 4)]], "return_dict": False,
        }  # fmt: skip
        with torch.no_grad():
            assert runner.prepare("__call__", (), asked, wait=True)
            (output,), _ = runner.run("__call__", (), asked)
            torch.testing.assert_close(output, module(**asked)[0], atol=1e-4, rtol=1e-3)
    assert runner.state("transformer").detail.count("at most 2 kinds of calls") == 1
    assert len(runner._structures) == 2


@needs_openvino
def test_a_size_that_tracing_took_for_a_constant_is_computed_by_the_module(model: Loaded, tmp_path: Path) -> None:
    """A side of nine latents is halved with a rest, and the traced module had none: its graph is wrong there."""
    unet = model.pipeline.unet
    runner = runner_of(unet, tmp_path)
    runner.prepare("__call__", (), call(unet), wait=True)
    odd = call(unet, 1, 9)
    with torch.no_grad():
        (own,) = unet(**odd)
        for each in (runner, runner, runner_of(unet, tmp_path)):  # also in the next process
            each.prepare("__call__", (), odd, wait=True)
            (value,), name = each.run("__call__", (), odd)
            assert name == "eager"
            assert torch.equal(value, own)
        assert runner.run("__call__", (), call(unet))[1] == "openvino-fp32"
    assert runner.state("unet").detail == "1 size is computed without it"


@needs_openvino
def test_pictures_are_the_same_and_the_recipe_says_what_drew(model: Loaded, folder: Path) -> None:
    runners = Runners("eager", folder)
    for asked in (wanted(**SIZE), wanted(**SIZE, guidance_scale=1.0), wanted(width=96, height=64, seed=5)):
        plain, fast = draw(model, asked, quiet), drawn(model, runners, asked)
        assert (plain.recipe.runner, fast.recipe.runner) == ("eager", "openvino-fp32")
        assert psnr(pixels(plain), pixels(fast)) > 45
        assert fast.file == drawn(model, runners, asked).file  # to the pixel
    states = runners.states(model.computing(), model.state.runners, "openvino")
    assert states == tuple(RunnerState(name, "openvino-fp32") for name in MODULES)


@needs_openvino
def test_the_module_is_not_changed(model: Loaded, folder: Path) -> None:
    pipeline = tiny.stable_diffusion()
    before = module_state.state_of(pipeline.unet.eval())
    weights = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    drawn(loaded(pipeline, **SIZE), Runners("eager", folder / "unchanged"), wanted(**SIZE))
    assert module_state.state_of(pipeline.unet) == before
    assert all(torch.equal(weights[name], value) for name, value in pipeline.unet.state_dict().items())


@needs_openvino
def test_a_kept_graph_is_not_converted_again(model: Loaded, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn(model, Runners("eager", folder), wanted(**SIZE))

    def refused(*args: Any) -> None:
        raise RuntimeError("converted again")

    monkeypatch.setattr(graph, "convert", refused)
    again = loaded(tiny.stable_diffusion(), **SIZE)  # the next process, with the same weights
    assert drawn(again, Runners("eager", folder), wanted(**SIZE)).recipe.runner == "openvino-fp32"
    other = tiny.stable_diffusion()
    with torch.no_grad():
        other.unet.conv_in.weight.mul_(2)
    done = drawn(loaded(other, **SIZE), Runners("eager", folder), wanted(**SIZE))
    # other weights are converted: here that failed
    assert done.recipe.runner == "text_encoder openvino-fp32, unet eager, vae openvino-fp32"


@needs_openvino
def test_an_error_of_a_graph_is_answered_by_the_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, runners = loaded(tiny.stable_diffusion(), **SIZE), Runners("eager", folder)
    plain = draw(model, wanted(**SIZE), quiet)
    drawn(model, runners, wanted(**SIZE))

    def broken(self: Any, tensors: Any) -> Any:
        raise RuntimeError("no more memory")

    monkeypatch.setattr(graph.Graph, "run", broken)
    assert np.array_equal(pixels(drawn(model, runners, wanted(**SIZE))), pixels(plain))
    for state in runners.states(model.computing(), model.state.runners, "openvino"):
        assert state.runner == "eager"
        assert "no more memory" in state.detail
        assert not [block for block in model.blocks() if block[1] == id(model.state.runners[state.module])]


@needs_openvino
def test_a_damaged_graph_is_answered_by_the_module(tmp_path: Path) -> None:
    model = loaded(tiny.stable_diffusion(), **SIZE)
    drawn(model, Runners("eager", tmp_path), wanted(**SIZE))
    for file in tmp_path.glob("*/" + graph.GRAPH):
        file.write_text("<nothing/>")
    again = loaded(tiny.stable_diffusion(), **SIZE)
    assert drawn(again, Runners("eager", tmp_path), wanted(**SIZE)).recipe.runner == "eager"
    assert "no graph of it" in again.state.runners["unet"].state("unet").detail


@needs_openvino
def test_a_changed_module_is_computed_by_itself(folder: Path) -> None:
    model, runners = loaded(tiny.stable_diffusion(), **SIZE), Runners("eager", folder)
    drawn(model, runners, wanted(**SIZE))
    with torch.no_grad():
        model.pipeline.unet.conv_in.weight.mul_(1.5)
    done = drawn(model, runners, wanted(**SIZE))
    assert "unet eager" in done.recipe.runner
    assert psnr(pixels(done), pixels(draw(model, wanted(**SIZE), quiet))) > 45


@needs_openvino
def test_the_copy_counts_and_is_freed_with_the_model(folder: Path) -> None:
    model, runners = loaded(tiny.stable_diffusion(), **SIZE), Runners("eager", folder)
    before = sum(model.blocks().values())
    drawn(model, runners, wanted(**SIZE))
    assert sum(model.blocks().values()) - before == sum(each.bytes for each in model.state.runners.values())
    assert all(each.bytes for each in model.state.runners.values())
    made = weakref.ref(model.state.runners["unet"])
    del model
    gc.collect()
    assert made() is None
    assert not runners._shared


@needs_openvino
def test_requests_together_get_what_they_get_alone(repository: Path, folder: Path, tmp_path: Path) -> None:
    """Through the engine: prepared in the background while its requests wait, then batched."""
    config = here.config(tmp_path, repository, accelerate="openvino")
    asked = [here.asked(id=str(number), seed=number, steps=3 + number, guidance_scale=2.0 + number)
             for number in range(3)]  # fmt: skip

    async def draw_all() -> tuple[list[Done], list[Done], Any, Any]:
        engine = Local(Settings(device="cpu", data=tmp_path, runners=str(folder)))
        await engine.start()
        try:
            first = await one(engine, config, asked[0])
            alone = [first, *[await one(engine, config, each) for each in asked[1:]]]
            before = engine.stats
            with posted_together(engine, len(asked)):
                together = await asyncio.gather(
                    *(one(engine, config, replace(each, id=f"t{each.id}")) for each in asked)
                )
            return alone, together, before, (engine.stats, engine.status("m").info)
        finally:
            await engine.stop()

    alone, together, before, (after, info) = asyncio.run(draw_all())
    for one_alone, one_together in zip(alone, together, strict=True):
        assert one_together.recipe.runner == one_alone.recipe.runner == "openvino-fp32"
        assert np.abs(pixels(one_alone) - pixels(one_together)).max() <= 1
    assert any(after.batch_sizes.get(size, 0) > before.batch_sizes.get(size, 0) for size in (2, 3))
    assert info.runners == tuple(RunnerState(name, "openvino-fp32") for name in MODULES)


async def one(engine: Local, config: ModelConfig, generation: Generation) -> Done:
    async for event in engine.submit(config, generation):
        last = event
    assert isinstance(last, Done), last
    return last


@needs_openvino
def test_a_request_that_is_cancelled_while_its_graph_is_made(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    convert = graph.convert

    def held(*args: Any) -> None:
        begun.set()
        assert go_on.wait(60)
        convert(*args)

    monkeypatch.setattr(graph, "convert", held)
    config = here.config(tmp_path, repository, accelerate="openvino")

    async def run() -> tuple[Done, Done]:
        engine = Local(Settings(device="cpu", data=tmp_path))
        await engine.start()
        try:
            waiting = asyncio.create_task(one(engine, config, here.asked(id="waiting")))
            await asyncio.to_thread(begun.wait, 60)
            other = await one(engine, replace(config, accelerate="eager"), here.asked(id="other"))
            waiting.cancel()
            with suppress(asyncio.CancelledError):
                await waiting
            go_on.set()
            return other, await one(engine, config, here.asked(id="next"))
        finally:
            go_on.set()
            await engine.stop()

    other, following = asyncio.run(run())
    assert (other.recipe.runner, following.recipe.runner) == ("eager", "openvino-fp32")


@needs_openvino
def test_nothing_is_sent_to_the_makers_of_the_library() -> None:
    graph.library()
    assert sys.modules["openvino_telemetry"] is None

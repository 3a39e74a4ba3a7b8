"""`accelerate: auto`: runners are compared on this machine, and the faster one computes."""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sfumato.commands.models import table
from sfumato.core import Done
from sfumato.drawing.draw import draw
from sfumato.engine import loop
from sfumato.engine.local import Local
from sfumato.models.load import Loaded
from sfumato.runners import auto as auto_runner
from sfumato.runners import graph, measured, measuring, recorded
from sfumato.runners.auto import Auto
from sfumato.runners.choice import Runners
from sfumato.runners.measured import Measured, Measurements
from sfumato.runners.measuring import Sample
from sfumato.serving.catalog import Catalog
from sfumato.settings import Settings
from sfumato.status import RunnerState
from support import here, tiny
from support.drawing import loaded, quiet, wanted

needs_openvino = pytest.mark.skipif(not graph.installed(), reason="the package openvino is not installed")

SIZE = {"width": 64, "height": 64}


def drawn(model: Loaded, runners: Runners, recipe: str = "", **fields: Any) -> Done:
    """A request of its own, under `auto`."""
    chosen = runners.of(model.computing(), model.state.runners, "auto", 1, recipe)
    return draw(model, wanted(**{**SIZE, **fields}), quiet, None, chosen)


def measure(runners: Runners) -> None:
    """What an idle server does."""
    while runners.due:
        with torch.no_grad():
            runners.measure()
        while runners.preparing:
            pass


@pytest.fixture(params=[2.0])
def ratio(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    """So many of a candidate's forward passes take as long as one of the module, whatever this machine is doing."""
    seconds = itertools.cycle((request.param, 1.0))

    def taken(compute: Any, device: Any) -> float:
        compute()
        return float(next(seconds))

    monkeypatch.setattr(measuring, "_seconds", taken)
    yield request.param


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where graphs are kept: each module is converted once."""
    return tmp_path_factory.mktemp("runners")


@pytest.fixture
def folder(graphs: Path) -> Path:
    """The same, before anything was measured."""
    (graphs / measured.FILE).unlink(missing_ok=True)
    return graphs


@needs_openvino
def test_the_faster_runner_computes_what_begins_after_it_was_measured(ratio: float, folder: Path) -> None:
    model, runners = loaded(tiny.stable_diffusion(), **SIZE), Runners("eager", folder)
    before = runners.of(model.computing(), model.state.runners, "auto", 1)
    assert drawn(model, runners).recipe.runner == "eager"
    measure(runners)
    assert not runners.due
    # One that had begun keeps what it began with.
    assert draw(model, wanted(**SIZE), quiet, None, before).recipe.runner == "eager"
    fast = drawn(model, runners)
    assert fast.recipe.runner == "openvino-fp32"
    for state in runners.states(model.computing(), model.state.runners, "auto"):
        assert state.runner == "openvino-fp32"
        assert state.detail.startswith("2.00 times eager at ")
        assert state.detail.endswith(f"measured {measured.today()}")
    # The next process measures nothing, and draws the same.
    again, later = loaded(tiny.stable_diffusion(), **SIZE), Runners("eager", folder)
    assert drawn(again, later).file == fast.file
    assert not later.due
    # What a recipe says, it draws with.
    assert drawn(again, later, recipe="eager").recipe.runner == "eager"
    mixed = "text_encoder eager, unet openvino-fp32, vae eager"
    assert drawn(again, later, recipe=mixed).recipe.runner == mixed
    # Another size is measured by itself, and eager until then.
    assert "unet eager" in drawn(again, later, width=128, height=128).recipe.runner
    assert later.due


@needs_openvino
@pytest.mark.parametrize("ratio", [1.04], indirect=True)
def test_a_runner_that_is_hardly_faster_is_not_kept(ratio: float, tmp_path: Path) -> None:
    model, runners = loaded(tiny.stable_diffusion(), **SIZE), Runners("eager", tmp_path)
    before, vae = model.blocks(), {"vae": model.pipeline.vae}
    for _ in range(2):
        chosen = runners.of(vae, model.state.runners, "auto", 1)
        assert draw(model, wanted(**SIZE), quiet, None, chosen).recipe.runner == "eager"
        measure(runners)
        assert model.blocks() == before
        assert [path.name for path in tmp_path.iterdir()] == [measured.FILE]
    (state,) = runners.states(vae, model.state.runners, "auto")
    assert state.runner == "eager"
    assert state.detail.startswith("openvino 1.04 times eager at ")


@needs_openvino
def test_what_no_runner_computes_is_told(tmp_path: Path) -> None:
    model, runners = loaded(tiny.stable_diffusion(), **SIZE), Runners("eager", tmp_path)
    model.pipeline.unet.half()
    runners.of(model.computing(), model.state.runners, "auto", 1)
    assert runners.states(model.computing(), model.state.runners, "auto")[0] == RunnerState(
        "unet", "eager", "its weights are float16"
    )
    assert not runners.due


@needs_openvino
def test_nothing_is_prepared_where_it_would_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "MEMORY", 1e9)
    model, runners = loaded(tiny.stable_diffusion(), **SIZE), Runners("eager", tmp_path)
    drawn(model, runners)
    measure(runners)
    assert not list(tmp_path.iterdir())
    drawn(model, runners)
    assert runners.due  # there may be room later


class Trying:
    """A candidate that computes with the module, or fails."""

    name, bytes, folders, number, busy = "trying", 0, (), 0, False

    def __init__(self, module: Any, fails: Exception | None = None, out_of_memory: bool = False) -> None:
        self.module, self.fails, self.out_of_memory = module, fails, out_of_memory

    def prepare(self, method: str, args: Any, kwargs: Any, *, wait: bool = False) -> bool:
        return True

    def serves(self, method: str, args: Any, kwargs: Any) -> bool:
        return True

    def run(self, method: str, args: Any, kwargs: Any) -> Any:
        if self.fails:
            raise self.fails
        return self.module(*args, **kwargs), "eager" if self.out_of_memory else self.name

    def for_request(self) -> Any:
        return self

    def state(self, module: str) -> RunnerState:
        return RunnerState(module, self.name)


def asked(rows: int = 1, side: int = 8) -> dict[str, Any]:
    return {"sample": torch.randn(rows, 4, side, side), "timestep": torch.tensor(5),
            "encoder_hidden_states": torch.randn(rows, 77, 32), "return_dict": False}  # fmt: skip


def noted(auto: Auto, **call: Any) -> Auto:
    """A request makes such a call."""
    chosen = auto.for_request()
    assert chosen
    chosen.prepare("__call__", (), call)
    return auto


@pytest.mark.parametrize(
    ("failure", "again_now"),
    [
        ({"fails": torch.OutOfMemoryError("CUDA out of memory")}, True),
        ({"out_of_memory": True}, True),  # while it was prepared
        ({"fails": RuntimeError("a driver was busy")}, False),
    ],
)
@torch.no_grad()
def test_a_failure_that_may_pass_is_not_kept(failure: dict[str, Any], again_now: bool, tmp_path: Path) -> None:
    unet = tiny.stable_diffusion().unet.eval()
    makes: list[Trying] = []

    def made() -> Trying:
        makes.append(Trying(unet, **failure))
        return makes[-1]

    auto = noted(Auto(unet, 1, {"compile": made}, Measurements(tmp_path)), **asked())
    while auto.due:
        auto.measure()
    assert noted(auto, **asked()).due is again_now
    while auto.due:
        auto.measure()
    assert len(makes) == 1 + again_now  # what could not be prepared is made anew
    assert noted(Auto(unet, 1, {"compile": made}, Measurements(tmp_path)), **asked()).due


@torch.no_grad()
def test_a_candidate_is_kept_while_sizes_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_seconds", lambda compute, *_: compute() or 1.0)
    unet = tiny.stable_diffusion().unet.eval()
    makes: list[Trying] = []

    def made() -> Trying:
        makes.append(Trying(unet))
        return makes[-1]

    auto = noted(noted(Auto(unet, 1, {"compile": made}, Measurements(tmp_path)), **asked()), **asked(side=16))
    while auto.due:
        auto.measure()
    assert len(makes) == 1
    assert auto._made == {}


class OnGpu(torch.nn.Module):
    """One that says so, on a machine without any."""

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        yield SimpleNamespace(device=torch.device("cuda", 1), numel=lambda: 1)


def test_time_on_a_gpu_ends_when_it_has_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[Any] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", happened.append)
    module = OnGpu()
    module.forward = lambda: happened.append("module")
    candidate = Trying(lambda: happened.append("candidate"))
    trial = measuring.compared(weakref.ref(module), Sample("8", "__call__", (), {}), {"compile": candidate})
    assert all(trial)
    device = torch.device("cuda", 1)
    module_and_candidate = [device, "module", device, device, "candidate", device]
    assert happened == ["candidate", "module", *measuring.ROUNDS * module_and_candidate]


def test_another_gpu_measures_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert auto_runner._told(torch.device("cuda", 1)) == "cuda:1 GPU 1"
    assert auto_runner._told(torch.device("cpu")) == "cpu"


def test_without_a_runner_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "installed", lambda: False)
    model, runners = loaded(tiny.stable_diffusion(), **SIZE), Runners("auto", tmp_path)
    assert drawn(model, runners).recipe.runner == "eager"
    assert not runners.due
    states = runners.states(model.computing(), model.state.runners, None)
    assert {(state.runner, state.detail) for state in states} == {("eager", "no other runner is installed")}


def test_recipes_name_runners_and_are_read() -> None:
    for computed_by, told, read in (
        ({}, "eager", {"": "eager"}),
        ({"unet": {"openvino-bf16"}, "vae": {"openvino-bf16"}}, "openvino-bf16", {"": "openvino"}),
        ({"vae": {"eager"}, "unet": {"openvino-bf16"}}, "unet openvino-bf16, vae eager",
         {"unet": "openvino", "vae": "eager"}),
        ({"unet": {"eager", "openvino-fp32"}}, "eager+openvino-fp32", {"": "openvino"}),
    ):  # fmt: skip
        assert recorded.told(computed_by) == told
        assert recorded.read(told) == read
    assert recorded.read("") == {}


@pytest.mark.parametrize(
    "content", ["", "[]", '{"%s": {"a": {"b": 1}}}', '{"%s": 1}', '{"%s": {"a": {"b": {"c": 1}}}}']
)
def test_a_damaged_file_of_measurements_is_an_empty_one(content: str, tmp_path: Path) -> None:
    (tmp_path / measured.FILE).write_text(content.replace("%s", measured.machine.key()))
    measurements = Measurements(tmp_path)
    assert measurements.of("a") == {}
    assert measurements.states("m") == ()
    measurements.put("a", "8", Measured("8x8", {"openvino": 2.0}))
    assert measurements.of("a")["8"].chosen == "openvino"


def test_another_machine_measures_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Measurements(tmp_path).put("a", "8", Measured("8x8", {"openvino": 2.0}))
    monkeypatch.setattr(measured.machine, "key", lambda: "other")
    assert Measurements(tmp_path).of("a") == {}


@needs_openvino
def test_an_idle_server_measures_and_tells(
    ratio: float, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "QUIET_S", 0.0)
    repository = tiny.save(tiny.stable_diffusion(), tmp_path / "models" / "m")
    config = here.config(tmp_path, repository, accelerate="auto")
    settings = Settings(device="cpu", data=tmp_path, models=tmp_path / "models", runners=str(folder))

    async def run() -> tuple[str, str, tuple[RunnerState, ...]]:
        engine = Local(settings)
        await engine.start()
        try:
            first = await one(engine, config, here.asked(id="1"))
            while any("measured 2" not in state.detail for state in runners_of(engine)):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            last = await one(engine, config, here.asked(id="2"))
            return first, last, runners_of(engine)
        finally:
            await engine.stop()

    async def one(engine: Local, config: Any, generation: Any) -> str:
        async for event in engine.submit(config, generation):
            last = event
        assert isinstance(last, Done), last
        return last.recipe.runner

    def runners_of(engine: Local) -> tuple[RunnerState, ...]:
        info = engine.status("m").info
        assert info
        return info.runners

    first, last, states = asyncio.run(asyncio.wait_for(run(), 300))
    assert (first, last) == ("eager", "openvino-fp32")
    assert {state.runner for state in states} == {"openvino-fp32"}
    (settings.models / "m.yaml").write_text("name: m\naccelerate: auto\nparameters: {model: m}\n")
    line = list(table(Catalog([settings.models]), settings))[1]
    assert "auto (unet openvino-fp32: 2.00 times eager at 8x8, measured 2" in line
    line = list(table(Catalog([settings.models]), replace(settings, runners=str(tmp_path / "none"))))[1]
    assert "auto (nothing was measured yet)" in line

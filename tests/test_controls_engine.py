"""ControlNets that requests name, in the engine: shared, within the budget, unloaded when idle, fetched from a hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfumato.config import ModelConfig
from sfumato.core import Control, Done, Failed, Generation, Step
from sfumato.engine.loop import Loop
from sfumato.engine.protocol import Answer, Cancel, Stop, Submit
from sfumato.pictures.images import decoded
from sfumato.sampling import nested
from sfumato.settings import Settings
from support import nets, tiny
from support.drawing import source
from support.hub import Hub

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and transformers' own, some about toy sizes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model and its ControlNets."""
    folder = tmp_path_factory.mktemp("models")
    tiny.save(nets.plain("sd"), folder / "base")
    nets.save_nets(folder, "sd")
    return folder


class Engine:
    """A loop in this thread; `then` may post more at each answer."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.sent: list[Any] = []
        self.config = ModelConfig(name="m", model=str(folder / "base"), folder=folder, dtype="fp32", cuda=False)
        self.loop = Loop(Settings(device="cpu", log_level="error", data=folder / "data", **settings), self.sent.append)

    def draw(self, *generations: Generation) -> dict[str, Any]:
        """The last event of each."""
        self.loop._stopping = False
        for generation in generations:
            self.loop.post(Submit(self.config, generation))
        self.loop.post(Stop())
        self.loop.run()
        return {each.id: each.event for each in self.sent if isinstance(each, Answer)}

    @property
    def in_memory(self) -> set[str]:
        return {name.partition(" ")[0] for name in self.loop._pool.sizes}


def pixels(event: Any) -> Any:
    assert isinstance(event, Done), event
    return np.asarray(decoded(event.png)).astype(int)


def requested(id: str, *names: str, **fields: Any) -> Generation:
    controls = tuple(Control(source(64, 64), name=name) for name in names)
    values = {"id": id, "prompt": f"a cat {id}", "seed": 1, "steps": 4, "width": 64, "height": 64, "controls": controls}
    return Generation(**nested({**values, **fields}))


def test_requests_share_one_net_and_its_forward_passes(folder: Path) -> None:
    engine = Engine(folder, max_batch=16)
    engine.draw(requested("first", "sd/canny", "sd/depth"))  # then nothing waits for a load
    wanted = [requested(f"{n}", "sd/canny", "sd/depth") if n % 2 else requested(f"{n}") for n in range(6)]
    events = engine.draw(*wanted)
    sizes = engine.loop._batcher.counts.batch_sizes
    assert max(calls for name, calls in sizes if name == "controlnet") == 3
    assert max(calls for name, calls in sizes if name == "unet") == 3
    assert max(calls for name, calls in sizes if name == "text_encoder") == 6  # with the plain ones
    stats, again = engine.loop._stats.stats(), requested("5", "sd/canny", "sd/depth")
    assert stats.prompt_hits + stats.prompt_misses > 0
    assert stats.prompt_cache_bytes > 0
    engine.draw(again)
    later = engine.loop._stats.stats()
    assert (later.prompt_misses, later.prompt_hits > stats.prompt_hits) == (stats.prompt_misses, True)
    for each in (wanted[1], wanted[2]):
        alone = Engine(folder, max_batch=1).draw(each)[each.id]
        assert np.abs(pixels(alone) - pixels(events[each.id])).max() <= 1
    assert engine.in_memory == {"m", "controlnets/sd/canny", "controlnets/sd/depth"}
    assert (len(engine.loop._pool), engine.loop._pool.loads) == (1, 1)


def test_an_idle_net_leaves_when_another_needs_the_memory(folder: Path) -> None:
    sizes = Engine(folder)
    sizes.draw(requested("1", "sd/canny"))
    of_model, of_net = (sizes.loop._pool.sizes[name] for name in sorted(sizes.loop._pool.sizes, reverse=True))
    engine = Engine(folder, max_active=1)
    engine.loop._pool._budget.size = of_model + of_net + of_net // 2
    events = engine.draw(requested("1", "sd/canny"), requested("2", "sd/depth"))
    assert all(isinstance(event, Done) for event in events.values()), events
    assert engine.in_memory == {"m", "controlnets/sd/depth"}
    too_small = Engine(folder)
    too_small.loop._pool._budget.size = of_model + of_net + of_net // 2
    refused = too_small.draw(requested("1", "sd/canny", "sd/depth"), requested("2"))
    assert isinstance(refused["1"], Failed)
    assert (refused["1"].error.status, refused["1"].error.param) == (429, "controls[1].name")
    assert isinstance(refused["2"], Done)


def test_a_net_leaves_when_it_is_idle_and_when_all_is_unloaded(folder: Path) -> None:
    engine = Engine(folder)
    engine.draw(requested("1", "sd/canny", keep_alive=0.0))
    engine.loop._pool.tend()
    assert engine.in_memory == set()
    engine = Engine(folder)
    engine.draw(requested("1", "sd/canny"))
    engine.loop._pool.unload(None)
    assert engine.in_memory == set()


def test_a_request_that_is_cancelled_or_fails_leaves_the_model_as_it_was(folder: Path) -> None:
    plain = pixels(Engine(folder).draw(requested("1"))["1"])
    engine = Engine(folder)
    original = engine.sent.append

    def send(report: Any) -> None:
        original(report)
        if isinstance(report, Answer) and isinstance(report.event, Step) and report.id == "2":
            engine.loop._handle(Cancel("2"))

    engine.loop._send = send
    failing = requested("3", "sd/canny", clip_skip=60)
    events = engine.draw(requested("2", "sd/canny"), failing, requested("1"))
    assert [type(events[id]) for id in "23"] == [Failed, Failed]
    assert np.abs(pixels(events["1"]) - plain).max() <= 1
    model = engine.loop._pool._loaded["m"].pipeline
    assert not hasattr(model, "controlnet")
    assert type(model).__name__ == "StableDiffusionPipeline"
    assert not engine.loop._pool._users["m"]


def test_a_net_of_a_hub_is_fetched_once(folder: Path, here: Hub, tmp_path: Path) -> None:
    shutil.copytree(folder / "controlnets" / "sd" / "canny", tmp_path / "net")
    (tmp_path / "net" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    here.add("some/net", tmp_path / "net")
    events = Engine(folder).draw(requested("1", "some/net"))
    local = Engine(folder).draw(requested("1", "sd/canny"))
    assert np.array_equal(pixels(events["1"]), pixels(local["1"]))
    assert "diffusion_pytorch_model.bin" not in here.downloads("some/net")
    before = here.downloads("some/net")
    assert isinstance(Engine(folder).draw(requested("1", "some/net@main"))["1"], Done)
    assert here.downloads("some/net") == before
    missing = Engine(folder).draw(requested("1", "some/other"))["1"]
    assert (missing.error.status, missing.error.param) == (400, "controls[0].name")
    assert "In controlnets/ there are sd/canny, sd/depth" in missing.error.message

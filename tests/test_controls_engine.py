"""ControlNets that requests name, in the engine: shared, within the budget, unloaded when idle, fetched from a hub."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest

from sfumato.checkpoints.remote_limits import Limits
from sfumato.core import Done, Failed
from sfumato.errors import DownloadError
from sfumato.models.controlnets import config_of as net_config
from sfumato.models.footprint import in_words
from support.control_engine import requested, save
from support.engines import Engine, pixels
from support.hub import Hub

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and transformers' own, some about toy sizes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model and its ControlNets."""
    return save(tmp_path_factory.mktemp("models"))


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
    engine.cancel_at_its_first_step("2")
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


def test_without_a_hub_the_error_names_the_folder_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a slip of the keyboard made a hub id of a name in the folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    failed = Engine(folder).draw(requested("1", "sd/cany"))["1"]
    assert isinstance(failed.error, DownloadError)
    assert failed.error.param == "controls[0].name"
    assert "sd/cany" in failed.error.message
    assert "In controlnets/ there are sd/canny, sd/depth" in failed.error.message


def test_all_requests_take_their_nets_in_one_order_and_each_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two could hold one each, and wait for the other's, which broke and is read again when nobody has it."""
    engine = Engine(folder)
    pool, taken = engine.loop._pool, list[str]()
    use = pool.use

    def recorded(config: Any, *others: Any, **named: Any) -> Any:
        taken.append(config.name.partition(" ")[0])
        return use(config, *others, **named)

    monkeypatch.setattr(pool, "use", recorded)
    for names in (("sd/canny", "sd/depth"), ("sd/depth", "sd/canny"), ("sd/depth", "sd/canny", "sd/depth")):
        taken.clear()
        assert isinstance(engine.draw(requested("1", *names))["1"], Done)
        assert taken == ["m", "controlnets/sd/canny", "controlnets/sd/depth"]


def test_nets_that_broke_in_both_are_read_again(folder: Path) -> None:
    engine = Engine(folder)
    first = engine.draw(requested("1", "sd/canny", "sd/depth"))["1"]
    nets = {name: model for name, model in engine.loop._pool._loaded.items() if name != "m"}
    for model in nets.values():
        model.state.broken = "for the test"
    again = [requested("2", "sd/canny", "sd/depth"), requested("3", "sd/depth", "sd/canny")]
    events = engine.draw(*[replace(each, prompt="a cat 1") for each in again])
    assert np.abs(pixels(events["2"]) - pixels(first)).max() <= 1
    assert isinstance(events["3"], Done)
    assert all(engine.loop._pool._loaded[name] is not model for name, model in nets.items())


def test_nets_that_can_never_fit_beside_their_model_are_refused_for_good(folder: Path) -> None:
    sizes = Engine(folder)
    sizes.draw(requested("1", "sd/canny"))
    of_model, of_net = (sizes.loop._pool.sizes[name] for name in sorted(sizes.loop._pool.sizes, reverse=True))
    for room, names, at in ((of_net // 2, ["sd/canny"], 0), (of_net + of_net // 2, ["sd/canny", "sd/depth"], 1)):
        engine = Engine(folder)
        engine.loop._pool._budget.size = of_model + room
        events = engine.draw(requested("1", *names), requested("2"))
        refused = events["1"].error
        assert (refused.status, refused.retry, refused.param) == (507, False, f"controls[{at}].name")
        assert in_words(of_model + room) in refused.message
        assert isinstance(events["2"], Done)


def test_a_net_that_has_no_room_beside_other_models_in_use_may_be_asked_for_again(folder: Path) -> None:
    engine = Engine(folder)
    engine.draw(requested("1", "sd/canny"))
    of_model, of_net = (engine.loop._pool.sizes[name] for name in sorted(engine.loop._pool.sizes, reverse=True))
    engine = Engine(folder)
    pool = engine.loop._pool
    pool._budget.size = of_model + of_net + of_net // 2
    with ExitStack() as held:
        model = held.enter_context(pool.use(engine.config, lambda: time.sleep(0.01)))
        depth = net_config(model, "sd/depth", "x")
        held.enter_context(pool.use(depth, lambda: time.sleep(0.01)))
        refused = engine.draw(requested("2", "sd/canny"))["2"].error
        assert (refused.status, refused.retry) == (429, True)
    assert isinstance(engine.draw(requested("3", "sd/canny"))["3"], Done)


def test_a_net_that_is_too_large_to_be_fetched_is_refused(folder: Path, here: Hub) -> None:
    here.add("some/large", folder / "controlnets" / "sd" / "canny")
    engine = Engine(folder)
    engine.loop._pool._part_limits = Limits(bytes=1000, setting="max_net_mb")
    refused = engine.draw(requested("1", "some/large"))["1"]
    assert (refused.error.status, refused.error.param) == (400, "controls[0].name")
    assert "the setting max_net_mb" in refused.error.message
    assert not here.downloads("some/large")

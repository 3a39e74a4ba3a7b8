"""`threads` of a model file is the model's: its neighbours compute with their own, whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.batching.batcher import Batcher
from sfumato.batching.verification import Verification
from sfumato.batching.views import View, view
from sfumato.core import Done, Failed, Step
from sfumato.engine.protocol import Cancel, Stop
from support.played import Ended, Played, guided, saved

OWN = 1
"""Threads of this process here: no model's number. More are slow where others compute beside these tests."""


@pytest.fixture(autouse=True)
def of_the_process() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(OWN)
    yield
    assert torch.get_num_threads() == OWN
    torch.set_num_threads(before)


class Noting(torch.nn.Module):
    """Notes how many threads it may use, and raises at 666."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()), requires_grad=False)
        self.seen: list[tuple[int, int]] = []

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        self.seen.append((len(sample), torch.get_num_threads()))
        if (sample == 666).any():
            raise ValueError("poison")
        return sample * self.weight


def run(batcher: Batcher) -> None:
    with torch.no_grad():
        while batcher.step():
            assert torch.get_num_threads() == OWN


def calling(module: Any, times: int = 4, value: float = 0.0) -> Any:
    stand_in = View("").stand_in(module, "module")

    def call() -> list[int]:
        threads = []
        for _ in range(times):
            stand_in(torch.full((1, 4), value))
            threads.append(torch.get_num_threads())
        return threads

    return call


@pytest.mark.parametrize("together", [1, 2])
def test_each_model_computes_with_its_own(together: int) -> None:
    batcher = Batcher(verification=Verification("unlisted", frozenset()))
    modules = {threads: Noting() for threads in (3, 2, None)}
    tasks = {}
    for _ in range(together):
        for threads, module in modules.items():
            task = batcher.submit(calling(module))
            task.threads = threads
            tasks[task] = threads or OWN
    run(batcher)
    for threads, module in modules.items():
        assert {seen for _, seen in module.seen} == {threads or OWN}
        assert max(rows for rows, _ in module.seen) == together
    for task, threads in tasks.items():  # its own steps too
        assert task.outcome is not None
        assert task.outcome.value == [threads] * 4


def test_a_shared_batch_takes_its_leaders() -> None:
    batcher, module = Batcher(verification=Verification("unlisted", frozenset())), Noting()
    for threads in (3, 2):
        batcher.submit(calling(module)).threads = threads
    run(batcher)
    assert {seen for rows, seen in module.seen if rows == 2} == {3}


def test_failures_and_cancelling_leave_it_as_it_was() -> None:
    batcher, module, other = Batcher(verification=Verification("unlisted", frozenset())), Noting(), Noting()
    for value in (0.0, 666.0):
        batcher.submit(calling(module, value=value)).threads = 3
    victim = batcher.submit(calling(module, times=99))
    victim.threads = 2
    neighbour = batcher.submit(calling(other))
    with torch.no_grad():
        batcher.step()
        batcher.step()
        batcher.cancel(victim, Ended())
    run(batcher)
    assert {seen for _, seen in other.seen} == {OWN}
    assert neighbour.outcome is not None
    assert neighbour.outcome.error is None


def test_a_request_that_does_not_switch_keeps_its_own() -> None:
    pipe = guided()
    pipe.set_progress_bar_config(disable=True)
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    batcher, other = Batcher(), Noting()
    batcher.submit(calling(other, times=9))
    guided_task = batcher.submit(lambda: view(pipe)(prompt="a cat", num_inference_steps=2))
    guided_task.threads = 2
    run(batcher)
    hook.remove()
    assert set(seen) == {2}
    assert {threads for _, threads in other.seen} == {OWN}


def test_from_a_model_file_to_every_module_of_the_pipeline(tmp_path: Path) -> None:
    """Loading, encoding, denoising and decoding of two models at the same time, one cancelled in the middle."""
    configs = saved(tmp_path)
    loads: list[tuple[str, int]] = []
    seen: set[tuple[str, str, int]] = set()

    def on(play: Played, id: str, event: Any) -> None:
        if event == Step(1, 4):
            for name, model in play.loop._pool._loaded.items():
                for part in ("text_encoder", "unet", "vae"):
                    where = model.pipeline.vae.decoder if part == "vae" else getattr(model.pipeline, part)
                    where.register_forward_pre_hook(
                        lambda *_, name=name, part=part: seen.add((name, part, torch.get_num_threads()))
                    )
        if id == "victim" and event == Step(3, 4):
            play.loop.post(Cancel("victim"))
            play.submit("pag", "after", prompt="something else", steps=2)
            play.submit("sd", "too", prompt="something else", steps=2)
            play.loop.post(Stop())

    play = Played(configs | {"pag": replace(configs["pag"], threads=2)}, on)
    tell = play.loop._pool._residents.on_status
    play.loop._pool._residents.on_status = lambda name, status: (
        loads.append((name, torch.get_num_threads())),
        tell(name, status),
    )
    play.submit("sd", "victim", steps=4)
    play.submit("pag", "guided", steps=4)
    play.submit("sd", "plain", seed=5, steps=4)
    play.run()
    for id in ("guided", "plain", "after", "too"):
        assert isinstance(play.events(id)[-1], Done)
    assert isinstance(play.events("victim")[-1], Failed)
    assert seen == {
        (name, part, n) for name, n in (("pag", 2), ("sd", OWN)) for part in ("text_encoder", "unet", "vae")
    }
    assert set(loads) == {("pag", 2), ("sd", OWN)}

"""Which runner computes the modules of a request: as its model file says, else the setting `accelerate`."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Final

import torch

from sfumato.batching.module_runner import ModuleRunner
from sfumato.core import EAGER, RunnerState
from sfumato.runners import graph, recorded
from sfumato.runners.auto import Auto
from sfumato.runners.background import Background
from sfumato.runners.candidate import Candidate
from sfumato.runners.measured import Measurements
from sfumato.runners.openvino import OpenVino

log = logging.getLogger(__name__)

NOT_INSTALLED = "the package openvino is not installed: pip install 'sfumato[openvino]'"

AUTO: Final = "auto"

FIRST = {"openvino": "it is prepared for the first picture", AUTO: "it is chosen for the first picture"}
"""What is told of each before that."""


class Runners:
    """The runners of this process. Used on the loop's thread. Models that share a module share its runner."""

    def __init__(self, setting: str, folder: Path, wake: Callable[[], None] = lambda: None) -> None:
        """`setting`: for models whose file does not say. `folder`: where graphs are kept. `wake`: see `Background`."""
        self._setting = setting
        self._folder = folder
        self._background = Background(wake)
        self._measurements = Measurements(folder)
        self._shared: weakref.WeakValueDictionary[tuple[str, int, int], Candidate] = weakref.WeakValueDictionary()
        self._made: Mapping[str, Callable[[torch.nn.Module, int], Candidate]] = {
            "openvino": self._openvino, AUTO: self._auto,
        }  # fmt: skip
        self._told = False

    @property
    def preparing(self) -> bool:
        """Whether requests may wait for a runner."""
        return self._background.busy

    def of(
        self,
        modules: Mapping[str, Any],
        kept: MutableMapping[str, Candidate],
        accelerate: str | None,
        threads: int | None,
        recipe: str = "",
    ) -> dict[int, ModuleRunner | None]:
        """The runners of a request that begins now, by the id of the module. None: the module itself.

        `modules`: the model's, by component. `kept`: its runners so far, which are added to. `accelerate`, `threads`:
        of its file. `recipe`: the runner of a picture to draw again; the choice of `auto` is that one's.
        """
        chosen = self._chosen(accelerate)
        again = recorded.read(recipe) if chosen == AUTO else {}
        if chosen == EAGER or (chosen == "openvino" and not self._installed()):
            return {}
        runners: dict[int, ModuleRunner | None] = {id(module): None for module in modules.values()}
        for name, module in modules.items():
            wanted = again.get(name, again.get("", chosen))
            if wanted in self._made and (wanted != "openvino" or self._installed()):
                kept[name] = self._shared_runner(wanted, module, threads or torch.get_num_threads())
                runners[id(module)] = kept[name].for_request()
        return runners

    def states(
        self, modules: Mapping[str, Any], kept: Mapping[str, Candidate], accelerate: str | None
    ) -> tuple[RunnerState, ...]:
        """What computes each of a model's modules, and why."""
        chosen = self._chosen(accelerate)
        if chosen == "openvino" and not graph.installed():
            return tuple(RunnerState(name, EAGER, NOT_INSTALLED) for name in modules)
        if chosen == EAGER:
            return tuple(RunnerState(name, EAGER) for name in modules)
        return tuple(
            kept[name].state(name) if name in kept else RunnerState(name, chosen, FIRST[chosen]) for name in modules
        )

    def keep_states(self, model: str, states: tuple[RunnerState, ...]) -> None:
        """For `sfumato models`, which loads none."""
        self._measurements.put_states(model, states)

    # When nothing else is to be done.

    @property
    def due(self) -> bool:
        """Whether there is something to measure."""
        return any(runner.due for runner in self._measuring())

    def measure(self) -> bool:
        """Compute one forward pass, to compare runners. False: that has to wait for what is being prepared."""
        return any(runner.measure() for runner in self._measuring() if runner.due)

    def _measuring(self) -> list[Auto]:
        return [runner for runner in self._shared.values() if isinstance(runner, Auto)]

    def _chosen(self, accelerate: str | None) -> str:
        return accelerate or self._setting

    def _shared_runner(self, name: str, module: Any, threads: int) -> Candidate:
        key = name, id(module), threads
        runner = self._shared.get(key)
        if runner is None or (isinstance(runner, Auto) and runner.outdated):
            if runner is None:
                weakref.finalize(module, self._shared.pop, key, None)
            runner = self._shared[key] = self._made[name](module, threads)
        return runner

    def _openvino(self, module: torch.nn.Module, threads: int) -> OpenVino:
        return OpenVino(module, self._folder, threads, self._background)

    def _auto(self, module: torch.nn.Module, threads: int) -> Auto:
        names = ["openvino"] if graph.installed() else []
        runner_of = functools.partial(_of_module, self._shared_runner, weakref.ref(module), threads)
        return Auto(module, threads, {name: functools.partial(runner_of, name) for name in names}, self._measurements)

    def _installed(self) -> bool:
        if graph.installed():
            return True
        if not self._told:
            log.warning("accelerate: openvino: %s; until then modules compute as they are", NOT_INSTALLED)
            self._told = True
        return False


def _of_module(
    runner_of: Callable[[str, Any, int], Candidate], module: weakref.ref[torch.nn.Module], threads: int, name: str
) -> Candidate:
    """`runner_of` for a module that nothing refers to here."""
    return runner_of(name, module(), threads)

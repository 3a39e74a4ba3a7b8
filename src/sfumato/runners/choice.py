"""Which runner computes the modules of a request: as its model file says, else the setting `accelerate`."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from sfumato.batching.module_runner import ModuleRunner
from sfumato.core import EAGER
from sfumato.runners import compiled, graph, recorded
from sfumato.runners.auto import Auto
from sfumato.runners.background import Background
from sfumato.runners.candidate import Candidate, KeptRunner
from sfumato.runners.compiled import Compiled
from sfumato.runners.group import Group
from sfumato.runners.measured import Measurements
from sfumato.runners.openvino import OpenVino
from sfumato.runners.parallel import NAME as PARALLEL
from sfumato.runners.parallel import Parallel, can_be_divided
from sfumato.status import RunnerState

log = logging.getLogger(__name__)

NOT_INSTALLED = "the package openvino is not installed: pip install 'sfumato[openvino]'"

AUTO: Final = "auto"

FIRST = {
    "openvino": "it is prepared for the first picture", "compile": "it is compiled after the first picture has begun",
    AUTO: "it is chosen for the first picture", PARALLEL: "it is prepared for the first picture",
}  # fmt: skip
"""What is told of each before that."""


MISSING: Mapping[str, Callable[[], str]] = {
    "openvino": lambda: "" if graph.installed() else NOT_INSTALLED,
    "compile": lambda: "" if torch.cuda.is_available() or compiled.compiler() else compiled.NO_COMPILER,
}
"""What is missing for a runner here."""


class Runners:
    """The runners of this process. Used on the loop's thread. Models that share a module share its runner."""

    def __init__(
        self, setting: str, folder: Path, wake: Callable[[], None] = lambda: None, devices: Sequence[str] = ()
    ) -> None:
        """`setting`: for models whose file does not say. `folder`: where graphs are kept. `wake`: see `Background`.

        `devices`: those that one picture may take together, this process's own first.
        """
        self._setting = setting
        self._folder = folder
        self._background = Background(wake)
        self._compiling = Background(wake)
        """For what takes minutes, and what no request waits for."""
        self._measurements = Measurements(folder)
        self._shared: weakref.WeakValueDictionary[tuple[str, int, int], KeptRunner] = weakref.WeakValueDictionary()
        self._made: Mapping[str, Callable[[torch.nn.Module, int], KeptRunner]] = {
            "openvino": self._openvino, "compile": self._compiled, AUTO: self._auto, PARALLEL: self._parallel,
        }  # fmt: skip
        self._told: set[str] = set()
        self._group = Group(devices)

    @property
    def preparing(self) -> bool:
        """Whether requests may wait for a runner, or `measure` for one."""
        return self._background.busy or self._compiling.busy

    def of(
        self,
        modules: Mapping[str, Any],
        kept: MutableMapping[str, KeptRunner],
        accelerate: str | None,
        threads: int | None,
        recipe: str = "",
        *,
        divide: bool = False,
    ) -> dict[int, ModuleRunner | None]:
        """The runners of a request that begins now, by the id of the module. None: the module itself.

        `modules`: the model's, by component. `kept`: its runners so far, which are added to; those that only a recipe
        asked for by component and runner. `accelerate`, `threads`: of its file.
        `recipe`: the runner of a picture to draw again; the choice of `auto` is that one's.
        `divide`: whether all devices compute denoisers together.
        """
        chosen = self._chosen(accelerate)
        again = recorded.read(recipe) if chosen == AUTO else {}
        if not divide and (chosen == EAGER or self._lacks(chosen)):
            return {}
        runners: dict[int, ModuleRunner | None] = {id(module): None for module in modules.values()}
        for name, module in modules.items():
            if divide and can_be_divided(module):
                kept[name] = self._shared_runner(PARALLEL, module, threads or torch.get_num_threads())
                runners[id(module)] = kept[name].for_request()
                continue
            wanted = again.get(name, again.get("", chosen))
            if wanted in (*MISSING, AUTO) and not self._lacks(wanted) and not _left_out(wanted, name, module):
                key = name if wanted == chosen else f"{name} {wanted}"  # what others draw with stays beside it
                kept[key] = self._shared_runner(wanted, module, threads or torch.get_num_threads())
                runners[id(module)] = kept[key].for_request()
        return runners

    def states(
        self,
        modules: Mapping[str, Any],
        kept: Mapping[str, KeptRunner],
        accelerate: str | None,
        *,
        divide: bool = False,
    ) -> tuple[RunnerState, ...]:
        """What computes each of a model's modules, and why."""
        chosen = self._chosen(accelerate)
        return tuple(
            self._state(PARALLEL if divide and can_be_divided(module) else chosen, name, module, kept.get(name))
            for name, module in modules.items()
        )

    def _state(self, chosen: str, name: str, module: Any, runner: KeptRunner | None) -> RunnerState:
        lacks = self._lacks(chosen)
        if chosen == EAGER or lacks:
            return RunnerState(name, EAGER, lacks)
        if left_out := _left_out(chosen, name, module):
            return RunnerState(name, EAGER, left_out)
        return runner.state(name) if runner else RunnerState(name, chosen, FIRST[chosen])

    def keep_states(self, model: str, states: tuple[RunnerState, ...]) -> None:
        """For `sfumato models`, which loads none."""
        self._measurements.put_states(model, states)

    def close(self) -> None:
        """Nothing is computed any more."""
        self._group.close()

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

    def _shared_runner(self, name: str, module: Any, threads: int) -> KeptRunner:
        key = name, id(module), threads
        runner = self._shared.get(key)
        if runner is None or (isinstance(runner, Auto) and runner.outdated):
            if runner is None:
                weakref.finalize(module, self._shared.pop, key, None)
            runner = self._shared[key] = self._made[name](module, threads)
        return runner

    def _openvino(self, module: torch.nn.Module, threads: int) -> OpenVino:
        return OpenVino(module, self._folder, threads, self._background)

    def _parallel(self, module: torch.nn.Module, threads: int) -> Parallel:
        return Parallel(module, self._group, self._background)

    def _auto(self, module: torch.nn.Module, threads: int) -> Auto:
        names = [name for name in (_tried(AUTO, module),) if not MISSING[name]()]
        runner_of = functools.partial(_of_module, self._shared_runner, weakref.ref(module), threads)
        return Auto(module, threads, {name: functools.partial(runner_of, name) for name in names}, self._measurements)

    def _compiled(self, module: torch.nn.Module, threads: int) -> Compiled:
        return Compiled(module, threads, self._compiling)

    def _lacks(self, name: str) -> str:
        """What is missing for a runner on this machine; empty if nothing is. Logged once."""
        missing = MISSING[name]() if name in MISSING else ""
        if missing and name not in self._told:
            log.warning("accelerate: %s: %s; until then modules compute as they are", name, missing)
            self._told.add(name)
        return missing


def _tried(runner: str, module: torch.nn.Module) -> str:
    """The runner itself; of `auto` the one that it compares with the module."""
    if runner != AUTO:
        return runner
    return "openvino" if all(tensor.device.type == "cpu" for tensor in module.parameters()) else "compile"


def _left_out(runner: str, component: str, module: torch.nn.Module) -> str:
    """Why a runner leaves a component to the module itself; empty if it does not."""
    once = component.startswith("text_encoder") and _tried(runner, module) == "compile"
    return "it is called once a prompt, which is not worth minutes of compiling" if once else ""


def _of_module(
    runner_of: Callable[[str, Any, int], Any], module: weakref.ref[torch.nn.Module], threads: int, name: str
) -> Candidate:
    """`runner_of` for a module that nothing refers to here, and a runner that can be measured."""
    candidate: Candidate = runner_of(name, module(), threads)
    return candidate

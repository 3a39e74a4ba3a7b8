"""Which runner computes the denoisers of a request: as its model file says, else the setting `accelerate`."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch

from sfumato.core import RunnerState
from sfumato.runners import graph
from sfumato.runners.background import Background
from sfumato.runners.openvino import OpenVino

log = logging.getLogger(__name__)

NOT_INSTALLED = "the package openvino is not installed: pip install 'sfumato[openvino]'"


class Runners:
    """The runners of this process. Used on the loop's thread. Models that share a module share its runner."""

    def __init__(self, setting: str, folder: Path, wake: Callable[[], None] = lambda: None) -> None:
        """`setting`: for models whose file does not say. `folder`: where graphs are kept. `wake`: see `Background`."""
        self._setting = setting
        self._folder = folder
        self._background = Background(wake)
        self._shared: weakref.WeakValueDictionary[tuple[int, int], OpenVino] = weakref.WeakValueDictionary()
        self._told = False

    @property
    def preparing(self) -> bool:
        """Whether requests may wait for a runner."""
        return self._background.busy

    def of(
        self,
        denoisers: Mapping[str, Any],
        kept: MutableMapping[str, OpenVino],
        accelerate: str | None,
        threads: int | None,
    ) -> dict[int, OpenVino]:
        """The runners of a request that begins now, by the id of the module.

        `denoisers`: the model's, by name. `kept`: its runners so far, which are added to. `accelerate`, `threads`: of
        its file.
        """
        if self._chosen(accelerate) != "openvino" or not self._installed():
            return {}
        threads = threads or torch.get_num_threads()
        for name, module in denoisers.items():
            runner = self._shared.get((id(module), threads))
            if runner is None:
                runner = OpenVino(module, self._folder, threads, self._background)
                self._shared[id(module), threads] = runner
                weakref.finalize(module, self._shared.pop, (id(module), threads), None)
            kept[name] = runner
        return {id(module): kept[name] for name, module in denoisers.items() if kept[name].serves()}

    def states(
        self, denoisers: Mapping[str, Any], kept: Mapping[str, OpenVino], accelerate: str | None
    ) -> tuple[RunnerState, ...]:
        """What computes each of a model's denoisers, and why."""
        chosen = self._chosen(accelerate)
        if chosen == "openvino" and not graph.installed():
            return tuple(RunnerState(name, "eager", NOT_INSTALLED) for name in denoisers)
        if chosen == "openvino":
            return tuple(
                kept[name].state(name)
                if name in kept
                else RunnerState(name, chosen, "it is prepared for the first picture")
                for name in denoisers
            )
        return tuple(RunnerState(name, "eager") for name in denoisers)

    def _chosen(self, accelerate: str | None) -> str:
        return accelerate or self._setting

    def _installed(self) -> bool:
        if graph.installed():
            return True
        if not self._told:
            log.warning("accelerate: openvino: %s; until then modules compute as they are", NOT_INSTALLED)
            self._told = True
        return False

"""Who drives a scheduler: the pipeline itself, or, in a combined one, a pipeline inside of it.

Kandinsky and Stable Cascade come as a prior that makes an embedding of a text and a decoder that makes the picture of
it, each a whole pipeline with a scheduler of its own, and as a combined pipeline around both. That one lists the
schedulers among its components but never reads them, so to exchange one means to exchange it inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline

from sfumato.pipelines import scheduler_calls


@dataclass(frozen=True, slots=True)
class Driver:
    """A pipeline, and the attribute by which it holds a scheduler that it steps."""

    pipeline: Any
    attribute: str

    @property
    def scheduler(self) -> Any:
        return getattr(self.pipeline, self.attribute)

    def put(self, scheduler: Any) -> None:
        setattr(self.pipeline, self.attribute, scheduler)


def drivers(pipeline: Any) -> dict[str, Driver]:
    """Who steps schedulers in `pipeline`, by what it calls each: `scheduler` is the one that draws the picture.

    unCLIP has several of its own and none of that name; a combined pipeline calls the prior's `prior_scheduler`.
    """
    own = {name: Driver(pipeline, name) for name, value in vars(pipeline).items() if hasattr(value, "set_timesteps")}
    inner = {name: value for name, value in vars(pipeline).items() if isinstance(value, DiffusionPipeline)}
    kind: Any = type(pipeline)
    if not inner or scheduler_calls.read(kind) is not None:
        return own
    names = {id(driver.scheduler): name for name, driver in own.items()}
    found: dict[str, Driver] = {}
    for part, each in inner.items():
        for name, driver in drivers(each).items():
            found.setdefault(names.get(id(driver.scheduler), f"{part}.{name}"), driver)
    return found


def main(pipeline: Any) -> Any:
    """The pipeline whose scheduler is meant when there is talk of one; `pipeline` itself where that isn't plain."""
    driver = drivers(pipeline).get("scheduler")
    return driver.pipeline if driver else pipeline


def exchange(pipeline: Any, scheduler: Any) -> None:
    """Put `scheduler` in the place of the one that draws. Raises ValueError where there is no such place."""
    if reason := refusal(pipeline):
        raise ValueError(reason)
    drivers(pipeline)["scheduler"].put(scheduler)
    pipeline.scheduler = scheduler


def refusal(pipeline: Any) -> str:
    """Why no scheduler can be put into `pipeline`; empty where one can."""
    known = drivers(pipeline)
    if "scheduler" in known:
        return ""
    has = f"it has {', '.join(sorted(known))}; set that on the pipeline" if known else "it has none"
    return f"{type(pipeline).__name__} has no one scheduler to be replaced ({has}). Leave `scheduler` out of the call"


class StepCount:
    """The steps of all schedulers of one picture as one count, in the order in which they run."""

    def __init__(self, expected: Mapping[str, int], on_step: Callable[[int, int], None]) -> None:
        """`expected`: name of each scheduler → the steps that it was asked for."""
        self._totals = dict(expected)
        self._done = dict.fromkeys(expected, 0)
        self._on_step = on_step

    def of(self, name: str) -> Callable[[int, int], None]:
        """To be called with (steps done, steps in all) of the scheduler `name`."""

        def note(done: int, total: int) -> None:
            for other, count in self._done.items():
                if other != name and count:  # its time is over, however many steps were left
                    self._totals[other] = count
            self._done[name], self._totals[name] = done, total
            self._on_step(sum(self._done.values()), sum(self._totals.values()))

        return note

"""Which pipeline steps a scheduler: the pipeline itself, or a pipeline inside a combined one.

Kandinsky and Stable Cascade consist of a prior that turns a text into an embedding and a decoder that turns that into
a picture, each a complete pipeline with its own scheduler, and a combined pipeline around both. The combined one lists
the schedulers among its components but never reads them, so a scheduler must be replaced inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline

from sfumato.pipelines import scheduler_calls


@dataclass(frozen=True, slots=True)
class Driver:
    """A pipeline, and the attribute with a scheduler that it steps."""

    pipeline: Any
    attribute: str

    @property
    def scheduler(self) -> Any:
        return getattr(self.pipeline, self.attribute)

    def put(self, scheduler: Any) -> None:
        setattr(self.pipeline, self.attribute, scheduler)


def drivers(pipeline: Any) -> dict[str, Driver]:
    """The pipelines that step schedulers in `pipeline`, by name of the scheduler: `scheduler` draws the picture.

    unCLIP has several, none of that name; in a combined pipeline the prior's is `prior_scheduler`.
    """
    direct = {name: Driver(pipeline, name) for name, value in vars(pipeline).items() if hasattr(value, "set_timesteps")}
    inner = {name: value for name, value in vars(pipeline).items() if isinstance(value, DiffusionPipeline)}
    kind: Any = type(pipeline)
    if not inner or scheduler_calls.read(kind) is not None:
        return direct
    names = {id(driver.scheduler): name for name, driver in direct.items()}
    nested: dict[str, Driver] = {}
    for attribute, inner_pipeline in inner.items():
        for name, driver in drivers(inner_pipeline).items():
            nested.setdefault(names.get(id(driver.scheduler), f"{attribute}.{name}"), driver)
    return nested


def drawing_pipeline(pipeline: Any) -> Any:
    """The pipeline whose scheduler draws the picture; `pipeline` itself if that is ambiguous."""
    driver = drivers(pipeline).get("scheduler")
    return driver.pipeline if driver else pipeline


def replace_scheduler(pipeline: Any, scheduler: Any) -> None:
    """Replace the scheduler that draws the picture. Raises ValueError if there is no single one."""
    if reason := why_not_replaceable(pipeline):
        raise ValueError(reason)
    drivers(pipeline)["scheduler"].put(scheduler)
    pipeline.scheduler = scheduler


def why_not_replaceable(pipeline: Any) -> str:
    """Why the scheduler of `pipeline` cannot be replaced; empty if it can."""
    by_name = drivers(pipeline)
    if "scheduler" in by_name:
        return ""
    has = f"it has {', '.join(sorted(by_name))}; set that on the pipeline" if by_name else "it has none"
    return f"{type(pipeline).__name__} has no single scheduler to replace ({has}). Leave `scheduler` out of the call"


class StepCount:
    """Counts the steps of all schedulers of one picture together, in the order in which they run."""

    def __init__(self, expected: Mapping[str, int], on_step: Callable[[int, int], None]) -> None:
        """`expected`: name of each scheduler → its requested steps."""
        self._totals = dict(expected)
        self._done = dict.fromkeys(expected, 0)
        self._on_step = on_step

    def of(self, name: str) -> Callable[[int, int], None]:
        """Callback for (steps done, total steps) of the scheduler `name`."""

        def note(done: int, total: int) -> None:
            for other, count in self._done.items():
                if other != name and count:  # it has finished, however many steps were left
                    self._totals[other] = count
            self._done[name], self._totals[name] = done, total
            self._on_step(sum(self._done.values()), sum(self._totals.values()))

        return note

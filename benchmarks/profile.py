"""Where the time goes, besides the denoiser.

    python -m benchmarks.profile [--model embedded] [--model middle]

One request, and eight at once, through the engine's loop: CPU time of its thread (one torch thread), by module and
by what is around them: the pipelines' own code, the batcher, PNGs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import models
from benchmarks.figures import table, write
from sfumato.batching.batcher import Batcher
from sfumato.batching.interruption import Slices
from sfumato.core import Done, Generation
from sfumato.drawing.draw import draw
from sfumato.engine import environment
from sfumato.models import load
from sfumato.pictures import encoder

AT_ONCE = (1, 8)


class Clock:
    """CPU time of this thread, by what it is spent on; what is inside something else does not count twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[str] = []
        self._since = 0.0

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        self._switch()
        self._inside.append(name)
        try:
            yield
        finally:
            self._switch()
            self._inside.pop()

    def _switch(self) -> None:
        now = time.thread_time()
        if self._inside:
            self.seconds[self._inside[-1]] += now - self._since
        self._since = now

    def watch(self, owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.within(name):
                return original(*args, **kwargs)

        setattr(owner, method, watched)


def shares(name: str, folder: Path, count: int) -> dict[str, float]:
    """Percent of the CPU time of `count` requests at once."""
    model = load.load(models.config(name, folder, "cpu"), "cpu", lambda status: None)
    # Without interruptions, within which others would compute.
    clock, pipe, batcher = Clock(), model.pipeline, Batcher(slices=Slices(lambda: 0.0))

    class Timed:
        """Encodes at once, so that it is in this thread's time."""

        later = staticmethod(encoder.HERE.later)

        @staticmethod
        def result(work: Any) -> Any:
            with clock.within("PNG"):
                return work()

    def one(wanted: Generation) -> None:
        done = draw(model, wanted, lambda done, total: None, None, None, Timed())
        assert isinstance(done, Done)

    wanted = models.mixed(name, count + 1, seed=5)
    batcher.submit(lambda: one(wanted[-1]))  # the first picture imports and proves
    while batcher.step():
        pass
    batcher.prompt_cache.clear()
    for part, method, label in (
        ("unet", "forward", "denoiser"), ("text_encoder", "forward", "text encoder"), ("vae", "decode", "VAE"),
    ):  # fmt: skip
        clock.watch(getattr(pipe, part), method, label)
    with clock.within("the rest: pipelines, schedulers, batcher"):
        for each in wanted[:count]:
            batcher.submit(lambda each=each: one(each))  # type: ignore[misc]
        while batcher.step():
            pass
    total = sum(clock.seconds.values())
    return {
        label: round(100 * seconds / total, 2)
        for label, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1])
    }


def run(names: list[str]) -> None:
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        torch.set_num_threads(1)
        for name in names:
            by_count = {count: shares(name, Path(folder), count) for count in AT_ONCE}
            labels = [*by_count[1]]
            print(f"\n{name}: percent of the CPU time")
            rows = [(each, by_count[1][each], by_count[8].get(each, 0)) for each in labels]
            print(table(("", "one request", "eight at once"), rows))
            figures[name] = {"shares": by_count}
    print(write("profile", "cpu", figures))


if __name__ == "__main__":
    environment.prepare()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.SIZES, action="append")
    options = parser.parse_args()
    run(options.model or ["embedded"])

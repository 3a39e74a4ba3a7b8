"""Where the time goes, besides the denoiser, and what the server adds to a request.

    python -m benchmarks.profile [--model embedded] [--model middle]

1. One request, and eight at once, through the engine's loop: CPU time of its thread (one torch thread), by module and
   by what is around them: the pipelines' own code, the batcher, PNGs.
2. One request through HTTP, over `pipe()`: CPU time of the server's two processes, over that of this thread.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import models
from benchmarks.figures import figure, table, write
from sfumato.batching.batcher import Batcher
from sfumato.batching.interruption import Slices
from sfumato.commands.bench.server import running
from sfumato.core import Done, Generation
from sfumato.drawing.draw import draw
from sfumato.engine import environment
from sfumato.models import load
from sfumato.pictures import encoder
from sfumato.serving.catalog import EMBEDDED

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


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its descendants so far."""
    numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    own = (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(cpu_seconds(int(child)) for child in children)


def over_plain(folder: Path, repeats: int) -> list[float]:
    """CPU time of a request of the built-in model through HTTP, over `pipe()` and a PNG, alternating."""
    plain = models.Plain(models.config("embedded", folder, "cpu"), "cpu")
    wanted = replace(models.mixed("embedded", 1, seed=8)[0], prompt="a red ball")
    sampling = replace(wanted.sampling, steps=28, guidance_scale=3.0, scheduler="ddim", negative_prompt=None)
    ratios = []
    with running(EMBEDDED) as server:
        (pid,) = Path("/proc/self/task", str(os.getpid()), "children").read_text().split()

        def through_http(seed: int) -> float:
            body = {"prompt": wanted.prompt, "size": "128x128", "seed": seed, "response_format": "b64_json"}
            body |= {"steps": sampling.steps, "guidance_scale": sampling.guidance_scale, "scheduler": "ddim"}
            began = cpu_seconds(int(pid))
            server.client.post("/v1/images/generations", json=body).raise_for_status()
            return cpu_seconds(int(pid)) - began

        def directly(seed: int) -> float:
            began = time.thread_time()
            plain.draw(replace(wanted, seed=seed, sampling=sampling)).save(io.BytesIO(), "PNG")
            return time.thread_time() - began

        through_http(0), directly(0)
        for seed in range(1, repeats + 1):
            first, second = (through_http, directly) if seed % 2 else (directly, through_http)
            took = {first: first(seed), second: second(seed)}
            ratios.append(took[through_http] / took[directly])
    return ratios


def run(names: list[str], repeats: int) -> None:
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
        os.environ["OMP_NUM_THREADS"] = "1"
        figures["HTTP over pipe()"] = figure(over_plain(Path(folder), 3 * repeats))
        print(f"one request through HTTP, over pipe(), in CPU time: {figures['HTTP over pipe()']}")
    print(write("profile", "cpu", figures))


if __name__ == "__main__":
    environment.prepare()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.SIZES, action="append")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    run(options.model or ["embedded"], options.repeats)

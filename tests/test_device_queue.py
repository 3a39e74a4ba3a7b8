"""Nothing of ours waits for an accelerator at a step: it would have nothing to compute until the host goes on.

There is none here, so calls that would wait are counted, by the line of our code that makes them.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import sfumato
from sfumato.core import Done, Generation
from sfumato.drawing.steps import Finite
from sfumato.errors import DrawError
from sfumato.sampling import Sampling
from support import tiny
from support.engines import Engine

OURS = str(Path(sfumato.__file__).parent)

WAITING = ("item", "cpu", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
"""Methods of a tensor that return when the device has computed it."""


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Lines of ours, in this thread, that call one of these methods, directly."""
    lines: Counter[str] = Counter()
    here = threading.get_ident()

    def counting(name: str, original: Any) -> Any:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            if frame.f_code.co_filename.startswith(OURS) and threading.get_ident() == here:
                lines[f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {name}"] += 1
            return original(tensor, *args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        for name in WAITING:
            patched.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
        yield lines


@pytest.mark.parametrize("build", [tiny.stable_diffusion, tiny.stable_diffusion_3, tiny.flux])
@pytest.mark.parametrize("scheduler", [None, "euler"])
def test_a_step_never_waits_for_the_device(
    build: Any, scheduler: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as many steps, and as many waits: those of a picture. Two requests at once, with previews."""
    build().save_pretrained(tmp_path / "base")
    engine = Engine(tmp_path)

    def waits(steps: int) -> Counter[str]:
        with counted(monkeypatch) as lines:
            answers = engine.draw(*(wanted(f"{steps}-{seed}", steps, seed, scheduler) for seed in range(2)))
        assert all(isinstance(answer, Done) for answer in answers.values())
        return lines

    waits(4), waits(8)  # what is proved and computed once
    few, many = waits(4), waits(8)
    assert few  # the counting works
    assert not many - few


def wanted(id: str, steps: int, seed: int, scheduler: str | None) -> Generation:
    return Generation(
        id=id, prompt=f"a cup {seed}", seed=seed, previews=2,
        sampling=Sampling(width=64, height=64, steps=steps, scheduler=scheduler),
    )  # fmt: skip


def test_nan_is_read_after_the_run_on_an_accelerator() -> None:
    """`meta` stands for a device whose numbers are not there yet: to read one there raises."""
    finite = Finite()
    finite.note((torch.zeros(1, 4, device="meta"),))
    with pytest.raises((RuntimeError, NotImplementedError)):
        finite.check()
    with pytest.raises(DrawError, match="NaN"):
        Finite().note((torch.full((1, 4), torch.nan),))


@pytest.mark.parametrize(("scale", "rows"), [(1.0, [1, 1, 1]), (5.0, [2, 2, 2])])
def test_without_guidance_a_step_computes_half_the_rows(scale: float, rows: list[int], tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion()
    pipe.save_pretrained(tmp_path / "base")
    engine, seen = Engine(tmp_path), []
    sampling = Sampling(width=64, height=64, steps=3, guidance_scale=scale, scheduler="ddim")
    forward = type(pipe.unet).forward

    def watched(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(pipe.unet), "forward", watched)
        (answer,) = engine.draw(Generation(id="one", prompt="a cup", seed=1, sampling=sampling)).values()
    assert isinstance(answer, Done)
    assert seen == rows

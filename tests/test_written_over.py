"""Weight files that are written over while their model is in memory: on a CPU they are mapped, not read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfumato.config import ModelConfig
from sfumato.core import Done, Failed
from sfumato.engine.loop import Loop
from sfumato.engine.protocol import Answer, Stop, Submit
from sfumato.pictures.images import decoded
from sfumato.settings import Settings
from support import tiny
from support.here import asked, config, drawn

pytestmark = pytest.mark.filterwarnings("ignore")


class Engine:
    """A loop in this thread, with one model that stays in memory between pictures."""

    def __init__(self, made: ModelConfig, data: Path) -> None:
        self.config, self.sent = made, list[Any]()
        self.loop = Loop(Settings(device="cpu", log_level="error", data=data), self.sent.append)

    def draw(self) -> Any:
        self.loop._stopping = False
        self.loop.post(Submit(self.config, asked()))
        self.loop.post(Stop())
        self.loop.run()
        return next(each.event for each in reversed(self.sent) if isinstance(each, Answer))


def pixels(event: Any) -> Any:
    assert isinstance(event, Done), event
    return np.asarray(decoded(event.file)).astype(int)


def test_a_folder_that_is_written_over_is_read_again(tmp_path: Path) -> None:
    tiny.save(tiny.stable_diffusion(), tmp_path / "model")
    other = tmp_path / "other"
    tiny.save(tiny.stable_diffusion(seed=7), other)
    engine = Engine(config(tmp_path, "model"), tmp_path / "data")
    first = pixels(engine.draw())
    assert np.array_equal(pixels(engine.draw()), first)
    assert engine.loop._pool.loads == 1
    weights = Path("unet") / "diffusion_pytorch_model.safetensors"
    shutil.copyfile(other / weights, tmp_path / "model" / weights)  # in place: the same inode
    second = pixels(engine.draw())
    assert engine.loop._pool.loads == 2
    assert np.abs(second - first).max() > 1
    assert np.array_equal(second, drawn(config(tmp_path, "model")))
    (other / weights).replace(tmp_path / "model" / weights)  # another inode
    assert np.array_equal(pixels(engine.draw()), second)
    assert engine.loop._pool.loads == 3


def test_a_file_that_is_cut_off_is_an_error_and_not_the_end(checkpoint: Path, here: Any, tmp_path: Path) -> None:
    file = Path(shutil.copyfile(checkpoint, tmp_path / "model.safetensors"))
    engine = Engine(config(tmp_path, file), tmp_path / "data")
    first = pixels(engine.draw())
    whole = file.read_bytes()
    with file.open("r+b") as opened:
        opened.truncate(len(whole) // 2)
    failed = engine.draw()
    assert isinstance(failed, Failed), failed
    assert "model.safetensors" in failed.error.message
    file.write_bytes(whole)
    assert np.array_equal(pixels(engine.draw()), first)

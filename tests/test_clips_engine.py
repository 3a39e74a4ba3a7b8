"""Clips in the engine's loop and in a worker: together, beside pictures, cancelled, and after the worker's death."""

from __future__ import annotations

import io
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sfumato.cli import app
from sfumato.config import ModelConfig
from sfumato.core import Done, Failed, Generation, Preview, Step
from sfumato.drawing.draw import Drawn, rounded
from sfumato.engine import loop
from sfumato.engine.protocol import Answer, Cancel, Stop, Submit
from sfumato.errors import Cancelled
from sfumato.pictures import files, recipe
from sfumato.pictures.results import Clip
from sfumato.sampling import nested
from support import tiny
from support.engines import Engine
from support.families_moving import FAMILIES
from support.probed import needs
from support.replayed import same_after_a_kill


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    FAMILIES["Wan"].build().save_pretrained(folder / "base")
    tiny.stable_diffusion().save_pretrained(folder / "pictures")
    return folder


def clip(id: str, **fields: Any) -> Generation:
    made = {"id": id, "prompt": f"a cat {id}", "seed": 1, "steps": 4, "width": 16, "height": 16, "num_frames": 5}
    return Generation(**nested({**made, "format": "gif", **fields}))


def picture(id: str, **fields: Any) -> Generation:
    made = {"id": id, "prompt": "a cup", "seed": 1, "steps": 4, "width": 32, "height": 32, "scheduler": "ddim"}
    return Generation(**nested({**made, **fields}))


def frames(event: Any) -> Any:
    assert isinstance(event, Done), event
    assert event.format == "gif"
    with Image.open(io.BytesIO(event.file)) as image:
        pixels = []
        for index in range(image.n_frames):
            image.seek(index)
            pixels.append(np.asarray(image.convert("RGB")).astype(int))
    return np.stack(pixels)


def test_clips_share_forward_passes_and_are_what_they_are_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared before they are rounded and encoded."""
    drawn: dict[str, Any] = {}

    def noted(made: Drawn) -> Drawn:
        assert isinstance(made.result, Clip)
        drawn[made.recipe.prompt] = made.result.frames
        return rounded(made)

    monkeypatch.setattr(loop, "rounded", noted)
    asked = [clip("one", seed=1), clip("two", seed=2, steps=6, negative_prompt="bad"), clip("three", seed=3)]
    engine = Engine(folder)
    engine.draw(*asked)
    assert engine.shared("transformer") >= 2
    together = dict(drawn)
    for each in asked:
        Engine(folder, max_batch=1).draw(each)
        assert np.abs(drawn[each.prompt] - together[each.prompt]).max() < 1e-4
    assert np.abs(together["a cat one"] - together["a cat three"]).max() > 1e-3


def test_a_clip_that_waits_for_its_file_holds_bytes_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, floats, waiting = files.encode, list[Any](), list[Any]()

    def noted(made: Drawn) -> Drawn:
        assert isinstance(made.result, Clip)
        array = made.result.frames
        assert array.dtype == np.float32
        while isinstance(array, np.ndarray):
            floats.append(weakref.ref(array))
            array = array.base
        return rounded(made)

    def held(result: Any, recipe: Any, format: str) -> bytes:
        waiting.append((result.frames.dtype, [array() for array in floats if array() is not None]))
        return encode(result, recipe, format)

    monkeypatch.setattr(loop, "rounded", noted)
    monkeypatch.setattr(files, "encode", held)
    Engine(folder).draw(clip("one"))
    assert floats
    assert waiting == [(np.uint8, [])]


def test_a_clip_beside_pictures_of_another_model(folder: Path) -> None:
    engine = Engine(folder)
    pictures = ModelConfig(name="p", model=str(folder / "pictures"), folder=folder, dtype="fp32", cuda=False)
    for each in (picture("first"), picture("second", seed=2)):
        engine.loop.post(Submit(pictures, each))
    answers = engine.draw(clip("moving"))
    assert [answers[id].format for id in ("first", "second")] == ["png", "png"]
    expected = Engine(folder).draw(clip("moving"))["moving"]
    assert np.array_equal(frames(answers["moving"]), frames(expected))
    alone = Engine(folder)
    alone.loop.post(Submit(pictures, picture("first")))
    alone.loop.post(Stop())
    alone.loop.run()
    assert next(each.event for each in alone.sent if getattr(each, "id", "") == "first" and isinstance(
        getattr(each, "event", None), Done)).file == answers["first"].file  # fmt: skip


def test_a_clip_is_cancelled_within_a_step_and_the_others_go_on(folder: Path) -> None:
    engine = Engine(folder)
    engine.cancel_at_its_first_step("long")
    answers = engine.draw(clip("long", steps=900), clip("short"))
    assert isinstance(answers["long"], Failed) and isinstance(answers["short"], Done)
    steps = engine.events("long")
    assert [event for event in steps if isinstance(event, Step)] == [Step(1, 900)]


def test_a_picture_does_not_wait_for_the_file_of_a_clip(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, encode, answered = Engine(folder), files.encode, threading.Event()

    def held(result: Any, recipe: Any, format: str) -> bytes:
        assert format == "png" or answered.wait(120)
        return encode(result, recipe, format)

    def send(report: Any) -> None:
        engine.sent.append(report)
        if isinstance(report, Answer) and report.id == "late" and isinstance(report.event, Done):
            answered.set()

    monkeypatch.setattr(files, "encode", held)
    engine.loop._send = send
    pictures = ModelConfig(name="p", model=str(folder / "pictures"), folder=folder, dtype="fp32", cuda=False)
    engine.loop.post(Submit(pictures, picture("late", steps=9)))
    answers = engine.draw(clip("moving", steps=1))
    assert isinstance(answers["late"], Done) and isinstance(answers["moving"], Done), answers


@pytest.mark.parametrize("format", ["gif", "webp", "mp4"])
def test_the_file_of_a_cancelled_clip_is_not_finished(
    folder: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    needs(format)
    engine, encode, released = Engine(folder), files.encode, threading.Event()
    ended: list[BaseException] = []

    def held(*arguments: Any) -> bytes:
        engine.loop.post(Cancel("regretted"))
        assert released.wait(30)
        try:
            return encode(*arguments)
        except BaseException as error:
            ended.append(error)
            raise

    def send(report: Any) -> None:
        engine.sent.append(report)
        if isinstance(report, Answer) and isinstance(report.event, Failed):
            released.set()

    monkeypatch.setattr(files, "encode", held)
    engine.loop._send = send
    answers = engine.draw(clip("regretted", steps=1, format=format))
    assert isinstance(answers["regretted"], Failed)
    assert [type(error) for error in ended] == [Cancelled]


def test_events_of_a_clip_are_those_of_a_picture(folder: Path) -> None:
    engine = Engine(folder)
    engine.draw(clip("shown", previews=1))
    events = engine.events("shown")
    assert [type(event) for event in events] == [Step, Step, Preview, Step, Step, Done]
    assert (events[2].width, events[2].height) == (16, 16)


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_the_command_line_writes_a_clip_and_draws_it_again_from_its_file(
    folder: Path, tmp_path: Path, suffix: str
) -> None:
    (tmp_path / "film.yaml").write_text(f"name: film\nparameters: {{model: {folder / 'base'}}}\n")
    first, again = tmp_path / f"first.{suffix}", tmp_path / f"again.{suffix}"
    flags = ["--models", str(tmp_path), "-m", "film", "--frames", "5", "--fps", "8", "--steps", "2", "--size", "16x16"]
    ran = CliRunner().invoke(app, ["generate", "a cat", *flags, "-o", str(first)])
    assert ran.exit_code == 0, (ran.output, ran.exception)
    with Image.open(first) as image:
        assert (image.format, image.n_frames, image.size) == (suffix.upper(), 5, (16, 16))
    made = recipe.read(first)
    assert (made.sampling.num_frames, made.sampling.fps, made.pipeline) == (5, 8, "WanPipeline")
    ran = CliRunner().invoke(app, ["generate", "--like", str(first), "--models", str(tmp_path), "-o", str(again)])
    assert ran.exit_code == 0, (ran.output, ran.exception)
    assert again.read_bytes() == first.read_bytes()


def test_a_killed_worker_is_replaced_and_the_clip_is_the_same(folder: Path) -> None:
    same_after_a_kill(Engine(folder).config, clip("before", steps=30))

"""Pictures are encoded beside the loop's thread: others go on drawing, and events keep their order."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from sfumato.core import Done, Failed, Generation, Preview, Step
from sfumato.engine.protocol import Answer, Cancel
from sfumato.pictures import files
from sfumato.pictures.encoder import EncoderThread
from sfumato.previews import steps
from sfumato.sampling import Sampling
from support import tiny
from support.engines import Engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoding")
    tiny.stable_diffusion().save_pretrained(folder / "base")
    return folder


def wanted(id: str, steps: int, **more: Any) -> Generation:
    return Generation(
        id=id, prompt="a cup", seed=1, sampling=Sampling(width=32, height=32, steps=steps, scheduler="ddim"), **more
    )


class Held:
    """Encodes the first picture when it is released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.released = threading.Event(), threading.Event()
        self.threads: set[int] = set()
        self._encode = files.encode
        monkeypatch.setattr(files, "encode", self.encode)

    def encode(self, *arguments: Any) -> bytes:
        self.threads.add(threading.get_ident())
        self.begun.set()
        assert self.released.wait(30)
        return self._encode(*arguments)


def on_report(engine: Engine, react: Any) -> None:
    original = engine.loop._send

    def send(report: Any) -> None:
        original(report)
        if isinstance(report, Answer):
            react(report.id, report.event)

    engine.loop._send = send


def test_others_draw_while_a_picture_is_encoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, held = Engine(folder), Held(monkeypatch)

    def react(id: str, event: Any) -> None:
        if id == "long" and event == Step(8, 8):
            held.released.set()

    on_report(engine, react)
    answers = engine.draw(wanted("short", 1), wanted("long", 8))
    assert all(isinstance(answer, Done) for answer in answers.values())
    assert held.threads
    assert threading.get_ident() not in held.threads


def test_a_request_is_cancelled_while_its_picture_is_encoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, held = Engine(folder), Held(monkeypatch)

    def cancel() -> None:
        held.begun.wait(30)
        engine.loop.post(Cancel("one"))

    canceller = threading.Thread(target=cancel)
    canceller.start()
    on_report(engine, lambda id, event: held.released.set() if isinstance(event, Failed) else None)
    (answer,) = engine.draw(wanted("one", 1)).values()
    canceller.join()
    assert isinstance(answer, Failed)
    assert answer.error.code == "cancelled"
    assert isinstance(engine.draw(wanted("two", 1))["two"], Done)


def test_what_encoding_raises_fails_its_request_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, encode = Engine(folder), files.encode

    def refuse(image: Any, image_recipe: Any, format: str) -> bytes:
        if image_recipe.sampling.steps == 1:
            raise OSError("no room")
        return encode(image, image_recipe, format)

    monkeypatch.setattr(files, "encode", refuse)
    answers = engine.draw(wanted("short", 1), wanted("long", 2))
    assert isinstance(answers["short"], Failed)
    assert "no room" in answers["short"].error.message
    assert isinstance(answers["long"], Done)


def test_previews_are_made_in_that_thread_too_and_come_before_the_picture(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, encode = set(), steps._png

    def png(image: Any) -> bytes:
        threads.add(threading.get_ident())
        return encode(image)

    monkeypatch.setattr(steps, "_png", png)
    engine = Engine(folder)
    engine.draw(wanted("one", 6, previews=3))
    events = [each.event for each in engine.sent if isinstance(each, Answer)]
    assert [event.index for event in events if isinstance(event, Preview)] == [0, 1, 2]
    assert isinstance(events[-1], Done)
    assert threads
    assert threading.get_ident() not in threads


class Frames:
    """Stands for what work holds."""


def nothing() -> None:
    pass


def test_long_work_comes_after_what_was_given_before_and_holds_nothing_back() -> None:
    encoder = EncoderThread(nothing, nothing)
    begin, end, order = threading.Event(), threading.Event(), list[str]()

    def last_preview() -> None:
        assert begin.wait(30)
        order.append("preview")

    def clip() -> None:
        order.append("clip")
        assert end.wait(30)

    encoder.later(last_preview)
    future = encoder.begin(clip, long=True)
    begin.set()
    encoder.begin(end.set).result(30)  # a picture
    future.result(30)
    encoder.close()
    assert order == ["preview", "clip"]


def test_cancelled_work_is_forgotten_at_once() -> None:
    encoder, released, frames = EncoderThread(nothing, nothing), threading.Event(), Frames()
    encoder.begin(lambda: released.wait(30), long=True)
    kept = weakref.ref(frames)
    future = encoder.begin(lambda held=frames: held, long=True)  # type: ignore[misc]
    del frames
    assert future.cancel()
    assert kept() is None
    released.set()
    encoder.close()

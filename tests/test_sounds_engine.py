"""Sounds in the engine's loop and in a worker: together, beside pictures, cancelled, and after the worker's death."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfumato.config import ModelConfig
from sfumato.core import Done, Failed, Generation, Step
from sfumato.engine.protocol import Submit
from sfumato.pictures import files
from sfumato.sampling import nested
from support import tiny
from support.engines import Engine
from support.families_sound import FAMILIES
from support.replayed import same_after_a_kill

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    FAMILIES["StableAudio"].build().save_pretrained(folder / "base")
    tiny.stable_diffusion().save_pretrained(folder / "pictures")
    return folder


def sound(id: str, **fields: Any) -> Generation:
    made = {"id": id, "prompt": f"rain {id}", "seed": 1, "steps": 4, "seconds": 1.5, "format": "wav"}
    return Generation(**nested({**made, **fields}))


def test_sounds_share_forward_passes_and_are_what_they_are_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared before they are encoded."""
    made: dict[str, Any] = {}
    encode = files.encode

    def noted(result: Any, recipe: Any, format: str) -> bytes:
        made[recipe.prompt] = result.samples
        return encode(result, recipe, format)

    monkeypatch.setattr(files, "encode", noted)
    second = sound("two", seed=2, steps=6, negative_prompt="noise", seconds=1.0)
    asked = [sound("one", seed=1), second, sound("three", seed=3)]
    engine = Engine(folder)
    engine.draw(*asked)
    assert engine.shared("transformer") >= 2
    together = dict(made)
    for each in asked:
        Engine(folder, max_batch=1).draw(each)
        assert made[each.prompt].shape == (2, round(4 * (each.sampling.seconds or 0)))
        assert np.abs(made[each.prompt] - together[each.prompt]).max() < 1e-4
    assert np.abs(together["rain one"] - together["rain three"]).max() > 1e-3


def test_a_sound_beside_a_picture_of_another_model(folder: Path) -> None:
    engine = Engine(folder)
    pictures = ModelConfig(name="p", model=str(folder / "pictures"), folder=folder, dtype="fp32", cuda=False)
    fields = {"id": "seen", "prompt": "a cup", "seed": 1, "steps": 4, "width": 32, "height": 32, "scheduler": "ddim"}
    engine.loop.post(Submit(pictures, Generation(**nested(fields))))
    answers = engine.draw(sound("heard"))
    assert (answers["seen"].format, answers["heard"].format) == ("png", "wav")
    assert answers["heard"].file == Engine(folder).draw(sound("heard"))["heard"].file


def test_a_sound_is_cancelled_within_a_step_and_the_others_go_on(folder: Path) -> None:
    engine = Engine(folder)
    engine.cancel_at_its_first_step("long")
    answers = engine.draw(sound("long", steps=900), sound("short"))
    assert isinstance(answers["long"], Failed)
    assert isinstance(answers["short"], Done)
    steps = engine.events("long")
    assert [event for event in steps if isinstance(event, Step)] == [Step(1, 900)]


def test_a_killed_worker_is_replaced_and_the_sound_is_the_same(folder: Path) -> None:
    same_after_a_kill(Engine(folder).config, sound("before", steps=30))

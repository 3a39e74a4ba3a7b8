"""Sounds in the engine's loop and in a worker: together, beside pictures, cancelled, and after the worker's death."""

from __future__ import annotations

from dataclasses import dataclass
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


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Seed -> the samples of the latest sound with it, before they are encoded."""
    made: dict[int, Any] = {}
    encode = files.encode

    def noted(result: Any, recipe: Any, format: str) -> bytes:
        made[recipe.seed] = result.samples
        return encode(result, recipe, format)

    monkeypatch.setattr(files, "encode", noted)
    return made


@dataclass(frozen=True)
class Shared:
    """Three sounds with these prompts and steps, of which so many share a forward pass of the denoiser."""

    most: int
    prompts: tuple[str, str, str] = ("rain", "rain on a roof", "wind")
    steps: tuple[int, int, int] = (4, 6, 4)
    seconds: float = 0.1037
    why: str = ""
    """Why it is fewer than three."""


EQUAL = ("rain on a one", "rain on a two", "rain on a six")
"""Texts of as many tokens each."""

SHARED = {
    "StableAudio": Shared(3, seconds=1.5),
    "StableAudio3": Shared(3),
    "AceStep": Shared(3, EQUAL),
    "AceStep, other lengths": Shared(2, ("rain on a one", "rain on a two two two", "rain on a six"),
                                     why="its condition encoder takes only texts of one length"),
    "LongCatAudioDiT": Shared(3, EQUAL),
    "LongCatAudioDiT, other lengths": Shared(1, ("rain", "rain on a roof", "rain on a cold and old roof"),
                                             why="a convolution over its text reads padding"),
    "AudioLDM2": Shared(2, EQUAL, (30, 34, 30), why="its language model writes with a cache, alone; the third is late"),
    "DanceDiffusion": Shared(3, ("", "", ""), seconds=0.0203),
}  # fmt: skip
"""By the family, and more words for other prompts of it."""


@pytest.mark.filterwarnings("ignore")  # diffusers', on saving toys
@pytest.mark.parametrize("name", [n if n == "StableAudio" else pytest.param(n, marks=pytest.mark.slow) for n in SHARED])
def test_sounds_share_forward_passes_and_are_what_they_are_alone(
    name: str, tmp_path: Path, made: dict[int, Any]
) -> None:
    family, expected = FAMILIES[name.partition(",")[0]], SHARED[name]
    family.build().save_pretrained(tmp_path / "base")
    asked = [
        sound(f"{seed}", prompt=prompt, seed=seed, steps=steps, seconds=expected.seconds)
        for seed, prompt, steps in zip((1, 2, 3), expected.prompts, expected.steps, strict=True)
    ]
    engine = Engine(tmp_path)
    answers = engine.draw(*asked)
    assert all(isinstance(answer, Done) for answer in answers.values()), answers
    assert engine.shared(family.denoiser) == expected.most
    assert (expected.most < 3) == bool(expected.why)
    together = dict(made)
    for each in asked:
        Engine(tmp_path, max_batch=1).draw(each)
        assert made[each.seed].shape[1] > 0
        assert np.abs(made[each.seed] - together[each.seed]).max() < 1e-4
    assert np.abs(together[1] - together[3]).max() > 1e-3


def test_sounds_of_other_lengths_and_prompts_share_too(folder: Path, made: dict[int, Any]) -> None:
    second = sound("two", seed=2, steps=6, negative_prompt="noise", seconds=1.0)
    asked = [sound("one", seed=1), second, sound("three", seed=3)]
    engine = Engine(folder)
    engine.draw(*asked)
    assert engine.shared("transformer") >= 2
    together = dict(made)
    for each in asked:
        Engine(folder, max_batch=1).draw(each)
        assert made[each.seed].shape == (2, round(4 * (each.sampling.seconds or 0)))
        assert np.abs(made[each.seed] - together[each.seed]).max() < 1e-4


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

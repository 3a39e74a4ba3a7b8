"""Sound: seconds as asked, the samples of a plain call, and what is refused before any work."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.checkpoints import class_reading, sound_rules
from sfumato.checkpoints.static_capabilities import static_capabilities
from sfumato.config import ModelConfig
from sfumato.core import Generation, Limits
from sfumato.drawing import draw as drawing
from sfumato.drawing.info import model_info
from sfumato.errors import InvalidRequest
from sfumato.models.load import Loaded
from sfumato.pictures.results import Sound
from sfumato.pipelines import inputs
from sfumato.sampling import Sampling
from sfumato.serving.planning import ImageRequest, plan
from sfumato.status import SoundRule
from support import families_sound, tiny
from support.drawing import loaded, quiet, wanted
from support.families_sound import FAMILIES

LIMITS = Limits(2048 * 2048, 4096, 8)
SLOW = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")

LENGTHS = {"StableAudio": 1.5, "DanceDiffusion": 0.0203}
"""Seconds of a family; of the others 0.1037, which are whole latents of none."""

ASKED = {"AudioLDM2": 415.5 / 4000, "LongCatAudioDiT": 1245.5 / 12000}
"""What is passed to classes that round down, for 0.1037 seconds."""

ALL = [name if name in ("StableAudio", "AudioLDM2") else pytest.param(name, marks=SLOW) for name in FAMILIES]


@functools.cache
def model(family: str) -> Loaded:
    return loaded(FAMILIES[family].build())


def asked(family: str, **fields: Any) -> Generation:
    prompt = "" if family == "DanceDiffusion" else "rain on a roof"
    return wanted(**{"prompt": prompt, "format": "wav", "seconds": LENGTHS.get(family, 0.1037)} | fields)


def sound_of(made: Loaded, generation: Generation) -> tuple[Sound, drawing.Drawn]:
    with torch.no_grad():
        drawn = drawing.picture(made, generation, quiet)
    assert isinstance(drawn.result, Sound)
    return drawn.result, drawn


@pytest.mark.parametrize("family", ALL)
def test_a_sound_is_that_of_a_plain_call_cut_to_the_sample(family: str) -> None:
    made, generation = model(family), asked(family)
    sound, drawn = sound_of(made, generation)
    seconds = generation.sampling.seconds
    assert seconds
    assert drawn.warnings == ()
    assert sound.samples.shape[1] == int(seconds * sound.rate + 1e-6)
    prompt = {"prompt": generation.prompt} if generation.prompt else {}
    plain = made.pipeline(
        **prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(1),
        **{length(made): ASKED.get(family, seconds)},
    ).audios[0]  # fmt: skip
    plain = np.atleast_2d(torch.as_tensor(plain).numpy())[:, : sound.samples.shape[1]]
    assert np.abs(plain).max() > 0.01
    assert np.abs(sound.samples - plain).max() < 1e-4
    recipe = drawn.recipe.sampling
    assert (recipe.seconds, recipe.size, recipe.num_frames, recipe.steps) == (seconds, None, None, 2)


def length(made: Loaded) -> str:
    (name,) = set(sound_rules.LENGTHS) & {*class_reading.of_pipeline(made.pipeline).parameters}
    return name


@pytest.mark.parametrize("family", ALL)
def test_another_seed_is_another_sound_and_the_same_is_the_same(family: str) -> None:
    first, again, other = (sound_of(model(family), asked(family, seed=seed))[0].samples for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


@pytest.mark.filterwarnings("ignore")  # diffusers', on saving toys
@pytest.mark.parametrize("family", [pytest.param(name, marks=SLOW) for name in FAMILIES])
def test_the_files_say_what_the_loaded_model_does(family: str, tmp_path: Path) -> None:
    made = model(family)
    made.pipeline.save_pretrained(tmp_path / "m")
    config = ModelConfig(name="m", model=str(tmp_path / "m"))
    known, info = static_capabilities(config), model_info(made)
    assert info.tasks == ("text-to-audio", *(["audio-to-audio"] if family == "StableAudio" else []))
    assert known.abilities == info.abilities
    assert known.abilities
    assert known.abilities.sound


def test_the_length_of_a_sound_that_nobody_said() -> None:
    """Of Stable Audio all that its denoiser was trained on; of the others what their calls have."""
    lengths = {family: model_info(model(family)).sampling.seconds for family in FAMILIES}
    assert lengths == {
        "StableAudio": 4.0, "StableAudio3": 10.0, "AceStep": 60.0, "AudioLDM2": 0.016, "LongCatAudioDiT": None,
        "DanceDiffusion": 0.032,
    }  # fmt: skip
    sound, drawn = sound_of(model("StableAudio"), asked("StableAudio", seconds=None))
    assert (sound.seconds, drawn.recipe.sampling.seconds) == (3.75, 4.0)  # this VAE makes a sample less of the last
    assert drawn.warnings == ("seconds: 3.75 were made, and 4 requested",)
    sound, drawn = sound_of(model("LongCatAudioDiT"), asked("LongCatAudioDiT", seconds=None))
    assert drawn.recipe.sampling.seconds == sound.seconds > 0.5


def test_a_length_is_reached_though_the_class_rounds_down() -> None:
    """4.35 s at 44100 Hz are 191835 samples; as a float they are a little less."""
    sound, drawn = sound_of(loaded(families_sound.stable_audio_3()), asked("StableAudio3", seconds=0.29))
    assert sound.samples.shape[1] == 232
    assert drawn.warnings == ()
    rule = SoundRule(44100)
    assert (rule.samples(4.35), int(4.35 * 44100)) == (191835, 191834)


def test_a_length_that_the_class_does_not_make_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"seconds: 4\.5; m does not make that long a sound: at most 4 are made"):
        sound_of(model("StableAudio"), asked("StableAudio", seconds=4.5))
    with pytest.raises(InvalidRequest, match=r"seconds: 0\.001; .*: at least 0.0015 are made"):
        sound_of(model("DanceDiffusion"), asked("DanceDiffusion", seconds=0.001))
    with pytest.raises(InvalidRequest, match="seconds: 4 are m's own length, and 3 are allowed"):
        sound_of(model("StableAudio"), asked("StableAudio", seconds=None, limits=replace(LIMITS, seconds=3)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seconds": 61}, "seconds: 61; 0 to 60 are valid"),
        ({"num_frames": 9}, "num_frames: 9; it is for clips, and the request is for sound"),
        ({"width": 64, "height": 64}, "width: 64; it is for pictures and clips, and the request is for sound"),
        ({"bpm": 5}, "bpm: 5; 20 to 400 are valid"),
    ],
)
def test_what_no_sound_has_is_refused(fields: dict[str, Any], message: str) -> None:
    request = ImageRequest(prompts=["a"], format="wav", sampling=Sampling(**fields))
    with pytest.raises(InvalidRequest, match=message):
        plan(request, ModelConfig(name="m", model="m"), LIMITS, 4)


def test_a_picture_with_the_fields_of_a_sound_is_refused() -> None:
    request = ImageRequest(prompts=["a"], sampling=Sampling(lyrics="la la"))
    with pytest.raises(InvalidRequest, match="lyrics: 'la la'; it is for sound, and the request is for pictures"):
        plan(request, ModelConfig(name="m", model="m"), LIMITS, 4)


def test_a_model_of_pictures_makes_no_sound_and_the_reverse() -> None:
    with pytest.raises(InvalidRequest, match=r"m makes pictures \(.*\), and the request is for sound"):
        sound_of(loaded(tiny.stable_diffusion()), asked("StableAudio"))
    with pytest.raises(
        InvalidRequest, match=r"m makes sound \(text-to-audio, audio-to-audio\), and the request is for pictures"
    ):
        drawing.picture(model("StableAudio"), wanted(prompt="a cat"), quiet)
    with pytest.raises(InvalidRequest, match="the request is for clips"):
        drawing.picture(model("StableAudio"), wanted(prompt="a cat", format="webp"), quiet)


@pytest.mark.parametrize("kind", ["StableAudio3AudioToAudioPipeline", "StableAudio3InpaintPipeline"])
def test_a_class_that_needs_a_sound_says_so(kind: str) -> None:
    reading = class_reading.of_name(kind)
    assert reading
    can = inputs.abilities(inputs.Kin(reading), {})
    assert can.problem == f"{kind} needs audio, which a request cannot give"


def test_the_words_of_a_song_reach_the_class() -> None:
    made = model("AceStep")
    plain, sung = (sound_of(made, asked("AceStep", **more))[0].samples for more in ({}, {"lyrics": "la la la"}))
    assert np.abs(plain - sung).max() > 1e-3
    with pytest.raises(InvalidRequest, match=r"lyrics: m .StableAudioPipeline. does not take it"):
        sound_of(model("StableAudio"), asked("StableAudio", lyrics="la"))


def test_a_parameter_of_the_model_file_is_the_default() -> None:
    made = loaded(families_sound.stable_audio(), seconds=2.0)
    assert sound_of(made, asked("StableAudio", seconds=None))[0].seconds == 2.0
    made = loaded(families_sound.stable_audio(), option_lines=(("audio_end_in_s", "1.0"),))
    assert sound_of(made, asked("StableAudio", seconds=None))[0].seconds == 1.0

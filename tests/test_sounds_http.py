"""The routes of sound: vLLM-Omni's fields and LocalAI's, the file as the answer, errors before any work."""

from __future__ import annotations

import io
import json
import re
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import families, families_sound
from support.families_served import Served, served

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")

GENERATE, LOCALAI = "/v1/audio/generate", "/v1/sound-generation"
RAIN = {"input": "rain on a roof", "audio_length": 1.5, "seed": 1, "num_inference_steps": 2}
FAMILIES = {
    "StableAudio": families_sound.FAMILIES["StableAudio"],
    "StableAudio3": families_sound.FAMILIES["StableAudio3"],
    "AceStep": families_sound.FAMILIES["AceStep"],
    "StableDiffusion": families.FAMILIES["StableDiffusion"],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("sounds"), FAMILIES, max_batch=4, loaded_models=4, max_seconds=5) as server:
        for family in FAMILIES:
            server.model(family)
        yield server


def of_wav(file: bytes) -> tuple[int, np.ndarray[Any, Any]]:
    """Samples a second, and (samples, channels)."""
    with wave.open(io.BytesIO(file)) as reader:
        samples = np.frombuffer(reader.readframes(reader.getnframes()), "<i2")
        return reader.getframerate(), samples.reshape(-1, reader.getnchannels()).astype(float) / 32767


def make(server: Served, route: str = GENERATE, **body: Any) -> Any:
    fields = {"model": "StableAudio", **(RAIN if route == GENERATE else {}), **body}
    return server.client.post(route, json={name: value for name, value in fields.items() if value is not None})


def test_the_answer_is_the_file_of_the_length_asked_for(server: Served) -> None:
    answer = make(server)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "audio/wav")
    rate, samples = of_wav(answer.content)
    assert (rate, samples.shape) == (4, (6, 2))
    assert "x-sfumato-warning" not in answer.headers
    assert make(server).content == answer.content
    assert make(server, seed=2).content != answer.content


def test_a_form_is_read_as_json_is(server: Served) -> None:
    fields = {name: str(value) for name, value in RAIN.items()} | {"model": "StableAudio"}
    answer = server.client.post(GENERATE, data=fields | {"speed": "1.0", "audio_start": "0"})
    assert (answer.status_code, answer.content) == (200, make(server).content)


def test_localais_form_gives_the_same_sound(server: Served) -> None:
    body = {"text": "rain on a roof", "model": None, "model_id": "StableAudio", "duration_seconds": 1.5, "seed": 1}
    answer = make(server, LOCALAI, **body, steps=2, prompt_influence=0.3, do_sample=True)
    assert answer.content == make(server).content
    assert answer.headers["x-sfumato-ignored"] == "prompt_influence, do_sample"
    assert make(server, LOCALAI, **body | {"caption": "rain on a roof", "text": "a tune"}, steps=2).content == (
        answer.content
    )


def test_without_a_model_the_first_that_makes_sound_does(server: Served) -> None:
    assert make(server, model=None).content == make(server, model="AceStep").content


@pytest.mark.parametrize(
    ("route", "fields", "param", "message"),
    [
        (GENERATE, {"response_format": "pcm"}, "response_format", "wav, flac, mp3, opus are valid for sound"),
        (GENERATE, {"audio_length": 6}, "seconds", "seconds: 6.0; 0 to 5 are valid"),
        (GENERATE, {"audio_length": 4.5}, "seconds", "StableAudio does not make that long a sound: at most 4 are made"),
        (GENERATE, {"audio_length": "nan"}, "audio_length", "nan"),
        (GENERATE, {"input": "x" * 40_000}, "input", "32000"),
        (GENERATE, {"speed": 2}, "speed", "less than or equal to 1"),
        (GENERATE, {"audio_start": 1}, "audio_start", "less than or equal to 0"),
        (GENERATE, {"stream_format": "sse"}, "stream_format", "audio"),
        (GENERATE, {"lyrics": "la la"}, "lyrics", "does not take it"),
        (GENERATE, {"model": "StableDiffusion"}, "model", "makes pictures"),
        (LOCALAI, {}, "text", "what to hear is missing"),
        (LOCALAI, {"text": "a", "lyrics": "la", "instrumental": True}, "instrumental", "there are lyrics too"),
    ],
)
def test_a_wrong_request_is_a_400_that_says_why(
    server: Served, route: str, fields: dict[str, Any], param: str, message: str
) -> None:
    answer = make(server, route, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]


def test_what_cannot_be_made_loads_no_model(tmp_path: Path) -> None:
    """The files of a model say what it does: a picture of it is refused before its weights are read."""
    with served(tmp_path, FAMILIES) as server:
        model = server.model("StableAudio")
        answer = server.generate(model)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
        assert (
            "makes sound (text-to-audio, audio-to-audio), and the request is for pictures"
            in answer.json()["error"]["message"]
        )
        assert server.told(model)["status"] == "unloaded"


GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "sound.md"
EXAMPLES = re.findall(r"```json\n(.*?)```", GUIDE.read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_the_guide_make_sounds(server: Served, example: str) -> None:
    body = json.loads(example)
    route = GENERATE if "input" in body else LOCALAI
    model = "AceStep" if "lyrics" in body else "StableAudio3"  # at 800 samples a second
    body |= {"model" if "model" in body else "model_id": model, "num_inference_steps": 2}
    answer = server.client.post(route, json=body)
    assert answer.status_code == 200, answer.text
    assert of_wav(answer.content)[1].shape == (4000, 2)
    assert "x-sfumato-warning" not in answer.headers


def test_the_model_list_says_what_makes_sound(server: Served) -> None:
    told = server.client.get("/v1/models/StableAudio").json()
    assert told["sfumato"]["tasks"] == ["text-to-audio", "audio-to-audio"]
    limits = told["sfumato"]["limits"]
    assert [limits[name] for name in ("seconds", "sample_rate", "frames", "frame_step")] == [4, 4, None, None]
    limits = server.client.get("/v1/models/StableDiffusion").json()["sfumato"]["limits"]
    assert [limits[name] for name in ("seconds", "sample_rate", "frames", "frame_step")] == [None] * 4
    assert told["architecture"] == {"input_modalities": ["text", "audio"], "output_modalities": ["audio"]}


def test_sounds_are_made_beside_each_other_and_beside_pictures(server: Served) -> None:
    """In the same steps of one loop, as alone: 16 bits are exact to 3e-5."""
    prompts = [("rain", 2, 1.5), ("a dog that barks", 4, 1.0), ("wind in the trees", 3, 1.25)]
    bodies = [
        {"input": prompt, "num_inference_steps": steps, "audio_length": seconds, "seed": index, "model": model}
        for index, (prompt, steps, seconds) in enumerate(prompts)
        for model in ("StableAudio", "StableAudio3")
    ]
    alone = [of_wav(server.client.post(GENERATE, json=body).content)[1] for body in bodies]
    picture = server.generate("StableDiffusion", size="64x64", steps=3).json()["data"]
    with ThreadPoolExecutor(len(bodies) + 1) as pool:
        beside = pool.submit(server.generate, "StableDiffusion", size="64x64", steps=3)
        together = [of_wav(each.content)[1] for each in pool.map(lambda body: make(server, **body), bodies)]
    assert beside.result().json()["data"] == picture
    for one, other in zip(alone, together, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() < 1e-4


def test_a_sound_is_a_job_and_is_made_once(server: Served) -> None:
    headers = {"idempotency-key": "rain"}
    first = server.client.post(GENERATE, json={**RAIN, "model": "StableAudio"}, headers=headers)
    again = server.client.post(GENERATE, json={**RAIN, "model": "StableAudio"}, headers=headers)
    assert again.content == first.content == make(server).content
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["content-type"] == "audio/wav"


def test_a_job_of_a_sound_can_be_cancelled(server: Served) -> None:
    body = {**RAIN, "model": "StableAudio", "num_inference_steps": 1000}
    begun = server.client.post(GENERATE, json=body, headers={"prefer": "respond-async"})
    assert begun.status_code == 202
    server.client.delete(begun.headers["location"])
    told = server.client.get(begun.headers["location"]).json()
    assert told["status"] == "cancelled"

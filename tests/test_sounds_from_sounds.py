"""Sounds from sounds: the samples of a plain call, decoding, and every way to send one."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import io
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sfumato.checkpoints import sound_rules
from sfumato.checkpoints.static_capabilities import static_capabilities
from sfumato.cli import app
from sfumato.config import ModelConfig
from sfumato.core import Generation, Limits, SourceSound
from sfumato.drawing import draw as drawing
from sfumato.drawing.info import model_info
from sfumato.errors import InvalidPicture, InvalidRequest
from sfumato.models.load import Loaded
from sfumato.pictures import recipe, source_sounds
from sfumato.pictures.decoder_pool import Decoders
from sfumato.pictures.results import Sound
from sfumato.serving.planning import ImageRequest, plan
from sfumato.settings import Settings
from support import families_sound, tiny
from support.drawing import loaded, quiet, wanted
from support.families_served import Served, served
from support.probed import needs

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")

FAMILIES = {"StableAudio": ("StableAudioPipeline", 1.5), "AceStep": ("AceStepPipeline", 0.1)}
"""Family -> its class, and seconds that it makes."""


def waves(count: int, channels: int = 2) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Noise, the same every time; (channels, samples)."""
    return np.random.default_rng(0).uniform(-0.9, 0.9, (channels, count)).astype(np.float32)


def given(rate: int, seconds: float, channels: int = 2) -> SourceSound:
    """As the service decodes it."""
    samples = waves(round(rate * seconds), channels).tobytes()
    return SourceSound(samples, channels, rate, hashlib.sha256(samples).hexdigest())


@functools.cache
def model(family: str) -> Loaded:
    made = families_sound.FAMILIES[family].build()
    if family == "AceStep":  # its denoiser takes latents as the encoder makes them, too
        with tiny.seeded(0):
            made.vae = type(made.vae).from_config({**made.vae.config, "encoder_hidden_size": 16}).eval()
    return loaded(made)


def rate_of(made: Loaded) -> int:
    rule = sound_rules.of_pipeline(made.pipeline)
    assert rule
    return rule.rate


def asked(sound: SourceSound | None, **fields: Any) -> Generation:
    return wanted(**{"prompt": "rain on a roof", "format": "wav", "sound": sound} | fields)


def made_of(made: Loaded, generation: Generation) -> tuple[Sound, drawing.Drawn]:
    with torch.no_grad():
        drawn = drawing.picture(made, generation, quiet)
    assert isinstance(drawn.result, Sound)
    return drawn.result, drawn


def test_every_class_that_takes_a_sound_is_compared() -> None:
    assert {name for name, _ in FAMILIES.values()} == sound_rules.SOURCES.keys()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_from_a_sound_is_that_of_a_plain_call(family: str, channels: int) -> None:
    made, (name, seconds) = model(family), FAMILIES[family]
    rate = rate_of(made)
    source = given(rate, seconds, channels)
    sound, drawn = made_of(made, asked(source, seconds=seconds))
    samples = torch.from_numpy(waves(round(rate * seconds), channels))
    samples = samples if channels == 2 else samples.repeat(2, 1)
    own: dict[str, Any] = {
        "StableAudio": {
            "initial_audio_waveforms": samples[None],
            "initial_audio_sampling_rate": rate,
            "audio_end_in_s": seconds,
        },
        "AceStep": {"reference_audio": samples, "audio_duration": seconds},
    }[family]
    torch.manual_seed(1)
    with torch.no_grad():
        plain = made.pipeline(
            prompt="rain on a roof", num_inference_steps=2, output_type="np",
            generator=torch.Generator().manual_seed(1), **own,
        ).audios[0]  # fmt: skip
    apart = np.abs(sound.samples - np.asarray(plain)[:, : sound.samples.shape[1]]).max()
    assert apart < 1e-4
    changed, _ = made_of(made, asked(given(rate, seconds / 2, channels), seconds=seconds))
    assert np.abs(sound.samples - changed.samples).max() > 10 * apart  # it is listened to
    assert (drawn.recipe.pipeline, drawn.recipe.audio_sha256) == (name, source.sha256)


def test_a_sound_over_another_has_its_length() -> None:
    made = loaded(model("StableAudio").pipeline, seconds=1.0)  # of texts
    rate = rate_of(made)
    assert made_of(made, asked(given(rate, 1.5)))[0].seconds == 1.5
    assert made_of(made, asked(given(rate, 1.5), seconds=0.75))[0].seconds == 0.75
    assert made_of(made, asked(None))[0].seconds == 1.0
    with pytest.raises(InvalidRequest, match=r"seconds: 4.5; m does not make that long a sound"):
        made_of(made, asked(given(rate, 4.5)))


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"audio: m takes no sound .text-to-audio.") as caught:
        made_of(model("AudioLDM2"), asked(given(4000, 1)))
    assert caught.value.param == "audio"
    with pytest.raises(InvalidRequest, match="audio: 5 samples a second; the model takes 4"):
        made_of(model("StableAudio"), asked(given(5, 1)))
    with pytest.raises(InvalidRequest, match=r"seconds: 1.5 .* allowed"):
        made_of(model("StableAudio"), asked(given(4, 1.5), limits=Limits(1, 1, 1, seconds=1)))


def test_a_file_that_allows_nothing_names_the_field() -> None:
    shut = ModelConfig(name="m", model="o/r", enable_parameters=frozenset())
    request = ImageRequest(prompts=["rain"], audio=b"x", audio_field="audio_reference", format="wav")
    with pytest.raises(InvalidRequest, match=r"audio_reference: m does not allow .* Add image to") as caught:
        plan(request, shut, Limits(1, 1, 1), 1)
    assert caught.value.param == "audio_reference"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_list_says_it_before_and_after_loading(family: str, tmp_path: Path) -> None:
    made = model(family)
    tiny.save(made.pipeline, tmp_path / "weights")
    told = static_capabilities(ModelConfig(name="m", model=str(tmp_path / "weights"))).abilities
    known = model_info(made).abilities
    assert told == known
    audio = known.input("audio")
    assert audio and (audio.least, audio.most) == (0, 1)
    over = family == "StableAudio"
    assert audio.roles == (("sound",) if over else ("timbre",))
    assert known.tasks == (("text-to-audio", "audio-to-audio") if over else ("text-to-audio",))


# Decoding


def wav(rate: int, count: int, channels: int = 2, width: int = 2) -> bytes:
    levels = (waves(count, channels).T * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    data = b"".join(int(level).to_bytes(4, "little", signed=True)[:width] for level in levels.flat)
    file = io.BytesIO()
    with wave.open(file, "w") as writer:
        writer.setparams((channels, width, rate, count, "NONE", ""))
        writer.writeframes(data)
    return file.getvalue()


def contained(format: str, codec: str, rate: int = 48_000, count: int = 4800, tags: Any = ()) -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        container.metadata.update(tags)
        stream: Any = container.add_stream(codec, rate, layout="stereo")
        frame = av.AudioFrame.from_ndarray(waves(count), format="fltp", layout="stereo")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def decoded(data: bytes, most_s: float = 5, rate: int | None = None) -> tuple[dict[str, Any], Any]:
    answer, samples = source_sounds.decode(data, "audio", most_s, rate)
    return answer, np.frombuffer(samples, np.float32).reshape(answer["channels"], -1)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("width", [2, 4])
def test_a_wav_needs_no_more(width: int, channels: int) -> None:
    data = wav(8000, 100, channels, width)
    answer, samples = decoded(data, rate=8000)
    assert (answer["rate"], samples.shape) == (8000, (channels, 100))
    assert answer["sha256"] == hashlib.sha256(data).hexdigest()
    assert np.abs(samples - waves(100, channels)).max() < 1e-4


CONTAINED = {"flac": "flac", "mp3": "libmp3lame", "ogg": "libopus", "mp4": "aac", "webm": "libopus"}


@pytest.mark.parametrize("format", CONTAINED)
def test_others_are_read_by_pyav(format: str) -> None:
    needs("flac")
    data = contained(format, CONTAINED[format])
    answer, samples = decoded(data)
    assert answer["rate"] == 48_000
    assert 4800 <= samples.shape[1] < 4800 + 4000
    assert decoded(data, rate=24_000)[1].shape[1] == pytest.approx(samples.shape[1] / 2, abs=40)


def test_a_wav_of_another_rate_or_width_is_resampled() -> None:
    needs("flac")
    assert decoded(wav(8000, 800), rate=16_000)[1].shape[1] == pytest.approx(1600, abs=20)
    assert np.abs(decoded(wav(8000, 800, width=3))[1] - waves(800)).max() < 1e-4


def piped(data: bytes) -> bytes:
    """A WAV that was written to a pipe: it does not say how long it is."""
    return data[:4] + b"\xff" * 4 + data[8:40] + b"\xff" * 4 + data[44:]


@pytest.mark.parametrize("rate", [8000, 16_000])
def test_a_wav_of_a_pipe_goes_on_to_its_end(rate: int) -> None:
    if rate != 8000:
        needs("flac")
    samples = decoded(piped(wav(8000, 800)), rate=rate)[1]
    assert samples.shape[1] == pytest.approx(800 * rate / 8000, abs=20)
    with pytest.raises(InvalidPicture, match=r"longer than 0.05 seconds"):
        decoded(piped(wav(8000, 8000)), most_s=0.05, rate=rate)


def test_tags_in_another_encoding_are_no_reason_to_refuse_a_sound() -> None:
    needs("flac")
    data = contained("mp4", "aac", tags={"title": "Cafe-a-tag"})
    assert b"Cafe-a-tag" in data
    assert decoded(data.replace(b"Cafe-a-tag", b"Caf\xe9-a-tag"))[1].shape[1] >= 4800


@pytest.mark.parametrize("head", ["fffb", "fffa", "fff3", "fff2", "ffe3", "ffe2"])
def test_an_mp3_is_told_by_the_head_of_its_first_frame(head: str) -> None:
    assert source_sounds.demuxer(bytes.fromhex(head) + b"\x90\x64" + b"\0" * 8) == "mp3"


@pytest.mark.parametrize("head", ["fff1", "fff9", "ffff", "ffea", "fffd"])
def test_other_heads_are_no_mp3(head: str) -> None:
    assert source_sounds.demuxer(bytes.fromhex(head) + b"\x90\x64" + b"\0" * 8) is None


def slow(rate: int) -> bytes:
    """A FLAC of 8 KB in blocks of 65,535 samples."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="flac") as container:
        stream: Any = container.add_stream("flac", rate, layout="mono", options={"frame_size": "65535"})
        stream.codec_context.open()
        for index in range(2):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 65_535), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = rate, index * 65_535
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize(("rate", "words"), [(100, "100 samples a second; 1000 to 384000"), (1000, "longer than 60")])
def test_a_slow_sound_is_refused_before_it_is_resampled(rate: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("flac")
    import av

    class Kept:
        def __init__(self, **_: Any) -> None:
            pass

        def resample(self, frame: Any) -> list[Any]:
            raise AssertionError(f"{frame} was resampled")

    monkeypatch.setattr(av, "AudioResampler", Kept)
    data = slow(rate)
    assert len(data) < 20_000
    with pytest.raises(InvalidPicture, match=words):
        decoded(data, 60, 44_100)


def fast(rate: int) -> bytes:
    data = wav(8000, 800)
    return data[:24] + rate.to_bytes(4, "little") + data[28:]


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "gigahertz": (lambda: fast(4_000_000_000), "4000000000 samples a second; 1 to 384000 are valid"),
    "nothing": (lambda: b"", "not a sound in a known format"),
    "a text": (lambda: b"hello world, hello", "not a sound in a known format"),
    "a playlist": (lambda: b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/x.mp3\n", "not a sound in a known format"),
    "too long": (lambda: wav(100, 600), "longer than 5 seconds"),
    "no samples": (lambda: wav(100, 0), "no samples"),
    "a cut WAV": (lambda: wav(8000, 800)[:-900], "cut off|damaged"),
    "a head alone": (lambda: b"RIFF\xff\xff\xff\x7fWAVEfmt ", "damaged|has no sound|PyAV"),
    "a FLAC's mark alone": (lambda: b"fLaC" + b"x" * 99, "damaged|has no sound|PyAV"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_sound_is_refused(name: str) -> None:
    make, words = HOSTILE[name]
    with pytest.raises(InvalidPicture, match=words):
        decoded(make())


@pytest.mark.parametrize("level", [float("nan"), float("inf"), 1e9])
def test_samples_that_are_no_levels_are_refused(level: float) -> None:
    needs("flac")
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="wav") as container:
        stream: Any = container.add_stream("pcm_f32le", 8000, layout="mono")
        samples = waves(800, 1)
        samples[0, 5] = level
        frame = av.AudioFrame.from_ndarray(samples, format="flt", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(InvalidPicture, match="beyond 64 times full scale"):
        decoded(file.getvalue())


def test_an_unknown_codec_is_refused() -> None:
    needs("mp4")
    data = wav(8000, 800)
    with pytest.raises(InvalidPicture, match="the codec in it is not read; flac, mp3"):
        decoded(data[:20] + b"\x42\x42" + data[22:])


def test_a_film_without_sound_is_none() -> None:
    needs("mp4")
    from support.moving import contained as film

    with pytest.raises(InvalidPicture, match="the file has no sound"):
        decoded(film("mp4", 3))


def test_the_decoder_is_another_process() -> None:
    async def body() -> Any:
        decoders = Decoders(Settings(device="cpu"), 1, clips=True)
        try:
            return await decoders.run("sound", wav(8000, 100), "audio", most_s=5.0, rate=8000)
        finally:
            await decoders.stop()

    answer, samples = asyncio.run(body())
    assert (answer["rate"], answer["channels"], len(samples)) == (8000, 2, 800)


# On the command line, and over HTTP: from here on, the loader of this process is that of `served`

RAIN = {"input": "rain on a roof", "seed": 1, "num_inference_steps": 2}
SOURCE = wav(4, 6)


def test_the_command_line_makes_it_and_again_from_its_recipe(tmp_path: Path) -> None:
    tiny.save(families_sound.FAMILIES["StableAudio"].build(), tmp_path / "weights")
    (tmp_path / "m.yaml").write_text("name: m\nparameters: {model: weights}\n")
    source, first, again = tmp_path / "source.wav", tmp_path / "first.wav", tmp_path / "again.wav"
    source.write_bytes(SOURCE)
    flags = ["--models", str(tmp_path), "--audio", str(source)]
    ran = CliRunner().invoke(app, ["generate", "rain", *flags, "-m", "m", "--steps", "2", "-o", str(first)])
    assert ran.exit_code == 0, (ran.output, ran.exception)
    made = recipe.read(first)
    assert (made.audio_sha256, made.sampling.seconds) == (hashlib.sha256(SOURCE).hexdigest(), 1.5)
    like = ["generate", "--like", str(first), "-o", str(again)]
    ran = CliRunner().invoke(app, [*like, *flags])
    assert ran.exit_code == 0, (ran.output, ran.exception)
    assert again.read_bytes() == first.read_bytes()
    ran = CliRunner().invoke(app, [*like, *flags[:2]])
    assert ran.exit_code != 0
    assert "none was passed" in f"{ran.output} {ran.exception}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    families = {name: families_sound.FAMILIES[name] for name in ("StableAudio", "AudioLDM2")}
    with served(tmp_path_factory.mktemp("from-sounds"), families, max_seconds=5) as server:
        for family in families:
            server.model(family)
        yield server


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_every_way_to_send_a_sound(server: Served) -> None:
    uri = f"data:audio/wav;base64,{text(SOURCE)}"
    body = RAIN | {"model": "StableAudio"}
    first = server.client.post("/v1/audio/generate", json=body | {"audio_reference": {"audio_url": uri}})
    assert first.status_code == 200, first.text
    with wave.open(io.BytesIO(first.content)) as reader:
        assert reader.getnframes() == 6  # as long as its source
    for given_as in (uri, text(SOURCE), {"url": uri}):
        again = server.client.post("/v1/audio/generate", json=body | {"audio_reference": given_as})
        assert again.content == first.content, again.text
    form = {name: str(value) for name, value in body.items()}
    files = {"audio_reference": ("rain.wav", SOURCE)}
    assert server.client.post("/v1/audio/generate", data=form, files=files).content == first.content
    words = {"text": RAIN["input"], "seed": 1, "num_inference_steps": 2, "model_id": "StableAudio"}
    local = server.client.post("/v1/sound-generation", json=words | {"audio_reference": uri})
    assert local.content == first.content
    assert server.client.post("/v1/audio/generate", json=body | {"seconds": 1.5}).content != first.content


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"audio_reference": text(SOURCE), "model": "AudioLDM2"}, "audio_reference", "takes no sound"),
        ({"audio_reference": text(b"no sound, no sound")}, "audio_reference", "not a sound in a known format"),
        ({"audio_reference": text(wav(4, 24))}, "audio_reference", "longer than 5 seconds"),
        ({"audio_reference": [text(SOURCE)] * 2}, "audio_reference", "at most 1"),
        ({"audio_reference": {}}, "audio_reference", "no picture"),
        ({"audio_reference": text(SOURCE), "seconds": 4.5}, "seconds", "does not make that long"),
    ],
)
def test_what_is_refused(server: Served, fields: dict[str, Any], param: str, words: str) -> None:
    answer = server.client.post("/v1/audio/generate", json=RAIN | {"model": "StableAudio"} | fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert words in answer.json()["error"]["message"]

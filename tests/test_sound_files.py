"""The files of sounds: every format is read by others, holds all samples and the recipe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfumato.core import Recipe
from sfumato.errors import InvalidPicture, InvalidRequest
from sfumato.formats import check_installed, of_kind
from sfumato.pictures import files, recipe
from sfumato.pictures.results import Sound
from sfumato.sampling import Sampling
from support.probed import needs, probed

MADE = Recipe(
    model="m", source="o/r", pipeline="StableAudioPipeline", prompt='Regen, "laut"\n雨', seed=7,
    sampling=Sampling(steps=2, seconds=0.5, lyrics="[verse]\nla " * 900), image_sha256=(), mask_sha256=None,
    device="cpu", dtype="fp32", versions={"torch": "2"},
)  # fmt: skip
CODECS = {"wav": "pcm_s16le", "flac": "flac", "mp3": "mp3", "opus": "opus"}


def tone(rate: int, channels: int = 2, seconds: float = 0.5) -> Sound:
    """The second channel an octave above the first, and not as loud."""
    times = np.arange(round(rate * seconds)) / rate
    waves = [np.sin(2 * np.pi * 440 * (1 + at) * times) / (2 + at) for at in range(channels)]
    return Sound(np.stack(waves).astype(np.float32), rate)


def written(folder: Path, name: str, sound: Sound) -> Path:
    needs(name)
    path = folder / f"sound.{name}"
    path.write_bytes(files.encode(sound, MADE, name))
    return path


def heard(path: Path, rate: int, channels: int) -> Any:
    """The samples that ffmpeg decodes, (channels, samples)."""
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-f", "f32le", "-ar", str(rate), "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    return np.frombuffer(done.stdout, "<f4").reshape(-1, channels).T


def test_every_format_of_sounds_has_an_encoder() -> None:
    assert set(of_kind("audio")) == set(CODECS)
    assert set(CODECS) <= set(files.ENCODERS)


@pytest.mark.parametrize("name", CODECS)
def test_the_recipe_is_inside(name: str, tmp_path: Path) -> None:
    assert recipe.read(written(tmp_path, name, tone(44_100))) == MADE


@pytest.mark.parametrize(("rate", "channels"), [(44_100, 2), (48_000, 2), (16_000, 1), (24_000, 1)])
@pytest.mark.parametrize(("name", "codec"), CODECS.items())
def test_ffprobe_and_ffmpeg_read_every_sample(name: str, codec: str, rate: int, channels: int, tmp_path: Path) -> None:
    sound = tone(rate, channels)
    path = written(tmp_path, name, sound)
    (stream,) = probed(path)
    assert (stream["codec_name"], stream["channels"]) == (codec, channels)
    assert int(stream["sample_rate"]) == (48_000 if name == "opus" else rate)
    decoded = heard(path, rate, channels)
    if name in ("wav", "flac"):
        assert decoded.shape == sound.samples.shape
        assert np.abs(decoded - sound.samples).max() < 1e-4
        return
    samples = min(decoded.shape[1], sound.samples.shape[1])
    assert abs(decoded.shape[1] - sound.samples.shape[1]) < 0.03 * rate  # a frame of the codec
    for channel, original in zip(decoded, sound.samples, strict=True):
        assert np.corrcoef(channel[:samples], original[:samples])[0, 1] > 0.99


def test_what_is_too_loud_is_clipped(tmp_path: Path) -> None:
    sound = Sound(np.array([[-3.0, -1.0, 0.0, 1.0, 3.0]], np.float32), 8000)
    decoded = heard(written(tmp_path, "wav", sound), 8000, 1)
    assert np.abs(decoded - [[-1, -1, 0, 1, 1]]).max() < 1e-4


@pytest.mark.parametrize("content", [b"", b"RIFF\0\0\0\0WAVE", b"RIFF\0\0\0\0WAVELIST\xff\xff\xff\xff", b"no file"])
def test_a_damaged_wav_file_has_no_recipe(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    path.write_bytes(content)
    with pytest.raises(InvalidPicture, match="contains no recipe"):
        recipe.read(path)


def test_without_pyav_a_wav_file_is_written_and_others_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in CODECS:
        if name == "wav":
            check_installed(name, "response_format")
            continue
        with pytest.raises(InvalidRequest, match=r"response_format: .* needs av, .*sfumato\[video\].* wav work"):
            check_installed(name, "response_format")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "av", None)
    assert recipe.read(written(tmp_path, "wav", tone(8000))) == MADE

"""The command line, as a person runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sfumato.cli import app
from sfumato.commands import generate as command
from sfumato.pictures import recipe
from sfumato.sampling import Sampling
from sfumato.settings import Settings
from support.families_moving import stable_audio
from support.hub import Hub


def sfumato(*arguments: str | Path, cwd: Path, code: int = 0, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "sfumato.cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {"HF_HUB_OFFLINE": "1"})},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def pixels(path: Path) -> list[int]:
    return np.asarray(Image.open(path)).ravel().tolist()  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_make_a_sound_and_make_it_again(tmp_path: Path) -> None:
    stable_audio().save_pretrained(tmp_path / "weights")
    (tmp_path / "noises.yaml").write_text("name: noises\nparameters:\n  model: weights\ndiffusers:\n  cuda: false\n")
    options = ["-m", "noises", "--models", "noises.yaml", "--seconds", "1.5", "--guidance", "2.5", "--seed", "3"]
    out = sfumato("generate", "rain on a roof", *options, "-o", "rain.wav", cwd=tmp_path)
    assert out.strip() == "rain.wav"
    said = recipe.read(tmp_path / "rain.wav").sampling
    assert (said.seconds, said.guidance_scale, said.size) == (1.5, 2.5, None)
    out = sfumato("generate", "--like", "rain.wav", "--models", "noises.yaml", cwd=tmp_path)
    assert (tmp_path / out.strip()).suffix == ".wav"
    assert (tmp_path / out.strip()).read_bytes() == (tmp_path / "rain.wav").read_bytes()
    wrong = sfumato("generate", "rain", *options, "-o", "rain.png", cwd=tmp_path, code=1)
    assert "seconds: 1.5; it is for clips and sound, and the request is for pictures" in wrong


def test_generate_and_make_it_again(tmp_path: Path) -> None:
    """The same pixels in another process, from the file alone."""
    options = ["--negative", "red", "--steps", "6", "--guidance", "2.5", "--seed", "11", "--scheduler", "k_dpmpp_2m"]
    out = sfumato("generate", "a rocket on a blue background", *options, "-o", "first.png", cwd=tmp_path)
    assert out.strip() == "first.png"
    made = recipe.read(tmp_path / "first.png")
    said = made.sampling
    assert (said.negative_prompt, said.steps, said.guidance_scale, made.seed) == ("red", 6, 2.5, 11)
    sfumato("generate", "--like", "first.png", "-o", "again.png", cwd=tmp_path)
    assert pixels(tmp_path / "first.png") == pixels(tmp_path / "again.png")
    assert recipe.read(tmp_path / "again.png") == made
    sfumato("generate", "--like", "first.png", "--seed", "12", "-o", "other.png", cwd=tmp_path)
    assert pixels(tmp_path / "first.png") != pixels(tmp_path / "other.png")


def test_make_a_picture_from_a_picture_again(tmp_path: Path) -> None:
    Image.linear_gradient("L").convert("RGB").resize((128, 128)).save(tmp_path / "source.png")
    options = ["--image", "source.png", "--strength", "0.5", "--steps", "6", "--seed", "3"]
    sfumato("generate", "a rocket", *options, "-o", "first.png", cwd=tmp_path)
    sfumato("generate", "--like", "first.png", "--image", "source.png", "-o", "again.png", cwd=tmp_path)
    assert pixels(tmp_path / "first.png") == pixels(tmp_path / "again.png")
    assert "1 such picture" in sfumato("generate", "--like", "first.png", cwd=tmp_path, code=1)
    wrong = sfumato("generate", "--like", "first.png", "--image", "first.png", cwd=tmp_path, code=1)
    assert "not the picture" in wrong


def test_make_a_masked_picture_of_an_odd_size_again(tmp_path: Path) -> None:
    Image.linear_gradient("L").convert("RGB").resize((124, 84)).save(tmp_path / "source.png")
    Image.linear_gradient("L").resize((124, 84)).point(lambda level: 255 * (level > 99)).save(tmp_path / "mask.png")
    sources = ["--image", "source.png", "--mask", "mask.png"]
    sfumato("generate", "a rocket", *sources, "--steps", "4", "--seed", "3", "-o", "first.png", cwd=tmp_path)
    sfumato("generate", "--like", "first.png", *sources, "-o", "again.png", cwd=tmp_path)
    assert pixels(tmp_path / "first.png") == pixels(tmp_path / "again.png")
    with Image.open(tmp_path / "again.png") as again:
        assert again.size == (124, 84)


def test_several_pictures_get_several_names(tmp_path: Path) -> None:
    out = sfumato("generate", "a cat", "-n", "2", "--steps", "2", "--seed", "5", cwd=tmp_path)
    assert out.split() == ["sfumato-5.png", "sfumato-6.png"]
    out = sfumato("generate", "a cat", "-n", "2", "--steps", "2", "--seed", "5", "-o", "cat.png", cwd=tmp_path)
    assert out.split() == ["cat-1.png", "cat-2.png"]


@pytest.mark.parametrize(("name", "format"), [("cat.jpg", "JPEG"), ("cat.webp", "WEBP")])
def test_a_picture_is_written_as_the_suffix_says(tmp_path: Path, name: str, format: str) -> None:
    sfumato("generate", "a cat", "--steps", "2", "--seed", "5", "-o", name, cwd=tmp_path)
    with Image.open(tmp_path / name) as image:
        assert (image.format, image.size) == (format, (128, 128))
    assert recipe.read(tmp_path / name).seed == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate"], "say what to draw"),
        (["generate", "a cat", "--size", "abc"], "abc"),
        (["generate", "a cat", "--scheduler", "eulr"], "Did you mean"),
        (["generate", "a cat", "-m", "no-such-model"], "no-such-model"),
        (["generate", "a cat", "--steps", "2", "-o", "no/such/folder/x.png"], "could not be written"),
        (
            ["generate", "a cat", "-o", "x.m4a"],
            "written as .m4a; pictures in .png, .jpg, .jpeg; clips in .mp4, .webm",
        ),
        (["generate", "a cat", "--frames", "5", "-o", "x.png"], "is for clips, and the request is for pictures"),
        (["generate", "--like", "no-such.png"], "no-such.png"),
        (["serve", "--port", "-1"], "at least 0"),
        (["pull", "not a name"], "not a name"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, arguments: list[str], words: str) -> None:
    code = 2 if arguments in (["generate"], ["generate", "--like", "no-such.png"], ["serve", "--port", "-1"]) else 1
    assert words in sfumato(*arguments, cwd=tmp_path, code=code).replace("\n", " ")


@pytest.mark.parametrize(
    ("pipeline", "format"),
    [("StableAudioPipeline", "wav"), ("WanPipeline", "mp4"), ("StableDiffusionPipeline", "png")],
)
def test_without_a_file_to_write_the_format_is_that_of_the_model(tmp_path: Path, pipeline: str, format: str) -> None:
    (tmp_path / "m.yaml").write_text(f"parameters: {{model: o/r}}\ndiffusers: {{pipeline_type: {pipeline}}}")
    settings = Settings(models=tmp_path)
    assert command._format(None, Sampling(seconds=1), "m", settings) == format
    assert command._format(Path("a.gif"), Sampling(), "m", settings) == "gif"
    assert [command._named(Path(name)) for name in ("a.ogg", "a.WEBM", "a")] == ["opus", "webm", None]


@pytest.mark.parametrize(("source", "format"), [("video", "mp4"), ("audio", "wav"), ("image", "png")])
def test_without_its_files_the_format_is_that_of_the_source(tmp_path: Path, source: str, format: str) -> None:
    (tmp_path / "m.yaml").write_text("parameters: {model: o/r}")
    assert command._format(None, Sampling(), "m", Settings(models=tmp_path), source) == format


def test_pull_then_draw_without_the_hub(tmp_path: Path, hub: Hub) -> None:
    env = hub.environment(tmp_path / "hf")
    where = sfumato("pull", "nitrosocke/Ghibli-Diffusion", cwd=tmp_path, env=env).strip()
    assert (Path(where) / "model_index.json").exists()
    offline = {**env, "HF_HUB_OFFLINE": "1"}
    arguments = ["generate", "a cat", "-m", "nitrosocke/Ghibli-Diffusion", "--steps", "2", "-o", "x.png"]
    sfumato(*arguments, cwd=tmp_path, env=offline)
    assert recipe.read(tmp_path / "x.png").source.startswith("nitrosocke/Ghibli-Diffusion@")


def test_models_and_check(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    (models / "good.yaml").write_text("name: good\nparameters:\n  model: some/one\n")
    assert "good" in sfumato("models", cwd=tmp_path)
    assert "sfumato-tiny" in sfumato("models", cwd=tmp_path)
    assert "some/one" in sfumato("check", "models", cwd=tmp_path)
    (models / "bad.yaml").write_text("name: bad\nparameters:\n  modle: some/one\n")
    done = subprocess.run(
        [sys.executable, "-m", "sfumato.cli", "check", "models"],
        cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "modle" in done.stdout
    assert "Did you mean 'parameters.model'?" in done.stdout


def test_check_of_a_folder_that_is_not_there_fails(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["check", str(tmp_path / "nowhere")])
    assert done.exit_code == 2


def test_check_takes_its_folder_in_both_ways(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m.yaml").write_text("parameters: {model: some/one}\ndisabled: true\nmodle: 1\n")
    folder, other = str(tmp_path / "models"), str(tmp_path)
    said = [CliRunner().invoke(app, ["check", *words]) for words in ([folder], ["--models", folder])]
    assert "modle" in said[0].output
    assert [each.output for each in said] == [said[0].output] * 2
    assert "two folders" in CliRunner().invoke(app, ["check", folder, "--models", other]).output


def test_help_is_quick_because_it_imports_little(tmp_path: Path) -> None:
    """Half a second is the promise; what is heavy stays out, which unlike the time can be asserted."""
    code = (
        "import json, sys; sys.argv = ['sfumato', '--help']; import sfumato.cli as cli\n"
        "try: cli.app()\nexcept SystemExit: pass\n"
        "print(json.dumps(sorted(m for m in sys.modules if '.' not in m)))"
    )
    loaded = json.loads(sfumato_code(code, tmp_path).splitlines()[-1])
    assert not {"torch", "diffusers", "fastapi", "uvicorn", "pydantic", "PIL", "httpx", "huggingface_hub"} & set(loaded)


def sfumato_code(code: str, cwd: Path) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True).stdout

"""Every line of the seed page, as it stands: its model files, its curls run by curl, its tables.

The page says `cuda: true` where it shows a GPU; these tests start the server with `--device cpu`, and
the weights come from a hub on localhost that has tiny models under the page's names.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image

from support import tiny
from support.hub import Hub
from support.serving import Server

PAGE = (Path(__file__).parent / "data" / "seed.md").read_text(encoding="utf-8", errors="replace")
FILES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
CURLS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
SCHEDULERS = re.findall(
    r"^\| `(\w+)` \| [A-Z][\w+ ]+? \|$", PAGE.split("types of schedulers")[1].split("Pipelines")[0], re.M
)
PIPELINES = re.findall(r"^\| `(\w+Pipeline)` \|", PAGE, re.M)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    models = folder / "models"
    models.mkdir()
    for text in FILES:
        name = yaml.safe_load(text)["name"]
        (models / f"{name}.yaml").write_text(text)
    tiny.single_file(tiny.stable_diffusion(), models / "toonyou_beta6.safetensors")
    for pipeline in PIPELINES:
        source = {"StableDiffusionXLPipeline": "Linaqruf/animagine-xl"}.get(pipeline, "nitrosocke/Ghibli-Diffusion")
        if "Depth" in pipeline:
            source = "stabilityai/stable-diffusion-2-depth"
        (models / f"type-{pipeline}.yaml").write_text(
            f"name: {pipeline}\nparameters:\n  model: {source}\nstep: 2\ndiffusers:\n"
            f"  pipeline_type: {pipeline}\n  enable_parameters: image,num_inference_steps\n"
        )
    env = hub.environment(folder / "hf")
    with Server(models, folder / "data", "--device", "cpu", "--loaded-models", "10", env=env) as server:
        yield server


def test_the_page_is_read_whole() -> None:
    assert [len(FILES), len(CURLS), len(SCHEDULERS), len(PIPELINES)] == [4, 3, 18, 5]


def curl(server: Server, command: str, picture: Path | None = None) -> dict[str, Any]:
    """Run one of the page's commands; only the address and the picture's path are ours."""
    command = command.replace("http://localhost:8080", server.url)
    if picture:
        command = command.replace("/path/to/your/image", str(picture)).replace("~/path/to/image.jpeg", str(picture))
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    assert "data" in answer, answer
    return answer


def picture_at(url: str) -> Image.Image:
    answer = httpx.get(url)
    assert answer.headers["content-type"] == "image/png"
    return Image.open(io.BytesIO(answer.content))


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "image.jpeg"
    Image.radial_gradient("L").convert("RGB").resize((400, 300)).save(path)
    return path


def test_text_to_image(server: Server) -> None:
    answer = curl(server, CURLS[0])
    image = picture_at(answer["data"][0]["url"])
    assert image.size == (1024, 1024)
    made = json.loads(image.info["sfumato"])
    assert made["prompt"] == "<positive prompt>"
    assert made["negative_prompt"] == "<negative prompt>"
    assert (made["steps"], made["guidance_scale"], made["scheduler"]) == (51, 8.0, "euler_a")
    assert (made["model"], made["pipeline"], made["device"]) == (
        "animagine-xl",
        "StableDiffusionXLPipeline",
        "cpu",
    )


@pytest.mark.parametrize("key", ["image", "file"])
@pytest.mark.parametrize(
    ("command", "model", "steps", "guidance"),
    [(CURLS[1], "stablediffusion-edit", 25, 8.0), (CURLS[2], "stablediffusion-depth", 50, 6.0)],
    ids=["image-to-image", "depth-to-image"],
)
def test_with_a_picture(
    server: Server, photo: Path, command: str, model: str, steps: int, guidance: float, key: str
) -> None:
    answer = curl(server, command.replace('"image"', f'"{key}"'), photo)
    image = picture_at(answer["data"][0]["url"])
    assert image.size == (512, 512)
    made = json.loads(image.info["sfumato"])
    assert (made["model"], made["steps"], made["guidance_scale"]) == (model, steps, guidance)
    assert len(made["image_sha256"]) == 1


def test_local_model(server: Server) -> None:
    answer = server.draw(model="stablediffusion", prompt="a cat", size="64x64")
    assert answer.status_code == 200, answer.text
    made = json.loads(picture_at(answer.json()["data"][0]["url"]).info["sfumato"])
    assert (made["steps"], made["guidance_scale"], made["clip_skip"]) == (30, 8.0, 11)
    assert made["scheduler"] == "k_dpmpp_sde"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(server: Server, name: str) -> None:
    for model in ("stablediffusion", "animagine-xl"):
        answer = server.draw(model=model, prompt="a cat", size="64x64", step=3, scheduler=name, seed=1)
        assert answer.status_code == 200, answer.text
        image = picture_at(answer.json()["data"][0]["url"])
        assert json.loads(image.info["sfumato"])["scheduler"] == name


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_types(server: Server, name: str) -> None:
    picture = {"image": server.png_data_uri()} if "2Img" in name else {}
    answer = server.draw(model=name, prompt="a cat", size="64x64", step=2, **picture)
    assert answer.status_code == 200, answer.text
    made = json.loads(picture_at(answer.json()["data"][0]["url"]).info["sfumato"])
    assert made["pipeline"] == ("StableDiffusionPipeline" if name == "DiffusionPipeline" else name)


def test_models_are_downloaded_on_first_use_only(tmp_path: Path, repositories: dict[str, Path]) -> None:
    own = Hub()
    own.add("Linaqruf/animagine-xl", repositories["Linaqruf/animagine-xl"])
    with own:
        models = tmp_path / "models"
        models.mkdir()
        (models / "a.yaml").write_text(FILES[0])
        with Server(models, tmp_path / "data", env=own.environment(tmp_path / "hf")) as server:
            assert not own.downloads("Linaqruf/animagine-xl")
            for _ in range(2):
                assert server.draw(prompt="x", model="animagine-xl", size="64x64", step=1).status_code == 200
            counts = own.downloads("Linaqruf/animagine-xl")
            assert counts
            assert set(counts.values()) == {1}
        # Another process, and no hub: the cache is enough.
        env = own.environment(tmp_path / "hf") | {"HF_HUB_OFFLINE": "1"}
        with Server(models, tmp_path / "data", env=env) as server:
            assert server.draw(prompt="x", model="animagine-xl", size="64x64", step=1).status_code == 200
        assert own.downloads("Linaqruf/animagine-xl") == counts


def test_gpu_files_without_a_gpu_say_what_to_do(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: the file simply works")
    models = tmp_path / "models"
    models.mkdir()
    (models / "edit.yaml").write_text(FILES[2])
    with Server(models, tmp_path / "data") as server:
        answer = server.draw(model="stablediffusion-edit", prompt="x", image=server.png_data_uri())
        assert answer.status_code == 500
        error = answer.json()["error"]
        assert error["code"] == "device_unavailable"
        assert "cuda: false" in error["message"]
        assert "--device cpu" in error["message"]

"""Clients as people install them, each in a process of its own against a real server: see `tests/clients/`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from clients import environment
from support.serving import Server

pytestmark = pytest.mark.slow

PAGES = sorted((Path(__file__).parent.parent / "docs" / "clients").glob("*.md"))


def blocks(language: str) -> list[object]:
    """Of the clients' pages; those in the project's own environment are `test_docs.py`'s."""
    return [
        pytest.param(code, id=f"{page.name}-{index}")
        for page in PAGES
        for index, code in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL))
    ]


@pytest.fixture(scope="module", autouse=True)
def made() -> None:
    environment.make()


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.radial_gradient("L").convert("RGB").resize((128, 128)).save(path)
    return path


@pytest.fixture(scope="module")
def mask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Transparent where it is to be redrawn."""
    path = tmp_path_factory.mktemp("mask") / "mask.png"
    mask = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 128, 40))
    mask.save(path)
    return path


@pytest.mark.parametrize("name", ["litellm", "langchain", "webuiapi"])
def test_python_clients(server: Server, photo: Path, name: str) -> None:
    done = environment.run("python", f"check_{name}.py", server.url, str(photo), LITELLM_LOCAL_MODEL_COST_MAP="True")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok\n") >= 3


def test_javascript_clients(server: Server, photo: Path, mask: Path) -> None:
    given = {"SFUMATO_URL": server.url, "SFUMATO_PHOTO": str(photo), "SFUMATO_MASK": str(mask)}
    done = environment.run("node", "--test", "--test-reporter=tap", cwd=environment.NODE, **given)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = int(done.stdout.split("# pass ")[1].split()[0])
    assert passed >= 16, done.stdout


@pytest.mark.parametrize("code", blocks("py"))
def test_python_on_the_pages_runs(server: Server, tmp_path: Path, code: str) -> None:
    code = code.replace("http://localhost:8080", server.url)
    done = environment.run("python", "-c", code, cwd=tmp_path, LITELLM_LOCAL_MODEL_COST_MAP="True")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("code", blocks("js"))
def test_javascript_on_the_pages_runs(server: Server, code: str) -> None:
    code = code.replace("http://localhost:8080", server.url)
    done = environment.run("node", "--input-type=module", "--eval", code, cwd=environment.NODE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()

"""What the docs say is so: generated pages are current, and code blocks run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from support.serving import Server

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import generate  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[object]:
    return [
        pytest.param(code, id=f"{page.name}-{index}")
        for page in PAGES
        for index, code in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL))
    ]


@pytest.mark.parametrize("name", generate.PAGES)
def test_generated_pages_are_current(name: str) -> None:
    assert (ROOT / "docs" / "reference" / name).read_text() == generate.PAGES[name](), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.fixture
def run(server: Server, tmp_path: Path) -> Iterator[object]:
    """Run a block in an empty folder with a photo in it; only the address of the server is ours."""
    Image.radial_gradient("L").convert("RGB").resize((128, 128)).save(tmp_path / "photo.jpg")
    (tmp_path / "models").mkdir()
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parent.parent)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def run(*command: str) -> str:
        command = tuple(part.replace("http://localhost:8080", server.url) for part in command)
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    yield run


@pytest.mark.parametrize("code", blocks("bash"))
def test_shell_blocks_run(code: str, run: object) -> None:
    code = code.replace("sfumato serve", "sfumato serve --help #").replace("/path/to/localai/models", "models")
    assert callable(run)
    out = run("bash", "-ec", code)
    assert not re.search(r'"error":\s*\{', out), out


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code: str, run: object) -> None:
    assert callable(run)
    run(sys.executable, "-c", code)


@pytest.mark.parametrize("code", blocks("yaml"))
def test_model_files_are_valid(code: str, tmp_path: Path) -> None:
    from sfumato.serving.catalog import Catalog

    (tmp_path / "x.yaml").write_text(code)
    catalog = Catalog([tmp_path])
    assert not catalog.problems()
    assert catalog.get(yaml.safe_load(code)["name"])

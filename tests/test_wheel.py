"""The package as people install it: built, put into an environment without this repository, and run elsewhere."""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from support.distribution import ROOT, build, files_of_the_package, names
from support.serving import Server

SOURCES = ("src", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")


class Built(NamedTuple):
    wheel: Path
    sdist: Path
    wheel_of_sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    tree.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=unwanted)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, tree / name)
    sdist = build(tree, "build_sdist", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    (folder / "again").mkdir()
    return Built(build(tree, "build_wheel", folder), sdist, build(unpacked, "build_wheel", folder / "again"))


def test_the_wheel_has_every_file_of_the_package(built: Built) -> None:
    wanted = files_of_the_package()
    assert {"sfumato/py.typed", "sfumato/models/sfumato-tiny.yaml"} < wanted
    for wheel in (built.wheel, built.wheel_of_sdist):
        assert {name for name in names(wheel) if ".dist-info/" not in name} == wanted
    with tarfile.open(built.sdist) as archive:
        held = {name.partition("/src/")[2] for name in archive.getnames()}
    assert wanted <= held


def test_what_the_package_imports_is_what_it_depends_on() -> None:
    """Itself or with an extra, and not what happens to come along with something else."""
    imported = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    ours = imported - set(sys.stdlib_module_names) - {"sfumato"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {_normal(re.split(r"[<>=!~\[; ]", line)[0]) for line in lines}
    providers = packages_distributions()
    lacking = {module for module in ours if not {_normal(name) for name in providers.get(module, [module])} & declared}
    assert lacking == set()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.slow
def test_installed_it_draws_outside_the_repository(built: Built, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(built.wheel)], check=True)
    # What it depends on is lent by this environment, whose own `.pth` files (an editable Sfumato) are not read so.
    (site,) = environment.glob("lib/python*/site-packages")
    lent = [path for path in sys.path if path.endswith("site-packages")]
    (site / "lent.pth").write_text("\n".join(lent) + "\n")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = [str(python), "-c", "import sfumato; print(sfumato.__file__)"]
    found = subprocess.run(where, cwd=elsewhere, env=clean, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(site)

    program = str(environment / "bin" / "sfumato")
    command = [program, "generate", "a red circle", "--seed", "1", "--steps", "2", "-o", "made.png"]
    done = subprocess.run(command, cwd=elsewhere, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(elsewhere / "made.png") as made:
        assert made.size == (128, 128)
    assert subprocess.run([program, "check"], cwd=elsewhere, env=clean).returncode == 0

    server = Server(Path("models"), Path("data"), env={"PYTHONPATH": ""}, program=[program], cwd=elsewhere)
    with server:
        answer = server.draw(prompt="a red circle", seed=1, steps=2)
        assert answer.status_code == 200, server.log
        picture = server.client.get(answer.json()["data"][0]["url"])
        assert Image.open(io.BytesIO(picture.content)).size == (128, 128)
        assert server.client.get("/docs").status_code == 200

"""The Dockerfile and the compose file: linted, and what they name exists. No image can be pulled in a test."""

from __future__ import annotations

import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from clients import environment
from sfumato.settings import Settings, env_name
from support.distribution import build, files_of_the_package, names

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("linter", "file"), [("dockerfilelint", "Dockerfile"), ("dclint", "compose.yaml")])
def test_linted(linter: str, file: str) -> None:
    environment.make()
    done = environment.run("npx", "--no-install", linter, str(ROOT / file), cwd=environment.NODE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout


COPIED = [word for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.M) for word in line.split()[:-1]]
"""What the image is built of."""


def test_what_is_copied_is_in_the_build_context() -> None:
    assert COPIED
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name in COPIED:
        assert (ROOT / name).exists(), f"the Dockerfile copies {name}, which is not there"
        assert name.removeprefix("./") in allowed, f"{name} is copied and .dockerignore leaves it out"


def test_the_image_has_every_file_of_the_package(tmp_path: Path) -> None:
    """`pip install .` in the image builds a wheel of what was copied: the same is built here."""
    tree = tmp_path / "image"
    tree.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / Path(name).name, ignore=shutil.ignore_patterns("*.egg-info"))
        else:
            shutil.copy(ROOT / name, tree)
    wheel = build(tree, "build_wheel", tmp_path)
    assert {name for name in names(wheel) if ".dist-info/" not in name} == files_of_the_package()
    assert "pip install --constraint requirements.txt ." in DOCKERFILE
    assert re.search(r'^CMD \["sfumato", "serve"\]', DOCKERFILE, re.M)  # which `test_wheel` runs, installed


def test_the_settings_exist() -> None:
    known = {env_name(field) for field in fields(Settings)}
    named = set(re.findall(r"SFUMATO_\w+", DOCKERFILE)) | {
        name for name in COMPOSE["services"]["sfumato"]["environment"] if name.startswith("SFUMATO_")
    }
    assert named
    assert named <= known


def test_the_volumes_are_those_of_the_image() -> None:
    mounted = {volume.split(":")[1] for volume in COMPOSE["services"]["sfumato"]["volumes"]}
    declared = re.search(r"^VOLUME \[(.*)\]", DOCKERFILE, re.M)
    assert declared
    assert mounted == set(re.findall(r'"([^"]+)"', declared[1]))


def test_torch_is_the_version_that_make_installs() -> None:
    pin = re.search(r"torch==[\d.]+", (ROOT / "Makefile").read_text())
    assert pin
    assert f"ARG TORCH={pin[0]}\n" in DOCKERFILE

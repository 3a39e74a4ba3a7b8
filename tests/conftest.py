"""Fixtures that several tests share; what only one needs stands beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import tiny
from support.here import use
from support.hub import Hub
from support.tiny_checkpoint import single_file

os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
"""Processes that tests start find `support` too."""

REPOSITORIES = {
    "Linaqruf/animagine-xl": tiny.stable_diffusion_xl,
    "nitrosocke/Ghibli-Diffusion": tiny.stable_diffusion,
    "stabilityai/stable-diffusion-2-depth": tiny.stable_diffusion_depth,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": tiny.stable_diffusion,
    "tiny/flux": tiny.flux,
    "tiny/sd3": tiny.stable_diffusion_3,
    "tiny/inpaint": tiny.inpaint_unet,
}
"""The models that people's files name, and one of each other family."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", help="folder for the studio's pictures of every tab")
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


@pytest.fixture(scope="session")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hub id to diffusers folder, each built once."""
    root = tmp_path_factory.mktemp("repositories")
    return {repo: tiny.save(build(), root / repo) for repo, build in REPOSITORIES.items()}


@pytest.fixture(scope="session")
def hub(repositories: dict[str, Path]) -> Iterator[Hub]:
    """A hub that has `REPOSITORIES`. Shared: tests that break or hold something make a Hub of their own."""
    with Hub() as hub:
        for repo, folder in repositories.items():
            hub.add(repo, folder)
        yield hub


@pytest.fixture
def here(hub: Hub, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The shared hub, asked by this process, with an empty cache."""
    use(hub, tmp_path_factory.mktemp("cache"), monkeypatch)
    return hub


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 1 as one file in the original layout, which the hub's stable-diffusion-v1-5 describes."""
    return single_file(tiny.stable_diffusion(), tmp_path_factory.mktemp("checkpoint") / "model.safetensors")


@pytest.fixture(autouse=True)
def proofs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test learns from another what may be batched, or from whoever runs them."""
    monkeypatch.setenv("SFUMATO_PROOFS", str(tmp_path / "proofs.json"))

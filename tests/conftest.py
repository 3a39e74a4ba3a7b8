"""Fixtures that several tests share; what only one needs stands beside it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from support.distributing import ByFile, Recorder, leave_out_slow, ordered
from support.hub import Hub
from support.serving import Server

os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
"""Processes that tests start find `support` too."""
os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Of every process, and set before torch is imported. As many processes as cores, each with as many threads as cores,
spin on one another's barriers: pictures of this size took six times as much CPU time."""

hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")  # how long one example takes says nothing where others compute too

REPOSITORIES = {
    "Linaqruf/animagine-xl": "stable_diffusion_xl",
    "nitrosocke/Ghibli-Diffusion": "stable_diffusion",
    "stabilityai/stable-diffusion-2-depth": "stable_diffusion_depth",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "stable_diffusion",
    "tiny/flux": "flux",
    "tiny/sd3": "stable_diffusion_3",
    "tiny/inpaint": "inpaint_unet",
}
"""The models that people's files name, and one of each other family, by their functions in `support.tiny`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", help="folder for the studio's pictures of every tab")
    parser.addoption("--slow", action="store_true", help="run the slow tests as well")
    parser.addoption("--record", action="store_true", help="write how long each test takes; with --slow")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record") and not hasattr(config, "workerinput"):  # the process that hands out the tests
        config.pluginmanager.register(Recorder())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    config.option.loadscopereorder = False  # not by number of tests: `ordered` knows better
    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = ordered(items)
    if not config.getoption("--slow"):
        leave_out_slow(items)


@pytest.fixture(scope="session")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hub id to diffusers folder, each built once."""
    from support import tiny  # and with it torch, which the process that hands out the tests has no use for

    root = tmp_path_factory.mktemp("repositories")
    return {repo: tiny.save(getattr(tiny, build)(), root / repo) for repo, build in REPOSITORIES.items()}


@pytest.fixture(scope="session")
def hub(repositories: dict[str, Path]) -> Iterator[Hub]:
    """A hub that has `REPOSITORIES`. Shared: tests that break or hold something make a Hub of their own."""
    with Hub() as hub:
        for repo, folder in repositories.items():
            hub.add(repo, folder)
        yield hub


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server as it starts without settings and model files, one for all modules that need no other.

    A test looks at what it requested itself, and at differences. A module whose server has settings makes its own.
    """
    folder = tmp_path_factory.mktemp("server")
    (folder / "models").mkdir()
    with Server(folder / "models", folder / "data") as server:
        yield server


@pytest.fixture
def here(hub: Hub, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The shared hub, asked by this process, with an empty cache."""
    from support.here import use  # it brings torch

    use(hub, tmp_path_factory.mktemp("cache"), monkeypatch)
    return hub


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 1 as one file in the original layout, which the hub's stable-diffusion-v1-5 describes."""
    from support import tiny
    from support.tiny_checkpoint import single_file

    return single_file(tiny.stable_diffusion(), tmp_path_factory.mktemp("checkpoint") / "model.safetensors")


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """A test that configures the log of this process, as a server's does, would take others' messages away."""
    before = logging.getLogger("sfumato").level, logging.getLogger().level
    yield
    assert (logging.getLogger("sfumato").level, logging.getLogger().level) == before, "see logs.configure"


@pytest.fixture(autouse=True)
def proofs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test learns from another what may be batched, or from whoever runs them."""
    monkeypatch.setenv("SFUMATO_PROOFS", str(tmp_path / "proofs.json"))

"""What requests name on the hub: no larger than allowed, and a hub that is not there is told at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import _http

from sfumato.checkpoints import lora_files, request_files
from sfumato.checkpoints.controlnets import HubNet
from sfumato.checkpoints.remote_limits import ANY, HUB, Limits, TooLarge
from sfumato.config import ModelConfig
from sfumato.errors import DownloadError, InvalidRequest, LoadError
from sfumato.loras import Lora
from sfumato.models import controlnets, ip_adapters
from support.here import use
from support.hub import Hub

REPO = "acme/nets"
SMALL, LARGE = Limits([HUB], 1 << 20, "max_net_mb"), Limits([HUB], 8 << 20, "max_net_mb")

BYTES = {
    "net.safetensors": 2 << 20,
    "config.json": 100,
    "diffusion_pytorch_model.safetensors": 2 << 20,
    "adapter.safetensors": 2 << 20,
    "image_encoder/config.json": 100,
    "image_encoder/model.safetensors": 2 << 20,
    "small.safetensors": 1000,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    for at, (name, size) in enumerate(BYTES.items()):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bytes([at]) * size)
    return folder


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        hub.add(REPO, folder)
        use(hub, tmp_path / "cache", monkeypatch)
        yield hub


def gone(patch: pytest.MonkeyPatch, hub: Hub) -> None:
    """Nobody is at the hub's address any more, and whoever waits before asking again fails."""
    hub.close()
    dead = hub.url
    patch.setattr(constants, "ENDPOINT", dead)
    patch.setattr(hf_api.api, "endpoint", dead)

    def sleep(seconds: float) -> None:
        raise AssertionError(f"waits {seconds} s to ask an unreachable hub again")

    patch.setattr(_http.time, "sleep", sleep)


def lora(name: str, limits: Limits) -> Path:
    config = ModelConfig(name="m", model="some/one", folder=Path("/nowhere"))
    return Path(lora_files.locate(Lora(name), config, limits, Path("/nowhere")).file)


def adapter(limits: Limits) -> Path:
    part = ModelConfig(name="part", part="ip_adapter", model=f"{REPO}/adapter.safetensors", folder=Path("/nowhere"))
    return ip_adapters._fetch(part, limits)


FETCHED: Mapping[str, tuple[Callable[[Limits], object], str]] = {
    "a ControlNet's file": (lambda limits: controlnets._fetch(HubNet(REPO, None, "net.safetensors"), limits),
                            "net.safetensors"),
    "a ControlNet's folder": (lambda limits: controlnets._fetch(HubNet(REPO), limits),
                              "diffusion_pytorch_model.safetensors"),
    "an IP-Adapter": (adapter, "adapter.safetensors"),
    "an image encoder": (lambda limits: ip_adapters._fetch_encoder(REPO, "image_encoder", None, limits),
                         "image_encoder/model.safetensors"),
}  # fmt: skip
"""What fetches it -> its largest file."""


@pytest.mark.parametrize("what", FETCHED)
def test_one_that_is_too_large_is_refused_before_anything_is_downloaded(what: str, hub: Hub) -> None:
    fetch, file = FETCHED[what]
    with pytest.raises(TooLarge, match=r"acme/nets.* has more than 1 MiB \(the setting max_net_mb\)"):
        fetch(SMALL)
    assert not hub.downloads(REPO)
    fetch(LARGE)
    assert hub.downloads(REPO)[file] == 1
    fetch(SMALL)  # it is here: nothing is downloaded
    assert hub.downloads(REPO)[file] == 1


def test_more_than_the_hub_has_told_ends_the_download() -> None:
    bar = request_files._bar(REPO, SMALL)(unit="B", total=10)
    bar.update(1 << 20)
    with pytest.raises(TooLarge, match="max_net_mb"):
        bar.update(1)
    request_files._bar(REPO, SMALL)(total=10).update(1 << 30)  # it counts files


@pytest.mark.parametrize("what", [*FETCHED, "a LoRA", "a LoRA's repository"])
def test_a_hub_that_is_not_reached_is_asked_once(what: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    gone(monkeypatch, hub)
    name = f"{REPO}/small.safetensors" if what == "a LoRA" else REPO
    fetch = FETCHED[what][0] if what in FETCHED else lambda limits: lora(name, limits)
    with pytest.raises(DownloadError, match=r"acme/nets is not in the local cache and .* cannot be reached"):
        fetch(LARGE)


@pytest.mark.parametrize("what", FETCHED)
def test_what_is_here_is_used_without_a_hub(what: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, _ = FETCHED[what]
    path = fetch(LARGE)
    gone(monkeypatch, hub)
    assert fetch(LARGE) == path


def test_a_hub_that_fails_is_not_needed_for_what_is_here(hub: Hub) -> None:
    first = request_files.fetch(REPO, None, ["small.safetensors"], ANY)
    hub.fail(REPO, None, 503, times=2)
    assert request_files.fetch(REPO, None, ["small.safetensors"], ANY) == first
    with pytest.raises(DownloadError, match="503"):
        request_files.fetch(REPO, None, ["net.safetensors"], ANY)


def test_a_file_that_is_not_there_is_told_with_those_that_are(hub: Hub) -> None:
    with pytest.raises(LoadError, match=r"acme/nets has no nets\.safetensors; it has .*net\.safetensors"):
        request_files.fetch(REPO, None, ["nets.safetensors"], ANY)
    with pytest.raises(InvalidRequest, match=r"has no nets\.safetensors"):
        lora(f"{REPO}/nets.safetensors", LARGE)

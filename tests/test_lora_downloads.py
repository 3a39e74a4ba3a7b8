"""What downloads of LoRAs for requests may do: where a redirect leads, and how large they are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from sfumato.checkpoints import lora_files
from sfumato.checkpoints.remote_limits import HUB, Limits
from sfumato.config import ModelConfig
from sfumato.errors import InvalidRequest
from sfumato.loras import Lora
from sfumato.serving.catalog import Catalog
from support.here import use
from support.hub import Hub

CONTENT = save({"x.lora_down.weight": torch.zeros(600, 1024)})
"""2.3 MiB."""


@dataclass
class Site:
    """A web server under two names; a path that begins with /chunked has no length."""

    port: int
    redirects: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    """Host and path."""

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


@pytest.fixture
def site() -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None: ...

        def do_GET(self) -> None:
            site.requests.append(f"{self.headers['Host'].partition(':')[0]}{self.path}")
            if location := site.redirects.get(self.path.partition("?")[0]):
                self.send_response(302)
                self.send_header("Location", location)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            if not self.path.startswith("/chunked"):
                self.send_header("Content-Length", str(len(CONTENT)))
                self.end_headers()
                self.wfile.write(CONTENT)
                return
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for at in range(0, len(CONTENT), 65536):
                part = CONTENT[at : at + 65536]
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
            self.wfile.write(b"0\r\n\r\n")

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:  # the client has seen enough
                self.close_connection = True

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        site = Site(server.server_port)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield site
        server.shutdown()
        thread.join()


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    (tmp_path / "m.yaml").write_text("name: m\nparameters:\n  model: owner/base\n")
    return Catalog([tmp_path]).get("m")


def located(source: str, config: ModelConfig, limits: Limits) -> bytes:
    return Path(lora_files.locate(Lora(source), config, limits, config.folder / "data").file).read_bytes()


def left(config: ModelConfig) -> list[Path]:
    return [path for path in (config.folder / "data").rglob("*") if path.is_file()]


HOPS = {
    "at once": {"/a.safetensors": "{localhost}/b.safetensors"},
    "later": {"/a.safetensors": "/c.safetensors", "/c.safetensors": "{localhost}/b.safetensors"},
    "to the hub": {"/a.safetensors": "https://huggingface.co/owner/name/resolve/main/b.safetensors"},
}


@pytest.mark.parametrize("hops", HOPS)
def test_a_redirect_to_a_host_that_is_not_listed_is_refused(hops: str, site: Site, config: ModelConfig) -> None:
    site.redirects |= {path: to.replace("{localhost}", site.url("", "localhost")) for path, to in HOPS[hops].items()}
    with pytest.raises(InvalidRequest, match=r"leads to .*lora_hosts") as refusal:
        located(site.url("/a.safetensors?token=SECRET"), config, Limits(["127.0.0.1"]))
    assert "SECRET" not in refusal.value.message and refusal.value.param == "loras"
    assert not [each for each in site.requests if each.startswith("localhost")]
    assert not left(config)


def test_a_redirect_to_a_listed_host_is_followed(site: Site, config: ModelConfig) -> None:
    site.redirects["/a.safetensors"] = site.url("/b.safetensors", "LOCALHOST")
    assert located(site.url("/a.safetensors"), config, Limits(["127.0.0.1", "localhost"])) == CONTENT


def test_the_hub_leads_to_where_it_keeps_its_files(
    site: Site, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", site.url(""))
    path = "/owner/name/resolve/main/a.safetensors"
    site.redirects |= {path: site.url("/cdn/1", "localhost"), "/cdn/1": site.url("/cdn/2", "localhost")}
    assert located(site.url(path), config, Limits(["127.0.0.1"])) == CONTENT
    assert site.requests[-1] == "localhost/cdn/2"


@pytest.mark.parametrize("path", ["/a.safetensors", "/chunked.safetensors", "/download/7", "/chunked/7"])
def test_one_that_is_too_large_is_refused_and_not_kept(path: str, site: Site, config: ModelConfig) -> None:
    with pytest.raises(InvalidRequest, match=r"more than 2 MiB \(the setting max_lora_mb\)"):
        located(site.url(path), config, Limits(["127.0.0.1"], 2 << 20))
    assert not left(config)
    if not path.endswith("7"):
        assert located(site.url(path), config, Limits(["127.0.0.1"], 3 << 20)) == CONTENT


def test_one_on_the_hub_that_is_too_large_is_refused_before_the_download(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "a.safetensors").write_bytes(CONTENT)
    with Hub() as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        hub.add("owner/name", tmp_path / "repository")
        for source in ("owner/name", "owner/name/a.safetensors", "hf://owner/name@main/a.safetensors"):
            with pytest.raises(InvalidRequest, match="more than 2 MiB"):
                located(source, config, Limits([HUB], 2 << 20))
        assert not hub.downloads("owner/name")
        assert located("owner/name", config, Limits([HUB], 3 << 20)) == CONTENT
        # What is here already brings nothing more.
        assert located("owner/name", config, Limits([HUB], 2 << 20)) == CONTENT

"""Where weights come from, places, credentials, names. Numbers are those of the list of cases."""

from __future__ import annotations

import shutil
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

from sfumato.checkpoints import sources, weight_file
from sfumato.commands.check import check
from sfumato.config import Broken, Download, ModelConfig, outcomes
from sfumato.drawing.draw import draw
from sfumato.errors import DownloadError, LoadError, ModelFileError, SfumatoError
from sfumato.models import load
from sfumato.serving.catalog import Catalog
from support.here import asked, config, quiet
from support.hub import Hub
from support.inside import Inside
from support.model_files import read

SECRET = "S3CRET"


class Shop(NamedTuple):
    """A web server that keeps its files to those who know the secret, and what it was asked with."""

    url: str
    files: dict[str, bytes]
    """Path → content."""
    headers: dict[str, dict[str, str]]
    """Path → headers of its answer."""
    asked: list[tuple[str, str | None]]
    """Path with query, Authorization."""
    moved: dict[str, str]
    """Path → where it leads."""
    token: list[str]
    """Bearer tokens of which one is needed, if there is any."""

    def given(self, path: str) -> list[str | None]:
        return [authorization for asked, authorization in self.asked if asked.startswith(path)]


@pytest.fixture
def shop() -> Iterator[Shop]:
    with ExitStack() as stack:
        yield stack.enter_context(opened())


@contextmanager
def opened() -> Iterator[Shop]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

        def do_GET(self) -> None:
            shop.asked.append((self.path, self.headers.get("Authorization")))
            path = urlsplit(self.path).path
            if path in shop.moved:
                self.send_response(302)
                self.send_header("Location", shop.moved[path])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            known = not shop.token or self.headers.get("Authorization") in [f"Bearer {each}" for each in shop.token]
            status, content = (200, shop.files[path]) if path in shop.files and known else (404, b"")
            self.send_response(status if known else 401)
            for name, value in shop.headers.get(path, {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        shop = Shop(f"http://127.0.0.1:{server.server_port}", {}, {}, [], {}, [])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield shop
        server.shutdown()


def resolved(config: ModelConfig) -> Path:
    """Where the weights of a URL lie once they are fetched."""
    source = sources.resolve(config)
    assert isinstance(source, sources.Url)
    return weight_file.obtain(source.url, config.folder, report=quiet)


@pytest.fixture
def at_shop(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """The web server is the hub."""
    monkeypatch.setenv("HF_ENDPOINT", shop.url)
    return shop


# Row 2.


def test_row_2_each_url_has_its_own_file(at_shop: Shop, tmp_path: Path) -> None:
    names = ["huggingface://acme/one/model.safetensors", "huggingface://acme/two/model.safetensors",
             "hf://acme/two/sub/model.safetensors", "hf://acme/two/model.safetensors@v2",
             f"{at_shop.url}/x/model.safetensors?type=a", f"{at_shop.url}/x/model.safetensors?type=b"]  # fmt: skip
    for name in names:
        source = sources.resolve(config(tmp_path, name))
        assert isinstance(source, sources.Url)
        at_shop.files[urlsplit(source.url).path] = name.encode()
    (tmp_path / "model.safetensors").write_bytes(b"by hand")
    found = [resolved(config(tmp_path, name)) for name in names]
    assert len(set(found)) == len(names)
    assert [path.read_bytes() for path in found[:1]] == [b"by hand"]  # what LocalAI has fetched is not fetched again
    assert [path.read_bytes() for path in found[1:4]] == [name.encode() for name in names[1:4]]
    assert [resolved(config(tmp_path, name)) for name in names] == found


def test_row_2_the_key_revision_holds_for_a_file_of_a_repository(at_shop: Shop, tmp_path: Path) -> None:
    one = config(tmp_path, "huggingface://acme/one/model.safetensors", revision="v1")
    at_shop.files["/acme/one/resolve/v1/model.safetensors"] = b"1"
    assert resolved(one).read_bytes() == b"1"
    assert resolved(one) != weight_file.path_for(f"{at_shop.url}/acme/one/resolve/main/model.safetensors", tmp_path)


# Row 3.

SECRETS = [
    "https://h.example/model.safetensors?token=S3CRET",
    "https://me:S3CRET@h.example/model.safetensors",
    "https://S3CRET@h.example/model.safetensors",
    "https://me:p@S3CRET@h.example/model.safetensors#S3CRET",
    "https://h.example/model.safetensors?x=1&X-Amz-Signature=S3CRET",
    "https://h.example/api/download/models/1?token=S3CRET",
    "https://h.example/picture.png?token=S3CRET",
    "https://me:S3CRET@/?token=S3CRET",
    "ftp://me:S3CRET@h.example/model.safetensors",
    "hf://a/b/model.txt?token=S3CRET",
]


@pytest.mark.parametrize("url", SECRETS)
def test_row_3_no_secret_in_lists_checks_logs_and_errors(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = Inside(tmp_path)
    tmp_path = tmp_path / "models"
    (tmp_path / "m.yaml").write_text(
        f"name: m\nparameters: {{model: '{url}'}}\nlora_adapter: '{url}'\nvae: '{url}'\n"
        f"download_files: [{{uri: '{url}', filename: x.safetensors}}]\n"
    )
    (tmp_path / "broken.yaml").write_text(f"name: b\nparameters: {{model: '{url}'}}\ndownload_files: ['{url}']\n")
    (tmp_path / "typo.yaml").write_text(f"name: t\nparameters: {{modle: '{url}'}}\nf16: '{url}'\n")
    catalog = Catalog([tmp_path], open=True)
    said = [str(report) for report in check(catalog)] + [str(problem) for problem in catalog.problems()]
    said += [repr(catalog.get("m")), catalog.get(url).name]
    with inside.client() as client:
        said += [client.get(path).text for path in ("/v1/models", "/v1/models/m", "/sdapi/v1/sd-models")]
    with pytest.raises(SfumatoError) as caught:
        load.load(replace(catalog.get("m"), downloads=()), "cpu", quiet)
    said += [caught.value.message, "".join(traceback.format_exception(caught.value)), caplog.text, *capsys.readouterr()]
    assert [text for text in said if SECRET in text] == []
    assert any("h.example" in text for text in said) or "hf:" in url or "@/" in url


def test_row_3_and_21_no_secret_in_a_picture(
    shop: Shop, here: Hub, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shop.files["/api/download/models/128713"] = checkpoint.read_bytes()
    shop.headers["/api/download/models/128713"] = {"Content-Disposition": 'attachment; filename="dream v1.safetensors"'}
    url = f"{shop.url.replace('//', f'//me:{SECRET}@')}/api/download/models/128713?type=Model&token={SECRET}"
    told: list[Any] = []
    made = draw(load.load(config(tmp_path, url), "cpu", told.append), asked(), quiet)
    assert SECRET not in repr(made.recipe)
    assert SECRET.encode() not in made.file
    assert SECRET not in repr(told) + caplog.text
    assert made.recipe.source == f"{shop.url}/api/download/models/128713"
    assert [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()] == []
    assert len(list(tmp_path.glob("dream v1-*.safetensors"))) == 1


# Row 7.


@pytest.mark.parametrize(
    "model", ["huggingface://acme/gated/model.safetensors", "hf://acme/gated/model.safetensors@v1"]
)
def test_row_7_the_hub_s_token_goes_to_the_hub_alone(
    model: str, at_shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources.resolve(config(tmp_path, model))
    assert isinstance(source, sources.Url)
    path = urlsplit(source.url).path
    at_shop.files[path] = b"1"
    at_shop.token.append(SECRET)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(LoadError, match="set HF_TOKEN"):
        resolved(config(tmp_path, model))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(LoadError, match="of an account that may not"):
        resolved(config(tmp_path, model))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with opened() as other:  # as the hub leads to its CDN
        other.files["/cdn"] = b"2"
        at_shop.moved[path] = f"{other.url.replace('127.0.0.1', 'localhost')}/cdn?sig=1"
        assert resolved(config(tmp_path, model)).read_bytes() == b"2"
        assert other.given("/cdn") == [None]
        assert at_shop.given(path)[-1] == f"Bearer {SECRET}"
        other.files["/model.safetensors"] = b"3"
        for index, elsewhere in enumerate((other.url, other.url.replace("127.0.0.1", "localhost"))):
            weight_file.fetch(f"{elsewhere}/model.safetensors", tmp_path / f"{index}", sha256=None, report=quiet)
        other.moved["/back.safetensors"] = at_shop.url + path  # a stranger that leads to the hub does not get it either
        weight_file.fetch(f"{other.url}/cdn", tmp_path / "y", sha256=None, report=quiet)
        assert set(other.given("/")) == {None}


def test_row_7_download_files_too(at_shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    at_shop.token.append(SECRET)
    at_shop.files["/acme/gated/resolve/main/model.safetensors"] = b"no weights"
    made = config(
        tmp_path, "x.safetensors", downloads=(Download("hf://acme/gated/model.safetensors", "x.safetensors"),)
    )
    with pytest.raises(LoadError):  # of what came
        load.load(made, "cpu", quiet)
    assert (tmp_path / "x.safetensors").read_bytes() == b"no weights"


# Row 8.

KEY = "ab" * 32
ARTIFACTS = """
backend: diffusers
parameters: {{model: tiny/own}}
dtype: fp32
artifacts:
- name: model
  target: model
  source: {{type: huggingface, repo: tiny/own, revision: main, allow_patterns: ['*.json']}}
  resolved: {{endpoint: 'https://huggingface.co', revision: {commit}, cache_key: {key}}}
"""


def test_row_8_what_localai_has_fetched_is_used_as_it_lies_there(
    here: Hub, repositories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / ".artifacts" / "huggingface" / KEY / "snapshot"
    shutil.copytree(repositories["nitrosocke/Ghibli-Diffusion"], snapshot)
    made = read(tmp_path, ARTIFACTS.format(commit="c" * 40, key=KEY))
    before = len(here.requests)
    model = load.load(made, "cpu", quiet)
    assert type(model.pipeline).__name__ == "StableDiffusionPipeline"
    assert len(here.requests) == before
    assert model.source == f"tiny/own@{'c' * 40}"
    (report,) = check(Catalog([tmp_path]))
    assert "fetched by LocalAI" in str(report)


def test_row_8_without_it_the_pinned_commit_is_fetched(tmp_path: Path) -> None:
    made = read(tmp_path, ARTIFACTS.format(commit="c" * 40, key=KEY))
    assert sources.resolve(made) == sources.HubRepository("tiny/own", "c" * 40)
    (tmp_path / "m.yaml").write_text(ARTIFACTS.format(commit="c" * 40, key="../../x"))
    assert isinstance(outcomes(tmp_path / "m.yaml")[0], Broken)


# Row 21.

NAMES = [
    ('attachment; filename="dream.safetensors"', "dream-*.safetensors"),
    ("attachment; filename*=UTF-8''dr%C3%A9am.sft", "dréam-*.sft"),
    ('attachment; filename="../../etc/x.safetensors"', "x-*.safetensors"),
    ("inline", "*.safetensors"),
    ("", "*.safetensors"),
]


@pytest.mark.parametrize(("header", "pattern"), NAMES)
def test_row_21_a_url_that_tells_no_name(header: str, pattern: str, shop: Shop, tmp_path: Path) -> None:
    content = (2).to_bytes(8, "little") + b"{}"
    shop.files["/api/download/models/128713"] = content
    shop.headers["/api/download/models/128713"] = {"Content-Disposition": header} if header else {}
    made = config(tmp_path, f"{shop.url}/api/download/models/128713?type=Model")
    for _ in range(2):
        path = resolved(made)
        assert path.parent == tmp_path
        assert fnmatch(path.name, pattern)
        assert path.read_bytes() == content
    assert len(shop.asked) == 1
    shop.files.clear()
    other = config(tmp_path, f"{shop.url}/api/download/models/128713?type=Other")
    with pytest.raises(DownloadError, match="404"):
        resolved(other)
    assert sources.weights(made, path) == path


def test_row_21_what_is_no_weights_is_said_and_not_kept(shop: Shop, tmp_path: Path) -> None:
    shop.files["/download/1"] = b"<html>"
    with pytest.raises(LoadError, match="not a weight file"):
        resolved(config(tmp_path, f"{shop.url}/download/1"))
    shop.files["/download/1.5"] = b"PK"
    shop.headers["/download/1.5"] = {"Content-Disposition": "attachment; filename=x.ckpt"}
    with pytest.raises(ModelFileError, match="allow_pickle"):
        load.load(config(tmp_path, f"{shop.url}/download/1.5"), "cpu", quiet)


# Row 35.


@pytest.mark.parametrize("name", ["X.SAFETENSORS", "x.Safetensors", "flux.sft", "A.SFT"])
def test_row_35_names_of_single_files(name: str, here: Hub, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(checkpoint.read_bytes())
    model = load.load(config(tmp_path, name), "cpu", quiet)
    assert type(model.pipeline).__name__ == "StableDiffusionPipeline"
    (tmp_path / "m.yaml").write_text(f"parameters: {{model: {name}}}")
    (report,) = check(Catalog([tmp_path]))
    assert report.ok

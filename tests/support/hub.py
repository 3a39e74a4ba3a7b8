"""A Hugging Face hub on 127.0.0.1: real HTTP, repositories from folders, every request on record.

It answers what `huggingface_hub` 2.4 asks to download models, as the real one does:

    GET      /api/models/{id}[/revision/{revision}]       commit and files
    GET      /api/models/{id}/tree/{revision}[/{folder}]  files with size and blob id
    HEAD/GET /{id}/resolve/{revision}/{path}              content, with ETag, X-Repo-Commit and ranges

`huggingface_hub` reads HF_ENDPOINT once, when it is imported. A test therefore uses the hub from a process
of its own with `environment()`, or passes `endpoint=hub.url` where a function takes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".ckpt", ".gguf", ".msgpack")
"""What the hub keeps in LFS: these have their SHA-256 for an ETag, all others the id of their git blob."""

ROUTE = re.compile(
    r"/api/models/(?P<info>[^/]+/[^/]+)(/revision/(?P<pinned>[^/]+))?"
    r"|/api/models/(?P<tree>[^/]+/[^/]+)/tree/(?P<listed>[^/]+)(/(?P<folder>.+))?"
    r"|/(?P<file>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
)


class Request(NamedTuple):
    """One request as it came in; `authorization` and `range` are headers, None without one."""

    method: str
    path: str
    authorization: str | None
    range: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a repository."""

    source: Path
    size: int
    blob_id: str
    sha256: str | None
    """Only of large files."""

    @property
    def etag(self) -> str:
        return self.sha256 or self.blob_id


@dataclass(frozen=True, slots=True)
class Repository:
    entries: dict[str, Entry]
    commit: str
    token: str | None
    card: dict[str, Any]
    """Of its README: what it says of itself."""


class Refused(Exception):
    """An answer other than the one asked for, in the hub's terms: a status and X-Error-Code."""

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.status = status
        self.code = code
        self.message = message


class Hub:
    """The server. It runs from construction to `close()`, each connection in a thread of its own."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        """Everything asked so far, in order of arrival."""
        self._lock = threading.Lock()
        self._repositories: dict[str, Repository] = {}
        self._downloads: dict[str, Counter[str]] = {}
        self._failures: dict[tuple[str, str | None], list[tuple[int, int | None]]] = {}
        self._cuts: Counter[tuple[str, str]] = Counter()
        self._damages: dict[tuple[str, str], list[bytes]] = {}
        self.sent: Counter[tuple[str, str]] = Counter()
        """Bytes of content sent, by repository and path."""
        self._gates: dict[str, threading.Event] = {}
        self._arrived: dict[str, threading.Event] = {}
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        """What HF_ENDPOINT has to be."""
        self._thread = threading.Thread(target=self._server.serve_forever, name="hub", daemon=True)
        self._thread.start()

    def add(self, repo: str, folder: Path, *, token: str | None = None, card: dict[str, Any] | None = None) -> str:
        """Serves the files of `folder` as `repo`; returns the commit. Adding again is a new commit.

        With `token` the repository is gated: anyone may look at its list of files, but content needs
        this token. As on the real hub, no token is 401 and a wrong one 403. `card`: what its README says of itself.
        """
        entries = {
            source.relative_to(folder).as_posix(): _entry(source)
            for source in sorted(folder.rglob("*"))
            if source.is_file()
        }
        listing = "".join(f"{path} {entry.etag}\n" for path, entry in entries.items())
        commit = hashlib.sha1(listing.encode()).hexdigest()
        with self._lock:
            self._repositories[repo] = Repository(entries, commit, token, card or {})
        return commit

    def downloads(self, repo: str) -> dict[str, int]:
        """How many times the content of each path was sent or begun; looks at headers and first bytes do not count."""
        with self._lock:
            return dict(self._downloads.get(repo, {}))

    def fail(self, repo: str, path: str | None, status: int, times: int = 1, *, retry_after: int | None = None) -> None:
        """The next `times` requests for a file (HEAD or GET), or for the list of files (None), fail."""
        with self._lock:
            self._failures.setdefault((repo, path), []).extend([(status, retry_after)] * times)

    def cut(self, repo: str, path: str, times: int = 1) -> None:
        """The next `times` downloads of a file end half-way, except looks at its first bytes."""
        with self._lock:
            self._cuts[repo, path] += times

    def damage(self, repo: str, path: str, content: bytes, times: int = 1) -> None:
        """The next `times` downloads of a file bring this content, under the checksum of the right one."""
        with self._lock:
            self._damages.setdefault((repo, path), []).extend([content] * times)

    def hold(self, repo: str) -> None:
        """From now on content of `repo` stops half-way, until `release`.

        `huggingface_hub` takes 10 s of silence for a broken connection and asks for the rest, five times.
        """
        with self._lock:
            self._gates[repo] = threading.Event()
            self._arrived[repo] = threading.Event()

    def wait_held(self, repo: str, timeout: float = 300.0) -> None:
        """Returns as soon as a download of the held `repo` stands in mid-file."""
        if not self._arrived[repo].wait(timeout):
            raise TimeoutError(f"Nothing of {repo} was downloaded within {timeout} s.")

    def release(self, repo: str) -> None:
        """Lets held downloads go on, and those to come go through."""
        with self._lock:
            gate = self._gates.pop(repo, None)
        if gate:
            gate.set()

    def environment(self, home: Path, *, token: str | None = None, offline: bool = False) -> dict[str, str]:
        """This process's environment with what it takes to use the hub; the cache is in `home`."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "NO_PROXY": "127.0.0.1",
        }
        return environment | ({"HF_TOKEN": token} if token else {})

    def close(self) -> None:
        """Releases everything and stops; later requests find nobody."""
        for repo in list(self._gates):
            self.release(repo)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Hub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What the handler asks.

    def record(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def find(self, repo: str, revision: str | None) -> Repository:
        found = self._repositories.get(repo)
        if found is None:
            raise Refused(404, "RepoNotFound", "Repository not found")
        if revision not in (None, "main", found.commit):
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def raise_failure(self, repo: str, path: str | None) -> None:
        """Raises the failure that is due for this file, or list of files, if there is one."""
        with self._lock:
            due = self._failures.get((repo, path))
            if due:
                status, retry_after = due.pop(0)
                raise Refused(status, "Injected", "The test asked for this failure", retry_after)

    def is_cut(self, repo: str, path: str) -> bool:
        """Whether this download is to end half-way."""
        with self._lock:
            self._cuts[repo, path] -= 1
            return self._cuts[repo, path] >= 0

    def damaged(self, repo: str, path: str, content: bytes) -> bytes:
        """The content that this download is to bring."""
        with self._lock:
            due = self._damages.get((repo, path))
            return due.pop(0) if due else content

    def begin(self, repo: str, path: str) -> None:
        with self._lock:
            self._downloads.setdefault(repo, Counter())[path] += 1

    def pause(self, repo: str) -> None:
        """Blocks while `repo` is held."""
        with self._lock:
            gate, arrived = self._gates.get(repo), self._arrived.get(repo)
        if gate and arrived:
            arrived.set()
            gate.wait()


class Server(ThreadingHTTPServer):
    hub: Hub
    daemon_threads = True
    block_on_close = False  # A client that keeps its connection open must not keep `close` waiting.
    request_queue_size = 128


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # Head and body are two writes; with Nagle each answer waits 40 ms.

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `Hub.requests` is the record."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.server.hub.record(
            Request(self.command, self.path, self.headers.get("Authorization"), self.headers.get("Range"))
        )
        try:
            self._route()
        except Refused as refused:
            body = json.dumps({"error": refused.message}).encode()
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            headers |= {"Retry-After": str(refused.retry_after)} if refused.retry_after is not None else {}
            self._send(refused.status, "application/json", body, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # The client went away, which tests of cancelling do on purpose.

    def _route(self) -> None:
        route = ROUTE.fullmatch(urlsplit(self.path).path)
        if route is None:
            raise Refused(404, "NotFound", f"No such page: {self.path}")
        found = {name: unquote(value) for name, value in route.groupdict().items() if value is not None}
        if "info" in found:
            self._info(found["info"], found.get("pinned"))
        elif "tree" in found:
            self._tree(found["tree"], found["listed"], found.get("folder", ""))
        else:
            self._file(found["file"], found["revision"], found["path"])

    def _info(self, repo: str, revision: str | None) -> None:
        self.server.hub.raise_failure(repo, None)
        repository = self.server.hub.find(repo, revision)
        self._send_json(
            {
                "_id": repository.commit[:24],
                "id": repo,
                "modelId": repo,
                "sha": repository.commit,
                "private": False,
                "gated": "manual" if repository.token else False,
                "disabled": False,
                "tags": ["diffusers"],
                "library_name": "diffusers",
                "cardData": repository.card,
                "siblings": [
                    {"rfilename": path, "size": entry.size, "blobId": entry.blob_id}
                    for path, entry in repository.entries.items()
                ],
            }
        )

    def _tree(self, repo: str, revision: str, folder: str) -> None:
        self.server.hub.raise_failure(repo, None)
        repository = self.server.hub.find(repo, revision)
        below = {path: entry for path, entry in repository.entries.items() if _is_below(path, folder)}
        if folder and not below:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
        files = [
            {"type": "file", "oid": entry.blob_id, "size": entry.size, "path": path}
            | ({"lfs": {"oid": entry.sha256, "size": entry.size, "pointerSize": 135}} if entry.sha256 else {})
            for path, entry in below.items()
        ]
        folders = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in _folders(below)]
        self._send_json(folders + files)

    def _file(self, repo: str, revision: str, path: str) -> None:
        hub = self.server.hub
        hub.raise_failure(repo, path)
        repository = hub.find(repo, revision)
        self._check_token(repo, repository.token)
        entry = repository.entries.get(path)
        if entry is None:
            raise Refused(404, "EntryNotFound", "Entry not found")
        headers = {"ETag": f'"{entry.etag}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        content = entry.source.read_bytes()
        if self.command == "GET":
            content = hub.damaged(repo, path, content)
        status = 200
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(span[1]), min(int(span[2] or entry.size - 1), entry.size - 1)
            if start > end:
                raise Refused(416, "RangeNotSatisfiable", f"{path} has {entry.size} bytes")
            status, content = 206, content[start : end + 1]
            headers["Content-Range"] = f"bytes {start}-{end}/{entry.size}"
        if self.command == "HEAD":
            self._send(status, "application/octet-stream", content, headers)
            return
        if not (span and span[2]):
            hub.begin(repo, path)
        half = len(content) // 2
        self._send(status, "application/octet-stream", content[:half], headers, length=len(content))
        hub.sent[repo, path] += half
        if not self.headers.get("Range", "").startswith("bytes=0-") and hub.is_cut(repo, path):
            self.close_connection = True
            return
        hub.pause(repo)
        self.wfile.write(content[half:])
        hub.sent[repo, path] += len(content) - half

    def _check_token(self, repo: str, token: str | None) -> None:
        given = self.headers.get("Authorization")
        if token is None or given == f"Bearer {token}":
            return
        message = f"Access to model {repo} is restricted. You must have access to it and be authenticated."
        raise Refused(403 if given else 401, "GatedRepo", message)

    def _send_json(self, value: Any) -> None:
        self._send(200, "application/json", json.dumps(value).encode(), {})

    def _send(self, status: int, kind: str, body: bytes, headers: dict[str, str], *, length: int | None = None) -> None:
        """Sends headers and, for GET, `body`, which may be only the beginning of `length` bytes."""
        self.send_response(status)
        for name, value in {"Content-Type": kind, **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(source: Path) -> Entry:
    content = source.read_bytes()
    blob_id = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    sha256 = hashlib.sha256(content).hexdigest() if source.suffix in LARGE else None
    return Entry(source, len(content), blob_id, sha256)


def _is_below(path: str, folder: str) -> bool:
    return not folder or path.startswith(folder + "/")


def _folders(paths: Iterable[str]) -> list[str]:
    return sorted({str(parent) for path in paths for parent in Path(path).parents if parent != Path()})

"""Kill a server again and again, at random moments, while clients draw. `support.killed` counts what came of it.

PYTHONPATH=src:tests python -m support.killing 1000              # kills of the API process, pictures at once
PYTHONPATH=src:tests python -m support.killing 1000 embedded     # the built-in model; also its worker, and both
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from support import killed, serving
from support.batching_client import GENERATIONS, OPEN, jsonl

KINDS = ("plain", "keyed", "streamed", "later", "later, keyed", "batch")
"""Of requests: plain ones may be lost; `streamed` has a key; `later` is with Prefer, and may be lost until its 202."""

CLIENTS = len(KINDS)
LINES = 3
"""Of a batch."""

LONGEST_S = {"seeded": 2.0, "embedded": 4.0}
"""Until a kill, from the server's start or the last kill on; of every second one, from the next answered request on."""

ROUND = 25
"""Kills after which what came of them is checked, and a new home is begun."""

WORKER_ALONE = 10
"""The last kills, one in so many of all, are of the worker alone: the last API process lives through them."""


@dataclass
class Wanted:
    """One request of a client, or a batch of them, sent until it is answered."""

    prompts: list[str]
    kind: str
    key: str = ""
    file: str = ""
    """The input of a batch."""
    location: str = ""
    answers: list[dict[str, tuple[int, str]]] = field(default_factory=list)
    """For each time that it was answered: prompt → seed and picture."""

    @property
    def accepted(self) -> bool:
        return bool(self.key or self.file or self.location)

    def body(self, prompt: str) -> dict[str, Any]:
        body = {"prompt": prompt, "response_format": "b64_json", "size": "64x64", "steps": 3}
        return body | ({"stream": True} if self.kind == "streamed" else {})


class Killing:
    """`server`: makes one; it is killed `kills` times."""

    def __init__(self, make: Callable[[], serving.Server], engine: str, kills: int, dice: random.Random) -> None:
        self._make, self._engine, self._kills, self._dice = make, engine, kills, dice
        self._url = ""
        self._up = threading.Event()
        self._answered = threading.Event()
        self._over = False
        self._lock = threading.Lock()
        self._count = 0
        self.wanted: list[Wanted] = []
        self.killed: Counter[str] = Counter()

    @contextmanager
    def run(self) -> Iterator[serving.Server]:
        """The last server, which lives; everything that was accepted has been answered."""
        clients = [threading.Thread(target=self._draw, args=(number,), daemon=True) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        left = self._kills
        while True:
            server = self._make()
            server.__enter__()
            self._url = server.url
            self._up.set()
            died = False
            while left and not died:
                self._wait()
                left -= 1
                died = self._kill(server, left)
            if not died:
                break
        self._over = True
        for client in clients:
            client.join()
        try:
            yield server
        finally:
            server.__exit__(None, None, None)

    def _wait(self) -> None:
        if self._dice.random() < 0.5:
            self._answered.clear()
            self._answered.wait(serving.TIMEOUT_S)
        time.sleep(self._dice.random() * LONGEST_S[self._engine])  # the moment is what is random here

    def _kill(self, server: serving.Server, left: int) -> bool:
        """Whether the API process has died."""
        who = self._dice.choice(("server", "worker", "both")) if self._engine == "embedded" else "server"
        if self._engine == "embedded" and left < self._kills // WORKER_ALONE:
            who = "worker"
        self.killed[who] += 1
        process = psutil.Process(server.pid)
        children = process.children() if who != "server" else []
        if who != "worker":
            self._up.clear()
            server.signal(signal.SIGKILL)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        if who == "worker":
            return False
        server.wait()
        server.client.close()
        return True

    def _draw(self, number: int) -> None:
        """Each client begins with another kind."""
        dice = random.Random(number)
        kind = KINDS[number]
        while not self._over:
            wanted = self._new(kind, f"{number}-{dice.random()}")
            while not wanted.answers:
                self._up.wait()
                try:
                    with httpx.Client(base_url=self._url, timeout=serving.TIMEOUT_S) as client:
                        (_ask_batch if kind == "batch" else _ask)(client, wanted)
                except httpx.TransportError:
                    if kind in ("plain", "later") and not wanted.accepted:
                        break
            self._answered.set()
            kind = dice.choice(KINDS)

    def _new(self, kind: str, key: str) -> Wanted:
        with self._lock:
            first = self._count
            self._count += LINES if kind == "batch" else 1
            wanted = Wanted([f"item {number}" for number in range(first, self._count)], kind)
            if "keyed" in kind or kind == "streamed":
                wanted.key = key
            self.wanted.append(wanted)
        return wanted


def _ask(client: httpx.Client, wanted: Wanted) -> None:
    (prompt,) = wanted.prompts
    headers = {"idempotency-key": wanted.key} if wanted.key else {}
    headers |= {"prefer": "respond-async"} if wanted.kind.startswith("later") else {}
    if not wanted.location:
        answer = client.post(GENERATIONS, json=wanted.body(prompt), headers=headers)
        if _refused(answer):
            return
        if "worker_died" in answer.text:  # the last event of a stream, which is not stored
            return
        if answer.status_code == 200:
            wanted.answers.append({prompt: picture_of(answer)})
            return
        wanted.location = answer.headers["location"]
    while (job := client.get(wanted.location).json())["ended"] is None:
        time.sleep(0.02)
    assert job["status"] == "completed", job
    (item,) = job["response"]["body"]["data"]
    wanted.answers.append({prompt: (item["seed"], item["b64_json"])})


def _ask_batch(client: httpx.Client, wanted: Wanted) -> None:
    """As a careful client does: it looks whether the batch that it had no answer about was begun."""
    if not wanted.file:
        lines = jsonl([wanted.body(prompt) for prompt in wanted.prompts])
        answer = client.post("/v1/files", files={"file": ("lines.jsonl", lines)}, data={"purpose": "batch"})
        if _refused(answer):
            return
        wanted.file = answer.json()["id"]
    if not wanted.location:
        begun = client.get("/v1/batches", params={"limit": 100}).json()["data"]
        found = [batch["id"] for batch in begun if batch["input_file_id"] == wanted.file]
        if not found:
            body = {"input_file_id": wanted.file, "endpoint": GENERATIONS, "completion_window": "24h"}
            answer = client.post("/v1/batches", json=body)
            if _refused(answer):
                return
            found = [answer.json()["id"]]
        wanted.location = f"/v1/batches/{found[0]}"
    while (batch := client.get(wanted.location).json())["status"] in OPEN:
        time.sleep(0.02)
    assert batch["status"] == "completed", batch
    assert batch["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}, batch
    assert batch["error_file_id"] is None
    text = client.get(f"/v1/files/{batch['output_file_id']}/content").text
    lines_of = [json.loads(line) for line in text.splitlines()]
    assert [line["custom_id"] for line in lines_of] == [f"line-{index}" for index in range(LINES)]
    items = [line["response"]["body"]["data"] for line in lines_of]
    assert [len(each) for each in items] == [1] * LINES
    answers = ((item["seed"], item["b64_json"]) for (item,) in items)
    wanted.answers.append(dict(zip(wanted.prompts, answers, strict=True)))


def _refused(answer: httpx.Response) -> bool:
    """Whether nothing was accepted, and it is to be sent again."""
    if answer.status_code in (429, 503):
        time.sleep(0.1)
        return True
    assert answer.status_code in (200, 202), answer.text
    return False


def picture_of(answer: httpx.Response) -> tuple[int, str]:
    """Seed and picture, base64."""
    if answer.headers["content-type"] == "application/json":
        (item,) = answer.json()["data"]
        return item["seed"], item["b64_json"]
    (line,) = [line for line in answer.text.splitlines() if line.startswith("data:")]
    event = json.loads(line.removeprefix("data:"))
    assert event["type"] == "image_generation.completed", event
    return event["seed"], event["b64_json"]


def main(kills: int, engine: str = "seeded", folder: Path | None = None) -> list[Killing]:
    """Rounds of kills."""
    folder = folder or Path(tempfile.mkdtemp())
    undisturbed = killed.Home(folder / "undisturbed", engine)
    with Killing(undisturbed.server, engine, 0, random.Random(kills)).run() as server:
        before = undisturbed.footprint(server)
    left_by_it = undisturbed.leftovers()
    rounds = []
    for done in range(0, kills, ROUND):
        home = killed.Home(folder / f"killed-{done}", engine)
        killing = Killing(home.server, engine, min(ROUND, kills - done), random.Random(kills + done))
        with killing.run() as server:
            killed.check(killing.wanted, server, home)
            after = home.footprint(server)
        after.require_as_little_as(before)
        assert home.leftovers() == left_by_it
        shutil.rmtree(home.folder)
        rounds.append(killing)
        print(f"{figures(rounds)}; undisturbed {before}, now {after}", flush=True)
    return rounds


def figures(rounds: list[Killing]) -> str:
    """Who was killed how often, and which requests were answered or lost."""
    kills = sum((killing.killed for killing in rounds), Counter[str]())
    requests = Counter(
        f"{each.kind}{'' if each.answers else ' (lost)'}" for killing in rounds for each in killing.wanted
    )
    return f"{kills.total()} kills {dict(kills)}, {requests.total()} requests {dict(requests)}"


if __name__ == "__main__":
    began = time.monotonic()
    main(int(sys.argv[1]), *sys.argv[2:3])
    print(f"{time.monotonic() - began:.0f} s")

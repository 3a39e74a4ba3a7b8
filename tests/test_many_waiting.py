"""A thousand pictures in the line of a real server: asking where they stand costs next to nothing."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import httpx

from support.answerable import answerable, within
from support.serving import Server

WAITING = 1000


def test_row_19_a_thousand_wait_and_everybody_can_ask(tmp_path: Path) -> None:
    flags = ("--max-queue", "2000", "--max-n", str(WAITING), "--max-active", "2")
    with Server(tmp_path, tmp_path / "data", *flags) as server:
        half = WAITING // 2
        body = {"prompt": "a cat", "steps": 1000, "n": half}
        webui = {"prompt": "a cat", "steps": 1000, "batch_size": half}
        statuses: list[int] = []

        def post(path: str, body: dict[str, object]) -> None:
            answer = httpx.post(server.url + path, json=body, headers={"x-request-id": "many"}, timeout=300)
            statuses.append(answer.status_code)

        work = [
            threading.Thread(target=post, args=each)
            for each in (("/v1/images/generations", body), ("/sdapi/v1/txt2img", webui))
        ]
        for each in work:
            each.start()
        waits = 'sfumato_queue_depth{priority="interactive"}'
        within(300, lambda: f"{waits} {WAITING - 1:.1f}" in server.client.get("/metrics").text)  # one place is kept

        with answerable(server.url, server.pid):
            began = time.monotonic()
            for _ in range(5):
                state = server.client.get("/sdapi/v1/progress", params={"skip_current_image": True}).json()["state"]
                assert state["job_count"] == half
                progress = server.client.get("/v1/images/progress/many").json()
                assert progress["pictures"] == half
                assert server.client.get("/metrics").status_code == 200
            assert time.monotonic() - began < 60  # one of them once took two minutes
            for _ in work:  # both have the same id
                assert server.client.delete("/v1/images/progress/many").status_code == 200
            for each in work:
                each.join()
        assert statuses == [499, 499]
        assert f"{waits} 0.0" in server.client.get("/metrics").text

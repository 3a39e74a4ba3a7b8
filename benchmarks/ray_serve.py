"""What Ray Serve costs: a request through HTTP to the server on it, over the same request to `sfumato serve`.

    python -m benchmarks.ray_serve

Both draw with one worker on the CPU, the built-in model at 64x64, and alternate. In one step, so that what is around
the drawing counts most; in 20, each of which is a message; and with two previews as a stream.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.figures import figure, table, write

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from cluster import environment
from support.ray_server import RayServer
from support.serving import Server

REPEATS = 20
KINDS: Mapping[str, Mapping[str, Any]] = {
    "1 step": {"step": 1},
    "20 steps": {"step": 20},
    "20 steps, 2 previews": {"step": 20, "stream": True, "partial_images": 2},
}


def milliseconds(server: Server, body: Mapping[str, Any]) -> float:
    began = time.perf_counter()
    answer = server.client.post("/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    environment.make()
    with tempfile.TemporaryDirectory() as text, ExitStack() as stack:
        folder = Path(text)
        for name in ("plain", "models", "ray"):
            (folder / name).mkdir()
        servers: dict[str, Server] = {
            "plain": stack.enter_context(Server(folder / "models", folder / "plain", "--device", "cpu")),
            "Ray": stack.enter_context(RayServer(folder / "ray", {"min_replicas": 1})),
        }
        taken: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in servers} for kind in KINDS}
        for turn in range(REPEATS + 3):
            for kind, body in KINDS.items():
                for name, server in servers.items():
                    prompt = {"prompt": "a red circle", "size": "64x64", "seed": turn, "response_format": "b64_json"}
                    used = milliseconds(server, {**prompt, **body})
                    if turn >= 3:  # the first ones load the model
                        taken[kind][name].append(used)
    rows = [
        [kind, *(figure(values) for values in of.values()), figure([b - a for a, b in zip(*of.values(), strict=True)])]
        for kind, of in taken.items()
    ]
    print(table(["milliseconds", "plain", "on Ray Serve", "difference"], rows))
    write("ray_serve", "cpu", {kind: {name: figure(each) for name, each in of.items()} for kind, of in taken.items()})


if __name__ == "__main__":
    main()

"""A worker without torch that speaks the real wire, draws one plain square, and misbehaves on command.

    Supervisor(settings, worker=stub(tmp_path, "silent", "well"))

The names are how its lives begin, one for each start, the last one for all that follow (`BEGINNINGS`). How it
draws is said by the prompt (`DRAWINGS`); "once:garbage" does so in the first life that sees it and draws
after that, and any other prompt is drawn. Which life it is stands in `tmp_path`.
"""

from __future__ import annotations

import base64
import os
import pickle
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sfumato.core import Done, Failed, Generation, Recipe, Step
from sfumato.engine.protocol import Answer, Cancel, Load, Ordered, Ready, Started, Status, Stop, Submit, Unusable
from sfumato.errors import AdditionTooLarge, ModelTooLarge
from sfumato.process import wire
from sfumato.sampling import Sampling
from sfumato.status import ModelStatus

HELLO = Ready("cpu", {"stub": "1"})
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAE0lEQVR42mP8v5QBK2BiYBhKEgBM7gG0NglsLAAAAABJRU5ErkJggg=="
)
"""What it draws, whatever it is asked for."""
TOTAL = 4
"""Steps of a picture that does not say how many."""


def stub(folder: Path, *beginnings: str) -> list[str]:
    """The command of a stub worker whose lives begin so; `lives` counts them."""
    return [sys.executable, __file__, str(folder / "lives"), ",".join(beginnings or ("well",))]


def gate_of(folder: Path) -> Path:
    """While this file exists, workers that begin with "gated" wait before their handshake, and pictures of the prompt
    "gated" after their first step."""
    return folder / "gate"


def lives(folder: Path) -> int:
    """How many were started so far."""
    return int((folder / "lives").read_text())


class Unreadable:
    """Can be pickled, and not be unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)


def framed(body: bytes, length: int | None = None) -> bytes:
    return struct.pack("!Q", len(body) if length is None else length) + body


FRAMES: Mapping[str, bytes] = {
    "noise": b"warning: something printed this into the socket\n",
    "too long": framed(b"x", 2**62),
    "truncated": framed(b"x", 1000),
    "empty": framed(b""),
    "no pickle": framed(b"\x00\xff\x00\xff"),
    "unreadable": framed(pickle.dumps(Unreadable())),
    "missing class": framed(b"csfumato.core\nNothing\n."),
    "unknown": framed(pickle.dumps(SimpleNamespace(id="x"))),
    "none": framed(pickle.dumps(None)),
    "command": framed(pickle.dumps(Stop())),
    "no event": framed(pickle.dumps(Answer("x", "no event"))),  # type: ignore[arg-type]
    "no status": framed(pickle.dumps(Status("m", None))),  # type: ignore[arg-type]
    "no id": framed(pickle.dumps(Started(["x"]))),  # type: ignore[arg-type]
}
"""What no worker should write. After a truncated one it ends."""


def write(name: str) -> Callable[[socket.socket], None]:
    def misbehave(sock: socket.socket) -> None:
        sock.sendall(FRAMES[name])
        if name == "truncated":
            os._exit(1)

    return misbehave


def die(sock: socket.socket) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(sock: socket.socket) -> None:
    while True:
        time.sleep(60)


def unusable(sock: socket.socket) -> None:
    """Its device is."""
    sock.sendall(wire.pack(Unusable("the device is not usable: it has gone")))
    while sock.recv(1 << 16):  # until the other side has read that, and closes
        pass
    os._exit(0)


def deaf(sock: socket.socket) -> None:
    """It is there, and has closed its end."""
    sock.close()
    hang(sock)


MISBEHAVIOUR: Mapping[str, Callable[[socket.socket], None]] = {
    **{name: write(name) for name in FRAMES},
    "die": die,
    "hang": hang,
    "deaf": deaf,
    "unusable": unusable,
}
BEGINNINGS = ("well", "gated", "stdout noise", *MISBEHAVIOUR)
DRAWINGS = tuple(MISBEHAVIOUR)


def wait_at_gate(counter: Path) -> None:
    while gate_of(counter.parent).exists():
        time.sleep(0.01)


def draw(generation: Generation, sock: socket.socket, counter: Path) -> None:
    id = generation.id
    sock.sendall(wire.pack(Started(id)))
    total = generation.sampling.steps or TOTAL
    for step in range(1, total + 1):
        if step == 2 and generation.prompt == "gated":
            wait_at_gate(counter)
        sock.sendall(wire.pack(Answer(id, Step(step, total))))
    recipe = Recipe(
        model="m", source="stub", pipeline="Stub", prompt=generation.prompt, seed=generation.seed,
        sampling=Sampling(width=8, height=8, steps=total, scheduler="stub"),
        image_sha256=(), mask_sha256=None, device="cpu", dtype="fp32",
    )  # fmt: skip
    sock.sendall(wire.pack(Answer(id, Done(PNG, recipe))))


def obey(submit: Submit, sock: socket.socket, counter: Path) -> None:
    prompt = submit.generation.prompt
    once = prompt.startswith("once:")
    name = prompt.removeprefix("once:")
    seen = counter.with_name(f"seen {submit.generation.id}")
    if prompt == f"too large for {counter.parent.name}":
        sock.sendall(wire.pack(Answer(submit.generation.id, Failed(ModelTooLarge("it needs another device")))))
        return
    if prompt == "addition too large":
        sock.sendall(wire.pack(Answer(submit.generation.id, Failed(AdditionTooLarge("its LoRA has no room")))))
        return
    if name == "vanish":
        die(sock)  # before it said that it started
    if name in MISBEHAVIOUR and not (once and seen.exists()):
        seen.touch()
        sock.sendall(wire.pack(Started(submit.generation.id)))
        sock.sendall(wire.pack(Answer(submit.generation.id, Step(1, TOTAL))))
        MISBEHAVIOUR[name](sock)
    else:
        sock.sendall(wire.pack(Status(submit.config.name, ModelStatus("ready"))))
        draw(submit.generation, sock, counter)


def main(counter: Path, beginnings: list[str], fd: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock = socket.socket(fileno=fd)
    life = int(counter.read_text()) if counter.exists() else 0
    counter.write_text(str(life + 1))
    beginning = beginnings[min(life, len(beginnings) - 1)]
    if beginning == "stdout noise":
        print("noise on stdout " * 1000, flush=True)
    elif beginning == "gated":
        wait_at_gate(counter)
    elif beginning != "well":
        MISBEHAVIOUR[beginning](sock)
    wire.receive(sock)  # the settings
    sock.sendall(wire.pack(HELLO))
    try:
        while not isinstance(command := wire.receive(sock), Stop):
            if isinstance(command, Submit):
                obey(command, sock, counter)
            elif isinstance(command, Load):
                sock.sendall(wire.pack(Status(command.config.name, ModelStatus("ready"))))
                sock.sendall(wire.pack(Ordered(command.id)))
            else:
                assert isinstance(command, Cancel)
    except EOFError:
        pass


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3]))

"""The process that computes: `python -m sfumato.engine.worker FD`, started by `supervisor`.

FD is one end of a socket pair. The first message in is the `Settings`, the first out `Ready`; then
commands come in and reports go out. When the other side is gone this process ends at once.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading

from sfumato import logs
from sfumato.engine import process, wire
from sfumato.engine.protocol import Ready, Report


def main(fd: int) -> None:
    # Ctrl-C reaches the whole process group; the API process decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sock = socket.socket(fileno=fd)
    settings = wire.receive(sock)
    logs.configure(settings)

    process.prepare()
    import diffusers
    import torch

    from sfumato.engine.loop import Loop

    logs.adopt()
    lock = threading.Lock()

    def send(report: Report) -> None:
        with lock:
            sock.sendall(wire.pack(report))

    loop = Loop(settings, send)

    def read() -> None:
        try:
            while True:
                loop.post(wire.receive(sock))
        except (EOFError, OSError):
            os._exit(1)  # nobody is left to answer

    best = torch.accelerator.current_accelerator(check_available=True)
    send(Ready(str(best or "cpu"), {"diffusers": diffusers.__version__, "torch": torch.__version__}))
    threading.Thread(target=read, daemon=True).start()
    loop.run()


if __name__ == "__main__":
    main(int(sys.argv[1]))

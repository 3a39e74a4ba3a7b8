"""The worker process: `python -m sfumato.process.worker FD`, started by `supervisor`.

FD is one end of a socket pair. The first message in is the `Settings`, the first out `Ready`; then
commands come in and reports go out. If the other side disappears, this process exits at once.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading

from sfumato import logs
from sfumato.core import Failed
from sfumato.engine import environment
from sfumato.engine.protocol import Answer, Ready, Report, Unusable
from sfumato.errors import DrawError, first_line
from sfumato.process import lean_imports, wire
from sfumato.settings import members

log = logging.getLogger(__name__)


def main(fd: int) -> None:
    # Ctrl-C reaches the whole process group; the API process decides when the worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sock = socket.socket(fileno=fd)
    settings = wire.receive(sock)
    logs.configure(settings)

    environment.prepare()
    own, *further = members(settings.device)
    lean_imports.install(alone=not further)
    import diffusers
    import torch

    from sfumato.engine.loop import Loop

    logs.route_libraries()
    if settings.devices and (problem := _use(own)):
        sock.sendall(wire.pack(Unusable(problem)))
        return
    lock = threading.Lock()

    def send(report: Report) -> None:
        data = _pack(report)
        with lock:
            sock.sendall(data)

    loop = Loop(settings, send)

    def read() -> None:
        try:
            while True:
                loop.post(wire.receive(sock))
        except (EOFError, OSError):
            os._exit(1)  # nobody is left to answer
        except wire.BadFrame:
            log.exception("the worker received an invalid message from the API process and exits")
            os._exit(1)  # it could never receive a command again

    best = torch.accelerator.current_accelerator(check_available=True)
    device = str(best or "cpu") if settings.device == "auto" else settings.device
    send(Ready(device, {"diffusers": diffusers.__version__, "torch": torch.__version__}))
    threading.Thread(target=read, daemon=True).start()
    try:
        loop.run()
    except Exception:
        log.exception("the loop failed")
        os._exit(1)  # returning would wait for threads that libraries started


def _use(device: str) -> str:
    """Make this the device that libraries mean when they name no number, so that they take no memory on another one.

    Returns why it cannot be used; empty if it can.
    """
    import torch

    try:
        torch.ones(1, device=device)
        if (index := torch.device(device).index) is not None:
            torch.accelerator.set_device_index(index)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        return f"the device {device} is not usable: {first_line(error)}"
    return ""


def _pack(report: Report) -> bytes:
    """Encode a report; a picture that cannot be sent fails only its own request."""
    try:
        return wire.pack(report)
    except wire.BadFrame as error:
        if not isinstance(report, Answer):
            raise
        return wire.pack(Answer(report.id, Failed(DrawError(f"the picture cannot be sent: {error}"))))


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""A further device of a worker: `python -m sfumato.runners.follower FD`, started by `group`.

FD is one end of a pipe. The messages are those of `group`, and each is carried out in its turn. If the other side
disappears, or this rank fails where rank 0 did not, this process exits at once, and so does the worker then.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sfumato.errors import first_line, told
from sfumato.runners import group
from sfumato.runners.group import Begin, Drop, Failed, Fill, Forward, Hold, Join, Outline


class Follower:
    """Holds modules on one device. Used on one thread."""

    def __init__(self, begin: Begin) -> None:
        self._begin = begin
        self._device = begin.devices[begin.rank]
        self._modules: dict[int, torch.nn.Module] = {}
        self._mesh: Any = None

    def use_device(self) -> str:
        """Why it cannot be used; empty if it can."""
        torch.set_num_threads(self._begin.threads)
        try:
            torch.ones(1, device=self._device)
            if (index := torch.device(self._device).index) is not None:
                torch.accelerator.set_device_index(index)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            return f"the device {self._device} is not usable: {first_line(error)}"
        return ""

    def join(self) -> None:
        self._mesh = group.joined(self._begin.rank, self._begin.devices, self._begin.store)

    def hold(self, message: Hold) -> str:
        """Why there is no room for it; empty if there is."""
        try:
            module = pickle.loads(message.module).to_empty(device=self._device)
            self._modules[message.number] = group.divided(module, self._begin.rank, self._begin.devices, self._mesh)
        except Exception as error:  # whatever a module's code raises: the worker computes it alone
            return f"{self._device} cannot hold it: {told(error)}"
        return ""

    def fill(self, number: int) -> None:
        for _, tensor in group.tensors(self._modules[number]):
            tensor.data.copy_(group.received(Outline(tuple(tensor.shape), tensor.dtype), self._device))

    def forward(self, message: Forward) -> str:
        """Why it failed; empty if it was computed."""
        args, kwargs = pytree.tree_map_only(
            Outline, lambda outline: group.received(outline, self._device), message.arguments
        )
        try:
            group.arrived(self._modules[message.number](*args, **kwargs))
        except Exception as error:  # whatever the module raises, rank 0 raises as well
            return repr(error)
        return ""

    def drop(self, number: int) -> None:
        self._modules.pop(number, None)
        if (accelerator := torch.accelerator.current_accelerator()) and accelerator.type == "cuda":
            torch.cuda.empty_cache()


def main(fd: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the worker decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe = Connection(fd)
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pipe, messages), daemon=True).start()
    follower = Follower(messages.get())
    group.send(pipe, follower.use_device())
    with torch.no_grad():
        while True:
            match messages.get():
                case Join():
                    follower.join()
                case Hold() as message:
                    group.send(pipe, follower.hold(message))
                case Fill(number):
                    follower.fill(number)
                case Forward() as message:
                    if reason := follower.forward(message):
                        group.send(pipe, reason)
                        _wait_for_failure(messages)
                case Drop(number):
                    follower.drop(number)


def _wait_for_failure(messages: queue.SimpleQueue[Any]) -> None:
    """The same call fails on all ranks. If only this one failed, the others wait for it in vain."""
    try:
        message = messages.get(timeout=group.PATIENCE_S)
    except queue.Empty:
        message = None
    if not isinstance(message, Failed):
        os._exit(1)


def _read(pipe: Connection[Any, Any], messages: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            messages.put(group.receive(pipe))
    except (EOFError, OSError):
        os._exit(0)  # the worker is gone; the other thread may be waiting for it
    except BaseException:  # a message that cannot be read: without it the worker would wait for this rank for ever
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))

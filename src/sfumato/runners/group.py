"""The processes that compute one forward pass together: this one, of rank 0, and a follower for each further device.

Commands go to each follower over a pipe that only it has, tensors by torch.distributed. Everything is sent under one
lock, so all ranks take part in the same collectives in the same order. Diffusers' own hooks divide the sequence and
put it together again (`ModelMixin.enable_parallelism`). Nothing works without all members: a follower's death ends this
process, and this process's death is end-of-file for the followers, which end then.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import pickle
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

log = logging.getLogger(__name__)

FOLLOWER = "sfumato.runners.follower"

MESH = ("ring", "ulysses")
"""Names of the mesh's dimensions, as diffusers has them."""

RING = 1
"""Devices of ring attention: PyTorch's own attention, diffusers' default, does not offer it. Ulysses it does."""


PATIENCE_S = 20.0
"""How long the ranks may take to fail at the same call."""


class Refused(Exception):
    """Why a module cannot be computed by the group; the followers are as they were."""


# Messages to a follower. It answers `Begin` and `Hold` with a reason against it, empty if there is none, and a forward
# pass that failed.


@dataclass(frozen=True, slots=True)
class Begin:
    """The first one: whether it can use its device."""

    rank: int
    devices: tuple[str, ...]
    store: str
    """A file through which the members find each other."""
    threads: int


@dataclass(frozen=True, slots=True)
class Hold:
    """Make room for a module."""

    number: int
    module: bytes
    """A pickle of the module without its values."""


@dataclass(frozen=True, slots=True)
class Join:
    """All can use their devices: meet."""


@dataclass(frozen=True, slots=True)
class Fill:
    """All have room: take the values, one tensor after another."""

    number: int


@dataclass(frozen=True, slots=True)
class Forward:
    number: int
    arguments: Any
    """`(args, kwargs)`, with an `Outline` in the place of each tensor that is broadcast."""


@dataclass(frozen=True, slots=True)
class Failed:
    """This forward pass raised here, as it must have there."""


@dataclass(frozen=True, slots=True)
class Drop:
    number: int


@dataclass(frozen=True, slots=True)
class Outline:
    shape: tuple[int, ...]
    dtype: torch.dtype


class Group:
    """The members of one worker. `start`, `hold` and `drop` may be called from another thread than `forward`."""

    def __init__(self, devices: Sequence[str]) -> None:
        """`devices`: of rank 0 first."""
        self.devices = tuple(devices)
        self._threads = torch.get_num_threads()
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection[Any, Any]] = []
        self._answers: list[queue.SimpleQueue[str]] = []
        self._mesh: Any = None
        self._problem = ""
        """Why the followers cannot start."""
        self._closing = threading.Event()
        self._folder = ""
        """Through a file in it the members find each other, also at the first collective of a kind."""

    @property
    def size(self) -> int:
        return len(self.devices)

    def hold(self, number: int, module: torch.nn.Module) -> torch.nn.Module:
        """A copy of the module's layers on the same tensors, whose forward pass is that of all. Raises Refused.

        The first one starts the followers, which takes as long as importing torch.
        """
        outline = _outlined(module)
        with self._lock:
            self._start()
            try:
                own: torch.nn.Module = divided(_copied(module), 0, self.devices, self._mesh)
            except ValueError as error:  # an attention backend that cannot, say
                raise Refused(str(error)) from error
            self._tell(Hold(number, outline))
            if reason := self._refusal():
                self._tell(Drop(number))
                raise Refused(reason)
            self._tell(Fill(number))
            for _, tensor in tensors(module):
                broadcast(tensor)
            return own

    def forward(self, number: int, divided: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of `hold`'s copy of this number."""
        sent: list[torch.Tensor] = []
        kind = torch.device(self.devices[0]).type

        def outline(value: torch.Tensor) -> Outline | torch.Tensor:
            if value.device.type != kind:
                return value.detach().clone()  # it travels with the message, without the rest of what it is a view of
            sent.append(value)
            return Outline(tuple(value.shape), value.dtype)

        arguments = pytree.tree_map_only(torch.Tensor, outline, (args, kwargs))
        with self._lock:
            self._tell(Forward(number, arguments))
            for tensor in sent:
                broadcast(tensor)
            try:
                return arrived(divided(*args, **kwargs))
            except Exception as error:
                self._tell(Failed())
                self._have_failed(error)
                raise

    def _have_failed(self, error: Exception) -> None:
        """The same call fails on all ranks. If it failed only here, the others wait for this one in vain."""
        for answers in self._answers:
            try:
                answers.get(timeout=PATIENCE_S)
            except queue.Empty:
                log.error("a forward pass failed on one of its devices only, and so this process ends: %r", error)
                self._end_process()

    def _end_process(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(1)

    def drop(self, number: int) -> None:
        """Free the memory that a module has with the followers."""
        with self._lock:
            if not self._closing.is_set():
                self._tell(Drop(number))

    def close(self) -> None:
        """End the followers; nothing is computed any more."""
        with self._lock:
            self._closing.set()
            self._problem = "the worker ends"
            for process in self._processes:
                process.kill()  # it keeps nothing, and may be waiting for this one
                process.wait()
            if self._mesh is not None:
                torch.distributed.destroy_process_group()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        if self._problem:
            raise Refused(self._problem)
        if self._mesh is not None:
            return
        self._folder = tempfile.mkdtemp(prefix="sfumato-group-")
        store = str(Path(self._folder) / "store")
        for rank in range(1, self.size):
            ours, theirs = Pipe()
            command = [sys.executable, "-m", FOLLOWER, str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            theirs.close()
            self._processes.append(process)
            log.info("process %d computes with this one, on %s", process.pid, self.devices[rank])
            send(ours, Begin(rank, self.devices, store, self._threads))
            answers = queue.SimpleQueue[str]()
            threading.Thread(target=self._read, args=(ours, answers, self.devices[rank]), daemon=True).start()
            self._pipes.append(ours)
            self._answers.append(answers)
        if problem := self._refusal():
            self._problem = problem
            raise Refused(problem)
        self._tell(Join())
        self._mesh = joined(0, self.devices, store)

    def _refusal(self) -> str:
        """Every follower's answer: the first reason; empty if there is none."""
        return next(filter(None, [answers.get() for answers in self._answers]), "")

    def _tell(self, message: object) -> None:
        for pipe in self._pipes:
            send(pipe, message)

    def _read(self, pipe: Connection[Any, Any], answers: queue.SimpleQueue[str], device: str) -> None:
        try:
            while True:
                answers.put(receive(pipe))
        except Exception as error:  # end-of-file, or an answer that cannot be read
            if self._closing.is_set():
                return
            log.error("the process that computes on %s has died, and so this one ends: %r", device, error)
            # This thread is the only one that can: the others may wait for that process inside of a kernel.
            self._end_process()


# What every rank does.


def send(pipe: Connection[Any, Any], message: object) -> None:
    """Its tensors go by value: `Connection.send` takes torch's pickler, which sends where they are in shared memory."""
    pipe.send_bytes(pickle.dumps(message))


def receive(pipe: Connection[Any, Any]) -> Any:
    return pickle.loads(pipe.recv_bytes())


def joined(rank: int, devices: Sequence[str], store: str) -> Any:
    """The mesh of all devices. Every rank waits here until all are there."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    # diffusers' hooks use a name of torch's collectives that a later torch will not have.
    warnings.filterwarnings("ignore", message=".*_functional_collectives", category=FutureWarning)
    kind = torch.device(devices[0]).type
    if kind == "cpu" and (loopback := [name for _, name in socket.if_nameindex() if name.startswith("lo")]):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])  # it would listen on the network
    # Through a file: a port would be open to every user of this machine.
    meeting: Any = {"init_method": f"file://{store}", "rank": rank, "world_size": len(devices)}
    dist.init_process_group(dist.get_default_backend_for_device(kind), **meeting)
    return init_device_mesh(kind, (RING, len(devices)), mesh_dim_names=MESH)


def divided(module: Any, rank: int, devices: Sequence[str], mesh: Any) -> Any:
    """`module`, each of whose forward passes takes all ranks from now on."""
    from diffusers import ContextParallelConfig
    from diffusers.models._modeling_parallel import ParallelConfig

    def resolved(config: ContextParallelConfig) -> ParallelConfig:
        whole = ParallelConfig(context_parallel_config=config)
        whole.setup(rank, len(devices), torch.device(devices[rank]), mesh=mesh)
        module._parallel_config = whole
        return whole

    # diffusers takes the accelerator with the rank's number, which may be another one, or none on a CPU.
    module._resolve_parallel_config = resolved
    try:
        module.enable_parallelism(config=ContextParallelConfig(ring_degree=RING, ulysses_degree=len(devices)))
    finally:
        del module._resolve_parallel_config
    return module


def broadcast(tensor: torch.Tensor) -> None:
    """Send a tensor of rank 0's, of any dtype, as bytes."""
    import torch.distributed as dist

    dist.broadcast(tensor.detach().contiguous().reshape(-1).view(torch.uint8), 0)


def received(outline: Outline, device: str) -> torch.Tensor:
    """The tensor that rank 0 broadcasts."""
    import torch.distributed as dist

    tensor = torch.empty(outline.shape, dtype=outline.dtype, device=device)
    dist.broadcast(tensor.reshape(-1).view(torch.uint8), 0)
    return tensor


def arrived(output: Any) -> Any:
    """The output with plain tensors: those of collectives are waited for when they are used."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return pytree.tree_map_only(AsyncCollectiveTensor, lambda tensor: tensor.wait(), output)


def tensors(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers in an order that all ranks have; those that are tied are there more than once."""
    parameters = module.named_parameters(remove_duplicate=False)
    return [*parameters, *module.named_buffers(remove_duplicate=False)]


def _copied(module: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(module, {id(tensor): tensor for _, tensor in tensors(module)})


def _outlined(module: torch.nn.Module) -> bytes:
    """The module without the values of its tensors. Raises Refused."""
    without = {id(tensor): _without_values(tensor) for _, tensor in tensors(module)}
    try:
        return pickle.dumps(copy.deepcopy(module, without))
    except Exception as error:  # whatever a part of it raises: the module can compute itself
        raise Refused(f"it cannot be sent to another process: {type(error).__name__}: {error}") from error


@functools.singledispatch
def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta")


@_without_values.register
def _(tensor: torch.nn.Parameter) -> torch.Tensor:
    return torch.nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)

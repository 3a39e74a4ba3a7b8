"""Long calls are computed part by part, with forward passes of others in between.

A VAE that decodes a large picture computes for as long as many denoising steps of small ones. So before a part of it
begins, its request may let others compute one forward pass. The same operations run in the same order, so the picture
is the same, bit for bit, as without the interruption. Tiles would change pixels where they meet.
"""

from __future__ import annotations

import contextvars
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import greenlet  # type: ignore[import-untyped]
import torch
from torch.nn.utils import parametrize

from sfumato.batching.divided_attention import DividedAttention
from sfumato.batching.outcomes import Reply

if TYPE_CHECKING:
    from sfumato.batching.calls import Call
    from sfumato.batching.task import Task

METHODS = frozenset({"encode", "decode"})
"""Methods whose calls may be long: those of a VAE."""

MOVED_OR_COMPILED = ("_hf_hook", "_diffusers_hook", "_orig_mod")
"""Attributes of modules whose weights accelerate or diffusers move, or that `torch.compile` has made."""

BeforePart: TypeAlias = Callable[[bool], None]
"""Called before a part of a module computes: whether it computes on the host, whose clock then says how long."""

SHORTEST_S = 0.1
"""Calls are not interrupted for others before they have computed this long: short ones are better ended, so that their
request can join the next forward pass."""

LISTEN_S = 1.0
"""If there are no others, a call is interrupted when there is news, and at least so often, for what has no sender."""

SHARE = 0.75
"""Part of a forward pass's time that a long call may compute before the next one; its parts cannot be divided."""


BESIDE = 4
"""A decode begins beside interrupted ones if each has so many times its latents. So of one VAE, all that are under way
hold at most a third more than the largest: 1/4 + 1/16 + ..."""


def latents_of(call: Call) -> int:
    """Elements that a decode decodes; 0 for other calls, whose sizes do not compare."""
    if call.method != "decode":
        return 0
    tensors = (value for value in (*call.args, *call.kwargs.values()) if isinstance(value, torch.Tensor))
    return max((each.numel() for each in tensors), default=0)


def may_begin(call: Call, long: Sequence[Task | SharedCall]) -> bool:
    """Whether a call may begin while those of `long` are interrupted."""
    if call.method not in METHODS:
        return True
    return all(0 < BESIDE * latents_of(call) <= each.latents for each in long)


def interruptible(module: Any, method: str) -> bool:
    """Whether a call of `method` of `module` can be computed part by part.

    Not where something else than the module's own code moves weights between its parts, or has compiled them; nor
    where weights are parametrized, as by `weight_norm`: torch does not copy such a layer.
    """
    if method not in METHODS or not isinstance(module, torch.nn.Module):
        return False
    return not any(
        any(hasattr(part, name) for name in MOVED_OR_COMPILED)
        or part._compiled_call_impl is not None
        or parametrize.is_parametrized(part)
        for part in module.modules()
    )


@contextmanager
def part_by_part(module: Any, before_part: BeforePart) -> Iterator[Any]:
    """A copy of `module` with the same weights; `before_part` is called here before each of its parts computes.

    A copy of each layer, because some VAEs keep a state on themselves or their layers during a call, and others may
    call them in between; and because a runner that is made of the module meanwhile would take the hooks for its own.
    """
    here, on_host = greenlet.getcurrent(), _on_host(module)
    own = _copied(module, {})
    divided = DividedAttention(lambda: before_part(on_host))

    def hook(part: Any, args: Any) -> None:
        if greenlet.getcurrent() is here:
            with divided.away():
                before_part(on_host)

    for part in _parts(own):
        part.register_forward_pre_hook(hook)
    with divided:
        yield own


def _copied(module: torch.nn.Module, copies: dict[int, torch.nn.Module]) -> torch.nn.Module:
    """The same layers in other objects, on the same tensors. `copies`: those that there are, by the id of the layer."""
    if id(module) not in copies:
        own = copies[id(module)] = copy.copy(module)
        values = {name: copy.copy(value) for name, value in vars(own).items() if isinstance(value, dict | list | set)}
        vars(own).update(values)
        for name, part in module._modules.items():
            own._modules[name] = None if part is None else _copied(part, copies)
    return copies[id(module)]


def _parts(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Its layers; on an accelerator, whose time the host does not see pass, its blocks."""
    if _on_host(module):
        return [part for part in module.modules() if next(part.children(), None) is None]
    return list(_blocks(module))


def _on_host(module: torch.nn.Module) -> bool:
    parameter = next(module.parameters(), None)
    return parameter is None or parameter.device.type == "cpu"


def _blocks(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Members of the outermost lists of modules."""
    for part in module.children():
        if isinstance(part, torch.nn.ModuleList | torch.nn.Sequential):
            yield from part
        else:
            yield from _blocks(part)


class Slices:
    """How long a long call may compute before others have their forward pass."""

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, news: Callable[[], bool] = lambda: False
    ) -> None:
        """`clock`: seconds. `news`: whether there is a request to begin or to cancel, or a picture to send."""
        self._clock = clock
        self._news = news
        self._forward_s = 0.0
        self._began = self._previous = 0.0
        self._owed_s = 0.0
        self._others = False

    def begin(self, others: bool) -> None:
        """A request, or a forward pass of several, begins to compute or goes on. `others`: there are other requests."""
        self._began = self._previous = self._clock()
        self._others = others

    def forward(self, began: float) -> None:
        """The latest forward pass of others began at that time and ends now."""
        self._forward_s = self._clock() - began
        self._owed_s -= self._forward_s

    def end(self) -> None:
        """A long call has been interrupted. A layer may have taken longer than it should: others compute as long."""
        self._owed_s = self._clock() - self._began

    @property
    def may_go_on(self) -> bool:
        """Whether others have computed for as long as the long call had."""
        return self._owed_s <= 0

    def now(self) -> float:
        return self._clock()

    def over(self, on_host: bool) -> bool:
        """Whether it has computed for long enough, before its next part. One like the one before must still fit."""
        if not on_host:
            return True
        now = self._clock()
        part, self._previous = now - self._previous, now
        if not self._others and self._news():
            return True
        allowed = max(SHORTEST_S, SHARE * self._forward_s) if self._others else LISTEN_S
        return now - self._began + part > allowed


class SharedCall(greenlet.greenlet):  # type: ignore[misc]
    """A long forward pass for several calls, in a greenlet of its own that can be interrupted."""

    def __init__(self, group: Sequence[Task], compute: Callable[[], Sequence[Reply] | None]) -> None:
        """`group`: whose calls it answers. `compute`: a reply for each, or None if it ran out of memory."""
        super().__init__()
        self.group = group
        self.replies: Sequence[Reply] | None = None
        self.latents = sum(latents_of(task.call) for task in group if task.call)
        self.went_on = 0
        self._compute: Callable[[], Sequence[Reply] | None] | None = compute
        self.gr_context = contextvars.copy_context()

    def run(self) -> None:
        assert self._compute
        compute, self._compute = self._compute, None  # it refers to this object
        self.replies = compute()

    def interrupt(self) -> None:
        """Called inside: others compute, then it goes on."""
        self.parent.switch()

    def end(self) -> None:
        """Nobody waits for it any more."""
        self.throw(greenlet.GreenletExit)

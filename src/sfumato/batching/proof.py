"""Prove by bit identity that the rows of a module's calls are independent; also works in half precision.

Comparing a batch with its members alone shows little in half precision: different shapes select different kernels,
which sum in a different order, and an error of one percent is lost in that rounding. With *equal* shapes the same
kernels run, and the computation of a row does not depend on the contents of the other rows. So no tolerance is
needed as long as shapes stay the same, and four tests decide about a batch of members:

1. **Neighbours.** Everything that belongs to the other members is replaced by contents of the same shape that are as
   different as possible. A member's rows must not change by a single bit. This detects statistics over the batch,
   scales of a whole tensor, and values read from the first row for all, even if the tested members happen to
   agree in them.
2. **Places.** Every member moves to the place of its neighbour. Its rows must not change. This detects modules that
   split the batch by position (perturbed-attention guidance), and values of the first member that are used for all.
3. **Padding and conversion.** If texts were padded, the padding is filled with noise; if time steps were converted,
   a member alone is computed with and without conversion. The result must not change: else masked values are read.
4. **Alone.** A member's rows must equal what it gets alone, except for rounding, as shapes differ here. The allowance
   is measured on the module: it runs once more while the result of every layer is moved up or down at random by one
   unit in the last place. Kernels cannot differ by more: they accumulate in 32 bits and round once. This detects
   dependence on the number of rows, or on the amount of padding.

**The floor.** Some devices choose kernels by position or sum in no fixed order. This is measured before
a difference counts against the module: the same call twice (for 1 and 3) and copies of one member in all
places (for 2) then differ as well. Only if they do, differences up to that of 4 are allowed, and only
if the copies themselves stay within it, or else the module depends on position. In full precision
this allowance always applies: it is a thousand times smaller than any real error.

The contents of a mask may select the kernel (a mask without gaps is often dropped), so if a member changes only with
its neighbours' masks, that same allowance applies. Integers that are zero in every row are not varied, as the table
they index may have a single entry. What members share is not tested: the key of a call already makes sure that they
agree in it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from sfumato.batching import outputs, torch_state
from sfumato.batching.calls import Call, Leaf, compute, lead, original_module, target

Join: TypeAlias = Callable[[Sequence[Call]], dict[str, Any]]
"""Makes the keyword arguments of one forward pass for several calls."""

SHARED = frozenset({"equal", "value", "each", "adapters"})
"""Kinds of leaves in which members must agree; every other kind has contents of its member."""

TOLERANCE = 1e-3
"""Allowed error between a batch and its members alone in full precision, relative to the output's largest value.
Rounding gives 1e-6, a mixed-up row 1e-2 and more."""

HALF_UNITS = 1
"""Units in the last place by which each layer is moved in half precision: sums accumulate in 32 bits, rounded once."""

FULL_UNITS = 16
"""The same in full precision, where a sum of K products in another order differs by up to about sqrt(K) units."""

TF32 = 2.0**-10
"""A unit in the last place where a GPU may multiply 32-bit numbers with ten bits."""

HALVES = frozenset({torch.float16, torch.bfloat16})


@dataclass(slots=True)
class Evidence:
    """Results of the forward passes of a whole batch; comparing its parts with the members alone remains."""

    parts: list[Any]
    """The batch's output, one part per member."""
    refused: str = ""
    """Why its rows are not independent; empty if nothing was found."""
    rounding: list[float] = field(default_factory=list)
    """Per member: allowed difference from itself alone, relative to its output's largest value."""
    forwards: int = 0
    """Number of forward passes computed."""

    def judge(self, errors: Sequence[float]) -> str:
        """Why the calls may not be batched, given each part's difference from its member alone; else empty."""
        if self.refused:
            return self.refused
        for error, allowed in zip(errors, self.rounding, strict=True):
            if not error <= allowed:
                return f"differs from the call alone by {error:.1e}, rounding explains only {allowed:.1e}"
        return ""


def prove(calls: Sequence[Call], join: Join) -> str:
    """Why `calls` (of one module, with equal keys, at least two) may not be joined by `join`; empty if they may.

    The whole proof, including the members alone. Lets the module's exceptions through.
    """
    evidence = examine(calls, join)
    alone = [] if evidence.refused else [call.run() for call in calls]
    return evidence.judge([outputs.difference(part, one) for part, one in zip(evidence.parts, alone, strict=False)])


def examine(calls: Sequence[Call], join: Join) -> Evidence:
    """The proof without the comparison with the members alone.

    Raises what the module raises for the unchanged batch, and `outputs.Unsplittable`.
    """
    batch = _Batch(list(calls), join)
    batch.parts = batch.run(batch.calls)
    batch.rounding = batch.differences(batch.run(batch.calls, within=_with_layer_noise(batch.module, batch.half)))
    reason = next(
        (reason for question in (_neighbours, _places, _padding, _conversion) if (reason := question(batch))), ""
    )
    allowed = batch.rounding if batch.half else [max(one, TOLERANCE) for one in batch.rounding]
    return Evidence(batch.parts, reason, allowed, batch.forwards)


def is_half(call: Call) -> bool:
    """Whether a call computes in less than 32 bits, where rounding hides errors."""
    for leaf in call.leaves:
        value = leaf.value[0] if leaf.kind == "list" else leaf.value
        if isinstance(value, torch.Tensor) and value.dtype in HALVES:
            return True
    parameter = next(call.module.parameters(), None)
    # Anything below full precision: int8 and fp8 weights round as well.
    return parameter is not None and parameter.dtype not in (torch.float32, torch.float64)


class _Batch:
    """Some calls, how to compute them together, and the result."""

    def __init__(self, calls: list[Call], join: Join) -> None:
        self.calls = calls
        self.module = lead(calls).module
        self.half = is_half(calls[0])
        self.parts: list[Any] = []
        self.rounding: list[float] = []
        self.forwards = 0
        self._join = join
        self._repeats: float | None = None

    def run(
        self,
        calls: Sequence[Call],
        change: Callable[[dict[str, Any]], None] = lambda arguments: None,
        within: AbstractContextManager[Any] | None = None,
    ) -> list[Any]:
        """One forward pass for `calls`, split into their parts; `change` modifies the joined arguments first."""
        arguments = self._join(calls)
        change(arguments)
        # Layers inside a compiled module do not call their hooks.
        module = original_module(self.module) if within else self.module
        # Random numbers are the same each time, so only the rows can differ.
        random = torch_state.random()
        torch.manual_seed(0)
        try:
            with within or nullcontext():
                if module is self.module:
                    output = compute(calls, (), arguments)
                else:
                    output = target(module, calls[0].method)(**arguments)
        finally:
            torch_state.set_random(random)
        self.forwards += 1
        return outputs.split(output, [call.rows for call in calls], listed=calls[0].listed)

    def differences(self, parts: Sequence[Any]) -> list[float]:
        """Differences of `parts` from those of the unchanged batch."""
        return [outputs.difference(part, before) for part, before in zip(parts, self.parts, strict=True)]

    def unchanged(self, differences: Mapping[int, float], control: Callable[[], float]) -> bool:
        """Whether members did not change; `control` measures the difference that the device itself causes."""
        if not any(differences.values()):
            return True
        if self.half and not control():
            return False
        return self.within(differences)

    def within(self, differences: Mapping[int, float]) -> bool:
        """Whether rounding explains the differences."""
        return all(difference <= self.rounding[member] for member, difference in differences.items())

    def repeats(self) -> float:
        """Difference between two runs of the same call."""
        if self._repeats is None:
            self._repeats = max(self.differences(self.run(self.calls)))
        return self._repeats


def _neighbours(batch: _Batch) -> str:
    changes = _with_neighbours_changed(batch, masks=True)
    if batch.unchanged(changes, batch.repeats):
        return ""
    if batch.repeats() > max(batch.rounding):
        return f"the same call twice differs by {batch.repeats():.1e}"
    if batch.within(changes) and any(_is_mask(leaf) for call in batch.calls for leaf in call.leaves):
        changes = _with_neighbours_changed(batch, masks=False)
        if batch.unchanged(changes, batch.repeats):
            return ""
    return f"a row changes with the rows beside it, by {max(changes.values()):.1e}"


def _with_neighbours_changed(batch: _Batch, *, masks: bool) -> dict[int, float]:
    """Member → its change when every other member changes, in two forward passes."""
    changes: dict[int, float] = {}
    for side in (0, 1):
        mixed = [call if place % 2 == side else _changed(call, masks=masks) for place, call in enumerate(batch.calls)]
        differences = batch.differences(batch.run(mixed))
        changes |= {place: differences[place] for place in range(side, len(mixed), 2)}
    return changes


def _places(batch: _Batch) -> str:
    moved = batch.run([*batch.calls[1:], batch.calls[0]])
    changes = dict(enumerate(batch.differences([moved[-1], *moved[:-1]])))
    if not any(changes.values()):
        return ""

    def copies() -> float:
        """Difference between copies of one member in all places of the batch."""
        largest = max(batch.calls, key=_size)
        parts = batch.run([largest] * len(batch.calls))
        return max(outputs.difference(part, parts[0]) for part in parts)

    if batch.unchanged(changes, copies):
        return ""
    return f"a row changes with its place in the batch, by {max(changes.values()):.1e}"


def _padding(batch: _Batch) -> str:
    if not any(_lengths(batch.calls, at) for at in range(len(batch.calls[0].leaves))):
        return ""

    def fill(arguments: dict[str, Any]) -> None:
        for at, leaf in enumerate(batch.calls[0].leaves):
            if _lengths(batch.calls, at):
                joined = _at(arguments, leaf.path)
                _fill(joined, [call.leaves[at].value for call in batch.calls])

    changes = dict(enumerate(batch.differences(batch.run(batch.calls, fill))))
    if batch.unchanged(changes, batch.repeats):
        return ""
    return f"a row changes with what is in its padding, by {max(changes.values()):.1e}"


def _conversion(batch: _Batch) -> str:
    for at, leaf in enumerate(batch.calls[0].leaves):
        if leaf.kind != "time":
            continue
        one_of_each = {call.leaves[at].value.dtype: (member, call) for member, call in enumerate(batch.calls)}
        for member, call in one_of_each.values() if len(one_of_each) > 1 else ():
            wide = dataclasses.replace(call.leaves[at], value=call.leaves[at].value.float())
            converted = dataclasses.replace(call, leaves=[*call.leaves[:at], wide, *call.leaves[at + 1 :]])
            (before,), (after,) = batch.run([call]), batch.run([converted])
            changes = {member: outputs.difference(after, before)}
            if not batch.unchanged(changes, batch.repeats):
                return f"a row changes when its time step becomes a 32-bit number, by {max(changes.values()):.1e}"
    return ""


def _lengths(calls: Sequence[Call], at: int) -> bool:
    """Whether a leaf is padded in this batch."""
    return calls[0].leaves[at].kind == "ragged" and len({call.leaves[at].value.shape[1] for call in calls}) > 1


def _fill(joined: torch.Tensor, values: Sequence[torch.Tensor]) -> None:
    """Write noise into the padding of `joined` [rows, tokens, ...]."""
    noise = torch.randn(joined.shape, generator=torch.Generator().manual_seed(0)).to(joined.device, joined.dtype)
    # Noise not scaled by the text: without guidance that may be zeros, as padding is.
    noise *= max(value.abs().amax() for value in values if value.numel())
    start = 0
    for value in values:
        rows, length = value.shape[:2]
        joined[start : start + rows, length:] = noise[start : start + rows, length:]
        start += rows


def _at(arguments: Any, path: str) -> Any:
    for name in path.split("."):
        arguments = arguments[name] if isinstance(arguments, dict) else arguments[int(name)]
    return arguments


def _size(call: Call) -> int:
    """Number of elements that belong to a member, to find the one with the longest text."""
    contents = (leaf.value for leaf in call.leaves if leaf.kind not in SHARED)
    tensors = itertools.chain.from_iterable(value if type(value) is list else [value] for value in contents)
    return sum(tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor)) // max(1, call.rows)


def _changed(call: Call, *, masks: bool) -> Call:
    """The same call with all its own contents replaced; with `masks=False` its masks stay."""
    return dataclasses.replace(
        call,
        leaves=[
            leaf
            if leaf.kind in SHARED or (not masks and _is_mask(leaf))
            else dataclasses.replace(leaf, value=_different_contents(leaf.value))
            for leaf in call.leaves
        ],
    )


def _is_mask(leaf: Leaf) -> bool:
    value = leaf.value
    if not isinstance(value, torch.Tensor) or not value.numel() or value.is_complex():
        return False
    if leaf.kind == "mask" or value.dtype == torch.bool:
        return True
    return value.dim() == 2 and bool(((value == 0) | (value == 1)).all())


def _different_contents(value: Any) -> Any:
    """Contents of the same shape as `value` that are as different as is safe.

    Integers may be table indices or positions, and one out of range crashes a process on a GPU: they are
    only permuted, or set to zero.
    """
    if type(value) is list:
        return [_different_contents(item) for item in value]
    if not isinstance(value, torch.Tensor) or not value.numel():
        return value
    if _is_whole(value):
        return next((other for other in _alternatives(value) if not torch.equal(other, value)), value)
    if value.dim() == 1:
        return value / 2
    # Changes the mean, the spread and the maximum, and leaves no row of zeros.
    return -2 * value.flip(tuple(range(1, value.dim()))) + value.abs().mean()


def _is_whole(value: torch.Tensor) -> bool:
    if value.is_complex():
        return False
    return not value.is_floating_point() or bool((value == value.round()).all())


def _alternatives(value: torch.Tensor) -> Iterator[torch.Tensor]:
    if value.dim() > 1:
        yield value.flip(1)
        half = value.clone()
        half[:, value.shape[1] // 2 :] = 0
        yield half
    yield torch.zeros_like(value)
    if value.dtype == torch.bool:
        yield ~value
    if value.is_floating_point():
        yield torch.full_like(value, 0.5)  # still zero if it is used as a table index


@contextmanager
def _with_layer_noise(module: torch.nn.Module, half: bool) -> Iterator[None]:
    """Inside the context, the result of every layer is moved up or down at random by some units in the last place."""
    units = HALF_UNITS if half else FULL_UNITS
    generators: dict[torch.device, torch.Generator] = {}

    def disturb(value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(disturb(item) for item in value)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype.itemsize < 2:
            return value
        if value.device not in generators:
            generators[value.device] = torch.Generator(value.device).manual_seed(0)
        by = units * _unit(value)
        # This is the peak of memory use; a large batch must not fail because of its proof.
        bits = torch.randint(2, value.shape, generator=generators[value.device], device=value.device, dtype=torch.uint8)
        return bits.to(value.dtype).mul_(2 * by).add_(1 - by).mul_(value)

    layers = [part for part in original_module(module).modules() if next(part.children(), None) is None]
    hooks = [layer.register_forward_hook(lambda _module, _inputs, output: disturb(output)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _unit(value: torch.Tensor) -> float:
    short = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return TF32 if short and value.is_cuda and value.dtype == torch.float32 else torch.finfo(value.dtype).eps

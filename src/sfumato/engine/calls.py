"""The rule: which calls of one module may share a forward, and how their arguments are joined.

A call is flattened to leaves: the tensors and plain values among its arguments, each with the name it
goes by. The first tensor (or list of tensors) gives the number of rows n, and every leaf is one of

    rows    first dimension n: joined end to end; the other dimensions have to agree
    time    a time step, one for all rows or one per row: becomes one per row
    equal   positions, rotary tables and other small tensors: the content has to agree
    list    a list with one tensor per row: joined
    ragged  text of different lengths that comes with a mask: padded on the right, masked there
    each    a list with one plain value per row, all the same: repeated
    value   anything plain: has to agree

What fits none of these (a random generator, a cache object, a callable, a large tensor of another
layout) makes the call run alone. Shapes do not tell everything; the tables below hold what they do not,
and `trust` has the last word: nothing is joined that was not shown to give the same numbers.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sfumato.engine.joins import Joins
from sfumato.engine.outputs import PLAIN

TIME = frozenset({
    "timestep", "timesteps", "t", "timestep_r", "r_timestep", "timestep_ratio", "audio_timestep", "sigma",
    "audio_sigma", "decoder_noise_time",
})  # fmt: skip
"""Names of time steps: the only arguments for which one value means the same value for every row."""

EQUAL = frozenset({
    # Of [n, tokens, 3] the model reads the first row only.
    "img_ids", "txt_ids",
    # Tables of sines and cosines by position, shared by all rows.
    "image_rotary_emb", "rotary_embedding", "visual_rope_pos", "text_rope_pos", "freqs_cis",
})  # fmt: skip
"""Names of tensors that belong to all rows at once, also where the first dimension happens to be n."""

EACH = frozenset({"img_shapes", "txt_seq_lens"})
"""Names of lists with one plain value per row, of which the model reads the first: all have to be the same."""

FRAMES = frozenset({"encoder_hidden_states", "down_block_additional_residuals", "mid_block_additional_residual"})
"""Names of tensors that have rows × frames first where the sample is a video of n rows."""

ROWS_SECOND = frozenset({"encoder_hidden_states_llama3"})
"""Names of tensors with the layers of a text encoder first and the rows second."""

RAGGED: Mapping[str, tuple[str, str]] = {
    "QwenImageTransformer2DModel": ("encoder_hidden_states", "encoder_hidden_states_mask"),
}
"""Modules that mask every token of their text: the names of the text and of its mask (none means all true)."""

LARGEST_EQUAL = 4 << 20
"""Elements. A larger tensor that is not rows first is not compared by content; the call runs alone."""


@dataclass(slots=True)
class Leaf:
    """One tensor or plain value among the arguments."""

    path: str
    kind: str
    value: Any
    key: Any
    """What has to agree with the other members."""
    exact: Any = None
    """What may differ, at the price of a conversion or of padding."""


@dataclass(slots=True)
class Call:
    """One call of one method of one module, described so that others can be recognised as its like."""

    module: Any
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    """What the pipeline calls the module: `unet`, `vae`."""
    rows: int = 1
    leaves: list[Leaf] = field(default_factory=list)
    shape: Any = None
    """How the leaves are nested."""
    key: Any = None
    """Calls with equal keys may share a forward; None: this one runs alone, for the reason `alone`."""
    exact: Any = None
    """Calls that also agree in this need neither conversion nor padding."""
    alone: str = ""
    listed: bool = False

    def run(self) -> Any:
        """Compute it as the pipeline asked for it."""
        return target(self.module, self.method)(*self.args, **self.kwargs)

    def signature(self, *, loose: bool) -> str:
        """The key without sizes and contents, as text: what trust is about. `loose`: members differ in `exact`."""
        names = " ".join(f"{leaf.path}={_kind(leaf)}" for leaf in self.leaves)
        return f"{self.method}({names}){'~' if loose else ''}"


def target(module: Any, method: str) -> Callable[..., Any]:
    """What to call: a module is called itself, so that its hooks run."""
    return module if method == "__call__" else getattr(module, method)  # type: ignore[no-any-return]


def plain(module: Any) -> Any:
    """The module that was written, where this one is what `torch.compile` made of it."""
    return getattr(module, "_orig_mod", module)


class Fingerprints:
    """The content of small tensors as a digest, taken once per tensor object.

    On a GPU a digest waits for the device, so it is kept as long as the tensor lives and is not written to.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int, bytes]] = {}

    def clear(self) -> None:
        self._known.clear()

    def of(self, tensor: torch.Tensor) -> bytes:
        if tensor.is_inference():  # made in inference mode: nothing tells whether it was written to
            return _digest(tensor)
        known = self._known.get(id(tensor))
        if known and known[0]() is tensor and known[1] == tensor._version:
            return known[2]
        digest = _digest(tensor)
        number = id(tensor)
        gone = weakref.ref(tensor, lambda _: self._known.pop(number, None))
        self._known[number] = (gone, tensor._version, digest)
        return digest


def describe(
    module: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], prints: Fingerprints, name: str = ""
) -> Call:
    """Describe a call of `module` (an nn.Module; `method` is `__call__`, `forward`, `encode` ...)."""
    call = Call(module, method, args, kwargs, name)
    try:
        _describe(call, prints)
    except _Alone as reason:
        call.key, call.alone = None, str(reason)
    return call


def join(calls: Sequence[Call], joins: Joins) -> dict[str, Any]:
    """The keyword arguments of one forward for all of `calls`, whose keys are equal."""
    joined: list[Any] = []
    for at, leaf in enumerate(calls[0].leaves):
        joined.append(_JOIN[leaf.kind]([call.leaves[at] for call in calls], calls, joins))
    arguments: dict[str, Any] = _rebuilt(calls[0].shape, iter(joined))
    if masked := RAGGED.get(type(plain(calls[0].module)).__name__):
        _mask(arguments, masked, calls)
    return arguments


class _Alone(Exception):
    """Why a call cannot be joined with any other."""


def _describe(call: Call, prints: Fingerprints) -> None:
    function = getattr(type(plain(call.module)), "forward" if call.method == "__call__" else call.method, None)
    if function is None:
        raise _Alone("the class does not define this method")
    parameters = _signature(function)
    try:
        arguments = dict(parameters.bind(None, *call.args, **call.kwargs).arguments)
    except TypeError:
        raise _Alone("the arguments do not fit; the module will say so") from None
    for name, parameter in list(parameters.parameters.items()):
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL and arguments.pop(name, ()):
            raise _Alone("unnamed arguments")
    arguments.pop(next(iter(parameters.parameters)))  # self
    for name in [name for name, value in arguments.items() if isinstance(value, torch.Generator)]:
        if _reads(function, name):
            raise _Alone("draws its own random numbers")
        del arguments[name]
    if masked := RAGGED.get(type(plain(call.module)).__name__):
        arguments.setdefault(masked[1], None)
    first, call.rows, call.listed = _rows(arguments)
    reader = _Reader(call, first, prints)
    call.shape = reader.read(arguments, "", "")
    call.key = (id(call.module), call.method, call.shape, tuple([(leaf.kind, leaf.key) for leaf in call.leaves]))
    call.exact = tuple([leaf.exact for leaf in call.leaves])


def _rows(arguments: Mapping[str, Any]) -> tuple[Any, int, bool]:
    for value in arguments.values():
        if isinstance(value, torch.Tensor) and value.dim():
            return value, value.shape[0], False
        if type(value) is list and value and all(isinstance(item, torch.Tensor) for item in value):
            return value, len(value), True
    raise _Alone("no tensor to read the number of rows from")


class _Reader:
    """Walks the arguments of one call, classifying every leaf."""

    def __init__(self, call: Call, first: Any, prints: Fingerprints) -> None:
        self.call = call
        self.rows = call.rows
        self.prints = prints
        self.ragged = RAGGED.get(type(plain(call.module)).__name__, ("", ""))
        video = isinstance(first, torch.Tensor) and first.dim() == 5
        self.frames = {first.shape[1], first.shape[2]} if video else set()

    def read(self, value: Any, name: str, path: str) -> Any:
        """The nesting of `value`; its leaves are added to the call."""
        if type(value) is dict:
            inner = [self.read(item, str(key), f"{path}.{key}" if path else str(key)) for key, item in value.items()]
            return ("dict", tuple(value), tuple(inner))
        if type(value) is list and name in EACH:
            return self._leaf(path, "each", value, self._same(value))
        if type(value) is list and self._is_row_list(value):
            tails = {tuple(item.shape[1:]) for item in value}
            kinds = {(item.dtype, item.device) for item in value}
            if len(tails) > 1 or len(kinds) > 1:
                raise _Alone(f"{path}: a list of unlike tensors")
            lengths = tuple(sorted({item.shape[:1] for item in value}))
            return self._leaf(path, "list", value, (tails.pop(), kinds.pop()), lengths)
        if type(value) in (list, tuple):
            inner = [self.read(item, name, f"{path}.{at}") for at, item in enumerate(value)]
            return (type(value).__name__, (), tuple(inner))
        if isinstance(value, torch.Tensor):
            return self._tensor(value, name, path)
        if name in self.ragged[1:]:
            return self._leaf(path, "mask", value, None, value is None)
        if name in TIME and isinstance(value, int | float) and not isinstance(value, bool):
            return self._time(torch.tensor([value]), path)
        if isinstance(value, PLAIN):
            return self._leaf(path, "value", value, (type(value), value))
        raise _Alone(f"{path}: a {type(value).__name__}")

    def _tensor(self, value: torch.Tensor, name: str, path: str) -> Any:
        if value.requires_grad:
            raise _Alone(f"{path}: needs gradients")
        if name in TIME and value.numel() == 1:
            return self._time(value.reshape(1), path)
        leads = value.shape[0] if value.dim() else 0
        kind = (value.dtype, value.device)
        if name in self.ragged and leads == self.rows and value.dim() >= 2:
            role = "ragged" if name == self.ragged[0] else "mask"
            return self._leaf(path, role, value, None if role == "mask" else (value.shape[2:], kind), value.shape[1])
        if name in TIME and leads == self.rows and value.dim() == 1:
            return self._leaf(path, "time", value, value.device, value.dtype)
        if name in ROWS_SECOND and value.dim() > 1 and value.shape[1] == self.rows:
            return self._leaf(path, "second", value, (leads, value.shape[2:], kind))
        if name not in EQUAL and leads:
            if leads == self.rows:
                return self._leaf(path, "rows", value, (value.shape[1:], kind))
            if name in FRAMES and leads % self.rows == 0 and leads // self.rows in self.frames:
                return self._leaf(path, "frames", value, (leads // self.rows, value.shape[1:], kind))
        if value.numel() > LARGEST_EQUAL:
            raise _Alone(f"{path}: a large tensor of shape {tuple(value.shape)} for {self.rows} rows")
        return self._leaf(path, "equal", value, (value.shape, kind, self.prints.of(value)))

    def _time(self, value: torch.Tensor, path: str) -> Any:
        return self._leaf(path, "time", value.expand(self.rows), value.device, value.dtype)

    def _same(self, values: list[Any]) -> Any:
        if len(values) != self.rows or any(value != values[0] for value in values[1:]):
            raise _Alone("a list that is not one equal value per row")
        return repr(values[0])

    def _is_row_list(self, value: list[Any]) -> bool:
        return self.call.listed and len(value) == self.rows and all(isinstance(item, torch.Tensor) for item in value)

    def _leaf(self, path: str, kind: str, value: Any, key: Any, exact: Any = None) -> str:
        self.call.leaves.append(Leaf(path, kind, value, key, exact))
        return "leaf"


def _cat(leaves: list[Leaf], calls: Sequence[Call], joins: Joins) -> torch.Tensor:
    return joins.cat([leaf.value for leaf in leaves])


def _cat_second(leaves: list[Leaf], calls: Sequence[Call], joins: Joins) -> torch.Tensor:
    return joins.cat([leaf.value for leaf in leaves], dim=1)


def _cat_time(leaves: list[Leaf], calls: Sequence[Call], joins: Joins) -> torch.Tensor:
    # Some schedulers count in int64, some in float32; an embedding of time computes in float32 anyway.
    values = [leaf.value for leaf in leaves]
    if len({value.dtype for value in values}) > 1:
        values = [value.float() for value in values]
    return torch.cat(values)


def _cat_ragged(leaves: list[Leaf], calls: Sequence[Call], joins: Joins) -> torch.Tensor:
    longest = max(leaf.value.shape[1] for leaf in leaves)
    return torch.cat([_padded(leaf.value, longest) for leaf in leaves])


def _cat_lists(leaves: list[Leaf], calls: Sequence[Call], joins: Joins) -> list[Any]:
    return [item for leaf in leaves for item in leaf.value]


def _first(leaves: list[Leaf], calls: Sequence[Call], joins: Joins) -> Any:
    return leaves[0].value


def _repeat(leaves: list[Leaf], calls: Sequence[Call], joins: Joins) -> list[Any]:
    return [leaves[0].value[0]] * sum(call.rows for call in calls)


_JOIN: Mapping[str, Callable[[list[Leaf], Sequence[Call], Joins], Any]] = {
    "rows": _cat,
    "frames": _cat,
    "second": _cat_second,
    "time": _cat_time,
    "ragged": _cat_ragged,
    "list": _cat_lists,
    "each": _repeat,
    "equal": _first,
    "value": _first,
    "mask": _first,  # written by `_mask`, which knows the text it belongs to
}


def _mask(arguments: dict[str, Any], names: tuple[str, str], calls: Sequence[Call]) -> None:
    pairs = []
    for call in calls:
        by_path = {leaf.path: leaf.value for leaf in call.leaves}
        pairs.append((by_path[names[0]], by_path[names[1]]))
    longest = max(text.shape[1] for text, _ in pairs)
    if all(mask is None and text.shape[1] == longest for text, mask in pairs):
        return
    masks = [torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if m is None else m for text, m in pairs]
    arguments[names[1]] = torch.cat([_padded(mask.bool(), longest) for mask in masks])


def _padded(value: torch.Tensor, length: int) -> torch.Tensor:
    """`value` [n, tokens, ...] with zeros up to `length` tokens."""
    missing = length - value.shape[1]
    return value if not missing else torch.cat([value, value.new_zeros(len(value), missing, *value.shape[2:])], 1)


def _rebuilt(shape: Any, leaves: Iterator[Any]) -> Any:
    if shape == "leaf":
        return next(leaves)
    kind, keys, inner = shape
    values = [_rebuilt(item, leaves) for item in inner]
    return dict(zip(keys, values, strict=True)) if kind == "dict" else (list if kind == "list" else tuple)(values)


def _kind(leaf: Leaf) -> str:
    if leaf.kind == "value":
        plain = leaf.value
        return str(plain) if plain is None or isinstance(plain, bool) else type(plain).__name__
    return f"{leaf.kind}{leaf.value.dim()}" if leaf.kind in ("rows", "frames", "equal", "second") else leaf.kind


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


@functools.cache
def _reads(function: Callable[..., Any], name: str) -> bool:
    """Whether the body of `function` uses its parameter `name`; many VAEs take a generator and never look at it."""
    code = inspect.unwrap(function).__code__
    if name in code.co_cellvars or (code.co_flags & inspect.CO_VARKEYWORDS and name not in code.co_varnames):
        return True
    return any(
        step.opname.startswith("LOAD")
        and (step.argval == name or (isinstance(step.argval, tuple) and name in step.argval))
        for step in dis.get_instructions(code)
    )


def _digest(tensor: torch.Tensor) -> bytes:
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    raw = plain.detach().resolve_conj().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(raw.data, digest_size=16).digest()

"""The batching rule: which calls of one module may share a forward pass, and how their arguments are joined.

A call is flattened to leaves: the tensors and plain values among its arguments, each with its
name. The first tensor (or list of tensors) gives the number of rows n, and every leaf is one of

    rows    first dimension n: concatenated; the other dimensions must agree
    time    a time step, one for all rows or one per row: expanded to one per row
    equal   positions, rotary tables and other small tensors: the contents must agree
    list    a list with one tensor per row: joined
    multi   several entries per row (frames, first and last picture): joined
    ragged  text with a mask, or that could have one: padded on the right and masked there (see `text_masks`)
    each    a list with one plain value per row, all equal: repeated
    value   any other plain value: must agree

An argument passed with its default value counts as absent.

Anything else (a random generator, a cache object, a callable, a large tensor of another
layout) makes the call run alone. Shapes do not reveal everything; the tables below add the rest,
and `verification` has the last word: only calls shown to give the same numbers are batched.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch

from sfumato.batching import text_masks
from sfumato.batching.adapted import Selection
from sfumato.batching.adapted import target as target
from sfumato.batching.fingerprints import Fingerprints as Fingerprints
from sfumato.batching.module_runner import ModuleRunner
from sfumato.batching.outputs import PLAIN
from sfumato.batching.reasons import Reason
from sfumato.pipelines import generators

TIME = frozenset({
    "timestep", "timesteps", "t", "timestep_r", "r_timestep", "timestep_ratio", "audio_timestep", "sigma",
    "audio_sigma", "decoder_noise_time",
})  # fmt: skip
"""Names of time steps: the only arguments where one value applies to every row."""

EQUAL = frozenset({
    # The model reads only the first row of [n, tokens, 3].
    "img_ids", "txt_ids",
    # Tables of sines and cosines by position, shared by all rows.
    "image_rotary_emb", "rotary_embedding", "visual_rope_pos", "text_rope_pos", "freqs_cis",
    # [1, 1, height, width]: the padding of the picture, for any number of rows.
    "padding_mask",
})  # fmt: skip
"""Names of tensors that belong to all rows at once, even if the first dimension happens to be n."""

EACH = frozenset({"img_shapes", "txt_seq_lens"})
"""Names of lists with one plain value per row of which the model reads only the first: all must be equal."""

CONTENT = re.compile(r"hidden_states|embeds|residual")
"""Names of tensors with contents per row. If their first dimension is a multiple of the rows (frames of a video, two
pictures of a request), each row has several entries; other tensors of such a shape belong to all rows."""

ROWS_SECOND = frozenset({"encoder_hidden_states_llama3"})
"""Names of tensors with the layers of a text encoder first and the rows second."""

LARGEST_EQUAL = 4 << 20
"""In elements. A larger tensor without rows first is not compared by content; the call runs alone."""

DIFFERENCES: Mapping[str, str] = {
    "time": "time", "list": "lengths", "ragged": "text", "mask": "text", "adapters": "adapters",
}  # fmt: skip
"""Permitted differences between members, by kind of leaf: time steps of two dtypes are converted, lists may differ in
length, text is padded, rows have adapters of their own."""


@dataclass(slots=True)
class Leaf:
    """One tensor or plain value among the arguments."""

    path: str
    kind: str
    value: Any
    key: Any
    """Must agree with the other members."""
    exact: Any = None
    """May differ, at the price of a conversion or of padding."""


@dataclass(slots=True)
class Call:
    """One call of one method of one module, described so that compatible calls can be recognised."""

    module: Any
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    """The pipeline's name for the module: `unet`, `vae`."""
    rows: int = 1
    leaves: list[Leaf] = field(default_factory=list)
    shape: Any = None
    """How the leaves are nested."""
    key: Any = None
    """Calls with equal keys may share a forward pass; None: this one runs alone, for the reason `alone_because`."""
    exact: Any = None
    """Calls that also agree in this need neither conversion nor padding."""
    alone_because: str = ""
    reason: Reason = Reason.STRUCTURE
    """The reason as a category."""
    listed: bool = False
    pairs: Mapping[str, str] = field(default_factory=dict)
    """Name of each text that can be padded → name of its mask."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    selection: Selection | None = None
    """The adapters that act in it, if any are loaded for its module; `module` is then the one with these adapters."""
    runner: ModuleRunner | None = None
    """What computes it instead of the module; it shares forward passes with others of that runner only."""

    def run(self) -> Any:
        """Compute the call exactly as the pipeline made it."""
        return compute([self], self.args, self.kwargs)

    @property
    def is_adapted(self) -> bool:
        """Whether adapters of its own act in it."""
        return self.selection is not None and not self.selection.plain

    @property
    def differences(self) -> frozenset[str]:
        """Differences that members may have from this one; see `DIFFERENCES`."""
        return frozenset({DIFFERENCES[leaf.kind] for leaf in self.leaves if leaf.exact is not None})

    def key_within(self, differences: Set[str]) -> Hashable:
        """The key of calls that may differ from this one only in `differences`."""
        if self.differences <= differences:
            return (self.key,)
        return (
            self.key,
            tuple([None if DIFFERENCES.get(leaf.kind) in differences else leaf.exact for leaf in self.leaves]),
        )

    def signature(self, differences: Set[str] = frozenset()) -> str:
        """The structure of the arguments as text, without sizes and contents: the unit of verification.

        `differences`: what the members differ in. A list of similar tensors of any length is one word. Omitted are
        default values, numbers whose default is a number, None, and `return_dict`, which only decides the form of the
        output: the key compares their values, and they cannot make rows depend on each other.
        """
        words: dict[str, list[str]] = {}
        for leaf in self.leaves:
            if word := _signature_word(leaf, self.defaults, "text" in differences):
                kinds = words.setdefault(NUMBERED.sub(".*", leaf.path), [])
                if word not in kinds:
                    kinds.append(word)
        names = " ".join(f"{path}={'|'.join(kinds)}" for path, kinds in words.items())
        marks = [f"{what}:{self._layout}" if what == "adapters" else what for what in sorted(differences)]
        return f"{self.method}({names}){''.join(f'~{mark}' for mark in marks)}"

    @property
    def _layout(self) -> str:
        return self.selection.adapted.layout if self.selection else ""


NUMBERED = re.compile(r"\.\d+(?=\.|$)")
"""A list index, or a numeric key, in the path of a leaf."""


def differences_between(calls: Sequence[Call]) -> frozenset[str]:
    """Which of the permitted differences `DIFFERENCES` occur between `calls`, whose keys are equal."""
    first = calls[0]
    return frozenset({
        DIFFERENCES[leaf.kind]
        for call in calls[1:]
        for leaf, other in zip(first.leaves, call.leaves, strict=True)
        if leaf.exact != other.exact
    })  # fmt: skip


def lead(calls: Sequence[Call]) -> Call:
    """The call whose module computes all of `calls`: with adapters, if any of them has some."""
    return next((call for call in calls if call.is_adapted), calls[0])


def compute(calls: Sequence[Call], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One forward pass with the joined arguments of `calls`, by the module itself."""
    leader = lead(calls)
    if leader.selection is None or not leader.is_adapted:
        return target(leader.module, leader.method)(*args, **kwargs)
    rows = [call.selection for call in calls if call.selection for _ in range(call.rows)]
    return leader.selection.run(leader.method, rows, args, kwargs)


def original_module(module: Any) -> Any:
    """The original module, if this one was made by `torch.compile`."""
    return getattr(module, "_orig_mod", module)


def describe(
    module: Any,
    method: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    fingerprints: Fingerprints,
    name: str = "",
    selection: Selection | None = None,
    runner: ModuleRunner | None = None,
) -> Call:
    """Describe a call of `module` (an nn.Module; `method` is `__call__`, `forward`, `encode` ...)."""
    call = Call(module, method, args, kwargs, name, selection=selection, runner=runner)
    try:
        _describe(call, fingerprints)
    except _Unbatchable as reason:
        call.key, call.alone_because, call.reason = None, str(reason), reason.kind
    return call


class _Unbatchable(Exception):
    """Why a call cannot be batched."""

    def __init__(self, detail: str, kind: Reason = Reason.STRUCTURE) -> None:
        super().__init__(detail)
        self.kind = kind


def _describe(call: Call, fingerprints: Fingerprints) -> None:
    kind: Any = type(original_module(call.module))
    name_of_method = "forward" if call.method == "__call__" else call.method
    function = getattr(kind, name_of_method, None)
    if function is None:
        raise _Unbatchable("the class does not define this method")
    method = _method(function)
    try:
        arguments = dict(method.signature.bind(None, *call.args, **call.kwargs).arguments)
    except TypeError:
        raise _Unbatchable("the arguments do not fit the signature; the module will raise") from None
    for name, parameter in method.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL and arguments.pop(name, ()):
            raise _Unbatchable("it takes *args")
    arguments.pop(next(iter(method.signature.parameters)))  # self
    for name in [name for name, value in arguments.items() if isinstance(value, torch.Generator)]:
        if generators.reads(kind, name_of_method, name):
            raise _Unbatchable("draws its own random numbers", Reason.GENERATOR)
        del arguments[name]
    call.defaults = method.defaults
    if method.plain:
        arguments = {name: value for name, value in arguments.items() if not _is_default(name, value, method.defaults)}
    call.rows, call.listed = _rows(arguments)
    call.pairs = text_masks.present(arguments, method.pairs, call.rows)
    for mask in call.pairs.values():
        arguments.setdefault(mask, None)
    # In a fixed order, whatever order the caller uses.
    call.shape = _Reader(call, fingerprints).read(dict(sorted(arguments.items())), "", "")
    owner = call.module
    if call.selection:
        owner = call.selection.owner
        call.leaves.append(Leaf("", "adapters", call.selection, call.selection.key, call.selection.names))
    by = () if call.runner is None else (id(call.runner),)
    call.key = (id(owner), call.method, call.shape, tuple([(leaf.kind, leaf.key) for leaf in call.leaves]), *by)
    call.exact = tuple([leaf.exact for leaf in call.leaves])


def _rows(arguments: Mapping[str, Any]) -> tuple[int, bool]:
    """The number of rows, and whether the call uses lists with one tensor per row."""
    for value in arguments.values():
        if isinstance(value, torch.Tensor) and value.dim():
            return value.shape[0], False
        if type(value) is list and value and all(isinstance(item, torch.Tensor) for item in value):
            # One tensor per row comes with as many time steps; else each tensor of the list has rows itself.
            if not value[0].dim() or any(_steps(name, other) == len(value) for name, other in arguments.items()):
                return len(value), True
            return value[0].shape[0], False
    raise _Unbatchable("no tensor to read the number of rows from")


class _Reader:
    """Walks the arguments of one call, classifying every leaf."""

    def __init__(self, call: Call, fingerprints: Fingerprints) -> None:
        self.call = call
        self.rows = call.rows
        self.fingerprints = fingerprints
        self.masks = frozenset(call.pairs.values())

    def read(self, value: Any, name: str, path: str) -> Any:
        """Returns the nesting of `value` and adds its leaves to the call."""
        if type(value) is dict:
            inner = [self.read(item, str(key), f"{path}.{key}" if path else str(key)) for key, item in value.items()]
            return ("dict", tuple(value), tuple(inner))
        if type(value) is list and name in EACH:
            return self._leaf(path, "each", value, self._same(value))
        if type(value) is list and self._is_row_list(value):
            tails = {tuple(item.shape[1:]) for item in value}
            kinds = {(item.dtype, item.device) for item in value}
            if len(tails) > 1 or len(kinds) > 1:
                raise _Unbatchable(f"{path}: a list of tensors of different kinds")
            lengths = tuple(sorted({item.shape[:1] for item in value}))
            return self._leaf(path, "list", value, (tails.pop(), kinds.pop()), lengths)
        if type(value) in (list, tuple):
            inner = [self.read(item, name, f"{path}.{at}") for at, item in enumerate(value)]
            return (type(value).__name__, (), tuple(inner))
        if isinstance(value, torch.Tensor):
            return self._tensor(value, name, path)
        if path in self.masks:
            return self._leaf(path, "mask", None, None, "all")
        if name in TIME and isinstance(value, int | float) and not isinstance(value, bool):
            return self._time(torch.tensor([value]), path)
        if isinstance(value, PLAIN):
            return self._leaf(path, "value", value, (type(value), value))
        kind = type(value).__name__
        raise _Unbatchable(f"{path}: a {kind}", Reason.CACHE if "Cache" in kind else Reason.STRUCTURE)

    def _tensor(self, value: torch.Tensor, name: str, path: str) -> Any:
        if value.requires_grad:
            raise _Unbatchable(f"{path}: needs gradients")
        if name in TIME and value.numel() == 1:
            return self._time(value.reshape(1), path)
        leads = value.shape[0] if value.dim() else 0
        kind = (value.dtype, value.device)
        if path in self.call.pairs:
            return self._leaf(path, "ragged", value, (value.shape[2:], kind), value.shape[1])
        if path in self.masks:
            return self._leaf(path, "mask", value, None, (kind, value.shape[1]))
        if name in TIME and leads == self.rows and value.dim() == 1:
            return self._leaf(path, "time", value, value.device, value.dtype)
        if name in ROWS_SECOND and value.dim() > 1 and value.shape[1] == self.rows:
            return self._leaf(path, "second", value, (leads, value.shape[2:], kind))
        if name not in EQUAL and leads:
            if leads == self.rows:
                return self._leaf(path, "rows", value, (value.shape[1:], kind))
            if leads % self.rows == 0 and value.dim() > 1 and CONTENT.search(name):
                return self._leaf(path, "multi", value, (leads // self.rows, value.shape[1:], kind))
        if value.numel() > LARGEST_EQUAL:
            what = f"{path}: a large tensor of shape {tuple(value.shape)} for {self.rows} rows"
            raise _Unbatchable(what, Reason.LARGE)
        return self._leaf(path, "equal", value, (value.shape, kind, self.fingerprints.of(value)))

    def _time(self, value: torch.Tensor, path: str) -> Any:
        return self._leaf(path, "time", value.expand(self.rows), value.device, value.dtype)

    def _same(self, values: list[Any]) -> Any:
        if len(values) != self.rows or any(value != values[0] for value in values[1:]):
            raise _Unbatchable("a list that is not one equal value per row")
        return repr(values[0])

    def _is_row_list(self, value: list[Any]) -> bool:
        return self.call.listed and len(value) == self.rows and all(isinstance(item, torch.Tensor) for item in value)

    def _leaf(self, path: str, kind: str, value: Any, key: Any, exact: Any = None) -> str:
        self.call.leaves.append(Leaf(path, kind, value, key, exact))
        return "leaf"


def _signature_word(leaf: Leaf, defaults: Mapping[str, Any], padded: bool) -> str:
    """A leaf's word in a signature; empty if it has none."""
    if leaf.kind == "adapters":
        return ""
    if leaf.kind == "mask":  # padding makes one
        return "rows2" if padded or leaf.value is not None else ""
    if leaf.kind != "value":
        kind = {"ragged": "rows"}.get(leaf.kind, leaf.kind)
        return f"{kind}{leaf.value.dim()}" if kind in ("rows", "multi", "equal", "second") else kind
    if leaf.path == "return_dict":
        return ""
    default = defaults.get(leaf.path)
    if leaf.value is None or isinstance(leaf.value, bool | str):
        return "" if leaf.value == default and type(leaf.value) is type(default) else str(leaf.value)
    if isinstance(leaf.value, int | float):
        return "" if isinstance(default, int | float) and not isinstance(default, bool) else "number"
    return type(leaf.value).__name__


@dataclass(frozen=True, slots=True)
class _Method:
    """What is known about a class's method."""

    signature: inspect.Signature
    defaults: Mapping[str, Any]
    pairs: Mapping[str, str]
    plain: bool
    """Whether omitting an argument equals passing its default; a third-party decorator may tell them apart."""


@functools.cache
def _method(function: Callable[..., Any]) -> _Method:
    signature = inspect.signature(function)
    defaults = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.default is not parameter.empty
    }
    return _Method(signature, defaults, text_masks.pairs(signature.parameters), _is_plain(function))


def _is_plain(function: Callable[..., Any]) -> bool:
    while hasattr(function, "__wrapped__"):
        if not str(getattr(function, "__globals__", {}).get("__name__")).startswith("diffusers."):
            return False
        function = function.__wrapped__
    return True


def _is_default(name: str, value: Any, defaults: Mapping[str, Any]) -> bool:
    if name not in defaults or not isinstance(value, PLAIN):
        return False
    return type(value) is type(defaults[name]) and value == defaults[name]


def _steps(name: str, value: Any) -> int:
    return value.numel() if name in TIME and isinstance(value, torch.Tensor) else 0

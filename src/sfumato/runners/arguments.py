"""The arguments of a call as a flat list of tensors, for a graph that takes nothing else.

Everything that is no tensor is part of the structure, and so are the sizes that no request can change (features,
channels). Rows, picture size and length of texts may differ between calls of one structure.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sfumato.batching.calls import TIME
from sfumato.batching.outputs import PLAIN
from sfumato.pipelines import generators

SIDE_INPUTS = ("residual", "adapter")
"""Words in the names of arguments that other networks compute: ControlNets, T2I adapters."""


class Unserved(Exception):
    """Why a call is left to the module itself."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """A call's arguments, without those that have their default value and without `return_dict`."""

    tensors: tuple[torch.Tensor, ...]
    """32-bit where they are floating-point numbers, contiguous; time steps one per row."""
    paths: tuple[str, ...]
    """Where each of them stands among the arguments."""
    spec: Any
    plain: tuple[Any, ...]
    """The other leaves; a tensor's place has None."""
    at: tuple[int, ...]
    """Places of the tensors among the leaves."""
    return_dict: bool | None
    """None: the method has no such parameter."""

    @property
    def structure(self) -> str:
        """Equal for calls that one graph can serve."""
        sizes = [f"{path}:{tensor.dtype}{fixed(tensor)}" for path, tensor in zip(self.paths, self.tensors, strict=True)]
        return f"{' '.join(sizes)} | {self.spec} {self.plain}"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(tensor.shape) for tensor in self.tensors)

    def rebuilt(self, tensors: Any) -> dict[str, Any]:
        """The keyword arguments, with other tensors in the places of these."""
        leaves = list(self.plain)
        for place, tensor in zip(self.at, tensors, strict=True):
            leaves[place] = tensor
        return dict(pytree.tree_unflatten(leaves, self.spec))


def fixed(tensor: torch.Tensor) -> list[int]:
    """The shape with -1 where requests differ: rows, and sizes of pictures and texts."""
    shape = list(tensor.shape)
    if not tensor.is_floating_point():
        return [-1] * len(shape)
    kept = 1 if len(shape) > 3 else len(shape) - 1 if len(shape) > 1 else None
    return [size if at == kept else -1 for at, size in enumerate(shape)]


def read(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], method: str = "__call__", *, anywhere: bool = False
) -> Arguments:
    """The arguments of a call of a method of `module`. Raises Unserved. `anywhere`: also those on an accelerator."""
    signature = _signature(module, method)
    try:
        given = signature.bind(None, *args, **kwargs).arguments
    except TypeError:
        raise Unserved("the arguments do not fit the signature") from None
    given.pop(next(iter(signature.parameters)))
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:  # transformers' text encoders
            given |= given.pop(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL and given.pop(name, None):
            raise Unserved(f"it takes {parameter}")
    kind: Any = type(module)
    for name in [name for name, value in given.items() if isinstance(value, torch.Generator)]:
        if not generators.reads(kind, defined(method), name):
            del given[name]
    returned = given.pop("return_dict", True) if "return_dict" in signature.parameters else None
    named = {name: value for name, value in sorted(given.items()) if not _is_default(value, signature, name)}
    for name, value in named.items():
        if any(word in name for word in SIDE_INPUTS):
            raise Unserved(f"{name} comes from another network")
        if name in TIME:
            named[name] = _time(value, next(iter(given.values())))
    return _flattened(named, None if returned is None else bool(returned), anywhere)


def _flattened(named: dict[str, Any], return_dict: bool | None, anywhere: bool) -> Arguments:
    with_paths, spec = pytree.tree_flatten_with_path(named)
    tensors, paths, plain, at = [], [], [], []
    for place, (path, value) in enumerate(with_paths):
        name = pytree.keystr(path)
        if isinstance(value, torch.Tensor):
            if value.device.type != "cpu" and not anywhere:
                raise Unserved(f"{name} is on {value.device}")
            tensors.append((value.float() if value.is_floating_point() else value).detach().contiguous())
            paths.append(name)
            at.append(place)
        elif not isinstance(value, PLAIN):
            raise Unserved(f"{name} is a {type(value).__name__}")
        plain.append(None if isinstance(value, torch.Tensor) else value)
    if not tensors:
        raise Unserved("it has no tensor")
    return Arguments(tuple(tensors), tuple(paths), spec, tuple(plain), tuple(at), return_dict)


def _time(value: Any, first: Any) -> Any:
    """A time step as one 32-bit number per row, however it was written."""
    rows = first.shape[0] if isinstance(first, torch.Tensor) and first.dim() else 1
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = torch.tensor(float(value))
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.float().reshape(1).expand(rows)
    return value.float() if isinstance(value, torch.Tensor) else value


def _is_default(value: Any, signature: inspect.Signature, name: str) -> bool:
    if name not in signature.parameters:
        return False
    default = signature.parameters[name].default
    return isinstance(value, PLAIN) and type(value) is type(default) and value == default


def kept(arguments: Any) -> Any:
    """The same arguments, with copies of the tensors, which their request may change."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), arguments)


def first(module: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The tensor that gives a call its size: latents, tokens; of a list the first."""
    name = list(_signature(module, method).parameters)[1]
    value = args[0] if args else kwargs.get(name)
    value = value[0] if isinstance(value, list | tuple) and value else value
    return value if isinstance(value, torch.Tensor) else None


def _signature(module: Any, method: str) -> inspect.Signature:
    kind: Any = type(module)
    return _of_class(kind, defined(method))


def defined(method: str) -> str:
    """The name under which a class defines it."""
    return "forward" if method == "__call__" else method


@functools.cache
def _of_class(kind: Any, method: str) -> inspect.Signature:
    return inspect.signature(getattr(kind, method))

"""A module with adapters beside the same module without them: requests with different adapters share forward passes.

The module itself never changes. Its twin has layers of its own around the same weights, in the same objects: where one
is moved, or its weights are, so is the other. Adapters are loaded into the twin and never merged. Which of them act is
set before each of its forward passes, for all rows or for each row.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING, _is_group_offload_enabled
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from sfumato.batching.adapter_rows import ADDITIVE, BASE, Rows
from sfumato.batching.attending import Attending

HOOKS = ("_hf_hook", "_old_forward", "_diffusers_hook", "forward")
"""Attributes of a module that hooks have replaced for it alone; those of layers stay."""

CONTAINERS = (torch.nn.ModuleDict, torch.nn.ModuleList, torch.nn.Sequential, torch.nn.ParameterDict)

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Selection:
    """The adapters of one module that act on a request."""

    adapted: AdaptedModule
    names: tuple[str, ...]
    attending: Attending | None = None
    """The pictures that its attention follows besides the text."""

    @property
    def plain(self) -> bool:
        """Whether the module itself computes this."""
        return self.names == self.adapted.defaults and self.attending is None

    @property
    def module(self) -> Any:
        """What computes this."""
        if self.attending:
            return self.attending.module
        return self.adapted.original if self.plain else self.adapted.module

    @property
    def owner(self) -> Any:
        """Only calls of the same owner may share a forward pass."""
        return self.attending.module if self.attending else self.adapted.original

    @property
    def key(self) -> object:
        """Calls may share a forward pass only if they agree in it; those that also agree in the names surely may."""
        layout: object = self.adapted.layout
        if not self.adapted.by_row(self.names):
            layout = layout, self.names
        return (layout, self.attending.strengths) if self.attending else layout

    def run(self, method: str, rows: Sequence[Selection], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module; `rows` has the selection of each row, or one for all."""
        with self.attending.acting() if self.attending else nullcontext():
            return self.adapted.run(method, rows, args, kwargs, None if self.plain else self.module)

    @property
    def row(self) -> str:
        """peft's name for the adapter of a row."""
        return self.names[0] if self.names else BASE


class AdaptedModule:
    """A module, its twin with adapters, and which of these act."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self.module: Any = twin(original)
        self.waits = _is_group_offload_enabled(original)
        """Whether layers of it wait in main memory until they are called."""
        _follow_groups(original, self.module)
        self.defaults: tuple[str, ...] = ()
        """Adapters of the module itself, which act unless a request replaces them."""
        self.layers: list[Any] = []
        self.layout = ""
        """Which kinds of layers have adapters: what was proved for one layout says nothing about another."""
        self._rows: Rows | None = None
        self._by_row: dict[tuple[str, ...], bool] = {}
        self._hooks: list[Any] = []
        first = next((each for each in original.modules() if isinstance(each, BaseTunerLayer)), None)
        if first is not None and not first.disable_adapters:
            self.defaults = tuple(first.active_adapters)
        self.refresh()

    def extended(self) -> Any:
        """A twin of the twin, with the same adapters, for more that a request adds to it."""
        return twin(self.module, (BaseTunerLayer,))

    def refresh(self) -> None:
        """Call it when adapters were loaded or deleted."""
        for hook in self._hooks:
            hook.remove()
        named = [(name, layer) for name, layer in self.module.named_modules() if isinstance(layer, BaseTunerLayer)]
        self.layers = [layer for _, layer in named]
        self._hooks = [
            layer.register_forward_hook(self._add_to_rows)
            if type(layer) in ADDITIVE
            else layer.register_forward_pre_hook(self._with_rows, with_kwargs=True)
            for layer in self.layers
        ]
        self._by_row.clear()
        kinds = sorted({f"{NUMBER.sub('*', name)} {type(layer).__name__}" for name, layer in named})
        self.layout = hashlib.sha256("\n".join(kinds).encode()).hexdigest()[:8]

    def having(self, name: str) -> list[Any]:
        """The layers that this adapter has a part in."""
        return [layer for layer in self.layers if name in _names(layer)]

    def take(self, name: str, other: Any) -> None:
        """Have an adapter that was loaded into another twin of the same module: its layers become this twin's."""
        for path, layer in having(other, name).items():
            parent, _, last = path.rpartition(".")
            here = getattr(self.module.get_submodule(parent), last)
            same: Any = here
            while isinstance(same, BaseTunerLayer) and type(same) is not type(layer):
                same = same.base_layer
            if isinstance(same, BaseTunerLayer):
                for key, table in [*vars(layer).items(), *layer._modules.items()]:
                    if hasattr(table, "keys") and name in table:
                        getattr(same, key)[name] = table[name]
            else:
                layer.base_layer = here
                setattr(self.module.get_submodule(parent), last, layer)
        if not hasattr(self.module, "peft_config"):
            self.module.peft_config = {}
        self.module.peft_config[name] = other.peft_config[name]
        self.refresh()

    def by_row(self, names: tuple[str, ...]) -> bool:
        """Whether peft can apply these adapters to some rows of a batch: one of them, without DoRA."""
        if names not in self._by_row:
            self._by_row[names] = len(names) < 2 and all(
                isinstance(layer, LoraLayer) and name not in layer.lora_variant
                for name in names
                for layer in self.having(name)
            )
        return self._by_row[names]

    def run(
        self,
        method: str,
        rows: Sequence[Selection],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        module: Any = None,
    ) -> Any:
        """Call the twin, or `module` with the same layers; `rows` has the selection of each row, or one for all."""
        self._follow_embeddings()
        hook = getattr(self.original, "_hf_hook", None) if method in ("__call__", "forward") else None
        if hook is not None:  # it brings the weights to the device, and sends others away
            args, kwargs = hook.pre_forward(self.original, *args, **kwargs)
        if all(row.names == rows[0].names for row in rows):
            self.activate(rows[0])
        else:
            self._activate(tuple(dict.fromkeys(name for row in rows for name in row.names)))
            self._rows = Rows.of(row.row for row in rows)
            for layer in self.layers:
                if type(layer) in ADDITIVE:  # peft computes the layer below, and `_add_to_rows` the rest
                    layer._disable_adapters = True
        try:
            output = target(self.module if module is None else module, method)(*args, **kwargs)
        finally:
            self._rows = None
        return output if hook is None else hook.post_forward(self.original, output)

    def activate(self, selection: Selection) -> None:
        """From now on these adapters act, on all rows."""
        self._activate(selection.names)

    def _activate(self, names: tuple[str, ...]) -> None:
        for layer in self.layers:
            # peft's own setter also goes through all parameters, to say which are trained.
            layer._active_adapter = list(names)
            layer._disable_adapters = not names

    def _add_to_rows(self, layer: Any, args: tuple[Any, ...], output: Any) -> None:
        """After the forward pass of a layer whose adapters are off: what they add to each row."""
        if self._rows is not None:
            self._rows.add(layer, args[0], output)

    def _with_rows(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the forward pass of a layer of another kind: tell peft the adapter of each of its rows."""
        if self._rows is None or not isinstance(layer, LoraLayer):
            return None
        return args, {**kwargs, "adapter_names": self._rows.repeated(self._rows.per_row(args[0]))}

    def _follow_embeddings(self) -> None:
        """A textual inversion gives a text encoder another table of tokens."""
        table = getattr(self.original, "get_input_embeddings", lambda: None)()
        if table is not None and self.module.get_input_embeddings() is not table:
            self.module.set_input_embeddings(table)


def _follow_groups(original: Any, module: Any) -> None:
    """Let blocks of a twin bring and send away the weights that they share with those of the original."""
    parts = dict(module.named_modules())
    for name, part in original.named_modules():
        registry = getattr(part, "_diffusers_hook", None)
        hook = registry.get_hook(_GROUP_OFFLOADING) if registry else None
        if hook is None or parts[name] is part:  # a layer at the end is the original's, with its hook
            continue

        def before(twin: Any, args: Any, kwargs: Any, hook: Any = hook, part: Any = part) -> Any:
            return hook.pre_forward(part, *args, **kwargs)

        def after(twin: Any, args: Any, output: Any, hook: Any = hook, part: Any = part) -> Any:
            return hook.post_forward(part, output)

        parts[name].register_forward_pre_hook(before, with_kwargs=True)
        parts[name].register_forward_hook(after)


def target(module: Any, method: str) -> Any:
    """The callable: for `__call__` the module itself, so that its hooks run."""
    return module if method == "__call__" else getattr(module, method)


def twin(module: Any, shared: tuple[type, ...] = ()) -> Any:
    """A copy of the tree of modules, with the layers at its ends, those of the classes `shared`, and all tensors
    shared."""
    ends = [part for part in module.modules() if _is_end(part) or isinstance(part, shared)]
    within = {id(part) for end in ends for part in end.modules()}
    same: dict[int, Any] = {id(each): each for each in (*ends, *module.parameters(), *module.buffers())}
    inner = {name: part for name, part in module.named_modules() if id(part) not in within}
    for part in inner.values():  # hooks refer to other modules
        same |= {id(vars(part)[name]): None for name in HOOKS if name in vars(part)}
    copied = copy.deepcopy(module, same)
    parts: dict[str, Any] = dict(copied.named_modules())
    for name, part in inner.items():
        for hook in HOOKS:
            parts[name].__dict__.pop(hook, None)
        # Moving a module replaces its buffers, not the table with them.
        parts[name].__dict__.update(_buffers=part._buffers, _parameters=part._parameters)
    return copied


@contextmanager
def untouched(original: torch.nn.Module, adapted: torch.nn.Module) -> Iterator[list[str]]:
    """Lists the layers of `adapted` whose weights are no longer those of `original` at the end."""
    changed: list[str] = []
    trained = [(parameter, parameter.requires_grad) for parameter in original.parameters()]
    ends = {name: part for name, part in original.named_modules() if _is_end(part)}
    yield changed
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)
    parts = dict(adapted.named_modules(remove_duplicate=False))
    for name, part in ends.items():
        now: Any = parts.get(name)
        while isinstance(now, BaseTunerLayer):
            now = now.base_layer
        if now is not part:
            changed.append(name)


def _is_end(part: torch.nn.Module) -> bool:
    return not part._modules and not isinstance(part, CONTAINERS) and not hasattr(part, "keys")


def having(module: Any, name: str) -> dict[str, Any]:
    """Path → the layers of a module that an adapter has a part in."""
    layers = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)]
    return {path: layer for path, layer in layers if name in _names(layer)}


def _names(layer: Any) -> set[str]:
    return {name for kind in layer.adapter_layer_names for name in getattr(layer, kind, {})}

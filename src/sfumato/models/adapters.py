"""The LoRAs that requests have loaded beside one model: the latest ones, up to a number and the memory budget.

They act in twins of its modules (`batching.adapted`). The model itself does not change. A thread reads them
(`lora_reading`), while other requests go on.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from sfumato.batching.adapted import AdaptedModule, Selection, twin
from sfumato.errors import AdditionTooLarge, InvalidRequest
from sfumato.loras import Lora, of_defaults
from sfumato.models import lora_reading
from sfumato.models.by_layer import has_feature_cache, is_cast_by_layer, waits_by_layer
from sfumato.models.lora_reading import Reading

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    """A LoRA in memory."""

    name: str
    """peft's name for it."""
    components: tuple[str, ...]
    """Those it has a part for."""
    bytes: int
    users: int = 0


_Weighted: TypeAlias = tuple[str, str, float]
"""Component, peft's name for the adapter, and its weight."""

KEPT_WEIGHTS = 16
"""Weights that layers keep without a request that uses them: each is an entry in the tables of every layer."""


class Adapters:
    """Used only on the loop's thread."""

    def __init__(self) -> None:
        self.limit = 8
        """LoRAs that stay in memory; more only while requests use them."""
        self.make_room: Callable[[int], bool] = lambda bytes: True
        """Whether there is room for so many more bytes, once idle models are gone."""
        self.changed: Callable[[], None] = lambda: None
        """Called when LoRAs were loaded or dropped."""
        self.turn: Callable[[], None] | None = None
        """Lets other requests go on while one waits for its LoRAs; None: there are no others."""
        self.alone: AbstractContextManager[Any] | None = None
        """Held while one is read."""
        self.wake: Callable[[], None] = lambda: None
        """Called in the thread that reads, at its end."""
        self._modules: dict[str, AdaptedModule] = {}
        """Component → its twin."""
        self._untouched: dict[str, tuple[Any, torch.nn.Module]] = {}
        """Component → its module, and a twin without LoRAs of requests, of which the threads that read make theirs."""
        self._readings: dict[str, Reading] = {}
        """Content → the thread that reads it."""
        self._cancelled: list[Reading] = []
        """Those that nobody wants any more; what their threads have read is in memory until they end."""
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        """By content, least recently used first."""
        self._weighted: OrderedDict[_Weighted, int] = OrderedDict()
        """Adapters with a weight, least recently used first → requests that use them so."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def reading(self) -> bool:
        """Whether requests wait for a LoRA that is being read."""
        waited_for = (reading for reading in self._cancelled if reading.waiting)
        return any(not reading.done for reading in (*self._readings.values(), *waited_for))

    @property
    def modules(self) -> list[torch.nn.Module]:
        return [adapted.module for adapted in self._modules.values()]

    @contextmanager
    def use(
        self, pipeline: Any, device: str, model: str, loras: Sequence[Lora], *, replace_defaults: bool = False
    ) -> Iterator[Mapping[int, Selection]]:
        """The LoRAs of a request, loaded if necessary, as selections by the id of their modules; they stay until the
        end. `replace_defaults`: without the model file's own. Raises InvalidRequest and AdditionTooLarge.
        """
        entries: list[tuple[Lora, _Entry]] = []
        if not self._modules and not loras and not replace_defaults:
            yield {}
            return
        if has_feature_cache(_loadable(pipeline).values()):
            raise InvalidRequest(
                f"loras: {model} has a feature cache (`cache`), whose hooks are not in the twins that requests draw "
                "with. Name the LoRA in the model file (lora_adapter), or leave `cache` out there",
                param="loras",
            )
        used: list[_Weighted] = []
        named = [lora for lora in loras if lora.default is None]
        try:
            self._obtain_all(pipeline, device, model, named, entries)
            weights = of_defaults(loras)
            if weights or replace_defaults:
                self._twin_those_with_defaults(pipeline)
            yield {
                id(adapted.original): Selection(
                    adapted, self._names(component, adapted, entries, weights, replace_defaults, used)
                )
                for component, adapted in self._modules.items()
            }
        finally:
            for _, entry in entries:
                entry.users -= 1
            for key in used:
                if key in self._weighted:
                    self._weighted[key] -= 1
            self._trim(self.limit)
            self._trim_weights()

    def drop(self) -> int:
        """Memory is short: drop what no request uses; returns the bytes freed."""
        before = sum(entry.bytes for entry in self._entries.values())
        self._trim(0)
        return before - sum(entry.bytes for entry in self._entries.values())

    # What acts.

    def _names(
        self,
        component: str,
        adapted: AdaptedModule,
        entries: Sequence[tuple[Lora, _Entry]],
        weights: Mapping[int, Lora],
        replace_defaults: bool,
        used: list[_Weighted],
    ) -> tuple[str, ...]:
        """peft's names of those that act on a component; what it takes of `_weighted` is added to `used`."""
        names = []

        def weighted(name: str, weight: float) -> str:
            key = component, name, weight
            if key not in self._weighted:
                _add_weight(adapted, name, weight)
            self._weighted[key] = self._weighted.pop(key, 0) + 1
            used.append(key)
            return _alias(name, weight)

        for name in adapted.defaults:
            lora = weights.get(int(name.rpartition("_")[2]))
            if lora is None and not replace_defaults:
                names.append(name)
            elif lora is not None and (weight := _weight(lora, component)):
                names.append(weighted(name, weight))
        for lora, entry in entries:
            if component in entry.components and (weight := _weight(lora, component)):
                names.append(weighted(entry.name, weight))
        return tuple(names)

    def _twin_those_with_defaults(self, pipeline: Any) -> None:
        for component, module in _loadable(pipeline).items():
            if component not in self._modules and getattr(module, "peft_config", None):
                self._modules[component] = AdaptedModule(module)

    def _forget_others(self, pipeline: Any) -> None:
        """Drop what belongs to modules that the pipeline has no more, or whose layers were moved to main memory."""
        modules = _loadable(pipeline)
        known = {component: module for component, (module, _) in self._untouched.items()}
        known |= {component: adapted.original for component, adapted in self._modules.items()}
        offloaded = (waits_by_layer([each.original]) != each.waits for each in self._modules.values())
        if any(modules.get(component) is not module for component, module in known.items()) or any(offloaded):
            # Requests in flight keep theirs.
            self._modules, self._entries, self._weighted = {}, OrderedDict(), OrderedDict()
            for digest in list(self._readings):
                self._cancel(digest)
            self._untouched = {}

    # What is in memory.

    def _obtain_all(
        self, pipeline: Any, device: str, model: str, loras: Sequence[Lora], entries: list[tuple[Lora, _Entry]]
    ) -> None:
        """Read those that are not in memory; `entries` gets all, counted as used."""
        self._forget_others(pipeline)
        while len(entries) < len(loras):
            lora = loras[len(entries)]
            entry = self._obtain(pipeline, device, model, lora)
            entry.users += 1
            entries.append((lora, entry))
            self._forget_others(pipeline)
            if any(self._entries.get(lora.sha256) is not entry for lora, entry in entries):
                entries.clear()  # while it waited the modules were replaced, and all that belonged to them was dropped

    def _obtain(self, pipeline: Any, device: str, model: str, lora: Lora) -> _Entry:
        digest = lora.sha256
        while digest not in self._entries:
            reading = self._readings.get(digest)
            if reading is None and self._wait_for_cancelled():
                self._forget_others(pipeline)
                continue
            reading = reading or self._begin(pipeline, device, model, lora)
            try:
                reading.wait(self.turn)
            except BaseException:
                if not reading.waiting and self._readings.get(digest) is reading:
                    self._cancel(digest)  # nobody waits for what its thread brings
                raise
            if self._readings.get(digest) is reading:  # the first of those that have waited
                del self._readings[digest]
                self._enter(pipeline, model, lora, reading)
            if reading.error:
                raise copy.copy(reading.error)
        self._entries.move_to_end(digest)
        return self._entries[digest]

    def _cancel(self, digest: str) -> None:
        reading = self._readings.pop(digest)
        reading.cancel()
        self._cancelled.append(reading)

    def _wait_for_cancelled(self) -> bool:
        """Whether it waited for a thread: what it has read, or still reads, is not in what there is room for."""
        self._cancelled = [reading for reading in self._cancelled if not reading.done]
        if not self._cancelled:
            return False
        self._cancelled[0].wait(self.turn)
        return True

    def _begin(self, pipeline: Any, device: str, model: str, lora: Lora) -> Reading:
        """Make room for a LoRA, and begin to read it. Raises InvalidRequest and AdditionTooLarge."""
        try:
            needed = Path(lora.file).stat().st_size
        except OSError as error:
            raise InvalidRequest(f"loras: {lora.name} cannot be read: {error.strerror}", param="loras") from None
        originals = _loadable(pipeline)
        if not originals or not hasattr(pipeline, "load_lora_weights"):
            raise InvalidRequest(
                f"loras: {model} ({type(pipeline).__name__}) takes no LoRA; leave out {lora.name}", param="loras"
            )
        if any(is_cast_by_layer(module) for module in originals.values()):
            raise InvalidRequest(
                f"loras: the weights of {model} are stored in fp8 (layerwise_casting), to which requests cannot add "
                f"LoRAs. Name {lora.name} in the model file (lora_adapter), or use `quantization`",
                param="loras",
            )
        self._trim(self.limit - 1)
        others = sum(reading.bytes for reading in self._readings.values())
        while not self.make_room(others + needed):
            if not self._drop_oldest():
                raise AdditionTooLarge(
                    f"loras: {lora.name} takes {needed >> 20} MiB, and there is no room for it beside {model}. "
                    "Raise the setting memory_mb, or use fewer"
                )
        for component, module in originals.items():
            if component not in self._untouched:
                self._untouched[component] = module, twin(module)
        untouched = {component: each for component, (_, each) in self._untouched.items()}
        name = f"lora_{lora.sha256[:16]}"
        read = functools.partial(lora_reading.read, copy.copy(pipeline), untouched, lora, name, model, device)
        reading = self._readings[lora.sha256] = Reading(read, needed, self.alone, self.wake)
        return reading

    def _enter(self, pipeline: Any, model: str, lora: Lora, reading: Reading) -> None:
        """A LoRA was read: take its layers over."""
        read, reading.result = reading.result, None
        if read is not None:
            self._trim(self.limit - 1)
            originals = _loadable(pipeline)
            for component, twin_of_it in read.twins.items():
                if component not in self._modules:
                    self._modules[component] = AdaptedModule(originals[component])
                self._modules[component].take(read.name, twin_of_it)
            self._entries[lora.sha256] = _Entry(read.name, tuple(read.twins), read.bytes)
            log.info("%s: LoRA %s is loaded: %d bytes", model, lora.name, read.bytes)
            self.changed()
        self._drop_unused_twins()

    def _trim(self, limit: int) -> None:
        while len(self._entries) > max(0, limit) and self._drop_oldest():
            pass

    def _drop_oldest(self) -> bool:
        """Drop the LoRA that was not used for longest; False if all are in use."""
        digest = next((digest for digest, entry in self._entries.items() if not entry.users), None)
        if digest is None:
            return False
        entry = self._entries.pop(digest)
        weighted = [key for key in self._weighted if key[1] == entry.name]
        self._delete([entry.name, *self._forget_weights(weighted)])
        self._drop_unused_twins()
        self.changed()
        return True

    def _trim_weights(self) -> None:
        """Forget weights that no request uses, many at a time: it takes a walk through the layers."""
        unused = [key for key, users in self._weighted.items() if not users]
        if len(unused) > 2 * KEPT_WEIGHTS:
            self._delete(self._forget_weights(unused[:-KEPT_WEIGHTS]))

    def _forget_weights(self, keys: Sequence[_Weighted]) -> list[str]:
        """peft's names for them, to be deleted: but for those that another component has in use."""
        for key in keys:
            del self._weighted[key]
        left = {_alias(name, weight) for _, name, weight in self._weighted}
        return [alias for alias in dict.fromkeys(_alias(name, weight) for _, name, weight in keys) if alias not in left]

    def _delete(self, names: Sequence[str]) -> None:
        for adapted in self._modules.values():
            adapted.refresh()
            for name in names:
                for layer in adapted.having(name):
                    layer._active_adapter = []  # else peft chooses another one, and says so
                    layer.delete_adapter(name)
                getattr(adapted.module, "peft_config", {}).pop(name, None)
            adapted.refresh()

    def _drop_unused_twins(self) -> None:
        names = {entry.name for entry in self._entries.values()}
        self._modules = {
            component: adapted
            for component, adapted in self._modules.items()
            if adapted.defaults or any(adapted.having(name) for name in names) or _has_adapters(adapted)
        }
        if not self._entries and not self._readings:
            self._untouched.clear()


def _has_adapters(adapted: AdaptedModule) -> bool:
    return any(getattr(layer, kind, None) for layer in adapted.layers for kind in layer.adapter_layer_names)


def _loadable(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The components that a LoRA may have a part for."""
    names = getattr(pipeline, "_lora_loadable_modules", ())
    modules = {name: getattr(pipeline, name, None) for name in names}
    return {name: module for name, module in modules.items() if isinstance(module, torch.nn.Module)}


def _weight(lora: Lora, component: str) -> float:
    return lora.weight_of_text if component.startswith("text_encoder") else lora.weight


def _alias(name: str, weight: float) -> str:
    """peft's name for an adapter with this weight."""
    return f"{name}@{weight!r}".replace(".", ",")  # a module's name has no dots


def _add_weight(adapted: AdaptedModule, name: str, weight: float) -> None:
    """A second name for the same tensors, as a name has one scale."""
    alias = _alias(name, weight)
    for layer in adapted.having(name):
        for kind in (*layer.adapter_layer_names, *layer.other_param_names):
            table: Any = getattr(layer, kind, None)
            if hasattr(table, "keys") and name in table:
                table[alias] = table[name]
        if name in getattr(layer, "lora_variant", {}):
            layer.lora_variant[alias] = layer.lora_variant[name]
        layer.set_scale(alias, weight)

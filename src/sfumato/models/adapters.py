"""The LoRAs that requests have loaded beside one model: the latest ones, up to a number and the memory budget.

They are loaded by the pipeline's own loader, into twins of its modules (`batching.adapted`). The model itself does not
change. A LoRA of which not every part finds its place in the model is refused.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from sfumato.batching.adapted import AdaptedModule, Selection, untouched
from sfumato.batching.batcher import is_out_of_memory
from sfumato.checkpoints import weight_file
from sfumato.errors import InvalidRequest, ModelTooLarge
from sfumato.loras import Lora, of_defaults
from sfumato.models.by_layer import has_feature_cache, is_cast_by_layer, waits_by_layer

log = logging.getLogger(__name__)

SHOWN = 5
"""Keys that a message names."""

_ADAPTER_KEY = re.compile(r"[._]lora(?=[._])|\.lokr_|\.lora_magnitude|\.dora_scale|\.alpha$")
"""Where the name of a layer ends in a key of a LoRA, in diffusers' own form."""


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
        self._modules: dict[str, AdaptedModule] = {}
        """Component → its twin."""
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        """By content, least recently used first."""
        self._weighted: OrderedDict[_Weighted, int] = OrderedDict()
        """Adapters with a weight, least recently used first → requests that use them so."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def modules(self) -> list[torch.nn.Module]:
        return [adapted.module for adapted in self._modules.values()]

    @contextmanager
    def use(
        self, pipeline: Any, device: str, model: str, loras: Sequence[Lora], *, replace_defaults: bool = False
    ) -> Iterator[Mapping[int, Selection]]:
        """The LoRAs of a request, loaded if necessary, as selections by the id of their modules; they stay until the
        end. `replace_defaults`: without the model file's own. Raises InvalidRequest and ModelTooLarge.
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
        if waits_by_layer(_loadable(pipeline).values()):
            # Its hooks are on the blocks, of which the twin has its own.
            if loras or replace_defaults:
                raise InvalidRequest(
                    f"loras: the layers of {model} wait in main memory (offload: group), where requests cannot have "
                    "LoRAs. Name it in the model file (lora_adapter), or make room for the model",
                    param="loras",
                )
            yield {}
            return
        self._forget_others(pipeline)
        used: list[_Weighted] = []
        try:
            for lora in loras:
                if lora.default is None:
                    entry = self._obtain(pipeline, device, model, lora)
                    entry.users += 1
                    entries.append((lora, entry))
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
        """Drop what belongs to modules that the pipeline has no more: they were replaced to be offloaded."""
        modules = _loadable(pipeline)
        if any(modules.get(component) is not adapted.original for component, adapted in self._modules.items()):
            # Requests in flight keep theirs.
            self._modules, self._entries, self._weighted = {}, OrderedDict(), OrderedDict()

    # What is in memory.

    def _obtain(self, pipeline: Any, device: str, model: str, lora: Lora) -> _Entry:
        entry = self._entries.get(lora.sha256)
        if entry is None:
            try:
                needed = Path(lora.file).stat().st_size
            except OSError as error:
                raise InvalidRequest(f"loras: {lora.name} cannot be read: {error.strerror}", param="loras") from None
            self._trim(self.limit - 1)
            while not self.make_room(needed):
                if not self._drop_oldest():
                    raise ModelTooLarge(
                        f"loras: {lora.name} takes {needed >> 20} MiB, and there is no room for it beside {model}. "
                        "Raise the setting memory_mb, or use fewer"
                    )
            entry = self._entries[lora.sha256] = self._load(pipeline, device, model, lora)
            self.changed()
        self._entries.move_to_end(lora.sha256)
        return entry

    def _load(self, pipeline: Any, device: str, model: str, lora: Lora) -> _Entry:
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
        for component, module in originals.items():
            if component not in self._modules:
                self._modules[component] = AdaptedModule(module)
        name = f"lora_{lora.sha256[:16]}"
        try:
            self._load_into_twins(pipeline, lora, name, model)
            if lora.stamp and weight_file.stamp(Path(lora.file)) != lora.stamp:  # it is not what the recipe would say
                raise InvalidRequest(
                    f"loras: the file of {lora.name} was replaced while the request waited; send it again",
                    param="loras",
                )
        except BaseException:
            self._delete([name])
            self._drop_unused_twins()
            raise
        for adapted in self._modules.values():
            adapted.refresh()
            _move(adapted, name, device)
        parts = {component: adapted.having(name) for component, adapted in self._modules.items()}
        size = sum(tensor.numel() * tensor.element_size() for layers in parts.values() for tensor in _own(layers, name))
        self._drop_unused_twins()
        log.info("%s: LoRA %s is loaded: %d bytes", model, lora.name, size)
        return _Entry(name, tuple(component for component, layers in parts.items() if layers), size)

    def _load_into_twins(self, pipeline: Any, lora: Lora, name: str, model: str) -> None:
        loader = copy.copy(pipeline)
        for key, value in list(vars(loader).items()):
            if isinstance(value, torch.nn.Module):
                vars(loader)[key] = self._modules[key].module if key in self._modules else None
        keys: list[str] = []
        read = pipeline.lora_state_dict

        def read_and_check(*args: Any, **kwargs: Any) -> Any:
            answer = read(*args, **kwargs)
            keys.extend(answer[0] if isinstance(answer, tuple) else answer)
            _refuse_keys(pipeline, self._modules, keys, lora, model)
            return answer

        vars(loader)["lora_state_dict"] = read_and_check
        with weight_file.in_lower_case(Path(lora.file)) as file, _as_request_error(lora, model), _quiet():
            changes = [untouched(each.original, each.module) for each in self._modules.values()]
            lists = [change.__enter__() for change in changes]
            try:
                loader.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
            finally:
                for change in changes:
                    change.__exit__(None, None, None)
        if changed := [layer for layers in lists for layer in layers]:
            raise InvalidRequest(
                f"loras: {lora.name} changes the shape of {', '.join(changed[:SHOWN])}, which other requests use; name "
                "it in a model file of its own (lora_adapter)",
                param="loras",
            )
        self._refuse_missing(keys, lora, name, model)

    def _refuse_missing(self, keys: Sequence[str], lora: Lora, name: str, model: str) -> None:
        """Raise InvalidRequest if a layer that the file has is not one of the model's."""
        for component, adapted in self._modules.items():
            adapted.refresh()
            layers = {_layer(key.removeprefix(f"{component}.")) for key in keys if key.startswith(f"{component}.")}
            found = adapted.having(name)
            known = {each for each, _ in adapted.original.named_modules()}
            if missing := sorted(layer for layer in layers if not _spellings(layer) & known):
                missing = [f"{component}.{each}" for each in missing]
                raise _unfit(lora, model, missing, "has layers that the model does not have")
            if layers and not found:
                raise _unfit(lora, model, sorted(layers), "has layers that its loader does not take")
            if len(found) < len(layers):
                log.warning("%s: diffusers reads %d of the %d layers of %s in %s", model, len(found), len(layers),
                            component, lora.name)  # fmt: skip

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


def _own(layers: Sequence[Any], name: str) -> Iterator[torch.Tensor]:
    for layer in layers:
        for kind in layer.adapter_layer_names:
            table: Any = getattr(layer, kind, None)
            part = table[name] if hasattr(table, "keys") and name in table else None
            if isinstance(part, torch.nn.Module):
                yield from part.parameters()
            elif part is not None:
                yield part


def _move(adapted: AdaptedModule, name: str, device: str) -> None:
    """Put an adapter where its model computes; its own weights may wait in main memory."""
    for tensor in _own(adapted.having(name), name):
        # A copy also on the CPU: what is read is mapped, and changes with a file that is written over.
        tensor.data = tensor.data.to(device, copy=True)


def _layer(key: str) -> str:
    """The layer that a key is for."""
    return _ADAPTER_KEY.split(key, maxsplit=1)[0].removesuffix(".processor").replace(".processor.", ".")


def _spellings(layer: str) -> set[str]:
    """Names that a layer may have in the model: kohya's and diffusers' older ones differ for attention."""
    plain = layer.removeprefix("text_model.")
    names = {layer, plain, f"text_model.{plain}"}
    for old, new in (("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "out_proj")):
        names |= {name.removesuffix(old) + new for name in names if name.endswith(f".{old}")}
    names |= {f"{name}.0" for name in names if name.endswith("to_out")}
    return names | {f"{name}.base_layer" for name in names}


def _refuse_keys(
    pipeline: Any, modules: Mapping[str, AdaptedModule], keys: Sequence[str], lora: Lora, model: str
) -> None:
    """Raise InvalidRequest for keys that no component of the pipeline will load."""
    prefixes = tuple(f"{component}." for component in modules)
    if strange := [key for key in keys if not _ADAPTER_KEY.search(key)]:
        raise _unfit(lora, model, strange, "has keys that are no LoRA's")
    if foreign := [key for key in keys if not key.startswith(prefixes)]:
        parts = ", ".join(sorted(modules))
        raise _unfit(lora, model, foreign, f"has parts for other components than {parts} of {type(pipeline).__name__}")
    if not keys:
        raise _unfit(lora, model, [], "has nothing for any component")


def _unfit(lora: Lora, model: str, keys: Sequence[str], why: str) -> InvalidRequest:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    named = f": {', '.join(keys[:SHOWN])}{more}" if keys else ""
    return InvalidRequest(
        f"loras: {lora.name} does not fit {model}: it {why}{named}. It may be made for models of another kind",
        param="loras",
    )


@contextmanager
def _as_request_error(lora: Lora, model: str) -> Iterator[None]:
    """Turn what diffusers and peft raise for a LoRA that does not fit this model into an InvalidRequest."""
    try:
        yield
    except InvalidRequest:
        raise
    except Exception as error:  # whatever these libraries raise for a file of another kind
        if is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())[:500]
        raise InvalidRequest(
            f"loras: {lora.name} does not fit {model}: {text}. It may be made for models of another kind",
            param="loras",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a second LoRA beside the first, and of parts that it does not have
        yield

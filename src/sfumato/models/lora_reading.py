"""Read a LoRA for a model, in a thread of its own: requests without it go on meanwhile.

The pipeline's own loader puts it into twins of the model's modules that nothing else uses. What remains to be done on
the loop's thread is to take its layers over (`batching.adapted.AdaptedModule.take`).
"""

from __future__ import annotations

import copy
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING
from peft.tuners import tuners_utils
from torch.nn import init
from torch.overrides import TorchFunctionMode

from sfumato.batching.adapted import having, twin, untouched
from sfumato.batching.batcher import is_out_of_memory
from sfumato.checkpoints import weight_file
from sfumato.errors import InvalidRequest
from sfumato.loras import Lora
from sfumato.models.release import release_frames

log = logging.getLogger(__name__)

_INITIAL = ("uniform", "normal", "trunc_normal", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal")

SHOWN = 5
"""Keys that a message names."""

_ADAPTER_KEY = re.compile(r"[._]lora(?=[._])|\.lokr_|\.lora_magnitude|\.dora_scale|\.alpha$")
"""Where the name of a layer ends in a key of a LoRA, in diffusers' own form."""


@dataclass(frozen=True, slots=True)
class Read:
    """A LoRA in layers of its own."""

    name: str
    """peft's name for it."""
    twins: Mapping[str, torch.nn.Module]
    """Component → what has these layers; only components that it has a part for."""
    bytes: int


class Reading:
    """One LoRA while it is read. `result` and `error` are written by the thread that reads."""

    def __init__(
        self,
        read: Callable[[], Read],
        bytes: int,
        alone: AbstractContextManager[Any] | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """`bytes`: of its file. `alone`: held while it is read. `wake`: called in the thread at the end."""
        self.bytes = bytes
        self.result: Read | None = None
        self.error: BaseException | None = None
        self.waiting = 0
        """Requests that wait for it."""
        self._cancelled = False
        self._ended = threading.Event()

        def run() -> None:
            try:
                with nullcontext() if alone is None else alone, torch.no_grad():
                    if not self._cancelled:
                        self.result = read()
            except BaseException as error:  # it belongs to those who wait for it
                release_frames(error)
                self.error = error
            if self._cancelled:
                self.result = None
            self._ended.set()
            wake()

        threading.Thread(target=run, name="sfumato-lora-read", daemon=True).start()

    @property
    def done(self) -> bool:
        return self._ended.is_set()

    def cancel(self) -> None:
        """Nobody wants it any more: if it has not begun it is not read, and its result is dropped."""
        self._cancelled = True
        self.result = None

    def wait(self, turn: Callable[[], None] | None) -> None:
        """Returns when it is read. `turn` lets other requests go on; None: nothing else does."""
        self.waiting += 1
        try:
            while not self.done:
                (turn or self._ended.wait)()
        finally:
            self.waiting -= 1


def read(pipeline: Any, modules: Mapping[str, torch.nn.Module], lora: Lora, name: str, model: str, device: str) -> Read:
    """Read a LoRA for `modules`, which no other thread may change; its tensors are on `device`, and no file's.

    Raises InvalidRequest naming `loras` if not every part of it finds its place.
    """
    twins: dict[str, Any] = {component: twin(module) for component, module in modules.items()}
    for each in twins.values():
        if vars(each).pop("peft_config", None):  # the model file's: peft warns of a second one, which is as we want it
            each._hf_peft_config_loaded = False
    loader = copy.copy(pipeline)
    for key, value in list(vars(loader).items()):
        if isinstance(value, torch.nn.Module):
            vars(loader)[key] = twins.get(key)
    keys: list[str] = []
    of_file = pipeline.lora_state_dict

    def read_and_check(*args: Any, **kwargs: Any) -> Any:
        answer = of_file(*args, **kwargs)
        keys.extend(answer[0] if isinstance(answer, tuple) else answer)
        _refuse_keys(pipeline, twins, keys, lora, model)
        return answer

    vars(loader)["lora_state_dict"] = read_and_check
    vars(loader)["hf_device_map"] = {}  # else hooks of layers that the twins share would be taken off and put on
    path = Path(lora.file)
    with weight_file.in_lower_case(path) as file, _as_request_error(lora, model), _without_weights():
        changes = [untouched(modules[component], each) for component, each in twins.items()]
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
    _refuse_missing(modules, twins, keys, lora, name, model)
    if lora.stamp and weight_file.stamp(path) != lora.stamp:  # it is not what the recipe would say
        raise InvalidRequest(
            f"loras: the file of {lora.name} was replaced while the request waited; send it again", param="loras"
        )
    parts = {component: each for component, each in twins.items() if having(each, name)}
    size = 0
    for component, each in parts.items():
        for where, layer in having(each, name).items():
            _refuse_without_weights(layer, name, f"{component}.{where}", lora, model)
            for tensor in own([layer], name):
                # A copy also on the CPU: what is read is mapped, and changes with a file that is written over.
                tensor.data = tensor.data.to(device, copy=True)
                size += tensor.numel() * tensor.element_size()
    return Read(name, parts, size)


def _refuse_without_weights(layer: Any, name: str, path: str, lora: Lora, model: str) -> None:
    """Raise InvalidRequest for an adapter that needs weights which are only there while their own layer computes."""
    registry = getattr(layer.get_base_layer(), "_diffusers_hook", None)
    if registry and registry.get_hook(_GROUP_OFFLOADING) and name in getattr(layer, "lora_variant", {}):
        raise InvalidRequest(
            f"loras: {lora.name} is a DoRA, which needs the weights of {path}; in {model} they wait in main memory "
            "until that layer computes (offload: group). Name it in the model file (lora_adapter)",
            param="loras",
        )


def own(layers: Iterable[Any], name: str) -> Iterator[torch.Tensor]:
    """The tensors of an adapter in these layers."""
    for layer in layers:
        for kind in layer.adapter_layer_names:
            table: Any = getattr(layer, kind, None)
            part = table[name] if hasattr(table, "keys") and name in table else None
            if isinstance(part, torch.nn.Module):
                yield from part.parameters()
            elif part is not None:
                yield part


class _WithoutRandomNumbers(TorchFunctionMode):
    """New layers begin with zeros: torch's random generator is that of the request which draws meanwhile."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM:
            return (args[0] if args else kwargs["tensor"]).zero_()
        return func(*args, **kwargs)


_RANDOM = frozenset({torch.Tensor.uniform_, torch.Tensor.normal_, *(getattr(init, f"{name}_") for name in _INITIAL)})


@contextmanager
def _without_weights() -> Iterator[None]:
    """Let peft make layers without weights. Its own way changes torch for all threads; this one, which takes its place
    for good, does the same for the thread that calls it.
    """
    tuners_utils.init_empty_weights = lambda: torch.device("meta")
    with _WithoutRandomNumbers():
        yield


def _refuse_missing(
    modules: Mapping[str, torch.nn.Module],
    twins: Mapping[str, Any],
    keys: Sequence[str],
    lora: Lora,
    name: str,
    model: str,
) -> None:
    """Raise InvalidRequest if a layer that the file has is not one of the model's."""
    for component, each in twins.items():
        layers = {_layer(key.removeprefix(f"{component}.")) for key in keys if key.startswith(f"{component}.")}
        found = having(each, name)
        known = {path for path, _ in modules[component].named_modules()}
        if missing := sorted(layer for layer in layers if not _spellings(layer) & known):
            missing = [f"{component}.{path}" for path in missing]
            raise _unfit(lora, model, missing, "has layers that the model does not have")
        if layers and not found:
            raise _unfit(lora, model, sorted(layers), "has layers that its loader does not take")
        if len(found) < len(layers):
            log.warning("%s: diffusers reads %d of the %d layers of %s in %s", model, len(found), len(layers),
                        component, lora.name)  # fmt: skip


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


def _refuse_keys(pipeline: Any, modules: Mapping[str, Any], keys: Sequence[str], lora: Lora, model: str) -> None:
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

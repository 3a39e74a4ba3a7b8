"""Components that are the same in two models are in memory once.

The same means: equal class, configuration, dtype and device, and weight files of equal content. Two models then use one
module, and their requests share its forward passes. Where a model's LoRA, or a hook that offloads, changes the module,
the model gets a twin: another module with the same tensors.
"""

from __future__ import annotations

import copy
import json
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfumato.checkpoints import diffusers_source
from sfumato.config import ModelConfig
from sfumato.models import footprint
from sfumato.models.content_hashes import ContentHashes

CHANGING = ("low_vram", "offload", "vae_slicing", "vae_tiling", "layerwise_casting", "quantization", "cache")
"""Keys of a model file that change its modules: such a model shares nothing."""

PRIVATE_WORDS = ("_name_or_path", "_diffusers_version", "transformers_version", "_commit_hash")
"""Entries of a config.json that say where it comes from."""


_SHARED: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
"""Modules that a second model was loaded with."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a component is, before its weights are read."""

    config: str
    """Its class and configuration, as JSON."""
    files: tuple[Path, ...]
    place: tuple[str, ...]
    """Device and dtype; for a single file also the component's name."""


class Sharing:
    """The components in memory that other models may use too. It keeps none of them. May be used in any thread."""

    def __init__(self, hashes: ContentHashes | None = None) -> None:
        self.hashes = hashes or ContentHashes()
        self._entries: list[tuple[Identity, weakref.ref[torch.nn.Module]]] = []
        self._lock = threading.Lock()

    def of(self, config: ModelConfig) -> Components:
        """For one load."""
        return Components(self, config)

    def find(self, identity: Identity) -> torch.nn.Module | None:
        """The module in memory that is this component, if there is one."""
        with self._lock:
            self._entries = [entry for entry in self._entries if entry[1]() is not None]
            entries = list(self._entries)
        return next((module() for other, module in entries if self._same(identity, other)), None)

    def add(self, identity: Identity, module: torch.nn.Module) -> None:
        """From now on other models may use this module."""
        with self._lock:
            if all(known() is not module for _, known in self._entries):
                self._entries.append((identity, weakref.ref(module)))

    def forget(self, modules: Iterable[torch.nn.Module]) -> None:
        """No other model may use these any more: a request has left them changed."""
        gone = {id(module) for module in modules}
        with self._lock:
            self._entries = [entry for entry in self._entries if id(entry[1]()) not in gone]

    def _same(self, one: Identity, other: Identity) -> bool:
        if (one.config, one.place, len(one.files)) != (other.config, other.place, len(other.files)):
            return False
        try:
            return all(self.hashes.same(*pair) for pair in zip(one.files, other.files, strict=True))
        except OSError:
            return False


class Components:
    """The components of one model that is being loaded which may be shared, by name."""

    def __init__(self, known: Sharing | None = None, config: ModelConfig | None = None) -> None:
        self._known = known
        self._config = config
        self._identities: dict[str, Identity] = {}
        self._given: dict[str, torch.nn.Module] = {}
        """Those that were in memory already."""
        self._originals: dict[str, torch.nn.Module] = {}
        """Those of which the pipeline has twins."""

    def identify(
        self,
        path: Path,
        description: Path,
        own_files: Mapping[str, Path],
        index: Mapping[str, Any],
        variant: str | None,
        place: tuple[str, ...],
    ) -> None:
        """Find out what the components are: of a diffusers folder, of a single file with its `description`, or of
        `description` except those with a file of their own."""
        config = self._config
        if config is None or any(getattr(config, key, None) not in (None, False, "none") for key in CHANGING):
            return
        replaced = {"text_encoder": config.clip_model, "controlnet": config.control_net, "vae": config.vae}
        for name, value in index.items():
            if not isinstance(value, list) or value[1] is None or replaced.get(name):
                continue
            details = diffusers_source.json_of(description / name / "config.json")
            single = own_files.get(name) or (path if path.is_file() and not own_files else None)
            files = [single] if single else footprint.weights_of(description / name, variant)
            if details and files:
                described = {key: word for key, word in details.items() if key not in PRIVATE_WORDS}
                text = json.dumps([value[1], described], sort_keys=True)
                part = (name, config.original_config or "") if single else ()
                self._identities[name] = Identity(text, tuple(files), (*place, *part))

    def find(self) -> dict[str, torch.nn.Module]:
        """Those that are in memory already."""
        found = {name: self._known.find(identity) for name, identity in self._identities.items() if self._known}
        self._given = {name: module for name, module in found.items() if module is not None}
        return dict(self._given)

    @contextmanager
    def kept_from_adapters(self, pipeline: Any) -> Iterator[None]:
        """Inside, adapters are loaded into twins; a component that got none of them is shared itself."""
        if not (self._config and self._config.adapters):
            yield
            return
        names = set(getattr(pipeline, "_lora_loadable_modules", ())) & self._identities.keys()
        modules = {name: getattr(pipeline, name, None) for name in names}
        touched = {name: module for name, module in modules.items() if module is not None and is_plain(module)}
        pipeline.register_modules(**{name: twin(module) for name, module in touched.items()})
        yield
        untouched = [name for name in touched if not getattr(getattr(pipeline, name), "peft_config", None)]
        pipeline.register_modules(**{name: touched.pop(name) for name in untouched})
        self._originals = touched

    @property
    def given(self) -> tuple[torch.nn.Module, ...]:
        """Modules that were in memory already, where they are to be; other threads may use them."""
        return tuple(self._given.values())

    def private_view(self, pipeline: Any) -> Any:
        """The pipeline, with a twin of a VAE that other models use: a preview's map is fitted to it in its own way."""
        if "vae" not in self._given or getattr(pipeline, "vae", None) is not self._given["vae"]:
            return pipeline
        view = copy.copy(pipeline)
        view.__dict__["vae"] = twin(pipeline.vae)
        return view

    def make_known(self, pipeline: Any) -> tuple[torch.nn.Module, ...]:
        """The model is loaded, with all of it on its device: others may share its components.

        Returns those without the model's adapters, of which the pipeline has twins.
        """
        _SHARED.update(self.given)
        for name, original in self._originals.items():
            if original not in self.given:
                _follow(original, getattr(pipeline, name))
        for name, identity in self._identities.items():
            module = self._originals.get(name, getattr(pipeline, name, None))
            if self._known and isinstance(module, torch.nn.Module) and is_plain(module):
                self._known.add(identity, module)
        return tuple(self._originals.values())


def twin(module: torch.nn.Module) -> torch.nn.Module:
    """Another module with the same tensors: adapters, hooks, dtype and device of one are not those of the other."""
    same: dict[int, Any] = {id(buffer): buffer for buffer in module.buffers()}
    same |= {
        id(parameter): torch.nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        for parameter in module.parameters()
    }
    return copy.deepcopy(module, same)


def _follow(original: torch.nn.Module, moved: torch.nn.Module) -> None:
    """Let a module have the tensors of its twin, which was moved to another device and has adapters of its own."""
    for mine, theirs in (
        (original.named_parameters(), moved.named_parameters()),
        (original.named_buffers(), moved.named_buffers()),
    ):
        tensors = {name.replace(".base_layer.", "."): tensor for name, tensor in theirs}  # peft's name for the layer
        for name, tensor in mine:
            tensor.data = tensors[name].data


def is_plain(module: torch.nn.Module) -> bool:
    """Whether its tensors are plain ones: those of quantisers belong to the module that was made for them."""
    return all(type(parameter) is torch.nn.Parameter for parameter in module.parameters())


def unshare(pipeline: Any, given: Iterable[torch.nn.Module] = ()) -> None:
    """Give the pipeline twins of the modules that other models may use, before hooks that offload change them for good.

    `given`: those that it was loaded with just now.
    """
    shared = {id(module) for module in (*_SHARED, *given)}
    modules = {name: module for name, module in pipeline.components.items() if id(module) in shared}
    pipeline.register_modules(**{name: twin(module) for name, module in modules.items() if is_plain(module)})

"""ControlNets and IP-Adapters that a request names: they are beside the model's own components while it draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sfumato.checkpoints import class_reading
from sfumato.checkpoints import controlnets as files
from sfumato.checkpoints import ip_adapters as adapter_files
from sfumato.config import ModelConfig
from sfumato.core import Control, Generation, RecordedControl, labels
from sfumato.drawing import preprocessors
from sfumato.drawing.requested_parts import as_of_request
from sfumato.errors import InvalidRequest
from sfumato.models import controlnets, ip_adapters
from sfumato.models.load import Loaded
from sfumato.models.picture_prompt import Adapter, PicturePrompt, Prompted
from sfumato.pictures import images
from sfumato.residency.pool import ModelPool


@dataclass(frozen=True, slots=True)
class _Named:
    """What follows one control."""

    param: str
    name: str
    config: ModelConfig | None
    """What loads it; None: it is a net of the model file's own."""

    @property
    def prompts(self) -> bool:
        return self.config is not None and self.config.part == "ip_adapter"


@contextmanager
def beside(model: Loaded, generation: Generation, pool: ModelPool, turn: Callable[[], None]) -> Iterator[Loaded]:
    """The model as the request draws with it: with the ControlNets and IP-Adapters that it names, which stay in memory
    meanwhile.

    `turn` lets others run while they are loaded. Raises InvalidRequest naming the control at fault, or what keeps a
    ControlNet or an IP-Adapter from being loaded.
    """
    controls = generation.controls
    if not any(control.name for control in controls) and not model.config.ip_adapters:
        yield model
        return
    named = _named(model, controls)
    taken: list[str] = []
    with ExitStack() as stack:

        def loaded(each: _Named, config: ModelConfig, beside: Sequence[str]) -> Loaded:
            with as_of_request(repr(each.name[:100]), each.param, lambda: _available(model.config.folder)):
                part = stack.enter_context(pool.use(config, turn, generation.keep_alive, beside))
            taken.append(config.name)
            return part

        parts = _used(model, named, loaded)
        drawn = model
        if any(each.prompts for each in named):
            drawn = _prompted(model, controls, named, parts, loaded)
        nets = _nets(model, named, parts)
        if nets and any(each.config for each in named if not each.prompts):
            drawn = controlnets.beside(drawn, nets, [each.param for each in named if not each.prompts])
        digests = {each.name: part.pipeline.digest for each, part in zip(named, parts, strict=True) if part}
        used = [part for part in parts if part]
        del parts
        try:
            yield replace(drawn, net_digests=digests, beside=tuple(taken))
        finally:
            if model.state.broken:
                for part in used:
                    part.state.broken = part.state.broken or model.state.broken


def _used(
    model: Loaded, named: Sequence[_Named], loaded: Callable[[_Named, ModelConfig, Sequence[str]], Loaded]
) -> list[Loaded | None]:
    """What follows each control; None for nets of the model's own.

    All requests take theirs in the same order, each once, whatever the order of their controls: so no two hold one
    each and wait for the other's, which has to be loaded again.
    """
    wanted = {each.config.name: (each, each.config) for each in reversed(named) if each.config}
    taken: dict[str, Loaded] = {}
    for name in sorted(wanted):
        taken[name] = loaded(*wanted[name], [model.config.name, *taken])
    return [taken[each.config.name] if each.config else None for each in named]


def _named(model: Loaded, controls: Sequence[Control]) -> list[_Named]:
    """What follows each control: what it names, else the next of the model file's own."""
    own = iter([None] * len(class_reading.nets_in(model.pipeline)) + list(model.config.ip_adapters))
    named: list[_Named] = []
    for control, label in zip(controls, labels(controls), strict=True):
        param = f"{label}.name"
        if control.joins:
            if not named or not named[-1].prompts:
                raise InvalidRequest(
                    f"{label}.image: only an IP-Adapter takes several pictures", param=f"{label}.image"
                )
            named.append(named[-1])
            continue
        name = control.name or next(own, "")
        if name == "":
            raise InvalidRequest(
                f"{label}: it names no ControlNet, and the file of {model.config.name} has "
                f"{'no more' if named else 'none'}; send its `name`",
                param=param,
            )
        named.append(
            _Named(param, name or "", _config_of(model, name, param, of_file=not control.name) if name else None)
        )
    return named


def _config_of(model: Loaded, name: str, param: str, *, of_file: bool) -> ModelConfig:
    found = adapter_files.find(model.config.folder, name, param)
    if found is None and of_file and (path := (model.config.folder / name).resolve()).is_file():
        found = name, path
    config = ip_adapters.config_of(model, *found) if found else controlnets.config_of(model, name, param)
    return replace(config, part_of_file=of_file)


def _nets(model: Loaded, named: Sequence[_Named], parts: Sequence[Loaded | None]) -> list[Any]:
    """The net of each control that follows one."""
    own = iter(class_reading.nets_in(model.pipeline))
    return [
        part.pipeline.controlnet if part else next(own)
        for each, part in zip(named, parts, strict=True)
        if not each.prompts
    ]


def _prompted(
    model: Loaded,
    controls: Sequence[Control],
    named: Sequence[_Named],
    parts: Sequence[Loaded | None],
    loaded: Callable[[_Named, ModelConfig, Sequence[str]], Loaded],
) -> Loaded:
    """The model with the IP-Adapters of a request, and the image encoder that they need."""
    adapters: list[Prompted] = []
    encoders: dict[str, tuple[_Named, ModelConfig]] = {}
    for place, (control, each, part) in enumerate(zip(controls, named, parts, strict=True)):
        if not each.prompts or part is None or each.config is None:
            continue
        adapter: Adapter = part.pipeline
        if control.joins:
            adapters[-1] = replace(adapters[-1], controls=(*adapters[-1].controls, place))
            continue
        _refuse_settings(control, each)
        adapters.append(_prompt(adapter, place, control))
        if not ip_adapters.own_encoder(model, adapter):
            needed = _encoder_of(model, each, adapter)
            encoders[needed.name] = each, needed
    if len(encoders) > 1 or (encoders and getattr(model.pipeline, "image_encoder", None) is not None):
        param = next(iter(encoders.values()))[0].param
        raise InvalidRequest(
            f"{param}: the IP-Adapters of one request must have the same image encoder, the model's if it has "
            "one; use others",
            param=param,
        )
    beside = [model.config.name, *(part.config.name for part in parts if part)]
    encoder = next((loaded(*each, beside).pipeline for each in encoders.values()), None)
    first = next(each.param for each in named if each.prompts)
    return ip_adapters.beside(model, PicturePrompt(tuple(adapters), first), encoder)


def _prompt(adapter: Adapter, place: int, control: Control) -> Prompted:
    weight, start, end = (
        whole if value is None else value
        for value, whole in ((control.weight, 1.0), (control.start, 0.0), (control.end, 1.0))
    )
    return Prompted(adapter, (place,), weight, start, end)


def _refuse_settings(control: Control, named: _Named) -> None:
    for field in ("mode", "preprocess"):
        if getattr(control, field) is not None:
            param = f"{named.param.removesuffix('.name')}.{field}"
            raise InvalidRequest(f"{param}: an IP-Adapter takes none; leave it out", param=param)


def _encoder_of(model: Loaded, named: _Named, adapter: Adapter) -> ModelConfig:
    if adapter.folder is None or named.config is None:
        needed = adapter.encoder
        raise InvalidRequest(
            f"{named.param}: {named.name[:100]!r} needs an image encoder ({needed.words}) with "
            f"{needed.setting} {needed.width}, and there is none near it; put its folder, image_encoder/ with "
            "config.json and model.safetensors, beside the file",
            param=named.param,
        )
    config = ip_adapters.config_of_encoder(model, named.config, adapter.folder)
    return replace(config, part_of_file=named.config.part_of_file)


def _available(folder: Path) -> str:
    return f"{files.available(folder)}. {adapter_files.available(folder)}"


def recorded(control: Control, model: Loaded) -> RecordedControl:
    """A control as a recipe keeps it."""
    assert isinstance(control.image, bytes)
    fingerprint = images.fingerprint(control.image)
    digest = model.net_digests.get(control.name or "")
    return RecordedControl(
        fingerprint, control.weight, control.start, control.end, control.mode, control.name, digest,
        control.preprocess, control.thresholds, control.joins, preprocessors.recorded(control, model),
    )  # fmt: skip

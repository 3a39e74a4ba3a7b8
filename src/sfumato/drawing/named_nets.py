"""ControlNets that a request names: they are beside the model's own components while the request draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato.checkpoints import class_reading
from sfumato.checkpoints import controlnets as files
from sfumato.config import ModelConfig
from sfumato.core import Control, Generation, RecordedControl
from sfumato.errors import DownloadError, InvalidRequest, LoadError, TooManyRequests
from sfumato.models import controlnets
from sfumato.models.load import Loaded
from sfumato.pictures import images
from sfumato.residency.pool import ModelPool


@contextmanager
def beside(model: Loaded, generation: Generation, pool: ModelPool, turn: Callable[[], None]) -> Iterator[Loaded]:
    """The model as the request draws with it: with the ControlNets that it names, which stay in memory meanwhile.

    `turn` lets others run while they are loaded. Raises InvalidRequest naming the control at fault, or what keeps a
    ControlNet from being loaded.
    """
    if not any(control.name for control in generation.controls):
        yield model
        return
    params = [f"controls[{number}].name" for number in range(len(generation.controls))]
    with ExitStack() as stack:

        def use(config: ModelConfig, beside: Sequence[str]) -> Loaded:
            return stack.enter_context(pool.use(config, turn, generation.keep_alive, beside))

        parts = _used(model, generation, params, use)
        nets = _in_order(model, generation.controls, [part.pipeline.controlnet for part in parts])
        names = [control.name for control in generation.controls if control.name]
        digests = {name: part.pipeline.digest for name, part in zip(names, parts, strict=True)}
        try:
            yield replace(controlnets.beside(model, nets, params), net_digests=digests)
        finally:
            if model.state.broken:
                for part in parts:
                    part.state.broken = part.state.broken or model.state.broken


def _used(
    model: Loaded, generation: Generation, params: Sequence[str], use: Callable[[ModelConfig, Sequence[str]], Loaded]
) -> list[Loaded]:
    """The ControlNet of each control that names one.

    All requests take theirs in the same order, each once, whatever the order of their controls: so no two hold one
    each and wait for the other's, which has to be loaded again.
    """
    wanted: list[tuple[ModelConfig, str, str]] = []
    for control, param in zip(generation.controls, params, strict=True):
        if control.name:
            wanted.append((controlnets.config_of(model, control.name, param), control.name, param))
    taken: dict[str, Loaded] = {}
    for config, name, param in sorted(wanted, key=lambda each: each[0].name):
        if config.name not in taken:
            with _as_of_request(model.config.folder, name, param):
                taken[config.name] = use(config, [model.config.name, *taken])
    return [taken[config.name] for config, _, _ in wanted]


def _in_order(model: Loaded, controls: Sequence[Control], named: Sequence[Any]) -> list[Any]:
    """The net of each control: the one that it names, else the next of the model file's own."""
    own, of_request = iter(class_reading.nets_in(model.pipeline)), iter(named)
    nets = []
    for number, control in enumerate(controls):
        net = next(of_request if control.name else own, None)
        if net is None:
            raise InvalidRequest(
                f"controls[{number}]: it names no ControlNet, and the file of {model.config.name} has "
                f"{'no more' if number else 'none'}; send its `name`",
                param=f"controls[{number}].name",
            )
        nets.append(net)
    return nets


@contextmanager
def _as_of_request(folder: Path, name: str, param: str) -> Iterator[None]:
    """A ControlNet that cannot be loaded is the request's mistake, unless memory or the network is short."""
    try:
        yield
    except DownloadError as error:
        error.message, error.param = f"{param}: {error.message} {files.available(folder)}", param
        raise
    except LoadError as error:
        message = f"{param}: {name[:100]!r}: {error.message}. {files.available(folder)}"
        if type(error) is LoadError:
            raise InvalidRequest(message, param=param) from error
        error.param = param
        raise
    except TooManyRequests as error:  # there is no room for it now
        error.param = param
        raise


def recorded(control: Control, digests: Mapping[str, str]) -> RecordedControl:
    """A control as a recipe keeps it."""
    assert isinstance(control.image, bytes)
    fingerprint = images.fingerprint(control.image)
    digest = digests.get(control.name or "")
    return RecordedControl(
        fingerprint, control.weight, control.start, control.end, control.mode, control.name, digest,
        control.preprocess, control.thresholds,
    )  # fmt: skip

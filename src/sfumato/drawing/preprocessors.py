"""Control pictures made of ordinary ones: edges for a ControlNet that was trained on edges. At the drawn size."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import MappingProxyType

from PIL import Image, ImageOps

from sfumato.config import ModelConfig
from sfumato.core import CANNY, DEPTH, INVERT, POSE, Control, Generation, labels
from sfumato.drawing import skeletons
from sfumato.drawing.requested_parts import as_of_request
from sfumato.errors import InvalidRequest
from sfumato.models import estimators
from sfumato.models.estimators import Estimator
from sfumato.models.load import Loaded
from sfumato.residency.pool import ModelPool

THRESHOLDS = (100.0, 200.0)
"""Of the edges, in levels of 0 .. 255: those that ControlNets were trained with."""

# What they need.


@contextmanager
def beside(
    model: Loaded, generation: Generation, pool: ModelPool, turn: Callable[[], None], of_server: Mapping[str, str]
) -> Iterator[Loaded]:
    """The model with the estimators that the request's preprocessors need, which stay in memory meanwhile.

    `turn` lets others run while they are loaded. `of_server`: kind of estimator -> where it comes from, if neither
    request nor model file says so. Raises InvalidRequest naming the control at fault, or what keeps an estimator from
    being loaded.
    """
    controls = [(f"{label}.preprocess", each) for label, each in
                zip(labels(generation.controls), generation.controls, strict=True) if each.preprocess]  # fmt: skip
    for param, control in controls:
        if control.preprocess == CANNY:
            _opencv(param)
    needed = {_key(control): _configs(model, control, param, of_server) for param, control in controls}
    wanted = {config.name: (param, control, config) for param, control in reversed(controls)
              for config in needed[_key(control)]}  # fmt: skip
    taken: dict[str, Estimator] = {}
    with ExitStack() as stack:
        for name in sorted(wanted):  # all requests in the same order, so that no two wait for each other's
            param, control, config = wanted[name]
            with as_of_request(f"{control.preprocess} with {config.part_file!r} ({config.part})", param):
                used = pool.use(config, turn, generation.keep_alive, [model.config.name, *model.beside, *taken])
                taken[name] = stack.enter_context(used).pipeline
        found = {key: tuple(taken[config.name] for config in configs) for key, configs in needed.items()}
        taken.clear()
        yield replace(model, estimators=found) if found else model


def _configs(model: Loaded, control: Control, param: str, of_server: Mapping[str, str]) -> list[ModelConfig]:
    """What loads the estimators of a control."""
    kinds = estimators.NEEDED.get(control.preprocess or "", ())
    of_file = {estimators.DEPTH_MODEL: model.config.depth_model}
    names = control.estimators or [of_file.get(kind) or of_server.get(kind, "") for kind in kinds]
    with as_of_request(f"{control.preprocess}", param):
        configs = [estimators.config_of(model, kind, name) for kind, name in zip(kinds, names, strict=False)]
    return [replace(config, part_of_file=not control.estimators) for config in configs]


def _key(control: Control) -> tuple[str, tuple[str, ...]]:
    return control.preprocess or "", control.estimators


def recorded(control: Control, model: Loaded) -> tuple[tuple[str, str], ...]:
    """The estimators of a control as a recipe keeps them."""
    return tuple((each.name, each.digest) for each in model.estimators.get(_key(control), ()))


# What they make.


def applied(controls: Sequence[Control], pictures: Sequence[Image.Image], model: Loaded) -> tuple[Image.Image, ...]:
    """The control pictures (RGB), each by what its control asks for."""
    return tuple(
        _PREPROCESSORS[control.preprocess](picture, control, model.estimators.get(_key(control), ()))
        if control.preprocess
        else picture
        for control, picture in zip(controls, pictures, strict=True)
    )


def _opencv(param: str) -> None:
    """Raises InvalidRequest if it is not installed."""
    try:
        importlib.import_module("cv2")  # not an import statement: the package is an extra
    except ImportError:
        raise InvalidRequest(
            f"{param}: canny needs the package opencv-python-headless: pip install 'sfumato[preprocess]'; or send a "
            "picture of edges, without preprocess",
            param=param,
        ) from None


def _canny(picture: Image.Image, control: Control, used: Sequence[Estimator]) -> Image.Image:
    """White edges on black."""
    import numpy as np

    cv2 = importlib.import_module("cv2")
    low, high = control.thresholds or THRESHOLDS
    return Image.fromarray(cv2.Canny(np.asarray(picture), low, high)).convert("RGB")


def _depth(picture: Image.Image, control: Control, used: Sequence[Estimator]) -> Image.Image:
    """White is near, black is far."""
    return Image.fromarray(used[0].depth(picture).numpy()).convert("RGB")


def _pose(picture: Image.Image, control: Control, used: Sequence[Estimator]) -> Image.Image:
    """The people in it as skeletons; black if there are none."""
    detector, poses = used
    return skeletons.drawn(poses.poses(picture, detector.people(picture)), picture.size)


def _inverted(picture: Image.Image, control: Control, used: Sequence[Estimator]) -> Image.Image:
    """For drawings that are black on white."""
    return ImageOps.invert(picture)


_PREPROCESSORS: Mapping[str, Callable[[Image.Image, Control, Sequence[Estimator]], Image.Image]] = MappingProxyType(
    {CANNY: _canny, DEPTH: _depth, POSE: _pose, INVERT: _inverted}
)

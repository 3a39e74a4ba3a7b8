"""A module as an OpenVINO graph: converted in memory from the live module, kept on disk, compiled for this CPU."""

from __future__ import annotations

import copy
import gc
import importlib
import importlib.util
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch.utils import _pytree as pytree

from sfumato.batching.calls import target
from sfumato.errors import told
from sfumato.runners import module_state
from sfumato.runners.arguments import Arguments, Unserved, fixed

Precision: TypeAlias = Literal["fp32", "bf16"]

HINTS = {"fp32": "f32", "bf16": "bf16"}
"""OpenVINO's names."""

ANGLES = ("Sin", "Cos")
"""Operations whose arguments are time steps and positions: numbers beyond what bf16 tells apart."""

GRAPH = "graph.xml"


def installed() -> bool:
    """Whether the extra `openvino` is."""
    return importlib.util.find_spec("openvino") is not None


def library() -> Any:
    """The package, which without this would report its use to its makers."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module("openvino")


def processor() -> str:
    """Name of this machine's CPU."""
    return str(library().Core().get_property("CPU", "FULL_DEVICE_NAME"))


def has_bf16() -> bool:
    """Whether this CPU computes in bfloat16."""
    return "BF16" in library().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@dataclass(frozen=True, slots=True)
class Form:
    """What a module returns: the nesting of its tensors, and their dtypes."""

    spec: Any
    dtypes: tuple[torch.dtype, ...]

    def of(self, tensors: Sequence[torch.Tensor], return_dict: bool | None) -> Any:
        """The module's output, made of a graph's."""
        typed = tuple(tensor.to(dtype) for tensor, dtype in zip(tensors, self.dtypes, strict=True))
        return typed if return_dict is False else pytree.tree_unflatten(typed, self.spec)


def form(module: Any, method: str, arguments: Arguments) -> Form:
    """Run the module without numbers. Raises Unserved if its way depends on them, or if it returns other things.

    It is a copy that runs, on the same tensors: some modules keep what they have computed for a size (Qwen-Image).
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # with it comes much that nothing else needs

    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad(), _quiet():
            dtype = next(module.parameters()).dtype
            inputs = [mode.from_tensor(_in(tensor, dtype)) for tensor in arguments.tensors]
            output = target(module_state.copied(module), method)(**arguments.rebuilt(inputs))
    except Exception as error:  # whatever a module raises
        raise Unserved(f"it cannot be traced: {told(error)}") from error
    parts = output if type(output) is tuple else tuple(output.values()) if hasattr(output, "values") else ()
    nested = [part if type(part) is tuple else (part,) for part in parts]  # all hidden states of a text encoder
    if not parts or not all(isinstance(value, torch.Tensor) for part in nested for value in part):
        raise Unserved(f"it returns a {type(output).__name__}")
    values, spec = pytree.tree_flatten(output)
    return Form(spec, tuple(value.dtype for value in values))


def _in(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dim() > 1 else tensor


class _Traced(torch.nn.Module):
    """The module as a function of tensors alone."""

    def __init__(self, module: Any, method: str, arguments: Arguments) -> None:
        super().__init__()
        self.module = module
        self.method = method
        self.arguments = arguments

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        more = {} if self.arguments.return_dict is None else {"return_dict": False}
        output = target(self.module, self.method)(**self.arguments.rebuilt(tensors), **more)
        return tuple(pytree.tree_leaves(output))


def convert(module: Any, method: str, arguments: Arguments, folder: Path) -> None:
    """Write the module's graph for calls like this one into `folder`, whole or not at all.

    The module itself is only read. What is traced is a copy of its layers in full precision, as sixteen bits would be
    rounded in other places; if the module is in full precision, the copy shares its tensors.
    """
    ov = library()
    with torch.no_grad(), _quiet():
        traced = _Traced(_full_precision_copy(module), method, arguments).eval()
        model = ov.convert_model(traced, example_input=arguments.tensors)
        if len(model.inputs) != len(arguments.tensors):
            raise Unserved("some of its arguments have no effect on its graph")
        model.reshape({at: ov.PartialShape(fixed(tensor)) for at, tensor in enumerate(arguments.tensors)})
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as part:
            ov.save_model(model, Path(part) / GRAPH, compress_to_fp16=False)
            shutil.rmtree(folder, ignore_errors=True)
            Path(part).rename(folder)
            Path(part).mkdir()  # for the context manager to remove
    del traced, model
    gc.collect()


def _full_precision_copy(module: Any) -> Any:
    """The same layers in other objects, on tensors of 32 bits: its own ones where they have them."""
    same: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        full = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
        same[id(tensor)] = torch.nn.Parameter(full, False) if isinstance(tensor, torch.nn.Parameter) else full
    return copy.deepcopy(module, same)


class Graph:
    """A graph that is ready to compute. Use it in one thread at a time."""

    def __init__(self, folder: Path, precision: Precision, threads: int) -> None:
        """Raises what OpenVINO raises if the files are damaged."""
        ov = library()
        core = ov.Core()
        options = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # other threads of this process, and other processes, compute as well
        }
        model = core.read_model(folder / GRAPH)
        head, body = _with_angles_apart(ov, model) if precision == "bf16" else (None, model)
        self._head = _request(core, head, {**options, "INFERENCE_PRECISION_HINT": "f32"}) if head else None
        self._body = _request(core, body, options)
        self.bytes = _bytes(folder, precision)

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        arrays = [tensor.numpy() for tensor in tensors]
        angles = list(self._head.infer(arrays).to_tuple()) if self._head else []
        outputs = self._body.infer([*arrays, *angles]).to_tuple()
        return [torch.from_numpy(np.asarray(output)) for output in outputs]


def _request(core: Any, model: Any, options: dict[str, Any]) -> Any:
    return core.compile_model(model, "CPU", options).create_infer_request()


def _with_angles_apart(ov: Any, model: Any) -> tuple[Any, Any]:
    """The graph in two: sines and cosines, to be computed in full precision as diffusers does, and the rest.

    The first takes all inputs; the second takes the results of the first as further ones.
    """
    angles = [each.output(0) for each in model.get_ordered_ops() if each.get_type_name() in ANGLES]
    if not angles:
        return None, model
    head = ov.Model(angles, model.get_parameters()).clone()
    places = []
    for angle in angles:
        place = ov.opset13.parameter(angle.get_partial_shape(), angle.get_element_type())
        for reader in list(angle.get_target_inputs()):
            reader.replace_source_output(place.output(0))
        places.append(place)
    return head, ov.Model(model.get_results(), [*model.get_parameters(), *places])


def _bytes(folder: Path, precision: Precision) -> int:
    """What a graph takes in memory: its file, which is mapped, and its weights as the kernels want them."""
    weights = (folder / GRAPH).with_suffix(".bin").stat().st_size
    return weights + (weights if precision == "fp32" else weights // 2)


@contextmanager
def _quiet() -> Iterator[None]:
    """Tracing warns of every size that is compared; what a graph computes is checked at its first call of each size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

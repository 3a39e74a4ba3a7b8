"""How much memory a model takes: told from its weight files beforehand, and measured once it is loaded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from sfumato.checkpoints import contents, variants, weight_header
from sfumato.errors import LoadError

BYTES: Mapping[str, int] = {"fp16": 2, "bf16": 2, "fp32": 4}
"""Bytes of a number, by dtype."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types of safetensors that are cast to the model's dtype when they are loaded."""

FP8 = frozenset({"F8_E4M3", "F8_E5M2"})

OTHERS: Mapping[str, int] = {
    "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
"""Bytes of a number of the other types, which stay as they are."""

ACTIVATIONS = 0.15
"""What a component needs besides its weights while it computes, as a fraction of them: an estimate."""

LAYERS = 0.1
"""The part of a component that is on an accelerator at a time if its layers wait in main memory: an estimate."""

PREFIXES = (
    ("model.diffusion_model.", "unet"),
    ("first_stage_model.", "vae"),
    ("vae.", "vae"),
    ("cond_stage_model.", "text_encoder"),
    ("conditioner.embedders.0.", "text_encoder"),
    ("conditioner.embedders.1.", "text_encoder_2"),
    ("text_encoders.", "text_encoder"),
)
"""Beginnings of the names in a single file → the component."""

Block: TypeAlias = tuple[str, int]
"""A tensor's memory: device type and address."""

Blocks: TypeAlias = Mapping[Block, int]
"""Memory blocks → bytes."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of the weights of each component, on a device in a dtype; none if the files do not tell."""

    components: Mapping[str, int]
    device: str = "cpu"
    dtype: str = "fp32"
    shared: Blocks = field(default_factory=dict)
    """What it will use of components in memory: they stay there while it waits, also if their model leaves."""
    by_layer: bool = False
    """Whether its layers wait in main memory, so that no component is ever whole on an accelerator."""

    @property
    def total(self) -> int:
        return sum(self.components.values())

    @property
    def shared_there(self) -> Blocks:
        """The shared blocks as they will be on the device; some may still be in main memory."""
        kind = self.device.partition(":")[0]
        return {(kind, address): size for (_, address), size in self.shared.items()}

    @property
    def largest(self) -> int:
        """Of the largest component, with an estimate for its activations: enough if the others are offloaded."""
        part = LAYERS if self.by_layer else 1
        return math.ceil(max(self.components.values(), default=0) * (part + ACTIVATIONS))

    def __str__(self) -> str:
        largest = sorted(self.components.items(), key=lambda each: -each[1])
        return ", ".join(f"{name} {in_words(size)}" for name, size in largest if size)


def in_words(size: float) -> str:
    """`1.5 GiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def of_files(
    path: Path, index: Mapping[str, Any], dtype: str, variant: str | None, without: Iterable[str] = ()
) -> dict[str, int]:
    """Bytes that each component in a diffusers folder or single file will take in `dtype`, except those `without`."""
    if path.is_dir():
        names = [name for name, value in index.items() if isinstance(value, list) and value[1] is not None]
        sizes = of_folders({name: path / name for name in names}, dtype, variant)
    else:
        sizes = _of_single_file(path, dtype)
    left_out = set(without)
    return {name: size for name, size in sizes.items() if size and name not in left_out}


def of_folders(folders: Mapping[str, Path], dtype: str, variant: str | None) -> dict[str, int]:
    """Bytes that each component will take, of its folder."""
    return {name: sum(_size(file, dtype) for file in weights_of(path, variant)) for name, path in folders.items()}


def of_part(path: Path, name: str, dtype: str) -> int:
    """Bytes that one component takes, of its file or folder, which may be a pipeline's with a folder `name` in it."""
    if path.is_file():
        return _size(path, dtype)
    return sum(_size(file, dtype) for file in weights_of(path / name, None) or weights_of(path, None))


def weights_of(folder: Path, variant: str | None) -> list[Path]:
    """The weight files of a component's folder that are loaded: of the variant, else the plain ones, else any."""
    by_variant: dict[str | None, list[Path]] = {}
    files = [file for file in sorted(folder.glob("*")) if file.suffix in (".safetensors", ".bin")]
    safe = [file for file in files if file.suffix == ".safetensors"]
    for file in safe or files:
        by_variant.setdefault(variants.of(f"{folder.name}/{file.name}"), []).append(file)
    return by_variant.get(variant) or by_variant.get(None) or next(iter(by_variant.values()), [])


def _size(file: Path, dtype: str) -> int:
    try:
        return sum(size for _, size in _tensors(file, dtype))
    except (LoadError, KeyError):
        return file.stat().st_size if file.exists() else 0


def _of_single_file(path: Path, dtype: str) -> dict[str, int]:
    try:
        sizes: Counter[str] = Counter()
        for name, size in _tensors(path, dtype):
            sizes[next((part for prefix, part in PREFIXES if name.startswith(prefix)), "denoiser")] += size
        return dict(sizes)
    except (LoadError, KeyError):  # pickles and quantised files: about their size
        return {"denoiser": path.stat().st_size}


def _tensors(file: Path, dtype: str) -> list[tuple[str, int]]:
    """Name of each tensor in a safetensors file, and the bytes it takes in `dtype`. Raises KeyError for other types."""
    header = weight_header.of_file(file)
    # What is in fp8 stays so in the layouts of quantisers alone.
    cast = FLOATS if contents.of(header).quantised in contents.READABLE else FLOATS | FP8
    sizes = {**OTHERS, **dict.fromkeys(cast, BYTES[dtype])}
    tensors = header.tensors
    return [(name, math.prod(tensor.shape) * sizes[tensor.dtype]) for name, tensor in tensors.items()]


def blocks(modules: Iterable[Any]) -> dict[Block, int]:
    """The memory blocks of these modules' tensors; two modules that share a tensor share its block."""
    found: dict[Block, int] = {}
    for module in modules:
        for tensor in tensors_of(module):
            if tensor.device.type != "meta" and tensor.numel():
                found[block(tensor)] = tensor.numel() * tensor.element_size()
    return found


def block(tensor: torch.Tensor) -> Block:
    """The memory block of a plain tensor."""
    return tensor.device.type, tensor.data_ptr()


def tensors_of(module: Any) -> Iterator[torch.Tensor]:
    """The tensors that hold a module's weights: of a quantised one its numbers and scales, not what it stands for."""
    for tensor in (*module.parameters(), *module.buffers()):
        yield from _inner(tensor)


def _inner(tensor: Any) -> Iterator[torch.Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _inner(getattr(tensor, name))


def modules_of(pipeline: Any) -> list[torch.nn.Module]:
    """A pipeline's components that have weights."""
    return [module for module in vars(pipeline).values() if isinstance(module, torch.nn.Module)]

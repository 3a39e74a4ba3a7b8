"""What the tensors of this process take."""

from __future__ import annotations

import gc

import torch
from torch._subclasses.fake_tensor import FakeTensor


def tensors() -> list[torch.Tensor]:
    """Those that are alive. Fake ones, which torch.compile keeps of other tests' modules, have no memory."""
    gc.collect()
    found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return [each for each in found if not isinstance(each, FakeTensor)]


def held() -> int:
    """Bytes of all tensors."""
    storages = [each.untyped_storage() for each in tensors()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

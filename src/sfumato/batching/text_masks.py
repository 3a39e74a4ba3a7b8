"""Masked text of different lengths: which parameters these are, and how they are joined.

The names are read from a method's signature: `encoder_hidden_states` with `encoder_attention_mask`,
`encoder_hidden_states_2` with `encoder_attention_mask_2` and so on. Names prove nothing: a module may take a mask and
still use the padding, so padded text has its own signature (`~text`) and must be proved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

TEXTS = ("encoder_hidden_states", "hidden_states")
"""Names of text embeddings, in order of preference; a prefix or suffix must also occur in their mask's name."""

MASKS = (
    "encoder_hidden_states_mask",
    "encoder_attention_mask",
    "text_embedding_mask",
    "encoder_mask",
    "attention_mask",
)
"""Names of masks: 1 or true for a valid token. The first existing one is used."""


def pairs(parameters: Iterable[str]) -> dict[str, str]:
    """Name of each text among `parameters` → name of its mask."""
    names = set(parameters)
    mask_of: dict[str, str] = {}
    masked: set[str] = set()
    for text in TEXTS:
        for name in sorted(name for name in names - {"hidden_states"} if text in name):
            before, _, after = name.partition(text)
            mask = next((mask for mask_name in MASKS if (mask := before + mask_name + after) in names), None)
            if mask and mask not in masked and not name.endswith("_mask"):
                mask_of[name] = mask
                masked.add(mask)
    return mask_of


def present(arguments: Mapping[str, Any], masks: Mapping[str, str], rows: int) -> dict[str, str]:
    """The entries of `masks` whose text is [rows, tokens, features] here, with a mask [rows, tokens] or no mask."""
    return {text: mask for text, mask in masks.items() if _fit(arguments.get(text), arguments.get(mask), rows)}


def _fit(text: Any, mask: Any, rows: int) -> bool:
    if not isinstance(text, torch.Tensor) or text.dim() != 3 or text.shape[0] != rows:
        return False
    return mask is None or (isinstance(mask, torch.Tensor) and mask.shape == text.shape[:2])


def padded(value: torch.Tensor, length: int) -> torch.Tensor:
    """`value` [n, tokens, ...] with zeros up to `length` tokens."""
    missing = length - value.shape[1]
    return value if not missing else torch.cat([value, value.new_zeros(len(value), missing, *value.shape[2:])], 1)


def joined(texts: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """One mask for `texts` padded to the longest; None if none is needed and there was none."""
    longest = max(text.shape[1] for text in texts)
    existing = next((mask for mask in masks if mask is not None), None)
    if existing is None and all(text.shape[1] == longest for text in texts):
        return None
    dtype = torch.bool if existing is None else existing.dtype
    full_masks = [
        torch.ones(text.shape[:2], dtype=dtype, device=text.device) if mask is None else mask.to(dtype)
        for text, mask in zip(texts, masks, strict=True)
    ]
    return torch.cat([padded(mask, longest) for mask in full_masks])

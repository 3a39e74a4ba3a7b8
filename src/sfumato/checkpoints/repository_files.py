"""Which files of a repository a pipeline needs, by diffusers' own rules.

`DiffusionPipeline.download` uses the same rules but does not report its progress, so the files are chosen and
downloaded here first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from diffusers.pipelines import pipeline_loading_utils as rules
from diffusers.utils.constants import TRANSFORMERS_COMPONENT_AUX_FILES

ROOT = frozenset({"model_index.json", "config.json", "scheduler_config.json", *TRANSFORMERS_COMPONENT_AUX_FILES})
"""Files beside the folders of the components."""

OTHERS = (".msgpack", ".onnx", ".pb")
"""Weights of other libraries."""


def needed(names: Collection[str], index: Mapping[str, Any], variant: str | None, *, pickles: bool) -> list[str]:
    """The files that a pipeline needs, of `names`: all files of a repository with this `model_index.json`.

    Weights are of `variant`; of a component without it, the plain ones (None). Empty if the repository does not have
    the variant, or has only pickles and these are not allowed.
    """
    names = [name for name in names if name not in index.get("_ignore_files", ())]
    folders = {name for name, part in index.items() if isinstance(part, list) and name != "_class_name"}
    with_weights = {folder for name in rules.filter_model_files(names) if (folder := _folder(name)) in folders}
    safe = rules.is_safetensors_compatible(names, folder_names=with_weights, variant=variant)
    if not (safe or pickles):
        return []
    left_out = (*OTHERS, ".bin" if safe else ".safetensors")
    try:
        weights, _ = rules.variant_compatible_siblings(names, variant, [f"*{ending}" for ending in left_out])
    except ValueError:  # no file is of this variant
        return []
    selected = {*weights, *ROOT, *(f"{folder}/config.json" for folder in with_weights)}
    other_folders = tuple(f"{folder}/" for folder in folders - with_weights)
    return [
        name
        for name in names
        if (name in selected or name.startswith(other_folders)) and not name.partition(".index.")[0].endswith(left_out)
    ]


def _folder(name: str) -> str:
    return name.rpartition("/")[0]

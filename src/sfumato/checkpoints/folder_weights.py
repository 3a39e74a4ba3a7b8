"""Whether a folder in diffusers' layout has whole weights for each component: their headers tell."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from pathlib import Path

from sfumato.checkpoints import diffusers_source, sources, weight_header
from sfumato.errors import LoadError

_NO_WEIGHTS = re.compile(r"Tokenizer|Scheduler|Processor|FeatureExtractor")
"""Classes of components that have none."""


def refuse_damaged(folder: Path, label: str, *, pickles: bool, without: Container[str] = ()) -> None:
    """Raises LoadError if a component's weights are cut short, damaged, not all there or in pickles alone.

    `without`: components that come from elsewhere.
    """
    for part in _parts(folder):
        if part in without:
            continue
        names = sorted(path.name for path in (folder / part).iterdir())
        weights = [name for name in names if name.endswith(".safetensors")]
        if not weights and not pickles:
            kind = "in pickles alone" if any(name.endswith(sources.PICKLES) for name in names) else "missing"
            raise LoadError(
                f"{label}: the weights of {part} are {kind}; .safetensors files are needed. Take a repository that has "
                "them, or set `allow_pickle: true` if they are there and you trust them",
                param="parameters.model",
            )
        for name in weights:
            weight_header.of_file(folder / part / name)
        for index in (name for name in names if re.fullmatch(r".*\.safetensors\.index(\.\w+)?\.json", name)):
            listed = diffusers_source.json_of(folder / part / index).get("weight_map")
            needed = set(listed.values()) if isinstance(listed, dict) else set()
            present = needed & set(names)
            if present and present != needed:  # of a variant that is not loaded none is there
                raise LoadError(
                    f"{label}: {part} lacks {', '.join(sorted(map(str, needed - present))[:3])}, which {index} lists. "
                    "Download it again",
                    param="parameters.model",
                )


def _parts(folder: Path) -> Iterator[str]:
    for part, value in diffusers_source.json_of(folder / sources.INDEX).items():
        known = isinstance(value, list) and len(value) == 2 and value[0] in ("diffusers", "transformers")
        if known and not _NO_WEIGHTS.search(str(value[1])) and (folder / part / "config.json").is_file():
            yield part

"""The verdicts of proofs, kept in a file: the next process batches from its first step.

A verdict is keyed by the code that ran: the source of the module's classes, its configuration, precision and device,
torch's version, and the structure of the call. If any of these changes, so does the key, and the proof is repeated.
The file is optional: if it is missing, damaged, of another format or not writable, that costs a few
forward passes.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sfumato.batching.calls import original_module
from sfumato.pipelines import source_digest

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of the file and of the proof's tests: verdicts of another version are ignored."""

MAX_VERDICTS = 1000
"""Maximum number of verdicts; the oldest are dropped."""

MAX_BYTES = 8 << 20
"""In bytes. A larger file was not written by this module."""

NAME = "proofs.json"

ENVIRONMENT_VARIABLE = "SFUMATO_PROOFS"
"""Environment variable with the file's path, for the server and for `gather`."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result for one signature."""

    signature: str
    refused: str
    """Why its calls run alone; empty if they may be batched."""
    shown: str = ""
    """Date of the proof."""


class Proofs:
    """The verdicts in one file. Processes may share it: each merges its own verdicts into the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._verdicts: dict[str, Verdict] | None = None
        self._keys: dict[int, tuple[weakref.ref[Any], str]] = {}

    def get(self, module: Any, signature: str) -> Verdict | None:
        if self._verdicts is None:
            self._verdicts = self._read()
        verdict = self._verdicts.get(self._key(module, signature))
        return verdict if verdict and verdict.signature == signature else None

    def put(self, module: Any, signature: str, refused: str) -> None:
        verdict = Verdict(signature, refused, datetime.date.today().isoformat())
        # Another process may have written since.
        verdicts = {**(self._verdicts or {}), **self._read()}
        key = self._key(module, signature)
        verdicts.pop(key, None)
        verdicts[key] = verdict
        self._verdicts = dict(list(verdicts.items())[-MAX_VERDICTS:])
        try:
            self._write(self._verdicts)
        except OSError as error:
            log.warning("batching verdicts cannot be saved in %s: %s", self._path, error)

    def _key(self, module: Any, signature: str) -> str:
        entry = self._keys.get(id(module))
        if entry is None or entry[0]() is not module:
            entry = self._keys[id(module)] = (weakref.ref(module), _code(module))
        return hashlib.blake2b(f"{entry[1]}\n{signature}".encode(), digest_size=16).hexdigest()

    def _read(self) -> dict[str, Verdict]:
        try:
            if self._path.stat().st_size > MAX_BYTES:
                return {}
            content = json.loads(self._path.read_bytes())
            if content["format"] != FORMAT:
                return {}
            return {str(key): Verdict(**{**entry}) for key, entry in content["proofs"].items() if _is_entry(entry)}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.warning("%s cannot be read and will be rewritten: %s", self._path, error)
            return {}

    def _write(self, verdicts: Mapping[str, Verdict]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "proofs": {key: asdict(verdict) for key, verdict in verdicts.items()}}
        with tempfile.NamedTemporaryFile(
            "w", dir=self._path.parent, prefix=f".{self._path.name}.", encoding="utf-8", delete=False
        ) as file:
            try:
                json.dump(content, file, indent=1)
                file.close()
                Path(file.name).replace(self._path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise


def of_server(file: str, data: Path) -> Path:
    """The file of a server with these settings: `proofs`, else one in the data folder."""
    return Path(file) if file else data / NAME


def of_user() -> Path:
    """The file without a server's data folder: `SFUMATO_PROOFS`, else a file in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(ENVIRONMENT_VARIABLE) or cache / "sfumato" / NAME)


def _is_entry(entry: Any) -> bool:
    fields = Verdict.__slots__
    return isinstance(entry, dict) and entry.keys() == set(fields) and all(isinstance(v, str) for v in entry.values())


def _code(module: Any) -> str:
    """Everything that decides how a module computes, except its weights."""
    inner = original_module(module)
    devices = {parameter.device.type for parameter in inner.parameters()}
    parts = {
        "source": source_digest.source_digest(inner),
        "config": _config(inner),
        "precision": sorted({str(parameter.dtype) for parameter in inner.parameters()}),
        "devices": sorted(torch.cuda.get_device_name() if device == "cuda" else device for device in devices),
        "torch": torch.__version__,
    }
    return json.dumps(parts, sort_keys=True, default=str)


def _config(module: Any) -> dict[str, Any]:
    """A model's configuration, without its path and the version that wrote it."""
    config = getattr(module, "config", None) or {}
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        return {"config": repr(config)}
    left_out = ("_name_or_path", "_diffusers_version", "transformers_version")
    return {str(key): value for key, value in config.items() if key not in left_out}

"""The shape of the house: imports point down, and the API process has no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import sfumato

ROOT = Path(sfumato.__file__).parent

LAYERS = [
    {"cli"},
    {"draw", "serve"},
    {"api"},
    {"check", "service"},
    {"planning"},
    {"metrics"},
    {"job"},
    {"engine"},
    {"catalog"},
    {"decoder"},
    {"sources"},
    {"decoding"},
    {"fitting", "recipe"},
    {"config", "fetch", "logs", "pictures", "store"},
    {"allocator", "budget", "frames", "queue", "resolving", "schedulers", "settings"},
    {"core"},
    {"errors"},
]
"""Top to bottom. A module imports from lower layers, or from its own package."""

ENGINE = [
    {"local", "supervisor", "worker"},
    {"loop", "streams"},
    {"tally"},
    {"generation", "memory", "residency"},
    {"facts", "foreseen"},
    {"arguments"},
    {"tokens"},
    {"kinds"},
    {"gather", "load"},
    {"batching", "download", "drivers", "sampler", "watch"},
    {"task"},
    {"outcomes"},
    {"joins", "memo", "preview", "standin", "trust"},
    {"proof", "proofs"},
    {"calls", "clean", "colours", "one_file"},
    {
        "adapters",
        "caches",
        "fingerprints",
        "handover",
        "imports",
        "masks",
        "offload",
        "outputs",
        "policy",
        "process",
        "protocol",
        "reasons",
        "release",
        "resolve",
        "sources",
        "steps",
        "threads",
        "threadstate",
        "tiling",
        "wire",
    },
]

WITHOUT_TORCH = [
    "sfumato.cli",
    "sfumato.commands.serve",
    "sfumato.commands.generate",
    "sfumato.commands.check",
    "sfumato.api.app",
    "sfumato.serving.service",
]


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rank(layers: list[set[str]], name: str) -> int:
    matches = [index for index, layer in enumerate(layers) if name in layer]
    assert matches, f"{name} stands in no layer: add it where it belongs"
    return matches[0]


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))


def test_imports_point_down() -> None:
    for path in modules():
        parts = path.relative_to(ROOT).with_suffix("").parts
        for name in imported(path):
            if not name.startswith("sfumato."):
                continue
            target = name.split(".")[1:]
            if target[0].startswith("__"):
                continue
            if parts[0] == target[0] and len(parts) > 1:
                if parts[0] == "engine":
                    assert rank(ENGINE, parts[1]) < rank(ENGINE, target[1]), f"{path} imports {name}: upward"
                continue
            assert rank(LAYERS, parts[0]) < rank(LAYERS, target[0]), f"{path} imports {name}: upward"


def test_no_file_is_large() -> None:
    sizes = {path.name: len(path.read_text().splitlines()) for path in modules()}
    assert {name: size for name, size in sizes.items() if size > 450} == {}


def test_the_api_process_has_no_torch() -> None:
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {WITHOUT_TORCH}]; "
        "print([name for name in ('torch', 'diffusers', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

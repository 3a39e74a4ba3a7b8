"""The shape of the house: rooms import from lower rooms only, no modules in a circle, no torch in the API process."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import sfumato

ROOT = Path(sfumato.__file__).parent

ROOMS = [
    "cli", "commands", "ray_serve", "api", "serving", "process", "engine", "drawing", "residency", "models",
    "checkpoints", "previews", "runners", "batching", "pipelines", "pictures", "config", "logs", "schedulers",
    "settings", "allocator", "core", "status", "sampling", "loras", "formats", "disk", "errors",
]  # fmt: skip
"""Top to bottom: a folder or a file of `src/sfumato`. A module imports from lower rooms, or from its own."""

WITHOUT_TORCH = [
    "sfumato.cli", "sfumato.commands.serve", "sfumato.commands.generate", "sfumato.commands.check", "sfumato.api.app",
    "sfumato.commands.add", "sfumato.commands.models", "sfumato.commands.remove",
    "sfumato.serving.service", "sfumato.process.supervisor", "sfumato.engine.protocol",
]  # fmt: skip


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Modules of ours that this one imports, at its top or inside its functions; not those for types alone."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for_types = {id(inner) for node in ast.walk(tree) if _is_for_types(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found - {"sfumato"}


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


GRAPH = {name: imported(path) for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_room_has_its_place() -> None:
    assert {room(name) for name in MODULES if name != "sfumato"} == set(ROOMS)


def test_imports_point_down() -> None:
    upward = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if module != "sfumato" and room(module) != room(other) and ROOMS.index(room(module)) > ROOMS.index(room(other))
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    tuple(TopologicalSorter(GRAPH).static_order())  # raises CycleError, which names them


def test_no_file_is_large() -> None:
    sizes = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: size for name, size in sizes.items() if size > 450} == {}


def test_every_room_says_what_it_is() -> None:
    for name, path in MODULES.items():
        assert ast.get_docstring(ast.parse(path.read_text())), f"{name} has no docstring"


def test_every_room_is_on_the_map() -> None:
    page = (ROOT.parent.parent / "docs/concepts/architecture.md").read_text()
    assert [name for name in ROOMS if f"`{name}" not in page] == []


def test_the_api_process_has_no_torch() -> None:
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {WITHOUT_TORCH}]; "
        "print([name for name in ('torch', 'diffusers', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_source_is_parsed_in_one_place() -> None:
    """Two threads that parse at once fail in Python 3.11: `pipelines.syntax` has the lock."""
    assert [name for name, path in MODULES.items() if "ast.parse(" in path.read_text()] == ["sfumato.pipelines.syntax"]


LONGEST = 60
"""Lines of a function. Routes were closures of one of 148."""


def test_no_function_is_longer_than_a_screen() -> None:
    long = {
        f"{module}.{node.name}"
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > LONGEST
    }
    assert not long


def test_no_test_module_imports_another() -> None:
    """What two need stands in `tests/support`."""
    tests = Path(__file__).parent
    names = {path.stem for path in tests.glob("test_*.py")}
    for path in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            of = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            of += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not names & {name.partition(".")[0] for name in of}, f"{path.name}:{node.lineno}"

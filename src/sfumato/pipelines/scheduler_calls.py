"""What a diffusers pipeline passes to its scheduler, read from the pipeline's source.

diffusers does not document which scheduler fits which pipeline, and a wrong one fails in the middle
of a request: FLUX passes its own `sigmas` and a `mu` to `set_timesteps`, and a scheduler without
such arguments raises. The calls appear in the pipeline class in one of two forms, so we read them:

    retrieve_timesteps(self.scheduler, num_inference_steps, device, sigmas=sigmas, mu=mu)
    self.scheduler.set_timesteps(num_inference_steps, device=device)

If the code depends on a condition, we assume that the argument may be passed. For the classes of the diffusers that
Sfumato was made with, the answers are in a table (`source_table`); any other class is read on first use.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any, Literal, TypeAlias

from sfumato.pipelines import modular, source_table, syntax
from sfumato.pipelines.source_table import Unreadable

Condition: TypeAlias = Literal["never", "if_dynamic", "unless_flow_sigmas", "always"]
"""When an argument has a value if the caller passes none to the pipeline: never (None is passed),
only on models with `use_dynamic_shifting`, unless the scheduler has `use_flow_sigmas`, always."""

_POSITIONAL = {
    "retrieve_timesteps": ("scheduler", "num_inference_steps", "device", "timesteps", "sigmas"),
    "set_timesteps": ("num_inference_steps", "device"),
}
_PLAIN = {"scheduler", "num_inference_steps", "device"}

MODULAR = "diffusers.modular_pipelines."
"""Modules of the blocks."""


@dataclass(frozen=True, slots=True)
class SetStepsCall:
    """One call that sets the steps: its arguments besides their number and the device."""

    arguments: Mapping[str, Condition]
    optional: frozenset[str]
    """Those that are omitted from the call, rather than passed as None, if they have no value."""

    def with_values(self, config: Mapping[str, Any]) -> set[str]:
        """The arguments that have a value with a scheduler of this config."""
        is_met = {
            "never": False,
            "if_dynamic": bool(config.get("use_dynamic_shifting")),
            "unless_flow_sigmas": not config.get("use_flow_sigmas"),
            "always": True,
        }
        return {name for name, when in self.arguments.items() if is_met[when]}

    def names(self, config: Mapping[str, Any]) -> set[str]:
        """The arguments that `set_timesteps` must accept."""
        return (self.arguments.keys() - self.optional) | self.with_values(config)


@dataclass(frozen=True, slots=True)
class SchedulerUse:
    runs: tuple[SetStepsCall, ...]
    step_arguments: frozenset[str]
    """Keywords that are always passed to `step`."""
    generator: bool
    """Whether the caller's generator reaches `step`: by name, by position or in `**extra_step_kwargs`."""
    uses: frozenset[str]
    """Attributes of the scheduler that the pipeline uses."""
    guarded: frozenset[str]
    """Those of them that are checked first, with `hasattr`."""


def read(pipeline: type) -> SchedulerUse | None:
    """What this pipeline class passes to its scheduler; None if it sets no steps, or cannot be read."""
    return _cached(pipeline)[0]


def unreadable(pipeline: type) -> str:
    """Why it is unknown what this pipeline class passes to its scheduler; empty if it is known."""
    return _cached(pipeline)[1]


@lru_cache(maxsize=64)
def _cached(pipeline: type) -> tuple[SchedulerUse | None, str]:
    if row := source_table.row(pipeline):
        return from_row(row["scheduler"]), ""
    try:
        return source_table.read(pipeline, "use of the scheduler", from_source), ""
    except Unreadable as error:
        return None, str(error)


def from_row(content: Mapping[str, Any] | None) -> SchedulerUse | None:
    """Read a row of the table."""
    if content is None:
        return None
    runs = tuple(SetStepsCall(dict(run["arguments"]), frozenset(run["optional"])) for run in content["runs"])
    sets = {name: frozenset(content[name]) for name in ("step_arguments", "uses", "guarded")}
    return SchedulerUse(runs, generator=content["generator"], **sets)


def to_row(usage: SchedulerUse | None) -> dict[str, Any] | None:
    """The row for the table."""
    if usage is None:
        return None
    runs = [{"arguments": dict(run.arguments), "optional": sorted(run.optional)} for run in usage.runs]
    sets = {name: sorted(getattr(usage, name)) for name in ("step_arguments", "uses", "guarded")}
    return {"runs": runs, "generator": usage.generator, **sets}


def from_source(pipeline: type) -> SchedulerUse | None:
    """Reads the source of the class; raises any error of reading it."""
    functions = list(_functions(pipeline))
    runs = [run for function in functions for run in _runs(function)]
    if not runs:
        return None
    nodes = [node for function in functions for node in ast.walk(function)]
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    guarded = {
        ast.literal_eval(call.args[1]) for call in calls if _is_call(call, "hasattr") and _on_scheduler(call.args[0])
    }
    uses = {node.attr for node in nodes if isinstance(node, ast.Attribute) and _on_scheduler(node.value)}
    steps = [call for call in calls if _method(call) == "step"]
    keywords = {keyword.arg for call in steps for keyword in call.keywords}
    positional = {ast.unparse(argument) for call in steps for argument in call.args}
    return SchedulerUse(
        runs=tuple(runs),
        step_arguments=frozenset(name for name in keywords if name),
        # A `**` argument has no name.
        generator=bool({"generator", None} & keywords) or "generator" in positional,
        uses=frozenset(uses),
        guarded=frozenset(guarded),
    )


def _functions(pipeline: type) -> Iterator[ast.FunctionDef]:
    """The syntax tree of every method of the class that uses its scheduler; of a modular one, those of its blocks."""
    for function in _methods(pipeline):
        if "scheduler" in function.__code__.co_names:
            yield from _parsed(function)
    of_blocks = {function for block in modular.code_of(pipeline) for function in _with_helpers(block)}
    for function in sorted(of_blocks, key=lambda function: (function.__module__, function.__code__.co_firstlineno)):
        for tree in _parsed(function):
            yield _OneName().visit(tree)


def _methods(kind: type) -> Iterator[FunctionType]:
    for _, member in inspect.getmembers_static(kind):
        function = inspect.unwrap(member) if callable(member) else None
        if inspect.isfunction(function):
            yield function


def _with_helpers(block: type) -> set[FunctionType]:
    """The methods of a block, and the functions of its own module that they call; blocks share such helpers."""
    waiting, found = list(_methods(block)), set[FunctionType]()
    while waiting:
        function = waiting.pop()
        if function in found or not function.__module__.startswith(MODULAR) or function.__name__ in _POSITIONAL:
            continue
        found.add(function)
        called = (function.__globals__.get(name) for name in function.__code__.co_names)
        waiting += [each for each in called if isinstance(each, FunctionType)]
    return {each for each in found if "scheduler" in (*each.__code__.co_names, *each.__code__.co_varnames)}


def _parsed(function: FunctionType) -> Iterator[ast.FunctionDef]:
    tree = syntax.parsed(textwrap.dedent(inspect.getsource(function)))
    yield from (node for node in tree.body if isinstance(node, ast.FunctionDef))


class _OneName(ast.NodeTransformer):
    """Blocks write `components.scheduler`, or put it into a variable first: both become `self.scheduler`."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id != "scheduler":
            return node
        return ast.copy_location(ast.Attribute(ast.Name("self", ast.Load()), "scheduler", node.ctx), node)


def _runs(function: ast.FunctionDef) -> Iterator[SetStepsCall]:
    for node in ast.walk(function):
        if not isinstance(node, ast.Call):
            continue
        callee = _method(node)
        if callee is None and _is_call(node, "retrieve_timesteps"):
            callee = "retrieve_timesteps"
            named = [keyword.value for keyword in node.keywords if keyword.arg == "scheduler"]
            scheduler = next(iter([*node.args, *named]), None)
            if not _on_scheduler(scheduler):
                continue
        if callee in _POSITIONAL:
            run = _run(function, node, callee)
            if run is not None:
                yield run


def _run(function: ast.FunctionDef, call: ast.Call, callee: str) -> SetStepsCall | None:
    passed = dict(zip(_POSITIONAL[callee], call.args, strict=False))
    passed |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    arguments = {name: _when(function, call, value) for name, value in passed.items() if name not in _PLAIN}
    optional = {"timesteps", "sigmas"} if callee == "retrieve_timesteps" else set()
    for keyword in call.keywords:
        if keyword.arg is None and isinstance(keyword.value, ast.Name):
            spread = _spread(function, call, keyword.value.id)
            optional |= {name for name in spread if name not in arguments}
            arguments |= spread
    # `set_timesteps(timesteps=timesteps)` alone is the branch for callers who pass timesteps.
    if "num_inference_steps" not in passed and "never" in (arguments.get(name) for name in ("timesteps", "sigmas")):
        return None
    return SetStepsCall(arguments, frozenset(optional))


def _when(function: ast.FunctionDef, call: ast.Call, value: ast.expr) -> Condition:
    """When the value of an argument is not None."""
    if isinstance(value, ast.Constant):
        return "never" if value.value is None else "always"
    if not isinstance(value, ast.Name | ast.Attribute):
        return "always"
    condition: Condition = "never"
    for node, conditions in _before(function, call):
        if isinstance(node, ast.Assign) and any(_names(target, ast.unparse(value)) for target in node.targets):
            condition = _assigned(condition, node.value, conditions)
    return condition


def _assigned(before: Condition, value: ast.expr, conditions: str) -> Condition:
    """When a variable has a value after an assignment under these conditions."""
    none = isinstance(value, ast.Constant) and value.value is None
    if none:
        if "use_flow_sigmas" in conditions and before == "always":
            return "unless_flow_sigmas"
        return before if conditions else "never"
    if "use_dynamic_shifting" in conditions and "not" not in conditions and before == "never":
        return "if_dynamic"
    return "always"


def _spread(function: ast.FunctionDef, call: ast.Call, variable: str) -> dict[str, Condition]:
    """The arguments in the dictionary `**variable`."""
    arguments: dict[str, Condition] = {}
    for node, conditions in _before(function, call):
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            if _names(target, variable) and isinstance(node.value, ast.Dict):
                for key in node.value.keys:
                    if isinstance(key, ast.Constant):
                        arguments[str(key.value)] = _assigned("never", node.value, conditions)
            elif (
                isinstance(target, ast.Subscript)
                and _names(target.value, variable)
                and isinstance(target.slice, ast.Constant)
            ):
                name = str(target.slice.value)
                # `elif mu is not None`: the branch for callers who pass one.
                if f"{ast.unparse(node.value)} is not None" not in conditions:
                    arguments[name] = _assigned(arguments.get(name, "never"), node.value, conditions)
    return arguments


def _before(function: ast.FunctionDef, call: ast.Call) -> Iterator[tuple[ast.stmt, str]]:
    """Every statement before the call, with its conditions."""

    def walk(body: list[ast.stmt], conditions: str) -> Iterator[tuple[ast.stmt, str]]:
        for statement in body:
            if statement.lineno >= call.lineno:
                return
            yield statement, conditions
            if isinstance(statement, ast.If):
                test = ast.unparse(statement.test)
                yield from walk(statement.body, f"{conditions} {test}".strip())
                otherwise = f"{conditions} not ({test})".strip()
                yield from walk(statement.orelse, otherwise)
            elif isinstance(statement, ast.With | ast.For):
                yield from walk(statement.body, conditions)

    return walk(function.body, "")


def _names(target: ast.expr, name: str) -> bool:
    if isinstance(target, ast.Tuple):
        return any(_names(element, name) for element in target.elts)
    return isinstance(target, ast.Name | ast.Attribute) and ast.unparse(target) == name


def _is_call(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _method(call: ast.Call) -> str | None:
    """The name of the scheduler method called here."""
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) and _on_scheduler(function.value) else None


def _on_scheduler(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "scheduler" and isinstance(node.value, ast.Name)

"""Find out whether a method uses its random generator; many VAEs take one and never use it."""

from __future__ import annotations

import dis
import functools
import inspect
from typing import Any

from sfumato.pipelines import source_table


@functools.cache
def reads(kind: type, method: str, name: str) -> bool:
    """Whether `kind.method` uses its parameter `name`; True if that cannot be determined."""
    listed = (source_table.row(kind) or {}).get("generators", {}).get(f"{method}.{name}")
    if listed is not None:
        return bool(listed)
    try:
        return source_table.read(kind, f"the use of {name} in {method}", lambda kind: from_source(kind, method, name))
    except source_table.Unreadable:
        return True


def from_source(kind: Any, method: str, name: str) -> bool:
    """Reads the method's bytecode; raises any error of reading it."""
    code = inspect.unwrap(getattr(kind, method)).__code__
    if name in code.co_cellvars or (code.co_flags & inspect.CO_VARKEYWORDS and name not in code.co_varnames):
        return True
    return any(
        step.opname.startswith("LOAD")
        and (step.argval == name or (isinstance(step.argval, tuple) and name in step.argval))
        for step in dis.get_instructions(code)
    )

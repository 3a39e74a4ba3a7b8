"""Python source as a syntax tree."""

from __future__ import annotations

import ast
import threading

_ONE_AT_A_TIME = threading.Lock()


def parsed(source: str) -> ast.Module:
    """As `ast.parse`, which in Python 3.11 fails in several threads at once ("AST constructor recursion depth
    mismatch", https://github.com/python/cpython/issues/106905). Raises SyntaxError."""
    with _ONE_AT_A_TIME:
        return ast.parse(source)

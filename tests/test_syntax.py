"""Python's parser in several threads at once."""

from __future__ import annotations

import ast
import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sfumato.pipelines import syntax

SOURCE = "\n".join(f"def f{at}(a, b=1):\n    return [a + b * {at} for _ in range({at})]" for at in range(100))


@pytest.fixture
def interrupted() -> Iterator[None]:
    """Garbage is collected all the time, and another thread goes on whenever it is."""

    def go_on(*_: Any) -> None:
        time.sleep(0)

    before = gc.get_threshold()
    gc.callbacks.append(go_on)
    gc.set_threshold(50)
    yield
    gc.set_threshold(*before)
    gc.callbacks.remove(go_on)


@pytest.mark.usefixtures("interrupted")
def test_several_threads_may_read_source_at_once() -> None:
    everybody = threading.Barrier(4)

    def read(_: int) -> list[ast.stmt]:
        everybody.wait()
        return [node for _ in range(3) for node in syntax.parsed(SOURCE).body]

    with ThreadPoolExecutor(4) as pool:
        assert [len(found) for found in pool.map(read, range(4))] == [300] * 4

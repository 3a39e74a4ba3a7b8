"""Requests that the engine's loop finds all at once, however the threads of this process are scheduled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sfumato.engine.local import Local
from sfumato.engine.protocol import Submit


@contextmanager
def posted_together(engine: Local, count: int) -> Iterator[None]:
    """The first `count` requests of the block are one command, which is posted with the last of them."""
    loop: Any = engine._loop
    post, handle, held = loop.post, loop._handle, list[Submit]()

    def hold(command: Any) -> None:
        if not isinstance(command, Submit) or len(held) == count:
            post(command)
            return
        held.append(command)
        if len(held) == count:
            post(held)

    def handle_all(command: Any) -> None:
        for each in command if isinstance(command, list) else [command]:
            handle(each)

    loop.post, loop._handle = hold, handle_all
    post(None)  # an idle loop waits with the old handler: let it come back for the new one
    try:
        yield
    finally:
        del loop.post, loop._handle

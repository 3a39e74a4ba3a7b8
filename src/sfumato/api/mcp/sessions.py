"""How many sessions there may be: one caller's many must not shut out the others, nor fill the memory."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

MAX_OF_CALLER = 100
"""Clients end theirs or begin a new one when it has ended; one takes about 40 KB."""

MAX_SESSIONS = 1000
"""Of all callers."""


@dataclass(slots=True)
class _Session:
    caller: str
    running: int = 0
    """Requests."""


class Sessions:
    """Those that were answered, by their ids, the latest last. Some may have ended by themselves."""

    def __init__(self) -> None:
        self._all: OrderedDict[str, _Session] = OrderedDict()

    def begin(self, id: str, caller: str) -> None:
        """A request of it has been accepted."""
        self._all.setdefault(id, _Session(caller)).running += 1
        self._all.move_to_end(id)

    def end(self, id: str) -> None:
        """Its request is answered."""
        if session := self._all.get(id):
            session.running -= 1

    def forget(self, id: str) -> None:
        self._all.pop(id, None)

    def take_one_too_many(self, caller: str) -> tuple[str, str] | None:
        """Id and caller of the session that has to end now, if one has to: the oldest, if possible an idle one."""
        own = [id for id, session in self._all.items() if session.caller == caller]
        ids = own if len(own) > MAX_OF_CALLER else list(self._all) if len(self._all) > MAX_SESSIONS else []
        if not ids:
            return None
        id = next((each for each in ids if not self._all[each].running), ids[0])
        return id, self._all.pop(id).caller

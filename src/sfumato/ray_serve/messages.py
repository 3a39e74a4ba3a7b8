"""What a replica sends besides the events of a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from sfumato.core import Event
from sfumato.engine.protocol import DeviceState, Placed


@dataclass(frozen=True, slots=True)
class Begun:
    """The first item of a stream: this replica has the picture. `Placed` says when its worker begins with it."""

    device: str
    """Its name in `DeviceState`."""


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """A replica and its worker."""

    id: str
    """Ray's, which no other replica ever has."""
    device: DeviceState


Item: TypeAlias = Begun | Placed | Event
"""A stream is one `Begun`, then any number of the others, and last one `Done` or `Failed`."""

"""`sfumato serve`: the server, with the engine in a child process, or in one for each device."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sfumato import logs
from sfumato.api.http.early import EarlyAnswers
from sfumato.errors import SfumatoError
from sfumato.process import accelerators
from sfumato.settings import Settings, device_names, members

if TYPE_CHECKING:
    from sfumato.process.devices import Devices
    from sfumato.process.supervisor import Supervisor

log = logging.getLogger(__name__)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises SfumatoError naming the setting at fault."""
    logs.configure(settings)
    with EarlyAnswers(settings.host, settings.port) as early:
        engine = engine_for(settings)
        with engine.launched():
            # The worker takes seconds to import its libraries. The server imports its own meanwhile.
            from sfumato.api.server import run

            run(settings, engine, early)


def engine_for(settings: Settings) -> Supervisor | Devices:
    """One worker, or several as the setting `devices` says. Raises SfumatoError if no device of it is there."""
    from sfumato.process.supervisor import Supervisor

    names = _devices(settings)
    if len(names) < 2:
        return Supervisor(replace(settings, device=names[0]) if names else settings)
    from sfumato.process.devices import Devices

    log.info("one worker for each of %s", ", ".join(names))
    return Devices(settings, names)


def _devices(settings: Settings) -> Sequence[str]:
    """The devices to draw on, as torch names them; empty: the setting `device`."""
    names = device_names(settings.devices)
    if names and settings.device != "auto":
        raise SfumatoError(
            f"devices={settings.devices!r} and device={settings.device!r}: only one of these settings can be set"
        )
    if not {each for name in names for each in members(name)} - {"cpu"}:
        return names
    try:
        there = accelerators.names()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise SfumatoError(
            f"devices={settings.devices!r}: this machine's accelerators cannot be listed: {error}"
        ) from None
    if names == ["auto"]:
        return there or ["cpu"]
    missing = [each for name in names for each in members(name) if each not in (*there, "cpu")]
    told = f"this machine has no {', '.join(missing)}; its accelerators are: {', '.join(there) or 'none'}"
    if missing and all(set(members(name)) & set(missing) for name in names):
        raise SfumatoError(f"devices={settings.devices!r}: {told}. Leave the setting out to draw on the best device")
    if missing:
        log.error("devices=%r: %s. The others are used", settings.devices, told)
    return names

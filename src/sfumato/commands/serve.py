"""`sfumato serve`: the server, with the engine in a child process."""

from __future__ import annotations

from sfumato import logs
from sfumato.process.supervisor import Supervisor
from sfumato.settings import Settings


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises SfumatoError naming the setting at fault."""
    logs.configure(settings)
    engine = Supervisor(settings)
    with engine.launched():
        # The worker takes seconds to import its libraries. The server imports its own meanwhile.
        from sfumato.api.server import run

        run(settings, engine)

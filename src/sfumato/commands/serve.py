"""`sfumato serve`: the server, with the engine in a child process."""

from __future__ import annotations

from sfumato import logs
from sfumato.api.http.early import EarlyAnswers
from sfumato.settings import Settings


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises SfumatoError naming the setting at fault."""
    logs.configure(settings)
    with EarlyAnswers(settings.host, settings.port) as early:
        from sfumato.process.supervisor import Supervisor

        engine = Supervisor(settings)
        with engine.launched():
            # The worker takes seconds to import its libraries. The server imports its own meanwhile.
            from sfumato.api.server import run

            run(settings, engine, early)

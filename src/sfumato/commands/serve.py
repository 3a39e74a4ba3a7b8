"""`sfumato serve`: the server, with the engine in a child process."""

from __future__ import annotations

from sfumato import logs
from sfumato.process.supervisor import Supervisor
from sfumato.settings import Settings


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises SfumatoError that names a setting which cannot be understood."""
    logs.configure(settings)
    engine = Supervisor(settings)
    with engine.launched():
        # The worker imports for seconds. What the server itself needs is imported meanwhile, not before.
        from sfumato.api.server import run

        run(settings, engine)

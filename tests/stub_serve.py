"""`sfumato` with a stub worker: `python stub_serve.py FOLDER serve ...`. See `stub_worker`."""

from __future__ import annotations

import sys
from pathlib import Path

from stub_worker import stub

from sfumato import cli
from sfumato.process.supervisor import Supervisor

if __name__ == "__main__":
    Supervisor.__init__.__defaults__ = (tuple(stub(Path(sys.argv.pop(1)))),)
    cli.main()

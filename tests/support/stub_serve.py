"""`sfumato` with a stub worker: `python -m support.stub_serve FOLDER serve ...`. See `stub_worker`."""

from __future__ import annotations

import sys
from pathlib import Path

from sfumato import cli
from sfumato.process.supervisor import Supervisor
from support.stub_worker import stub

if __name__ == "__main__":
    _, *others = Supervisor.__init__.__defaults__ or ()
    Supervisor.__init__.__defaults__ = (tuple(stub(Path(sys.argv.pop(1)))), *others)
    cli.main()

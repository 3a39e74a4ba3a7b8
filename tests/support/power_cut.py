"""What a disk may hold after a power cut: of all that a process wrote, only what it had synced is certain.

`power_cut.c` is compiled, loaded into the process, and records each write, sync, rename and new or deleted name below a
folder. `Disk` plays the record up to any moment. A file has what was written before its last sync; a name is there if
its folder was synced after it was given. What was not synced is lost, or some of it is, in pieces of a sector: the
model of ALICE (Pillai et al., 2014) and CrashMonkey, for one process. It may also let calls fail; what a failed sync
was to write is lost, as Linux does not try again.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from support.answerable import within
from support.serving import TIMEOUT_S

SECTOR = 512
"""Bytes that a disk writes whole or not at all."""

COMPILER = shutil.which("cc") or shutil.which("gcc")


@dataclass(frozen=True)
class Record:
    """One call, as `power_cut.c` wrote it."""

    op: str
    """W write, T truncate, S sync, F a sync that failed, U unlink, M mkdir, R rename."""
    offset: int
    name: str
    data: bytes = b""


@dataclass
class _File:
    """A file, or a folder."""

    writes: list[Record] = field(default_factory=list)
    synced: int = 0
    """How many of the writes are certain."""

    def content(self, dice: random.Random | None) -> bytes:
        content = bytearray()
        for index, record in enumerate(self.writes):
            if index < self.synced:
                _write(content, record)
            elif dice and dice.random() < 0.5:
                whole = dice.random() < 0.5
                kept = len(record.data) if whole else dice.randrange(0, len(record.data) + 1, SECTOR)
                _write(content, Record(record.op, record.offset, record.name, record.data[:kept]))
        return bytes(content)


class Disk:
    """The state of a folder after the records that were played; `.` is the folder itself, which is certain."""

    def __init__(self) -> None:
        self._names: dict[str, _File] = {".": _File()}
        self._certain: dict[str, _File] = dict(self._names)

    def play(self, record: Record) -> None:
        name = record.name
        match record.op:
            case "W" | "T":
                self._names.setdefault(name, _File()).writes.append(record)
            case "M":
                self._names[name] = _File()
            case "U":
                self._names.pop(name, None)
            case "R":
                name, _, new = name.partition("\n")
                self._names[new] = self._names.pop(name)
            case "S":
                self._sync(name)
            case "F":
                file = self._names.setdefault(name, _File())
                del file.writes[file.synced :]

    def _sync(self, name: str) -> None:
        file = self._names.setdefault(name, _File())
        file.synced = len(file.writes)
        inside = {each for each in self._names.keys() | self._certain.keys() if each != "." and _folder(each) == name}
        for each in inside:
            if each in self._names:
                self._certain[each] = self._names[each]
            else:
                del self._certain[each]

    def after_power_cut(self, folder: Path, dice: random.Random | None = None) -> None:
        """Write the state into a new folder. `dice`: which of the writes that are not certain are there; None: none."""
        folder.mkdir()
        folders = {_folder(name) for name in self._names}
        for name, file in self._certain.items():
            if not all(each in self._certain for each in _parents(name)):
                continue
            if name in folders or name == ".":
                (folder / name).mkdir(parents=True, exist_ok=True)
            else:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(file.content(dice))


class Recording:
    """Of one process: `environment` is what it is started with, in addition to its own."""

    def __init__(self, folder: Path, build: Path) -> None:
        self._file = build / "record"
        self._file.touch()
        library = build / "power_cut.so"
        source = Path(__file__).with_suffix(".c")
        assert COMPILER
        subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, source, "-ldl", "-lpthread"], check=True)
        self.environment = {
            "LD_PRELOAD": str(library),
            "POWER_CUT_FOLDER": str(folder),
            "POWER_CUT_RECORD": str(self._file),
            "POWER_CUT_FAULT": str(build / "fault"),
        }
        self._fault = build / "fault"

    def fail(self, op: str, pattern: str, error: int) -> None:
        """From now on writes (W) or syncs (S) of such files below the folder fail with this errno; 0: writes halve."""
        new = self._fault.with_name("new fault")
        new.write_text(f"{op} {pattern} {error}")
        new.replace(self._fault)  # whole, whenever it is read

    def heal(self) -> None:
        """Nothing fails any more, once something has."""
        within(TIMEOUT_S, lambda: "struck" in self._fault.read_text())
        self._fault.unlink()

    def moment(self) -> int:
        """Now. What was answered before it was answered without what is recorded after it."""
        return self._file.stat().st_size

    def disks(self) -> Iterator[tuple[int, Record, Disk]]:
        """Each moment, what was recorded then, and the disk after it."""
        content = self._file.read_bytes()
        disk, at = Disk(), 0
        while at < len(content):
            start = content.index(b"\n", at) + 1
            op, offset, size, name_size = content[at : start - 1].split()
            name = content[start : start + int(name_size)].decode()
            start += int(name_size)
            size = size if op == b"W" else b"0"
            data = content[start : start + int(size)]
            at = start + int(size)
            record = Record(op.decode(), int(offset), name, data)
            disk.play(record)
            yield at, record, disk


def _write(content: bytearray, record: Record) -> None:
    if record.op == "T":
        del content[record.offset :]
    content.extend(bytes(max(0, record.offset - len(content))))
    content[record.offset : record.offset + len(record.data)] = record.data


def _folder(name: str) -> str:
    return os.path.dirname(name) or "."  # noqa: PTH120


def _parents(name: str) -> Iterator[str]:
    while name != ".":
        name = _folder(name)
        yield name

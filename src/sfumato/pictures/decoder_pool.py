"""A pool of processes that decode callers' pictures, so that decoding can be limited and stopped.

A picture of a few kilobytes can take minutes to decode, and a decoder in a thread cannot be stopped.
Each process handles one task at a time. It is started when first needed and reused; it is killed and
replaced if its task takes too long or its request is gone.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from sfumato.errors import InvalidPicture
from sfumato.pictures import decoder_frames
from sfumato.pictures.images import Bounds
from sfumato.settings import Settings

log = logging.getLogger(__name__)

BASE_MEMORY = 512 * 2**20
"""Address space a decoder may use besides what grows with the picture, in bytes; mostly libraries."""

BYTES_A_PIXEL = 24
"""For the largest picture allowed: the decoder's buffers, the pixels, one rotated copy, one converted copy."""

CLIP_TIMES = 6
"""How often the CPU time of a picture a clip may take: it has many frames."""

CLIP_BYTES_A_PIXEL = 4
"""For all frames allowed: their pixels, and what PyAV's libraries and buffers take besides."""

PATIENCE = 20
"""Allowed ratio of wall-clock time to CPU time of a task: the machine may be busy."""

TRIES = 2
"""Attempts per task: if something else killed the process, the picture is not at fault."""


class Decoders:
    """Decodes pictures in at most `count` processes; `clips`: clips, which take more of all."""

    def __init__(self, settings: Settings, count: int, *, clips: bool = False) -> None:
        self._bounds = asdict(Bounds.of(settings))
        self._what = "clip" if clips else "picture"
        self._setting = f"{CLIP_TIMES} times the setting decode_s" if clips else "the setting decode_s"
        self._seconds = settings.decode_s * (CLIP_TIMES if clips else 1)
        self._memory = BASE_MEMORY + BYTES_A_PIXEL * settings.max_source_pixels
        if clips:
            self._memory += BASE_MEMORY + CLIP_BYTES_A_PIXEL * settings.limits.clip_pixels
        self._free: list[asyncio.subprocess.Process] = []
        self._places = asyncio.Semaphore(count)
        self._ending: set[asyncio.Task[int]] = set()

    async def run(self, task: str, data: bytes, param: str, **options: Any) -> tuple[dict[str, Any], bytes]:
        """Run one of `decoder_process.TASKS`. Cancelling stops the decoding.

        Raises InvalidPicture naming `param`, with what is wrong with the picture or the limit it exceeded.
        """
        request = {"task": task, "param": param, "bounds": self._bounds, **options}
        async with self._places:
            for attempt in range(TRIES):
                process = await self._process()
                try:
                    async with asyncio.timeout(self._seconds * PATIENCE):
                        answer, output = await _exchange(process, request, data)
                except TimeoutError:
                    self._end(process)
                    raise self._too_slow(param) from None
                except (OSError, asyncio.IncompleteReadError):
                    code = await self._ended(process)
                    if code == -signal.SIGPROF:
                        raise self._too_slow(param) from None
                    log.warning("a decoder exited with code %d", code)
                    if code in (-signal.SIGKILL, -signal.SIGTERM) and attempt + 1 < TRIES:
                        continue
                    raise InvalidPicture(
                        f"{param}: the {self._what} cannot be decoded: its decoder failed, or needs more than "
                        f"{self._memory // 2**20} MiB",
                        param=param,
                    ) from None
                except BaseException:
                    self._end(process)
                    raise
                self._free.append(process)
                if "error" in answer:
                    raise InvalidPicture(answer["error"], param=answer.get("param") or param)
                return answer, output
        raise AssertionError("the last attempt raises")

    async def stop(self) -> None:
        """Stop all processes."""
        while self._free:
            self._end(self._free.pop())
        while self._ending:
            await asyncio.wait(self._ending)

    def _too_slow(self, param: str) -> InvalidPicture:
        remedy = "or a shorter one" if self._what == "clip" else "or one that is not progressive"
        return InvalidPicture(
            f"{param}: decoding the {self._what} takes more than {self._seconds} s ({self._setting}). "
            f"Send a smaller one, {remedy}.",
            param=param,
        )

    async def _process(self) -> asyncio.subprocess.Process:
        while self._free:
            process = self._free.pop()
            if process.returncode is None:
                return process
            log.warning("an idle decoder exited with code %d", process.returncode)
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "sfumato.pictures.decoder_process", str(self._seconds), str(self._memory),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            limit=decoder_frames.CHUNK,
        )  # fmt: skip

    def _end(self, process: asyncio.subprocess.Process) -> None:
        """Kill the process without waiting for it."""
        task = asyncio.ensure_future(self._ended(process))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        with suppress(ProcessLookupError):
            process.kill()

    async def _ended(self, process: asyncio.subprocess.Process) -> int:
        assert process.stdin is not None
        process.stdin.close()
        return await process.wait()


async def _exchange(
    process: asyncio.subprocess.Process, request: dict[str, Any], data: bytes
) -> tuple[dict[str, Any], bytes]:
    assert process.stdin is not None
    assert process.stdout is not None
    await decoder_frames.send(process.stdin, request, data)
    return await decoder_frames.receive(process.stdout)

"""The files of the LoRAs that requests name, downloaded if necessary."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from sfumato.checkpoints import lora_files
from sfumato.checkpoints.remote_limits import Limits
from sfumato.config import ModelConfig
from sfumato.core import Generation
from sfumato.errors import TimedOut
from sfumato.loras import Lora
from sfumato.settings import Settings, host_names

DOWNLOADS = 4
"""LoRAs that are downloaded at a time."""


class RequestLoras:
    """Downloads have threads of their own: slow ones keep nobody waiting whose LoRA is here."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._downloads = ThreadPoolExecutor(DOWNLOADS, "sfumato-lora")

    @property
    def hosts(self) -> list[str]:
        """Where LoRAs and ControlNets of requests may be downloaded from."""
        return host_names(self._settings.lora_hosts)

    @property
    def _limits(self) -> Limits:
        return Limits(self.hosts, self._settings.max_lora_mb << 20)

    async def with_files(
        self, generations: list[Generation], config: ModelConfig, on_download: Callable[[], None]
    ) -> list[Generation]:
        """The generations with the files of their LoRAs. Raises InvalidRequest, DownloadError or TimedOut.

        `on_download` is called before the first download, once all that are here are found and read.
        """
        named = list(dict.fromkeys(lora for generation in generations for lora in generation.loras))
        if not named:
            return generations
        limit = self._settings.time_limit_s
        try:
            async with asyncio.timeout(limit):
                known = [asyncio.to_thread(lora_files.is_here, lora, config, self._limits) for lora in named]
                are_here = dict(zip(named, await asyncio.gather(*known), strict=True))
                files = await self._located([lora for lora in named if are_here[lora]], config, None)
                if remote := [lora for lora in named if not are_here[lora]]:
                    on_download()
                    files |= await self._located(remote, config, self._downloads)
        except TimeoutError:
            raise TimedOut(f"loras: not downloaded within {limit} s (the setting time_limit_s)") from None
        return [replace(each, loras=tuple(files[lora] for lora in each.loras)) for each in generations]

    async def _located(
        self, loras: Sequence[Lora], config: ModelConfig, threads: ThreadPoolExecutor | None
    ) -> dict[Lora, Lora]:
        run, data = asyncio.get_running_loop().run_in_executor, self._settings.data
        found = [run(threads, lora_files.locate, lora, config, self._limits, data) for lora in loras]
        return dict(zip(loras, await asyncio.gather(*found), strict=True))

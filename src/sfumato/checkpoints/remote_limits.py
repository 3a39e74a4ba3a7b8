"""What a download for a request may do: which hosts it may be sent on to, and how large it may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx

from sfumato.checkpoints import sources
from sfumato.config import addresses
from sfumato.errors import LoadError

HUB = "hub"
"""In a list of hosts: the Hugging Face hub."""


class TooLarge(LoadError):
    """A file has more bytes than a request may bring."""


@dataclass(frozen=True, slots=True)
class Limits:
    hosts: Sequence[str] | None = None
    """Hosts that may be asked, in small letters; None: any."""
    bytes: int | None = None
    setting: str = "max_lora_mb"
    """What says how many bytes."""

    def allow(self, host: str) -> bool:
        """Whether a host may be asked: one that is listed, or the hub's page."""
        if self.hosts is None or host.lower() in self.hosts:
            return True
        return HUB in self.hosts and host.lower() == urlsplit(sources.HUB).hostname

    def client(self, timeout_s: float) -> httpx.Client:
        """One for one file: it follows redirects, but only to hosts that are allowed, and to where the hub leads.

        Its requests raise LoadError before another host is asked.
        """
        hub_leads = False

        def check(request: httpx.Request) -> None:
            nonlocal hub_leads
            if not hub_leads and not self.allow(request.url.host):
                raise LoadError(
                    f"leads to {request.url.host[:200]}, which the setting lora_hosts does not list; let the operator "
                    "add that host, or put the file there by hand"
                )
            # The hub keeps its files with others, which change.
            hub_leads = hub_leads or str(request.url).startswith((f"{sources.HUB}/", f"{sources.endpoint()}/"))

        return httpx.Client(follow_redirects=True, timeout=timeout_s, event_hooks={"request": [check]})

    def check_size(self, url: str, size: int) -> None:
        """Raises TooLarge if a file has more bytes than may be downloaded."""
        if self.bytes is not None and size > self.bytes:
            raise TooLarge(
                f"{addresses.redact(url)} has more than {self.bytes >> 20} MiB (the setting {self.setting}): nothing "
                "of it was kept. Use a smaller one, or put the file there by hand"
            )


ANY = Limits()
"""For what the operator names, in model files."""

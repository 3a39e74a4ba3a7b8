"""Sends webhooks to hosts that the operator lists, again with growing pauses until they are received."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx

from sfumato import __version__, logs
from sfumato.api.jobs.headers import WEBHOOK
from sfumato.api.jobs.jobs import Jobs
from sfumato.api.webhooks import signature
from sfumato.api.webhooks.outbox import Message, Outbox, host_of
from sfumato.config.addresses import redact
from sfumato.errors import InvalidRequest, JobsUnavailable
from sfumato.pictures.fetch import PublicTransport
from sfumato.pictures.resolving import Resolver
from sfumato.settings import Settings, host_names

log = logging.getLogger(__name__)

MAX_URL = 2000
"""Characters."""

TIMEOUT_S = 15.0
"""From resolving the name to the status; what follows it is not read."""

AT_ONCE = 8
"""Messages that are sent at the same time."""

LOOK_S = 1.0
"""Interval of looking for messages."""

PAUSES_S = (5, 60, 300, 1800, 7200, 18_000, 36_000)
"""Seconds until a message is sent again; after the last try it is given up."""

GONE = 410
"""Status of a receiver that wants no more."""

ANY = "*"
"""Among the hosts: every one with a public address."""


class Webhooks:
    """The webhooks of one server. Raises ValueError naming the setting at fault. `clock`: seconds since 1970."""

    def __init__(self, jobs: Jobs, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self._jobs = jobs
        self._outbox = Outbox(jobs.store)
        self._hosts = frozenset(host_names(settings.webhook_hosts, any_host=True))
        self._key = b""
        if self._hosts:
            try:
                self._key = signature.key_of(settings.webhook_secret)
            except ValueError as error:
                raise ValueError(f"webhook_secret: {error}. webhook_hosts needs it") from None
        self._keeper: asyncio.Task[None] | None = None

    def checked(self, url: str | None) -> str | None:
        """The URL of a request's header, None without one. Raises InvalidRequest if nothing may be sent there."""
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            host, valid = parts.hostname or "", parts.scheme in ("http", "https") and parts.port != 0
        except ValueError:
            host, valid = "", False
        if (
            not host
            or not valid
            or parts.username is not None
            or len(url) > MAX_URL
            or not (url.isascii() and url.isprintable())
        ):
            raise InvalidRequest(
                f"{WEBHOOK}: {redact(url)[:100]!r}; an http or https URL with a host and without a name and password, "
                f"of at most {MAX_URL} characters, is valid",
                param=WEBHOOK,
            )
        if host not in self._hosts and ANY not in self._hosts:
            raise InvalidRequest(
                f"{WEBHOOK}: the host {host[:100]!r} is not one that webhooks may be sent to; they are: "
                f"{', '.join(sorted(self._hosts)) or 'none'} (the setting webhook_hosts)",
                param=WEBHOOK,
            )
        return url

    def start(self) -> None:
        """Send what is due from now on, also what an earlier process left."""
        if self._hosts:
            self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Leave what has not been received to the next start. Before `Jobs.stop`, which closes the database."""
        if self._keeper:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})

    async def _keep(self) -> None:
        """Until it is cancelled."""
        async with self._client() as client:
            while True:
                try:
                    await self.look(client)
                except JobsUnavailable as error:
                    log.warning("%s", error.message)
                except Exception as error:  # any error: without a next round nothing would be sent again
                    log.error("webhooks: %s", logs.error_location(error))
                await asyncio.sleep(LOOK_S)

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            transport=PublicTransport(self._hosts - {ANY}, Resolver(), "webhook"),
            timeout=TIMEOUT_S,
            follow_redirects=False,
            headers={"user-agent": f"sfumato/{__version__}", "content-type": "application/json"},
            trust_env=False,
        )

    async def look(self, client: httpx.AsyncClient) -> int:
        """Send what is due, until nothing is due and nothing is being sent; returns how many messages that were."""
        sending: dict[asyncio.Task[None], str] = {}
        count = 0
        try:
            while True:
                now, free, busy = self.clock(), AT_ONCE - len(sending), Counter(sending.values())
                for message in await self._jobs.blocking(self._outbox.take, now, now + 2 * TIMEOUT_S, free, busy):
                    count += 1
                    sending[asyncio.create_task(self._send(client, message))] = host_of(message.url)
                if not sending:
                    return count
                done, _ = await asyncio.wait(sending, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del sending[task]
                    _report(task)
        finally:
            for task in sending:
                task.cancel()
            if sending:
                await asyncio.wait(sending)

    async def _send(self, client: httpx.AsyncClient, message: Message) -> None:
        try:
            self.checked(message.url)
            status, reason = await self._status(client, message)
        except InvalidRequest:
            status, reason = GONE, "the host is not among webhook_hosts any more"
        said = f"webhook {message.id}: {_address(message.url)}: {reason}"
        if 200 <= status < 300:
            log.info("%s", said)
            await self._jobs.blocking(self._outbox.delete, message)
        elif status == GONE or message.attempts >= len(PAUSES_S):
            log.error("%s; it is given up", said)
            await self._jobs.blocking(self._outbox.delete, message)
        else:
            pause = PAUSES_S[message.attempts]
            log.warning("%s; it is sent again in %d s", said, pause)
            await self._jobs.blocking(self._outbox.again, message, self.clock() + pause)

    async def _status(self, client: httpx.AsyncClient, message: Message) -> tuple[int, str]:
        """What the receiver answered, 0 if it did not; and the same in words."""
        headers = signature.headers(self._key, message.id, int(self.clock()), message.payload)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                async with client.stream("POST", message.url, content=message.payload, headers=headers) as response:
                    return response.status_code, f"status {response.status_code}"
        except TimeoutError:
            return 0, f"no answer within {TIMEOUT_S:.0f} s"
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:  # ValueError: also from IDNA
            return 0, str(error) or logs.error_location(error)


def _address(url: str) -> str:
    """Without the path, which is a secret at some receivers."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _report(task: asyncio.Task[None]) -> None:
    """Log the error that ended the sending of a message: it is sent again."""
    if not task.cancelled() and (error := task.exception()):
        log.error("webhooks: %s", error.message if isinstance(error, JobsUnavailable) else logs.error_location(error))

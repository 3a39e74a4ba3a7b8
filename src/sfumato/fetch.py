"""Picture URLs: fetched with a cap and a time limit, and only from public addresses.

The name is resolved once and the connection goes to the address that was checked, for every
redirect anew, so neither DNS nor a redirect can point the server at its own network.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from typing import Any

import httpcore
import httpx

from sfumato import __version__
from sfumato.errors import InvalidPicture

MAX_BYTES = 32 * 2**20
TIMEOUT_S = 20.0
MAX_REDIRECTS = 3

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
ROUTED = ipaddress.IPv6Network("2000::/3")
"""All IPv6 unicast that the internet routes."""


class PictureFetcher:
    """Fetches picture URLs. `hosts` are names that may resolve to private addresses."""

    def __init__(self, hosts: Iterable[str] = ()) -> None:
        transport = httpx.AsyncHTTPTransport(trust_env=False)
        # httpx has no public way to choose the address; its pool takes a network backend.
        transport._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(trust_env=False),
            network_backend=_PublicOnly(frozenset(host.strip().lower() for host in hosts if host.strip())),
        )
        self._client = httpx.AsyncClient(
            transport=transport,
            timeout=TIMEOUT_S,
            follow_redirects=True,
            max_redirects=MAX_REDIRECTS,
            headers={"user-agent": f"sfumato/{__version__}", "accept": "image/*"},
            trust_env=False,
        )

    async def get(self, url: str, param: str) -> bytes:
        """The body. Raises InvalidPicture that names the URL and why it was not fetched."""
        try:
            async with asyncio.timeout(TIMEOUT_S), self._client.stream("GET", url) as response:
                if response.status_code != 200:
                    raise InvalidPicture(
                        f"{param}: {url} answered {response.status_code} {response.reason_phrase}",
                        param=param,
                    )
                data = bytearray()
                async for chunk in response.aiter_bytes():
                    data += chunk
                    if len(data) > MAX_BYTES:
                        raise InvalidPicture(f"{param}: {url} is larger than {MAX_BYTES // 2**20} MiB", param=param)
                return bytes(data)
        except TimeoutError:
            raise InvalidPicture(f"{param}: {url} took longer than {TIMEOUT_S:.0f} s", param=param) from None
        except (httpx.HTTPError, httpx.InvalidURL, httpcore.ConnectError, ValueError) as error:  # also of IDNA
            reason = str(error) or type(error).__name__
            raise InvalidPicture(f"{param}: {url} could not be fetched: {reason}", param=param) from None

    async def close(self) -> None:
        await self._client.aclose()


def is_public(text: str) -> bool:
    """Whether an address is one of the internet's, also where it hides an IPv4 address (mapped, NAT64, 6to4)."""
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if address not in ROUTED:
            return False
    return address.is_global and not address.is_multicast


class _PublicOnly(httpcore.AsyncNetworkBackend):
    """Connects to public addresses only, and to exactly the address that was checked."""

    def __init__(self, hosts: frozenset[str]) -> None:
        self._hosts = hosts
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        if not 0 < port < 65536:
            raise httpcore.ConnectError(f"there is no port {port}")
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise httpcore.ConnectError(f"the name {host[:100]!r} does not resolve ({reason})") from None
        address = str(found[0][4][0])
        if host.lower() not in self._hosts and not is_public(address):
            raise httpcore.ConnectError(
                f"{host!r} is at {address}, which is not a public address. "
                "The operator can allow the host with the setting picture_hosts."
            )
        return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)

    async def connect_unix_socket(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        raise httpcore.ConnectError("picture URLs are http or https")

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)

"""Fetch picture URLs with a size limit and a time limit, and only from public addresses.

The name is resolved once and the connection goes to the address that was checked, separately for every
redirect, so neither DNS nor a redirect can point the server at its own network. Bodies are never
decompressed, so a remote server cannot decide how much memory is used here.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable, Iterable
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpcore
import httpx

from sfumato import __version__
from sfumato.errors import InvalidPicture
from sfumato.pictures.resolving import Resolver, Unresolved

MAX_BYTES = 32 * 2**20
TIMEOUT_S = 20.0
"""Total time, from resolving the name to the last byte."""
MAX_REDIRECTS = 3
MAX_CONNECTIONS = 64
"""At the same time; further ones wait, within their time limit."""

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
ROUTED = ipaddress.IPv6Network("2000::/3")
"""All globally routed IPv6 unicast addresses."""


class PictureFetcher:
    """Fetches picture URLs. `hosts` are names that may resolve to private addresses."""

    def __init__(self, hosts: Iterable[str] = (), resolver: Resolver | None = None) -> None:
        transport = httpx.AsyncHTTPTransport(trust_env=False)
        # httpx has no public way to choose the address; its connection pool takes a network backend.
        transport._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(trust_env=False),
            max_connections=MAX_CONNECTIONS,
            max_keepalive_connections=0,  # hosts are rarely used again, and must not keep file descriptors open
            network_backend=_PublicOnly(
                frozenset(host.strip().lower() for host in hosts if host.strip()), resolver or Resolver()
            ),
        )
        self._client = httpx.AsyncClient(
            transport=transport,
            timeout=TIMEOUT_S,
            # Redirects are followed here: httpx would read and decompress the body of each, however large.
            follow_redirects=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),  # none are kept
            headers={"user-agent": f"sfumato/{__version__}", "accept": "image/*", "accept-encoding": "identity"},
            trust_env=False,
        )

    async def get(self, url: str, param: str, take: Callable[[int], None] = lambda count: None) -> bytes:
        """The body. `take` is called with the size of every chunk before it is kept, and may raise.

        Raises InvalidPicture naming the URL and the reason.
        """
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._get(url, param, take)
        except TimeoutError:
            raise InvalidPicture(
                f"{param}: {url} took longer than {TIMEOUT_S:.0f} s; send the picture itself", param=param
            ) from None
        except (
            httpx.HTTPError,
            httpx.InvalidURL,
            httpcore.ConnectError,
            ValueError,
        ) as error:  # ValueError: also from IDNA
            reason = str(error) or type(error).__name__
            raise InvalidPicture(f"{param}: {url} could not be fetched: {reason}", param=param) from None

    async def _get(self, url: str, param: str, take: Callable[[int], None]) -> bytes:
        request: httpx.Request | None = self._client.build_request("GET", url)
        for _ in range(MAX_REDIRECTS + 1):
            assert request is not None
            response = await self._client.send(request, stream=True)
            try:
                request = response.next_request
                if request is None:
                    return await _body(response, url, param, take)
            finally:
                await response.aclose()
        raise InvalidPicture(f"{param}: {url} could not be fetched: more than {MAX_REDIRECTS} redirects", param=param)

    async def close(self) -> None:
        await self._client.aclose()


async def _body(response: httpx.Response, url: str, param: str, take: Callable[[int], None]) -> bytes:
    """The raw body. Raises InvalidPicture if it is refused, before reading it if the headers suffice."""
    if response.status_code != 200:
        raise InvalidPicture(
            f"{param}: {url} answered {response.status_code} {response.reason_phrase[:100]}", param=param
        )
    encoding = response.headers.get("content-encoding", "").strip()
    if encoding.lower() not in ("", "identity"):
        raise InvalidPicture(
            f"{param}: {url} answered with content-encoding {encoding[:60]!r} although identity was requested; "
            "only uncompressed responses are accepted",
            param=param,
        )
    too_large = InvalidPicture(f"{param}: {url} is larger than {MAX_BYTES // 2**20} MiB", param=param)
    declared = response.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > MAX_BYTES:
        raise too_large
    data = bytearray()
    async for chunk in response.aiter_raw():
        if len(data) + len(chunk) > MAX_BYTES:
            raise too_large
        take(len(chunk))
        data += chunk
    return bytes(data)


def is_public(text: str) -> bool:
    """Whether an address is public, including any embedded IPv4 address (mapped, NAT64, 6to4)."""
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
    """Connects only to public addresses, and exactly to the address that was checked."""

    def __init__(self, hosts: frozenset[str], resolver: Resolver) -> None:
        self._hosts = hosts
        self._resolver = resolver
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
            raise httpcore.ConnectError(f"port {port} does not exist")
        try:
            address = await self._resolver.address(host, port)
        except Unresolved as error:
            raise httpcore.ConnectError(str(error)) from None
        if host.lower() not in self._hosts and not is_public(address):
            raise httpcore.ConnectError(
                f"{host!r} resolves to {address}, which is not a public address. "
                "The operator can allow the host with the setting picture_hosts."
            )
        return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)

    async def connect_unix_socket(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        raise httpcore.ConnectError("picture URLs must be http or https")

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)

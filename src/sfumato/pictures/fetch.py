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
from typing import Protocol
from urllib.parse import urlsplit

import httpx

from sfumato import __version__
from sfumato.errors import InvalidPicture
from sfumato.pictures.resolving import Resolver, Unresolved
from sfumato.pictures.store import Store

MAX_BYTES = 32 * 2**20
TIMEOUT_S = 20.0
"""Total time, from resolving the name to the last byte."""
MAX_REDIRECTS = 3
MAX_CONNECTIONS = 64
"""At the same time; further ones wait, within their time limit."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
"""All globally routed IPv6 unicast addresses."""


class Uploads(Protocol):
    """Pictures that callers uploaded before."""

    async def get(self, id: str, caller: str, param: str, take: Callable[[int], None]) -> bytes:
        """The file of that id, if that caller may use it. `take` as in `PictureFetcher.get`.

        Raises InvalidPicture naming the id and the reason.
        """
        ...


class PictureFetcher:
    """Fetches picture URLs. `hosts` are names that may resolve to private addresses."""

    uploads: Uploads | None = None

    store: Store | None = None
    """Of this server's own pictures, whose URLs are read from there, whatever host they name."""

    def __init__(self, hosts: Iterable[str] = (), resolver: Resolver | None = None) -> None:
        allowed = frozenset(host.strip().lower() for host in hosts if host.strip())
        self._client = httpx.AsyncClient(
            transport=PublicTransport(allowed, resolver or Resolver(), "picture"),
            timeout=TIMEOUT_S,
            # Redirects are followed here: httpx would read and decompress the body of each, however large.
            follow_redirects=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),  # none are kept
            headers={
                "user-agent": f"sfumato/{__version__}",
                "accept": "*/*",
                "accept-encoding": "identity",
            },
            trust_env=False,
        )

    async def get(self, url: str, param: str, take: Callable[[int], None] = lambda count: None) -> bytes:
        """The body. `take` is called with the size of every chunk before it is kept, and may raise.

        Raises InvalidPicture naming the URL and the reason.
        """
        name = _name_in(url)
        if name and self.store and (own := await asyncio.to_thread(self.store.get, name)):
            take(len(own.data))
            return own.data
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._get(url, param, take)
        except TimeoutError:
            raise InvalidPicture(
                f"{param}: {url} took longer than {TIMEOUT_S:.0f} s; send the picture itself", param=param
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:  # ValueError: also from IDNA
            reason = str(error) or type(error).__name__
            expired = " If it was a picture of this server, it has expired." if name and self.store else ""
            raise InvalidPicture(f"{param}: {url} could not be fetched: {reason}{expired}", param=param) from None

    async def has_expired(self, picture: str | bytes, host: str) -> bool:
        """Whether it is the URL of a picture of this server, which has that host, and is no longer there."""
        if not self.store or not isinstance(picture, str) or not picture.startswith(("http://", "https://")):
            return False
        name = _name_in(picture)
        if not name or urlsplit(picture).hostname not in (host, *LOOPBACK):
            return False
        return not await asyncio.to_thread(self.store.has, name)

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


def _name_in(url: str) -> str:
    """The name in a URL of a stored picture. No other server has one of that name: it is random."""
    try:
        folder, _, name = urlsplit(url).path.rpartition("/")
    except ValueError:
        return ""
    return name if folder.endswith("/generated-images") and Store.is_name(name) else ""


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
        if address not in GLOBAL_UNICAST:
            return False
    return address.is_global and not address.is_multicast


PORTS = {"http": 80, "https": 443}
MAX_PORT = 65535


class PublicTransport(httpx.AsyncBaseTransport):
    """Connects only to public addresses, and exactly to the address that was checked.

    `hosts`: those with other addresses, as the setting `KIND_hosts` says.
    """

    def __init__(self, hosts: frozenset[str], resolver: Resolver, kind: str) -> None:
        self._hosts = hosts
        self._kind = kind
        self._resolver = resolver
        # No connection is kept: nobody comes back soon, whoever answers must not hold descriptors, and one that was
        # made for a name must not serve another at the same address.
        limits = httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=0)
        self._inner = httpx.AsyncHTTPTransport(trust_env=False, limits=limits)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        port = PORTS.get(url.scheme) if url.port is None else url.port
        if url.scheme not in PORTS or not url.host:
            raise httpx.UnsupportedProtocol(f"{self._kind} URLs must be http or https, with a host", request=request)
        if not port or port > MAX_PORT:
            raise httpx.ConnectError(f"port {port} does not exist; 1 to {MAX_PORT} do", request=request)
        host = url.raw_host.decode("ascii")
        address = await self._public_address(host, port, request)
        # `Host` in the headers and the name in the certificate stay those of the URL.
        pinned = httpx.Request(
            request.method,
            url.copy_with(host=address),
            headers=request.headers,
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": host},
        )
        return await self._inner.handle_async_request(pinned)

    async def _public_address(self, host: str, port: int, request: httpx.Request) -> str:
        try:
            address = await self._resolver.address(host, port)
        except Unresolved as error:
            raise httpx.ConnectError(str(error), request=request) from None
        if host.lower() not in self._hosts and not is_public(address):
            raise httpx.ConnectError(
                f"{host!r} resolves to {address}, which is not a public address. "
                f"The operator can allow the host with the setting {self._kind}_hosts.",
                request=request,
            )
        return address

    async def aclose(self) -> None:
        await self._inner.aclose()

"""Which proxy the environment asks for, as httpx reads it, and the tunnel through it."""

from __future__ import annotations

import base64
import ipaddress
import os
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx

from evolink_async.errors import ConfigurationError
from evolink_async.http.addresses import is_loopback
from evolink_async.http.stream import SocketStream
from evolink_async.http.wire import HttpConnection, header_lines, request_line

DEFAULT_PORTS = {b"http": 80, b"https": 443}

Origin = tuple[bytes, bytes, int]  # scheme, host, port


@dataclass(frozen=True, slots=True)
class Proxy:
    scheme: bytes
    host: bytes
    port: int
    authorization: bytes | None = field(repr=False)

    @classmethod
    def parse(cls, url: str, source: str) -> Proxy:
        """Read a proxy's URL. Raises `ConfigurationError`, which never shows it, because it may hold a password.

        source: who asks for it, such as HTTPS_PROXY.
        """
        try:
            parsed = httpx.URL(url if "://" in url else f"http://{url}")
        except httpx.InvalidURL:
            parsed = httpx.URL()
        if not parsed.raw_host:
            raise ConfigurationError(
                f"{source} holds no valid proxy URL (not shown: it may hold a password): "
                "set it to http://host:port, or unset it"
            )
        if parsed.scheme not in ("http", "https"):
            raise ConfigurationError(
                f"{source} asks for a {parsed.scheme} proxy, and only http and https proxies are supported: set it to "
                "one of those, name the host in NO_PROXY, or give http_client= a client that speaks it"
            )
        authorization = None
        if parsed.username or parsed.password:
            pair = f"{parsed.username}:{parsed.password}".encode()
            authorization = b"Basic " + base64.b64encode(pair)
        port = parsed.port or DEFAULT_PORTS[parsed.raw_scheme]
        return cls(parsed.raw_scheme, parsed.raw_host, port, authorization)

    @property
    def place(self) -> str:
        return place_of(self.host, self.port)

    @property
    def header_lines(self) -> bytes:
        return b"" if self.authorization is None else header_lines([(b"Proxy-Authorization", self.authorization)])


class Proxies:
    """HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, and the system's settings on macOS and Windows; read once.

    None is ever used for a loopback host: another machine would look for that host on itself, and the API key, which
    may go there in plain text, is the proxy's to read.
    """

    def __init__(self, settings: Mapping[str, str], variables: Mapping[str, str] | None = None) -> None:
        """variables: by scheme, the name of the one that a setting comes from, where there is one."""
        self._urls = {scheme: settings[scheme] for scheme in ("http", "https", "all") if settings.get(scheme)}
        self._variables = variables or {}
        entries = (entry.strip().lower() for entry in settings.get("no", "").split(","))
        self._exceptions = [entry for entry in entries if entry]

    @classmethod
    def from_environment(cls) -> Proxies:
        # Sorted, so that of two spellings the lower-case one counts, as it does in `getproxies`.
        names = sorted(name for name, value in os.environ.items() if value and name.lower().endswith("_proxy"))
        return cls(urllib.request.getproxies(), {name.lower().removesuffix("_proxy"): name for name in names})

    def for_origin(self, origin: Origin) -> Proxy | None:
        """The proxy that leads there, None: no proxy. Raises `ConfigurationError` for one that cannot be used."""
        scheme, host = origin[0].decode("ascii"), origin[1].decode("ascii")
        setting = scheme if scheme in self._urls else "all"
        url = self._urls.get(setting)
        if url is None or is_loopback(host):
            return None
        if any(_is_excepted(entry, scheme, host, origin[2]) for entry in self._exceptions):
            return None
        return Proxy.parse(url, self._variables.get(setting, "the system's proxy setting"))


def _is_excepted(entry: str, scheme: str, host: str, port: int) -> bool:
    """Whether an entry of NO_PROXY covers the origin: `*`, name, `.name`, `name:port`, address or network."""
    if entry == "*":
        return True
    if "://" in entry:
        wanted_scheme, _, entry = entry.partition("://")
        if wanted_scheme not in ("all", scheme):
            return False
    name, wanted_port = _split_port(entry)
    if wanted_port is not None and wanted_port != str(port):
        return False
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(name, strict=False)
    except ValueError:  # one of them is a name
        bare = name.removeprefix("*")
        return host.endswith(bare) if bare.startswith(".") else host == bare or host.endswith(f".{bare}")


def _split_port(entry: str) -> tuple[str, str | None]:
    if entry.startswith("["):  # [::1] or [::1]:8080
        name, _, rest = entry[1:].partition("]")
        return name, rest.removeprefix(":") or None
    if entry.count(":") == 1:
        name, _, port = entry.partition(":")
        return name, port
    return entry, None


def place_of(host: bytes, port: int) -> str:
    name = host.decode("ascii")
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


async def open_tunnel(stream: SocketStream, origin: Origin, proxy: Proxy) -> None:
    """Ask the proxy to connect us through to `origin`."""
    authority = place_of(origin[1], origin[2]).encode("ascii")
    lines = header_lines([(b"Host", authority), (b"Accept", b"*/*")]) + proxy.header_lines
    request = request_line(b"CONNECT", authority) + lines + b"\r\n"
    try:
        head = await HttpConnection(stream).send(b"CONNECT", request, b"")
    except (httpx.NetworkError, httpx.ProtocolError) as exc:
        # Not what they would mean elsewhere: our own request wasn't even begun.
        raise httpx.ProxyError(f"the proxy {proxy.place} did not open a tunnel: {exc}") from exc
    if not 200 <= head.status <= 299:
        reason = head.reason.decode("ascii", errors="replace")
        raise httpx.ProxyError(f"the proxy {proxy.place} refused the tunnel: {head.status} {reason}")

"""One GET of a media link: without the key, to public addresses only, redirects followed by hand."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Mapping

import httpx

from evolink_async.errors import ConfigurationError, DownloadError
from evolink_async.http.addresses import refusal
from evolink_async.http.answers import excerpt
from evolink_async.http.exchange import CONNECT_TIMEOUT, USER_AGENT
from evolink_async.http.proxies import DEFAULT_PORTS
from evolink_async.http.transport import Call, Reply, SlotTransport, origin_of
from evolink_async.http.wire import header_lines

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

logger = logging.getLogger("evolink_async.saving")

MOST_REDIRECTS = 5
ANSWER_TIMEOUT = 30.0  # seconds from the connection slot to the answer's headers
MOST_AT_ONCE = 128  # files that are being saved, those that wait for their next attempt included
_DESCRIPTOR_SHARE = 4  # of those that the process may have, a quarter: macOS gives it 256 in all
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?", re.ASCII)

Place = tuple[str, int]  # host and port


class MediaCut(Exception):
    """The transfer broke off, or never began; another attempt may succeed."""


class AddressRefused(Exception):
    """A host has an address that is none to fetch from; says why."""


class MediaAnswer:
    """An answer whose body is still to be read. To be closed, whatever happens."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self.status = reply.status
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in reply.headers}

    async def read(self) -> bytes:
        """The next bytes of the body, none at its end. Raises `MediaCut`. Cancelling it closes the connection."""
        try:
            return await self._reply.read()
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise MediaCut(_reason(error)) from error

    @property
    def has_surplus(self) -> bool:
        """Whether more bytes came than the answer's length has room for."""
        return self._reply.has_surplus

    async def aclose(self) -> None:
        """Close it; the connection is kept if the body was read to its end."""
        await self._reply.aclose()


class MediaSource:
    """Where links are fetched from: a transport of their own, and the rule which places they may lead to.

    own: the API's places, which may be private (a local emulator). allow_private: all may.
    places: who saves a file holds one of them, so that a thousand at once don't open a thousand files.
    """

    def __init__(self, transport: SlotTransport, own: frozenset[Place], *, allow_private: bool) -> None:
        self.places = asyncio.Semaphore(_files_at_once())
        self._transport = transport
        self._own = own
        self._allow_private = allow_private

    async def get(self, link: str, headers: Mapping[str, str]) -> MediaAnswer:
        """The answer to a GET, after at most five redirects.

        Raises `MediaCut` for what may pass, and `DownloadError` for a link that must not or cannot be followed.
        Cancelling it closes its connection.
        """
        url = checked_link(link)
        for _ in range(MOST_REDIRECTS + 1):
            answer = await self._get(url, headers)
            if answer.status not in _REDIRECTS:
                return answer
            await answer.aclose()
            url = next_hop(url, answer.headers.get("location"))
        raise DownloadError(f"{describe(link)} redirects more than {MOST_REDIRECTS} times")

    async def _get(self, url: httpx.URL, headers: Mapping[str, str]) -> MediaAnswer:
        loop = asyncio.get_running_loop()
        whole = asyncio.timeout(None)
        is_open = self._allow_private or place_of(url) in self._own
        try:
            origin = origin_of(url)
            if not is_open and self._transport.is_proxied(origin):
                await _check_resolved(url)
            call = Call(
                b"GET",
                origin,
                url.raw_path,
                _header_lines(url, headers),
                connect_timeout=CONNECT_TIMEOUT,
                write_timeout=ANSWER_TIMEOUT,
                on_slot=lambda: whole.reschedule(loop.time() + ANSWER_TIMEOUT),
                vet=None if is_open else _vet,
            )
            async with whole:
                reply = await self._transport.call(call)
        except AddressRefused as refused:
            raise DownloadError(
                f"the host {place_of(url)[0]!r} of the link is {refused}, which is not fetched from; "
                "if that is meant to be so, make the client with allow_private_hosts=True"
            ) from None
        except ConfigurationError as error:  # the proxy on the way there
            raise DownloadError(f"{describe(str(url))} cannot be fetched: {error.message}") from error
        except TimeoutError as error:
            raise MediaCut(f"no answer within {ANSWER_TIMEOUT:g} s") from error
        except (httpx.HTTPError, OSError) as error:
            raise MediaCut(_reason(error)) from error
        logger.debug("GET %s -> %d", describe(str(url)), reply.status)
        return MediaAnswer(reply)


def _files_at_once() -> int:
    """Each holds a descriptor, also while it waits for a connection, which needs another one."""
    if resource is None:
        return MOST_AT_ONCE
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if descriptors == resource.RLIM_INFINITY:
        return MOST_AT_ONCE
    return max(1, min(MOST_AT_ONCE, descriptors // _DESCRIPTOR_SHARE))


def _header_lines(url: httpx.URL, headers: Mapping[str, str]) -> bytes:
    lines = {"User-Agent": USER_AGENT, "Accept": "*/*", "Accept-Encoding": "identity", **headers}
    pairs = ((name.encode("ascii"), value.encode("latin-1")) for name, value in lines.items())
    return header_lines([(b"Host", url.netloc), *pairs])


def place_of(url: httpx.URL | str) -> Place:
    """Host and port that a URL leads to."""
    url = httpx.URL(url)
    return url.raw_host.decode("ascii"), url.port or DEFAULT_PORTS.get(url.raw_scheme, 0)


def checked_link(link: str) -> httpx.URL:
    """The link as a URL. Raises `DownloadError` unless it is http(s) with a host and without a user name."""
    try:
        url = httpx.URL(link)
    except (httpx.InvalidURL, TypeError, UnicodeError):
        raise DownloadError(f"the link {excerpt(link.encode('utf-8', 'replace'))!r} is no URL") from None
    host = url.raw_host.decode("ascii", "replace")  # httpx decodes no host that IDNA 2008 forbids, and some exist
    if url.raw_scheme not in DEFAULT_PORTS or not host:
        raise DownloadError(f"only http and https links with a host are fetched, not {describe(link)}")
    if not _HOST.fullmatch(host) or (url.port or 0) > 65535:
        raise DownloadError(f"the host or port of {describe(link)} is none that can exist")
    if url.userinfo:
        # https://api.evolink.ai@example.com/ leads to example.com.
        raise DownloadError(f"a link with a user name in it is not fetched: its true host is {host!r}")
    return url


def next_hop(url: httpx.URL, location: str | None) -> httpx.URL:
    """Where a redirect leads. Raises `DownloadError` where it must not be followed."""
    if not location:
        raise DownloadError(f"{describe(str(url))} redirects without saying where")
    try:
        target = url.join(location)
    except (httpx.InvalidURL, ValueError):
        raise DownloadError(f"{describe(str(url))} redirects to something that is no URL") from None
    target = checked_link(str(target))
    if url.scheme == "https" and target.scheme == "http":
        raise DownloadError(f"{describe(str(url))} redirects from https to http")
    return target


def describe(link: str) -> str:
    """A link for people and logs: without its query, which may hold a signature."""
    return excerpt(link.partition("?")[0].partition("#")[0].encode("utf-8", "replace"))


def _vet(address: str) -> None:
    """Raise `AddressRefused` for an address that isn't public."""
    reason = refusal(address)
    if reason is not None:
        raise AddressRefused(reason)


async def _check_resolved(url: httpx.URL) -> None:
    """`_vet` for a host that a proxy will connect to. A name that only the proxy can resolve is the proxy's business.

    Without a proxy there is no second look-up that could give another answer: the connection vets what it looks up.
    """
    host, port = place_of(url)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return
    for *_, address in found:
        _vet(str(address[0]))


def _reason(error: BaseException) -> str:
    text = excerpt(str(error).encode("utf-8", "replace"))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

"""One GET of a media link: without the key, to public addresses only, redirects followed by hand."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import cast

import httpx

from evolink_async.errors import DownloadError
from evolink_async.http.addresses import refusal
from evolink_async.http.answers import excerpt
from evolink_async.http.exchange import CONNECT_TIMEOUT, USER_AGENT
from evolink_async.http.transport import SlotTransport

logger = logging.getLogger("evolink_async.saving")

MOST_REDIRECTS = 5
ANSWER_TIMEOUT = 30.0  # seconds from the connection slot to the answer's headers
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?", re.ASCII)
_PORTS = {"http": 80, "https": 443}

Place = tuple[str, int]  # host and port


class MediaCut(Exception):
    """The transfer broke off, or never began; another attempt may succeed."""


class MediaAnswer:
    """An answer whose body is still to be read. To be closed, whatever happens."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self.status = response.status_code
        self.headers: Mapping[str, str] = {name.lower(): value for name, value in response.headers.items()}

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes. Raises `MediaCut`."""
        body = cast("AsyncGenerator[bytes, None]", aiter(cast(httpx.AsyncByteStream, self._response.stream)))
        async with aclosing(body):
            try:
                async for chunk in body:
                    yield chunk
            except httpx.HTTPError as error:
                raise MediaCut(_reason(error)) from error

    async def aclose(self) -> None:
        """Close it; the connection is kept if the body was read to its end."""
        await self._response.aclose()


class MediaSource:
    """Where links are fetched from: a transport of their own, and the rule which places they may lead to.

    own: the API's places, which may be private (a local emulator). allow_private: all may.
    """

    def __init__(self, transport: SlotTransport, own: frozenset[Place], *, allow_private: bool) -> None:
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
        open_to_all = self._allow_private or place_of(url) in self._own
        try:
            proxied = self._is_proxied(url)
        except httpx.HTTPError as error:
            raise MediaCut(_reason(error)) from error
        if not open_to_all:
            await _check_resolved(url, proxied=proxied)
        loop = asyncio.get_running_loop()
        whole = asyncio.timeout(None)
        request = httpx.Request(
            "GET",
            url,
            headers={"User-Agent": USER_AGENT, "Accept": "*/*", "Accept-Encoding": "identity", **headers},
            extensions={
                "timeout": {"connect": CONNECT_TIMEOUT, "read": None, "write": ANSWER_TIMEOUT, "pool": None},
                "on_slot": lambda: whole.reschedule(loop.time() + ANSWER_TIMEOUT),
            },
        )
        try:
            async with whole:
                response = await self._transport.handle_async_request(request)
        except TimeoutError as error:
            raise MediaCut(f"no answer within {ANSWER_TIMEOUT:g} s") from error
        except (httpx.HTTPError, OSError) as error:
            raise MediaCut(_reason(error)) from error
        logger.debug("GET %s -> %d", describe(str(url)), response.status_code)
        if not open_to_all and not proxied:
            reason = _refused_peer(response)
            if reason is not None:
                await response.aclose()
                raise _private(url, reason)
        return MediaAnswer(response)

    def _is_proxied(self, url: httpx.URL) -> bool:
        # Behind a proxy the peer is the proxy, and which addresses may be reached is for the proxy to say.
        host, port = place_of(url)
        origin = (url.raw_scheme, host.encode("ascii"), port)
        return self._transport._proxies.for_origin(origin) is not None


def place_of(url: httpx.URL | str) -> Place:
    """Host and port that a URL leads to."""
    url = httpx.URL(url)
    return url.raw_host.decode("ascii"), url.port or _PORTS.get(url.scheme, 0)


def checked_link(link: str) -> httpx.URL:
    """The link as a URL. Raises `DownloadError` unless it is http(s) with a host and without a user name."""
    try:
        url = httpx.URL(link)
    except (httpx.InvalidURL, TypeError, UnicodeError):
        raise DownloadError(f"the link {excerpt(link.encode('utf-8', 'replace'))!r} is no URL") from None
    if url.scheme not in _PORTS or not url.host:
        raise DownloadError(f"only http and https links with a host are fetched, not {describe(link)}")
    if not _HOST.fullmatch(url.raw_host.decode("ascii", "replace")) or (url.port or 0) > 65535:
        raise DownloadError(f"the host or port of {describe(link)} is none that can exist")
    if url.userinfo:
        # https://api.evolink.ai@example.com/ leads to example.com.
        raise DownloadError(f"a link with a user name in it is not fetched: its true host is {url.host!r}")
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


async def _check_resolved(url: httpx.URL, *, proxied: bool) -> None:
    """Raise `DownloadError` if the name leads to an address that isn't public.

    The connection looks the name up again, so its peer is checked as well; this check comes first because it keeps
    any request from being sent there.
    """
    host, port = place_of(url)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        if proxied:
            return
        raise MediaCut(f"the host {host} is not found: {_reason(error)}") from error
    for *_, address in found:
        reason = refusal(str(address[0]))
        if reason is not None:
            raise _private(url, reason)


def _refused_peer(response: httpx.Response) -> str | None:
    """Why the machine that answered is none to fetch from."""
    stream = response.extensions.get("network_stream")
    peer = None if stream is None else stream.get_extra_info("server_addr")
    return refusal(str(peer[0])) if peer else "an address that cannot be checked"


def _private(url: httpx.URL, reason: str) -> DownloadError:
    return DownloadError(
        f"the host {url.host!r} of the link is {reason}, which is not fetched from; "
        "if that is meant to be so, make the client with allow_private_hosts=True"
    )


def _reason(error: BaseException) -> str:
    text = excerpt(str(error).encode("utf-8", "replace"))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

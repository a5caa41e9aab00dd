"""Ways in which the service cannot be reached (F1, F3, F4, F5): nothing is sent, and later one paid request is."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support import read_request
from test_transport import TEST_CERTIFICATE

from evolink_async import AsyncEvoLink, ConnectionFailedError, ImageRequest, RetryPolicy

TASK = {"id": "task-1", "status": "completed", "results": ["https://files.invalid/a.png"]}
TROUBLES = ["the name is unknown", "nobody answers the SYN", "TLS is reset", "TLS ends", "TLS is silent"]


class Service:
    """Takes paid requests over TLS. `bad`: so many ways to it fail first."""

    def __init__(self, trouble: str, bad: float, tls: ssl.SSLContext) -> None:
        self.trouble, self.bad, self.tls = trouble, bad, tls
        self.tried = self.posts = 0

    def fails(self) -> bool:
        self.tried += 1
        return self.tried <= self.bad

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self.trouble.startswith("TLS") and self.fails():
                await reader.read(1)  # the handshake has begun
                if self.trouble == "TLS is silent":
                    await reader.read()
                elif self.trouble == "TLS is reset":
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            await writer.start_tls(self.tls)
            while True:
                self.posts += (await read_request(reader)).startswith(b"POST")
                body = json.dumps(TASK).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def behind(
    trouble: str, bad: float, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Service, AsyncEvoLink]]:
    certificate = folder / "certificate.pem"
    certificate.write_text(TEST_CERTIFICATE)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    service = Service(trouble, bad, tls)
    loop = asyncio.get_running_loop()
    look_up, connect = loop.getaddrinfo, loop.sock_connect

    async def getaddrinfo(host: Any, *args: Any, **options: Any) -> Any:
        if trouble == "the name is unknown" and service.fails():
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return await look_up("127.0.0.1", *args, **options)

    async def sock_connect(sock: Any, address: Any) -> None:
        if trouble == "nobody answers the SYN" and service.fails():
            await asyncio.Event().wait()
        await connect(sock, address)

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(loop, "sock_connect", sock_connect)
    monkeypatch.setattr(logging.getLogger("asyncio"), "disabled", True)  # the server's side of broken handshakes
    server = await asyncio.start_server(service.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with (
        server,
        AsyncEvoLink(
            base_url=f"https://localhost:{port}", request_timeout=0.5, retry=RetryPolicy(0.01, 0.02)
        ) as client,
    ):
        yield service, client


@pytest.mark.parametrize("trouble", TROUBLES)
async def test_what_could_not_be_sent_at_first_is_sent_once(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with behind(trouble, 3, tmp_path, monkeypatch) as (service, client):
        async with client.pool(
            [ImageRequest(model="unknown", prompt="x")], ledger=tmp_path / "job.db", max_credits=5
        ) as pool:
            [outcome] = [outcome async for outcome in pool]
        assert outcome.status == "completed"
        assert outcome.attempts == 1
        assert service.tried > 3
        assert service.posts == 1


@pytest.mark.parametrize("trouble", TROUBLES)
async def test_what_cannot_be_sent_says_where_to_and_costs_nothing(
    trouble: str, tmp_path: Path, api_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with behind(trouble, 1e9, tmp_path, monkeypatch) as (service, client):
        with pytest.raises(ConnectionFailedError, match="localhost") as caught:
            await client.images.submit(model="unknown", prompt="x", timeout=1.5)
        assert api_key not in repr(caught.value) + str(caught.value.__cause__)
        assert str(caught.value).count("localhost") == 1
        assert service.tried > 1
        assert service.posts == 0


async def test_nothing_is_sent_to_a_certificate_that_nobody_has_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with behind("none", 0, tmp_path, monkeypatch) as (service, client):
        monkeypatch.delenv("SSL_CERT_FILE")
        with pytest.raises(ConnectionFailedError, match="certificate verify failed") as caught:
            await client.images.submit(model="unknown", prompt="x", timeout=1)
        assert "verify=" not in str(caught.value)
        assert service.posts == 0

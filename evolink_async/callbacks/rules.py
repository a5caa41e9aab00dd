"""What a callback is worth. Pure: nothing here sends, waits or keeps a clock.

The service signs nothing (no source shows a signature, a secret or a timestamp). So the address that it calls is the
only thing that tells it from anybody else: it ends in a token that only we can make. The body is worth one task's id.

    token = base64url(name + seal)      name: 16 bytes that stand for a job and a request in it
                                        seal: 16 bytes that only who has the secret can put to a name

A token holds neither the job's name nor the request's key in the clear: keys are never sent to the service.
"""

from __future__ import annotations

import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import OrderedDict
from typing import Generic, TypeVar
from urllib.parse import urlsplit

from pydantic_core import from_json

from evolink_async.checks import checked_id
from evolink_async.errors import ConfigurationError, InvalidRequestError
from evolink_async.http.addresses import is_loopback

K = TypeVar("K")
V = TypeVar("V")

MOST_BYTES = 2**20  # of a body
BODY_SECONDS = 10.0  # for a whole body; the service waits no longer for its answer (documented)
LEAST_SECRET = 16  # bytes
LONGEST_URL = 2048  # characters, documented
TAKEN = 204

_NAME = _SEAL = 16
_TOKEN = 43  # characters of 32 bytes in base64url, without padding
_LONGEST_NUMBER = 18  # digits of a Content-Length that is worth reading


class Tokens:
    """Makes and checks the tokens of one secret. The secret shows nowhere."""

    __slots__ = ("_naming", "_sealing")

    def __init__(self, secret: str | bytes) -> None:
        if not isinstance(secret, str | bytes):
            raise ConfigurationError(f"secret must be text or bytes, got {type(secret).__name__}")
        raw = secret.encode("utf-8", "surrogatepass") if isinstance(secret, str) else secret
        if len(raw) < LEAST_SECRET:
            raise ConfigurationError(
                f"secret has {len(raw)} bytes and must have {LEAST_SECRET} or more: make one with "
                "`python -c 'import secrets; print(secrets.token_urlsafe(32))'` and keep it over restarts"
            )
        self._naming = _digest(raw, b"evolink-async callback name")
        self._sealing = _digest(raw, b"evolink-async callback seal")

    def name(self, job: str, identity: str) -> bytes:
        """What stands for a request of a job, in all processes that have the secret."""
        job_bytes = job.encode("utf-8", "surrogatepass")
        text = b"%d:%b:%b" % (len(job_bytes), job_bytes, identity.encode("utf-8", "surrogatepass"))
        return _digest(self._naming, text)[:_NAME]

    def token(self, name: bytes) -> str:
        """The last part of the address that is called for this name."""
        return urlsafe_b64encode(name + _digest(self._sealing, name)[:_SEAL]).rstrip(b"=").decode()

    def name_in(self, token: str) -> bytes | None:
        """The name in a token of ours; None for anything else."""
        if len(token) != _TOKEN or not token.isascii():
            return None
        try:
            name = urlsafe_b64decode(f"{token}=")[:_NAME]
        except ValueError:
            return None
        # The whole text is compared, so that a name has one token, however lenient the decoding is.
        return name if hmac.compare_digest(self.token(name), token) else None

    def __repr__(self) -> str:
        return "<Tokens>"

    def __reduce__(self) -> str:
        raise TypeError("tokens are not copied: they would carry the secret")


def judge_head(tokens: Tokens, method: str, path: str, length: bytes | None) -> bytes | int:
    """The name of the request that is called about, or the status that refuses the call with its body unread.

    path: only its last part counts, wherever the receiver is mounted. length: of the body as it is announced.
    """
    if method != "POST":
        return 405
    name = tokens.name_in(path.rpartition("/")[2])
    if name is None:
        return 404
    if length is not None and length.isdigit() and (len(length) > _LONGEST_NUMBER or int(length) > MOST_BYTES):
        return 413
    return name


def task_id_in(body: bytes) -> str | None:
    """The id of the task that a body is about; None if it is about none. Nothing else of it is of use."""
    try:
        told = from_json(body)
        return checked_id(told["id"]) if isinstance(told, dict) else None
    except (ValueError, KeyError, InvalidRequestError):
        return None


class Recent(Generic[K, V]):
    """The latest of what was put in, at most `most` of it."""

    __slots__ = ("_most", "_values")

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[K, V] = OrderedDict()

    def put(self, key: K, value: V) -> None:
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._most:
            self._values.popitem(last=False)

    def get(self, key: K) -> V | None:
        return self._values.get(key)

    def pop(self, key: K) -> V | None:
        return self._values.pop(key, None)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)


def checked_public_url(url: str) -> str:
    """The address under which the receiver is reached, without a slash at the end. Raises `ConfigurationError`."""
    if not isinstance(url, str):
        raise ConfigurationError(f"public_url must be an https address, got {type(url).__name__}")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ConfigurationError(f"public_url is no URL: {url[:100]!r}") from None
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise ConfigurationError(f"public_url must be plain ASCII without spaces, got {url[:100]!r}")
    if "@" in parts.netloc or "?" in url or "#" in url:
        raise ConfigurationError("public_url must have no user, query or fragment")
    if parts.scheme not in ("https", "http") or not host or port == 0:
        raise ConfigurationError(f"public_url must begin with https:// and a host, got {url[:100]!r}")
    if parts.scheme == "http" and not is_loopback(host):
        message = "public_url must be https: the service calls no other (http is for a loopback host and an emulator)"
        raise ConfigurationError(f"{message}, got {url[:100]!r}")
    root = url.rstrip("/")
    if len(root) + 1 + _TOKEN > LONGEST_URL:
        raise ConfigurationError(f"public_url is too long: with its token it may have {LONGEST_URL} characters")
    return root


def _digest(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256")

"""Links in a request: media the service has to fetch, the address it calls back. No host is resolved here."""

from __future__ import annotations

import re
import socket
from ipaddress import IPv6Address, ip_address
from typing import Literal
from urllib.parse import urlsplit

from .model import ParamSpec

Remark = tuple[Literal["error", "warning"], str]

_UPLOAD = "upload it with client.files.upload and give the link it returns"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{64,}\Z")
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal", ".localdomain")
_MB = 2**20
_MAX_CALLBACK = 2048  # characters, documented


def media_remark(value: str, spec: ParamSpec, *, allow_private_hosts: bool) -> Remark | None:
    """What is wrong with a media value, if anything."""
    if value[:8].lower().startswith(("https://", "http://")):
        return _link_remark(value, allow_private_hosts=allow_private_hosts)
    if value[:5].lower() == "data:":
        return _inline_remark(value, spec)
    if spec.data_urls == "yes" and _looks_like_base64(value):
        return _size_remark(value, spec)
    shown = repr(value[:60])
    if _SCHEME.match(value) and not re.match(r"[A-Za-z]:[\\/]", value):
        return "error", f"{shown} is not an http(s) link that the service can fetch; {_UPLOAD}"
    return "error", f"{shown} is a local path or no link at all; give a pathlib.Path to have it uploaded, or {_UPLOAD}"


def callback_remark(value: str, *, allow_private_hosts: bool) -> Remark | None:
    """What is wrong with a callback address, if anything (https, public host, length: documented)."""
    if len(value) > _MAX_CALLBACK:
        return "error", f"{len(value)} characters given, at most {_MAX_CALLBACK}"
    scheme, host = _parts(value)
    if scheme not in ("https", "http") or not host or not value.isprintable() or " " in value or not _has_port(value):
        return "error", f"{value[:60]!r} is no https link"
    if not allow_private_hosts:
        if scheme != "https":
            return "error", "the service calls https links only"
        if _is_private(host):
            return "error", f"the service refuses private and loopback hosts such as {host!r}"
    if "@" in urlsplit(value).netloc:
        # Not shown, as it may hold a password.
        return "warning", f"no page says that the service logs in with the name before {host!r}; use a secret path"
    return None


def _link_remark(value: str, *, allow_private_hosts: bool) -> Remark | None:
    _, host = _parts(value)
    if not host:
        return "error", f"{value[:60]!r} has no host"
    if not allow_private_hosts and _is_private(host):
        # a warning only: no page says that such links are refused, they just cannot work
        return "warning", f"the service cannot fetch from the private host {host!r}; {_UPLOAD}"
    return None


def _inline_remark(value: str, spec: ParamSpec) -> Remark | None:
    if spec.data_urls == "no":
        return "error", f"an inline data: URL is not accepted here; {_UPLOAD}"
    too_large = _size_remark(value, spec)
    if too_large is None and spec.data_urls == "unsure":
        return "warning", f"no page says that inline data: URLs are accepted here; safer: {_UPLOAD}"
    return too_large


def _size_remark(value: str, spec: ParamSpec) -> Remark | None:
    # 4 characters of base64 carry 3 bytes
    size = (len(value) - value.find(",", 0, 200) - 1) * 3 // 4
    if spec.max_mb is None or size <= spec.max_mb * _MB:
        return None
    return "error", f"an inline file of {size / _MB:.1f} MB given, at most {spec.max_mb} MB"


def _looks_like_base64(value: str) -> bool:
    return _BASE64.match(value[:4096].rstrip("=\n")) is not None


def _parts(url: str) -> tuple[str, str]:
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname or ""
    except ValueError:  # such as an unclosed IPv6 bracket
        return "", ""


def _has_port(url: str) -> bool:
    """Whether a port can be what the URL says, or is not said."""
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def _is_private(host: str) -> bool:
    name = host.rstrip(".")
    if name == "localhost" or name.endswith(_LOCAL_SUFFIXES):
        return True
    if not (name[:1].isdigit() or ":" in name):
        return False
    try:
        address = ip_address(name)
    except ValueError:
        return _is_private_shorthand(name)
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return not address.is_global


def _is_private_shorthand(name: str) -> bool:
    """Old spellings of an IPv4 address that resolvers still read: 127.1, 0x7f.1, 2130706433."""
    try:
        return not ip_address(socket.inet_aton(name)).is_global
    except (OSError, ValueError):  # an ordinary name that starts with a digit
        return False

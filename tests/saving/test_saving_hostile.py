"""Names that want out of the folder, links that want into the network. More lines: see `hostile`."""

from __future__ import annotations

import itertools
from pathlib import Path

from hostile import check_links, check_names

_UPS = [
    "../", "..\\", "..%2f", "%2e%2e/", "%2e%2e%2f", "..%5c", "%252e%252e%252f", "..%c0%af", "..%ef%bc%8f", "....//",
    "..;/", "\uff0e\uff0e\u2215", ".\u200b./", "..\0/", "..%00/", "/..//", "\u202e../", "%uff0e%uff0e%u2215",
]  # fmt: skip
_GOALS = [
    "etc/passwd", "windows\\win.ini", "boot.ini", "", "CON", "nul.txt", "com1", "aux.png", ".bashrc", "-rf", "a:b",
    "a.png::$DATA", "x" * 400, "é" * 300, "\ud800", "a.", "a ", "~root", "$HOME", "index.html%00.png", "LPT\u00b9",
]  # fmt: skip


def traversals() -> list[str]:
    """Every way up, one to eight times, to every goal; absolute, with drives and shares."""
    ways = itertools.product(_UPS, (1, 2, 8), _GOALS)
    starts = ("/", "\\", "C:\\", "c:/", "\\\\host\\share\\", "file:///", "//", "./", "\\\\?\\C:\\")
    return [f"{up * times}{goal}" for up, times, goal in ways] + [
        f"{start}{goal}" for start in starts for goal in _GOALS
    ]


def test_no_line_of_a_traversal_list_leaves_the_folder(tmp_path: Path) -> None:
    found = check_names(traversals(), tmp_path)
    assert found["lines"] > 1000
    assert found["names"] > 1000


_INSIDE = [
    "127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.0x0.0x0.0x1", "0177.0.0.1", "017700000001",
    "0", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "2852039166", "0xa9fea9fe",
    "100.64.0.1", "100.100.100.200", "192.0.0.192", "198.18.0.1", "224.0.0.1", "255.255.255.255", "[::]", "[::1]",
    "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b::a9fe:a9fe]",
    "[2002:7f00:1::]", "[fe80::1]", "[fe80::1%25eth0]", "[fc00::1]", "[fd00:ec2::254]", "[fec0::1]", "[ff02::1]",
    "[2001:db8::1]", "localhost", "LOCALHOST.", "localtest.me", "127.0.0.1.nip.io", "metadata.google.internal",
    "instance-data", "①②⑦.⓪.⓪.①", "127。0。0。1", "evil.example#@127.0.0.1",
    "127.0.0.1#.example.com", "127.0.0.1%2f.example.com", "user:word@127.0.0.1", "example.com@127.0.0.1",
    "127.0.0.1\\@example.com", "127.0.0.1\t", "127.0.0.1%00",
]  # fmt: skip
_SCHEMES = [
    "http://", "https://", "HTTP://", "//", "http:", "http:/", "http:\\\\", "ftp://", "gopher://", "dict://", "jar:",
]  # fmt: skip
_ODD = [
    "file:///etc/passwd", "data:image/png;base64,iVBORw0KGgo=", "netdoc:///etc/passwd",
    "ldap://127.0.0.1:389/%0astats", "http://", "https://:80/", "http://[", "http://]:80/", "http://127.0.0.1:99999/",
    "http://127.0.0.1:-1/", "http://a b/", "http://127.0.0.1:22:80/", "http://\r\nHost: x/",
    "http://example.com\r\nX: y@127.0.0.1/", "\\\\127.0.0.1\\share",
]  # fmt: skip


async def test_no_line_of_a_link_list_reaches_anything_private(tmp_path: Path) -> None:
    """Also as the target of a redirect; and every name that must be looked up leads to this machine."""
    places = itertools.product(_SCHEMES, _INSIDE, ("", ":22"))
    lines = [f"{scheme}{host}{port}/latest/meta-data/x.png" for scheme, host, port in places]
    found = await check_links([*lines, *_ODD], tmp_path / "out")
    assert found["connections to public addresses"] == 0
    assert found["loopback"] > 400

"""Which network addresses a stranger's link may lead to, and which are this machine. Pure."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

# Addresses that carry an IPv4 address, by the bit from which it is counted back (RFC 6052, 3056, 4291).
_NAT64 = IPv6Network("64:ff9b::/96")
_COMPATIBLE = IPv6Network("::/96")
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NOT_FOR_US = tuple(
    ip_network(network)
    for network in ("0.0.0.0/8", "192.0.0.0/24", "192.88.99.0/24", "100.64.0.0/10", "240.0.0.0/4", "2001::/23")
)


def is_loopback(host: str) -> bool:
    """Whether a host, as it stands in a URL, is this machine."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def refusal(text: str) -> str | None:
    """Why this address is none of the public internet, as words like "a loopback address"; None if it is.

    `text` is an address as the system's resolver or a socket gives it, so numeric spellings like 0x7f.1 are gone.
    """
    try:
        address = ip_address(text)
    except ValueError:
        return "no network address"
    if isinstance(address, IPv6Address):
        address = _embedded(address) or address
    if address.is_loopback:
        return "a loopback address"
    if address.is_link_local:
        return "a link-local address"
    if address.is_multicast:
        return "a multicast address"
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return "a private address"
    if not address.is_global or any(address in network for network in _NOT_FOR_US):
        return "a private or reserved address"
    return None


def _embedded(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that this one is a cover for: mapped, NAT64, 6to4, or the old compatible form."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address in _NAT64 or (address in _COMPATIBLE and int(address) > 1):
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return None

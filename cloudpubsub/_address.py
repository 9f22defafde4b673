"""Broker URLs: what may stand in `broker`, taken apart once.

Pure functions, callable from any thread.  Credentials leave here apart from the address, and no error text shows them:
not even when the URL is so wrong that it is a guess where the password stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from cloudpubsub._errors import OptionError

__all__ = ["Address", "BrokerURL", "Refuse", "parse_url", "redact", "split_authority", "split_scheme"]

Refuse = Callable[[str], OptionError]  # makes the error from the reason

_PORTS = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}
_WEBSOCKET_PATH = "/mqtt"
_ALLOWED = (
    "expected mqtt://[user[:password]@]host[:port] (port 1883), mqtts://… (port 8883), or through a WebSocket "
    "ws://…[/path] (port 80, path /mqtt) or wss://… (port 443)"
)
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_PATH = re.compile(r"/(?:[A-Za-z0-9._~!$&'()*+,;=:/-]|%[0-9A-Fa-f]{2})*")
_HOST_MAX = 253


class Address(NamedTuple):
    """Where a broker listens.  `host` is a name or an IP address without brackets; `port` is 1 to 65,535.

    `path` is that of a WebSocket, percent-encoded, and empty where there is none.
    """

    scheme: str
    host: str
    port: int
    tls: bool
    path: str = ""

    @property
    def url(self) -> str:
        """The address as a URL, with its port, without credentials."""
        host = f"[{self.host.replace('%', '%25')}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"

    @property
    def http_headers(self) -> dict[str, str]:
        """The headers of a WebSocket's handshake that name the host."""
        # The zone of an address is our own affair.
        host = f"[{self.host.partition('%')[0]}]" if ":" in self.host else self.host.encode("idna").decode()
        if self.port != _PORTS[self.scheme]:
            host += f":{self.port}"
        return {"Host": host, "Origin": f"{'https' if self.tls else 'http'}://{host}"}

    def __str__(self) -> str:
        return self.url


class BrokerURL(NamedTuple):
    """A broker URL taken apart: the address, and the credentials that stood in it, percent-decoded."""

    address: Address
    username: str | None
    password: str | None

    def __repr__(self) -> str:
        return f"BrokerURL({self.address.url!r})"


def redact(url: str) -> str:
    """`url` without anything that may be a secret, for messages."""
    scheme, separator, rest = url.rpartition("://") if "@" not in url else url.partition("://")
    if not separator:
        scheme, rest = "", url
    if "@" in rest:
        rest = "***@" + rest.rpartition("@")[2]
    elif (colon := re.search(r":(?!\d*/?$)", rest)) and not rest.startswith("["):
        # "mqtt://user:secret" with the host forgotten: what stands where a port should be may be a password.
        rest = rest[: colon.start()] + ":***"
    return scheme + separator + rest


def parse_url(url: str, field: str = "broker") -> BrokerURL:
    """Take a broker URL apart.  Raises OptionError, naming `field`, for anything that is not exactly one."""
    if not isinstance(url, str):
        raise OptionError(field, repr(type(url).__name__), _ALLOWED)

    def refuse(why: str) -> OptionError:
        return OptionError(field, repr(redact(url)), f"{why}; {_ALLOWED}")

    scheme, rest = split_scheme(url, refuse)
    if scheme not in _PORTS:
        raise refuse("the scheme must be mqtt, mqtts, ws or wss")
    path = ""
    if scheme in ("ws", "wss"):
        rest, path = _split_path(rest, refuse)
    host, port, username, password = split_authority(rest, _PORTS[scheme], refuse)
    return BrokerURL(Address(scheme, host, port, scheme in ("mqtts", "wss"), path), username, password)


def _split_path(rest: str, refuse: Refuse) -> tuple[str, str]:
    rest, slash, path = rest.partition("/")
    if "@" in path:  # or what stands before it could be a password with a slash in it
        raise refuse("write @ in the path as %40, and / in user name or password as %2F")
    if "?" in path or "#" in path:
        raise refuse("a query or fragment has no meaning here")
    path = slash + path if slash else _WEBSOCKET_PATH
    if not _PATH.fullmatch(path):
        raise refuse("write what is special in the path as %XX")
    return rest, path


def split_scheme(url: str, refuse: Refuse) -> tuple[str, str]:
    """The scheme in small letters, empty if there is none, and what follows ://."""
    if any(ord(character) <= 0x20 or ord(character) == 0x7F for character in url):
        raise refuse("it contains a space or a control character")
    scheme, separator, rest = url.partition("://")
    return (scheme.lower(), rest) if separator else ("", url)


def split_authority(
    authority: str, default_port: int | None, refuse: Refuse
) -> tuple[str, int, str | None, str | None]:
    """Host, port, user name and password of `[user[:password]@]host[:port]`, a last slash aside."""
    userinfo, at, host_port = authority.rpartition("@")
    if any(character in userinfo for character in "/?#"):
        raise refuse("write / ? # in user name or password as %2F %3F %23")
    if at and _BAD_ESCAPE.search(userinfo):
        raise refuse("write % in user name or password as %25")
    host_port = host_port.removesuffix("/")
    if any(character in host_port for character in "/?#\\"):
        raise refuse("a path, query or fragment has no meaning here")
    host, port = _split_host_port(host_port, default_port, refuse)
    username = password = None
    if at:
        from urllib.parse import unquote  # rarely needed, and slow to import

        user, colon, secret = userinfo.partition(":")
        try:
            username = unquote(user, errors="strict")
            password = unquote(secret, errors="strict") if colon else None
        except UnicodeDecodeError:
            raise refuse("user name and password must be UTF-8") from None
        if not username:
            raise refuse("the user name before @ is empty")
    return host, port, username, password


def _split_host_port(host_port: str, default_port: int | None, refuse: Refuse) -> tuple[str, int]:
    if host_port.startswith("["):
        import ipaddress
        from urllib.parse import unquote

        host, bracket, port_text = host_port[1:].partition("]")
        if not bracket or (port_text and not port_text.startswith(":")):
            raise refuse("an IPv6 address stands in brackets, as in mqtt://[::1]:1883")
        host = unquote(host)
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise refuse("what stands in brackets is not an IPv6 address") from None
    else:
        host, colon, port_text = host_port.partition(":")
        port_text = colon + port_text
        if ":" in port_text[1:]:
            raise refuse("more than one colon: an IPv6 address stands in brackets, a colon in a user name is %3A")
        _check_name(host, refuse)
    if not port_text and default_port is not None:
        return host, default_port
    digits = port_text[1:]
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 5 or not 1 <= int(digits) <= 65_535:
        raise refuse("the port must be 1 to 65535")
    return host, int(digits)


def _check_name(host: str, refuse: Refuse) -> None:
    if not host:
        raise refuse("the host is missing")
    try:
        encoded = host.encode("idna")
    except UnicodeError:
        raise refuse("the host is not a valid name") from None
    if len(encoded) > _HOST_MAX or not re.fullmatch(rb"[A-Za-z0-9._-]+", encoded):
        raise refuse("the host is not a valid name")

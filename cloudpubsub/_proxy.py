"""Proxies: what may stand in `proxy`, and connecting through one.

HTTP's CONNECT is spoken here: PySocks reads the proxy's answer through a buffer, so what comes behind the first line
in the same piece is lost, and what comes in a later one is taken for the broker's.  SOCKS is PySocks's.
"""

from __future__ import annotations

import base64
import errno
import importlib
import re
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

from cloudpubsub._address import redact, split_authority, split_scheme
from cloudpubsub._deadline import left_s
from cloudpubsub._errors import OptionError
from cloudpubsub._fields import ProxyURL

__all__ = ["Proxy", "ProxyError", "open_through", "parse_proxy"]

_ALLOWED = f"expected {ProxyURL.allowed}"
_SOCKS_TEXT_MAX = 127  # bytes of user name, password or host; PySocks says wrongly how long a longer one is
_ANSWER_MAX = 16 * 1024
_SHOWN = 80


class ProxyError(OSError):
    """The proxy cannot be reached, or does not let us through."""

    def __init__(self, proxy: Proxy, text: str) -> None:
        super().__init__(errno.EPROTO, f"proxy {proxy.url}: {text}")


class Proxy(NamedTuple):
    """A proxy's URL taken apart; the credentials are percent-decoded and never shown."""

    scheme: str
    host: str
    port: int
    username: str | None = None
    password: str | None = None

    @property
    def url(self) -> str:
        """Without credentials."""
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def __repr__(self) -> str:
        return f"Proxy({self.url!r})"


def parse_proxy(url: str, name: str = "proxy") -> Proxy:
    """Take a proxy's URL apart.  OptionError, naming `name`, also if it needs a package that is not there."""
    if not isinstance(url, str):
        raise OptionError(name, repr(type(url).__name__), _ALLOWED)

    def refuse(why: str) -> OptionError:
        return OptionError(name, repr(redact(url)), f"{why}; {_ALLOWED}")

    scheme, rest = split_scheme(url, refuse)
    if scheme not in ("socks5", "socks4", "http"):
        raise refuse("the scheme must be socks5, socks4 or http")
    host, port, username, password = split_authority(rest, None, refuse)
    if scheme == "socks5":
        if (username is None) != (not password):
            raise refuse("user name and password go together")
        if any(len((text or "").encode()) > _SOCKS_TEXT_MAX for text in (username, password)):
            raise refuse(f"user name and password have at most {_SOCKS_TEXT_MAX} bytes each")
    if scheme == "socks4" and (password is not None or "\0" in (username or "")):
        raise refuse("SOCKS 4 has a user name without NUL and no password")
    if scheme == "http" and ":" in (username or ""):
        raise refuse("HTTP allows no colon in a user name")
    if scheme != "http":
        try:
            importlib.import_module("socks")
        except ImportError:
            allowed = "SOCKS needs the package PySocks, which comes with pip install 'cloudpubsub[proxy]'"
            raise OptionError(name, repr(redact(url)), allowed) from None
    return Proxy(scheme, host, port, username, password)


def open_through(
    proxy: Proxy, host: str, port: int, deadline_s: float, opened: Callable[[socket.socket], object]
) -> socket.socket:
    """Connect to `host`, whose name the proxy resolves, until `deadline_s` on the monotonic clock.  Blocks.

    `opened` is given each socket as soon as there is one.  Raises ProxyError or TimeoutError.
    """
    open_one = _open_http if proxy.scheme == "http" else _open_socks
    try:
        return open_one(proxy, host, port, deadline_s, opened)
    except (ProxyError, TimeoutError):
        raise
    except OSError as exc:
        raise ProxyError(proxy, exc.strerror or str(exc)) from exc


def _open_http(
    proxy: Proxy, host: str, port: int, deadline_s: float, opened: Callable[[socket.socket], object]
) -> socket.socket:
    sock = socket.create_connection((proxy.host, proxy.port), left_s(deadline_s))
    try:
        opened(sock)
        target = f"{f'[{host}]' if ':' in host else host.encode('idna').decode()}:{port}"
        request = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n"
        if proxy.username is not None:
            pair = base64.b64encode(f"{proxy.username}:{proxy.password or ''}".encode()).decode()
            request += f"Proxy-Authorization: Basic {pair}\r\n"
        sock.sendall(request.encode() + b"\r\n")
        # Byte by byte: what follows the empty line is the broker's.
        answer = bytearray()
        while not answer.endswith((b"\r\n\r\n", b"\n\n")):
            if len(answer) >= _ANSWER_MAX:
                raise ProxyError(proxy, f"an answer of more than {_ANSWER_MAX} bytes")
            sock.settimeout(left_s(deadline_s))
            byte = sock.recv(1)
            if not byte:
                raise ProxyError(proxy, "hung up in the middle of its answer")
            answer += byte
        if not re.match(rb"HTTP/1\.[01] 2[0-9]{2}\b", answer):
            first = bytes(answer[:_SHOWN]).partition(b"\n")[0].strip().decode("ascii", "replace")
            raise ProxyError(proxy, f"answered {first!r}")
        return sock
    except BaseException:
        sock.close()
        raise


def _open_socks(
    proxy: Proxy, host: str, port: int, deadline_s: float, opened: Callable[[socket.socket], object]
) -> socket.socket:
    socks: Any = importlib.import_module("socks")

    class Limited(socks.socksocket):  # type: ignore[misc]
        """Its time limit is for the whole negotiation: PySocks would wait as long for each byte."""

        def recv_into(self, *args: Any) -> Any:
            socket.socket.settimeout(self, left_s(deadline_s))
            return super().recv_into(*args)

    if len(host.encode("idna")) > _SOCKS_TEXT_MAX:
        raise ProxyError(proxy, f"the name of the broker has more than {_SOCKS_TEXT_MAX} bytes")
    kind = socks.SOCKS5 if proxy.scheme == "socks5" else socks.SOCKS4
    error: Exception = ProxyError(proxy, "its name has no address")
    for family, _, _, _, address in socket.getaddrinfo(proxy.host, proxy.port, 0, socket.SOCK_STREAM):
        sock = Limited(family, socket.SOCK_STREAM)
        try:
            opened(sock)
            sock.set_proxy(kind, address[0], proxy.port, True, proxy.username, proxy.password)
            sock.settimeout(left_s(deadline_s))
            sock.connect((host, port))
            # From here on a socket like any other, without PySocks's ideas of how one behaves.
            plain = socket.socket(fileno=sock.detach())
            plain.settimeout(left_s(deadline_s))
            return plain
        except socks.ProxyError as exc:
            sock.close()
            if isinstance(exc.socket_err, TimeoutError):
                raise TimeoutError("timed out") from exc
            error = ProxyError(proxy, str(exc))
            error.__cause__ = exc
        except BaseException:
            sock.close()
            raise
    raise error

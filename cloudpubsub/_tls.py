"""TLS settings, and the context they make.

`TLS` is immutable and may be shared between threads.  It keeps paths, not contents: `context()` reads the files again
for every connection, so renewed certificates are used without a restart.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from cloudpubsub._errors import OptionError, TLSFileError

if TYPE_CHECKING:
    import ssl

__all__ = ["TLS"]

_ALPN_MAX = 255


@dataclass(frozen=True, slots=True)
class TLS:
    """How a TLS connection is made and what is verified.

    Args:
        ca: File (or directory, as `openssl rehash` leaves it) with the certificates to trust.  None: those of the
            operating system.
        cert: PEM file with the client certificate and its chain.  None: no client certificate.
        key: PEM file with the private key.  None: it is in `cert`.
        key_password: Opens an encrypted key.  Never shown in repr or errors.
        alpn: Application protocols to offer, most wanted first, such as `("x-amzn-mqtt-ca",)`.
        insecure: True accepts any certificate for any host: for a laboratory, never for a network.

    TLS 1.2 is the least that is accepted.  Raises OptionError for values that can never work.
    """

    ca: str | os.PathLike[str] | None = None
    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    key_password: str | None = field(default=None, repr=False)
    alpn: tuple[str, ...] = ()
    insecure: bool = False

    def __post_init__(self) -> None:
        for name in ("ca", "cert", "key"):
            path = getattr(self, name)
            if path is None:
                continue
            text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
            if not isinstance(text, str) or not text or "\0" in text:
                raise OptionError(f"tls.{name}", repr(path), "expected the path of a PEM file, or None")
            object.__setattr__(self, name, text)
        if self.key_password is not None and not isinstance(self.key_password, str):
            raise OptionError("tls.key_password", f"a {type(self.key_password).__name__}", "expected a str or None")
        if self.cert is None and (self.key is not None or self.key_password is not None):
            raise OptionError("tls.cert", "None", "a key needs the certificate that it belongs to")
        if not isinstance(self.insecure, bool):
            raise OptionError("tls.insecure", repr(self.insecure), "expected True or False")
        alpn: object = self.alpn
        if not isinstance(alpn, (tuple, list)):
            raise OptionError("tls.alpn", repr(self.alpn), "expected a tuple of protocol names")
        for name in alpn:
            if not isinstance(name, str) or not name.isascii() or not 1 <= len(name) <= _ALPN_MAX:
                raise OptionError("tls.alpn", repr(name), "a protocol name has 1 to 255 ASCII characters")
        object.__setattr__(self, "alpn", tuple(alpn))

    def context(self) -> ssl.SSLContext:
        """A new context from the files as they are now.

        Reads files, so it may block as long as the disk does; never asks on a terminal.  Any thread may call it.

        Raises:
            TLSFileError: A file cannot be read or does not hold what it should; the error names the file.
        """
        import ssl  # OpenSSL is only for who connects

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.ca is None:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        else:
            self._load_ca(context, os.fspath(self.ca))
        if self.cert is not None:
            self._load_cert(context, os.fspath(self.cert), os.fspath(self.key) if self.key is not None else None)
        if self.alpn:
            context.set_alpn_protocols(list(self.alpn))
        return context

    def _load_ca(self, context: ssl.SSLContext, ca: str) -> None:
        is_directory = os.path.isdir(ca)
        if not is_directory:
            _check_readable("ca", ca)
        try:
            context.load_verify_locations(capath=ca) if is_directory else context.load_verify_locations(cafile=ca)
        except (OSError, ValueError) as exc:
            raise _file_error("ca", ca, "no PEM certificates could be loaded", exc) from exc

    def _load_cert(self, context: ssl.SSLContext, cert: str, key: str | None) -> None:
        _check_readable("cert", cert)
        if key is not None:
            _check_readable("key", key)
        key_file = cert if key is None else key

        def no_password() -> NoReturn:
            # Without this OpenSSL would ask on the terminal and hang a service for ever.
            raise _file_error("key", key_file, "the key is encrypted and key_password is not set", None)

        try:
            context.load_cert_chain(cert, key, password=self.key_password if self.key_password else no_password)
        except TLSFileError:
            raise
        except (OSError, ValueError) as exc:
            what = "certificate and key could not be loaded (format, password, or they do not belong together)"
            shown = cert if key is None else f"{cert}, {key}"
            raise _file_error("cert/key", shown, what, exc) from exc


def _check_readable(name: str, path: str) -> None:
    """OpenSSL's own errors do not say which file is missing."""
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as exc:
        raise TLSFileError(exc.errno, f"tls.{name} cannot be read: {exc.strerror}", path) from exc


def _file_error(name: str, path: str, what: str, exc: Exception | None) -> TLSFileError:
    reason = getattr(exc, "reason", None)
    return TLSFileError(0, f"tls.{name}: {what}" + (f" ({reason})" if reason else ""), path)

"""Brokers for the benchmarks, as child processes on 127.0.0.1 that end with this process: Mosquitto (the Debian
package), rumqttd (the wheel `iotcore`), and a native sink, which acknowledges and does nothing else, so that the
client is what is measured.  Or one that runs already, by its URL.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from . import _native

HOST = "127.0.0.1"
_START_S = 20.0
_PR_SET_PDEATHSIG = 1

# It logs a line at the level of errors for every packet, through Python's logging: that costs it fifteen times what the
# packet does.
_RUMQTTD = (
    "import logging, sys; logging.disable(logging.ERROR); from iotcore import IotCoreBroker; "
    "IotCoreBroker(config_path=sys.argv[1]).run_forever()"
)


@dataclass(frozen=True)
class Target:
    """Where to publish to."""

    name: str
    host: str
    port: int
    ca: str | None = None  # path of the authority's certificate: TLS
    v5_port: int = 0  # 0: the same

    @property
    def order(self) -> dict[str, object]:
        """As parameters of a subject."""
        return {"host": self.host, "port": self.port, "ca": self.ca, "v5_port": self.v5_port or self.port}


def mosquitto_path() -> str | None:
    # Debian puts it where a user's PATH does not look.
    return shutil.which("mosquitto", path=os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin")


def available() -> dict[str, str | None]:
    """Each broker, and what lacks for it, or None."""
    lacks: dict[str, str | None] = {
        "mosquitto": None if mosquitto_path() else "mosquitto",
        "rumqttd": None if importlib.util.find_spec("iotcore") else "iotcore",
    }
    try:
        _native.compiler()
        lacks["sink"] = None
    except _native.Missing as exc:
        lacks["sink"] = str(exc)
    return lacks


def default() -> str:
    """Mosquitto where it is installed, else rumqttd, else the sink."""
    return next((name for name, lack in available().items() if lack is None), "sink")


@contextlib.contextmanager
def running(name: str, *, tls: bool = False) -> Iterator[Target]:
    """`mosquitto`, `rumqttd`, `sink`, or a URL of a broker that runs already.  Raises Missing."""
    if "://" in name:
        parts = urlsplit(name)
        if parts.scheme not in ("mqtt", "tcp") or parts.hostname is None:
            raise SystemExit(f"{name}: only mqtt://HOST:PORT of a broker without TLS can be measured")
        yield Target(name, parts.hostname, parts.port or 1883)
        return
    lack = available().get(name, f"a broker called {name}")
    if lack is not None:
        raise _native.Missing(lack)
    directory = Path(tempfile.mkdtemp(prefix="cloudpubsub-bench-broker-"))
    try:
        ca, certificate, key = _certificates(directory) if tls else (None, None, None)
        if name == "sink":
            with running_peer(certificate=certificate, key=key) as port:
                yield Target("sink", HOST, port, ca)
            return
        start = _mosquitto if name == "mosquitto" else _rumqttd
        with _broker(lambda ports: start(directory, ports, certificate, key), directory / "log") as ports:
            yield Target(name, HOST, ports[0], ca, ports[0] if name == "mosquitto" else ports[1])
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _certificates(directory: Path) -> tuple[str, str, str]:
    """(authority, certificate, key): paths."""
    try:
        import trustme
    except ImportError:
        raise _native.Missing("trustme") from None
    authority = trustme.CA()
    server = authority.issue_cert("localhost", HOST)
    paths = directory / "ca.pem", directory / "server.pem", directory / "server.key"
    authority.cert_pem.write_to_path(str(paths[0]))
    server.cert_chain_pems[0].write_to_path(str(paths[1]))
    server.private_key_pem.write_to_path(str(paths[2]))
    return str(paths[0]), str(paths[1]), str(paths[2])


def _mosquitto(directory: Path, ports: list[int], certificate: str | None, key: str | None) -> list[str]:
    lines = [
        *(["user root"] if os.geteuid() == 0 else []),  # else it becomes one who may not enter our directory
        "sys_interval 0",
        "log_dest none",
        "persistence false",
        "allow_anonymous true",
        "max_queued_messages 0",
        "max_queued_bytes 0",
        "max_inflight_messages 0",
        "set_tcp_nodelay true",
        f"listener {ports[0]} {HOST}",
        *([f"certfile {certificate}", f"keyfile {key}"] if certificate else []),
    ]
    config = directory / "mosquitto.conf"
    config.write_text("\n".join(lines) + "\n")
    return [mosquitto_path() or "mosquitto", "-c", str(config)]


def _rumqttd(directory: Path, ports: list[int], certificate: str | None, key: str | None) -> list[str]:
    text = f"""
        id = 0
        [router]
        id = 0
        max_connections = 1000
        max_outgoing_packet_count = 200
        max_segment_size = {1 << 24}
        max_segment_count = 64
    """
    for section, port in (("v4.1", ports[0]), ("v5.1", ports[1])):
        text += f"""
        [{section}]
        name = "{section}"
        listen = "{HOST}:{port}"
        next_connection_delay_ms = 1
        [{section}.connections]
        connection_timeout_ms = 60000
        max_payload_size = {16 << 20}
        max_inflight_count = 100
        dynamic_filters = true
        """
        if certificate:
            text += f"[{section}.tls]\ncertpath = '{certificate}'\nkeypath = '{key}'\n"
    config = directory / "rumqttd.toml"
    config.write_text(text)
    return [sys.executable, "-c", _RUMQTTD, str(config)]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def _broker(command: Callable[[list[int]], list[str]], log: Path) -> Iterator[list[int]]:
    """The ports that it listens on.  Somebody else may take one that was free a moment ago: then others."""
    for is_last in (False, False, True):
        with socket.socket() as one, socket.socket() as other:
            one.bind((HOST, 0))
            other.bind((HOST, 0))
            ports: list[int] = [one.getsockname()[1], other.getsockname()[1]]
        with log.open("wb") as output:
            child = subprocess.Popen(
                command(ports),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - no other thread runs here yet
            )
        try:
            if _listens(child, ports[0]):
                yield ports
                return
            if is_last:
                raise RuntimeError(f"the broker did not start:\n{log.read_text(errors='replace')[-2000:]}")
        finally:
            child.kill()
            child.wait()


def _listens(child: subprocess.Popen[bytes], port: int) -> bool:
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s and child.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return True
        time.sleep(0.02)
    return False


@contextlib.contextmanager
def running_peer(
    *,
    messages: int = 0,
    window: int = 1_000,
    payload_bytes: int = 64,
    certificate: str | None = None,
    key: str | None = None,
    stamps: Path | None = None,
    port: int = 0,
) -> Iterator[int]:
    """The port of the native sink, which sends `messages` to whoever subscribes.  Raises Missing.

    `stamps`: where it keeps how long after the time in its payload each message came, in ns of 8 bytes.
    """
    if certificate:
        program = _native.build("peer", flags=("-DPEER_TLS",), libraries=("ssl", "crypto"))
    else:
        program = _native.build("peer")
    command = [str(program), str(port), str(messages), str(window), str(payload_bytes)]
    command += [certificate, key] if certificate and key else []
    command += [str(stamps)] if stamps else []
    with _peer(command) as (_, its_port):
        yield its_port


@contextlib.contextmanager
def pausing_sink() -> Iterator[tuple[int, Callable[[], AbstractContextManager[None]]]]:
    """A native sink: its port, and what makes it stand still for as long as that context lasts: the connection stays,
    and nothing is acknowledged."""
    with _peer([str(_native.build("peer")), "0", "0", "1", "0"]) as (child, port):

        @contextlib.contextmanager
        def pause() -> Iterator[None]:
            child.send_signal(signal.SIGSTOP)
            try:
                yield
            finally:
                child.send_signal(signal.SIGCONT)

        yield port, pause


@contextlib.contextmanager
def _peer(command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        line = child.stdout.readline()
        if not line:
            raise RuntimeError("the native peer did not start")
        yield child, int(line)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()

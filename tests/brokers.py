"""Real brokers for the tests, as child processes: Mosquitto (the Debian package) and rumqttd (the wheel ``iotcore``);
NATS and RabbitMQ are in `tests.more_brokers`.

They listen on 127.0.0.1 only, on ports that stay theirs while they are down, so that a client finds them again after a
restart and nobody else in the meantime.  They end with this process, however it ends.

What differs, and was found by reading their sources and by trial (Mosquitto 2.0.11, rumqttd 0.20 in iotcore 0.4;
docs/brokers.md has what users see of it):

* Sessions and queued messages.  Mosquitto saves them on SIGTERM: they survive `stop()` and `restart()`, not `kill()`.
  rumqttd has them in memory: they are gone after any stop.
* A slow or absent subscriber.  Mosquitto queues without limit (`max_queued_messages 0`).  rumqttd reads from a log for
  each topic filter, limited in bytes (segments of `max_segment_size` times `max_segment_count`, set only in its
  configuration file); a subscriber that falls behind its oldest segment is moved forward with no more than a warning,
  and the messages between are lost: hence `log_bytes`.
* Unacknowledged messages to one subscriber.  Mosquitto: `max_inflight_messages`, 0 for no limit.  rumqttd: 100, fixed
  in its code whatever `max_inflight_count` says, and acknowledgements must come in order.
* Nobody subscribed.  Both acknowledge (rumqttd with `dynamic_filters` on).
* Keep-alive 0.  Mosquitto allows it, rumqttd closes the connection.
* Versions.  Mosquitto speaks 3.1.1 and 5 on every port; rumqttd needs a port for each.
* Client certificates.  rumqttd, as built in the wheel, does not ask for them.
"""

from __future__ import annotations

import enum
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
_SYSTEM_DIRECTORIES = ":/usr/local/sbin:/usr/sbin:/sbin"  # where Debian puts the binary, and not on a user's PATH


@dataclass(frozen=True)
class TlsFiles:
    """Paths of PEM files: one authority with what it signed, and a second authority nobody was told to trust."""

    ca: str
    server_cert: str  # for localhost and 127.0.0.1
    server_key: str
    other_host_cert: str  # same authority, for another host
    other_host_key: str
    client_cert: str
    client_key: str
    foreign_ca: str
    foreign_client_cert: str
    foreign_client_key: str


class Ability(enum.Enum):
    """What one expects of a broker of MQTT, and not every one has; the end-to-end tests see what is done instead."""

    VERSION_5 = enum.auto()
    SHARED_SUBSCRIPTIONS = enum.auto()
    RETAINED_FOR_WILDCARDS = enum.auto()  # a retained message comes to a filter with wildcards too
    SESSION_AFTER_STOP = enum.auto()  # sessions and their messages are there when it is started again
    SESSION_AFTER_KILL = enum.auto()
    RETAINED_AFTER_STOP = enum.auto()
    RETAINED_AFTER_KILL = enum.auto()
    DOT_IN_TOPIC = enum.auto()  # arrives as it was published
    SPACE_IN_TOPIC = enum.auto()
    STAR_IN_TOPIC = enum.auto()


ALL_ABILITIES = frozenset(Ability)


def path_of(program: str) -> str | None:
    """Where a program is, or None where it is not installed."""
    return shutil.which(program, path=os.environ.get("PATH", os.defpath) + _SYSTEM_DIRECTORIES)


def mosquitto_path() -> str | None:
    """The Mosquitto binary, or None where it is not installed."""
    return path_of("mosquitto")


class Port:
    """A port that is bound and not listened on: connecting is refused, and a broker may listen there (SO_REUSEADDR).

    The kernel gives it neither to another ``bind`` nor to an outgoing connection while we hold it.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((HOST, 0))
        self.number: int = self._socket.getsockname()[1]

    def release(self) -> None:
        self._socket.close()


class Child:
    """A process with a watchdog that kills it when this process is gone, even by SIGKILL."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                close_fds=True,
                env={**os.environ, **environment},
            )
        # The shell blocks in `read` until our end of its pipe closes.
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", 'read _; kill -9 "$1"', "sh", str(self._process.pid)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self, wait_seconds: float) -> int | None:
        try:
            return self._process.wait(wait_seconds)
        except subprocess.TimeoutExpired:
            return None

    def end(self, *, kill: bool, timeout: float) -> None:
        # The watchdog first: later the process id might belong to somebody else.
        self._watchdog.kill()
        self._watchdog.wait()
        if self._watchdog.stdin is not None:
            self._watchdog.stdin.close()
        if not kill:
            self._process.terminate()
            if self.exit_code(timeout) is not None:
                return
        self._process.kill()
        self._process.wait()


class Broker:
    """What Mosquitto and Rumqttd have in common.  Not thread-safe; every method blocks, at most about a minute.

    Args:
        directory: a directory of its own for configuration, log and data.
        tls: offer TLS on :attr:`tls_port`, with the server certificate in it (or ``certificate``: paths of certificate
            and key).
        users: names and passwords; None lets everybody in.
    """

    name = ""
    abilities: frozenset[Ability] = ALL_ABILITIES
    #: What it does at one time and not at another.
    unsure: frozenset[Ability] = frozenset()

    def __init__(
        self,
        directory: Path,
        *,
        tls: TlsFiles | None = None,
        certificate: tuple[str, str] | None = None,
        users: dict[str, str] | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.log = directory / "broker.log"
        self.tls = tls
        self.certificate = certificate or ((tls.server_cert, tls.server_key) if tls else None)
        self.users = users
        self._ports: list[Port] = []
        self.port = self._take_port()
        self.tls_port = self._take_port() if tls else 0
        self._child: Child | None = None

    def _take_port(self) -> int:
        self._ports.append(Port())
        return self._ports[-1].number

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _environment(self) -> dict[str, str]:
        """Variables beside our own."""
        return {}

    def _listening(self) -> list[int]:
        return [port for port in (self.port, self.tls_port) if port]

    def port_for(self, *, secure: bool, protocol: str) -> int:
        """Where a client connects that speaks this version, with or without TLS."""
        return self.tls_port if secure else self.port

    @property
    def has_plain_port(self) -> bool:
        return self.port in self._listening()

    @property
    def pid(self) -> int:
        """The process id of the running broker."""
        if self._child is None:
            raise RuntimeError(f"{self.name} is not running")
        return self._child.pid

    @property
    def is_running(self) -> bool:
        return self._child is not None and self._child.exit_code(0) is None

    def start(self, timeout: float = 60.0) -> Broker:
        """Start, and wait until every port accepts connections.  Returns itself."""
        if self._child is not None:
            raise RuntimeError(f"{self.name} is running already")
        self._child = Child(self._command(), self.log, self._environment())
        deadline = time.monotonic() + timeout
        for port in self._listening():
            while not accepts(port):
                # Waiting for its end is the pause between two tries.
                code = self._child.exit_code(0.02)
                if code is not None or time.monotonic() > deadline:
                    self.kill()
                    what = "does not listen" if code is None else f"ended with {code}"
                    raise RuntimeError(f"{self.name} {what}:\n{self.log_text()[-4000:]}")
        return self

    def stop(self, timeout: float = 60.0) -> None:
        """Ask it to end (SIGTERM) and wait until it has.  Does nothing if it is not running."""
        if self._child is not None:
            self._child.end(kill=False, timeout=timeout)
            self._child = None

    def kill(self) -> None:
        """SIGKILL; what it had only in memory is lost.  Does nothing if it is not running."""
        if self._child is not None:
            self._child.end(kill=True, timeout=0)
            self._child = None

    def restart(self) -> None:
        """Stop and start, on the same ports."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Stop and give the ports back."""
        self.stop()
        for port in self._ports:
            port.release()

    def log_text(self) -> str:
        """What the broker has logged so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def __enter__(self) -> Broker:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


class Mosquitto(Broker):
    """The Debian package's broker.

    Args:
        max_inflight: unacknowledged messages to one subscriber; 0 has no limit.
        tcp_nodelay: without it (Mosquitto's own default) small windows cost 40 ms each.
        require_certificate: refuse TLS clients without a certificate of our authority.
        max_packet_bytes: refuse larger packets; 0 has no limit.
        websockets: listen for them too, on :attr:`websocket_port`, and with ``tls`` on :attr:`websocket_tls_port`.
            What goes to a subscriber leaves in pieces of 4 KiB, one each 100 ms while nothing else happens.
        extra: more lines of its configuration.
    """

    name = "mosquitto"
    abilities = ALL_ABILITIES - {Ability.SESSION_AFTER_KILL, Ability.RETAINED_AFTER_KILL}

    def __init__(
        self,
        directory: Path,
        *,
        max_inflight: int = 0,
        tcp_nodelay: bool = True,
        tls: TlsFiles | None = None,
        certificate: tuple[str, str] | None = None,
        require_certificate: bool = False,
        users: dict[str, str] | None = None,
        max_packet_bytes: int = 0,
        websockets: bool = False,
        extra: tuple[str, ...] = (),
    ) -> None:
        super().__init__(directory, tls=tls, certificate=certificate, users=users)
        self.websocket_port = self._take_port() if websockets else 0
        self.websocket_tls_port = self._take_port() if websockets and tls else 0
        path = mosquitto_path()
        if path is None:
            raise RuntimeError("mosquitto is not installed")
        self._path = path
        self._config = directory / "mosquitto.conf"
        data = directory / "data"
        data.mkdir(exist_ok=True)
        lines = [
            # Started by root it would become the user `mosquitto`, who may not enter our directory.
            *(["user root"] if os.geteuid() == 0 else []),
            "sys_interval 0",
            "log_dest stderr",
            "log_type error",
            "log_type warning",
            "log_type notice",
            "connection_messages true",
            "persistence true",
            f"persistence_location {data}/",
            "max_queued_messages 0",
            "max_queued_bytes 0",
            f"max_inflight_messages {max_inflight}",
            f"set_tcp_nodelay {str(tcp_nodelay).lower()}",
            *([f"max_packet_size {max_packet_bytes}"] if max_packet_bytes else []),
            *self._access(directory),
            *extra,
            f"listener {self.port} {HOST}",
        ]
        if websockets:
            lines += [f"listener {self.websocket_port} {HOST}", "protocol websockets"]
        for port in (self.tls_port, self.websocket_tls_port):
            if port and tls is not None and self.certificate is not None:
                lines += [
                    f"listener {port} {HOST}",
                    *(["protocol websockets"] if port == self.websocket_tls_port else []),
                    f"cafile {tls.ca}",
                    f"certfile {self.certificate[0]}",
                    f"keyfile {self.certificate[1]}",
                    f"require_certificate {str(require_certificate).lower()}",
                ]
        self._config.write_text("\n".join(lines) + "\n")

    def _listening(self) -> list[int]:
        return [*super()._listening(), *(port for port in (self.websocket_port, self.websocket_tls_port) if port)]

    def _access(self, directory: Path) -> list[str]:
        if self.users is None:
            return ["allow_anonymous true"]
        file = directory / "passwords"
        file.write_text("".join(f"{user}:{password}\n" for user, password in self.users.items()))
        file.chmod(0o600)
        subprocess.run(["mosquitto_passwd", "-U", str(file)], check=True, capture_output=True, timeout=60)
        return ["allow_anonymous false", f"password_file {file}"]

    def _command(self) -> list[str]:
        return [self._path, "-c", str(self._config)]


# Given the path of a configuration; the broker has no way to stop, so the process is the broker.  It logs a line for
# every packet, at the level of errors, through Python's logging: that costs it twenty times what the packet does.
_RUMQTTD = (
    "import logging, sys; logging.disable(logging.ERROR); from iotcore import IotCoreBroker; "
    "IotCoreBroker(config_path=sys.argv[1]).run_forever()"
)


class Rumqttd(Broker):
    """The broker that needs no system package.  ``v5_port`` and ``v5_tls_port`` speak MQTT 5, the others 3.1.1.

    Args:
        log_bytes: what it keeps in memory for each topic filter, in 64 segments; memory is taken as it fills, and a
            subscriber that is further behind loses messages.
        max_payload_bytes: of a packet; a larger one closes the connection.
    """

    name = "rumqttd"
    abilities = ALL_ABILITIES - {
        Ability.SESSION_AFTER_STOP,
        Ability.SESSION_AFTER_KILL,
        Ability.RETAINED_AFTER_STOP,
        Ability.RETAINED_AFTER_KILL,
    }

    def __init__(
        self,
        directory: Path,
        *,
        tls: TlsFiles | None = None,
        certificate: tuple[str, str] | None = None,
        users: dict[str, str] | None = None,
        log_bytes: int = 1 << 30,
        max_payload_bytes: int = 16 << 20,
    ) -> None:
        super().__init__(directory, tls=tls, certificate=certificate, users=users)
        self.v5_port = self._take_port()
        self.v5_tls_port = self._take_port() if tls else 0
        self._config = directory / "rumqttd.toml"
        self._max_payload_bytes = max_payload_bytes
        text = f"""
            id = 0
            [router]
            id = 0
            max_connections = 1000
            max_outgoing_packet_count = 200
            max_segment_size = {max(1024, log_bytes // 64)}
            max_segment_count = 64
        """
        text += self._server("v4.1", self.port)
        text += self._server("v5.1", self.v5_port)
        if self.certificate is not None:
            for section, port in (("v4.2", self.tls_port), ("v5.2", self.v5_tls_port)):
                text += self._server(section, port)
                text += f"[{section}.tls]\ncertpath = '{self.certificate[0]}'\nkeypath = '{self.certificate[1]}'\n"
        self._config.write_text(text)

    def _server(self, section: str, port: int) -> str:
        text = f"""
            [{section}]
            name = "{section}"
            listen = "{HOST}:{port}"
            next_connection_delay_ms = 1
            [{section}.connections]
            connection_timeout_ms = 60000
            max_payload_size = {self._max_payload_bytes}
            max_inflight_count = 100
            dynamic_filters = true
        """
        if self.users is not None:
            text += f"[{section}.connections.auth]\n"
            text += "".join(f"{user} = '{password}'\n" for user, password in self.users.items())
        return text

    def _command(self) -> list[str]:
        return [sys.executable, "-c", _RUMQTTD, str(self._config)]

    def _listening(self) -> list[int]:
        return [*super()._listening(), *(port for port in (self.v5_port, self.v5_tls_port) if port)]

    def port_for(self, *, secure: bool, protocol: str) -> int:
        if protocol == "5":
            return self.v5_tls_port if secure else self.v5_port
        return super().port_for(secure=secure, protocol=protocol)


def accepts(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return False
    return True

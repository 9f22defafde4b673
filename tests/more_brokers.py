"""NATS with JetStream and RabbitMQ with its MQTT plug-in, of Debian, for the tests.  Both speak MQTT 3.1.1.

As in `tests.brokers`: 127.0.0.1 only, own directories and ports, and they end with this process.  What they were seen
to do is in docs/brokers.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.brokers import ALL_ABILITIES, HOST, Ability, Broker, Child, TlsFiles, accepts, path_of


def nats_path() -> str | None:
    """The nats-server binary, or None where it is not installed."""
    return path_of("nats-server")


class Nats(Broker):
    """nats-server.  Sessions, messages and retained messages are in its store on the disk and survive `kill`.

    Args:
        tls: then it speaks MQTT on ``tls_port`` alone: a server has one MQTT listener.
        node: its name; in a cluster each has its own.
        ack_wait: how long a subscriber has to acknowledge before a message is repeated, on the same connection.
    """

    name = "nats"
    abilities = ALL_ABILITIES - {
        Ability.VERSION_5,
        Ability.SHARED_SUBSCRIPTIONS,
        Ability.DOT_IN_TOPIC,
        Ability.SPACE_IN_TOPIC,
    }

    def __init__(
        self,
        directory: Path,
        *,
        tls: TlsFiles | None = None,
        certificate: tuple[str, str] | None = None,
        node: str = "single",
        ack_wait: str = "60s",
    ) -> None:
        super().__init__(directory, tls=tls, certificate=certificate)
        path = nats_path()
        if path is None:
            raise RuntimeError("nats-server is not installed")
        self._path = path
        self.node, self._ack_wait = node, ack_wait
        self.client_port = self._take_port()
        self.cluster_port = self._take_port()
        #: All nodes of the cluster; set before `start`.
        self.cluster: list[Nats] = []

    def _command(self) -> list[str]:
        config = self.directory / "nats.conf"
        tls = ""
        listen = f"{HOST}:{self._listening()[0]}"
        if self.certificate is not None:
            tls = f'tls {{ cert_file: "{self.certificate[0]}", key_file: "{self.certificate[1]}" }}'
        text = f"""
            server_name: "{self.node}"
            listen: "{HOST}:{self.client_port}"
            jetstream {{ store_dir: "{self.directory / "store"}", max_memory_store: 64MB, max_file_store: 1GB }}
            mqtt {{ listen: "{listen}", max_ack_pending: 1000, ack_wait: "{self._ack_wait}", {tls} }}
        """
        if self.cluster:
            routes = ", ".join(f'"nats://{HOST}:{each.cluster_port}"' for each in self.cluster)
            text += f'cluster {{ name: "tests", listen: "{HOST}:{self.cluster_port}", routes: [{routes}] }}\n'
        config.write_text(text)
        return [self._path, "-c", str(config)]

    def _listening(self) -> list[int]:
        return [self.tls_port or self.port]


@contextmanager
def nats_cluster(directory: Path, count: int = 3) -> Iterator[list[Nats]]:
    """Nodes that know each other, running.  Everything MQTT keeps has a replica on each of the three."""
    nodes = [Nats(directory / f"node{number}", node=f"node{number}") for number in range(count)]
    with ExitStack() as stack:
        for each in nodes:
            each.cluster = nodes
            stack.enter_context(each)
        yield nodes


def rabbitmq_path() -> str | None:
    """RabbitMQ's own script, or None where it is not installed; Debian's on the PATH insists on a user of its own."""
    scripts = sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server"))
    return str(scripts[-1]) if scripts and path_of("erl") and path_of("epmd") else None


class RabbitMQ(Broker):
    """RabbitMQ; slow to start.  Sessions and their messages are on its disk and survive `kill`.

    Erlang's port mapper, epmd, is a process of ours too: left to itself it would start in the background and stay.
    """

    name = "rabbitmq"
    abilities = ALL_ABILITIES - {
        Ability.VERSION_5,
        Ability.SHARED_SUBSCRIPTIONS,
        Ability.RETAINED_FOR_WILDCARDS,
        Ability.DOT_IN_TOPIC,
        Ability.STAR_IN_TOPIC,
    }
    unsure = frozenset({Ability.RETAINED_AFTER_KILL})  # it writes what is retained to the disk now and then

    def __init__(
        self, directory: Path, *, tls: TlsFiles | None = None, certificate: tuple[str, str] | None = None
    ) -> None:
        super().__init__(directory, tls=tls, certificate=certificate)
        path, epmd = rabbitmq_path(), path_of("epmd")
        if path is None or epmd is None:
            raise RuntimeError("rabbitmq-server is not installed")
        self._path, self._epmd_path = path, epmd
        self.epmd_port = self._take_port()
        self._distribution_port = self._take_port()
        self._epmd: Child | None = None
        lines = [
            "listeners.tcp = none",
            f"mqtt.listeners.tcp.1 = {HOST}:{self.port}",
            "mqtt.tcp_listen_options.nodelay = true",
            "mqtt.allow_anonymous = true",
            "mqtt.prefetch = 1000",
            "log.console = true",
            "log.console.level = warning",
            "log.file = false",
            "disk_free_limit.absolute = 1MB",
        ]
        if tls is not None and self.certificate is not None:
            lines += [
                f"mqtt.listeners.ssl.1 = {HOST}:{self.tls_port}",
                f"ssl_options.cacertfile = {tls.ca}",
                f"ssl_options.certfile = {self.certificate[0]}",
                f"ssl_options.keyfile = {self.certificate[1]}",
                "ssl_options.verify = verify_none",
                "ssl_options.fail_if_no_peer_cert = false",
            ]
        (directory / "rabbitmq.conf").write_text("\n".join(lines) + "\n")
        (directory / "enabled_plugins").write_text("[rabbitmq_mqtt].\n")

    def _command(self) -> list[str]:
        return [self._path, "-noinput"]

    def _environment(self) -> dict[str, str]:
        at = self.directory
        return {
            "HOME": str(at),  # where Erlang keeps the cookie of its nodes
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",  # not that of the machine
            "RABBITMQ_CONFIG_FILE": str(at / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(at / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(at / "enabled_plugins"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(at / "generated"),
            "RABBITMQ_MNESIA_BASE": str(at / "mnesia"),
            "RABBITMQ_LOG_BASE": str(at / "log"),
            "RABBITMQ_NODENAME": "tests@localhost",
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            # It would run below a shell that has to be killed too; with this it takes the shell's place.
            "RABBITMQ_ALLOW_INPUT": "1",
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": HOST,
            "ERL_FLAGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }

    def start(self, timeout: float = 200.0) -> Broker:
        if self._child is not None:
            raise RuntimeError("rabbitmq is running already")
        self._epmd = Child([self._epmd_path, "-port", str(self.epmd_port), "-address", HOST], self.log, {})
        deadline = time.monotonic() + 60
        while not accepts(self.epmd_port):  # or RabbitMQ would start another
            if self._epmd.exit_code(0.02) is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"epmd does not listen:\n{self.log_text()[-4000:]}")
        return super().start(timeout)

    def stop(self, timeout: float = 60.0) -> None:
        super().stop(timeout)
        self._end_epmd()

    def kill(self) -> None:
        super().kill()
        self._end_epmd()

    def _end_epmd(self) -> None:
        """After the broker, which would start it again."""
        if self._epmd is not None:
            self._epmd.end(kill=True, timeout=0)
            self._epmd = None

    @property
    def epmd_pid(self) -> int:
        if self._epmd is None:
            raise RuntimeError("epmd is not running")
        return self._epmd.pid

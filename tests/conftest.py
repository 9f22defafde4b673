"""Brokers and certificates for every test that wants them."""

from __future__ import annotations

import os
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import trustme

from tests.brokers import Broker, Mosquitto, Rumqttd, TlsFiles, mosquitto_path
from tests.links import KINDS, PACKAGES, WAYS, Link, Way
from tests.more_brokers import Nats, nats_path, rabbitmq_path

# A run in the background of a shell ignores Ctrl-C, and so would every process under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

EMULATED = bool(os.environ.get("TESTS_EMULATED"))
# How long an example takes says something of the machine alone.
slow = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=slow)
hypothesis.settings.load_profile("any machine")

# Debian's packages, and whether they are installed.
_PACKAGES = {"mosquitto": mosquitto_path, "nats-server": nats_path, "rabbitmq-server": rabbitmq_path}
_skipped = pytest.StashKey[dict[str, int]]()


@pytest.fixture(autouse=True)
def ring_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where rings lie, those of child processes too: on tmpfs, and gone after the test with what a kill left in it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        monkeypatch.setenv("RUNTIME_DIRECTORY", directory)
        yield directory


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def _need(package: str, config: pytest.Config) -> None:
    if _PACKAGES[package]() is not None:
        return
    if in_ci():
        pytest.fail(f"{package} is not installed, and in CI nothing may be skipped for that")
    counts = config.stash.setdefault(_skipped, {})
    counts[package] = counts.get(package, 0) + 1
    pytest.skip(_without(package))


def _without(package: str) -> str:
    return f"{package} is not installed: tests on it were SKIPPED and prove nothing (apt-get install {package})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not EMULATED:
        return
    for item in items:
        item.add_marker(pytest.mark.timeout(1200), append=False)  # before what a test says of itself
        for mark in item.iter_markers("native"):
            item.add_marker(pytest.mark.skip(reason=f"under qemu: {mark.args[0]}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    skipped = config.stash.get(_skipped, {})
    if skipped:
        terminalreporter.section("NOT TESTED", sep="!", red=True, bold=True)
    for package, count in skipped.items():
        terminalreporter.line(f"{count} tests: {_without(package)}", red=True, bold=True)


@pytest.fixture
def mosquitto(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mosquitto]:
    """A running Mosquitto of the test's own."""
    _need("mosquitto", request.config)
    broker = Mosquitto(tmp_path / "mosquitto")
    with broker:
        yield broker


@pytest.fixture
def need_mosquitto(request: pytest.FixtureRequest) -> None:
    """For tests that start a Mosquitto with options of their own: skips, or fails in CI, where there is none."""
    _need("mosquitto", request.config)


@pytest.fixture
def rumqttd(tmp_path: Path) -> Iterator[Rumqttd]:
    """A running rumqttd of the test's own."""
    broker = Rumqttd(tmp_path / "rumqttd")
    with broker:
        yield broker


@pytest.fixture
def nats(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Nats]:
    """A running NATS server with JetStream, of the test's own."""
    _need("nats-server", request.config)
    with Nats(tmp_path / "nats") as broker:
        yield broker


@pytest.fixture
def need_nats(request: pytest.FixtureRequest) -> None:
    """For tests that start a NATS server with options of their own: skips, or fails in CI, where there is none."""
    _need("nats-server", request.config)


@pytest.fixture(scope="session")
def _shared(
    tls_files: TlsFiles, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, bool], Broker]]:
    """Gives the running broker of a kind that all tests share."""
    made: dict[tuple[str, bool], Broker] = {}

    def give(kind: str, secure: bool) -> Broker:
        key = (kind, secure and kind == "nats")  # the others speak TLS and plain at the same time
        if key not in made:
            tls = tls_files if secure or kind != "nats" else None
            made[key] = KINDS[kind](tmp_path_factory.mktemp(kind), tls=tls)
        if not made[key].is_running:
            made[key].kill()  # what is left of it
            made[key].start()
        return made[key]

    try:
        yield give
    finally:
        for broker in made.values():
            broker.kill()  # nothing of it is wanted any more
            broker.close()


@pytest.fixture
def rabbitmq(request: pytest.FixtureRequest) -> Broker:
    """The running RabbitMQ of all tests, because it is slow to start: use client ids and topics of your own."""
    _need("rabbitmq-server", request.config)
    running: Broker = request.getfixturevalue("_shared")("rabbitmq", True)
    return running


@pytest.fixture(params=WAYS, ids=lambda way: way.name)
def link(request: pytest.FixtureRequest, tls_files: TlsFiles) -> Link:
    """Each way to each of the four brokers in turn, running; `pytest.mark.parametrize("link", ..., indirect=True)`
    takes fewer."""
    way: Way = request.param
    if way.kind in PACKAGES:
        _need(PACKAGES[way.kind], request.config)
    broker: Broker = request.getfixturevalue("_shared")(way.kind, way.secure)
    return Link(way, broker, f"w{uuid.uuid4().hex[:10]}", tls_files)


@pytest.fixture(params=["mosquitto", "rumqttd"])
def broker(request: pytest.FixtureRequest) -> Broker:
    """Each of the two brokers in turn, running, of the test's own."""
    running: Broker = request.getfixturevalue(request.param)
    return running


@pytest.fixture(scope="session")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    """Certificates made for this run."""
    directory = tmp_path_factory.mktemp("tls")
    authority, foreign = trustme.CA(), trustme.CA()

    def write(name: str, *blobs: trustme.Blob) -> str:
        path = directory / name
        path.write_bytes(b"".join(blob.bytes() for blob in blobs))
        path.chmod(0o600)
        return str(path)

    def issue(name: str, issuer: trustme.CA, *identities: str) -> tuple[str, str]:
        issued = issuer.issue_cert(*identities)
        return (
            write(f"{name}.pem", *issued.cert_chain_pems),
            write(f"{name}.key", issued.private_key_pem),
        )

    server = issue("server", authority, "localhost", "127.0.0.1")
    other = issue("other", authority, "elsewhere.example")
    client = issue("client", authority, "gateway@example.org")
    foreign_client = issue("foreign-client", foreign, "gateway@example.org")
    return TlsFiles(
        ca=write("ca.pem", authority.cert_pem),
        server_cert=server[0],
        server_key=server[1],
        other_host_cert=other[0],
        other_host_key=other[1],
        client_cert=client[0],
        client_key=client[1],
        foreign_ca=write("foreign-ca.pem", foreign.cert_pem),
        foreign_client_cert=foreign_client[0],
        foreign_client_key=foreign_client[1],
    )

"""Brokers and certificates for every test that wants them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.brokers import Broker, Mosquitto, Rumqttd, TlsFiles, mosquitto_path

# A run in the background of a shell ignores Ctrl-C, and so would every process under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

_NO_MOSQUITTO = "mosquitto is not installed: tests on it were SKIPPED and prove nothing (apt-get install mosquitto)"
_skipped = pytest.StashKey[int]()


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def _need_mosquitto(config: pytest.Config) -> None:
    if mosquitto_path() is not None:
        return
    if in_ci():
        pytest.fail("mosquitto is not installed, and in CI nothing may be skipped for that")
    config.stash[_skipped] = config.stash.get(_skipped, 0) + 1
    pytest.skip(_NO_MOSQUITTO)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    skipped = config.stash.get(_skipped, 0)
    if skipped:
        terminalreporter.section("NOT TESTED", sep="!", red=True, bold=True)
        terminalreporter.line(f"{skipped} tests: {_NO_MOSQUITTO}", red=True, bold=True)


@pytest.fixture
def mosquitto(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mosquitto]:
    """A running Mosquitto of the test's own."""
    _need_mosquitto(request.config)
    broker = Mosquitto(tmp_path / "mosquitto")
    with broker:
        yield broker


@pytest.fixture
def need_mosquitto(request: pytest.FixtureRequest) -> None:
    """For tests that start a Mosquitto with options of their own: skips, or fails in CI, where there is none."""
    _need_mosquitto(request.config)


@pytest.fixture
def rumqttd(tmp_path: Path) -> Iterator[Rumqttd]:
    """A running rumqttd of the test's own."""
    broker = Rumqttd(tmp_path / "rumqttd")
    with broker:
        yield broker


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

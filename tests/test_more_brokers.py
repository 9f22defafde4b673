"""NATS and RabbitMQ as `tests.more_brokers` starts them: nobody else reaches them, and nothing of them stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.brokers import Broker
from tests.collector import Collector
from tests.making import ROOT, send
from tests.more_brokers import Nats, RabbitMQ
from tests.publishing import LIMIT, until


def listening(pid: int) -> set[str]:
    connections = psutil.Process(pid).net_connections("inet")
    return {each.laddr.ip for each in connections if each.status == "LISTEN"}


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("kind", ["nats", "rabbitmq"])
def test_nobody_else_can_reach_them(kind: str, request: pytest.FixtureRequest) -> None:
    broker: Broker = request.getfixturevalue(kind)
    assert listening(broker.pid) == {"127.0.0.1"}
    if isinstance(broker, RabbitMQ):
        assert listening(broker.epmd_pid) <= {"127.0.0.1", "::1"}


def test_nats_is_found_again_on_its_port_with_all_that_it_had(nats: Nats) -> None:
    port, pid = nats.port, nats.pid
    with Collector(port, "t"):
        pass
    send(nats, [("t", b"1"), ("t", b"2")])
    nats.kill()
    assert not nats.is_running
    nats.start()
    assert nats.port == port and nats.pid != pid
    with Collector(port, "t") as collector:
        collector.wait_for(2, LIMIT)
        assert collector.first_deliveries() == [b"1", b"2"]


STARTS = """
import pathlib, sys, threading, time
from tests.more_brokers import RabbitMQ
broker = RabbitMQ(pathlib.Path(sys.argv[1]))
threading.Thread(target=broker.start, daemon=True).start()
while True:
    try:
        print(broker.epmd_pid, broker.pid, flush=True)
        break
    except RuntimeError:
        time.sleep(0.01)
sys.stdin.read()
"""


@pytest.mark.usefixtures("rabbitmq")  # for its need
def test_rabbitmq_and_its_port_mapper_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTS, str(tmp_path / "second")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    ) as parent:
        assert parent.stdout is not None
        started = [int(pid) for pid in parent.stdout.readline().split()]
        assert psutil.Process(started[0]).name() == "epmd"
        parent.send_signal(signal.SIGKILL)
    for pid in started:
        until(lambda pid=pid: gone(pid))


@pytest.mark.slow_brokers
def test_rabbitmq_stops_when_asked_and_takes_its_port_mapper_along(rabbitmq: RabbitMQ) -> None:
    started = [rabbitmq.pid, rabbitmq.epmd_pid]
    rabbitmq.stop()
    assert all(gone(pid) for pid in started)
    assert not [each for each in psutil.process_iter() if each.name() == "epmd" and _is_ours(each, rabbitmq)]


def _is_ours(process: psutil.Process, broker: RabbitMQ) -> bool:
    try:
        return str(broker.epmd_port) in process.cmdline() or str(broker.epmd_port) in process.environ().values()
    except psutil.Error:
        return False  # gone meanwhile

"""The gateway in examples/gateway as users run it: as a process, on a real broker, beside a systemd of ours."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cloudpubsub import Health, Options
from cloudpubsub._client import Client
from cloudpubsub.inspect.report import report
from cloudpubsub.inspect.spool import SpoolDirectory
from tests.brokers import Mosquitto
from tests.collector import Collector
from tests.fake_broker import FakeBroker
from tests.making import ROOT, eventually, send
from tests.packets import Publish
from tests.script import WITHHOLD, Event, Script

EXAMPLE = ROOT / "examples" / "gateway"
DEADLINE_S = 60.0


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example's own modules can be imported."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    names = ("gateway", "notify", "readings")
    yield
    for name in names:
        sys.modules.pop(name, None)


class Systemd:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.lines: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)

    def next(self) -> list[str]:
        """The lines of the next datagram."""
        self._socket.settimeout(DEADLINE_S)
        lines = self._socket.recv(65536).decode().split("\n")
        self.lines += lines
        return lines

    def drain(self) -> None:
        """Forget what was sent before now."""
        self._socket.setblocking(False)
        with suppress(BlockingIOError):
            while self._socket.recv(65536):
                pass

    def wait(self, pattern: str) -> str:
        """Until a line comes that matches as a whole."""
        until_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < until_s:
            for line in self.next():
                if re.fullmatch(pattern, line):
                    return line
        raise AssertionError(f"no {pattern} in {self.lines[-20:]}")

    def close(self) -> None:
        self._socket.close()


class Gateway:
    """The program; killed at the end of the `with` block if it still runs."""

    def __init__(self, directory: Path, port: int, *, watchdog_s: float | None = 2.0, **settings: object) -> None:
        directory.mkdir(exist_ok=True)
        self.spool = directory / "spool"
        configuration = directory / "gateway.toml"
        ours = {"interval": 0.2, "stop_timeout": 30.0, **settings}
        theirs = {"broker": f"mqtt://127.0.0.1:{port}", "client_id": "gw", "spool": str(self.spool)}
        theirs |= {"reconnect_min": 0.05, "reconnect_max": 0.2, "ring_bytes": 1 << 20, "spill_after": 3600.0}
        configuration.write_text(
            "[gateway]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in ours.items())
            + "[cloudpubsub]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in theirs.items())
        )  # fmt: skip
        self._directory = Path(tempfile.mkdtemp(dir="/tmp"))  # a socket's path may not be long
        self.systemd = Systemd(self._directory / "notify")
        self.log = directory / "log"
        environment = {**os.environ, "NOTIFY_SOCKET": self.systemd.path}
        if watchdog_s is not None:
            environment["WATCHDOG_USEC"] = str(int(watchdog_s * 1e6))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(EXAMPLE / "gateway.py"), str(configuration)],
                cwd="/",
                stderr=log,
                env=environment,
            )

    def __enter__(self) -> Gateway:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.systemd.close()
        shutil.rmtree(self._directory)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)

    def inspect(self) -> dict[str, Any]:
        return report(SpoolDirectory(self.spool))


def watch(port: int) -> Collector:
    return Collector(port, "gw/#", key=lambda topic, payload: (topic, payload))


def telemetry(collector: Collector) -> list[tuple[str, dict[str, Any]]]:
    """Topic and document of all readings, in order of first arrival."""
    seen = collector.first_deliveries()
    return [(topic, json.loads(payload)) for topic, payload in seen if topic.startswith("gw/telemetry/")]


def answers(collector: Collector) -> dict[str, dict[str, Any]]:
    """By the id of the command."""
    seen = [json.loads(payload) for topic, payload in collector.first_deliveries() if topic == "gw/answer"]
    return {each["id"]: each for each in seen}


def check_no_gap(readings: list[tuple[str, dict[str, Any]]]) -> None:
    """In each run every group that is there in each sweep comes with 1, 2, 3, …"""
    for run in {document["run"] for _, document in readings}:
        for group in ("cpu", "memory", "file_system"):
            numbers = [doc["number"] for topic, doc in readings if doc["run"] == run and topic.endswith(f"/{group}")]
            assert numbers == list(range(1, len(numbers) + 1)), (run, group)


def test_real_readings_arrive_and_systemd_hears_of_it(mosquitto: Mosquitto, tmp_path: Path) -> None:
    with watch(mosquitto.port) as collector, Gateway(tmp_path / "gw", mosquitto.port) as gateway:
        gateway.systemd.wait("READY=1")
        gateway.systemd.wait("WATCHDOG=1")
        gateway.systemd.wait(r"STATUS=connected, \d+ messages waiting.*")
        eventually(lambda: len(telemetry(collector)) >= 40, deadline_s=DEADLINE_S)
        gateway.systemd.wait("WATCHDOG=1")
        assert gateway.end() == 0
        gateway.systemd.wait("STOPPING=1")
        readings = telemetry(collector)
        check_no_gap(readings)
        last = {topic.removeprefix("gw/telemetry/"): document for topic, document in readings}
        assert last["memory"]["MemTotal_bytes"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert 0 <= last["cpu"]["busy_percent"] <= 100 and last["cpu"]["uptime_s"] > 0
        assert 0 < last["file_system"]["free_bytes"] <= last["file_system"]["total_bytes"]
        assert abs(last["cpu"]["time_ms"] / 1000 - time.time()) < 600


def test_commands_are_done_and_answered(mosquitto: Mosquitto, tmp_path: Path) -> None:
    with watch(mosquitto.port) as collector, Gateway(tmp_path / "gw", mosquitto.port, interval=3600.0) as gateway:
        gateway.systemd.wait("READY=1")

        def ask(command: str, payload: object) -> dict[str, Any]:
            data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
            identity = payload["id"] if isinstance(payload, dict) else None
            send(mosquitto, [(f"gw/command/{command}", data)], retain=True)  # the gateway may not have subscribed yet
            eventually(lambda: identity in answers(collector), deadline_s=DEADLINE_S)
            return answers(collector)[identity]

        assert ask("stats", {"id": "1"})["result"]["interval"] == 3600
        assert {document["number"] for _, document in telemetry(collector)} == {1}
        assert ask("read", {"id": "2"})["ok"]
        eventually(lambda: {doc["number"] for _, doc in telemetry(collector)} == {1, 2}, deadline_s=DEADLINE_S)
        assert ask("interval", {"id": "3", "seconds": -1}) == {
            "id": "3", "command": "interval", "ok": False,
            "error": "ValueError: seconds: -1 is not allowed; expected 0.05 to 86400 seconds",
        }  # fmt: skip
        assert ask("interval", {"id": "4"})["error"] == "KeyError: 'seconds'"
        assert not ask("reboot", {"id": "5"})["ok"]
        assert ask("read", b"no json")["error"].startswith("JSONDecodeError")
        assert ask("interval", {"id": "6", "seconds": 0.1}) == {
            "id": "6", "command": "interval", "ok": True, "result": {"seconds": 0.1},
        }  # fmt: skip
        eventually(lambda: max(document["number"] for _, document in telemetry(collector)) >= 6, deadline_s=DEADLINE_S)
        assert gateway.end() == 0
        check_no_gap(telemetry(collector))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_is_not_sent_at_the_end_is_sent_after_the_next_start(
    number: signal.Signals, mosquitto: Mosquitto, tmp_path: Path
) -> None:
    """The broker is away from the start; with SIGKILL all there is of the newest readings is the ring."""
    with watch(mosquitto.port) as collector:
        mosquitto.stop()
        with Gateway(tmp_path / "gw", mosquitto.port) as gateway:
            gateway.systemd.wait("READY=1")
            gateway.systemd.wait("WATCHDOG=1")  # an outage is no reason for a restart
            eventually(lambda: gateway.inspect()["counters"]["published"] >= 20, deadline_s=DEADLINE_S)
            assert gateway.end(number) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
            left = gateway.inspect()
            published = left["counters"]["backlog_messages"]
            assert published == left["counters"]["published"] >= 20
            assert left["meta"]["clean"] == (number == signal.SIGTERM)
            assert left["segment_messages"] == (published if number == signal.SIGTERM else 0)
        mosquitto.start()
        collector.wait_subscribed(DEADLINE_S)
        with Gateway(tmp_path / "gw", mosquitto.port) as gateway:
            gateway.systemd.wait("READY=1")
            eventually(lambda: len({doc["run"] for _, doc in telemetry(collector)}) == 2, deadline_s=DEADLINE_S)
            readings = telemetry(collector)
            first_run = readings[0][1]["run"]
            assert [doc["run"] for _, doc in readings[:published]] == [first_run] * published
            assert readings[published][1]["run"] != first_run
            assert gateway.end() == 0
        check_no_gap(telemetry(collector))


def test_what_is_in_memory_goes_to_the_disk_when_the_supply_fails(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with Gateway(tmp_path / "gw", nobody.getsockname()[1], interval=3600.0) as gateway:
            gateway.systemd.wait("READY=1")
            eventually(lambda: gateway.inspect()["counters"]["published"] >= 3, deadline_s=DEADLINE_S)
            assert gateway.inspect()["segments"] == []
            gateway.process.send_signal(signal.SIGPWR)
            eventually(lambda: "all is on the disk after" in gateway.log.read_text(), deadline_s=DEADLINE_S)
            seen = gateway.inspect()
            assert seen["segment_messages"] == seen["counters"]["published"]
            gateway.process.send_signal(signal.SIGUSR1)  # the network is back, which here it is not
            assert gateway.end(signal.SIGINT) == 0


def test_the_watchdog_starves_when_a_link_that_is_up_acknowledges_nothing(tmp_path: Path) -> None:
    def withhold(event: Event) -> bytes | None:
        return WITHHOLD if isinstance(event.packet, Publish) else None

    with FakeBroker(Script(withhold), parallel=True) as broker:
        with Gateway(tmp_path / "gw", broker.port, watchdog_s=0.4, stall_after=0.5) as gateway:
            gateway.systemd.wait("WATCHDOG=1")
            eventually(
                lambda: "the watchdog is not fed any more: connected, but nothing was acknowledged"
                in gateway.log.read_text(),
                deadline_s=DEADLINE_S,
            )
            gateway.systemd.drain()
            for _ in range(5):
                lines = gateway.systemd.next()
                assert any(line.startswith("STATUS=connected") for line in lines) and "WATCHDOG=1" not in lines


def test_what_calls_for_a_restart(modules: None, tmp_path: Path) -> None:
    import gateway

    class Fake:
        health_now = Health()
        connected, backlog_messages, acked = True, 0, 0

        def health(self, _stuck_after: float) -> Health:
            return self.health_now

        def stats(self) -> Fake:
            return self

    now_s, client = 0.0, Fake()
    path = gateway.PublishPath(client, gateway.Settings(stall_after=300.0), lambda: now_s)

    def after(pause_s: float, **changes: object) -> str | None:
        nonlocal now_s
        now_s += pause_s
        for name, value in changes.items():
            setattr(client, name, value)
        problem: str | None = path.problem()
        return problem

    assert after(0) is None
    assert after(1000) is None  # nothing waits
    assert after(1, backlog_messages=5) is None
    assert after(298) is None
    assert after(2) == "connected, but nothing was acknowledged for 301 s"
    assert after(1, acked=1) is None  # one acknowledgement is enough
    assert after(200, connected=False) is None
    assert after(1000) is None  # an outage
    assert after(1, connected=True) is None
    assert after(1, health_now=Health(("publish connection: refused: …", "storage: full"))) is None
    stuck = Health(("storage: full", "the publish thread is stuck for 61 s"), needs_restart=True)
    assert after(1, health_now=stuck) == "storage: full; the publish thread is stuck for 61 s"


def test_readings_of_a_board(modules: None, tmp_path: Path) -> None:
    import readings

    def put(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    put("proc/loadavg", "0.52 0.58 0.59 1/389 3123\n")
    put("proc/uptime", "350735.47 234388.90\n")
    put("proc/stat", "cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1\n")
    put("proc/meminfo", "MemTotal:  255436 kB\nMemAvailable:  100 kB\nHugePages_Total: 0\n")
    put("proc/pressure/io", "some avg10=1.50 avg60=0.1 avg300=0.0 total=5\nfull avg10=0.25 avg60=0 avg300=0 total=1\n")
    put("proc/net/dev", "a\nb\n  lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\neth0: 1000 5 1 0 0 0 0 0 2000 6 2 0 0 0 0 0\n")
    put("sys/block/mmcblk0/stat", "10 0 80 5 20 0 400 7 0 0 0\n")
    put("sys/block/loop0/stat", "10 0 80 5 20 0 400 7 0 0 0\n")
    put("sys/class/thermal/thermal_zone0/temp", "48312\n")
    put("sys/class/thermal/thermal_zone0/type", "cpu thermal\n")
    put("sys/class/thermal/thermal_zone1/temp", "")  # a sensor that sleeps
    put("sys/class/thermal/thermal_zone1/type", "gpu\n")
    put("sys/class/hwmon/hwmon0/temp1_input", "-500\n")
    put("sys/class/hwmon/hwmon0/name", "rtc/chip\n")
    put("sys/class/mmc_host/mmc0/mmc0:0001/life_time", "0x01 0x0b\n")
    host = readings.Readings(tmp_path, tmp_path)
    first = dict(host.sweep())
    assert "busy_percent" not in first["cpu"] and first["cpu"]["load_15min"] == 0.59
    put("proc/stat", "cpu  150 0 50 840 60 0 0 0 0 0\n")
    put("sys/class/thermal/thermal_zone1/temp", "50000\n")
    seen = dict(host.sweep())
    assert seen["cpu"]["busy_percent"] == 50.0
    assert seen["memory"] == {"MemTotal_bytes": 255436 * 1024, "MemAvailable_bytes": 102400}
    assert seen["pressure"] == {"io_some_10s_percent": 1.5, "io_full_10s_percent": 0.25}
    assert seen["network/eth0"] == {
        "received_bytes": 1000, "receive_errors": 1, "sent_bytes": 2000, "send_errors": 2
    }  # fmt: skip
    assert seen["block/mmcblk0"] == {"reads": 10, "read_bytes": 40960, "writes": 20, "written_bytes": 204800}
    assert seen["temperature/cpu_thermal_0"] == {"celsius": 48.312}
    assert seen["temperature/rtc_chip_hwmon0_1"] == {"celsius": -0.5}
    assert seen["flash/mmc0_0001"] == {"life_a": 1, "life_b": 11}
    assert set(seen) - set(first) == {"temperature/gpu_1"}
    assert not any("loop" in name or name.endswith("/lo") for name in seen)


def test_notifying_needs_nobody_to_listen(modules: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import notify

    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    assert not notify.notify("READY=1")
    name = f"cloudpubsub-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        assert notify.notify("READY=1", "STATUS=fine")
        assert receiver.recv(100) == b"READY=1\nSTATUS=fine"
    for usec, pid, seconds in (("3000000", "", 3.0), ("x", "", None), ("0", "", None), ("3000000", "1", None)):
        monkeypatch.setenv("WATCHDOG_USEC", usec)
        monkeypatch.setenv("WATCHDOG_PID", pid or str(os.getpid()))
        assert notify.watchdog_s() == seconds
    monkeypatch.delenv("WATCHDOG_USEC")
    assert notify.watchdog_s() is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[gateway]\ninterval = 0\n", "interval: 0 is not allowed"),
        ("[gateway]\ntopic = 'a/#'\n", "topic: 'a/#' is not allowed"),
        ("[gateway]\nintervall = 1\n", "intervall: not known"),
        ("[cloudpubsub]\nbroker = 'http://x'\n", "broker"),
        ("[gateway\n", "gateway.toml"),
        (None, "No such file"),
    ],
)
def test_a_wrong_configuration_ends_with_2(
    text: str | None,
    said: str,
    modules: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import gateway

    path = tmp_path / "gateway.toml"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["gateway.py", str(path)])
    assert gateway.main() == 2
    assert said in caplog.text


def test_the_exit_code_is_that_of_the_process(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE / "gateway.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: gateway.py CONFIGURATION.toml\n")


@pytest.mark.parametrize(("board", "memory_max"), [("1gb", "256M"), ("256mb", "96M")])
def test_the_settings_for_a_board_are_allowed(board: str, memory_max: str, modules: None, tmp_path: Path) -> None:
    import gateway

    path = EXAMPLE / f"gateway-{board}.toml"
    settings, options = gateway.Settings.from_toml(str(path)), Options.from_toml(path)
    unit = (EXAMPLE / "gateway.service").read_text()
    stop_s = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.M)
    assert stop_s is not None and settings.stop_timeout + 5 <= int(stop_s[1])
    files = unit + (EXAMPLE / "small-board.conf").read_text()
    assert f"\nMemoryMax={memory_max}\n" in files
    assert options.spool == "/var/lib/gateway/spool" and "\nStateDirectory=gateway\n" in unit
    # A client can be made of it, elsewhere.
    text = path.read_text().replace("/var/lib/gateway/spool", str(tmp_path / "spool"))
    (tmp_path / "gateway.toml").write_text(text)
    Client(options=Options.from_toml(tmp_path / "gateway.toml")).close()


# ---- the unit, where systemd is installed


def systemd_analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed: the unit was not checked")
    command = [tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with its drop-in, and paths that are there."""
    text = (EXAMPLE / "gateway.service").read_text()
    assert text.count("/opt/gateway/bin/python") == 1
    path = tmp_path / "gateway.service"
    path.write_text(text.replace("/opt/gateway/bin/python", sys.executable))
    path.chmod(0o644)
    drop_ins = tmp_path / "gateway.service.d"
    drop_ins.mkdir()
    shutil.copy(EXAMPLE / "small-board.conf", drop_ins)
    return path


def test_systemd_finds_nothing_wrong_with_the_unit(unit: Path) -> None:
    done = systemd_analyze("verify", unit)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_systemd_finds_what_is_wrong_with_a_unit(unit: Path) -> None:
    """Or the test above could not fail."""
    drop_in = unit.parent / "gateway.service.d" / "small-board.conf"
    for path, line, said in (
        (unit, "WatchdogSecs=60", "'WatchdogSecs'"),
        (drop_in, "MemoryMax=x", "Invalid memory limit"),
    ):
        text = path.read_text()
        path.write_text(text.replace("[Service]", f"[Service]\n{line}", 1))
        assert said in systemd_analyze("verify", unit).stderr
        path.write_text(text)


def test_the_unit_is_well_fenced(unit: Path) -> None:
    done = systemd_analyze("security", "--no-pager", "--offline=yes", "--threshold=20", unit)
    if "unrecognized option" in done.stderr:
        pytest.skip("systemd-analyze is too old to judge a unit that is not installed")
    assert done.returncode == 0, done.stdout[-500:]
